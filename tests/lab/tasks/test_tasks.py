import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lite.lab.scoring.scoring import numeric, scorer
from lora_lite.lab.tasks import catalogue, gym
from lora_lite.lab.tasks import task as tasks
from lora_lite.lab.tasks.task import Example, Task, TaskError

GENERATORS = [
    "family_relationships",
    "gsm_symbolic",
    "chain_sum",
    "word_sequence_reversal",
    "calendar_arithmetic",
    "gcd",
]


@pytest.mark.parametrize("name", GENERATORS)
def test_the_oracle_answer_scores_one_and_others_less(name: str) -> None:
    task = catalogue.load_task(name)
    for example in task.examples("validation", 5):
        assert task.score(example, example.answer) == 1.0
        assert task.score(example, f"\n {example.answer}  ") == 1.0
        for wrong in ("", "no idea", "[1, (", "\x00"):
            assert 0.0 <= task.score(example, wrong) < 1.0, wrong


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_share_no_content_whatever_the_seeds(name: str) -> None:
    task = catalogue.load_task(name)
    parts = {
        split: {tasks.content_key(e.prompt) for seed in (0, 1) for e in task.examples(split, 40, seed)}
        for split in tasks.SPLITS
    }
    for one, other in itertools.combinations(parts.values(), 2):
        assert not one & other


@pytest.mark.parametrize("split", list(tasks.SPLITS))
def test_the_seed_decides_and_nothing_else(split: str) -> None:
    task = catalogue.load_task("chain_sum")
    assert task.examples(split, 30, seed=3) == catalogue.load_task("chain_sum").examples(split, 30, seed=3)
    assert task.examples(split, 60, seed=3)[:30] == task.examples(split, 30, seed=3)
    neighbours = set(map(repr, task.examples(split, 60, seed=3))) & set(map(repr, task.examples(split, 60, seed=4)))
    assert len(neighbours) < 6  # generators seed item i with seed + i: unhashed, 59 of 60 would be shared


def test_no_example_comes_twice() -> None:
    keys = [tasks.content_key(e.prompt) for e in catalogue.load_task("coin_flip").examples("train", 40)]
    assert len(set(keys)) == len(keys)


@given(st.text(alphabet="ab c\n", min_size=1))
def test_case_and_blanks_do_not_move_a_prompt_to_another_split(text: str) -> None:
    assert tasks.split_of(text) == tasks.split_of(f"  {text.upper()} \n")


def test_split_shares_are_as_declared() -> None:
    assert sorted(itertools.chain(*tasks.SPLITS.values())) == list(range(100))
    found = [tasks.split_of(f"question {i}") for i in range(5000)]
    for split, share in tasks.SPLITS.items():
        assert abs(found.count(split) / 5000 - len(share) / 100) < 0.025


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("famly_relationship", "family_relationships"),
        ("no such thing at all", "a generator of reasoning-gym, such as gcd"),
        ("gsm8", "gsm8k"),
        ("jsonl:colour=3,path=x", "no parameter 'colour'; it has path"),
        ("gcd:max_numbers=-1", "refuses"),
        ("gcd:colour=3", "max_numbers"),
        ("gcd:max_numbers", "key=value"),
        ("rubiks_cube", "no answer text"),
        ("gcd+gcd", "different names"),
    ],
)
def test_bad_specs_say_what_is_wrong(spec: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        catalogue.load_task(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gcd", ("gcd", {})),
        (" gcd:max_numbers=3, min_value=2 ", ("gcd", {"max_numbers": 3, "min_value": 2})),
        ("a:x=(1, 2),y=[3,4]", ("a", {"x": (1, 2), "y": [3, 4]})),
        ("a:x=word,y=0.5,z=True", ("a", {"x": "word", "y": 0.5, "z": True})),
    ],
)
def test_parse_spec(spec: str, expected: tuple[str, dict]) -> None:
    assert catalogue.parse_spec(spec) == expected


def test_parameters_reach_the_generator() -> None:
    task = catalogue.load_task("word_sequence_reversal:min_words=3,max_words=4")
    assert {e.answer.count(",") + 1 for e in task.examples("train", 40)} == {3, 4}


def test_a_mixture_has_equal_parts_each_scored_by_its_own_task() -> None:
    mixture = catalogue.load_task("gcd+calendar_arithmetic")
    examples = mixture.examples("train", 20)
    assert [e.task for e in examples] == ["gcd", "calendar_arithmetic"] * 10
    assert all(mixture.score(e, e.answer) == 1.0 for e in examples)
    assert all(mixture.score(e, "neither") == 0.0 for e in examples)


def rows(n: int) -> list[Example]:
    return [Example(f"question {i}", str(i), "rows") for i in range(n)]


