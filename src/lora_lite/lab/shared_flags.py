"""Flags that several commands have, defined once: a field of this type is the flag, with its help."""

from typing import Annotated

import tyro

TrustRemoteCode = Annotated[
    bool,
    tyro.conf.arg(
        help="run the code that a model's folder or hub id brings along; without it, a model that needs such code is "
        "refused. It may do whatever you may: give it for models whose code you have read."
    ),
]
