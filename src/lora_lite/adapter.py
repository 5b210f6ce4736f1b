"""What an adapter is: a small module under its target layer.

A method is a subclass of `Adapter`, registered with its config and facts; an adapter is an instance of it on one layer.
Its tensors are of four kinds:

- *trained*, by `self.parameter`: what an optimiser moves, and the file holds.
- *frozen*, by `self.frozen`: filled by `init` and never moved, such as a basis, a norm of W or where a trained tensor
  started. The file holds them, so that loading needs no calibration, no factorisation and no luck.
- *derived*, by `self.derived`: no file holds them. `derive` makes them from the other tensors and the layer, by at most
  one matmul: at attach and load, and whenever those or the layer's weight have been replaced.
- *rebuildable*: those of the frozen ones, named in `rebuildable`, that are singular directions of W. A file saved with
  `basis=False` leaves them out; `load` factorises W again, and verifies what it gets.

Trained and frozen tensors have the config's dtype, whatever the model is cast to.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lora_lite.config import AdapterConfig
from lora_lite.errors import MethodError
from lora_lite.facts import Facts
from lora_lite.numerics import add_lowrank, cast, full_precision

# Shapes, checked by the tests: a layer's input and output, and the factors (h, B) of a low-rank change h B^T.
Input = Float[Tensor, "*b i"]
Output = Float[Tensor, "*b o"]
LowRank = tuple[Float[Tensor, "*b r"], Float[Tensor, "o r"]]


def kaiming_uniform_(tensor: Tensor, rng: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), `nn.Linear`'s own initialisation (kaiming with a = sqrt 5)."""
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=rng)


