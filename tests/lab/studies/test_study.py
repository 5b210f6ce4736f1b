"""Studies as data: what they ask for, in which order, and what they refuse."""

import dataclasses
import itertools

import pytest

from lora_lite.lab.studies.arms import ArmError
from lora_lite.lab.studies.ledger import canonical
from lora_lite.lab.studies.study import Job, Study, StudyError, jobs, load_study, study_names


@pytest.mark.parametrize("name", study_names())
@pytest.mark.parametrize("smoke", [False, True])
def test_the_librarys_studies_can_be_read_and_say_what_they_ask(name: str, smoke: bool) -> None:
    study = load_study(name, smoke)
    assert study.about and study.reference in [arm.name for arm in study.arms()]
    assert Study.from_dict(study.to_dict()) == study
    canonical(study.to_dict())  # plain data
    if smoke:
        whole = load_study(name)
        assert study.name == f"{name}-smoke" and study.training.steps < whole.training.steps
        assert study.task.split(":")[0] == whole.task.split(":")[0]  # a smaller version may take easier items
        assert study.training.final_lr == whole.training.final_lr


def test_every_arm_gets_as_many_rates_spaced_alike() -> None:
    study = Study(methods=("lora,antipasto,ia3",), rates=5, rate_ratio=2.0, rate_factor=10.0)
    for arm in study.arms():
        grid = study.grid(arm)
        assert len(grid) == 5 and grid[2] == pytest.approx(10 * arm.lr)
        assert [later / earlier for earlier, later in itertools.pairwise(grid)] == pytest.approx([2.0] * 4, rel=5e-3)


def test_jobs_go_breadth_first_and_wait_for_the_choice_of_a_rate() -> None:
    study = Study(methods=("lora", "dora"), rates=1, seeds=2)
    lora, dora = study.arms()
    tuning = [Job("base"), *(Job("tune", arm, study.grid(arm)[0]) for arm in (lora, dora))]
    assert list(jobs(study, {})) == [*tuning, Job("cost", lora), Job("cost", dora)]
    found = list(jobs(study, {"lora": 0.1, "dora": None}))  # every rate of dora failed
    costs = [Job("cost", lora), Job("cost", dora)]
    assert found == [*tuning, Job("seed", lora, 0.1, 1), Job("seed", lora, 0.1, 2), *costs]
    both = list(jobs(study, {"lora": 0.1, "dora": 0.2}))[len(tuning) :]
    assert [(job.arm.name, job.seed) for job in both[:4] if job.arm] == [
        ("lora", 1), ("dora", 1), ("lora", 2), ("dora", 2),
    ]  # fmt: skip
    assert [job for job in jobs(dataclasses.replace(study, costs=False), {}) if job.kind == "cost"] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": 0}, "seeds = 0: must be an integer >= 1"),
        ({"rates": 2}, "must be odd"),
        ({"rate_ratio": 1.0}, "rate_ratio = 1.0 > 1"),
        ({"quantization": "3bit"}, "must be one of none, 4bit, 8bit"),
        ({"methods": ["lora"], "baseline": "dora"}, "baseline = 'dora' is none of the arms lora"),
        ({"tasks": "gcd"}, "no field tasks; the fields are name"),
        ({"training": {"step": 3}}, "no field step; the fields are steps"),
        ({"training": {"steps": 0}}, "TrainConfig.steps = 0"),
        ({"training": {"lr": 0.1}}, "lr and seed are set by the study"),
    ],
)
def test_what_cannot_be_says_why(values: dict, words: str) -> None:
    with pytest.raises(StudyError) as raised:
        Study.from_dict(values)
    assert words in str(raised.value)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(StudyError, match="no study 'metric'; there are gsm8k, methods, metric_axis, rotation_axis"):
        load_study("metric")
    with pytest.raises(ArmError, match="'lorra' is no method"):
        Study(methods=("lorra",)).arms()


@pytest.mark.parametrize(
    "values",
    [{"seeds": "3"}, {"methods": 5}, {"rate_ratio": float("nan")}, {"training": []},
     {"training": {"steps": "2"}},
     {"layers": ["a"]}, {"costs": 1}, {"model": None}, {"seeds": 10**9}, {"rates": 10**9 + 1}],
)  # fmt: skip
def test_damaged_data_of_a_study_is_a_sentence(values: object) -> None:
    with pytest.raises(StudyError):
        Study.from_dict(values)  # type: ignore[arg-type]
