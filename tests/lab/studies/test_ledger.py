"""Runs are written once and whole, whoever else is at it, and whenever a process dies."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lora_lite.lab.studies.ledger import DONE, FAILED, Ledger, LedgerError, publish, run_id

CONFIG = {"kind": "tune", "training": {"lr": 0.1, "seed": 0}}


def test_a_run_is_named_by_its_configuration(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run = ledger.write(CONFIG, DONE, {"accuracy": 0.5})
    assert run == run_id({"training": {"seed": 0, "lr": 0.1}, "kind": "tune"})  # the order does not matter
    assert run != run_id({**CONFIG, "kind": "seed"})
    found = ledger.read(run)
    assert found is not None and (found["accuracy"], found["status"], found["config"]) == (0.5, DONE, CONFIG)
    assert ledger.read("0" * 16) is None


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run = ledger.write(CONFIG, DONE, {"accuracy": 0.5})
    before = (tmp_path / "runs" / f"{run}.json").read_bytes()
    with pytest.raises(LedgerError, match="never overwritten"):
        ledger.write(CONFIG, DONE, {"accuracy": 0.6})
    assert (tmp_path / "runs" / f"{run}.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{run}.json"]  # no temporary file stays


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"id": "other"}', ("0.1", "0.2"), ('"accuracy": 0.5', '"accuracy": 1.0')]
)
def test_a_file_changed_by_hand_is_refused(damage: str | tuple[str, str], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run = ledger.write(CONFIG, DONE, {"accuracy": 0.5})
    path = tmp_path / "runs" / f"{run}.json"
    before = path.read_text()
    path.write_text(damage if isinstance(damage, str) else before.replace(*damage))
    assert path.read_text() != before
    with pytest.raises(LedgerError, match=run):
        ledger.read(run)


def test_failures_can_be_forgotten_and_successes_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    kept = ledger.write(CONFIG, DONE, {})
    failed = ledger.write({"kind": "other"}, FAILED, {"reason": "out of memory"})
    assert ledger.forget_failures() == 1
    assert ledger.read(failed) is None and ledger.read(kept) is not None


def test_a_value_that_is_not_finite_is_refused_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Ledger(tmp_path).write(CONFIG, DONE, {"loss": float("nan")})
    assert not list(tmp_path.glob("runs/*"))


def test_one_process_claims_a_run_until_it_is_killed(tmp_path: Path) -> None:
    ledger, run = Ledger(tmp_path), run_id(CONFIG)
    source = f"""
        import sys, time
        from pathlib import Path
        from lora_lite.lab.studies.ledger import Ledger
        with Ledger(Path({str(tmp_path)!r})).claim({run!r}) as mine:
            print(mine, flush=True)
            time.sleep(600)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other, other.stdout:
        try:
            assert other.stdout.readline() == "True\n"
            with ledger.claim(run) as mine:
                assert not mine
        finally:
            other.kill()
    with ledger.claim(run) as mine:
        assert mine
        ledger.write(CONFIG, DONE, {})
    with ledger.claim(run) as again:
        assert not again  # it is there


def test_publish_replaces_or_refuses(tmp_path: Path) -> None:
    publish(tmp_path / "a.json", [1])
    publish(tmp_path / "a.json", [2])
    with pytest.raises(FileExistsError):
        publish(tmp_path / "a.json", [3], once=True)
    assert json.loads((tmp_path / "a.json").read_text()) == [2]


def test_all_runs_as_one_table(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write({**CONFIG, "methods": [{"method": "lora"}]}, DONE, {"accuracy": 0.5, "curve": [1, 2]})
    ledger.write({"kind": "base"}, FAILED, {"reason": "tab\there"})
    lines = ledger.tsv().splitlines()
    assert len(lines) == 3 and "config.training.lr" in lines[0].split("\t") and "curve" not in lines[0]
    assert {len(line.split("\t")) for line in lines if '"tab' not in line} == {len(lines[0].split("\t"))}
