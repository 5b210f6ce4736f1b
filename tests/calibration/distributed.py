"""A program that test_distributed.py runs as two processes over gloo: `torchrun ... distributed.py FOLDER`."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lora_lite as ll
from helpers import tiny_llama, token_ids
from lora_lite.calibration import processes

EVA = ll.EVAConfig(r=4)


def refuse(file: str, doing: Callable[[], object]) -> None:
    """Write down the error with which the library refuses to do something."""
    try:
        doing()
    except ll.LoraLiteError as error:
        (Path(sys.argv[1]) / file).write_text(str(error))


def main() -> None:
    processes.PATIENCE = 2.0
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = [{"input_ids": token_ids(seed=10 + rank)}]

    # One process alone waits for the others no longer than it should, and all attach the same.
    model = tiny_llama()
    refuse(f"alone-{rank}.txt", lambda: ll.attach(model, ll.LoRAConfig(r=2)) if rank == 0 else None)
    dist.barrier()
    processes.PATIENCE = 60.0
    refuse(f"different-{rank}.txt", lambda: ll.attach(model, ll.LoRAConfig(r=2 + rank)))
    assert ll.attach(model, ll.LoRAConfig(r=2)).targets

    # Sums are added up over the processes, and every process gets the tensors of rank 0.
    model = tiny_llama()
    torch.manual_seed(rank)
    ll.attach(model, EVA, mine)
    ll.save(model, Path(sys.argv[1]) / f"eva-{rank}.safetensors")

    wrapped = DistributedDataParallel(model)
    ll.check(wrapped, mine)
    optimizer = torch.optim.AdamW(ll.param_groups(wrapped, lr=1e-2))
    for step in range(3):
        ids = token_ids(seed=20 + 2 * step + rank)
        with ll.scale(wrapped, 0.5):
            wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ll.save(wrapped, Path(sys.argv[1]) / f"trained-{rank}.safetensors")

    # Without the reduction every process has the gradients of its own data.
    with wrapped.no_sync():
        refuse(f"refused-{rank}.txt", lambda: ll.check(wrapped, mine))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
