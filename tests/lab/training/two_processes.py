"""A program that test_train.py runs as two processes over gloo: `torchrun ... two_processes.py FOLDER`."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_lite as ll
from lab_helpers import make_llama
from lora_lite.lab.training.data import Encoded
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.progress import TrainConfig

# Batches whose tokens fall unevenly to two processes, in unequal numbers of parts; one that is smaller than they are.
CASES = {"whole": (6, 6, 1), "parts": (6, 6, 3), "odd": (5, 5, 5), "one": (1, 1, 1), "rest": (3, 2, 1)}


def trained(case: str) -> dict[str, Tensor]:
    """The adapter after a few steps, and the losses of these."""
    n, batch_size, accumulation = CASES[case]
    rng = torch.Generator().manual_seed(0)
    answers = (1, 30, 2, 25, 1, 40)[:n]
    items = [Encoded((1, 2, 3), tuple(torch.randint(1, 250, (length,), generator=rng).tolist())) for length in answers]
    model = make_llama()
    att = ll.attach(model, ll.LoRAConfig(r=2))
    cfg = TrainConfig(steps=2, batch_size=batch_size, accumulation=accumulation, lr=1e-3, clip=1e9, save_every=0)
    losses = train(model, items, 0, cfg).losses
    tensors = {f"{path}.{key}": value for path, a in att.targets.items() for key, value in a.state_dict().items()}
    return {**tensors, "losses": torch.tensor(losses)}


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES:
        save_file(trained(case), Path(sys.argv[1]) / f"{case}-{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()
