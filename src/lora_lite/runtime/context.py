"""Who sees which coefficient: the value of a `with` block belongs to its context, a call keeps that of its start, and a
backward pass has that of its own forward.

- A context variable holds the stack of blocks and calls that are open in this thread or task, innermost last.
- Below it lie the values that all threads share, which a `scale` outside of `with` sets.
- The autograd engine may run backward on another thread, so there a call is found by the engine's task.
- Compiled code can read neither, but it can read a thread-local slot, which is kept in step with them.
"""

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lite.errors import StateError
from lora_lite.runtime.settings import TRAINED, Cell, Coefficient, Lasting, Setting, Settings

NO_TASK = -1
PATIENCE = 1.0  # seconds that another thread waits for a `scale` to be entered, before it takes it for a lasting one


@dataclass(eq=False)
class Block:
    """A `with` block that is open: what it sets, who opened it, and the engine's task in which it did."""

    store: "Coefficients"
    settings: Settings
    owner: object
    task: int
    ended: bool = False


@dataclass(eq=False)
class Call:
    """One call of the root.

    Attributes:
        settings: what was in force at its start.
        rows, lengths: the batch's rows and sequence lengths.
        expands: whether the model's `generate` makes it, which may expand rows (asked for once).
        mixed: whether a block began within it, so that its start does not say what each layer used.
        frame: `id` of the Python frame that runs it.
        ran: the adapters that ran in it, by `id`.
    """

    store: "Coefficients"
    settings: Settings
    rows: int | None
    lengths: frozenset[int]
    expands: Callable[[], bool]
    task: int
    frame: int
    mixed: bool = False
    ran: set[int] = field(default_factory=set)


Entry = Block | Call
_STACK: ContextVar[tuple[Entry, ...]] = ContextVar("lora_lite_stack", default=())
_TASK: ContextVar[int] = ContextVar("lora_lite_task", default=NO_TASK)


def graph_task() -> int:
    """The autograd engine's task on this thread, or `NO_TASK`. In one, a forward pass computes a checkpoint again."""
    return torch._C._current_graph_task_id()


