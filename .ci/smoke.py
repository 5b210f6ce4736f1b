"""Use the installed wheel where only the core's dependencies are: attach, train a step, save, load, merge.

Run by `make smoke`, with the scratch folder (the environment itself) as its argument.
"""

import importlib.util
import sys
from importlib import resources
from pathlib import Path

import torch

import lora_lite as ll

folder = Path(sys.argv[1]).resolve()
assert folder in Path(ll.__file__).resolve().parents, f"not the wheel: {ll.__file__}"
assert resources.files("lora_lite").joinpath("py.typed").is_file(), "py.typed is missing from the wheel"
for name in ("accelerate", "datasets", "peft", "transformers", "tyro"):
    assert importlib.util.find_spec(name) is None, f"{name} came with the core"


def base() -> torch.nn.Module:
    """Give the same small model each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))


config = ll.LoRAConfig(r=2, target_roles=())
model, x = base(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
before = model(x)
ll.attach(model, config)
assert torch.equal(model(x), before)
optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
for _ in range(2):
    model(x).square().mean().backward()
    optimizer.step()
trained = model(x)
assert not torch.equal(trained, before)

ll.save(model, folder / "adapter.safetensors")
fresh = base()
ll.load(fresh, folder / "adapter.safetensors")
assert torch.equal(fresh(x), trained)
ll.merge(fresh)
torch.testing.assert_close(fresh(x), trained)
print(f"core alone works: lora-lite {ll.__version__}, torch {torch.__version__}, {len(ll.methods())} methods")
