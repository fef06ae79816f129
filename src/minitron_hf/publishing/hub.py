"""Publishes run folders on the Hub, and checks before any work whether publishing is possible.

A run folder is laid out like the repository that it becomes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..formats import read_artefact, write_artefact
from ..names import is_repo_id, local_folder
from .card import write_model_card
from .card_values import require_run
from .eval_results import write_eval_results
from .hub_errors import NO_TOKEN, hub_errors, is_transient, is_unanswered, with_retries
from .licences import name_problem, sharing_problem
from .releases import (
    add_to_collection,
    collected_models,
    is_retriable,
    make_tag,
    prepare_quantized,
    quantized_repositories,
    require_free_tag,
    require_reference,
)
from .teacher_metadata import write_teacher_metadata
from .uploads import is_owned, require_no_secret, require_student, uploaded_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = ["check_push", "push_student_to_hub", "uploaded_files", "write_teacher_metadata"]

logger = logging.getLogger(__name__)

_REPEAT = "Push again: what was already uploaded is not sent twice, and the same files make no second commit."


def push_student_to_hub(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    collection: str | None = None,
    quantized: bool = False,
) -> CommitInfo:
    """Publish a run folder in one commit: weights, tokenizer, plan, scores, plots, evaluation, recipe and card.

    Only files under names that this package writes are uploaded. The card is rendered first, and the Hub checks its
    metadata before anything is uploaded. Requests without an answer are repeated for some seconds. You can repeat
    an interrupted push: no file is sent twice, and a repository with exactly these files gets no second commit.

    Args:
        run_dir: the run folder. `hub.json` (the repository's name) and `README.md` are written into it.
        repo_id: `owner/name`, or `name` for the owner of the token.
        private: make a new repository private. A new or empty public repository is private until its commit
            is made. The visibility of other repositories is not changed.
        token: Hub token; default: the one that `hf auth login` stored, or HF_TOKEN.
        commit_message: first line of the commit.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead of committing to the branch. The repository must exist.
        tag: name for the commit, such as `v1`.
        collection: title of a collection of the owner, which gets teacher, student and copies; created if missing.
        quantized: also publish the copies in the folder `quantized`, each in a repository of its own that is named
            after the student and the method, with a card.

    Returns:
        The commit.

    Raises:
        OutputError: if the folder holds no complete student, was not made by a run, holds an access token in what
            would be published, or cannot be read or written.
        HubError: if there is no token, the Hub refuses it or the metadata, or the connection breaks; or if the
            repository would be public under a name that the teacher's licence forbids.
    """
    run_dir = Path(run_dir)
    require_student(run_dir)
    require_run(run_dir)
    what = _cannot_push(repo_id, revision)
    if create_pr and (tag or collection or quantized):
        raise HubError(f"{what}: a pull request gets no tag, collection or copies. Leave them out, or merge first.")
    api, repo_id = _connect(repo_id, token, what, revision, tag)
    copies = quantized_repositories(run_dir, repo_id) if quantized else {}
    card, files = _prepare_files(run_dir, repo_id, api, private, copies)
    message = commit_message or "Upload student, plan, measurements and card"
    options: dict[str, Any] = {"commit_message": message, "revision": revision, "create_pr": create_pr}
    commit = _publish(api, repo_id, card, files, private=private, **options)
    _publish_copies(api, run_dir, repo_id, copies, private)
    if tag:
        make_tag(api, repo_id, tag, commit.oid)
    if collection:
        add_to_collection(api, collection, collected_models(run_dir, repo_id, copies), private=private)
    return commit


def _cannot_push(repo_id: str, revision: str | None) -> str:
    return f"Cannot push to {repo_id}" + ("" if revision is None else f" at revision {revision!r}")


def _connect(repo_id: str, token: str | None, what: str, revision: str | None, tag: str | None) -> tuple[HfApi, str]:
    """The Hub's client with a token, and the whole name of a repository; refuses names that are no names, or taken."""
    from huggingface_hub import HfApi

    require_reference("revision", revision)
    require_reference("tag", tag)
    api = HfApi(token=_require_token(repo_id, token, what), library_name="minitron-hf")
    with hub_errors(what, _REPEAT):
        if "/" not in repo_id:
            repo_id = f"{_whoami(api)['name']}/{repo_id}"
        if tag:
            require_free_tag(api, repo_id, tag)
    return api, repo_id


def _publish_copies(api: HfApi, run_dir: Path, repo_id: str, copies: Mapping[str, str], private: bool) -> None:
    """Publish quantised copies (method → repository) of a published student."""
    for method, name in copies.items():
        folder = prepare_quantized(run_dir, method, name, repo_id)
        card = (folder / "README.md").read_text(encoding="utf-8")
        message = f"Upload {repo_id.split('/')[-1]}, quantised ({method})"
        _publish(api, name, card, _checked_files(folder, str(api.token)), private=private, commit_message=message)


def _publish(
    api: HfApi, repo_id: str, card: str, files: Mapping[str, Path], *, private: bool, **options: Any
) -> CommitInfo:
    """Commit files to a repository, and make a new one public once they are there."""
    commit, is_empty = _upload(api, repo_id, card, files, private=private, **options)
    if is_empty and not private:
        still = f"The commit was made ({commit.commit_url}), but {repo_id} could not be made public"
        with hub_errors(still, f"Do so at {api.endpoint}/{repo_id}/settings."):
            with_retries(lambda: api.update_repo_settings(repo_id, private=False), is_retriable=is_retriable)
    return commit


def _prepare_files(
    run_dir: Path, repo_id: str, api: HfApi, private: bool, copies: Mapping[str, str]
) -> tuple[str, dict[str, Path]]:
    """Write `hub.json` and the card; return the card and the files to upload, none of which holds a secret."""
    token = str(api.token)
    _require_teacher_metadata(run_dir, token)
    _check_name(run_dir, repo_id, private)
    write_eval_results(run_dir, repo_id, api)
    write_artefact(run_dir / "hub.json", {"repo_id": repo_id, **({"quantized": dict(copies)} if copies else {})})
    card = write_model_card(run_dir).read_text(encoding="utf-8")
    return card, _checked_files(run_dir, token)


def _checked_files(folder: Path, token: str) -> dict[str, Path]:
    """The files of a folder to upload, none of which holds a secret."""
    files = uploaded_files(folder)
    require_no_secret(files, (token, os.environ.get("HF_TOKEN")))
    return files


def _upload(
    api: HfApi, repo_id: str, card: str, files: Mapping[str, Path], *, private: bool, **options: Any
) -> tuple[CommitInfo, bool]:
    """Have the Hub check the card, and commit the files; also return whether the repository was empty before."""
    from huggingface_hub import ModelCard

    with hub_errors(_cannot_push(repo_id, options.get("revision")), _REPEAT):
        with_retries(lambda: ModelCard(card).validate(repo_type="model"), is_retriable=is_transient)
        is_empty = with_retries(
            lambda: _make_repository(api, repo_id, private, must_exist=options.get("create_pr", False)),
            is_retriable=is_retriable,
        )
        return _commit(api, repo_id, files, **options), is_empty


def check_push(repo_id: str, *, token: str | None = None, create_pr: bool = False) -> str | None:
    """Refuse a push that cannot succeed, before the run starts.

    Args:
        repo_id: `owner/name`, or `name` for the owner of the token.
        token: Hub token; default: the one that `hf auth login` stored, or HF_TOKEN.
        create_pr: whether it opens a pull request, which every account may do in public repositories.

    Returns:
        A sentence on checks that were not possible, with the reason; None if all checks were made.

    Raises:
        HubError: if the name is invalid, there is no token, or the token has no write access to the owner.
    """
    from huggingface_hub import HfApi, constants

    what = f"Cannot push to {repo_id}"
    token = _require_token(repo_id, token, what)
    unchecked = f"Whether the access token may write to {repo_id} was not checked: "
    if constants.is_offline_mode():
        return f"{unchecked}the Hub is switched off (HF_HUB_OFFLINE)."
    try:
        account = _whoami(HfApi(token=token, library_name="minitron-hf"))
    except Exception as error:
        if is_transient(error) or is_unanswered(error):
            return f"{unchecked}the Hub does not answer ({type(error).__name__})."
        with hub_errors(what):
            raise
    with hub_errors(what):
        if problem := _missing_access(account, repo_id, create_pr):
            raise HubError(f"{what}: {problem} {NO_TOKEN}")
    return None


def _require_token(repo_id: str, token: str | None, what: str) -> str:
    """The access token; refuses invalid repository names."""
    from huggingface_hub import get_token

    if not is_repo_id(repo_id):
        raise HubError(
            f"{what}: expected `owner/name`, at most 96 letters, digits, '-', '_' and '.', without '--' and '..', got "
            f"{repo_id!r}."
        )
    token = token or get_token()
    if not token:
        raise HubError(f"{what}: there is no access token. {NO_TOKEN}")
    return token


def _whoami(api: HfApi) -> dict[str, Any]:
    return with_retries(lambda: {**(answer := api.whoami()), "name": answer["name"]}, is_retriable=is_transient)


def _missing_access(account: Mapping[str, Any], repo_id: str, create_pr: bool) -> str | None:
    """The reason why an account may not write to a repository, from its description by the Hub; None if it may.

    Args:
        account: the description.
        repo_id: the repository.
        create_pr: whether it is to open a pull request, which needs no access to the owner.
    """
    token = (account.get("auth") or {}).get("accessToken") or {}
    owner = repo_id.split("/")[0] if "/" in repo_id else account["name"]
    if token.get("role") == "read":
        return "the access token may only read."
    permissions = token.get("fineGrained")
    wanted = "open pull requests" if create_pr else "write to repositories"
    sufficient = ("repo.write", "discussion.write") if create_pr else ("repo.write",)
    if token.get("role") == "fineGrained" and permissions and not any(one in str(permissions) for one in sufficient):
        return f"the access token has no permission to {wanted}."
    if create_pr or owner == account["name"]:
        return None
    organisations = {one["name"]: one.get("roleInOrg") for one in account.get("orgs") or []}
    if owner not in organisations:
        own = ", ".join([account["name"], *organisations])
        return f"the access token belongs to {account['name']}, which may write to {own}."
    return f"{account['name']} may only read in {owner}." if organisations[owner] == "read" else None


def _make_repository(api: HfApi, repo_id: str, private: bool, *, must_exist: bool) -> bool:
    """Create a private repository unless there is one.

    Args:
        api: the Hub's client.
        repo_id: its name.
        private: whether it is to be private in the end, for a warning.
        must_exist: refuse to create it.

    Returns:
        Whether the repository is empty: new, or created by a push or a trainer that has not committed yet.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if must_exist:
            raise
        api.create_repo(repo_id, private=True, exist_ok=True)
        return True
    if info.private and not {sibling.rfilename for sibling in info.siblings or ()} - {".gitattributes"}:
        return True
    if info.private is not None and info.private != private:
        visibility = "private" if info.private else "public"
        logger.warning("%s already exists and is %s: it stays %s.", repo_id, visibility, visibility)
    return False


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    *,
    revision: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> CommitInfo:
    """Upload files and delete stale ones, in one commit.

    If the answer is lost, the commit is requested again. If it was made, the Hub has all files and makes no second
    commit. This does not hold for pull requests: a second one would be opened.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    def attempt() -> CommitInfo:
        if revision and revision != "main" and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        present = [sibling.rfilename for sibling in info.siblings or []]
        stale = [name for name in present if name not in files and is_owned(name)]
        # One list of operations is one commit, also with Xet storage, where upload_folder may make several.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            revision=revision,
            create_pr=create_pr,
            **options,
        )

    try:
        return with_retries(attempt, is_retriable=is_transient if create_pr else is_retriable)
    except Exception as error:
        if create_pr and is_unanswered(error):
            raise HubError(
                f"The Hub did not answer whether it has opened a pull request on {repo_id}. Look at "
                f"{api.endpoint}/{repo_id}/discussions before you push again."
            ) from error
        raise


