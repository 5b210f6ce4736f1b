import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lab_helpers import write_rows
from lora_lite.lab.scoring.scoring import ScoringError
from lora_lite.lab.tasks import row_tasks
from lora_lite.lab.tasks import task as tasks
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.corpora import CorpusError
from lora_lite.lab.tasks.task import Task, TaskError, content_key


def gsm_row(i: int) -> dict[str, str]:
    left = i - 2
    return {
        "question": f"Ann has {i} eggs and eats 2. How many are left?",
        "answer": f"{i} - 2 = <<{i}-2={left}>>{left}\n#### {left:,}",
    }


def meta_row(i: int) -> dict[str, str]:
    return {"query": f"Bob picks {i} pears twice. In all?", "response": f"2 * {i} = {2 * i}\nThe answer is: {2 * i}"}


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """40 training and 7 test rows in GSM8K's format."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [gsm_row(i) for i in range(1000, 1040)])
    write_rows(folder / "test.jsonl", [gsm_row(i) for i in range(2000, 2007)])
    return folder


def prompts(task: Task, split: str) -> set[str]:
    return {example.prompt for example in task.distinct(split)}


def require_apart(task: Task) -> None:
    for one, other in itertools.combinations(tasks.SPLITS, 2):
        keys = [{content_key(prompt) for prompt in prompts(task, split)} for split in (one, other)]
        assert not keys[0] & keys[1]


def test_gsm8k(gsm8k: Path) -> None:
    task = load_task(f"gsm8k:path={gsm8k}")
    assert {split: len(prompts(task, split)) for split in tasks.SPLITS} == {"test": 7, "validation": 4, "train": 36}
    require_apart(task)
    assert prompts(task, "train") | prompts(task, "validation") == {
        f"Question: {gsm_row(i)['question']} Think step by step.\nAnswer:" for i in range(1000, 1040)
    }
    example = next(e for e in task.examples("test", 7) if "2003" in e.prompt)
    assert example.prompt == ("Question: Ann has 2003 eggs and eats 2. How many are left? Think step by step.\nAnswer:")
    assert example.answer == "2003 - 2 = 2001\n#### 2,001" and not example.chat and example.instruction == ""
    for reply, score in {
        "#### 2001": 1,
        "The answer is 2,001.": 1,
        "so 2001.0": 1,
        "2,003": 0,
        "": 0,
        "eggs": 0,
    }.items():
        assert task.score(example, reply) == score, reply


def test_gsm8k_holds_back_the_same_rows_in_any_order(gsm8k: Path) -> None:
    task = load_task(f"gsm8k:path={gsm8k},validation=9")
    write_rows(gsm8k / "train.jsonl", [gsm_row(i) for i in reversed(range(1000, 1040))])
    again = load_task(f"gsm8k:path={gsm8k},validation=9")
    assert prompts(task, "validation") == prompts(again, "validation") and len(prompts(task, "validation")) == 9
    assert task.provenance["validation"] == again.provenance["validation"]
    assert task.provenance["train"]["fingerprint"] != again.provenance["train"]["fingerprint"]


def test_gsm8k_keeps_calculator_annotations_on_request(gsm8k: Path) -> None:
    example = load_task(f"gsm8k:path={gsm8k},keep_annotations=True,max_new_tokens=7").examples("test", 1)[0]
    assert "<<" in example.answer
    assert load_task(f"gsm8k:path={gsm8k},max_new_tokens=7").max_new_tokens == 7


@pytest.mark.parametrize("count", [0, 40, -1])
def test_gsm8k_cannot_hold_back_all_or_nothing(count: int, gsm8k: Path) -> None:
    with pytest.raises(TaskError, match=f"cannot hold back {count} of the 40 rows"):
        load_task(f"gsm8k:path={gsm8k},validation={count}")


def test_provenance_is_plain_data_that_counts_what_was_left_out(gsm8k: Path) -> None:
    rows = [gsm_row(i) for i in range(1000, 1040)]
    rows += [gsm_row(1000), gsm_row(2000), {"question": " ", "answer": "#### 1"}, {"question": "Why?", "answer": None}]
    rows += [{"question": "How many eggs?", "answer": "many\n#### many"}]
    write_rows(gsm8k / "train.jsonl", rows)
    task = load_task(f"gsm8k:path={gsm8k}")
    found = json.loads(json.dumps(task.provenance))
    left_out = found["train"].pop("left_out")
    assert left_out == {
        "without question or answer": 2,
        "came before": 1,
        "also a held-out question": 1,
        "own answer does not score": 1,
    }
    kept = len(prompts(task, "train"))
    assert found["train"].pop("fingerprint").isalnum()
    assert found["train"] == {"from": str(gsm8k), "split": "train", "read": len(rows), "rows": kept}
    assert kept + len(prompts(task, "validation")) + sum(left_out.values()) == len(rows)
    assert found["test"]["rows"] == 7 and found["test"]["left_out"] == {}
    assert task.notes == (
        f"5 of 45 rows of {gsm8k} (train) left out: without question or answer (2), came before (1), "
        "also a held-out question (1), own answer does not score (1)",
    )


def test_a_held_out_answer_that_does_not_score_is_an_error(gsm8k: Path) -> None:
    write_rows(gsm8k / "test.jsonl", [gsm_row(2000), {"question": "How many then?", "answer": "3 eggs\n#### lots"}])
    with pytest.raises(TaskError, match=r"1 of 2 reference answers \(50.0%\).*'3 eggs #### lots'.*How many then\?"):
        load_task(f"gsm8k:path={gsm8k}")


def metamath(tmp_path: Path, gsm8k: Path, rows: list[dict[str, str]]) -> Task:
    write_rows(tmp_path / "meta.jsonl", rows)
    return load_task(f"metamath_gsm8k:train={tmp_path / 'meta.jsonl'},gsm8k={gsm8k}")


def test_metamath_trains_on_one_and_is_judged_by_the_other(tmp_path: Path, gsm8k: Path) -> None:
    task = metamath(tmp_path, gsm8k, [meta_row(i) for i in range(30)])
    assert {split: len(prompts(task, split)) for split in tasks.SPLITS} == {"test": 7, "validation": 4, "train": 30}
    require_apart(task)
    plain = load_task(f"gsm8k:path={gsm8k}")
    assert prompts(task, "test") == prompts(plain, "test") and prompts(task, "validation") == prompts(
        plain, "validation"
    )
    example = next(e for e in task.examples("train", 30) if " 7 pears" in e.prompt)
    assert example.prompt == "Question: Bob picks 7 pears twice. In all? Think step by step.\nAnswer:"
    assert example.answer == "2 * 7 = 14\nThe answer is: 14" and not example.chat and example.instruction == ""
    assert task.notes == (row_tasks.METAMATH_NOTE,) and "derive from GSM8K" in task.notes[0]
    assert load_task(f"gsm8k:path={gsm8k}").notes == ()


def test_metamath_drops_and_counts_training_rows_that_serve_nothing(tmp_path: Path, gsm8k: Path) -> None:
    held = [gsm_row(i)["question"] for i in range(1000, 1040)]  # 4 of them are validation questions
    rows = [meta_row(i) for i in range(5)]
    rows += [{"query": question, "response": "The answer is: 5"} for question in held]
    rows += [{"query": "x?", "response": "The answer is: x"}, {"query": "Left?", "response": ""}]
    task = metamath(tmp_path, gsm8k, rows)
    assert task.provenance["train"]["left_out"] == {
        "also a held-out question": 4,
        "own answer does not score": 1,
        "without question or answer": 1,
    }
    assert task.provenance["train"]["rows"] == 5 + 36
    require_apart(task)


def test_metamath_takes_test_rows_from_elsewhere(tmp_path: Path, gsm8k: Path) -> None:
    write_rows(tmp_path / "meta.jsonl", [meta_row(1)])
    write_rows(tmp_path / "mine.jsonl", [gsm_row(i) for i in range(3)])
    task = load_task(f"metamath_gsm8k:train={tmp_path / 'meta.jsonl'},gsm8k={gsm8k},test={tmp_path / 'mine.jsonl'}")
    assert len(prompts(task, "test")) == 3 and task.provenance["test"]["from"] == str(tmp_path / "mine.jsonl")


def test_metamath_without_its_fields_is_an_error(tmp_path: Path, gsm8k: Path) -> None:
    with pytest.raises(CorpusError, match="no field 'query', 'response'; its fields are question, answer"):
        metamath(tmp_path, gsm8k, [gsm_row(1)])


def test_data_sets_of_the_hub_are_the_defaults() -> None:
    for spec, name in {"gsm8k": "openai/gsm8k", "metamath_gsm8k": "meta-math/MetaMathQA"}.items():
        with pytest.raises(
            CorpusError, match=f"cannot read rows from '{name}.*no copy in the cache, and HF_HUB_OFFLINE is set"
        ):
            load_task(spec)


# ---- your own rows


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    rows = [{"asked": f"Capital of land {i}?", "told": f"City {i}", "size": f"{i} km"} for i in range(100)]
    write_rows(tmp_path / "mine.jsonl", rows)
    return tmp_path / "mine.jsonl"


def test_a_file_of_your_own(mine: Path) -> None:
    task = load_task(f"{mine}:question=asked,answer=told")
    assert task.name == str(mine) and task.provenance["test"]["from"] == str(mine)
    assert sum(len(prompts(task, split)) for split in tasks.SPLITS) == 100
    require_apart(task)
    assert all(prompts(task, split) for split in tasks.SPLITS)
    assert all(tasks.split_of(prompt) == split for split in tasks.SPLITS for prompt in prompts(task, split))
    example = task.examples("train", 1)[0]
    assert example.chat and example.instruction == ""
    assert task.score(example, example.answer.upper()) == 1.0 and task.score(example, "City") == 0.0
    assert load_task(f"jsonl:path={mine},question=asked,answer=told").provenance == task.provenance


def test_a_path_alone_is_enough(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": i} for i in range(50)])
    task = load_task(str(tmp_path / "mine.jsonl"))
    assert task.score(task.examples("train", 1)[0], task.examples("train", 1)[0].answer) == 1.0


@pytest.mark.parametrize(
    ("options", "reply", "score"),
    [
        ("answer=size,score=numeric", "about {n}.0", 1.0),
        ("answer=size,score=numeric", "about 1{n}", 0.0),
        (r"answer=told,score=regex,pattern=City (\d+)", "I say: City {n}!", 1.0),
        (r"answer=told,score=regex,pattern=City (\d+)", "{n}", 0.0),
        (r"answer=told,score=regex,pattern=(?:City|Town)+ ([0-9]{1,3})", "Town {n}", 1.0),
    ],
)
def test_scorers_of_your_own_rows(options: str, reply: str, score: float, mine: Path) -> None:
    task = load_task(f"{mine}:question=asked,{options}")
    for example in task.examples("test", 5):
        number = example.prompt.split()[-1].rstrip("?")
        assert task.score(example, reply.format(n=number)) == score


def test_plain_prompts_and_templates_for_your_own_rows(mine: Path) -> None:
    fields = "question=asked,answer=told"
    assert all(
        e.prompt.endswith("?\n") and not e.chat for e in load_task(f"{mine}:{fields},chat=False").distinct("test")
    )
    told = load_task(f"{mine}:{fields},instruction=Name the city.,template=Q: {{question}},drop=Capital of ")
    example = told.examples("test", 1)[0]
    assert example.prompt.startswith("Q: land") and example.instruction == "Name the city." and example.chat
    with pytest.raises(TaskError, match="put it into the template"):
        load_task(f"{mine}:{fields},chat=False,instruction=Name it.")


@pytest.mark.parametrize("given", [("test",), ("validation",), ("test", "validation")])
def test_files_of_their_own_for_held_out_rows(given: tuple[str, ...], mine: Path) -> None:
    for split in given:  # the first of each is a training row too
        rows = [{"asked": f"Capital of land {i}?", "told": f"City {i}"} for i in (3, *range(200, 206))]
        write_rows(mine.parent / f"{split}.jsonl", rows if split == given[0] else rows[1:3])
    files = ",".join(f"{split}={mine.parent / split}.jsonl" for split in given)
    task = load_task(f"{mine}:question=asked,answer=told,{files}")
    require_apart(task)
    assert len(prompts(task, given[0])) == 7 and task.provenance[given[0]]["from"].endswith(f"{given[0]}.jsonl")
    assert "Capital of land 3?" in prompts(task, given[0])
    theirs = set().union(*(prompts(task, split) for split in tasks.SPLITS))
    assert len(theirs) == 106  # whatever its hash, each row of the first file is trained on or held out
    if len(given) == 2:
        assert len(prompts(task, "train")) == 99 and task.provenance["validation"]["left_out"] == {
            "also a held-out question": 2
        }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("question=asked", CorpusError, "no field 'answer'; its fields are asked, told, size"),
        ("question=asked,answer=told,score=fuzzy", ScoringError, "exact, numeric and regex"),
        ("question=asked,answer=told,score=regex", ScoringError, "needs pattern"),
        ("question=asked,answer=told,colour=red", TaskError, "no parameter 'colour'; it has path, question, answer"),
        ("question=size,answer=asked,score=regex,pattern=(Town)", TaskError, "answer key of .* is wrong.*100.0%"),
        ("question=asked,answer=told,drop=.*", TaskError, "nothing is left"),
    ],
)
def test_bad_requests_for_your_own_rows(options: str, error: type[Exception], message: str, mine: Path) -> None:
    with pytest.raises(error, match=message):
        load_task(f"{mine}:{options}")


@pytest.mark.parametrize("rows", [1, 40])
def test_the_wrong_column_is_an_error_even_where_no_row_is_held_out(rows: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": "blue"} for i in range(rows)])
    with pytest.raises(TaskError, match=r"100.0%.*'blue'"):
        load_task(f"{tmp_path / 'mine.jsonl'}:score=numeric")


@pytest.mark.parametrize("row", [{"question": "", "answer": "3"}, {"question": "1 + 2?", "answer": " "}])
def test_rows_that_are_all_empty_are_an_error(row: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [row, row])
    with pytest.raises(TaskError, match=r"no training example.*without question or answer \(2\)"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"mine\.jsonl.* holds no rows"):
        load_task(str(tmp_path / "mine.jsonl"))


def test_a_mixture_tells_where_each_part_is_from(mine: Path, gsm8k: Path) -> None:
    write_rows(gsm8k.parent / "meta.jsonl", [meta_row(i) for i in range(9)])
    meta = f"metamath_gsm8k:train={gsm8k.parent / 'meta.jsonl'},gsm8k={gsm8k}"
    mixed = load_task(f"{mine}:question=asked,answer=told + {meta} + gcd:max_value=50")
    assert set(mixed.provenance) == {str(mine), "metamath_gsm8k", "gcd"}
    assert mixed.provenance["gcd"]["parameters"] == {"max_value": 50}
    assert mixed.notes == (row_tasks.METAMATH_NOTE,)
    assert [example.task for example in mixed.examples("train", 3)] == list(mixed.provenance)
