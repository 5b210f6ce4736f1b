"""Where a result comes from: machine, versions, commit; and the bits of a base, to see that they stay."""

import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

import lora_lite
from lora_lite.layers.packing import is_packed, unpacked

PACKAGES = ("lora-lite", "torch", "transformers", "datasets", "reasoning-gym", "bitsandbytes")
MARK = "+changes"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, of those installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


@functools.cache
def commit() -> str | None:
    """The commit of the library's checkout, marked if tracked files differ from it; None where it is none.

    As it was when a process first asked: the code that it runs does not change with the files.
    """
    package = Path(lora_lite.__file__).resolve().parent
    try:
        head = _git(package, "rev-parse", "HEAD")
        inside = _git(package, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package))
    except (OSError, subprocess.SubprocessError):
        return None
    return (head + (MARK if changed else "")) if inside else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


class Provenance(TypedDict):
    """Where a result comes from.

    commit: of the library's checkout, None where it is none. versions: of Python and of packages. device: the GPU or
    the processor. threads: of torch. system: as "Linux x86_64".
    """

    commit: str | None
    versions: dict[str, str]
    device: str
    threads: int
    system: str


def provenance(device: torch.device) -> Provenance:
    """What to write beside a result."""
    return {
        "commit": commit(),
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def where(origin: Mapping[str, Any]) -> str:
    """The machine of a provenance, in words."""
    return f"{origin['device']} ({origin['threads']} threads)"


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """A fingerprint of the bits of every weight and buffer of a model without adapters: 16 hex digits.

    SHA-256, a second or two for each 10^9 bytes. A 4-bit weight that bitsandbytes has packed counts as it was before.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"{path}.weight": unpacked(layer)[0] for path, layer in model.named_modules() if is_packed(layer)}
    lines = [f"{name} {tuple(tensors[name].shape)} {tensor_fingerprint(tensors[name])}\n" for name in sorted(tensors)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype and bits."""
    digest = hashlib.sha256(str(tensor.dtype).encode())
    for flat in stored_bytes(tensor):
        digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def stored_bytes(tensor: Tensor) -> list[Tensor]:
    """The bytes behind a tensor, flat and as uint8: several where a quantised tensor is made of parts."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return [flat for name in flatten()[0] for flat in stored_bytes(getattr(tensor, name))]
    return [tensor.detach().contiguous().flatten().view(torch.uint8)]
