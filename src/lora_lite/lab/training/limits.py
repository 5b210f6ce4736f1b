"""What a model can take: so many positions, and the token ids that its embedding has rows for."""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from lora_lite.lab.training.data import DataError, Encoded

# What configurations call the number of positions. GPT-2's and the like know the first name too.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
UNBOUNDED = ("bloom",)  # it names the length that it was trained with, and takes any


def require_fit(model: PreTrainedModel, texts: Sequence[Sequence[int] | Encoded], what: str, more: int = 0) -> None:
    """Raise DataError if the longest text, with `more` tokens behind it, or a token of one is beyond the model.

    what: the longest of the texts, in words, for the message.
    """
    parts = [part for text in texts for part in ((text.prompt, text.answer) if isinstance(text, Encoded) else (text,))]
    require_rows(model, max((max(part, default=0) for part in parts), default=0))
    require_positions(model, max(map(len, texts), default=0) + more, what)


def require_rows(model: PreTrainedModel, token: int) -> None:
    """Raise DataError if the model's embedding has no row for a token."""
    rows = getattr(getattr(model.get_input_embeddings(), "weight", None), "shape", (token + 1,))[0]
    if token >= rows:
        raise DataError(
            f"the texts have token {token}, and the model's embedding has {rows} rows: the tokenizer is of another "
            "model; load both from one folder, or resize the embedding (model.resize_token_embeddings)"
        )


def require_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Raise DataError if `what`, which takes `tokens` tokens, is longer than the model has positions.

    A model that was extended by scaling its rotary positions, or that has none, takes any length.
    """
    if tokens > positions_of(model):
        raise DataError(
            f"{what} takes {tokens} tokens, and the model has {positions_of(model):.0f} positions; shorten the prompts "
            "(drop=..., chat=False), lower max_new_tokens or max_length, or take a model with more positions"
        )


def positions_of(model: PreTrainedModel) -> float:
    """How many positions a model has; infinity where it takes any length."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in POSITIONS)
    positions = next((number for number in named if isinstance(number, int) and number > 0), 0)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    scaled = any(kind not in ("default", None) for kind in (rope.get("rope_type"), rope.get("type")))
    return math.inf if not positions or scaled or config.model_type in UNBOUNDED else positions
