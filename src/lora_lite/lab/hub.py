"""The hub, as the lab's models and data need it: where it does not answer, only copies that are here are used."""

import functools
import sys

from huggingface_hub import constants

from lora_lite.files import hub


@functools.cache
def silence() -> str:
    """Why nothing can be had from the hub, or "" where it answers; asked once a process.

    The libraries that read from it would each try every file again and again, for minutes. Where the hub is silent they
    are set to read their caches alone.
    """
    silent = hub.silence()
    if silent and not constants.HF_HUB_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return silent