class Coefficients:
    """The settings of one model's adapters. A copy of the model has those that all threads share, and no block's."""

    def __init__(self, settings: Settings | None = None, used: bool = False) -> None:
        self._shared: tuple[Settings, tuple[Lasting, ...]] = (settings or {}, ())  # replaced, never written to
        self._lock = threading.RLock()
        self.open_blocks = 0  # in all contexts
        self._recomputed: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
        self.used = used

    def __reduce__(self) -> tuple[Any, ...]:
        return Coefficients, (), {"settings": dict(self._settled()), "used": self.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shared, self.used = (state["settings"], ()), state["used"]

    # What is in force.

    def setting(self, coefficient: Coefficient) -> Setting:
        """The setting in force here. Raises `StateError` where a recomputation's forward pass is not known."""
        return self._open(coefficient, Block | Call) or self._below(coefficient, self._settled)

    def call(self) -> Call | None:
        """The call of the root that runs here, or whose forward pass is computed again."""
        task = graph_task()
        for entry in reversed(_STACK.get()):
            if isinstance(entry, Call) and entry.store is self and task in (NO_TASK, entry.task):
                return entry
        return self._forward_of(task) if task != NO_TASK else None

    def snapshot(self, coefficients: Iterable[Coefficient]) -> Settings:
        """The settings for a call that begins here, all of one moment."""
        shared = functools.cache(self._settled)
        return {
            coefficient: self._open(coefficient, Block) or self._below(coefficient, shared)
            for coefficient in coefficients
        }

    def _open(self, coefficient: Coefficient, kinds: Any) -> Setting | None:
        """What the innermost open block (or call) of this context says; in a backward pass, of those begun in it."""
        task = graph_task()
        for entry in reversed(_STACK.get()):
            if entry.store is not self or not isinstance(entry, kinds):
                continue
            if task not in (NO_TASK, entry.task):
                return None
            if coefficient in entry.settings and not (isinstance(entry, Block) and entry.ended):
                return entry.settings[coefficient]
        return None

    def _below(self, coefficient: Coefficient, shared: Callable[[], Settings]) -> Setting:
        task = graph_task()
        if task == NO_TASK:
            return shared().get(coefficient, TRAINED)
        call = self._forward_of(task)
        if call is not None and call.mixed:
            raise StateError(
                "a checkpointed layer is recomputed in backward, but `scale` was entered within the call that it "
                "belongs to, so the coefficient it used is unknown; enter it around the call of the model"
            )
        if call is not None and coefficient in call.settings:
            return call.settings[coefficient]
        if self.used:
            raise StateError(
                "a checkpointed layer is recomputed in backward, but its forward pass did not go through the module "
                "that was given to attach, so the coefficient it used is unknown; call that module"
            )
        return TRAINED

    def _forward_of(self, task: int) -> Call | None:
        # A reentrant checkpoint's own backward is a task within the task that reached the call's outputs.
        return self._recomputed.get(task) or self._recomputed.get(_TASK.get())

    # The values that all threads share.

    def set(self, owner: object, settings: Settings) -> None:
        """Set what all threads share, unless `owner` is entered: then its block takes it back."""
        self.used = True
        with self._lock:
            base, lasting = self._folded()
            added = Lasting(weakref.ref(owner, self._publish), settings, threading.get_ident())
            self._shared = (base, (*lasting, added))
        self.mirror(settings)

    def _folded(self) -> tuple[Settings, tuple[Lasting, ...]]:
        """With those that can no longer be entered made part of the base; they hide what was set before them."""
        base, kept = dict(self._shared[0]), list[Lasting]()
        for each in self._shared[1]:
            if each.owner() is None:
                base |= each.settings
                for other in kept:
                    other.settings = {k: v for k, v in other.settings.items() if k not in each.settings}
            else:
                kept.append(each)
        return base, tuple(kept)

    def _settled(self) -> Settings:
        """The shared settings, once it is known which of them are a block's that is about to begin."""
        base, lasting = self._shared
        for each in lasting:
            deadline = time.monotonic() + PATIENCE
            while not self._known(each):
                time.sleep(1e-4)
                each.settled |= time.monotonic() > deadline
            if each.settled and not each.withdrawn:
                base = {**base, **each.settings}
        if lasting:
            self._publish()
        return base

    def _known(self, each: Lasting) -> bool:
        # Between `scale(...)` and the `with` that enters it, its thread cannot use the model.
        each.settled |= each.owner() is None or each.thread == threading.get_ident()
        return each.settled or each.withdrawn

    def _publish(self, dead: object = None) -> None:
        """Let compiled code of all threads read what is settled."""
        base, lasting = self._shared
        for each in lasting:
            if (each.settled or each.owner() is None) and not each.withdrawn:
                base = {**base, **each.settings}
        for coefficient, setting in base.items():
            coefficient.shared.value, coefficient.shared.base = setting.c, setting.base
        self.mirror(base)

    # Blocks and calls, which begin and end in this context.

    def enter(self, owner: object, settings: Settings) -> Block:
        """Begin a block, and take back what its owner had set for all threads."""
        with self._lock:
            base, lasting = self._shared
            for each in lasting:
                each.withdrawn |= each.owner() is owner
            self._shared = (base, tuple(each for each in lasting if not each.withdrawn))
            self.open_blocks += 1
        self._publish()
        task = graph_task()
        for entry in _STACK.get():
            if isinstance(entry, Call) and entry.store is self and entry.task == task:
                entry.mixed = True
        block = Block(self, settings, owner, task)
        _STACK.set((*_running(), block))
        self.mirror(settings)
        return block

    def innermost(self, owner: object) -> Block | None:
        """The innermost block of `owner` in this context."""
        blocks = (entry for entry in reversed(_STACK.get()) if isinstance(entry, Block) and entry.owner is owner)
        return next(blocks, None)

    def leave(self, block: Block) -> None:
        """End a block, wherever it lies in the stack; where another context holds it, there too."""
        with self._lock:
            self.open_blocks -= 1
        stack = _running()
        block.ended = block not in stack
        _STACK.set(tuple(entry for entry in stack if entry is not block))
        self.mirror(block.settings)

    def begin(self, settings: Settings, rows: int | None, lengths: frozenset[int], expands: Callable[[], bool]) -> None:
        """Begin a call of the root."""
        if graph_task() == NO_TASK:
            _TASK.set(NO_TASK)  # a backward pass that failed did not
        call = Call(self, settings, rows, lengths, expands, graph_task(), _frame_of_the_call())
        _STACK.set((*_running(call.frame), call))
        self.mirror(settings)

    def end(self) -> Call | None:
        """End the innermost call of the root."""
        stack = _STACK.get()
        call = next((entry for entry in reversed(stack) if isinstance(entry, Call) and entry.store is self), None)
        if call is not None:
            _STACK.set(tuple(entry for entry in stack if entry is not call))
            self.mirror(call.settings)
        return call

    def begin_backward(self, call: Call, grad: Tensor) -> None:
        """From here on this backward pass computes again what `call` computed."""
        task = graph_task()
        if task not in self._recomputed:
            leave = functools.partial(self._end_backward, task, _TASK.get(), tuple(call.settings))
            torch.autograd.Variable._execution_engine.queue_callback(leave)
        self._recomputed[task] = call
        _TASK.set(task)
        for coefficient, setting in call.settings.items():
            coefficient.local.cell = Cell(setting.c, setting.base)

    def _end_backward(self, task: int, former: int, coefficients: tuple[Coefficient, ...]) -> None:
        self._recomputed.pop(task, None)
        _TASK.set(former)
        self.mirror(coefficients)

    def mirror(self, coefficients: Iterable[Coefficient]) -> None:
        """Let compiled code of this thread read what is in force here."""
        _, lasting = self._shared
        here = threading.get_ident()
        fresh = [each.settings for each in lasting if each.thread == here and not each.settled and each.owner()]
        own = {coefficient: setting for settings in fresh for coefficient, setting in settings.items()}
        for coefficient in coefficients:
            setting = self._open(coefficient, Block | Call) or own.get(coefficient)
            coefficient.local.cell = coefficient.shared if setting is None else Cell(setting.c, setting.base)


def _frame_of_the_call() -> int:
    """`id` of the frame of torch's that called the root's hook."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") != "torch.nn.modules.module":
        frame = frame.f_back
    return id(frame)


def _running(but: int | None = None) -> tuple[Entry, ...]:
    """This context's stack without calls that were interrupted (for Ctrl-C torch calls no hook), or had the frame
    `but`."""
    stack = tuple(entry for entry in _STACK.get() if not (isinstance(entry, Block) and entry.ended))
    if not any(isinstance(entry, Call) for entry in stack):
        return stack
    frames, frame = set[int](), sys._getframe(1)
    while frame is not None:
        frames.add(id(frame))
        frame = frame.f_back
    return tuple(entry for entry in stack if isinstance(entry, Block) or entry.frame in frames - {but})
