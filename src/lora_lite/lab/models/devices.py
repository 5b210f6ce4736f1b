"""Where a command of the lab runs, and in which dtype it reads the base."""

import torch

from lora_lite.lab.errors import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str | None) -> torch.device:
    """The device asked for, or the GPU if there is one. Raises `RunError` for one that is not here."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(name)
        torch.zeros(1, device=picked).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's, of names, drivers and builds
        reason = str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__
        raise RunError(
            f"--device {name}: cannot be used here ({reason}); leave it out, or give cpu, cuda, ..."
        ) from error
    return picked


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the base; "auto" takes bfloat16 only where hardware computes it: elsewhere it is slower."""
    if name not in (*DTYPES, "auto"):
        raise RunError(f"dtype = {name!r}: must be one of auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
