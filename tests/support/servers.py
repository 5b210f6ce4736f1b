"""What servers and transformers ask of a peft folder, as their public loaders do (read in November 2026)."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks


def vllm_refuses(folder: Path, modules: set[str]) -> str | None:
    """Why vLLM refuses the folder (vllm/lora/peft_helper.py, lora_model.py, utils.py); None where it loads it.

    modules: the last names of the layers that the server's model replaces, as its `expected_lora_modules`.
    """
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    if missing := {"r", "lora_alpha", "target_modules"} - settings.keys():
        return f"missing required configuration fields: {missing}"
    if settings.get("modules_to_save"):
        return "modules_to_save"
    if settings.get("use_dora"):
        return "DoRA"
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        return "bias"
    if settings["r"] not in VLLM_RANKS:
        return f"rank {settings['r']}"
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            return f"unsupported LoRA weight {key}"
        if parts[-3] not in modules:
            return f"unexpected module {key}"
        if tensor.shape[0 if parts[-2] == "lora_A" else 1] != settings["r"]:
            return f"{key} has another rank"
    return None


def scaling(folder: Path) -> float:
    """The factor that servers multiply B A by: they read neither rank_pattern nor alpha_pattern."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert not settings.get("rank_pattern") and not settings.get("alpha_pattern")
    root = math.sqrt if settings.get("use_rslora") else float
    return settings["lora_alpha"] / root(settings["r"])
