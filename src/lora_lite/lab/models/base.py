"""The base that a command works on: which model, in which dtype and where, decided once and read as often as needed."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_lite.lab.models.devices import pick_device, pick_dtype
from lora_lite.lab.models.load import load_model


@runtime_checkable
class BaseFlags(Protocol):
    """What the flags of a command say of its base: a run's, a study's, those of `lora-lite cost`."""

    @property
    def model(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


@dataclass(frozen=True)
class Base:
    """A base model, before it is read.

    Attributes:
        model: "smollm2" (embedded), a hub id or a local folder.
        dtype: of the weights, and of the computation where they are quantised.
        device: where it is put.
        quantization: "none", "4bit" or "8bit".
        trust_remote_code: whether the code that it brings along is run.
    """

    model: str
    dtype: torch.dtype
    device: torch.device
    quantization: str = "none"
    trust_remote_code: bool = False

    @classmethod
    def of(cls, flags: BaseFlags, device: str | None = None) -> "Base":
        """The base that flags ask for, with "auto" decided. device: None is the GPU if there is one.

        Raises `RunError` for a device that is not here, or a dtype that is none.
        """
        where = pick_device(device)
        dtype = pick_dtype(flags.dtype, where)
        return cls(flags.model, dtype, where, flags.quantization, flags.trust_remote_code)

    @property
    def dtype_name(self) -> str:
        """As flags and records write it: "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Read a fresh copy, with its tokenizer. Raises `ModelError` as `load_model` does."""
        return load_model(
            self.model,
            self.dtype,
            self.device,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )
