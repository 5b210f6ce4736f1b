"""Setting the coefficient: `scale` and `disabled`, and one value for each row of a batch."""

import math
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_lite.errors import CoefficientError, StateError
from lora_lite.runtime.context import Block, Call
from lora_lite.runtime.settings import Setting
from lora_lite.runtime.state import refuse_merged, root_of
from lora_lite.runtime.train_also import substitute_originals

CoefficientLike = float | Tensor | Mapping[str, float | Tensor]


class scale:
    """Set the coefficient: 0 is the base, 1 the trained adapter, -1 its opposite. Absolute, never cumulative.

    Called by itself it takes effect at once, in all threads, until the next one. As a context manager
    (`with ll.scale(model, -1): ...`) it belongs to the thread or task that enters it, as any `contextvars.ContextVar`
    does: others never see it, threads started within do not inherit it (`contextvars.copy_context().run` does), and at
    the end what was in force before is in force again. Blocks nest, end in any order, and can be entered again. A
    generator that stops within a block leaves its consumer in it until it goes on or is closed.

    A call of the model keeps the coefficients of its start; layers called by themselves have those of the moment.
    Backward may run after the end, on any thread: a checkpoint's recomputation uses its forward's coefficient.
    A `deepcopy` or pickle made in a block has what all threads share, not the block's.

    One that is kept in a variable acts as if called by itself until it is entered. (Since it looks like one that is
    about to be, another thread that uses the model first waits for up to a second.) A compiled model reads the
    block that its thread entered last, so tasks of one thread must not take turns within their blocks; and other
    threads see one that is kept in a variable only after its own thread has used the model uncompiled.

    Args:
        model: the module that adapters were attached to, or a wrapper of it.
        c: a float or 0-dim tensor for all adapters; a tensor (B,), one value per batch row; or a mapping from adapter
            name to either. Rows that the model's `generate` expands (beams, several sequences) follow in order.

    Raises:
        StateError: nothing attached, or merged; at the end, where it was not entered.
        CoefficientError: an unknown adapter name, a value that is not finite or not 0- or 1-dimensional.
    """

    _base = False

    def __init__(self, model: nn.Module, c: CoefficientLike) -> None:
        _, state = root_of(model)
        refuse_merged(state, "scale")
        values = c if isinstance(c, Mapping) else dict.fromkeys(state.adapters, c)
        if unknown := [name for name in values if name not in state.adapters]:
            raise CoefficientError(f"scale: no adapter named {unknown}; attached: {', '.join(state.adapters)}")
        self._settings = {
            state.adapters[name].coefficient: Setting(_as_tensor(name, value), self._base)
            for name, value in values.items()
        }
        self._blocks: list[Block] = []
        self._coefficients = state.coefficients
        self._coefficients.set(self, self._settings)

    def __enter__(self) -> None:
        self._blocks.append(self._coefficients.enter(self, self._settings))

    def __exit__(self, *error: object) -> None:
        block = self._coefficients.innermost(self) or next(reversed(self._blocks), None)
        if block is None:
            raise StateError("scale: left without having been entered")
        self._blocks.remove(block)
        self._coefficients.leave(block)


class disabled(scale):
    """The base model, for as long as the context lasts: c = 0, and `train_also` weights and the running averages of
    norms as they were at attach.

    (`scale(model, 0)` leaves those as trained.) In every other way it is like `scale`; nothing is written to a weight,
    so that another thread may train meanwhile, and so may a graph made before it run backward within.
    """

    _base = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, 0.0)
        root, state = root_of(model)
        substitute_originals(root, state)


def _as_tensor(name: str, c: float | Tensor) -> Tensor:
    if not isinstance(c, Tensor):
        if isinstance(c, bool) or not isinstance(c, int | float) or not math.isfinite(c):
            raise CoefficientError(f"scale: the coefficient of {name!r} is {c!r}; give a finite number or tensor")
        with torch.inference_mode(False):  # backward may need it later
            return torch.tensor(float(c), dtype=torch.float64, device="cpu")
    real = c.is_floating_point() or c.dtype in (torch.int32, torch.int64)
    if c.ndim > 1 or c.numel() == 0 or not real:
        raise CoefficientError(
            f"scale: the coefficient of {name!r} is a {c.dtype} tensor of shape {tuple(c.shape)}; give a 0-dim tensor, "
            "or one of shape (B,) with a value per batch row"
        )
    if not torch.isfinite(c).all():
        raise CoefficientError(f"scale: the coefficient of {name!r} is not finite: {c}")
    wide = torch.float32 if c.device.type == "mps" else torch.float64
    # A copy: what the caller writes to its tensor later turns nothing.
    with torch.inference_mode(False):
        return c.to("cpu" if c.ndim == 0 else c.device, wide, copy=True)


def spread_rows(c: Tensor, x: Tensor, call: Call | None) -> Tensor:
    """c in a shape that broadcasts over x: 0-dim, or (n, 1, ..., 1) for the n rows of x.

    x (n, ..., features) has the call's rows, or is the (B T, features) of a model that flattens its B x T batch. The
    call's rows are as many as c's, or a multiple k where the model's `generate` expanded each row k times in order.
    One value stands for all rows.

    Raises:
        CoefficientError: x's rows cannot be matched to c's.
    """
    if c.numel() == 1:
        return c.reshape(())
    n, rows = x.shape[0], c.shape[0]
    known = call is not None and call.rows is not None
    batch = call.rows if call is not None and call.rows is not None else rows
    if batch != rows and not (batch % rows == 0 and call is not None and call.expands()):
        raise CoefficientError(
            f"scale: {rows} coefficients, one per batch row, but the model was called with {batch} rows; give as many "
            "(only rows that the model's own generate expands are matched by themselves)"
        )
    flattened = {batch * length for length in call.lengths} if known and call is not None and x.ndim == 2 else set()
    if x.ndim < 2 or n not in {batch, *flattened}:
        raise CoefficientError(
            f"scale: {rows} coefficients, one per batch row, but a layer got an input of shape {tuple(x.shape)}, whose "
            "rows cannot be matched to them; use one coefficient for the whole batch here"
        )
    return c.to(x.device).repeat_interleave(n // rows).reshape(n, *[1] * (x.ndim - 1))


def in_generate(root: nn.Module) -> bool:
    """Whether `generate` of the model, or of a module around it, is on the stack of this call."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "generate" else None
        if isinstance(owner, nn.Module) and any(module is root for module in owner.modules()):
            return True
        frame = frame.f_back
    return False
