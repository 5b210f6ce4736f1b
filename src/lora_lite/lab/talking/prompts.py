"""A question with what was said before it as one prompt, in the form that training gave its own."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.lab.errors import RunError
from lora_lite.lab.models.chat import History
from lora_lite.lab.tasks.task import Example
from lora_lite.lab.training.data import prompt_ids
from lora_lite.lab.training.limits import positions_of


@dataclass(frozen=True)
class PromptForm:
    """How a prompt is written.

    instruction: the system message. chat: whether the model's chat template is used, if it has one; False gives the
    prompt as it stands.
    """

    instruction: str = ""
    chat: bool = True

    def described(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The form in words, for a model's tokenizer."""
        if not self.chat:
            return "prompts stand as they are, without a chat template"
        way = "in the chat template" if tokenizer.chat_template else "followed by a line end (it has no chat template)"
        system = f"system message {self.instruction!r}" if self.instruction else "no system message"
        return f"prompts stand {way}, {system}"


def fitted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptForm,
    question: str,
    history: History = (),
    new_tokens: int = 1,
) -> tuple[list[int], Sequence[tuple[str, str]]]:
    """Token ids of a question after a history, ready for a reply, and the history that was kept.

    The oldest turns are left out where the whole, with `new_tokens` more, has more tokens than the model has positions.

    Raises:
        RunError: the question alone is too long, or empty. ChatTemplateError: the template shows not all of it.
    """
    if not question.strip():
        raise RunError("the prompt is empty: give a question, or the beginning of a text")
    example = Example(question, "", "", form.instruction, chat=form.chat)
    ids, kept = prompt_ids(tokenizer, example, history), history
    while kept and len(ids) + new_tokens > positions_of(model):
        kept = kept[1:]
        ids = prompt_ids(tokenizer, example, kept)
    if len(ids) + new_tokens <= positions_of(model):
        return ids, kept
    raise RunError(
        f"the prompt takes {len(ids)} tokens and its reply up to {new_tokens}, and the model has "
        f"{positions_of(model):.0f} positions: shorten the prompt, or lower --max-new-tokens"
    )
