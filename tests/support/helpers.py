"""Small models and the handful of operations that most tests share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.adapter import Adapter
from lora_lite.layers.packing import is_packed, unpacked

METHODS = list(ll.methods())


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A two-layer Llama with grouped-query attention (so that some layers are not square), in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    return model.to(dtype).eval()


def token_ids(rows: int = 3, length: int = 7, vocab: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


class OneLayer(nn.Module):
    """A model of one linear layer, called `layer`."""

    def __init__(self, i: int, o: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(i, o, bias=bias, dtype=torch.float64).to(dtype)
            if bias:
                nn.init.normal_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def tiny(method: str, **changes: Any) -> Any:
    """The method's own small config, for any layer (names and roles not asked for)."""
    return ll.methods()[method].tiny().replace(**{"target_names": (), "target_roles": (), **changes})


def calibration(cfg: Any, batches: Iterable[Any]) -> Iterable[Any] | None:
    """The batches, if the config's method needs any; as one side of a contrast, if it needs that."""
    cls = next(cls for cls in ll.methods().values() if cls.Config is type(cfg))
    needs = cls.needs(cfg)
    if any(name.startswith("contrast") for name in needs):
        return ll.Contrast(list(batches), [other(batch) for batch in batches])
    return batches if needs else None


def other(batch: Any) -> Any:
    """A batch of the same shape with other contents."""
    if isinstance(batch, Tensor):
        return batch.roll(1, -1) * (1 if batch.is_floating_point() else 0) + (0 if batch.is_floating_point() else 5)
    return {key: other(value) if key == "input_ids" else value for key, value in batch.items()}


def perturb(adapters: Iterable[Adapter], size: float = 0.05, seed: int = 2) -> None:
    """Move every trained tensor away from where it starts, as training would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for p in adapter.parameters():
                p.add_(size * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, by name; a quantised tensor by the plain ones that it is made of.

    A 4-bit weight as it is before bitsandbytes packs it, which happens on some processors and is no change of it.
    """
    found: dict[str, Tensor] = {}
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if hasattr(value, "__tensor_flatten__"):
            found |= {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            found[key] = value
    for path, layer in model.named_modules():
        if is_packed(layer):
            found[f"{path}.weight"], state = unpacked(layer)
            found[f"{path}.weight.absmax"] = state.absmax
        elif (state := getattr(layer, "quant_state", None)) is not None:
            found[f"{path}.weight.absmax"] = state.absmax
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {key: value.detach().clone() for key, value in tensors_of(model).items()}


def same_bits(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether what `bits` saw is all there, unchanged."""
    now = tensors_of(model)
    return all(key in now and torch.equal(value, now[key]) for key, value in before.items())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm().detach() / expected.norm().detach())


def attached(
    model: nn.Module,
    method: str,
    batches: Iterable[Any] = (),
    name: str = "default",
    size: float = 0.05,
    **changes: Any,
) -> Any:
    """Attach the method's tiny config, calibrated on the batches where it needs them, and perturb its tensors."""
    cfg = tiny(method, **changes)
    att = ll.attach(model, cfg, calibration(cfg, batches), name=name)
    perturb(att.targets.values(), size)
    return att


def train(model: nn.Module, batch: Any, steps: int = 2, lr: float = 1e-2) -> None:
    """A few optimiser steps on the sum of squares of the model's (first) output."""
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=lr))
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(batch)
        (output if isinstance(output, Tensor) else output[0]).float().square().mean().backward()
        optimizer.step()


def anatomy(model: nn.Module) -> dict[str, Any]:
    """All that attach might leave behind, except bits: modules, attributes, hooks, flags and modes."""
    found: dict[str, Any] = {
        path: (type(module), sorted(module.__dict__), module.training, len(module._forward_hooks),
               len(module._forward_pre_hooks), len(module._forward_hooks_with_kwargs))
        for path, module in model.named_modules()
    }  # fmt: skip
    return found | {f"{key}: flag": p.requires_grad for key, p in model.named_parameters()}
