"""A study from start to end on a tiny model: what is measured, resumed, refused, and what is left of the base."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lab_helpers import small_study as small
from lora_lite.lab.findings.analysis import analyse
from lora_lite.lab.findings.findings import Missing
from lora_lite.lab.report import tables
from lora_lite.lab.studies import bench
from lora_lite.lab.studies.ledger import FAILED, Ledger, LedgerError


def test_a_study_is_measured_whole_and_its_findings_say_so(model: str, tmp_path: Path) -> None:
    study = small(model)
    ledger = bench.run_study(study, tmp_path / "out", command="a command")
    records = list(ledger.records())
    kinds = [record["config"]["kind"] for record in records]
    assert {kind: kinds.count(kind) for kind in kinds} == {"base": 1, "tune": 6, "seed": 4}
    for record in records:
        assert record["status"] == "done" and record["provenance"]["versions"]["torch"] == torch.__version__
        if record["config"]["kind"] != "base":
            assert len(record["curve"]) == 2 and record["tokens"] > record["answer_tokens"] > 0
    tokens = {record["config"]["training"]["seed"]: set() for record in records if "training" in record["config"]}
    for record in records:
        if "training" in record["config"]:
            tokens[record["config"]["training"]["seed"]].add(record["tokens"])
    assert all(len(each) == 1 for each in tokens.values())  # equal budgets: the same tokens for every arm

    found = analyse(tmp_path / "out")
    assert found.missing == () and found.command == "a command" and found.baseline == "lora"
    assert {arm.arm: (arm.seeds, len(arm.rates), arm.verdict) for arm in found.arms} == {
        "lora": ((1, 2), 3, "baseline"), "ia3": ((1, 2), 3, "tie"),
    }  # fmt: skip
    assert found.base is not None and set(found.base.forgetting) == {"general text", "chain_sum"}
    for arm in found.arms:
        assert arm.rate == min(arm.rates, key=lambda lr: arm.rates[lr] or 0.0)
        assert arm.rate is not None
        assert arm.edge == {0: "lowest", 1: "", 2: "highest"}[sorted(arm.rates).index(arm.rate)]
        assert arm.cost is not None and arm.cost.trainable > 0 and set(arm.curves) == {1, 2}
        assert arm.forgetting["general text"].before == found.base.forgetting["general text"].before
    assert len(found.examples) == 6 and {reply.arm for reply in found.examples[0].replies} == {"base", "lora", "ia3"}
    text = tables.markdown(found)
    assert text.count("\n") == 6 and "| lora |" in text and "points against lora" in text


def test_the_same_command_does_nothing_twice_and_a_grown_study_keeps_what_it_has(model: str, tmp_path: Path) -> None:
    study = small(model, seeds=1, rates=1)
    bench.run_study(study, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    bench.run_study(study, tmp_path)
    bench.run_study(dataclasses.replace(study, seeds=2, methods=("lora,ia3,hra",)), tmp_path)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert before.items() <= after.items() and len(after) == len(before) + 2 + 3
    bench.run_study(dataclasses.replace(study, test_examples=5), tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == len(after) + 3  # tuning does not depend on the test items
    assert analyse(tmp_path).items == 5


def test_a_partial_study_is_an_honest_table(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(model, rates=1)

    def stop(todo: list, *rest: Any) -> bool:
        if todo[0].kind == "seed" and todo[0].arm.name == "ia3":
            raise KeyboardInterrupt
        return do_one(todo, *rest)

    do_one = bench.do_one
    monkeypatch.setattr(bench, "do_one", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run_study(study, tmp_path)
    found = analyse(tmp_path)
    assert found.missing == (Missing("lora", seeds=(2,)), Missing("ia3", seeds=(1, 2)))
    lora, ia3 = found.arms
    assert lora.accuracy is not None and lora.places == (1, 2) and ia3.accuracy is None and ia3.verdict == ""
    row = next(line for line in tables.markdown(found).splitlines() if line.startswith("| ia3 |"))
    assert row.startswith("| ia3 | — | — | — |") and "| 0/2 |" in row


def test_before_is_measured_without_any_adapter(model: str, tmp_path: Path) -> None:
    study = small(model, rates=1, seeds=1)
    bench.run_study(study, tmp_path)
    base = analyse(tmp_path).base
    assert base is not None and base.validation_loss is not None
    opened = bench.open_workbench(study)
    assert not any(isinstance(module, ll.Adapter) for module in opened.session.model.modules())
    assert base.validation_loss.mean == opened.losses(forgetting=False)["validation"]


def fail_at(change: Any) -> type[ll.Adapter]:
    """Register a method whose change is `change(self, x, y, layer, c)`."""

    @dataclasses.dataclass(frozen=True)
    class OddConfig(ll.AdapterConfig):
        pass

    @ll.register(OddConfig, ll.Facts("odd", title="odd", arxiv="0000.00000", lr=1e-3, lr_range=(1e-4, 1e-2)))
    class Odd(ll.Adapter):
        def __init__(self, cfg: Any, i: int, o: int) -> None:
            super().__init__(cfg)
            self.g = self.parameter(o)

    Odd.change = change
    return Odd


def raises(self: Any, x: Any, y: Any, layer: Any, c: Any) -> Any:
    raise RuntimeError("this method does not work")


def writes_the_base(self: Any, x: Any, y: Any, layer: Any, c: Any) -> Any:
    layer.weight.data[0, 0] += 1
    return y * self.g * c.to(y.dtype)


def overflows(self: Any, x: Any, y: Any, layer: Any, c: Any) -> Any:
    return y * (self.g * c.to(y.dtype) if self.training else float("nan"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (overflows, "the loss after training is not finite (validation: nan)"),
        (raises, "RuntimeError: this method does not work"),
        (writes_the_base, "has changed since attach"),
    ],
)
def test_a_failed_run_is_recorded_and_the_others_go_on(change: Any, reason: str, model: str, tmp_path: Path) -> None:
    fail_at(change)
    study = small(model, methods=("odd,lora",), rates=1, seeds=1, baseline="lora")
    ledger = bench.run_study(study, tmp_path)
    failed = [record for record in ledger.records() if record["status"] == FAILED]
    assert len(failed) == 1 and reason in failed[0]["reason"]
    found = analyse(tmp_path)
    odd = next(arm for arm in found.arms if arm.arm == "odd")
    assert reason in odd.failures[0].reason and odd.accuracy is None
    assert odd.missing is not None and odd.missing.all_rates_failed
    lora = next(arm for arm in found.arms if arm.arm == "lora")
    expected = bench.run_study(small(model, methods=("lora",), rates=1, seeds=1), tmp_path / "alone")
    alone = next(arm for arm in analyse(expected.folder).arms)
    assert (lora.rates, lora.accuracy, lora.curves) == (alone.rates, alone.accuracy, alone.curves)

    ll.methods()["odd"].change = lambda self, x, y, layer, c: y * self.g * c.to(y.dtype)  # type: ignore
    bench.run_study(study, tmp_path)
    assert any(record["status"] == FAILED for record in ledger.records())
    bench.run_study(study, tmp_path, retry_failed=True)
    assert analyse(tmp_path).missing == ()


@pytest.mark.slow
def test_two_processes_share_a_folder_and_a_killed_one_is_made_good(model: str, tmp_path: Path) -> None:
    study = small(model, training={"steps": 12, "save_every": 1}, seeds=1)
    bench.run_study(study, tmp_path / "one")
    expected = analyse(tmp_path / "one")

    source = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); import json\n"
        "from lora_lite.lab.studies.study import Study; from lora_lite.lab.studies.bench import run_study\n"
        "run_study(Study.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", source, json.dumps(study.to_dict()), str(tmp_path / "two"), str(Path(__file__))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as victim:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "two").glob(".work/*/step-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)  # in the middle of a run
    done = len(list((tmp_path / "two").glob("runs/*.json")))
    assert list((tmp_path / "two").glob(".work/*/step-*")) and done < len(list((tmp_path / "one").glob("runs/*.json")))
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as helper:
        bench.run_study(study, tmp_path / "two")
        assert helper.wait(timeout=240) == 0
    found = analyse(tmp_path / "two")
    assert tables.markdown(found) == tables.markdown(expected)
    assert [arm.curves for arm in found.arms] == [arm.curves for arm in expected.arms]
    assert not list((tmp_path / "two").glob(".work/*/step-*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "gdc"}, "did you mean gcd"),
        ({"max_length": 8}, "longer than 8"),
        ({"methods": ("lora[rank=4]",)}, "no setting rank"),
        ({"dtype": "fp8"}, "must be one of auto, float32, bfloat16"),
        ({"general_text": "no/such-text"}, "no/such-text"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_what_cannot_be_run_says_why_and_writes_nothing(
    changes: dict[str, Any], words: str, model: str, tmp_path: Path
) -> None:
    with pytest.raises(ll.LoraLiteError) as raised:
        bench.run_study(small(**{"model": model, **changes}), tmp_path / "out")
    assert words in str(raised.value) and not (tmp_path / "out").exists()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"study\.json"):
        analyse(tmp_path)
    assert Ledger(tmp_path).tsv() == "\n"
