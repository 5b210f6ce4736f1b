import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lab_helpers import CHAT, make_llama, make_tokenizer
from lora_lite.lab.models.chat import ChatTemplateError
from lora_lite.lab.tasks.task import Example, from_examples
from lora_lite.lab.training import data
from lora_lite.lab.training.data import IGNORE, BatchOrder, DataError, Encoded

REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@pytest.mark.parametrize(
    ("chat", "instruction", "expected"),
    [
        (CHAT, "Short.", "<system>Short.\n<user>1+1?\n<assistant>"),
        (CHAT, "", "<user>1+1?\n<assistant>"),
        (REFUSES_SYSTEM, "Short.", "<user>1+1?\nShort.\n<assistant>"),
        (None, "Short.", "1+1?\nShort.\n"),
        (None, "", "1+1?\n"),
    ],
)
def test_render_prompt(chat: str | None, instruction: str, expected: str) -> None:
    assert data.render_prompt(make_tokenizer(chat), "1+1?", instruction) == expected


def test_encode_keeps_whole_examples_and_counts_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("a?", "yes", "t"), Example("b?", "", "t"), Example(" ", "x", "t"), Example("c" * 90, "no", "t")]
    kept, report = data.encode(examples, tokenizer, max_length=80)
    assert len(kept) == 1 and tokenizer.decode(kept[0].prompt).endswith("<user>a?\n<assistant>")
    assert tokenizer.decode(kept[0].answer) == "yes<eos>"
    assert (report.kept, report.too_long, report.empty, report.left_out) == (1, 1, 2, 3)
    assert (report.prompt_tokens, report.answer_tokens) == (len(kept[0].prompt), 4)
    assert "1 longer than 80 tokens" in str(report) and "2 without" in str(report)
    exact = len(kept[0])
    assert data.encode(examples[:1], tokenizer, max_length=exact)[1].kept == 1
    with pytest.raises(DataError, match=f"all 1 with an answer are longer than max_length {exact - 1}"):
        data.encode(examples[:1], tokenizer, max_length=exact - 1)


def test_examples_that_are_all_too_long_say_how_long(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("c" * n, "no", "t", "", chat=False) for n in (90, 70, 80)] + [Example("a", "", "t")]
    message = (
        r"all 3 with an answer are longer than max_length 50: from 74 to 94 tokens, half of them up to 84; "
        r"raise max_length, or shorten the prompts .*0 examples kept.*3 longer than 50 tokens, 1 without"
    )
    with pytest.raises(DataError, match=message):
        data.encode(examples, tokenizer, max_length=50)


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "there are no examples"), ([Example("", "x", "t"), Example("x", " ", "t")], "all 2 are without prompt or")],
)
def test_nothing_to_encode_says_why(examples: list[Example], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=message):
        data.encode(examples, tokenizer)


def test_a_tokenizer_without_an_end_token_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no eos_token.*set tokenizer\.eos_token"):
        data.encode([Example("a", "b", "t")], make_tokenizer(eos=None))


@pytest.mark.parametrize("question", ["1+1?", "1 <eos> 2?"])
def test_an_end_token_behind_a_chat_template_is_taken_off(question: str) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    ids = data.prompt_ids(tokenizer, Example(question, "2", "t", "Short."))
    assert tokenizer.decode(ids) == f"Short.<eos>{question}" and ids[-1] != tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("shown", ["m['content'][:5]", "m['content'] | tojson | truncate(500)", "m['content'] | list"])
def test_a_template_that_shows_a_list_of_parts_is_refused(shown: str) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ SHOWN }}{% endfor %}".replace("SHOWN", shown))
    try:
        text = data.render_prompt(tokenizer, "What is one and one?")
    except ChatTemplateError as error:
        assert "does not show the user's message" in str(error) or "changes the question" in str(error)
    else:
        assert "'text'" not in text and '"text"' not in text


