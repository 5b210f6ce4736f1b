"""Random inputs that a model of transformers takes, from what its config says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ROWS, LENGTH = 2, 12


def sample_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """A batch of one or two for the model: token ids, pixels or spectrograms; None where its config does not tell."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or name is None:
        return None
    rng = torch.Generator().manual_seed(0)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    parameter = next(iter(model.parameters()))
    batch: dict[str, Any] = {}
    rows = ROWS if getattr(text, "pad_token_id", None) is not None else 1  # classifiers ask for it of several
    if name == "input_ids" and vocabulary:
        batch[name] = torch.randint(0, vocabulary, (rows, LENGTH), generator=rng)
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        batch[name] = torch.randn(rows, getattr(config, "num_channels", 3), size, size, generator=rng)
    elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        batch[name] = torch.randn(rows, config.num_mel_bins, 2 * config.max_source_positions, generator=rng)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False) and vocabulary:
        batch["decoder_input_ids"] = torch.randint(0, vocabulary, (rows, LENGTH), generator=rng)
    floating = parameter.dtype if parameter.is_floating_point() else torch.float32
    return {key: value.to(floating) if value.is_floating_point() else value for key, value in batch.items()}
