"""Steering the embedded model between two moods."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_coefficient_turns_the_models_preference_monotonically(monkeypatch: pytest.MonkeyPatch) -> None:
    """From c = -2 to 2, on prompts and continuations that the direction was not measured on."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs")
    monkeypatch.delitem(sys.modules, "steering", raising=False)
    import steering

    for gate, rows in steering.measure()["gates"].items():
        assert [row["c"] for row in rows] == [-2, -1, 0, 1, 2]
        assert all(after["preference"] > before["preference"] + 0.05 for before, after in pairwise(rows)), gate
        cost = max(row["loss"] for row in rows) - rows[2]["loss"]
        assert 0 < cost < 0.3, gate  # nats a token of plain text: it costs something, and the model still speaks