# ---- plain prompts


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("Question: 1+1?\nAnswer:", "2", "Question: 1+1?\nAnswer: 2<eos>"),
        ("1+1?\n", "2", "1+1?\n2<eos>"),
        ("1+1 = ", "2", "1+1 = 2<eos>"),
    ],
)
def test_a_plain_prompt_is_seen_as_it_stands(
    prompt: str, answer: str, text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    example = Example(prompt, answer, "t", "Not shown.", chat=False)
    item = data.encode([example], tokenizer)[0][0]
    assert tokenizer.decode(item.prompt) == prompt == data.render_prompt(tokenizer, prompt, "Not shown.", chat=False)
    assert tokenizer.decode(item.prompt + item.answer) == text
    assert list(item.prompt) == data.prompt_ids(tokenizer, example)  # what generation starts from


def test_plain_answers_are_tokenised_as_they_follow_the_prompt(smollm) -> None:
    tokenizer = smollm[1]

    def tokens(prompt: str, answer: str) -> list[list[str]]:
        return [
            tokenizer.convert_ids_to_tokens(ids)
            for ids in data.example_ids(tokenizer, Example(prompt, answer, "t", chat=False))
        ]

    assert tokens("Answer:", "The end") == [["Answer", ":"], ["ĠThe", "Ġend"]]
    assert tokens("Sum:\n", "12") == [["Sum", ":", "Ċ"], ["1", "2"]]
    # "\n\n" would be one token: generation has the first line end already, so the second is a token of the answer.
    assert tokens("a\n", "\nb") == [["a", "Ċ"], ["Ċ", "b"]]


def test_a_tokenizer_that_marks_the_start_of_a_text_does_not_mark_the_answer() -> None:
    """As Llama 2's does: "12" alone is "▁12", behind a line end it is "12"."""
    vocab = {letter: i for i, letter in enumerate("▁q12\n")}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer("12")["input_ids"] == [0, 2, 3]
    assert data.example_ids(tokenizer, Example("q\n", "12", "t", chat=False)) == ([0, 1, 4], [2, 3])


def test_a_plain_prompt_has_the_tokenizers_own_start_token(tokenizer: PreTrainedTokenizerFast) -> None:
    with_start(tokenizer)
    prompt, answer = data.example_ids(tokenizer, Example("a:", "b", "t", chat=False))
    assert (prompt, tokenizer.decode(answer)) == ([257, *tokenizer("a:", add_special_tokens=False)["input_ids"]], " b")
    assert 257 not in data.prompt_ids(tokenizer, Example("a:", "b", "t"))  # a chat template writes its own


def with_start(tokenizer: PreTrainedTokenizerFast) -> None:
    """Let the tokenizer put token 257 before a text, as Llama's puts <s>."""
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 257)])


# ---- windows of plain text


def test_windows_lie_evenly_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(chr(97 + i % 26) for i in range(105))
    ids = tokenizer(text)["input_ids"]
    assert data.text_windows(text, tokenizer, 10, 10) == [ids[at : at + 10] for at in range(0, 100, 10)]
    assert data.text_windows(text, tokenizer, 10, 3) == [ids[at : at + 10] for at in (0, 30, 60)]
    with pytest.raises(DataError, match="has 105 tokens, enough for 10 windows of 10, not for 11"):
        data.text_windows(text, tokenizer, 10, 11)


def test_windows_begin_with_the_start_token_where_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("abcdefg")["input_ids"]
    with_start(tokenizer)
    assert data.text_windows("abcdefg", tokenizer, 4, 2) == [[257, *ids[:3]], [257, *ids[3:6]]]


@pytest.mark.parametrize(("length", "count"), [(1, 3), (4, 0)])
def test_windows_of_no_size_are_errors(length: int, count: int, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=f"got {length} and {count}"):
        data.text_windows("abcdefghijklm", tokenizer, length, count)


# ---- batches


