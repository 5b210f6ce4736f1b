"""What a report says in sentences claims what was measured and no more; terminal, Markdown and page say the same."""

import dataclasses

import pytest

import page_studies as studies
from lora_lite.lab.findings.findings import BASE, Failure, Finding, Findings, Missing
from lora_lite.lab.numerals import Interval
from lora_lite.lab.report import columns, sentences, tables


def few() -> Findings:
    return studies.whole({arm: studies.ARMS[arm] for arm in ("lora", "eva", "ia3", "antipasto")})


def with_arms(study: Findings, changes: dict[str, dict]) -> Findings:
    arms = [dataclasses.replace(arm, **changes.get(arm.arm, {})) for arm in study.arms]
    return dataclasses.replace(study, arms=tuple(arms))


def test_nothing_learnt_comes_first_everywhere() -> None:
    study = studies.unlearnt()
    said = sentences.decision(study)
    assert study.learnt == () and said.startswith(
        "Nothing was learnt: no arm answers clearly more of the 150 test items"
    )
    assert "than the frozen base, which answers 2.0%" in said and "choose an easier task" in said
    assert tables.markdown(study).startswith("Nothing was learnt")
    assert str(tables.terminal(study, 80).renderables[0]) == said
    assert set(few().learnt or ()) == {"antipasto", "eva", "lora", "ia3"}
    assert dataclasses.replace(few(), base=None).learnt is None  # nothing to compare with: no such claim
    assert "learnt" not in sentences.decision(dataclasses.replace(few(), base=None))


def test_an_arm_is_clearly_above_the_base_if_their_intervals_share_nothing() -> None:
    top = Interval(0.3, 0.2, 0.4)
    assert few().base is not None and few().base.accuracy == Interval(0.02, 0.004, 0.047)
    for low, learnt in ((0.047, False), (0.048, True)):
        study = with_arms(few(), {arm.arm: {"accuracy": Interval(0.1, low, 0.4)} for arm in few().arms})
        assert bool(study.learnt) == learnt
    study = with_arms(few(), {"lora": {"accuracy": top}, "ia3": {"accuracy": Interval(0.04, 0.01, 0.1)}})
    assert "Not clearly above the frozen base: ia3." in " ".join(sentences.caveats(study))


def test_the_decision_counts_and_names_the_arms() -> None:
    verdicts = {"lora": {"verdict": "baseline"}, "eva": {"verdict": "better"}, "ia3": {"verdict": "worse"}}
    said = sentences.decision(with_arms(few(), {**verdicts, "antipasto": {"verdict": "tie"}}))
    assert said == (
        "lora answers 65.5% of the test items correctly; the frozen base, 2.0%. Of the 3 other arms, eva is better, "
        "ia3 is worse and 1 cannot be told apart from it."
    )
    said = sentences.decision(with_arms(few(), {name: {"verdict": "worse"} for name in ("eva", "ia3", "antipasto")}))
    assert said.endswith("Of the 3 other arms, none is better and 3 (antipasto, eva and ia3) are worse.")
    two = studies.whole({arm: studies.ARMS[arm] for arm in ("lora", "ia3")})
    assert sentences.decision(two).endswith(" ia3 is worse.")
    assert sentences.decision(studies.nothing()) == "Nothing is measured yet."


def test_one_sentence_about_edges() -> None:
    def said(*edged: str) -> str:
        rates = {arm.arm: {"edge": "lowest" if arm.arm in edged else ""} for arm in studies.thin().arms}
        return sentences.edges(with_arms(studies.thin(), rates))

    assert said() == ""
    assert said("dora").startswith(
        "1 of 4 arms did best at the lowest or the highest learning rate tried (lowest: dora)"
    )
    assert "the baseline not among them" in said("dora") and "the baseline among them" in said("lora")
    assert said("dora", "road").endswith("may come from the learning rates tried rather than from the methods.")


def test_sentences_about_what_intervals_cover() -> None:
    alone = [dataclasses.replace(arm, seeds=(1,)) for arm in few().arms]
    assert "seeds and test items" in sentences.covered(few())
    assert "each arm has one seed" in sentences.covered(single := dataclasses.replace(few(), arms=tuple(alone)))
    assert "seeds and" not in sentences.covered(single)
    assert sentences.one_seed(single).startswith("Measured with one seed: ")


def test_ties_say_what_they_would_have_seen() -> None:
    seen = {"eva": ("tie", 0.311), "ia3": ("worse", 0.2), "antipasto": ("worse", None), "lora": ("baseline", None)}
    study = with_arms(few(), {arm: {"verdict": verdict, "seen": share} for arm, (verdict, share) in seen.items()})
    assert "a true difference of 31.1 points" in sentences.ties(study)
    assert sentences.ties(dataclasses.replace(study, arms=())) == ""
    eva = next(arm for arm in study.arms if arm.arm == "eva")
    assert verdict_of(study, eva) == "● tie (sees 31.1)"
    assert verdict_of(study, dataclasses.replace(eva, seen=None)) == "● tie (sees none)"


def verdict_of(study: Findings, arm: Finding) -> str:
    [column] = [column for column in columns.columns(study) if column.label == "verdict"]
    return column.cell(arm).one_line


def test_other_caveats_appear_where_they_are_true() -> None:
    assert sentences.cut_off(with_arms(few(), {"ia3": {"cut_off": 0.44}})).startswith(
        "Replies cut off at the longest length allowed: ia3 44%."
    )
    assert "44" not in " ".join(sentences.caveats(few()))
    assert "failed on 2 of 600 replies" in sentences.unscored(dataclasses.replace(few(), unscored=2, replies=600))
    assert "one; another" in sentences.unlike_machines(dataclasses.replace(few(), cost_devices=("one", "another")))


def test_gaps_and_failures_are_lines() -> None:
    assert sentences.missing(studies.partial())[0] == "the frozen base: not measured yet"
    gap = Missing("lora", all_rates_failed=True, costs=True)
    assert sentences.lacks(gap) == ["every learning rate failed", "costs not measured yet"]
    assert sentences.failed(Failure("ia3", "seed", "broke", 2)) == "ia3: seed 2: broke"
    assert sentences.failed(Failure(BASE, "base", "broke")) == "the frozen base: broke"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (r"word_sequence_reversal:drop=^.*comma\.\s*,min_words=3", "word sequence reversal"),
        ("gsm8k:path=../data/gsm8k", "gsm8k"),
        ("jsonl:path=data/my_own.jsonl,score=numeric", "my_own.jsonl"),
        ("data/my_own.csv", "my_own.csv"),
    ],
)
def test_a_task_by_its_plain_name(task: str, name: str) -> None:
    assert sentences.task_name(task) == name
