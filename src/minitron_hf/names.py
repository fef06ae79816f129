"""Names of models, tokenizers and datasets: a path on this machine, or the id of a Hub repository."""

from __future__ import annotations

import contextlib
import getpass
import os
from pathlib import Path

from .errors import HubError, MinitronError

#: How names of files end that a recipe may name, and names of repositories do not.
FILE_ENDINGS = (".json", ".jsonl", ".txt", ".csv", ".parquet", ".yaml", ".yml", ".jinja")


def local_path(
    name_or_path: str | os.PathLike[str], *, what: str = "folder", error: type[MinitronError] = HubError
) -> Path | None:
    """Decide whether a name is a path on this machine or the id of a Hub repository.

    A name that can only be a path, or that begins with a folder of the working directory, is never asked of the Hub.

    Args:
        name_or_path: a file, a folder, or `"owner/name"`.
        what: what is expected there, for the message.
        error: class of the error.

    Returns:
        The existing path; None for a Hub id.

    Raises:
        MinitronError: of the given class, if the name is a path and nothing is there.

    >>> local_path("owner/name") is None
    True
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    if name.strip() and os.path.exists(name):
        return Path(name)
    if isinstance(name_or_path, os.PathLike) or not name.strip() or _looks_like_path(name):
        raise error(f"The {what} {name!r} does not exist. Check the path, or pass a Hub id ('owner/name').")
    first, slash, _ = name.partition("/")
    if slash and os.path.isdir(first):
        is_file_name = name.lower().endswith(FILE_ENDINGS)
        hub = f" To load the Hub repository {name!r}, run in a directory without a folder {first!r}."
        raise error(
            f"The {what} {name!r} does not exist in the folder {first!r}. Check the path.{'' if is_file_name else hub}"
        )
    return None


def is_repo_id(name: str) -> bool:
    """Whether the Hub would accept the name for a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _looks_like_path(name: str) -> bool:
    """Whether a name can be no Hub id: one has one slash at most, and neither begins nor ends with it."""
    begins = os.path.isabs(name) or name.startswith((".", "~"))
    return begins or name.endswith("/") or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def local_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder of a saved model; None for a Hub id. See `local_path`.

    Raises:
        HubError: if the name is a path and no folder is there.
    """
    path = local_path(name_or_path)
    if path is not None and not path.is_dir():
        raise HubError(f"{str(path)!r} is a file, expected the folder of a saved model or a Hub id. Pass its folder.")
    return path


def public_name(name_or_path: str | os.PathLike[str] | None) -> str | None:
    """A name to publish: Hub ids as they are, local folders and files by their last part only.

    A folder that is called like whoever runs this, such as a home folder, has no name to publish.

    >>> public_name("owner/model"), public_name(None), public_name("work/data.jsonl"), public_name("my/own/model")
    ('owner/model', None, 'data.jsonl', 'model')
    """
    if not name_or_path:
        return None
    text = os.path.expanduser(name_or_path)
    if not (_looks_like_path(text) or text.endswith(FILE_ENDINGS) or os.path.exists(text)):
        return os.fspath(name_or_path)
    name = os.path.basename(os.path.realpath(text))
    return None if name in ("", *_own_names()) else name


def _own_names() -> set[str]:
    """Names by which this machine knows who runs this."""
    names = {os.path.basename(os.path.expanduser("~"))}
    with contextlib.suppress(KeyError, OSError):  # containers may know nobody
        names.add(getpass.getuser())
    return names
