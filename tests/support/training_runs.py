"""Short training runs on a tiny model, for tests that start, stop and resume them."""

from pathlib import Path

import torch

import lora_lite as ll
from lab_helpers import make_llama
from lora_lite.lab.training.data import Encoded
from lora_lite.lab.training.loop import train
from lora_lite.lab.training.progress import TrainConfig

CONFIG = ll.LoRAConfig(r=2, dropout=0.1)  # dropout: the random state is part of what must resume


def make_items(n: int = 24) -> list[Encoded]:
    rng = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=rng))
        return tuple(torch.randint(1, 250, (length,), generator=rng).tolist())

    return [Encoded(ids(2, 9), ids(1, 5)) for _ in range(n)]


def run(
    folder: Path | None, steps: int = 12, resume: bool = False, **changes: object
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = make_llama()
    att = ll.attach(model, CONFIG)
    cfg = TrainConfig(**{"steps": steps, "batch_size": 4, "save_every": 3, "lr": 1e-2, **changes})  # type: ignore[arg-type]
    progress = train(model, make_items(), 0, cfg, folder, resume)
    tensors = {
        f"{path}.{k}": v
        for path, adapter in ll.attachment(model).targets.items()
        for k, v in adapter.state_dict().items()
    }
    assert att.num_trainable == ll.attachment(model).num_trainable
    return progress.losses, tensors
