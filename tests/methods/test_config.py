"""Configs: frozen, checked when made, and plain data for JSON."""

import dataclasses
import json
import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_lite as ll
from helpers import METHODS, tiny
from lora_lite.config import DTYPES, ROLES

pytestmark = pytest.mark.usefixtures("as_installed")
CONFIGS = [cls.Config for cls in ll.methods().values()]
RANKED = [Config for Config in CONFIGS if "r" not in Config.unused]
SCALED = [Config for Config in CONFIGS if "alpha" not in Config.unused]

not_numbers = st.none() | st.text() | st.booleans() | st.lists(st.integers(), max_size=2) | st.complex_numbers()
not_finite = st.sampled_from([math.nan, math.inf, -math.inf, 10**400])
floats = st.floats(allow_nan=False, allow_infinity=False)


def refused(Config: Any, field: str, value: Any, allowed: str) -> None:
    """Both ways of making a config refuse the value, by the field's name, the value and the allowed ones."""
    words = rf"{Config.__name__}\.{field}.*{re.escape(repr(value))}(?s:.*)must be {allowed}"
    for make in (lambda: Config(**{field: value}), lambda: Config().replace(**{field: value})):
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert type(caught.value) is ValueError


@given(config=st.sampled_from(RANKED), r=st.integers(max_value=0) | st.floats() | not_numbers)
def test_r(config: Any, r: Any) -> None:
    if r is not None or "r" not in config.optional:
        refused(config, "r", r, "an integer >= 1")


@given(config=st.sampled_from(SCALED), alpha=not_finite | not_numbers)
def test_alpha(config: Any, alpha: Any) -> None:
    if alpha is not None or "alpha" not in config.optional:
        refused(config, "alpha", alpha, "a finite number")


@given(config=st.sampled_from(CONFIGS), dtype=st.sampled_from([torch.int8, torch.complex64, "float32", float, None]))
def test_dtype(config: Any, dtype: Any) -> None:
    refused(config, "dtype", dtype, "one of torch.float32, torch.float64, torch.bfloat16, torch.float16")


@given(
    config=st.sampled_from(CONFIGS),
    field=st.sampled_from(["target_names", "exclude_names"]),
    pattern=st.sampled_from(["(", "[a-", "*x", "a{2,1}", r"(?P<n>a)(?P<n>b)", "\\"]),
)
def test_regex(config: Any, field: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"{config.__name__}.{field}: .* must be a valid regular expression") as caught:
        config(**{field: ("fine", pattern)})
    assert repr(pattern) in str(caught.value)


@given(
    config=st.sampled_from(CONFIGS),
    field=st.sampled_from(["target_names", "exclude_names", "target_roles"]),
    value=st.text()
    | st.none()
    | st.integers()
    | st.tuples(st.integers())
    | st.tuples(st.text(), st.none())
    | st.binary(min_size=1),
)
def test_not_strings(config: Any, field: str, value: Any) -> None:
    refused(config, field, value, r"a tuple of strings, e\.g\. \('q_proj'")


@given(config=st.sampled_from(CONFIGS), roles=st.tuples(st.text().filter(lambda role: role not in ROLES)))
def test_role(config: Any, roles: Any) -> None:
    refused(config, "target_roles", roles, r"a subset of \('reader', 'writer', 'inner'\)")


bad_layers = st.sampled_from([(), [], 0, 3, "12", (-1,), (0, 1.0), (True,), ("0",), (None,), {0: "a", -1: "b"}])


@given(config=st.sampled_from(CONFIGS), layers=bad_layers)
def test_layers(config: Any, layers: Any) -> None:
    refused(config, "layers", layers, "None or a non-empty tuple of integers >= 0")


@given(
    config=st.sampled_from(CONFIGS),
    value=st.integers(max_value=-1) | st.floats() | st.text() | st.booleans(),
    field=st.sampled_from(["seed", "d_model"]),
)
def test_seed_and_d_model(config: Any, value: Any, field: str) -> None:
    refused(config, field, value, "an integer >= 0" if field == "seed" else "None or an integer >= 1")


