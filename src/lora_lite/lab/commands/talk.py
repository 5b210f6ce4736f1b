"""`lora-lite generate` and `lora-lite chat`: talk to what was trained."""

import contextlib
import dataclasses
import io
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lora_lite.errors import LoraLiteError
from lora_lite.lab import terminal
from lora_lite.lab.errors import RunError
from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.shared_flags import EVERYWHERE, Shared, TrustRemoteCode
from lora_lite.lab.talking.dialogue import Dialogue, coefficients, interruptible
from lora_lite.lab.talking.prompts import PromptForm
from lora_lite.lab.talking.replies import Decoding, Reply
from lora_lite.lab.talking.slash_commands import obey
from lora_lite.lab.talking.standard_input import next_line, require_text, whole_input
from lora_lite.lab.talking.trained import Trained, look, open_model
from lora_lite.lab.training.config import RunConfig


@dataclass(frozen=True)
class ChatFlags:
    """Who is talked to, and how.

    Attributes:
        adapter: a file that `ll.save` or `lora-lite train` wrote, or the folder of a run.
        c: the coefficient: 0 is the base, 1 the trained adapter, -1 its opposite; or several, as in -1,0,1.
        model: the base: "smollm2" (embedded), a hub id or a local folder. None: the one that the run or the file names.
        system: the system message. None: the one of training, where the run's record holds it. "" for none.
        plain: give prompts as they stand, without the chat template.
        max_new_tokens: most tokens of a reply.
        temperature: 0 takes the likeliest token each time; 1 samples as the model predicts.
        seed: of the samples. The same seed gives the same replies.
        quantization: of the base: "none", "4bit" or "8bit" (bitsandbytes).
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: where to run. None: the GPU if there is one.
    """

    adapter: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    c: str = "1"
    model: str | None = None
    system: str | None = None
    plain: bool = False
    max_new_tokens: int = Decoding.max_new_tokens
    temperature: float = Decoding.temperature
    seed: int = Decoding.seed
    quantization: str = "none"
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: TrustRemoteCode = False

    def __post_init__(self) -> None:
        coefficients(self.c)
        self.decoding()

    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_new_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class GenerateFlags(ChatFlags):
    """Who is asked what, and how.

    Attributes:
        prompt: what to ask; "-" reads it from standard input.
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = "-"


GENERATE = (
    """Reply to a prompt with a trained adapter, at one coefficient or several.

    lora-lite generate runs/demo-lora "Reverse this list of words: one, two, three" --c -1,0,1
    lora-lite generate mine.safetensors --model Qwen/Qwen3-0.6B-Base --temperature 0.8 --seed 3 - < prompt.txt

Replies go to standard output, what is said about them to standard error. The prompt is written as training wrote its
own, as far as the run's result.json beside the adapter says how. Exit code: 0 done, 1 failed, 2 flags not understood,
130 interrupted.
"""
    + EVERYWHERE
)
CHAT = (
    """Talk to a trained adapter. It remembers what was said.

    lora-lite chat runs/demo-lora
    lora-lite chat mine.safetensors --model Qwen/Qwen3-0.6B-Base --c 1,0      both replies, the adapter's and the base's

Ctrl-C stops a reply, Ctrl-D or /quit ends the chat; /c 0.5 sets the coefficient, /reset forgets, /help lists the rest.
With several coefficients each reply is shown for each, and the chat goes on from the first one's. It works in a pipe
too, a line a turn. Exit code: 0 done, 1 failed (in a pipe: or a turn was), 2 flags not understood.
"""
    + EVERYWHERE
)
Flags = TypeVar("Flags", bound=ChatFlags)


class LineError(LoraLiteError, RuntimeError):
    """A line of the chat that could not be followed; the next one may."""


def generate(arguments: Sequence[str], shared: Shared) -> int:
    """Reply to one prompt."""
    asked, trained = opened(GenerateFlags, arguments, "generate", GENERATE)
    question = asked.prompt if asked.prompt != "-" else whole_input()
    require_text(question)
    dialogue = begin(asked, trained)
    replies = turn(dialogue, question)
    shared.say({**summary(asked, dialogue, trained), "prompt": question, "replies": as_data(replies)})
    return 0


def chat(arguments: Sequence[str], shared: Shared) -> int:
    """Talk until the input ends."""
    asked, trained = opened(ChatFlags, arguments, "chat", CHAT)
    dialogue = begin(asked, trained)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and called up again)
        terminal.remark("Ctrl-C stops a reply, Ctrl-D or /quit ends the chat; /help lists the commands")
    turns, failures = list[dict[str, Any]](), 0
    while True:
        try:
            line = next_line()
            with interruptible() as pressed:
                turns += listen(dialogue, line, pressed)
        except EOFError:
            terminal.piece("\n")
            break
        except LineError as error:
            failures += 1
            terminal.remark(error)
        except KeyboardInterrupt:
            terminal.remark("\nCtrl-D or /quit ends the chat")
    shared.say({**summary(asked, dialogue, trained), "turns": turns, "failures": failures})
    return 1 if failures and not typed else 0


def opened(kind: type[Flags], arguments: Sequence[str], name: str, about: str) -> tuple[Flags, Trained]:
    """The flags, and the adapter's file that they name, found and checked."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal's encoding lacks
    asked = tyro.cli(kind, args=list(arguments), prog=f"lora-lite {name}", description=about)
    return asked, look(asked.adapter, asked.model, asked.trust_remote_code)


