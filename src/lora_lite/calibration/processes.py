"""Several processes that attach the same adapters: they meet before any of them waits for another's tensors."""

import hashlib
from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn

from lora_lite.config import AdapterConfig
from lora_lite.errors import StateError

PATIENCE = 300.0  # seconds; processes may load their models at different speeds
_meetings = 0


def meet(name: str, configs: Iterable[AdapterConfig]) -> None:
    """Wait until every process is about to attach the same.

    Raises:
        StateError: another process does not come within `PATIENCE` seconds, or attaches something else.
    """
    global _meetings
    if not _several():
        return
    store, rank, ranks = dist.distributed_c10d._get_default_store(), dist.get_rank(), range(dist.get_world_size())
    what = f"{name!r}: {', '.join(type(cfg).__name__ for cfg in configs)}"
    digest = hashlib.sha256(repr([name, *(cfg.to_dict() for cfg in configs)]).encode()).hexdigest()
    keys = [f"lora_lite/attach/{_meetings}/{each}" for each in ranks]
    store.set(keys[rank], f"{digest} {what}")
    try:
        store.wait(keys, timedelta(seconds=PATIENCE))
    except dist.DistStoreError as error:
        absent = [each for each in ranks if not store.check([keys[each]])]
        store.delete_key(keys[rank])
        raise StateError(
            f"attach was called by process {rank}, but not within {PATIENCE:g} s by {absent}: torch.distributed is "
            "initialised, so every process must attach (and load the same base); to work in one process alone, do it "
            "before init_process_group"
        ) from error
    _meetings += 1
    others = [store.get(key).decode() for key in keys]
    if different := [other.partition(" ")[2] for other in others if not other.startswith(digest)]:
        raise StateError(f"attach: process {rank} attaches {what}, another one {different[0]} or other settings")


def broadcast(adapters: Iterable[nn.Module]) -> None:
    """Give every process the tensors of rank 0, since factorisations may differ in sign or order between machines."""
    for tensor in (t for adapter in adapters for t in _stored(adapter)) if _several() else ():
        dist.broadcast(tensor.detach(), src=0)


def add_up(sums: Iterable[Tensor]) -> None:
    """Add each tensor up over all processes, in place."""
    for tensor in sums if _several() else ():
        dist.all_reduce(tensor)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _stored(adapter: nn.Module) -> Iterable[Tensor]:
    return [*adapter.parameters(), *adapter.buffers()]
