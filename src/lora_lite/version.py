"""The version: the one place where it stands. It is no look-up, so that a source tree works without being installed."""

__version__ = "0.1.0"