# What one method or a few have of their own: field -> (values outside, words). Found by field, not by method.
not_unit = st.floats(min_value=1.0) | st.floats(max_value=-1e-300) | not_finite | not_numbers
not_sizes = st.floats() | not_numbers
OWN: dict[str, tuple[st.SearchStrategy[Any], str]] = {
    "rslora": (st.integers() | st.none() | st.text(), "True or False"),
    "bias": (st.integers() | st.none() | st.text(), "True or False"),
    "centered": (st.integers() | st.none() | st.text(), "True or False"),
    "dropout": (not_unit, r"a number in \[0, 1\)"),
    "rho": (st.floats(max_value=1, exclude_max=True) | not_finite | not_numbers, "a number >= 1"),
    "lambda0": (st.floats(max_value=0) | not_finite | not_numbers, "a finite number > 0"),
    "init_std": (st.floats(max_value=-1e-300) | not_finite | not_numbers, "a number >= 0"),
    "road_variant": (
        st.text() | st.none() | st.integers() | st.lists(st.text(), max_size=1) | st.just({}),
        "one of road_1, road_2, road_4",
    ),
    "group_size": (
        st.integers(max_value=1) | st.integers().map(lambda n: 2 * n + 1) | st.floats() | not_numbers,
        "an even integer >= 2",
    ),
    "side": (st.text() | st.none(), "one of \\('auto', 'input', 'output'\\)"),
    "suppress_only": (st.integers() | st.none() | st.text(), "True or False"),
    **dict.fromkeys(("k", "lora_rank", "block"), (st.integers(max_value=0) | not_sizes, "an integer >= 1")),
    "init_alpha": (st.floats(max_value=0) | st.floats(min_value=1, exclude_min=True) | not_numbers, "a number in"),
    "block_size": (st.integers(max_value=1) | not_sizes, "an integer >= 2"),
    "max_rotation_angle": (st.floats(max_value=0) | st.floats(min_value=math.pi) | not_numbers, "radians in"),
    "rotate_basis": (st.text() | st.none(), "one of \\('V', 'U', 'both', 'none'\\)"),
    "tokens": (st.text() | st.none(), "one of \\('last', 'mean'\\)"),
    "gate": (st.text() | st.none(), "one of \\('absolute', 'signed'\\)"),
    "unit": (st.text() | not_finite | st.booleans(), "a finite number, or None"),
}
# A basis is refused by itself (test_basis.py), in words of its own.
ELSEWHERE = {"basis"}
COMMON = {field.name for field in dataclasses.fields(ll.AdapterConfig)}


def own_fields() -> list[tuple[Any, str]]:
    skipped = COMMON | ELSEWHERE
    fields = ((Config, field.name) for Config in CONFIGS for field in dataclasses.fields(Config))
    return [(Config, name) for Config, name in fields if name not in skipped and name not in Config.unused]


def test_every_own_field_has_its_bad_values_here() -> None:
    assert {field for _, field in own_fields()} == set(OWN)


@given(data=st.data())
@settings(max_examples=300)
def test_own_field(data: st.DataObject) -> None:
    Config, field = data.draw(st.sampled_from(own_fields()))
    values, words = OWN[field]
    refused(Config, field, data.draw(values), words)


@pytest.mark.parametrize("Config", CONFIGS)
def test_a_setting_that_the_method_lacks_is_refused(Config: Any) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert set(Config.unused) <= set(defaults)
    for field in Config.unused:
        Config(**{field: defaults[field]})  # the default itself says nothing
        value = 4 if field == "r" else 2.5
        refused(Config, field, value, rf"left at {defaults[field]}: this method has no such setting")


def test_limits_that_single_methods_set() -> None:
    refused(ll.HRAConfig, "r", 3, "even, so that reflections start in pairs")
    refused(ll.PiSSAConfig, "alpha", 0.0, "a number > 0")
    refused(ll.PiSSAConfig, "alpha", -1, "a number > 0")
    with pytest.raises(TypeError, match="LoRAConfig has no field 'rank'; did you mean r"):
        ll.LoRAConfig(rank=8)


