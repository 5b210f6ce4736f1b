import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lab_helpers import make_llama, make_tokenizer
from lora_lite.lab.scoring.scoring import mentions_number, numeric
from lora_lite.lab.tasks.catalogue import mixture
from lora_lite.lab.tasks.task import Example, Task, by_occurrence, by_reference, from_examples
from lora_lite.lab.training import data
from lora_lite.lab.training import evaluate as lab
from lora_lite.lab.training.data import DataError, Encoded
from lora_lite.lab.training.evaluate import EvaluationError, evaluate, generate

EOS = 256
PROMPTS = [f"{'word ' * (i % 5)}number {i}" for i in range(11)]


def examples_of(answers: list[str]) -> list[Example]:
    return [Example(prompt, answer, "t") for prompt, answer in zip(PROMPTS, answers, strict=False)]


class Parrot(LlamaForCausalLM):
    """Answers with the last 3 bytes before `<assistant>`'s line, then the end token, then junk."""

    def generate(self, input_ids, attention_mask, **kwargs):  # type: ignore[override]
        self.widths = [*getattr(self, "widths", []), tuple(input_ids.shape)]
        self.modes = self.training
        end = len("\n<assistant>")
        said = input_ids[:, -end - 3 : -end]
        rows = len(input_ids)
        return torch.cat([input_ids, said, torch.full((rows, 1), EOS), torch.full((rows, 2), 65)], dim=1)


@pytest.fixture
def parrot() -> LlamaForCausalLM:
    return make_llama(Parrot)


def ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


def by_argmax(model: LlamaForCausalLM, prompt: list[int], length: int) -> list[int]:
    """Greedy, by hand, without cache or padding."""
    row = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return lab.cut_at(row[len(prompt) :], {EOS})


