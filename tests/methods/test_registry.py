"""The registry: every method's facts are there and sane, its file documents it, and the package's names resolve."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from helpers import METHODS, tiny
from lora_lite.adapter import Adapter
from lora_lite.calibration.statistics import STATISTICS
from lora_lite.config import AdapterConfig
from lora_lite.registry import method_of, register

LONGEST = 125  # lines of a method's file
FOUNDATION = {"lora", "pissa", "dora", "delora", "hra", "eva", "ia3", "ia3_ff", "road", "lora_xs"}


def test_the_published_methods_are_there() -> None:
    assert set(METHODS) >= FOUNDATION
    assert list(METHODS) == sorted(METHODS)
    assert ll.methods() == ll.methods()


@pytest.mark.parametrize("method", METHODS)
def test_facts(method: str) -> None:
    cls: Any = ll.methods()[method]
    assert issubclass(cls, Adapter) and cls.facts.name == method and re.fullmatch(r"[a-z][a-z0-9_]*", method)
    assert issubclass(cls.Config, AdapterConfig) and cls.Config is not AdapterConfig
    assert cls.Config.__name__.lower() == method.replace("_", "") + "config"
    assert len(cls.facts.title) > 10 and re.fullmatch(r"\d{4}\.\d{5}", cls.facts.arxiv)
    assert isinstance(cls.facts.affine, bool) and isinstance(cls.facts.trained, bool)
    rates = (*cls.facts.lr_range, cls.facts.lr)
    assert rates == (0, 0, 0) if not cls.facts.trained else 0 < rates[0] <= cls.facts.lr <= rates[1] < 1
    assert cls.acts() == ("after" if cls.before is Adapter.before else "before")
    assert cls.before is not Adapter.before or cls.change is not Adapter.change
    for cfg in (cls.Config(), tiny(method)):
        assert cls.needs(cfg) <= set(STATISTICS)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert 0 <= cls.identity_bound(cfg, dtype) <= (0.1 if cfg == cls.Config() else 0.31)
    assert method_of(cls.Config()) is cls


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_facts_speak_of_are_there(method: str) -> None:
    cls: Any = ll.methods()[method]
    with torch.device("meta"):  # shapes only, as load and cost need it
        adapter = cls(tiny(method), 24, 16)
    parameters = dict(adapter.named_parameters())
    assert all(value.is_meta and value.ndim > 0 for value in adapter.state_dict().values())
    assert set(cls.facts.decay) | set(cls.facts.lora_plus) <= set(parameters)
    assert bool(parameters) == cls.facts.trained
    assert not any(isinstance(module, nn.Linear) for module in adapter.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_one_short_file_that_documents_itself(method: str) -> None:
    cls = ll.methods()[method]
    module = importlib.import_module(cls.__module__)
    source = Path(inspect.getfile(cls)).read_text()
    assert cls.__module__.rsplit(".", 1)[-1] == method and cls.Config.__module__ == cls.__module__
    assert len(source.splitlines()) < LONGEST
    doc = module.__doc__ or ""
    assert cls.facts.arxiv in doc and re.search(r"arXiv:\d{4}\.\d{5}", doc)
    assert re.search(r"^\s*[xy]' = .+", doc, re.MULTILINE), "no formula"
    assert cls.__doc__ and re.search(r"\bc\b", cls.__doc__), "does not say what the coefficient means"
    own = {field.name for field in dataclasses.fields(cls.Config)} - {f.name for f in dataclasses.fields(AdapterConfig)}
    documented = " ".join(base.__doc__ or "" for base in cls.Config.__mro__)
    assert all(f"{field}:" in documented for field in own)
    assert cls.facts.name not in {name for name, other in ll.methods().items() if other is not cls}


def test_every_file_of_the_folder_is_registered() -> None:
    folder = Path(inspect.getfile(importlib.import_module("lora_lite.methods"))).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(METHODS)


@dataclasses.dataclass(frozen=True)
class NewConfig(AdapterConfig):
    """Of a method that is not to be."""


def facts(**changes: Any) -> Any:
    return ll.Facts(**{"title": "A title", "arxiv": "0000.00000", "lr": 1e-3, "lr_range": (1e-4, 1e-2), **changes})


@pytest.mark.parametrize("method", METHODS)
def test_taken_names_and_configs_are_refused(method: str) -> None:
    before = ll.methods()
    for name, Config in ((method, NewConfig), ("new", before[method].Config)):
        with pytest.raises(ValueError, match=rf"register\({Config.__name__}, '{name}'\): already taken by "):

            @register(Config, facts(name=name))
            class New(Adapter):
                pass

    assert ll.methods() == before


def test_a_config_that_no_method_registered() -> None:
    with pytest.raises(ValueError, match=r"NewConfig is no registered config; the registered ones are .*LoRAConfig"):
        ll.attach(nn.Linear(2, 2), NewConfig(target_roles=()))


def test_a_method_is_registered_once_even_if_its_file_runs_again() -> None:
    module = importlib.import_module("lora_lite.methods.lora")
    before = ll.methods()["lora"]
    try:
        again = importlib.reload(module)
        assert ll.methods()["lora"] is again.LoRA and list(ll.methods()) == METHODS
    finally:
        register(before.Config, before.facts)(before)
        module.LoRA, module.LoRAConfig = before, before.Config


def test_names_of_the_package() -> None:
    for cls in ll.methods().values():
        assert getattr(ll, cls.Config.__name__) is cls.Config
        assert cls.Config.__name__ in dir(ll)
    for name in ll.__all__:
        assert getattr(ll, name) is not None and name in dir(ll)
    assert dir(ll) == sorted(dir(ll))
    for name in ("NoConfig", "lorra", "Config", "_nothing"):
        with pytest.raises(AttributeError, match=rf"module 'lora_lite' has no attribute '{name}'"):
            getattr(ll, name)


def test_what_editors_read_is_what_is_imported() -> None:
    tree = ast.parse(Path(ll.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    read = {each.name: node.module for node in imports for each in node.names}
    configs = {cls.Config.__name__: cls.__module__ for cls in ll.methods().values()}
    exports = {name: module for module, names in ll._WHERE.items() for name in names.split()}
    assert read == exports | configs and sorted(exports) == sorted(ll.__all__)
    shown = {each.asname for node in imports if ".methods." in str(node.module) for each in node.names}
    assert shown == set(configs), "`as` the same name: else a checker takes it for private"


LAZY = """
import sys
import lora_lite as ll
assert "torch" not in sys.modules, "importing the package brings torch"
assert ll.__version__
from lora_lite import *
assert attach is ll.attach and methods is ll.methods and methods()["lora"] is methods.lora.LoRA
assert "torch" in sys.modules and "LoRAConfig" not in globals() and "LoRAConfig" in dir(ll)
"""


def test_torch_comes_with_the_first_name() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["methods", "files.checkpoint", "runtime.attach", "interop.import_peft"])
def test_the_methods_are_there_whichever_module_comes_first(first: str) -> None:
    program = f"import lora_lite.{first}; from lora_lite.registry import registered; assert 'lora' in registered()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_source_tree_works_without_being_installed(tmp_path: Path) -> None:
    shutil.copytree(
        Path(ll.__file__).parent, tmp_path / "lora_lite", ignore=shutil.ignore_patterns("lab", "__pycache__")
    )
    program = (
        "import importlib.metadata as m\n"
        "known = m.distribution\n"
        "def distribution(name):\n"
        "    if name.startswith('lora'): raise m.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "m.distribution = distribution\n"
        f"import lora_lite as ll, torch; assert ll.__file__.startswith({str(tmp_path)!r})\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4)); ll.attach(model, ll.LoRAConfig(target_roles=()))\n"
        f"ll.save(model, {str(tmp_path / 'a')!r}); print(ll.__version__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ll.__version__


IMPORTS = """
import sys, warnings
import lora_lite as ll
assert len(ll.methods()) >= 10 and ll.methods.lora.LoRA, "the folder and the function are one"
assert ll.LoRAConfig(r=2).r == 2
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
for name, cls in ll.methods().items():
    cfg = cls.tiny().replace(target_roles=(), target_names=())
    data = [torch.randn(20, 8)] if cls.facts.trained else ll.Contrast([torch.randn(20, 8)], [torch.randn(20, 8)])
    ll.attach(model, cfg, data if cls.needs(cfg) else None)
    ll.save(model, sys.argv[1]); ll.detach(model); ll.load(model, sys.argv[1])
    ll.merge(model, keep=False) if cls.facts.affine else ll.detach(model)
found = [name for name in sys.modules if name.split(".")[0] in ("transformers", "peft", "bitsandbytes", "accelerate")]
assert not found, found
assert not [name for name in sys.modules if name.startswith("lora_lite.lab") or name == "lora_lite.cli"]
"""


def test_the_core_imports_neither_transformers_nor_the_lab(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::lora_lite.errors.LoraLiteWarning", "-c", IMPORTS, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