def test_a_finite_source_gives_all_it_has_then_says_so() -> None:
    task = tasks.from_examples("rows", rows(100) + rows(100))
    counts = {split: len(list(task.distinct(split))) for split in tasks.SPLITS}
    assert sum(counts.values()) == 100
    with pytest.raises(TaskError, match=f"only {counts['test']} distinct test"):
        task.examples("test", counts["test"] + 1)
    assert task.examples("train", 20, seed=0) != task.examples("train", 20, seed=1)


def test_an_endless_source_of_few_contents_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE", 50)
    task = Task("few", tasks.split_by_content(lambda seed: itertools.cycle(rows(30))), tasks.EXACT)
    with pytest.raises(TaskError, match="distinct train"):
        task.examples("train", 31)


@pytest.mark.parametrize("split", list(tasks.SPLITS))
def test_an_endless_source_without_content_of_a_part_ends(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE", 50)
    others = [example for example in rows(30) if tasks.split_of(example.prompt) != split]

    def stream(seed: int) -> Iterator[Example]:
        yield from itertools.islice(itertools.cycle(others), 1000)
        pytest.fail("1000 draws without an end")

    task = Task("none", tasks.split_by_content(stream), tasks.EXACT)
    with pytest.raises(TaskError, match=f"only 0 distinct {split} examples, 1 were asked for; ask for fewer, or make"):
        task.examples(split, 1)


def test_patience_begins_anew_with_every_new_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE", 30)
    wanted = [example for example in rows(200) if tasks.split_of(example.prompt) == "validation"]
    other = next(example for example in rows(200) if tasks.split_of(example.prompt) == "train")
    stream = [draw for example in wanted for draw in (*[other] * 20, example)]
    task = Task("rare", tasks.split_by_content(lambda seed: iter(stream)), tasks.EXACT)
    assert list(task.distinct("validation")) == wanted and len(stream) > 300


@pytest.mark.parametrize(
    ("spec", "split"),
    [
        ("coin_flip:min_trials=1,max_trials=1", "train"),
        ("gcd:min_value=1,max_value=2", "validation"),
        ("chain_sum+gcd:min_value=1,max_value=2", "validation"),
    ],
)
def test_a_generator_of_few_contents_says_so(spec: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PATIENCE", 500)
    with pytest.raises(TaskError, match=rf"only \d distinct {split} examples, 20 were asked for"):
        catalogue.load_task(spec).examples(split, 20)


def test_bad_requests() -> None:
    task = tasks.from_examples("rows", rows(10))
    with pytest.raises(TaskError, match="train"):
        task.examples("dev", 1)
    with pytest.raises(TaskError, match="-1"):
        task.examples("train", -1)
    with pytest.raises(TaskError, match="question"):
        tasks.build_prompt("2 + 2", template="no field")


@pytest.mark.parametrize(("raw", "kept"), [(0.5, 0.5), (1.7, 1.0), (-3, 0.0), (True, 1.0)])
def test_scores_stay_between_zero_and_one(raw: float, kept: float) -> None:
    assert tasks.from_examples("rows", rows(1), lambda example, answer: raw).score(rows(1)[0], "x") == kept


def test_a_score_of_nan_is_an_error() -> None:
    task = tasks.from_examples("rows", rows(1), lambda example, answer: float("nan"))
    with pytest.raises(TaskError, match="NaN"):
        task.score(rows(1)[0], "x")


def test_prompts_are_built_from_a_template_even_with_braces_in_the_question() -> None:
    assert tasks.build_prompt(" {x} = 1 ", "Q: {question}\nA:") == "Q: {x} = 1\nA:"
    task = gym.gym_task("gcd", instruction="Short.", template="Task: {question}")
    example = task.examples("train", 1)[0]
    assert example.prompt.startswith("Task: Find") and example.instruction == "Short."


def test_what_every_question_repeats_can_be_dropped() -> None:
    task = catalogue.load_task(r"word_sequence_reversal:drop=^.*after the comma\.\s*,max_words=4")
    for example in task.examples("validation", 5):
        assert example.prompt.startswith("Reverse this list of words: ")
        assert task.score(example, example.answer) == 1.0


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("(", "not a regular expression"),
        (".*", "nothing is left"),
        (f"{'(' * 3000}a{')' * 3000}", "nested too deeply"),
        ("(?:(?:(a){1000}){1000}){1000}", "too large"),
    ],
)
def test_a_bad_drop_is_an_error(drop: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tasks.build_prompt("2 + 2", drop=drop)


def test_a_drop_that_takes_too_long_ends() -> None:
    with pytest.raises(TaskError, match=r"drop=.* takes more than 1 s in a text of 60 characters"):
        tasks.build_prompt("a" * 60, drop="(?:a|aa)+b$")


def test_a_reply_in_which_the_pattern_takes_too_long_scores_0_and_says_why() -> None:
    verify = tasks.by_reference(scorer("regex", "(?:a|aa)+(b)$"))
    example = Example("Say ab", "ab", "mine")
    task = tasks.from_examples("mine", [example], verify)
    assert task.assess(example, "aab") == (1.0, "")
    score, why = task.assess(example, "a" * 60)
    assert score == 0.0 and "takes more than 1 s" in why


def test_a_question_is_one_question_in_either_form_of_its_accents() -> None:
    questions = [f"Combien de cafés coûtent {n} euros à Orléans ?" for n in range(300)]
    forms = [unicodedata.normalize(form, question) for form in ("NFC", "NFD") for question in questions]
    task = tasks.from_examples("cafés", [Example(question, str(len(question)), "cafés") for question in forms])
    found = {split: [example.prompt for example in task.distinct(split)] for split in ("validation", "test")}
    found["train"] = [example.prompt for example in task.source("train", 0) if example is not None]
    keys = {split: {unicodedata.normalize("NFC", prompt) for prompt in prompts} for split, prompts in found.items()}
    assert set().union(*keys.values()) == set(questions) and sum(map(len, keys.values())) == 300
    assert len(found["test"]) == len(keys["test"]) > 0


def test_plain_prompts_of_generators_are_the_question_and_a_line_end() -> None:
    plain, chat = catalogue.load_task("gcd:chat=False"), catalogue.load_task("gcd")
    for one, other in zip(plain.examples("test", 5), chat.examples("test", 5), strict=True):
        assert one.prompt == f"{other.prompt}\n" and one.answer == other.answer
        assert (one.chat, one.instruction) == (False, "") and other.chat and other.instruction == tasks.INSTRUCTION
        assert plain.score(one, f" {one.answer}") == 1.0
    assert (
        catalogue.load_task("gcd:chat=False,template=Q: {question}\nA:").examples("test", 1)[0].prompt.endswith("\nA:")
    )
    with pytest.raises(TaskError, match="carries no instruction, got 'Be brief'"):
        catalogue.load_task("gcd:chat=False,instruction=Be brief")


def test_a_generator_tells_its_package_and_parameters() -> None:
    found = catalogue.load_task("gcd:max_value=50,chat=False").provenance
    assert found == {"generator": "gcd", "reasoning_gym": version("reasoning_gym"), "parameters": {"max_value": 50}}
    params = catalogue.load_task("word_sequence_reversal:min_words=3,drop=x").provenance["parameters"]
    assert params == {"min_words": 3}  # how a question is asked shows in the examples' fingerprint


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("gcd+lcm", ["gcd", "lcm"]),
        (" gcd + lcm:max_value=9 + chain_sum", ["gcd", "lcm", "chain_sum"]),
        (r"gcd:drop=(?:x+y),max_value=9+lcm", ["gcd", "lcm"]),
        (r"gcd:drop=\s+$", ["gcd"]),
    ],
)
def test_a_plus_separates_tasks_where_a_name_follows(spec: str, names: list[str]) -> None:
    assert catalogue.load_task(spec).name.split("+") == names


