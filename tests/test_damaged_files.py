"""Files that are damaged, edited or hostile: each is refused by a `CheckpointError`, and the model stays as it was."""

import copy
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import lora_lite as ll
from helpers import METHODS, anatomy, attached, bits, perturb, same_bits
from lora_lite.checkpoint import METADATA_KEY, checksum

Header, Tensors = dict[str, Any], dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.norm = nn.Linear(6, hidden), nn.Linear(hidden, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.tanh(self.first(x))))


X = torch.linspace(-1, 1, 18).reshape(3, 6)
CONFIG = ll.LoRAConfig(r=2, target_roles=())
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def live_net(seed: int = 3) -> Net:
    model = Net()
    att = ll.attach(model, CONFIG, train_also=("norm.weight",))
    perturb(att.targets.values(), seed=seed)
    return model


@pytest.fixture(autouse=True)
def as_installed() -> Iterator[None]:
    """Without the tests' own type checker, which would stop wrong types before the library sees them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ll.save(live_net(), tmp_path_factory.mktemp("good") / "adapter.safetensors").read_bytes()


def parts(data: bytes) -> tuple[Header, Tensors]:
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    return json.loads(metadata[METADATA_KEY]), from_bytes(data)


def forged(header: Any, tensors: Tensors) -> bytes:
    """A file with a checksum that fits, as someone who wants to do harm would write it."""
    if isinstance(header, dict) and "checksum" in header:
        header = {**header, "checksum": checksum({k: v for k, v in header.items() if k != "checksum"}, tensors)}
    return to_bytes(tensors, {METADATA_KEY: json.dumps(header, sort_keys=True)})


def refused(data: bytes, folder: Path, words: str = "", error: type[Exception] = ll.CheckpointError) -> None:
    """Both a bare model and one with a live adapter refuse the file and stay what they are."""
    path = folder / "bad.safetensors"
    path.write_bytes(data)
    for model, overwrite in ((Net(), False), (live_net(seed=4), True)):
        before, form, output = bits(model), anatomy(model), model(X)
        state = copy.deepcopy(model.__dict__.get("_lora_lite"))
        with pytest.raises(error, match=words) as caught:
            ll.load(model, path, overwrite=overwrite)
        assert str(path) in str(caught.value)
        assert same_bits(before, model) and anatomy(model) == form and torch.equal(model(X), output)
        assert repr(state) == repr(model.__dict__.get("_lora_lite"))


def test_the_good_file_loads(good: bytes, tmp_path: Path) -> None:
    header, tensors = parts(good)
    assert forged(header, tensors) == good
    (tmp_path / "good").write_bytes(good)
    expected = live_net()(X)
    for model, overwrite in ((Net(), False), (live_net(seed=4), True)):
        ll.load(model, tmp_path / "good", overwrite=overwrite)
        assert torch.equal(model(X), expected)


# Damage by accident


@FUZZ
@given(data=st.data())
def test_truncated(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    refused(good[: data.draw(st.integers(0, len(good) - 1))], tmp_path, "no whole safetensors file|was not written by")


@FUZZ
@given(data=st.data())
def test_a_flipped_bit(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(flipped), tmp_path)


@FUZZ
@given(data=st.data())
def test_bytes_written_over(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(good) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    changed = good[:start] + patch + good[start + len(patch) :]
    if changed != good:
        refused(changed, tmp_path)


@pytest.mark.slow
def test_every_length_and_every_bit(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    model = Net()
    before, form = bits(model), anatomy(model)

    def refuse(data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(ll.CheckpointError):
            ll.load(model, path)
        assert ("_lora_lite" in model.__dict__) is False

    for length in range(len(good)):
        refuse(good[:length])
    for position in range(len(good)):
        for bit in range(8):
            refuse(good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :])
    assert same_bits(before, model) and anatomy(model) == form


@pytest.mark.parametrize("junk", [b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 100, b"\x80\x04\x95" * 50])
def test_other_kinds_of_file(junk: bytes, tmp_path: Path) -> None:
    refused(junk, tmp_path, "no whole safetensors file")


def test_bytes_at_the_end(good: bytes, tmp_path: Path) -> None:
    refused(good + b"\0", tmp_path, "no whole safetensors file")
    refused(good + good, tmp_path, "no whole safetensors file")


def test_another_programs_safetensors(good: bytes, tmp_path: Path) -> None:
    tensors = parts(good)[1]
    refused(to_bytes(tensors), tmp_path, "was not written by lora-lite")
    refused(to_bytes(tensors, {"format": "pt"}), tmp_path, "was not written by lora-lite")


# Tensors that do not fit, under a checksum that does

EDITS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "renamed": (lambda t: t.update({"first.lora.C": t.pop("first.lora.A")}), r"misses 1 tensors, such as first\.lora\.A"),
    "missing": (lambda t: t.pop("second.lora.B"), r"misses 1 tensors, such as second\.lora\.B"),
    "no sketch": (lambda t: t.pop("second.sketch"), r"misses 1 tensors, such as second\.sketch"),
    "no train_also": (lambda t: t.pop("also.norm.weight"), r"misses 1 tensors, such as also\.norm\.weight"),
    "extra": (lambda t: t.update(extra=torch.zeros(2)), r"has 1 tensors that nothing asks for, such as extra"),
    "shape": (lambda t: t.update({"first.lora.A": torch.zeros(3, 6)}), r"first\.lora\.A is F32 \[3, 6\], expected"),
    "transposed": (lambda t: t.update({"first.lora.A": torch.zeros(6, 2)}), r"first\.lora\.A is F32 \[6, 2\]"),
    "flat": (lambda t: t.update({"first.lora.A": torch.zeros(12)}), r"first\.lora\.A is F32 \[12\]"),
    "scalar": (lambda t: t.update({"first.lora.A": torch.zeros(())}), r"first\.lora\.A is F32 \[\]"),
    "bf16": (lambda t: t.update({"first.lora.A": t["first.lora.A"].bfloat16()}), r"is BF16 .* expected torch\.float32"),
    "int": (lambda t: t.update({"first.lora.A": t["first.lora.A"].int()}), r"is I32 .* expected torch\.float32"),
    "int also": (lambda t: t.update({"also.norm.weight": torch.ones(4).int()}), r"is I32 .* expected a float"),
    "also shape": (lambda t: t.update({"also.norm.weight": torch.ones(5)}), r"norm\.weight has shape \(4,\) in the model, b"),
    "also row": (lambda t: t.update({"also.norm.weight": torch.ones(1, 4)}), r"but \(1, 4\) in the file"),
    "sketch": (lambda t: t.update({"first.sketch": torch.ones(4)}), r"first\.sketch is F32 \[4\]"),
    "nan": (lambda t: t["first.lora.A"][0].fill_(float("nan")), r"first\.lora\.A is not finite"),
    "inf": (lambda t: t["also.norm.weight"].fill_(float("inf")), r"also\.norm\.weight is not finite"),
    "nan sketch": (lambda t: t["second.sketch"].fill_(float("nan")), r"second\.sketch is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_tensors_that_do_not_fit(name: str, good: bytes, tmp_path: Path) -> None:
    edit, words = EDITS[name]
    header, tensors = parts(good)
    edit(tensors)
    refused(forged(header, tensors), tmp_path, words)


# Metadata that do not fit

LORA = {"variant": "lora", "config": CONFIG.to_dict()}
HEADERS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "format": (("format",), 2, "has format 2, this version reads 1; update lora-lite"),
    "unknown variant": (("configs", 0, "variant"), "lorra", "unknown method .*'lorra'; methods here: .*lora"),
    "variant of no kind": (("configs", 0, "variant"), ["lora"], "metadata is not valid"),
    "another variant": (("configs", 0, "variant"), "ia3", "metadata is not valid: IA3Config"),
    "unknown field": (("configs", 0, "config", "rank"), 2, r"LoRAConfig: unknown fields \['rank'\]"),
    "r string": (("configs", 0, "config", "r"), "8", "LoRAConfig.r = '8': must be an integer >= 1"),
    "r float": (("configs", 0, "config", "r"), 2.0, "LoRAConfig.r = 2.0"),
    "r true": (("configs", 0, "config", "r"), True, "LoRAConfig.r = True"),
    "r zero": (("configs", 0, "config", "r"), 0, "LoRAConfig.r = 0"),
    "alpha": (("configs", 0, "config", "alpha"), float("nan"), "LoRAConfig.alpha = nan"),
    "huge alpha": (("configs", 0, "config", "alpha"), 10**400, "LoRAConfig.alpha = 1000"),
    "dtype": (("configs", 0, "config", "dtype"), "int8", "LoRAConfig.dtype = 'int8': must be one of"),
    "regex": (("configs", 0, "config", "target_names"), ["("], "must be a valid regular expression"),
    "roles": (("configs", 0, "config", "target_roles"), {"reader": 1, "boss": 2}, "target_roles .* must be a subset"),
    "configs": (("configs",), {"0": LORA}, "metadata is not valid"),
    "no configs": (("configs",), [], "metadata is not valid"),
    "config": (("configs", 0), "lora", "metadata is not valid"),
    "settings": (("configs", 0, "config"), [1, 2], "metadata is not valid"),
    "index": (("targets", "first", "config"), 1, "metadata is not valid"),
    "index before": (("targets", "first", "config"), -1, "first has config -1 and shape"),
    "index string": (("targets", "first", "config"), "0", "first has config '0'"),
    "targets": (("targets",), ["first"], "metadata is not valid"),
    "no targets": (("targets",), {}, "has 7 tensors that nothing asks for"),
    "another target": (("targets", "third"), {"config": 0, "changes": {}, "shape": [6, 5]}, "misses 3 tensors, such as third"),
    "target": (("targets", "first"), None, "metadata is not valid"),
    "changes": (("targets", "first", "changes"), 5, "metadata is not valid"),
    "change": (("targets", "first", "changes"), {"rank": 2}, r"unknown fields \['rank'\]"),
    "shape": (("targets", "first", "shape"), [5, 6], r"first\.lora\.A is F32 \[2, 6\], expected torch.float32 \[2, 5\]"),
    "three numbers": (("targets", "first", "shape"), [6, 5, 1], "metadata is not valid"),
    "below zero": (("targets", "first", "shape"), [-6, 5], r"shape \[-6, 5\]"),
    "infinite": (("targets", "first", "shape"), [float("inf"), 5], r"shape \[inf, 5\]"),
    "float": (("targets", "first", "shape"), [6.0, 5], r"shape \[6\.0, 5\]"),
    "huge shape": (("targets", "first", "shape"), [10**30, 5], "first: "),
    "train_also": (("train_also",), 5, "metadata is not valid"),
    "a string": (("train_also",), "abc", "misses 3 tensors"),
    "another": (("train_also",), ["norm.bias"], r"misses 1 tensors, such as also\.norm\.bias"),
    "a key more": (("pickle",), "cos\nsystem", "must have just the keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_metadata_that_do_not_fit(name: str, good: bytes, tmp_path: Path) -> None:
    where, value, words = HEADERS[name]
    header, tensors = parts(good)
    at: Any = header
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    refused(forged(header, tensors), tmp_path, words)


@pytest.mark.parametrize("key", ["format", "version", "name", "configs", "targets", "train_also", "checksum"])
def test_metadata_without(key: str, good: bytes, tmp_path: Path) -> None:
    header, tensors = parts(good)
    del header[key]
    refused(forged(header, tensors), tmp_path, "must have just the keys")


@pytest.mark.parametrize(
    "text", ["", "{", "nan", "[" * 100_000, '{"a": 1', "1" * 5000, "\ud800", "[]", "null", '"lora"']
)
def test_metadata_that_are_no_json_object(text: str, good: bytes, tmp_path: Path) -> None:
    words = "is no JSON|must have just the keys|no whole safetensors"
    refused(to_bytes(parts(good)[1], {METADATA_KEY: text.encode("utf-8", "replace").decode()}), tmp_path, words)


def test_an_edit_without_a_new_checksum(good: bytes, tmp_path: Path) -> None:
    header, tensors = parts(good)
    header["configs"][0]["config"]["alpha"] = 1000.0
    refused(
        to_bytes(tensors, {METADATA_KEY: json.dumps(header)}), tmp_path, "checksum does not match: the file was dam"
    )
    header, tensors = parts(good)
    tensors["first.lora.A"][0, 0] += 1e-6
    refused(to_bytes(tensors, {METADATA_KEY: json.dumps(header)}), tmp_path, "checksum does not match")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**63, -(10**30)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_anything_anywhere_in_the_metadata(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Such a file may still be a good one (another alpha, say); else the error is ours, and nothing has changed."""
    header, tensors = parts(good)
    *where, last = data.draw(st.sampled_from(places(header)[1:]))
    at: Any = header
    for key in where:
        at = at[key]
    at[last] = data.draw(JSON)
    model, path = Net(), tmp_path / "odd.safetensors"
    path.write_bytes(forged(header, tensors))
    before, form = bits(model), anatomy(model)
    try:
        ll.load(model, path)
    except ll.CheckpointError:
        assert anatomy(model) == form
    else:
        ll.detach(model)
    assert same_bits(before, model)


