"""Draw the pictures of docs/s-space.md: `python docs/pictures.py`, after `make demo VARIANT=antipasto`.

What the pictures of real layers show is kept in results/pictures.json as well.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open
from torch import Tensor

from lora_lite.calibration.collector import calibrate
from lora_lite.lab.models.load import load_model
from lora_lite.lab.provenance import device_name
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.training.data import collate, encode
from lora_lite.lab.training.presets import PRESETS
from lora_lite.layers.linear import dense
from lora_lite.linalg import singular_directions

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "pictures"
DEMO = ROOT / "runs" / "demo-antipasto" / "adapter.safetensors"
LAYER = "model.layers.15.mlp.down_proj"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
R, SHOWN = 12, 4


def shapes() -> dict[str, Tensor]:
    """Which entries of a 12 x 12 core D (the change is U D U^T W) each method trains."""
    diagonal, block = torch.eye(R), torch.zeros(R, R)
    block[:SHOWN, :SHOWN] = 1
    rotation = torch.block_diag(*[torch.ones(SHOWN, SHOWN)] * (R // SHOWN))
    low = torch.full((R, R), 0.45)
    arrow = (diagonal + block).clamp(max=1)
    return {
        "antipasto\ndiagonal": diagonal,
        "arrow\nblock, then diagonal": arrow,
        "dplr\ndiagonal + low rank": torch.maximum(diagonal, low),
        "rot\nblocks": rotation,
        "ablate\n-alpha q q^T": low,
        "lora_xs\nfull": torch.ones(R, R),
    }


def cores() -> None:
    """The shapes of the cores, side by side."""
    figure, axes = plt.subplots(1, 6, figsize=(10, 2.2))
    for axis, (name, D) in zip(axes, shapes().items(), strict=True):
        axis.imshow(D, cmap="Blues", vmin=0, vmax=1.2)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("writes", fontsize=9)
    axes[0].set_xlabel("reads", fontsize=9)
    save(figure, "cores")


def spectra() -> dict[str, Any]:
    """Singular values of a layer, and how much of its output lies along each direction on the demo's task."""
    model, tokenizer = load_model()
    task = load_task(PRESETS["demo"].run.task)
    items, _ = encode(task.examples("train", 64, 0), tokenizer, 512)
    batch = collate(items, int(tokenizer.pad_token_id))  # type: ignore[arg-type]
    layer = model.get_submodule(LAYER)
    data = [{key: batch[key] for key in ("input_ids", "attention_mask")}]
    stats, _ = calibrate(model, {LAYER: layer}, {LAYER: frozenset({"response"})}, data)
    W = dense(layer).double()
    U, S, _ = singular_directions(W, min(W.shape))
    weight = S.square() / S.square().sum()
    G = stats[LAYER].mean("response")
    energy = (U * (G @ U)).sum(0) / G.trace()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    left.semilogy(weight, color=BLUE, label="weight: $S_j^2$")
    left.semilogy(energy, ".", markersize=2.5, color=ORANGE, label="data: $E\\,h_j^2$")
    left.set(xlabel="direction $j$ of the SVD", ylabel="share of the total")
    best = torch.linalg.eigvalsh(G).flip(0)
    curves = {"largest $S_j$ (svd)": energy.cumsum(0), "most used (wanda)": energy.sort(descending=True)[0].cumsum(0)}
    curves["of W C$^{1/2}$ (corda)"] = (best / best.sum()).cumsum(0)
    for (name, curve), color in zip(curves.items(), (BLUE, GREY, ORANGE), strict=True):
        right.plot(curve, color=color, label=name)
    right.set(xlabel="directions kept", ylabel="share of the output's energy", ylim=(0, 1.02))
    for axis in (left, right):
        axis.legend(frameon=False)
    figure.suptitle(LAYER, fontsize=10)
    save(figure, "spectra")
    at = min(64, len(S) - 1)
    return {
        "layer": LAYER,
        "kept": at,
        **{kind: float(curve[at - 1]) for kind, curve in zip(("svd", "wanda", "corda"), curves.values(), strict=True)},
    }


def gains() -> dict[str, Any]:
    """What the demo learnt: S (1 + elu g) / S of each direction, for a few layers."""
    if not DEMO.exists():
        raise SystemExit(f"{DEMO} is not there: run `make demo VARIANT=antipasto` first")
    with safe_open(DEMO, "pt") as handle:
        learnt = {key: handle.get_tensor(key) for key in list(handle.keys()) if key.endswith(".lora.g")}
    chosen = [f"model.layers.{k}.{name}.lora.g" for k, name in ((5, "self_attn.v_proj"), (15, "mlp.down_proj"))]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    for axis, key in zip(axes, chosen, strict=True):
        axis.axhline(1, color=GREY, linewidth=0.8)
        axis.plot(1 + torch.nn.functional.elu(learnt[key]), ".", markersize=3, color=BLUE)
        axis.set_title(key.removesuffix(".lora.g"), fontsize=10)
        axis.set_xlabel("direction $j$, by falling $S_j$")
    axes[0].set_ylabel("gain 1 + elu(g)")
    save(figure, "gains")
    every = 1 + torch.nn.functional.elu(torch.cat(list(learnt.values())))
    share = float(((every - 1).abs() > 0.05).float().mean())
    return {"gains": len(every), "smallest": float(every.min()), "largest": float(every.max()), "moved": share}


def save(figure: Any, name: str) -> None:
    """Write a picture."""
    FOLDER.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=110)


def main() -> None:
    """Draw all."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    cores()
    found = {
        "spectra": spectra(),
        "gains": gains(),
        "command": "python docs/pictures.py",
        "device": device_name(torch.device("cpu")),
        "versions": {name: version(name) for name in ("lora-lite", "torch", "matplotlib")},
    }
    (ROOT / "results" / "pictures.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