def test_a_fingerprint_follows_prompts_answers_and_their_order() -> None:
    examples = rows(3)
    prints = {
        tasks.fingerprint(variant)
        for variant in (
            examples,
            examples[:2],
            examples[::-1],
            [dataclasses.replace(examples[0], answer="9"), *examples[1:]],
            [dataclasses.replace(examples[0], prompt="another"), *examples[1:]],
            [],
        )
    }
    assert len(prints) == 6 and all(len(found) == 16 and int(found, 16) >= 0 for found in prints)
    assert tasks.fingerprint(rows(3)) == tasks.fingerprint(examples)
    # What is said where a prompt ends and its answer starts counts too.
    assert tasks.fingerprint([Example("ab", "c", "t")]) != tasks.fingerprint([Example("a", "bc", "t")])


def test_a_wrong_answer_key_is_an_error_that_shows_it() -> None:
    examples = [Example("2 + 2?", "4", "sums"), Example("2 + 3?", "blue", "sums"), Example("3 + 3?", "red", "sums")]
    task = tasks.from_examples("sums", examples, tasks.by_reference(numeric))
    tasks.require_sound_key(task, examples[:1])
    tasks.require_sound_key(task, [])
    with pytest.raises(TaskError, match=r"'sums' is wrong: 2 of 3 .*\(66.7%\).*'blue', to the question '2 \+ 3\?'"):
        tasks.require_sound_key(task, examples)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_keys_of_generators_are_sound(name: str) -> None:
    task = catalogue.load_task(name)
    tasks.require_sound_key(task, task.examples("test", 20))
