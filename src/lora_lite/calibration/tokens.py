"""Text to token ids for what a model is to go on from: a start token at most once, and no end token behind it.

Works with the tokenizers of transformers; nothing is imported from it.
"""

import re
from collections.abc import Sequence
from typing import Any


def start_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text, such as <s>; those behind one, such as </s>, are left out."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = (at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare)
    return whole[: next(places, 0)]


def literal_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in which the names of control tokens, such as "<|im_end|>", are letters like any others."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def rendered_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a prompt that may hold control tokens by name, as chat templates write them.

    The tokenizer's own start tokens come first, unless the text begins with one.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    start = start_ids(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def pieces_ids(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> list[int]:
    """The ids of a text in pieces, (text, whether it is literal): control tokens are read outside literal pieces only.

    What lies between two control tokens is tokenised as one text, whatever pieces it is made of.
    """
    control = control_tokens(tokenizer)
    names = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True))
    ids: list[int] = []
    plain, swallow = "", False  # swallow: the last control token takes the blanks behind it (rstrip)
    for text, literal in pieces:
        parts = [text] if literal or not names else re.split(f"({names})", text)
        for place, part in enumerate(parts):
            if place % 2 == 0:
                plain += part.lstrip() if swallow and not plain else part
                continue
            token = control[part]
            plain = plain.rstrip() if getattr(token, "lstrip", False) else plain
            ids += [*(literal_ids(tokenizer, plain) if plain else []), tokenizer.convert_tokens_to_ids(part)]
            plain, swallow = "", getattr(token, "rstrip", False)
    return ids + (literal_ids(tokenizer, plain) if plain else [])


def control_tokens(tokenizer: Any) -> dict[str, Any]:
    """The special tokens of a tokenizer by name; with their AddedToken, where it says how they take blanks."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {**dict.fromkeys(tokenizer.all_special_tokens), **{token.content: token for token in added}}


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids without special tokens, as it stands: blanks before punctuation are kept."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
