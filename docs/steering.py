"""Turn the embedded model between two moods: `python docs/steering.py` writes results/steering.json.

The direction is measured on pairs of statements, and tried on other prompts with other continuations. For each
coefficient: the mean difference of log-probabilities (positive less negative continuation), and the loss on plain text.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from lora_lite.lab.models.load import EMBEDDED, load_model
from lora_lite.lab.provenance import device_name

COEFFICIENTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
CONFIG = ll.SSpaceConfig(r=None, layers=tuple(range(12, 18)))
SUBJECTS = [
    "The film was", "My week has been", "The meal tasted", "The hotel room was", "Our trip turned out", "The book was",
    "The concert felt", "The new teacher is", "This phone is", "The weather today is", "Her talk was", "The staff was",
]  # fmt: skip
POSITIVE = [f"{subject} wonderful, I loved it" for subject in SUBJECTS]
NEGATIVE = [f"{subject} terrible, I hated it" for subject in SUBJECTS]
HELD_OUT = [
    "I went to the new restaurant yesterday, and honestly it was", "After the first day of my job I feel",
    "The museum we visited on Sunday was", "When I opened the parcel, the gift looked",
    "Looking back at the school play, I think it was", "My neighbour's garden party was",
]  # fmt: skip
CONTINUATIONS = ((" great", " amazing", " fantastic"), (" awful", " horrible", " disappointing"))
NEUTRAL = (
    "Water boils at one hundred degrees Celsius at sea level. A triangle has three sides, and the sum of its angles is "
    "one hundred and eighty degrees. The train leaves the station at nine and arrives in the city an hour later."
)


@torch.no_grad()
def preference(model: Any, tokenizer: Any) -> float:
    """Mean log-probability of the positive continuations less that of the negative ones, over the held-out prompts."""
    total = 0.0
    for prompt in HELD_OUT:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        log_p = model(ids).logits[0, -1].float().log_softmax(0)
        firsts = [[tokenizer(word)["input_ids"][0] for word in words] for words in CONTINUATIONS]
        total += float(log_p[firsts[0]].mean() - log_p[firsts[1]].mean())
    return total / len(HELD_OUT)


@torch.no_grad()
def neutral_loss(model: Any, tokenizer: Any) -> float:
    """Nats per token of the plain text."""
    ids = tokenizer(NEUTRAL, return_tensors="pt")["input_ids"]
    return float(model(ids, labels=ids).loss)


def measure() -> dict[str, Any]:
    """For each gate: the direction, and what turning it does."""
    model, tokenizer = load_model(EMBEDDED, torch.float32, torch.device("cpu"))
    gates: dict[str, list[dict[str, float]]] = {}
    for gate in ("signed", "absolute"):
        cfg, contrast = CONFIG.replace(gate=gate), ll.Contrast(POSITIVE, NEGATIVE, tokenizer)
        att = ll.attach(model, cfg, calibration_data=contrast)
        gates[gate] = []
        for c in COEFFICIENTS:
            with ll.scale(model, c):
                found = {"c": c, "preference": preference(model, tokenizer), "loss": neutral_loss(model, tokenizer)}
            gates[gate].append(found)
        ll.detach(model)
    return {
        "gates": gates,
        "pairs": len(POSITIVE),
        "held_out": len(HELD_OUT),
        "config": CONFIG.to_dict(),
        "layers": len(att.targets),
        "megabytes": att.megabytes,
        "model": EMBEDDED,
        "command": f"python {' '.join(sys.argv)}",
        "device": device_name(torch.device("cpu")),
        "versions": {name: version(name) for name in ("lora-lite", "torch", "transformers")},
    }


if __name__ == "__main__":
    found = measure()
    where = Path(__file__).parent.parent / "results" / "steering.json"
    where.write_text(json.dumps(found, indent=1) + "\n")
    for gate, row in ((gate, row) for gate, rows in found["gates"].items() for row in rows):
        print(f"{gate:<9} c = {row['c']:+.0f}: preference {row['preference']:+.2f}, plain text {row['loss']:.3f} nats")
