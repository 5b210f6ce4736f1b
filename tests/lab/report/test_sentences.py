"""What the page says in sentences claims what was measured and no more."""

import dataclasses

import page_studies as studies
from lora_lite.lab.findings.caveats import ties
from lora_lite.lab.report import tables
from lora_lite.lab.report.page import sentences


def test_sentences_about_edges() -> None:
    study = studies.thin()

    def said(*edged: str, tuned: int = 4) -> str:
        arms = [
            dataclasses.replace(arm, edge="lowest" if arm.arm in edged else "", rate=arm.rate if at < tuned else None)
            for at, arm in enumerate(study.arms)
        ]
        return sentences.edges(dataclasses.replace(study, arms=tuple(arms)))

    tail = "did best at the lowest or the highest learning rate tried: a better one may lie beyond."
    doubt = " So differences may be of the grid rather than of the methods."
    assert said() == ""
    assert said("dora") == f"1 of 4 tuned arms (lora, the baseline, is not among them) {tail}"
    assert said("lora") == f"1 of 4 tuned arms (lora, the baseline) {tail}{doubt}"
    assert said("dora", "road") == f"2 of 4 tuned arms (lora, the baseline, is not among them) {tail}{doubt}"


def test_sentences_about_what_intervals_cover() -> None:
    few = studies.whole({arm: studies.ARMS[arm] for arm in ("lora", "ia3", "antipasto")})
    alone = [dataclasses.replace(arm, seeds=(1,)) for arm in few.arms]
    assert "seeds and test items" in sentences.covered(few)
    assert "each arm has one seed" in sentences.covered(single := dataclasses.replace(few, arms=tuple(alone)))
    assert "seeds and" not in sentences.covered(single)


def test_ties_say_what_they_would_have_seen() -> None:
    few = studies.whole({arm: studies.ARMS[arm] for arm in ("lora", "eva", "ia3")})
    seen = {"eva": ("tie", 0.311), "ia3": ("worse", 0.2), "lora": ("baseline", None)}
    arms = [dataclasses.replace(arm, verdict=seen[arm.arm][0], seen=seen[arm.arm][1]) for arm in few.arms]
    said = sentences.counted(dataclasses.replace(few, arms=tuple(arms)))
    assert "A tie would have been a verdict, 80 times of 100, from 31.1 points on" in said
    assert "a true difference of 31.1 points" in ties(arms) and ties(arms[:0]) == ""
    eva = next(arm for arm in arms if arm.arm == "eva")
    assert tables.against(eva).endswith("tie (sees 31.1)")
    assert tables.against(dataclasses.replace(eva, seen=None)).endswith("tie (sees none)")