def _check_name(run_dir: Path, repo_id: str, private: bool) -> None:
    """Refuse a public repository that the teacher's licence does not allow, or its name; warn of a private one."""
    path = run_dir / "teacher.json"
    teacher = read_artefact(path) if path.is_file() else {}
    problem = sharing_problem(teacher) or name_problem(repo_id, teacher)
    if problem and not private:
        raise HubError(f"Cannot push to {repo_id}: {problem}")
    if problem:
        logger.warning("%s: %s That has to be done before you share it.", repo_id, problem)


def _require_teacher_metadata(run_dir: Path, token: str) -> None:
    """Look up the teacher's licence, unless the run did. No student is published without this look-up."""
    if (run_dir / "teacher.json").is_file() or not (run_dir / "pruning_plan.json").is_file():
        return
    teacher = read_artefact(run_dir / "pruning_plan.json").get("teacher") or {}
    name = teacher.get("name_or_path")
    try:
        if not name or (local_folder(name) is None and not is_repo_id(name)):
            raise HubError(f"The teacher is recorded as {name!r}, which is neither a folder here nor a Hub id.")
        write_teacher_metadata(run_dir, name, revision=teacher.get("revision"), token=token)
    except HubError as error:
        logger.warning("%s The card will name no licence; write teacher.json to name one.", error)
