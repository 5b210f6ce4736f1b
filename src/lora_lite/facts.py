"""What is known of a method before it runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a method says of itself when it is registered.

    Args:
        name: registry name, used in files and on the command line.
        title, arxiv: the paper.
        lr, lr_range: default learning rate, and the range worth searching; a method that is not trained has none.
        affine: whether the adapted layer is an affine function of its input, so that it merges.
        linear_in_c: whether c multiplies the whole change.
        trained: False for a method whose tensors are computed, not trained.
        decay: tensors whose zero means "no change", so that weight decay makes sense.
        lora_plus: tensors that LoRA+ trains at a larger learning rate.
    """

    name: str
    title: str
    arxiv: str
    lr: float = 0.0
    lr_range: tuple[float, float] = (0.0, 0.0)
    affine: bool = True
    linear_in_c: bool = True
    trained: bool = True
    decay: tuple[str, ...] = ()
    lora_plus: tuple[str, ...] = ()