@pytest.mark.parametrize("batch_size", [1, 3, 11, 64])
def test_completions_depend_neither_on_batches_nor_on_padding(
    batch_size: int, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ids(tokenizer, PROMPTS)
    expected = [by_argmax(llama, prompt, 6) for prompt in prompts]
    found = generate(llama, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
    assert [count for _, count in found] == [len(row) for row in expected]
    assert [text for text, _ in found] == [tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert len({text for text, _ in found}) > 1


# Entries that reach into a generation; others, such as those of assisted decoding, need a second model to act at all.
OWN_DEFAULTS = {
    "num_beams": 3, "early_stopping": True, "length_penalty": 3.0, "num_return_sequences": 2, "do_sample": True,
    "temperature": 9.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[65], [66, 67]],
    "forced_bos_token_id": 7, "forced_eos_token_id": 256, "exponential_decay_length_penalty": (1, 9.0),
    "suppress_tokens": list(range(60, 120)), "begin_suppress_tokens": list(range(100)), "sequence_bias": [[[68], 50.0]],
    "min_length": 90, "min_new_tokens": 5, "max_length": 3, "max_new_tokens": 2, "max_time": 1e-9,
    "guidance_scale": 4.0, "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 2, "dola_layers": "high",
    "cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True, "use_cache": False,
    "stop_strings": ["a", "e"], "token_healing": True, "encoder_repetition_penalty": 3.0, "renormalize_logits": True,
    "remove_invalid_values": True, "watermarking_config": {"bias": 50.0}, "bos_token_id": 9, "pad_token_id": 65,
    "decoder_start_token_id": 8, "diversity_penalty": 1.0, "num_beam_groups": 3, "force_words_ids": [[70]],
    "encoder_no_repeat_ngram_size": 1, "top_h": 0.2, "low_memory": True,
}  # fmt: skip


def test_generation_is_greedy_whatever_the_models_own_defaults(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ids(tokenizer, PROMPTS)
    llama = make_llama()
    expected = [by_argmax(llama, prompt, 6) for prompt in prompts]
    wanted = [(tokenizer.decode(row, skip_special_tokens=True), len(row)) for row in expected]
    for settings in (*({key: value} for key, value in OWN_DEFAULTS.items()), OWN_DEFAULTS):
        for key, value in settings.items():
            setattr(llama.generation_config, key, value)
        own = llama.generation_config
        assert generate(llama, tokenizer, prompts, max_new_tokens=6) == wanted, settings
        assert llama.generation_config is own and all(getattr(own, key) == settings[key] for key in settings)
        llama.generation_config = make_llama().generation_config


def test_generation_stops_at_the_end_token(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = ids(tokenizer, ["abc"])
    with torch.no_grad():
        first = int(llama(torch.tensor(prompt)).logits[0, -1].argmax())
    llama.generation_config.eos_token_id = [first, 3]
    assert generate(llama, tokenizer, prompt, max_new_tokens=5) == [("", 0)]


def test_records_come_in_order_with_scores(parrot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = examples_of([prompt[-3:] if i % 2 else "no" for i, prompt in enumerate(PROMPTS)])
    result = evaluate(parrot, tokenizer, from_examples("t", examples), examples, batch_size=4, progress=False)
    assert [record.prompt for record in result.records] == PROMPTS
    assert [record.completion for record in result.records] == [prompt[-3:] for prompt in PROMPTS]
    assert [record.answer for record in result.records] == [example.answer for example in examples]
    assert [record.correct for record in result.records] == [bool(i % 2) for i in range(11)]
    assert result.accuracy == result.mean_score == result.mention_rate == 5 / 11
    assert result.new_tokens == 33 and result.seconds > 0
    assert [rows for rows, _ in parrot.widths] == [4, 4, 3]
    assert sorted((width for _, width in parrot.widths), reverse=True) == [width for _, width in parrot.widths]


def test_accuracy_counts_full_scores_only(parrot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = examples_of(["x", "y", "r 2", "r"])
    scores = iter([1.0, 0.99, 0.5, 0.0])
    task = Task("t", from_examples("t", examples).source, lambda example, answer: next(scores), max_new_tokens=4)
    result = evaluate(parrot, tokenizer, task, examples, progress=False)
    assert result.accuracy == 0.25
    assert result.mean_score == pytest.approx(2.49 / 4)
    assert result.mention_rate == 0.75  # the right one, "r 2" as it stands, and "r" as a word of "r 3"


WORKED = Example("How many?", "She has 16 - 3 = 13.\n#### 13", "sums")


@pytest.mark.parametrize(
    ("reply", "judged"),
    [
        ("#### 13", (1.0, True)),
        ("It is 13, or perhaps 14", (0.0, True)),  # the number, not the whole solution, is looked for
        ("16 - 3 = 130 or 13.5", (0.0, False)),
        ("", (0.0, False)),
    ],
)
def test_judge_looks_for_the_number_where_answers_are_numbers(reply: str, judged: tuple[float, bool]) -> None:
    task = from_examples("sums", [WORKED], by_reference(numeric), mention=by_occurrence(mentions_number))
    assert lab.judge(task, WORKED, reply) == judged == lab.judge(task, WORKED, reply)


def test_what_is_right_counts_as_mentioned_whatever_the_rule() -> None:
    never = from_examples("sums", [WORKED], lambda example, answer: 1.0, mention=lambda example, reply: False)
    assert lab.judge(never, WORKED, "anything") == (1.0, True)


def test_a_mixture_looks_for_each_answer_by_its_own_rule() -> None:
    sums = from_examples("sums", [WORKED], by_reference(numeric), mention=by_occurrence(mentions_number))
    words = dataclasses.replace(WORKED, task="words")
    both = mixture([sums, from_examples("words", [words])])
    reply = "It is 13, or perhaps 14"
    assert lab.judge(both, WORKED, reply) == (0.0, True) and lab.judge(both, words, reply) == (0.0, False)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(training: bool, parrot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    parrot.train(training)
    parrot.model.layers[0].train(not training)
    before = [module.training for module in parrot.modules()]
    examples = examples_of(["x"])
    evaluate(parrot, tokenizer, from_examples("t", examples, max_new_tokens=2), examples, progress=False)
    assert parrot.modes is False
    assert [module.training for module in parrot.modules()] == before

    def fail(example: Example, answer: str) -> float:
        raise ZeroDivisionError

    parrot.generate = fail  # pyright: ignore
    with pytest.raises(TypeError):
        generate(parrot, tokenizer, [[1]], 2)
    assert [module.training for module in parrot.modules()] == before


def test_nothing_to_evaluate_is_an_error(llama: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match="no examples of 't'"):
        evaluate(llama, make_tokenizer(), from_examples("t", examples_of(["x"])), [])


@pytest.mark.parametrize(("batch_size", "max_new_tokens"), [(0, 5), (4, 0)])
def test_sizes_below_one_are_errors(batch_size: int, max_new_tokens: int, llama: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match="1 or more"):
        generate(llama, make_tokenizer(), [[1]], max_new_tokens, batch_size)


@pytest.mark.parametrize(
    ("own", "expected"), [(None, {256}), (256, {256}), ([7, 256], {7, 256}), (3, {3, 256}), ([], {256})]
)
def test_stop_ids(own: int | list[int] | None, expected: set[int], llama: LlamaForCausalLM) -> None:
    llama.generation_config.eos_token_id = own
    assert lab.stop_ids(llama, make_tokenizer()) == expected


@pytest.mark.parametrize(
    ("row", "kept"), [([1, 2, 256, 3], [1, 2]), ([256], []), ([1, 2], [1, 2]), ([1, 9, 256], [1]), ([], [])]
)
def test_cut_at(row: list[int], kept: list[int]) -> None:
    assert lab.cut_at(row, {256, 9}) == kept


def test_length_batches_are_sorted_and_whole() -> None:
    batches = list(lab.length_batches([3, 9, 1, 9, 5], 2))
    assert batches == [[1, 3], [4, 0], [2]]


def test_replies_that_never_ended_are_counted(parrot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = examples_of(["r 0", "x", "r 2"])
    task = from_examples("t", examples)
    whole = evaluate(parrot, tokenizer, task, examples, max_new_tokens=4, progress=False)  # 3 bytes and the end
    assert whole.cut_off == 0 and not any(record.cut_off for record in whole.records)
    cut = evaluate(make_llama(), tokenizer, task, examples, max_new_tokens=5, progress=False)
    assert cut.cut_off == 1 and all(record.cut_off for record in cut.records)
    mixed = dataclasses.replace(whole, records=(*whole.records, cut.records[0]))
    assert mixed.cut_off == 0.25


def test_an_end_at_the_very_last_token_is_an_end(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = data.prompt_ids(tokenizer, Example("abc", "x", "t"))
    reply = llama.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=257)
    *before, last = reply[0, len(prompt) :].tolist()
    assert last not in before
    llama.generation_config.eos_token_id = last
    examples = [Example("abc", "x", "t")]
    for budget, cut_off in ((3, 1.0), (4, 0.0), (9, 0.0)):
        task = from_examples("t", examples)
        assert evaluate(llama, tokenizer, task, examples, max_new_tokens=budget, progress=False).cut_off == cut_off


def test_no_end_token_at_all_is_an_error(llama: LlamaForCausalLM) -> None:
    llama.generation_config.eos_token_id = None
    with pytest.raises(EvaluationError, match=r"has an end token.*set tokenizer\.eos_token"):
        generate(llama, make_tokenizer(eos=None), [[1]], 3)


def test_padding_is_not_needed_where_there_is_an_end_token(llama: LlamaForCausalLM) -> None:
    prompts = [[65, 66, 67], [65]]
    assert generate(llama, make_tokenizer(pad=None), prompts, 4) == generate(llama, make_tokenizer(), prompts, 4)


# ---- losses


def by_hand(model: LlamaForCausalLM, item: Encoded) -> list[float]:
    """The loss of each answer token, of one row without padding."""
    ids = torch.tensor([item.prompt + item.answer])
    with torch.no_grad():
        logits = model(ids).logits[0]
    start = len(item.prompt)
    return cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="none").tolist()


ITEMS = [
    Encoded((1, 2, 3), (4, 256)),
    Encoded((5,), (6, 7, 8, 9, 256)),
    Encoded((9, 8, 7, 6), (5,)),
    Encoded((3,), (1,)),
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_answer_loss_of_weighs_every_token_the_same(batch_size: int, llama: LlamaForCausalLM) -> None:
    losses = [loss for item in ITEMS for loss in by_hand(llama, item)]
    assert len(losses) == 9
    assert lab.answer_loss_of(llama, ITEMS, 257, batch_size) == pytest.approx(sum(losses) / 9, rel=1e-5)


def test_text_loss_is_that_of_a_language_model(llama: LlamaForCausalLM) -> None:
    windows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 8]]
    losses = [loss for ids in windows for loss in by_hand(llama, Encoded((ids[0],), tuple(ids[1:])))]
    assert len(losses) == 7
    assert lab.text_loss(llama, windows, batch_size=2) == pytest.approx(sum(losses) / 7, rel=1e-5)
    with torch.no_grad():
        plain = [llama(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in windows[:2]]
    assert lab.text_loss(llama, windows[:2]) == pytest.approx(sum(plain) / 2, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_losses_are_of_eval_mode_and_put_the_mode_back(training: bool) -> None:
    config = make_llama().config
    config.attention_dropout = 0.5
    model = LlamaForCausalLM(config).train(training)
    model.model.layers[0].train(not training)
    before = [module.training for module in model.modules()]
    assert lab.answer_loss_of(model, ITEMS, 257) == lab.answer_loss_of(model, ITEMS, 257)  # no dropout
    assert lab.text_loss(model, [[1, 2, 3]]) == lab.text_loss(model, [[1, 2, 3]])
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(DataError, match="token 300, and the model's embedding has 258 rows"):
        lab.text_loss(model, [[1, 2, 300]])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: lab.answer_loss_of(model, [], 0), "got 0 and 8"),
        (lambda model: lab.answer_loss_of(model, ITEMS, 0, 0), "got 4 and 0"),
        (lambda model: lab.text_loss(model, []), "got 0"),
        (lambda model: lab.text_loss(model, [[1, 2], [3]]), "two tokens or more"),
    ],
)
def test_losses_of_nothing_are_errors(ask, message: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluationError, match=message):
        ask(llama)
