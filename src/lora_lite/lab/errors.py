"""Errors of the lab that several of its rooms raise."""

from lora_lite.errors import LoraLiteError


class RunError(LoraLiteError, RuntimeError):
    """A run cannot start, or its saved adapter does not answer as the trained one did."""
