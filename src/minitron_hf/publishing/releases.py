"""What follows the commit of a student: its quantised copies in repositories of their own, a tag, a collection."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HubError, OutputError
from ..file_digests import weights_digest
from ..files import is_working_file, replacing_file
from ..formats import QUANTIZATION_NAME, read_artefact, write_artefact
from .card_values import legal_files
from .hub_errors import hub_errors, is_transient, is_unanswered, with_retries
from .quantized_card import write_quantized_card
from .uploads import require_student

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

#: Folder of the quantised copies in a run folder: one folder per method.
QUANTIZED_DIR = "quantized"
#: Files of the student that the card of a copy is made from.
_CARD_FILES = ("evaluation.json", "teacher.json")


def is_retriable(error: BaseException) -> bool:
    """Whether an idempotent request may be repeated after an error."""
    return is_transient(error) or is_unanswered(error)


def quantized_repositories(run_dir: Path, repo_id: str) -> dict[str, str]:
    """Method → repository of every quantised copy in a run folder: the student's name and the method.

    Raises:
        OutputError: if there is none, or one is not complete or was made from other weights.
    """
    found = (run_dir / QUANTIZED_DIR).glob("*")
    folders = sorted(path for path in found if (path / "config.json").is_file() and not is_working_file(path))
    if not folders:
        raise OutputError(
            f"{run_dir / QUANTIZED_DIR} holds no quantised copies to publish. Write them with "
            f"`minitron-hf quantize {run_dir} -o {run_dir / QUANTIZED_DIR / 'int8'} --method int8`, or leave out "
            "quantized."
        )
    for folder in folders:
        require_student(folder)
        _require_copy_of(run_dir, folder)
    return {folder.name: f"{repo_id}-{folder.name.replace('_', '-')}" for folder in folders}


def _require_copy_of(run_dir: Path, folder: Path) -> None:
    """Refuse a quantised copy that was made from other weights than the student has now; warn if that is not known."""
    path = folder / QUANTIZATION_NAME
    record = read_artefact(path) if path.is_file() else {"method": folder.name, "source_weights": None}
    again = f"delete {folder}, and run `minitron-hf quantize {run_dir} -o {folder} --method {record['method']}`"
    if record["source_weights"] is None:
        logger.warning("%s does not say from which weights it was made. If not from the student's, %s.", folder, again)
    elif record["source_weights"] != weights_digest(run_dir):
        raise OutputError(
            f"{folder} was quantised from other weights than those that {run_dir} holds now. Leave out quantized; or "
            f"{again}."
        )


def prepare_quantized(run_dir: Path, method: str, repo_id: str, student: str) -> Path:
    """Write the card of a quantised copy into its folder, and the files that it is made from.

    Args:
        run_dir: the run folder of the student, whose measurements and legal texts are copied.
        method: name of the copy's folder.
        repo_id: the copy's repository.
        student: the student's repository.

    Returns:
        The copy's folder.
    """
    folder = run_dir / QUANTIZED_DIR / method
    for name in (*_CARD_FILES, *legal_files(run_dir)):
        if (run_dir / name).is_file():
            with replacing_file(folder / name) as temporary:
                shutil.copyfile(run_dir / name, temporary)
        else:
            (folder / name).unlink(missing_ok=True)
    write_artefact(folder / "hub.json", {"repo_id": repo_id, "student": student, "method": method})
    write_quantized_card(folder)
    return folder


#: What Git allows in no name of a branch or tag.
_FORBIDDEN = re.compile(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|@\{|//|^[/.-]|[/.]$|\.lock$|^@?$")


def require_reference(which: str, name: str | None) -> None:
    """Refuse a name that Git allows for no branch and no tag.

    Args:
        which: the argument, for the message.
        name: the name; None passes.

    Raises:
        HubError: naming the argument.
    """
    if name is not None and _FORBIDDEN.search(name):
        raise HubError(
            f"{which}={name!r}: expected the name of a branch or tag, such as 'v1': no spaces, none of ~^:?*[\\, no "
            "'..', no '-', '.' or '/' at its start, no '.' or '/' at its end."
        )


def require_free_tag(api: HfApi, repo_id: str, tag: str) -> None:
    """Refuse a tag that names an earlier commit, before anything is uploaded.

    A tag on the newest commit is allowed: a push that is repeated makes no second commit.

    Raises:
        HubError: naming the commit.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        refs = with_retries(lambda: api.list_repo_refs(repo_id), is_retriable=is_retriable)
    except RepositoryNotFoundError:
        return
    target = next((one.target_commit for one in refs.tags if one.name == tag), None)
    if target is not None and target not in [one.target_commit for one in refs.branches]:
        raise HubError(
            f"Cannot push to {repo_id}: its tag {tag} already names the commit {target[:12]}. Choose another tag, or "
            f"delete it: hf repos tag delete {repo_id} {tag}"
        )


def make_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Name a commit.

    Raises:
        HubError: if the tag names another commit.
    """
    from huggingface_hub.errors import HfHubHTTPError

    def attempt() -> None:
        try:
            api.create_tag(repo_id, tag=tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            tags = {one.name: one.target_commit for one in api.list_repo_refs(repo_id).tags}
            if tags.get(tag) != commit:
                raise HubError(
                    f"The commit {commit[:12]} was made in {repo_id}, but its tag {tag} names the commit "
                    f"{tags.get(tag, 'of a branch')[:12]}. Choose another tag."
                ) from error

    with hub_errors(f"The commit {commit[:12]} was made in {repo_id}, but not its tag {tag}", "Push again."):
        with_retries(attempt, is_retriable=is_retriable)


def add_to_collection(api: HfApi, title: str, models: Mapping[str, str], *, private: bool) -> str:
    """Add models to a collection of the first one's owner; create it if there is none of this title.

    Models that it holds already stay as they are. A model that the Hub does not find (the teacher may be gone) is left
    out with a warning.

    Args:
        api: the Hub's client.
        title: title of the collection.
        models: repository → note.
        private: make a new collection private.

    Returns:
        The collection's address.
    """
    from huggingface_hub.errors import HfHubHTTPError

    first = next(iter(models))
    with hub_errors(f"{first} was published, but not added to the collection {title!r}", "Push again."):
        collection = with_retries(
            lambda: api.create_collection(title, namespace=first.split("/")[0], private=private, exists_ok=True),
            is_retriable=is_retriable,
        )
        for repo_id, note in models.items():
            try:
                with_retries(
                    lambda repo_id=repo_id, note=note: api.add_collection_item(  # type: ignore[misc]
                        collection.slug, repo_id, "model", note=note, exists_ok=True
                    ),
                    is_retriable=is_retriable,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 404 or repo_id == first:
                    raise
                logger.warning("%s was not added to the collection %r: the Hub does not find it.", repo_id, title)
    return collection.url


def collected_models(run_dir: Path, repo_id: str, quantized: Mapping[str, str]) -> dict[str, str]:
    """The models of a student's collection with their notes: the student, its teacher, its quantised copies.

    Args:
        run_dir: the run folder.
        repo_id: the student's repository.
        quantized: method → repository of the quantised copies.
    """
    path = run_dir / "teacher.json"
    teacher = (read_artefact(path) if path.is_file() else {}).get("hub_id")
    return {
        repo_id: "student",
        **({teacher: "teacher"} if teacher else {}),
        **{name: f"student, quantised: {method}" for method, name in quantized.items()},
    }
