"""Adapters on the Hugging Face hub: hf://user/name is a repository with one adapter's file and a card.

Nothing is asked of the hub but where such an address is given. One file is read from it, by name, and it is checked as
any other.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lite.errors import CheckpointError
from lora_lite.files.atomic import expanded
from lora_lite.files.card import card

FILE, CARD = "adapter.safetensors", "README.md"
SECONDS = 3.0  # that the hub may take to answer at all
PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
ADDRESS = re.compile(rf"hf:/{{1,2}}(?P<repo>{PART}/{PART})(@(?P<revision>[^@\s]+))?")


@dataclass(frozen=True)
class Address:
    """A repository on the hub, and a revision of it (a branch, tag or commit; None: its main branch)."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on the hub; `Path` makes one slash of two."""
    return os.fspath(path).startswith("hf:/")


def parsed(path: str | os.PathLike[str]) -> Address:
    """The address that a path spells. Raises `CheckpointError` where it spells none."""
    if (found := ADDRESS.fullmatch(os.fspath(path))) is None:
        raise CheckpointError(f"{os.fspath(path)!r} is no address on the hub; it has the form hf://user/name@revision")
    return Address(found["repo"], found["revision"])


def local(path: str | os.PathLike[str]) -> Path:
    """The file that a path means; of an address on the hub a copy in the hub's cache, which is fetched if need be.

    Raises:
        CheckpointError: no such repository, no adapter in it, no permission, or a hub that does not answer.
        ImportError: huggingface_hub is not installed.
    """
    if not is_hub(path):
        return expanded(path)
    address, api = parsed(path), _api()
    with _in_words(address, "read"):
        here = bool(silence())
        return Path(api.hf_hub_download(address.repo, FILE, revision=address.revision, local_files_only=here))


def publish(path: str | os.PathLike[str], write: Callable[[Path], object], more: str = "") -> Path:
    """Write an adapter's file to the hub, with a card made from what it says; a README.md that is there stays.

    Args:
        path: the address. A repository that is not there is made, private.
        write: writes the file.
        more: Markdown for the card, such as what was measured.

    Returns:
        The address, as a path that `local` understands. Raises as `local` does.
    """
    address, api = parsed(path), _api()
    from huggingface_hub import get_token

    if get_token() is None:
        raise CheckpointError(
            f"{address}: writing to the hub needs a token, and none is here; run `hf auth login`, or set HF_TOKEN"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, FILE)
        write(file)
        if silent := silence():
            raise CheckpointError(f"{address}: {silent}; save to a file, or try again with a network")
        with _in_words(address, "write"):
            api.create_repo(address.repo, private=True, exist_ok=True)
            if not api.file_exists(address.repo, CARD, revision=address.revision):
                Path(scratch, CARD).write_text(card(file, str(address), more), encoding="utf-8")
            api.upload_folder(
                repo_id=address.repo,
                folder_path=scratch,
                revision=address.revision,
                commit_message=f"{FILE}, by lora-lite",
            )
    return Path(str(address))


def _api() -> Any:
    """The hub's client."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ImportError("an hf:// address needs the hub's client: pip install huggingface_hub") from error
    return HfApi(library_name="lora-lite")


def silence() -> str:
    """Why nothing can be had from the hub, or "" where it answers: asked once, for its client would try for long."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever client the library uses: requests, httpx, httpx2
        return f"{constants.ENDPOINT} does not answer: {str(error) or type(error).__name__}"
    return ""


@contextmanager
def _in_words(address: Address, doing: str) -> Iterator[None]:
    """What the hub's client raises, as a sentence."""
    from huggingface_hub import errors, get_token

    who = "your token" if get_token() else "nobody without a token (`hf auth login`)"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{address}: is gated; ask for access on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{address}: the hub has no such repository, or one that {who} may {doing}; check the name"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{address}: the repository has no revision {address.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{address}: {silence() or error}, and no copy is in the cache; load a file, or try again with a network"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{address}: holds no {FILE}, which is what ll.save writes; a folder of peft's is for ll.import_peft"
        ) from error
    except errors.HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        reason = f"{who} may not {doing} it" if refused and get_token() else str(error).splitlines()[0]
        raise CheckpointError(f"{address}: the hub refused: {reason}") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{address}: {error}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("http", "requests")):  # whichever client the library uses
            raise
        raise CheckpointError(
            f"{address}: the hub broke off ({str(error) or type(error).__name__}); try again"
        ) from error
