"""What settings are called elsewhere, and what stands for them here: for messages about names that do not exist."""

import difflib
from collections.abc import Iterable

# A field, or a sentence where there is none. Nearly all are names of peft's.
ELSEWHERE = {
    "rank": "r",
    "lora_rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "target_modules": "target_names",
    "exclude_modules": "exclude_names",
    "layers_to_transform": "layers",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "learning_rate": "lr",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "max_length",
    "output_dir": "out",
    "output": "out",
    "model_name_or_path": "model",
    "dataset": "task",
    "use_dora": "DoRA is a method of its own: DoRAConfig, `lora-lite train dora`",
    "modules_to_save": "whole parameters are trained with attach(..., train_also=...), --train-also",
    "trainable_token_indices": "whole parameters are trained with attach(..., train_also=...), --train-also",
    "bias": "biases are trained with attach(..., train_also=...), --train-also",
    "init_lora_weights": "each start is a method of its own: LoRAConfig, PiSSAConfig, EVAConfig, AntiPaSTOCorDAConfig",
    "task_type": "it is not needed: no model is wrapped",
    "inference_mode": "it is not needed: c = 0 (scale) gives the base back, and merge folds the adapter in",
    "fan_in_fan_out": "it is not needed: it is read from the layer",
    "rank_pattern": "attach takes a list of configs, each with its own target_names",
    "alpha_pattern": "attach takes a list of configs, each with its own target_names",
}


def advice(name: str, known: Iterable[str], spell: str = "{}") -> str:
    """What to give instead of the setting `name`, which does not exist; empty where nothing comes near.

    Args:
        name: as it was given, in Python's spelling.
        known: the settings that there are.
        spell: how one is written where it was given, such as "--{}".
    """
    known = list(known)
    here = ELSEWHERE.get(name, "")
    if " " in here:
        return here
    near = [here] if here in known else difflib.get_close_matches(name, known, n=1)
    flags = [spell.format(each.replace("_", "-") if spell.startswith("-") else each) for each in near]
    return f"did you mean {flags[0]}?" if flags else ""