def test_collate_asks_for_answers_only_and_pads_on_the_right() -> None:
    batch = data.collate([Encoded((1, 2, 3), (4, 256)), Encoded((5,), (6, 7, 256))], pad=257)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 256], [5, 6, 7, 256, 257]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, IGNORE, 4, 256], [IGNORE, 6, 7, 256, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_collate_keeps_the_label_of_the_end_token_where_it_is_also_the_padding() -> None:
    labels = data.collate([Encoded((1,), (2, 9)), Encoded((1, 1), (2, 9))], pad=9)["labels"]
    assert labels.tolist() == [[IGNORE, 2, 9, IGNORE], [IGNORE, IGNORE, 2, 9]]


def test_left_pad() -> None:
    batch = data.left_pad([[1, 2, 3], [4]], pad=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "make", [lambda: data.collate([], 0), lambda: data.left_pad([], 0), lambda: data.left_pad([[]], 0)]
)
def test_empty_batches_are_errors(make) -> None:
    with pytest.raises(DataError, match="at least one"):
        make()


def random_items(n: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())

    return [Encoded(ids(3, 12), (*ids(1, 5), 256)) for _ in range(n)]


def test_answer_loss_is_the_plain_loss_and_has_its_gradients() -> None:
    model = make_llama().double()
    batch = data.collate(random_items(5), pad=257)
    loss, count = data.answer_loss(model, batch)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
    plain.backward()
    assert count == int((batch["labels"] != IGNORE).sum())
    assert abs(loss.item() - plain.item()) < 1e-6  # the loss itself is taken in fp32
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_answer_loss_of_a_batch_does_not_depend_on_its_padding(llama: LlamaForCausalLM) -> None:
    items = random_items(6)
    together, count = data.answer_loss(llama, data.collate(items, pad=257))
    alone = [data.answer_loss(llama, data.collate([item], pad=257)) for item in items]
    assert count == sum(n for _, n in alone)
    assert torch.allclose(together, sum(loss * n for loss, n in alone) / count, rtol=1e-5)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_every_epoch_has_every_example_once(lengths: list[int], size: int, seed: int, window: int) -> None:
    order = BatchOrder(lengths, size, seed, window)
    for epoch in range(2):
        steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert all(1 <= len(batch) <= size for batch in batches)
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))


def test_the_order_resumes_at_any_step_without_replay() -> None:
    lengths = list(range(1, 38))
    whole = [BatchOrder(lengths, 4, seed=1).batch(step) for step in range(60)]
    running = BatchOrder(lengths, 4, seed=1)
    assert [running.batch(step) for step in range(60)] == whole
    for start in (59, 1, 17, 40):
        assert BatchOrder(lengths, 4, seed=1).batch(start) == whole[start]
    assert [BatchOrder(lengths, 4, seed=2).batch(step) for step in range(60)] != whole
    assert whole[:10] != whole[10:20]  # another epoch, another order


def test_buckets_save_padding() -> None:
    lengths = torch.randint(10, 200, (512,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(window: int) -> int:
        order = BatchOrder(lengths, 8, seed=0, window=window)
        batches = [[lengths[i] for i in order.batch(step)] for step in range(order.batches_per_epoch)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(8) < 0.25 * padding(1)


@pytest.mark.parametrize(("lengths", "size", "window"), [([], 4, 8), ([1], 0, 8), ([1], 4, 0)])
def test_bad_orders_are_errors(lengths: list[int], size: int, window: int) -> None:
    with pytest.raises(DataError, match=f"{len(lengths)} examples"):
        BatchOrder(lengths, size, window=window)


def test_steps_count_from_zero() -> None:
    with pytest.raises(DataError, match="-1"):
        BatchOrder([1, 2], 1).batch(-1)


def test_answer_budget(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example(f"q{i}", "x" * (i % 9), "t") for i in range(200)]
    assert data.answer_budget(from_examples("t", examples), tokenizer) == 14  # ceil(8 * 1.25) + 4
    assert data.answer_budget(from_examples("t", examples, max_new_tokens=3), tokenizer) == 3
    with pytest.raises(DataError, match="max_new_tokens"):
        data.answer_budget(from_examples("t", []), tokenizer)
