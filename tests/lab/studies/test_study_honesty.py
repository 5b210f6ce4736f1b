"""What a study must not say or hide: verdicts of one seed, another study's runs, failures, times of a busy machine."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from lab_helpers import small_study as small
from lora_lite import cli
from lora_lite.lab.commands import commands
from lora_lite.lab.costs.measure import MeasureError
from lora_lite.lab.findings import circumstances
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.models import base
from lora_lite.lab.report import sentences
from lora_lite.lab.shared_flags import Shared
from lora_lite.lab.studies import bench
from lora_lite.lab.studies.ledger import DONE, Ledger
from lora_lite.lab.studies.study import StudyError
from lora_lite.lab.studies.workbench import Workbench


def test_one_seed_decides_nothing(model: str, tmp_path: Path) -> None:
    ledger = bench.run_study(small(model, rates=1, seeds=2), tmp_path)
    for record in list(ledger.records()):  # as if every reply of lora were right, and none of ia3
        if record["config"]["kind"] == "seed":
            (ledger.runs / f"{record['id']}.json").unlink()
            share = float(record["config"]["methods"][0]["method"] == "lora")
            found = {key: value for key, value in record.items() if key not in ("id", "status", "config", "digest")}
            ledger.write(record["config"], DONE, {**found, "accuracy": share, "scores": [share] * 6})
    two = {arm.arm: arm for arm in analyse(tmp_path).arms}
    assert two["ia3"].verdict == "worse" and two["ia3"].p is not None and two["ia3"].p < 0.05
    assert (two["lora"].places, two["ia3"].places) == ((1, 1), (2, 2))
    bench.run_study(small(model, rates=1, seeds=1), tmp_path)
    found = analyse(tmp_path)
    one = {arm.arm: arm for arm in found.arms}
    assert (one["ia3"].verdict, one["ia3"].p, one["ia3"].places) == ("", None, (1, 2))
    assert one["ia3"].against is not None and one["ia3"].against.mean == -1.0
    assert any("one seed: ia3, lora" in note for note in sentences.caveats(found))


def test_a_folder_of_another_study_is_refused_and_stays(model: str, tmp_path: Path) -> None:
    bench.run_study(small(model, rates=1, seeds=1), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for changes, word in [({"task": "chain_sum"}, "task: 'gcd' there, 'chain_sum' now"),
                          ({"training": {"steps": 3}}, "steps: 2 there, 3 now"),
                          ({"validation_examples": 5}, "data: validation")]:  # fmt: skip
        with pytest.raises(StudyError, match="give another --out") as raised:
            bench.run_study(small(model, **{"rates": 1, "seeds": 1, **changes}), tmp_path)
        assert word in str(raised.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_a_failed_base_and_failed_costs_are_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MeasureError("no figure")

    monkeypatch.setattr(bench, "measured_costs", fail)
    monkeypatch.setattr(Workbench, "answers", fail)
    bench.run_study(small(model, methods=("lora",), rates=1, seeds=1, costs=True), tmp_path)
    found = analyse(tmp_path)
    assert found.base is None
    assert sentences.failures(found) == (
        "the frozen base: MeasureError: no figure", "lora: seed 1: MeasureError: no figure",
        "lora: costs: MeasureError: no figure",
    )  # fmt: skip
    assert commands.show(tmp_path, page=False, shared=Shared()) == 1


@pytest.mark.slow
def test_costs_wait_for_all_other_runs_and_for_each_other(model: str, tmp_path: Path) -> None:
    study = small(model, rates=1, seeds=1, costs=True)
    opened = bench.open_workbench(study)
    plan, ledger = bench.plan_of(opened), Ledger(tmp_path)
    todo = bench.remaining(study, plan, ledger)
    while todo[0].kind != "cost":
        assert "cost" not in {job.kind for job in todo}
        assert bench.do_one(todo, opened, plan, ledger)
        todo = bench.remaining(study, plan, ledger)
    assert [job.kind for job in todo] == ["cost", "cost"]
    with ledger.claim("costs"):  # as another process would that is at the first of them
        assert not bench.do_one(todo[1:], opened, plan, ledger)
    assert bench.do_one(todo[1:], opened, plan, ledger)
    assert bench.remaining(study, plan, ledger) == todo[:1]


def test_the_old_model_is_let_go_before_a_new_one_is_read(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = bench.open_workbench(small(model))
    old = weakref.ref(opened.session.model)
    load = base.load_model

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert old() is None
        return load(*arguments, **settings)

    monkeypatch.setattr(base, "load_model", watched)
    opened.session.reload()
    opened.require_base()


def test_caveats_are_made_from_what_was_found(model: str, tmp_path: Path) -> None:
    bench.run_study(small(model, seeds=2), tmp_path)
    found = analyse(tmp_path)
    at = [arm.arm for arm in found.arms if arm.edge]
    notes = sentences.caveats(found)
    told = [note for note in notes if "learning rate tried" in note]
    assert len(told) == bool(at) and all(f"{len(at)} of 2 arms" in note and ", ".join(at[:1]) in note for note in told)
    assert all(arm.cut_off == 1.0 for arm in found.arms)  # four tokens of an untrained model
    assert any("cut off" in note and "lora 100%" in note for note in notes)
    here = {"provenance": {"device": "here", "threads": 1}}
    there = {"provenance": {"device": "here", "threads": 2}}
    assert circumstances.devices([here, here]) == ("here (1 threads)",)
    assert circumstances.devices([here, there, here]) == ("here (1 threads)", "here (2 threads)")


def test_a_record_without_its_figures_is_a_sentence(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = bench.run_study(small(model, methods=("lora",), rates=1, seeds=1), tmp_path)
    capsys.readouterr()
    for record in list(ledger.records()):
        path = ledger.runs / f"{record['id']}.json"
        whole, config = path.read_bytes(), record["config"]
        kept = {key: value for key, value in record.items() if key not in ("id", "status", "config", "digest")}
        for missing in ("losses_after", "provenance", *(("scores",) if config["kind"] == "seed" else ())):
            path.unlink()
            ledger.write(config, DONE, {key: value for key, value in kept.items() if key != missing})
            assert cli.main(["report", str(tmp_path)]) == 1
            told = capsys.readouterr().err
            assert told.startswith("lora-lite: LedgerError: ") and f"{path} lacks {missing}" in told
            assert len(told.splitlines()) == 1 and "remove it, and the run is made again" in told
        path.write_bytes(whole)