class Held:
    """A layer on its way through an adapter's call: accelerate's hooks move all arguments that have a `to`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


def _device_only(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class Adapter(nn.Module):
    """Base class of the methods. It stands under its layer as `layer.lora[name]` and never stores the layer.

    A method defines `__init__(cfg, i, o)` (shapes only, so that it works on the meta device), `init` (values) and at
    least one of `before` (of the input) and `change` (of the output). Everything else follows from `register`.

    The layer's hooks call `act_before` and `act_after`.
    """

    # Set by `register`.
    Config: ClassVar[type[AdapterConfig]]
    facts: ClassVar[Facts]

    rebuildable: ClassVar[tuple[str, ...]] = ()
    """Names of the rebuildable tensors."""

    path: str = ""
    """The path of its layer when it was attached, for messages."""

    inexact: ClassVar[tuple[str, ...]] = ()
    """Trained tensors whose gradient leaves out a term on purpose, so that `check` does not measure it."""

    merged: bool = False
    """Whether it is folded into the layer's weights, and so does not act."""

    stale: bool = False
    """Whether stored tensors were replaced (`load_state_dict`) since the derived ones were made."""

    reads_weight: ClassVar[bool] = True
    """Whether it computes with W itself; then `attach` asks whether the layer computes W x + b."""

    def __init__(self, cfg: AdapterConfig) -> None:
        super().__init__()
        self.cfg: Any = cfg
        self.coefficient: Any = None

    @classmethod
    def tiny(cls) -> AdapterConfig:
        """A small config, for tests."""
        return cls.Config() if "r" in cls.Config.unused else cls.Config(r=2)

    @classmethod
    def acts(cls) -> str:
        """Where the method acts: "before" W (on the input) or "after" W (on the output)."""
        return "after" if cls.before is Adapter.before else "before"

    @classmethod
    def needs(cls, cfg: Any) -> frozenset[str]:
        """Names of the statistics of `stats.py` that `init` reads. Empty: no calibration."""
        return frozenset()

    @classmethod
    def identity_bound(cls, cfg: Any, dtype: torch.dtype = torch.float32) -> float:
        """Largest ||y' - y|| / ||W x|| of a token (2-norms) right after attach, in a base of `dtype`. 0: exact."""
        return 0.0

    @classmethod
    def plan(cls, cfg: Any, shapes: Mapping[str, tuple[int, int]], stats: Mapping[str, Any]) -> dict[str, Any]:
        """The config of each target, by path. A path left out gets no adapter."""
        return dict.fromkeys(shapes, cfg)

    def parameter(self, *shape: int, fill: float = 0.0) -> nn.Parameter:
        """A trained tensor."""
        return nn.Parameter(torch.full(shape, fill, dtype=self.cfg.dtype))

    def frozen(self, name: str, *shape: int) -> None:
        """Register a frozen tensor, of zeros until `init` fills it."""
        self.register_buffer(name, torch.zeros(shape, dtype=self.cfg.dtype))

    def derived(self, name: str, value: Tensor | None = None) -> None:
        """Register a derived tensor, or (in `derive`) set it."""
        self.register_buffer(name, value, persistent=False)

    def init(self, layer: nn.Module, stats: Any, rng: torch.Generator) -> None:
        """Fill the tensors, on the CPU; called by `attach` only, after calibration. Zeros need nothing."""

    def derive(self, layer: nn.Module) -> None:
        """Make the derived tensors from the stored ones and the layer, by at most one matmul."""

    def before(self, x: Input, layer: nn.Module, c: Tensor) -> Input:
        """What the layer reads instead of its input x, at coefficient c. A method that does not say so leaves x."""
        return x

    def change(self, x: Input, y: Output, layer: nn.Module, c: Tensor) -> Output | LowRank | None:
        """The change of the layer's output y, for its input x, at coefficient c.

        The change itself, or the factors (h, B) of a low-rank one, which are added as h B^T in one pass; None: nothing.
        c is 0-dim, or has one value a row in a shape that broadcasts over x.
        """
        return None

    def act_before(self, x: Input, layer: nn.Module, c: Tensor) -> Input:
        """What the layer is to read instead of x, verified and in x's dtype."""
        return self(self._before, x, Held(layer), c)

    def act_after(self, out: Output, x: Input, y: Output, layer: nn.Module, c: Tensor) -> Output:
        """`out` plus the change of the layer's own output y, verified and in the dtype of `out`."""
        return self(self._after, out, Held(layer), x, y, c)

    def forward(self, act: Callable[..., Tensor], given: Tensor, held: Held, *others: Tensor) -> Tensor:
        """`act(given, layer, *others)`, which is `given` where nothing changes.

        Both ways to act go through this call of the module, so that its own hooks (of offloading, of sharding) fire;
        all use of its tensors lies within it.
        """
        if self.stale and not torch.compiler.is_compiling() and not held.layer.weight.is_meta:
            derive(self, held.layer)
        return act(given, held.layer, *others)

    def _before(self, x: Tensor, layer: nn.Module, c: Tensor) -> Tensor:
        return cast(self._verified("before", self.before(x, layer, c), x), x)

    def _after(self, out: Tensor, layer: nn.Module, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        change = self.change(x, y, layer, c)
        if change is None:
            return out
        if isinstance(change, tuple):
            return add_lowrank(out, *self._verified_factors(change, y))
        return out + cast(self._verified("change", change, y), out)

    def _verified(self, what: str, given: Any, like: Tensor) -> Tensor:
        """What the method `what` returned, which has to have the shape of `like`, and a dtype no narrower than it.

        Else it would broadcast, and the layer's output have another shape, or lose what its dtype holds. Under autocast
        products are narrower than the layer's input or output may be.
        """
        if not isinstance(given, Tensor) or given.shape != like.shape or not given.dtype.is_floating_point:
            raise self._misfit(what, f"{tuple(like.shape)} in {like.dtype}", _described(given))
        narrow = torch.promote_types(given.dtype, like.dtype) != given.dtype
        if narrow and not torch.is_autocast_enabled(like.device.type):
            raise self._misfit(what, f"{tuple(like.shape)} in {like.dtype} (or wider)", _described(given))
        return given

    def _verified_factors(self, given: tuple[Any, ...], y: Tensor) -> LowRank:
        fits = len(given) == 2 and all(isinstance(t, Tensor) and t.dtype.is_floating_point for t in given)
        h, B = given if fits else (y, y)
        fits = fits and B.ndim == 2 and B.shape[0] == y.shape[-1] and h.shape == (*y.shape[:-1], B.shape[1])
        if not fits:
            expected = f"the factors h {(*y.shape[:-1], 'r')} and B {(y.shape[-1], 'r')}"
            raise self._misfit("change", expected, " and ".join(map(_described, given)))
        return h, B

    def _misfit(self, what: str, expected: str, given: str) -> MethodError:
        return MethodError(
            f"{self.path}: {what} of the method {self.facts.name!r} ({type(self).__name__}) must return {expected}, "
            f"but returned {given}; fix {type(self).__name__}.{what}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.stale = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Follow the model's device, not its dtype: 16-bit steps near 1 are too wide for an adapter to learn."""
        return super()._apply(functools.partial(_device_only, fn), recurse)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={tuple(value.shape)}" for key, value in self.state_dict().items())


@torch.no_grad()
def derive(adapter: Adapter, layer: nn.Module) -> None:
    """Rebuild an adapter's derived tensors, whatever autocast is in force."""
    with full_precision(layer.weight.device):  # type: ignore[union-attr, arg-type]
        adapter.derive(layer)
    adapter.stale = False


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def adapters_on(layer: nn.Module) -> list[Adapter]:
    """The adapters of a layer, in the order in which they were attached."""
    store = layer._modules.get("lora")
    return [adapter for adapter in store.children() if isinstance(adapter, Adapter)] if store is not None else []


def acting_on(layer: nn.Module) -> list[Adapter]:
    """Those of a layer's adapters that are not merged."""
    return [adapter for adapter in adapters_on(layer) if not adapter.merged]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout; x itself when p = 0 or out of training."""
    return F.dropout(x, p) if p and training else x
