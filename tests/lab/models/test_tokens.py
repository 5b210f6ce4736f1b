"""Prompts and answers as token ids, with tokenizers and chat templates as they are found in the field."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import lora_lite as ll
from lab_helpers import CHAT, make_llama, make_tokenizer
from lora_lite.calibration.tokens import decode
from lora_lite.lab.models.chat import ChatTemplateError
from lora_lite.lab.tasks.task import Example
from lora_lite.lab.training import data
from lora_lite.lab.training.data import DataError, Encoded
from lora_lite.lab.training.evaluate import answer_loss_of, generate
from lora_lite.lab.training.limits import require_positions
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.progress import TrainConfig

SKIPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endif %}"
    "{% endfor %}<assistant>"
)
WANTS_PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
SHOWS_NOTHING = "{% for m in messages %}<{{ m['role'] }}>{% endfor %}"


def framed(chat: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <pad> before a text and <eos> behind it, as T5's and some Llamas' do."""
    tokenizer = make_tokenizer(chat)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 257), ("<eos>", 256)]
    )
    tokenizer.bos_token = "<pad>"
    return tokenizer


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_does_not_end_in_the_end_token_that_a_tokenizer_appends(chat: bool) -> None:
    tokenizer = framed()
    assert tokenizer.decode(tokenizer("2+3=?")["input_ids"]) == "<pad>2+3=?<eos>"
    prompt, answer = data.example_ids(tokenizer, Example("2+3=?", "5", "t", "", chat=chat))
    assert tokenizer.decode(prompt) == ("<pad>2+3=?\n" if chat else "<pad>2+3=?")
    assert tokenizer.decode(answer) == ("5" if chat else " 5")
    windows = data.text_windows("abcdefghi", tokenizer, 4, 2)
    assert [tokenizer.decode(ids) for ids in windows] == ["<pad>abc", "<pad>def"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SKIPS_SYSTEM, "<user>1+1?\nShort.\n<assistant>"),
        (WANTS_PARTS, "<system>Short.<user>1+1?"),
    ],
)
def test_no_template_loses_the_instruction(template: str, expected: str) -> None:
    assert data.render_prompt(make_tokenizer(template), "1+1?", "Short.") == expected


def test_a_template_that_shows_no_question_is_an_error() -> None:
    with pytest.raises(ChatTemplateError, match=r"does not show the user's message.*chat=False"):
        data.render_prompt(make_tokenizer(SHOWS_NOTHING), "1+1?")
    with pytest.raises(ChatTemplateError, match=r"changes the question 'Why\?' or leaves it out"):
        data.render_prompt(make_tokenizer(CHAT.replace("m['content']", "m['content'] | replace('?', '!')")), "Why?")


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(t='x' * 99999) %}{% for i in range(99999) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
DEEP = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}"
NESTED = "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"


@pytest.mark.parametrize(
    ("template", "why"),
    [(LOOPS, "it takes longer than 3 s"), (GROWS, "it takes"), (DEEP, "nested too deeply"),
     (NESTED, "nested too deeply")],
)  # fmt: skip
def test_a_template_without_bounds_is_a_sentence(template: str, why: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"chat template cannot be used: .*{why}.*chat=False") as raised:
        data.render_prompt(make_tokenizer(template + CHAT), "1+1?", "Short.")
    assert len(str(raised.value).splitlines()) == 1


def test_a_template_that_fails_says_with_what() -> None:
    with pytest.raises(ChatTemplateError, match=r"last try: division by zero.*chat=False"):
        data.render_prompt(make_tokenizer("{{ 1 / 0 }}" + CHAT), "1+1?")
    fails_later = "{% if 'Why' in messages[-1]['content'] %}{{ raise_exception('no why') }}{% endif %}" + CHAT
    assert data.render_prompt(make_tokenizer(fails_later), "1+1?")
    with pytest.raises(ChatTemplateError, match=r"fails \(TemplateError: no why\)"):
        data.render_prompt(make_tokenizer(fails_later), "Why?")


