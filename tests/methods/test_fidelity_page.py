"""docs/fidelity.md has every method, and names tests that are there."""

import sys
from pathlib import Path

import pytest
import tomllib

from helpers import METHODS

TESTS = Path(__file__).parent
ENTRIES = tomllib.loads((TESTS.parents[1] / "docs" / "fidelity.toml").read_text())


def test_every_method_has_its_entry() -> None:
    assert set(ENTRIES) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_tests_named_are_there(method: str) -> None:
    assert ENTRIES[method]["tests"] and ENTRIES[method]["paper"]
    for name in ENTRIES[method]["tests"]:
        file, test = name.split("::")
        assert f"\ndef {test}(" in (TESTS / file).read_text(), name


def test_a_method_without_an_entry_has_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS.parents[1] / "docs")
    monkeypatch.delitem(sys.modules, "fidelity", raising=False)
    import fidelity

    for method in METHODS:
        assert f"## {method}\n" in fidelity.page() and fidelity.formula(method) in fidelity.page()
    monkeypatch.setattr(fidelity, "entries", lambda: {})
    with pytest.raises(KeyError):
        fidelity.page()
