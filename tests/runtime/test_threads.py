"""Each thread, task and copied context has the coefficient of its own blocks; all share what is set outside of one."""

import asyncio
import contextvars
import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from helpers import OneLayer, attached


class Deep(nn.Module):
    """Some layers on a residual stream, checkpointed if asked."""

    def __init__(self, kind: str | None = None, depth: int = 3) -> None:
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            step = checkpoint(layer, x, use_reentrant=self.kind == "reentrant") if self.kind else layer(x)
            x = x + step.tanh()
        return x


X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VALUES = [-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]


def adapted(kind: str | None = None) -> Deep:
    model = Deep(kind)
    attached(model, "lora", dtype=torch.float64)
    return model


@pytest.fixture(autouse=True)
def busy_switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def expected(model: nn.Module) -> dict[float, Tensor]:
    found = {}
    for c in VALUES:
        with ll.scale(model, c):
            found[c] = model(X).detach()
    return found


def run_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(work, index) for index in range(count)]:
            done.result()


def test_blocks_of_threads_do_not_meet() -> None:
    model = adapted()
    right = expected(model)
    wrong: list[float] = []

    def work(index: int) -> None:
        for step in range(30):
            c = VALUES[(index + step) % len(VALUES)]
            with ll.scale(model, c):
                wrong.extend([c] * (not torch.equal(model(X), right[c])))
            wrong.extend([1.0] * (not torch.equal(model(X), right[1.0])))

    run_threads(8, work)
    assert not wrong and torch.equal(model(X), right[1.0])


def test_two_adapters_set_together_are_seen_together() -> None:
    model = OneLayer(8, 8)
    for name in ("a", "b"):
        attached(model, "lora", name=name, dtype=torch.float64)
    right = []
    for c in (0.0, 1.0):
        ll.scale(model, c)
        right.append(model(X))
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            ll.scale(model, 0.0)
            ll.scale(model, 1.0)

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        for _ in range(100):
            y = model(X)
            assert any(torch.equal(y, each) for each in right)
    finally:
        stop.set()
        thread.join()


def gradients(model: nn.Module, c: float) -> list[Tensor]:
    with ll.scale(model, c):
        y = model(X.clone().requires_grad_())
    return list(torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kind", [None, "non-reentrant"])
def test_gradients_of_threads(kind: str | None) -> None:
    """120 forward and backward passes in two threads, each at coefficients of its own."""
    model = adapted(kind)
    right = {c: gradients(adapted(), c) for c in VALUES}
    wrong: list[float] = []

    def work(index: int) -> None:
        for step in range(60):
            c = VALUES[(index + step) % len(VALUES)]
            found = gradients(model, c)
            wrong.extend(c for a, b in zip(found, right[c], strict=True) if not torch.allclose(a, b, 1e-12, 1e-14))

    run_threads(2, work)
    assert not wrong


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_threads_train_models_with_checkpoints(kind: str) -> None:
    model = adapted(kind)
    with ll.scale(model, 1.0):
        pass

    def work(index: int) -> None:
        for _ in range(10):
            model(X.clone().requires_grad_()).square().sum().backward()

    run_threads(3, work)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for a, b in zip(found, gradients(adapted(), 1.0), strict=True):
        torch.testing.assert_close(a, 30 * b, rtol=1e-4, atol=1e-6)  # accumulated by threads without a lock


def test_set_outside_of_a_block_it_holds_in_all_threads() -> None:
    model = adapted()
    right = expected(model)
    ll.scale(model, 0.5)
    assert torch.equal(in_thread(lambda: model(X)), right[0.5])
    kept = ll.scale(model, 0.25)
    assert torch.equal(in_thread(lambda: model(X)), right[0.25])
    with kept:
        assert torch.equal(in_thread(lambda: model(X)), right[0.5]) and torch.equal(model(X), right[0.25])
    assert torch.equal(model(X), right[0.5])
    kept = ll.scale(model, 2.0)
    assert torch.equal(model(X), right[2.0]) and torch.equal(in_thread(lambda: model(X)), right[2.0])
    ll.scale(model, 1.0)
    del kept
    assert torch.equal(model(X), right[1.0])


def test_no_other_thread_sees_a_block_that_is_about_to_begin() -> None:
    """Between the making of a `scale` and the `with`, another thread waits rather than guess."""
    model = adapted()
    right = expected(model)
    made, seen = ll.scale(model, 0.5), list[Tensor]()
    thread = threading.Thread(target=lambda: seen.append(model(X)))
    thread.start()
    with made:
        thread.join()
    assert torch.equal(seen[0], right[1.0])


def test_a_call_keeps_the_coefficient_of_its_start() -> None:
    model = adapted()
    right = expected(model)
    handle = model.layers[1].register_forward_hook(lambda *args: ll.scale(model, 0.5) and None)
    assert torch.equal(model(X), right[1.0])
    handle.remove()
    assert torch.equal(model(X), right[0.5])


@pytest.mark.parametrize("kind", [None, "non-reentrant"])
def test_a_block_within_a_call(kind: str | None) -> None:
    """It acts on the layers within it. Whether a checkpoint lay within it, backward cannot know, and says so."""

    class Inner(Deep):
        def forward(self, x: Tensor) -> Tensor:
            with ll.scale(self, 0.5):
                return super().forward(x)

    model = Inner(kind)
    attached(model, "lora", dtype=torch.float64)
    right = expected(adapted())
    y = model(X.clone().requires_grad_())
    assert torch.equal(y, right[0.5])
    if kind is None:
        y.sum().backward()
    else:
        with pytest.raises(ll.StateError, match="enter it around the call of the model"):
            y.sum().backward()


def test_tasks_and_copied_contexts() -> None:
    model = adapted()
    right = expected(model)

    async def task(c: float) -> None:
        with ll.scale(model, c):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(model(X), right[c])
                assert torch.equal(await asyncio.to_thread(model, X), right[c])
        assert torch.equal(model(X), right[1.0])

    async def tasks() -> None:
        await asyncio.gather(*(task(c) for c in VALUES))

    asyncio.run(tasks())
    with ll.scale(model, 0.5):
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(model, X)), right[0.5])
        assert torch.equal(in_thread(lambda: model(X)), right[1.0])
    assert torch.equal(context.run(model, X), right[0.5]) and torch.equal(model(X), right[1.0])