def begin(asked: ChatFlags, trained: Trained) -> Dialogue:
    """Read the model, and say what is talked to."""
    form = trained.form or PromptForm()
    form = dataclasses.replace(form, chat=False, instruction="") if asked.plain else form
    form = form if asked.system is None else dataclasses.replace(form, instruction=asked.system)
    if form.instruction and not form.chat:
        raise RunError(
            "--system has no place in a plain prompt: leave it out, or put it into the prompt"
            + ("" if asked.plain else f" ({trained.where} was trained on plain prompts)")
        )
    terminal.remark(trained)
    device = pick_device(asked.device)
    dtype = pick_dtype(asked.dtype, device)
    model, tokenizer = open_model(trained, dtype, device, asked.quantization, asked.trust_remote_code)
    known = "as in training" if trained.form == form else "nothing here says how training wrote its own"
    known = known if trained.form in (form, None) else "other than in training"
    terminal.remark(f"{form.described(tokenizer)}: {known}; {device}, {str(dtype).removeprefix('torch.')}")
    if also := list(trained.found["train_also"]):
        terminal.remark(f"the file holds trained values of {', '.join(also)}, which stay at every coefficient")
    dialogue = Dialogue(model, tokenizer, form, coefficients(asked.c), asked.decoding())
    return dialogue


def listen(dialogue: Dialogue, line: str, stop: Callable[[], bool]) -> list[dict[str, Any]]:
    """Do what a line of the chat asks for; the turn as plain data, if it is one. Raises LineError."""
    try:
        if line.startswith("/"):
            obey(dialogue, *line.split(maxsplit=1))
        elif line.strip():
            return [{"prompt": line, "replies": as_data(turn(dialogue, line.removeprefix(" "), stop))}]
    except LoraLiteError as error:
        raise LineError(f"{type(error).__name__}: {error}") from error
    return []


def turn(dialogue: Dialogue, question: str, stop: Callable[[], bool] = lambda: False) -> list[Reply]:
    """Show the reply to a question at each coefficient, and take the first into the history."""
    ids, forgotten = dialogue.prompt(question)
    if forgotten:
        terminal.remark(f"(the {forgotten} oldest of the turns are forgotten: the model has no room for more)")
    replies: list[Reply] = []
    for c in dialogue.cs:
        if len(dialogue.cs) > 1:
            terminal.piece(f"c = {c:g}:\n")
        said = dialogue.reply(ids, c, terminal.piece, stop)
        terminal.piece("\n")
        replies.append(said)
        if said.stopped:
            terminal.remark("(stopped)")
            break
        if said.cut_off:
            terminal.remark(f"(cut off after {said.tokens} tokens: --max-new-tokens gives more)")
        elif not said.text:
            terminal.remark("(it ended at once)")
    dialogue.remember(question, replies[0])
    return replies


def summary(asked: ChatFlags, dialogue: Dialogue, trained: Trained) -> dict[str, Any]:
    """What a line of JSON says of who was talked to."""
    return {
        "adapter": str(trained.where),
        "model": trained.base,
        "system": dialogue.form.instruction,
        "chat": bool(dialogue.form.chat and dialogue.tokenizer.chat_template),
        **dataclasses.asdict(asked.decoding()),
    }


def as_data(replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Replies as plain data."""
    return [dataclasses.asdict(each) for each in replies]


def invitation(folder: str, run: RunConfig, shared: Shared) -> str:
    """The command that talks to what a run trained into a folder, as it can be typed here."""
    given = [folder, "--c", "1,0"]
    given += ["--quantization", run.quantization] if run.quantization != "none" else []
    given += ["--model", run.model, "--trust-remote-code"] if run.trust_remote_code else []
    own = sys.argv[0] if Path(sys.argv[0]).name == "lora-lite" and not shutil.which("lora-lite") else "lora-lite"
    return shared.command("chat", given).replace("lora-lite", own, 1)
