"""`ll.save` and `ll.load` with an address on the hub, against a server on this machine that speaks its protocol."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import lora_lite as ll
from helpers import attached, tiny_llama, token_ids
from hub_server import COMMIT, Hub, serving
from lora_lite.files.description import describe

IDS = token_ids()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


def trained() -> torch.nn.Module:
    model = tiny_llama()
    model.config._name_or_path = "some/base"  # type: ignore[union-attr, operator, assignment]
    attached(model, "lora", target_names=("q_proj",))
    return model


def test_what_is_saved_is_loaded(hub: Hub) -> None:
    model = trained()
    where = ll.save(model, "hf://user/mine")
    assert hub.private == {"user/mine": True} and hub.repos["user/mine"].keys() == {"adapter.safetensors", "README.md"}
    other = tiny_llama()
    ll.load(other, where)
    assert torch.equal(other(IDS)[0], model(IDS)[0])
    for address in ("hf://user/mine", f"hf://user/mine@{COMMIT}"):
        again = tiny_llama()
        ll.load(again, address)
        assert torch.equal(again(IDS)[0], model(IDS)[0])


def test_the_card_says_what_the_file_says(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    ll.save(model, "hf://user/mine")
    text = hub.repos["user/mine"]["README.md"].decode()
    found = describe(ll.save(model, tmp_path / "a.safetensors"))
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert "library_name: lora-lite\n" in front and "base_model: some/base\n" in front
    for part in (found["base"]["fingerprint"], f"{found['trained_values']:,} trained values on 2 layers", "2106.09685"):
        assert part in body
    assert 'll.load(model, "hf://user/mine")' in body and "PeftModel.from_pretrained" in body and "vllm serve" in body


def test_a_card_of_ones_own_stays(hub: Hub) -> None:
    model = trained()
    ll.save(model, "hf://user/mine")
    hub.repos["user/mine"]["README.md"] = b"my own"
    before = hub.repos["user/mine"]["adapter.safetensors"]
    attached(model, "lora", name="b", target_names=("v_proj",))
    ll.save(model, "hf://user/mine", "b")
    assert hub.repos["user/mine"]["README.md"] == b"my own" and hub.repos["user/mine"]["adapter.safetensors"] != before


def test_files_ask_nothing_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    ll.load(tiny_llama(), ll.save(model, tmp_path / "a.safetensors"))
    assert hub.asked == []


def test_what_was_fetched_is_loaded_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = trained(), tiny_llama()
    ll.load(tiny_llama(), ll.save(model, "hf://user/mine"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ll.load(other, "hf://user/mine")
    assert torch.equal(other(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://user/none", "hf://user/none: the hub has no such repository, or one that your token may read"),
        ("hf://user/empty", "hf://user/empty: holds no adapter.safetensors, which is what ll.save writes"),
        ("hf://user/mine@v9", "has no revision 'v9'"),
        ("hf://user", "is no address on the hub; it has the form hf://user/name"),
        ("hf://user/mine--x", "Cannot have -- or .. in repo_id"),
        ("hf://user/mine/../x", "is no address on the hub"),
        ("hf://user/broken", "broken|safetensors"),
    ],
)
def test_what_cannot_be_read(hub: Hub, address: str, message: str) -> None:
    hub.repos |= {"user/empty": {}, "user/mine": {"adapter.safetensors": b""}, "user/broken": {}}
    hub.repos["user/broken"]["adapter.safetensors"] = b"no adapter"
    model = tiny_llama()
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(model, address)
    assert not any("lora" in key for key in model.state_dict())


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ll.CheckpointError, match="writing to the hub needs a token, and none is here; run `hf auth"):
        ll.save(trained(), "hf://user/mine")
    with pytest.raises(ll.CheckpointError, match="nobody without a token"):
        ll.load(tiny_llama(), "hf://user/none")
    assert not hub.repos


def test_a_token_that_may_not_write(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ll.CheckpointError, match="the hub refused: your token may not write it"):
        ll.save(trained(), "hf://user/mine")


@pytest.mark.parametrize("offline", [True, False])
def test_no_network(hub: Hub, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    why = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 does not answer"
    with pytest.raises(ll.CheckpointError, match=f"{why}.*no copy is in the cache"):
        ll.load(tiny_llama(), "hf://user/mine")
    with pytest.raises(ll.CheckpointError, match=why):
        ll.save(trained(), "hf://user/mine")


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        ll.load(tiny_llama(), "hf://user/mine")


def test_nothing_is_sent_of_an_adapter_that_cannot_be_saved(hub: Hub) -> None:
    model = trained()
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if key.endswith("default.A")).fill_(float("nan"))
    with pytest.raises(ll.CheckpointError, match="is not finite"):
        ll.save(model, "hf://user/mine")
    assert hub.asked == []
