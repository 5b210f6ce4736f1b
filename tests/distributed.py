"""A program that test_distributed.py runs as two processes over gloo: `torchrun ... distributed.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lora_lite as ll
from helpers import tiny_llama, token_ids

EVA = ll.EVAConfig(r=4)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = [{"input_ids": token_ids(seed=10 + rank)}]

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
    try:
        with wrapped.no_sync():
            ll.check(wrapped, mine)
    except ll.CheckError as error:
        (Path(sys.argv[1]) / f"refused-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
