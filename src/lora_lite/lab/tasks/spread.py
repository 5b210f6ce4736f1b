"""A small list of questions still has some in each split."""

from collections import Counter
from collections.abc import Mapping, Sequence


def spread(found: Mapping[bytes, str], splits: Sequence[str]) -> dict[bytes, str]:
    """Question key -> split, with a question in each of `splits` if there are that many.

    found: the splits that the questions' contents give. An empty one takes the question with the smallest key of the
    largest, so that the result depends on the set of questions alone, not on their order. Of fewer questions, "train"
    has one.
    """
    shared = dict(found)
    for split in splits:
        counts = Counter(shared.values())
        enough = len(shared) >= (1 if split == "train" else len(splits))
        if enough and not counts[split]:
            largest = max(splits, key=lambda name: counts[name])
            shared[min(key for key, where in shared.items() if where == largest)] = split
    return shared
