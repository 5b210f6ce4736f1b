"""Set-up shared by all tests. What must come before the first import of `lora_lite` is done as this file is read."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may try the network; read when huggingface_hub is first imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The models are tiny and the workers share the cores, as do the processes that their tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What tests share, for the programs that they start; pytest itself has it from pyproject.toml.
SUPPORT = str(Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join([SUPPORT, *filter(None, [os.environ.get("PYTHONPATH")])])

# The same examples in every run. No deadline: a slow machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

if os.environ.get("LORA_LITE_NO_TYPECHECK") != "1":  # fullgraph compilation does not survive the hook
    from jaxtyping import install_import_hook

    if "lora_lite" in sys.modules:
        raise pytest.UsageError("lora_lite was imported before tests/conftest.py could install the type-checking hook")
    install_import_hook("lora_lite", "typechecker.check")


@pytest.fixture
def as_installed() -> Iterator[None]:
    """Without the type-checking hook, which would stop arguments of wrong types before the library sees them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _methods_of_a_test_go_with_it() -> Iterator[None]:
    from lora_lite.registry import _BY_CONFIG

    kept = dict(_BY_CONFIG)
    yield
    _BY_CONFIG.clear()
    _BY_CONFIG.update(kept)


def pytest_configure(config: pytest.Config) -> None:
    """Turn our own warnings into errors.

    Not in pyproject.toml: pytest would import the class before it reads this file, and so past the hook.
    """
    config.addinivalue_line("filterwarnings", "error::lora_lite.errors.LoraLiteWarning")
