"""Fixtures of the lab's tests: a tiny model and tokenizer, and the embedded model, read once a session."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lab_helpers import make_llama, make_tokenizer, save_tiny


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a tiny model."""
    return save_tiny(tmp_path / "model")


@pytest.fixture(scope="session")
def smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model in fp32. Converted on the first use on a machine (half a minute), then a second."""
    from lora_lite.lab.models.load import load_model

    return load_model()
