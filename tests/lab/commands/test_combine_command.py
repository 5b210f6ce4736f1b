"""`lora-lite combine`: the file it writes does what its sources do together."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

import lora_lite as ll
from helpers import perturb, relative
from lab_helpers import make_llama
from lora_lite import cli


@pytest.fixture
def sources(tmp_path: Path, model: str) -> list[Path]:
    """Two adapters of the tiny model: a file, and the folder of a run."""
    base = LlamaForCausalLM.from_pretrained(model)
    paths = [tmp_path / "a.safetensors", tmp_path / "run" / "adapter.safetensors"]
    for seed, (path, cfg) in enumerate(zip(paths, (ll.LoRAConfig(r=4), ll.HRAConfig(r=4)), strict=True)):
        perturb(ll.attach(base, cfg).targets.values(), 0.2, seed)
        ll.save(base, path)
        ll.detach(base)
    (tmp_path / "run" / "result.json").write_text(json.dumps({"run": {"model": model}}))
    return [paths[0], paths[1].parent]


def test_the_file_is_the_sum(sources: list[Path], model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out" / "both.safetensors"
    given = [str(out), f"{sources[0]}=0.7", f"{sources[1]}=-0.5", "--model", model, "--dtype", "float32", "--json"]
    assert cli.main(["combine", *given]) == 0
    shown = capsys.readouterr()
    said = json.loads(shown.out.splitlines()[-1])
    assert said["out"] == str(out) and list(said["sources"].values()) == [0.7, -0.5]
    assert max(said["errors"].values()) < 1e-6 and "0.7 x lora adapter" in shown.err
    base = LlamaForCausalLM.from_pretrained(model)
    ll.load(base, sources[0], "a")
    ll.load(base, sources[1] / "adapter.safetensors", "b")
    with ll.scale(base, 1.0):
        parts = {name: ll.low_rank(base, name) for name in "ab"}
    ll.detach(base)
    ll.load(base, out)
    for path, (B, A) in ll.low_rank(base).items():
        exact = 0.7 * parts["a"][path].B @ parts["a"][path].A - 0.5 * parts["b"][path].B @ parts["b"][path].A
        assert relative(B @ A, exact) < 1e-5


def test_a_rank_on_request_says_what_is_lost(
    sources: list[Path], model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [str(tmp_path / "x.safetensors"), *map(str, sources), "--method", "ties", "--rank", "2", "--model", model]
    with pytest.warns(ll.LoraLiteWarning, match="of the worst layer's change is lost"):
        assert cli.main(["combine", *given]) == 0
    assert "weight error up to" in capsys.readouterr().err
    assert {a.cfg.r for a in ll.load(make_llama(), tmp_path / "x.safetensors").targets.values()} == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{a}=much", "--model", "{model}"], "the weight of .*a.safetensors is 'much'; give a number"),
        (["{a}", "{run}"], "only adapters of one base have a sum"),
        ([], "no adapter was given"),
        (["{a}", "{a}", "--method", "sum", "--rank", "3", "--model", "{model}"], 'rank = 3 is not for "sum"'),
    ],
)
def test_what_is_refused(
    given: list[str],
    message: str,
    sources: list[Path],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    words = [word.format(a=sources[0], run=sources[1], model=model) for word in given]
    assert cli.main(["combine", str(tmp_path / "x.safetensors"), *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x.safetensors").exists()