@pytest.mark.parametrize("chat", [True, False])
def test_names_of_control_tokens_in_texts_are_text(chat: bool) -> None:
    template = CHAT.replace("\n", "<eos>\n")
    tokenizer = make_tokenizer(template)
    example = Example("What is <eos>?", "<eos> ends, <pad> fills", "t", "", chat=chat)
    item = data.encode([example], tokenizer)[0][0]
    assert item.prompt.count(256) == (1 if chat else 0)  # the template's own
    assert tokenizer.decode(item.prompt) == ("<user>What is <eos>?<eos>\n<assistant>" if chat else "What is <eos>?")
    assert 257 not in item.answer and item.answer[-1] == 256 and 256 not in item.answer[:-1]
    assert decode(tokenizer, item.answer) == (example.answer if chat else f" {example.answer}")


def test_control_tokens_of_the_embedded_model(smollm) -> None:
    tokenizer = smollm[1]
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    plain = data.prompt_ids(tokenizer, Example("What ends a turn?", "x", "t", "Reply."))
    named = data.prompt_ids(tokenizer, Example("What is <|im_end|>?", "x", "t", "Reply."))
    assert [plain.count(start), plain.count(end)] == [named.count(start), named.count(end)] == [3, 2]
    assert tokenizer.decode(named) == data.render_prompt(tokenizer, "What is <|im_end|>?", "Reply.")
    item = data.encode([Example("a", "It is <|im_end|>, I say.", "t", "")], tokenizer)[0][0]
    assert item.answer.count(end) == 1 and decode(tokenizer, item.answer) == "It is <|im_end|>, I say."


def test_what_is_taught_is_the_answer(smollm) -> None:
    tokenizer = smollm[1]
    for answer in ("x , y .", "12", "\n\na", "été 中文", "  two", "don 't"):
        for chat in (True, False):
            item = data.encode([Example("Q:\n", answer, "t", "", chat=chat)], tokenizer)[0][0]
            assert decode(tokenizer, item.answer) == answer


def test_a_reply_is_decoded_as_it_stands() -> None:
    words = ["x", ",", "y", ".", "<eos>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=True)
    ids = data.answer_ids(tokenizer, "x , y .")
    assert tokenizer.decode(ids) == "x, y."
    assert decode(tokenizer, [*ids, 4]) == "x , y ."


def test_a_contrast_of_rendered_prompts_has_one_start_token_and_no_end() -> None:
    tokenizer = framed()
    texts = ["<pad>a good day", "a day"], ["<pad>a bad day", "days"]
    batches = list(ll.Contrast(*texts, tokenizer))
    rows = [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert all(row[0] == 257 and row.count(257) == 1 and 256 not in row for row in rows)
    assert tokenizer.decode(rows[0]) == "<pad>a good day"


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=258, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)
    return GPT2LMHeadModel(config).eval()


def test_what_is_longer_than_the_models_positions_is_a_sentence() -> None:
    model, tokenizer = gpt2(), make_tokenizer()
    assert len(generate(model, tokenizer, [[1] * 12], 4)) == 1
    with pytest.raises(DataError, match=r"longest prompt with its reply takes 17 tokens, and the model has 16 posi"):
        generate(model, tokenizer, [[1] * 13], 4)
    item = Encoded((1,) * 12, (2,) * 5)
    with pytest.raises(DataError, match="longest text takes 17 tokens"):
        answer_loss_of(model, [item], 257)
    ll.attach(model, ll.LoRAConfig(r=2))
    with pytest.raises(DataError, match="longest example takes 17 tokens"):
        train(model, [item], 257, TrainConfig(steps=1))


@pytest.mark.parametrize(("kind", "refused"), [("default", True), ("linear", False)])
def test_scaled_rotary_positions_take_any_length(kind: str, refused: bool) -> None:
    model = make_llama()
    model.config.max_position_embeddings = 16
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if refused:
        with pytest.raises(DataError, match="has 16 positions"):
            require_positions(model, 17, "it")
    else:
        require_positions(model, 17, "it")
