"""Checkpoints on the Hugging Face hub: fetched file by file into its cache, each held against the hub's own checksum.

What is whole in the cache is never fetched again, so a broken download goes on with the file it broke at. HF_TOKEN, HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from infoprune_export.errors import InputError, NotEnough
from infoprune_export.workspace import is_full_disk

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def is_hub_id(model: str) -> bool:
    """Whether a MODEL is written as `org/name`."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def fetch(repo: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """A snapshot of a repository in the cache.

    Args:
        repo: `org/name`.
        revision: Branch, tag or commit.
        files: Patterns of what is wanted.

    Raises:
        InputError: no such repository or revision, no right to see it, or no way to reach it and not in the cache.
        NotEnough: the disk is full.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except HFValidationError:
        raise InputError("is no name of a repository", where=repo, mend="write it as on the hub: org/name") from None
    except GatedRepoError:
        raise InputError("is gated on the hub", where=repo, mend="ask for access on its page, then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise InputError(f"has no revision {revision!r} on the hub", where=repo, mend="name a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise InputError(
            "no such repository on the hub, or it is private", where=repo, mend="check the name; set HF_TOKEN for private models"
        ) from None
    except (HfHubHTTPError, OSError) as e:  # LocalEntryNotFoundError is an OSError
        if is_full_disk(e):
            mend = "make space, or set HF_HOME to another disk, and run the same command again: whole files are kept"
            raise NotEnough("the disk is full", where=constants.HF_HUB_CACHE, mend=mend) from None
        if constants.HF_HUB_OFFLINE:
            mend = "unset HF_HUB_OFFLINE, or name a local model directory"
            raise InputError("is not in the cache, and HF_HUB_OFFLINE is set", where=repo, mend=mend) from None
        mend = "check the network and run the same command again (whole files are kept), or name a local model directory"
        raise InputError(f"cannot be fetched from the hub ({type(e).__name__})", where=repo, mend=mend) from None
    except Exception as e:  # the HTTP library's own errors, when a connection breaks
        mend = "run the same command again (whole files are kept)"
        raise InputError(f"cannot be fetched from the hub ({type(e).__name__})", where=repo, mend=mend) from None


def known_sha256(path: Path) -> str | None:
    """What the hub says a file's sha256 is: the cache links a large file to a blob of that name; None for any other file."""
    blob = Path(os.readlink(path)) if path.is_symlink() else path
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None
