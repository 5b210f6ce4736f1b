"""The registry of methods: by name, and by the type of their config."""

from collections.abc import Callable
from typing import TypeVar

from lora_lite.adapter import Adapter
from lora_lite.config import AdapterConfig
from lora_lite.facts import Facts

AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])
_BY_CONFIG: dict[type[AdapterConfig], type[Adapter]] = {}


def register(Config: type[AdapterConfig], facts: Facts) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator that makes an `Adapter` known by its name and by the type of its config.

    Args:
        Config: its config class; one method each.
        facts: its name, paper, learning rate, and what else others ask of it.

    Raises:
        ValueError: the name or the config class is taken by another class.
    """

    def decorate(cls: AdapterClass) -> AdapterClass:
        place = (cls.__module__, cls.__qualname__)
        again = [config for config, other in _BY_CONFIG.items() if (other.__module__, other.__qualname__) == place]
        for config, other in _BY_CONFIG.items():
            if config not in again and (other.facts.name == facts.name or config is Config):
                raise ValueError(f"register({Config.__name__}, {facts.name!r}): already taken by {other.__qualname__}")
        for config in again:  # a notebook's cell that is run again
            del _BY_CONFIG[config]
        cls.Config, cls.facts = Config, facts
        _BY_CONFIG[Config] = cls
        return cls

    return decorate


def registered() -> dict[str, type[Adapter]]:
    """The methods that were registered so far, by name."""
    return {cls.facts.name: cls for cls in sorted(_BY_CONFIG.values(), key=lambda cls: cls.facts.name)}


def method_of(cfg: AdapterConfig) -> type[Adapter]:
    """The method whose config `cfg` is. Raises `ValueError` for a config that no method registered."""
    if type(cfg) in _BY_CONFIG:
        return _BY_CONFIG[type(cfg)]
    names = ", ".join(cls.Config.__name__ for cls in registered().values())
    raise ValueError(f"{type(cfg).__name__} is no registered config; the registered ones are {names}")