@pytest.mark.parametrize("method", [name for name in METHODS if "r" not in ll.variants()[name].Config.unused])
@pytest.mark.parametrize("r", [10**9, 2**62, 10**30])
def test_a_hostile_rank_takes_no_memory(method: str, r: int, tmp_path: Path) -> None:
    model = Net()
    attached(model, method, [X])
    header, tensors = parts(ll.save(model, tmp_path / "a").read_bytes())
    header["configs"][0]["config"]["r"] = r
    for entry in header["targets"].values():
        entry["changes"] = {}
    (tmp_path / "bad").write_bytes(forged(header, tensors))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ll.CheckpointError, match=r"first|second"):
        ll.load(Net(), tmp_path / "bad")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB; r = 10^9 would take 24 GB


# Files for another model


@pytest.mark.parametrize(
    ("model", "words", "error"),
    [
        (Net(hidden=7), r"first maps \(6, 7\) here, but \(6, 5\) in the file", ll.CheckpointError),
        (nn.Sequential(nn.Linear(6, 5)), "the model has no linear layer first", ll.CheckpointError),
        (nn.ModuleDict({"first": nn.LayerNorm(5)}), "the model has no linear layer first", ll.CheckpointError),
        (Net(seed=1), "trained on another base model; worst layer", ll.BaseMismatchError),
    ],
    ids=["shape", "paths", "no linear layer", "weights"],
)
def test_another_model(model: nn.Module, words: str, error: type[Exception], good: bytes, tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(good)
    before, form = bits(model), anatomy(model)
    with pytest.raises(error, match=words):
        ll.load(model, tmp_path / "good")
    assert same_bits(before, model) and anatomy(model) == form
