"""Files edited by someone, their checksum too: refused by a `CheckpointError`, and the model stays as it was."""

import contextlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_bytes

import lora_lite as ll
from adapter_files import CONFIG, Net, Tensors, X, forged, live_net, parts, refused, unchanged, victims
from helpers import METHODS, attached
from lora_lite.files.format import METADATA_KEY

pytestmark = pytest.mark.usefixtures("as_installed")
FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ll.save(live_net(), tmp_path_factory.mktemp("good") / "adapter.safetensors").read_bytes()


# Tensors that do not fit, under a checksum that does

EDITS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "renamed": (lambda t: t.update({"first.lora.C": t.pop("first.lora.A")}), r"misses .* such as first\.lora\.A"),
    "missing": (lambda t: t.pop("second.lora.B"), r"misses 1 tensors, such as second\.lora\.B"),
    "no sketch": (lambda t: t.pop("second.sketch"), r"misses 1 tensors, such as second\.sketch"),
    "no train_also": (lambda t: t.pop("also.norm.weight"), r"misses 1 tensors, such as also\.norm\.weight"),
    "extra": (lambda t: t.update(extra=torch.zeros(2)), r"has 1 tensors that nothing asks for, such as extra"),
    "shape": (lambda t: t.update({"first.lora.A": torch.zeros(3, 6)}), r"first\.lora\.A is F32 \[3, 6\], expected"),
    "transposed": (lambda t: t.update({"first.lora.A": torch.zeros(6, 2)}), r"first\.lora\.A is F32 \[6, 2\]"),
    "flat": (lambda t: t.update({"first.lora.A": torch.zeros(12)}), r"first\.lora\.A is F32 \[12\]"),
    "scalar": (lambda t: t.update({"first.lora.A": torch.zeros(())}), r"first\.lora\.A is F32 \[\]"),
    "bf16": (lambda t: t.update({"first.lora.A": t["first.lora.A"].bfloat16()}), r"is BF16 .* expected torch\.float32"),
    "int": (lambda t: t.update({"first.lora.A": t["first.lora.A"].int()}), r"is I32 .* torch\.float32"),
    "int also": (lambda t: t.update({"also.norm.weight": torch.ones(4).int()}), r"is I32 .* expected a float"),
    "also shape": (lambda t: t.update({"also.norm.weight": torch.ones(5)}), r"norm\.weight has shape \(4,\)"),
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

LORA = {"method": "lora", "config": CONFIG.to_dict()}
HEADERS: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "format": (("format",), 3, "has format 3, this version reads 2; use the version that wrote it"),
    "unknown method": (("configs", 0, "method"), "lorra", "unknown method .*'lorra'; methods here: .*lora"),
    "method of no kind": (("configs", 0, "method"), ["lora"], "metadata is not valid"),
    "another method": (("configs", 0, "method"), "ia3", "metadata is not valid: IA3Config"),
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
    "no targets": (("targets",), {}, "has 6 tensors that nothing asks for"),
    "another target": (("targets", "third"), {"config": 0, "changes": {}, "shape": [6, 5]}, "misses 3 .* third"),
    "target": (("targets", "first"), None, "metadata is not valid"),
    "changes": (("targets", "first", "changes"), 5, "metadata is not valid"),
    "change": (("targets", "first", "changes"), {"rank": 2}, r"unknown fields \['rank'\]"),
    "shape": (("targets", "first", "shape"), [5, 6], r"first\.sketch is F32 \[5\], expected torch\.float32 \[6\]"),
    "three numbers": (("targets", "first", "shape"), [6, 5, 1], "metadata is not valid"),
    "below zero": (("targets", "first", "shape"), [-6, 5], r"shape \[-6, 5\]"),
    "infinite": (("targets", "first", "shape"), [float("inf"), 5], r"shape \[inf, 5\]"),
    "float": (("targets", "first", "shape"), [6.0, 5], r"shape \[6\.0, 5\]"),
    "huge shape": (("targets", "first", "shape"), [10**30, 5], "first: "),
    "base_name": (("base_name",), ["SmolLM2"], "metadata is not valid: base_name is no short text"),
    "no base_name": (("base_name",), None, "base_name is no short text"),
    "long base_name": (("base_name",), "a" * 10**4, "base_name is no short text"),
    "train_also": (("train_also",), 5, "metadata is not valid"),
    "buffers": (("buffers",), 5, "metadata is not valid"),
    "a buffer": (("buffers",), ["norm.mean"], r"misses 1 tensors, such as buffer\.norm\.mean"),
    "base": (("base",), [1], "metadata is not valid"),
    "no base": (("base",), {}, "has 1 tensors that nothing asks for, such as base"),
    "base shape": (("base",), {"norm.bias": [-4]}, r"norm\.bias has shape \(-4,\)"),
    "base size": (("base",), {"norm.bias": [10**30]}, r"base is F32 \[13\], expected torch.float32 \[32\]"),
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


