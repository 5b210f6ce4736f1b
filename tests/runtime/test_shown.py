"""What an attachment shows of itself: in a terminal, and in a notebook."""

import re

import pytest
import torch
from torch import nn

import lora_lite as ll


def test_an_attachment_shows_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    att = ll.attach(model, ll.LoRAConfig(r=2, target_roles=()), train_also=("2.bias",))
    assert repr(att) == str(att) == att.summary()
    page = att._repr_html_()
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[:4] == ["lora", "2", "*", "A (2, 8), B (8, 2)"] and cells[-4:] == ["train_also", "1", "2.bias", "(8,)"]
    assert page.count("<tr>") == 3 and f"{att.num_trainable:,} trained" in page


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_alpha", "did you mean alpha"), ("target_modules", "did you mean target_names"),
        ("lora_dropout", "did you mean dropout"),
        ("use_rslora", "did you mean rslora"), ("alhpa", "did you mean alpha"),
        ("use_dora", "DoRAConfig"), ("modules_to_save", "train_also"), ("init_lora_weights", "PiSSAConfig"),
        ("what", "the fields are r, alpha"),
    ],
)  # fmt: skip
def test_names_of_elsewhere_are_answered_with_ours(name: str, words: str) -> None:
    with pytest.raises(TypeError, match=rf"LoRAConfig has no field '{name}'; .*{words}"):
        ll.LoRAConfig(**{name: 1})
    assert ll.LoRAConfig(4, 8.0) == ll.LoRAConfig(r=4, alpha=8.0, dtype=torch.float32)
