"""What the page says in sentences claims what was measured and no more."""

import dataclasses

import page_studies as studies

from lora_lite.lab.page import sentences


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
    assert sentences.surprising(few) == ""