KEYS = "format version name base_name configs targets train_also buffers base basis checksum"


@pytest.mark.parametrize("key", KEYS.split())
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
    refused(to_bytes(tensors, {METADATA_KEY: json.dumps(header)}), tmp_path, "checksum does not match: the file was")
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


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_anything_anywhere_in_the_metadata(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Such a file may still be a good one (another alpha, say); else the error is ours, and nothing has changed."""
    header, tensors = parts(good)
    *where, last = data.draw(st.sampled_from(places(header)[1:]))
    at: Any = header
    for key in where:
        at = at[key]
    at[last] = data.draw(JSON)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(forged(header, tensors))
    model, _, before = victims()[0]
    with contextlib.suppress(ll.CheckpointError):
        ll.load(model, path)
        ll.detach(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("method", [name for name in METHODS if "r" not in ll.methods()[name].Config.unused])
@pytest.mark.parametrize("r", [10**9, 2**62, 10**30])
def test_a_hostile_rank_takes_no_memory(method: str, r: int, tmp_path: Path) -> None:
    model = Net()
    attached(model, method, [X, -X], r=4)
    header, tensors = parts(ll.save(model, tmp_path / "a").read_bytes())
    header["configs"][0]["config"]["r"] = r
    for entry in header["targets"].values():
        entry["changes"] = {}
    (tmp_path / "bad").write_bytes(forged(header, tensors))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ll.CheckpointError, match=r"first|second"):
        ll.load(Net(), tmp_path / "bad")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB; r = 10^9 would take 24 GB


HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "regex count": (lambda h: h["configs"][0]["config"].update(target_names=["a{99999999999}"]), "regular expression"),
    "nested": (lambda h: h["configs"][0]["config"].update(exclude_names=["(" * 999 + ")" * 999]), "regular expr"),
    "long regex": (lambda h: h["configs"][0]["config"].update(target_names=["a|" * 10**5]), "characters of regular"),
    "long name": (lambda h: h["configs"][0]["config"].update(target_names=["a" * 3 * 10**6]), "bytes of metadata"),
    "own names": (lambda h: h["targets"]["first"]["changes"].update(target_names=["a"]), "first has names of its own"),
    "targets": (
        lambda h: h["targets"].update({f"t{n}": h["targets"]["first"] for n in range(10**4)}), "10,002 targets, but",
    ),
    "train_also": (lambda h: h["train_also"].extend(f"p{n}" for n in range(10**4)), "10,001 train_also, but the"),
    "configs": (lambda h: h["configs"].extend(h["configs"] * 10**3), "1,001 configs, but the model has 2 linear"),
    "rank": (lambda h: h["configs"][0]["config"].update(r=10**400), "first|second"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_ask_for_too_much(name: str, good: bytes, tmp_path: Path) -> None:
    edit, words = HOSTILE[name]
    header, tensors = parts(good)
    edit(header)
    refused(forged(header, tensors), tmp_path, words)


def test_a_sparse_giant_is_refused_unread(tmp_path: Path) -> None:
    """A file of 2 GB that takes no room on disk, whose names, shapes and rank agree with each other."""
    header, _ = parts(ll.save(live_net(), tmp_path / "a").read_bytes())
    header["configs"][0]["config"]["r"] = r = 2**25
    shapes = {"first.lora.A": [r, 6], "first.lora.B": [5, r], "second.lora.A": [r, 5], "second.lora.B": [4, r]}
    shapes |= {"first.sketch": [5], "second.sketch": [4], "also.norm.weight": [4], "base": [13]}
    entries, end = {}, 0
    for key, dims in shapes.items():
        size = 4 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        entries[key] = {"dtype": "F32", "shape": dims, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(header)}, **entries}).encode()
    with open(tmp_path / "giant", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ll.CheckpointError, match=r"holds 671,088,666 values, more than any adapter of this model"):
        ll.load(Net(), tmp_path / "giant")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