def test_iterators_are_read_once() -> None:
    cfg = ll.LoRAConfig(
        target_names=(name for name in ("q", "k")), exclude_names=iter(["a"]), layers=range(2), target_roles=["writer"]
    )
    assert (cfg.target_names, cfg.exclude_names, cfg.layers, cfg.target_roles) == (
        ("q", "k"),
        ("a",),
        (0, 1),
        ("writer",),
    )
    assert hash(cfg) == hash(cfg.replace())


@pytest.mark.parametrize("method", METHODS)
def test_frozen(method: str) -> None:
    cfg = tiny(method)
    for field in dataclasses.fields(cfg):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(cfg, field.name, getattr(cfg, field.name))
    assert cfg.replace(seed=5) != cfg and cfg.seed == 0 and cfg.replace(seed=0) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


names = st.lists(st.sampled_from(["q_proj", r"mlp\.", "(a|b)$", "é", '"', "\\\\", ""]), max_size=3).map(tuple)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "basis": st.sampled_from(
        ["svd", "corda", "corda:power=1.0", "wanda:pool=mean_abs", ll.Basis("asvd", power=0.25, eps=0.0)]
    ),
    "side": st.sampled_from(["auto", "input", "output"]),
    "suppress_only": st.booleans(),
    **dict.fromkeys(("k", "lora_rank", "block"), st.integers(1, 99)),
    "init_alpha": st.floats(0, 1, exclude_min=True),
    "block_size": st.integers(2, 99),
    "max_rotation_angle": st.floats(1e-6, 3),
    "rotate_basis": st.sampled_from(["V", "U", "both", "none"]),
    "tokens": st.sampled_from(["last", "mean"]),
    "gate": st.sampled_from(["signed", "absolute"]),
    "unit": st.none() | floats,
    "r": st.integers(1, 512).map(lambda n: 2 * n),
    "alpha": floats.filter(lambda a: a > 0) | st.integers(1, 10**12),
    "dtype": st.sampled_from(list(DTYPES.values())),
    "target_names": names,
    "exclude_names": names,
    "target_roles": st.lists(st.sampled_from(ROLES), max_size=3).map(tuple),
    "layers": st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple),
    "d_model": st.none() | st.integers(1, 10**6),
    "seed": st.integers(0, 2**70),
    "rslora": st.booleans(),
    "bias": st.booleans(),
    "centered": st.booleans(),
    "dropout": st.floats(0, 1, exclude_max=True),
    "rho": st.floats(1, 1e6),
    "lambda0": floats.filter(lambda a: a > 0),
    "init_std": floats.filter(lambda a: a >= 0),
    "road_variant": st.sampled_from(["road_1", "road_2", "road_4"]),
    "group_size": st.integers(1, 999).map(lambda n: 2 * n),
}


@given(data=st.data())
@settings(max_examples=300)
def test_round_trip_through_json(data: st.DataObject) -> None:
    Config = data.draw(st.sampled_from(CONFIGS))
    free = [field.name for field in dataclasses.fields(Config) if field.name not in Config.unused]
    cfg = Config(**{field: data.draw(VALUES[field]) for field in data.draw(st.sets(st.sampled_from(free)))})
    again = Config.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and type(again) is Config and hash(again) == hash(cfg)
    assert again.to_dict() == cfg.to_dict()


@pytest.mark.parametrize("Config", CONFIGS)
def test_from_dict_refuses_what_it_does_not_know(Config: Any) -> None:
    with pytest.raises(ValueError, match=rf"{Config.__name__}: unknown fields \['coeff'\]; the fields are \[.*'seed'"):
        Config.from_dict({"coeff": 1.0})
    for dtype in ("int8", "torch.float32", 5, None):
        with pytest.raises(ValueError, match=rf"{Config.__name__}\.dtype = .*must be one of \['bfloat16', 'float16'"):
            Config.from_dict({"dtype": dtype})
    assert Config.from_dict({}) == Config()