@pytest.mark.parametrize("first_out", [0, 1])
def test_blocks_end_in_any_order(first_out: int) -> None:
    model = adapted()
    right = expected(model)
    blocks = [ll.scale(model, 0.5), ll.scale(model, 0.25)]
    for block in blocks:
        block.__enter__()
    assert torch.equal(model(X), right[0.25])
    blocks[first_out].__exit__(None, None, None)
    assert torch.equal(model(X), right[0.5 if first_out else 0.25])
    blocks[1 - first_out].__exit__(None, None, None)
    assert torch.equal(model(X), right[1.0])
    with pytest.raises(ll.StateError, match="left without having been entered"):
        blocks[0].__exit__(None, None, None)


def test_one_block_entered_twice() -> None:
    model = adapted()
    right = expected(model)
    half = ll.scale(model, 0.5)
    with half:
        with ll.disabled(model), half:
            assert torch.equal(model(X), right[0.5])
        assert torch.equal(model(X), right[0.5])
    assert torch.equal(model(X), right[1.0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_within_a_block_has_what_all_share(copied: Callable[[Any], Any]) -> None:
    model = adapted()
    right = expected(model)
    ll.scale(model, 0.25)
    with ll.scale(model, 0.5):
        other = copied(model)
        assert torch.equal(model(X), right[0.5]) and torch.equal(other(X), right[0.25])
        with ll.scale(other, 2.0):
            assert torch.equal(model(X), right[0.5]) and torch.equal(other(X), right[2.0])
    assert torch.equal(model(X), right[0.25]) and torch.equal(other(X), right[0.25])
    ll.scale(other, 1.0)
    assert torch.equal(model(X), right[0.25]) and torch.equal(other(X), right[1.0])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_generator_that_is_closed(elsewhere: bool) -> None:
    model = adapted()
    right = expected(model)

    def steps() -> Iterator[Tensor]:
        with ll.scale(model, 0.5):
            while True:
                yield model(X)

    generator = steps()
    assert torch.equal(next(generator), right[0.5])
    with ll.scale(model, 2.0):
        assert torch.equal(model(X), right[2.0])
        in_thread(generator.close) if elsewhere else generator.close()
        assert torch.equal(model(X), right[2.0])
    assert torch.equal(model(X), right[1.0])
    assert torch.equal(in_thread(lambda: next(steps())), right[0.5])
    gc.collect()
    assert torch.equal(model(X), right[1.0])


def test_an_interrupted_call_leaves_no_trace() -> None:
    """Torch calls no hook for Ctrl-C, so the call itself cannot say that it ended."""
    model = adapted()
    right = expected(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), ll.scale(model, 0.5):
        model(X)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    ll.scale(model, 0.25)
    assert torch.equal(model(X), right[0.25])
    y = model.layers[0](X)
    ll.scale(model, 0.5)
    assert not torch.equal(model.layers[0](X), y) and torch.equal(model(X), right[0.5])


def test_a_call_within_a_call_has_its_own() -> None:
    model = adapted()
    right = expected(model)
    seen: list[Tensor] = []

    def inner(*args: Any) -> None:
        if not seen:
            seen.append(X)
            with ll.scale(model, 0.5):
                seen.append(model(X))

    handle = model.layers[1].register_forward_hook(inner)
    assert torch.equal(model(X), right[1.0]) and torch.equal(seen[1], right[0.5])
    handle.remove()
