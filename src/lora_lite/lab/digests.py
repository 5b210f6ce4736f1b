"""What shows whether a file is still as it was written."""

import hashlib
from pathlib import Path

BLOCK = 1 << 20  # bytes read at a time: models do not fit the memory twice


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits. Raises OSError if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
