"""What a user's own method returns: the layer's own shape and dtype, or an error that says where it is not so."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.facts import Facts
from lora_lite.registry import register

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def own(**methods: Callable[..., Any]) -> AdapterConfig:
    """The config of a method with these `change` and `before`, registered under the name "own" alone."""

    @dataclass(frozen=True)
    class OwnConfig(AdapterConfig):
        pass

    class Own(Adapter):
        reads_weight = False

        def __init__(self, cfg: Any, i: int, o: int) -> None:
            super().__init__(cfg)
            self.w = self.parameter(1)

    for key, value in methods.items():
        setattr(Own, key, value)
    register(OwnConfig, Facts("own", title="", arxiv="", lr=1e-3, lr_range=(1e-4, 1e-2)))(Own)
    return OwnConfig(r=2, target_roles=())


WRONG: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "a leading dimension": ({"change": lambda self, x, y, layer, c: y[None]},
                            r"change of .*\(3, 5, 4\) in torch.float32, but returned \(1, 3, 5, 4\) in torch.float32"),
    "one that broadcasts": ({"change": lambda self, x, y, layer, c: y[..., :1]}, r"returned \(3, 5, 1\)"),
    "the input's width": ({"change": lambda self, x, y, layer, c: x}, r"returned \(3, 5, 6\)"),
    "whole numbers": ({"change": lambda self, x, y, layer, c: y.long()}, r"returned \(3, 5, 4\) in torch.int64"),
    "a narrower dtype": ({"change": lambda self, x, y, layer, c: y.bfloat16()}, r"\(or wider\).*torch.bfloat16"),
    "no tensor": ({"change": lambda self, x, y, layer, c: 3.0}, "returned a float"),
    "a factor too few": ({"change": lambda self, x, y, layer, c: (y,)},
                         r"the factors h \(3, 5, 'r'\) and B \(4, 'r'\), but returned \(3, 5, 4\) in torch.float32"),
    "factors of two ranks": ({"change": lambda self, x, y, layer, c: (x[..., :2], torch.ones(4, 3))},
                             r"returned \(3, 5, 2\) in torch.float32 and \(4, 3\)"),
    "a factor turned round": ({"change": lambda self, x, y, layer, c: (x[..., :2], torch.ones(2, 4))}, r"\(2, 4\)"),
    "a factor of more rows": ({"change": lambda self, x, y, layer, c: (x[None, ..., :2], torch.ones(4, 2))},
                              r"\(1, 3, 5, 2\)"),
    "before, a dimension": ({"before": lambda self, x, layer, c: x[None]},
                            r"before of .*\(3, 5, 6\) in torch.float32, but returned \(1, 3, 5, 6\)"),
    "before, narrower": ({"before": lambda self, x, layer, c: x.half()}, "before of .*torch.float16"),
}  # fmt: skip


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("how", WRONG)
def test_it_says_what_and_where(how: str) -> None:
    methods, match = WRONG[how]
    model = nn.Sequential(nn.Linear(6, 4))
    ll.attach(model, own(**methods))
    with pytest.raises(ll.MethodError, match=r"^0: .*method 'own' \(Own\) must return.*fix Own\.") as caught:
        model(X)
    assert re.search(match, str(caught.value)), str(caught.value)


@pytest.mark.usefixtures("as_installed")
def test_a_wider_dtype_is_rounded_once() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    ll.attach(model, own(change=lambda self, x, y, layer, c: y.float() * c.to(y.device).float()))
    assert model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("as_installed")
def test_under_autocast_products_may_be_narrower() -> None:
    class Wide(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).float()

    model = nn.Sequential(Wide(6, 4))
    ll.attach(model, own(change=lambda self, x, y, layer, c: x @ torch.ones(6, 4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.float32
