"""The hub: asked once, and quickly, whether it answers. Where it does not, only copies that are here are used."""

import functools
import sys

from huggingface_hub import constants, get_session

SECONDS = 3.0


@functools.cache
def silence() -> str:
    """Why nothing can be had from the hub, or "" where it answers.

    The libraries that read from it would each try every file again and again, for minutes. Where the hub is silent they
    are set to read their caches alone.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever client the library uses: requests, httpx, httpx2
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer: {str(error) or type(error).__name__}"
    return ""
