"""Reads the teacher's metadata from the Hub, and publishes run folders.

A run folder is laid out like the repository that it becomes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HubError, OutputError
from ..files import read_json, replacing_file, write_json
from .card import LEGAL_FILES, matches, write_model_card
from .card_metadata import is_repo_id
from .plots import PLOTS

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

#: What a push uploads, as patterns of paths in the run folder. Everything else is a working file and stays at home.
UPLOADED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "recipe.yaml",
    "README.md",
    *LEGAL_FILES,
    "plots/*.png",
    *(f"rounds/*/{name}" for name in ("pruning_plan.*", "pruner_config.json", "distillation.json")),
    "additional_chat_templates/*.jinja",
)
#: Exceptions to `UPLOADED`: state of a training run.
NEVER_UPLOADED = ("trainer_state.json", "optimizer*", "scheduler*", "*.tmp", ".*")

#: Files that a push owns in the repository: one that an earlier push left and this one has not is deleted, in the same
#: commit. A stale shard would be loaded, and a stale artefact would change the card when it is rendered again.
OWNED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pruning_plan.json",
    "pruning_plan.safetensors",
    "pruner_config.json",
    "scores.safetensors",
    "teacher.json",
    "distillation.json",
    "evaluation.json",
    "benchmarks.json",
    "samples.json",
    "search.json",
    "recipe.yaml",
    "hub.json",
    *(f"plots/{name}" for name in PLOTS),
    "rounds/*",
)

#: Any one of these is a tokenizer that Transformers can load.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")

_NO_TOKEN = (
    "Log in with `hf auth login`, or set HF_TOKEN or pass token= with a token that has write access "
    "(https://huggingface.co/settings/tokens)."
)
_REPEAT = "No commit was made; push again: what was already uploaded is not sent twice."


# What is known of the teacher


def write_teacher_metadata(
    run_dir: str | os.PathLike[str],
    teacher_name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write `teacher.json` from the metadata of the teacher's card, and copy its licence files.

    What the card does not say is null: nothing is guessed. `hub_id` is null for a local folder, whose name means
    nothing to readers of the student's card.

    Args:
        run_dir: the run folder.
        teacher_name_or_path: a local folder or a Hub id.
        revision: Hub revision; the commit it stands for is recorded.
        token: Hub token, for private or gated teachers.

    Returns:
        The path of `teacher.json`.

    Raises:
        HubError: if the name is neither a folder nor a model that can be found on the Hub.
        OutputError: if the run folder cannot be written.
    """
    import yaml
    from huggingface_hub import metadata_load

    run_dir = Path(run_dir)
    folder = Path(teacher_name_or_path).expanduser()
    if folder.is_dir():
        hub_id, files = None, {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        # A path would tell the world about this machine, and nothing about the teacher.
        name = folder.resolve().name
    else:
        hub_id = name = str(teacher_name_or_path)
        revision, files = _fetch_card(hub_id, revision, token)

    try:
        data = metadata_load(files["README.md"]) if "README.md" in files else None
    except (ValueError, OSError, yaml.YAMLError) as error:
        logger.warning("The card of %s cannot be read (%s); its licence is recorded as unknown.", name, error)
        data = None
    data = data or {}
    teacher = {
        "name_or_path": name,
        "hub_id": hub_id,
        "revision": revision,
        "license": _text_or_none(data.get("license")),
        "license_name": _text_or_none(data.get("license_name")),
        "license_link": _text_or_none(data.get("license_link")),
        "language": _strings(data.get("language")),
        "datasets": _strings(data.get("datasets")),
        "tags": _strings(data.get("tags")),
    }
    for file, source in files.items():
        if matches(file, LEGAL_FILES):
            with replacing_file(run_dir / file) as temporary:
                shutil.copyfile(source, temporary)
    path = run_dir / "teacher.json"
    write_json(path, teacher)
    return path


def _fetch_card(repo_id: str, revision: str | None, token: str | None) -> tuple[str | None, dict[str, Path]]:
    """Commit of a Hub model, and its card and licence files in the local cache."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    if constants.is_offline_mode():
        cached = try_to_load_from_cache(repo_id, "README.md", revision=revision)
        if not isinstance(cached, str):
            logger.warning(
                "The Hub is switched off (HF_HUB_OFFLINE) and the card of %s is not in the cache: "
                "its licence is recorded as unknown.",
                repo_id,
            )
            return revision, {}
        snapshot = Path(cached).parent
        return snapshot.name, {path.name: path for path in sorted(snapshot.iterdir()) if path.is_file()}
    with _hub_errors(f"Cannot read the card of the teacher {repo_id}", repeat=""):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = [name for name in names if name == "README.md" or ("/" not in name and matches(name, LEGAL_FILES))]
        files = {name: Path(hf_hub_download(repo_id, name, revision=info.sha, token=token)) for name in wanted}
    return info.sha, files


def _strings(value: Any) -> list[str] | None:
    """A list of strings from what a card's YAML holds in a field that takes one value or several.

    YAML reads the language code `no` as False.

    >>> _strings(["en", False]), _strings("en"), _strings(None)
    (['en', 'no'], ['en'], None)
    """
    if value is None or value == []:
        return None
    values = value if isinstance(value, list) else [value]
    return ["no" if item is False else str(item) for item in values if item is not None]


def _text_or_none(value: Any) -> str | None:
    """One string; a list of several licences is joined by nothing that the Hub knows, so its first stands for it."""
    values = _strings(value)
    return values[0] if values and len(values) == 1 else None


# Publishing


def push_student_to_hub(
    run_dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a run folder in one commit: weights, tokenizer, plan, scores, plots, evaluation, recipe and card.

    The card is rendered again first, and its metadata is checked by the Hub before anything is uploaded. An
    interrupted push can be repeated: what was uploaded is not sent twice, and when the repository already holds
    exactly these files no commit is made.

    Args:
        run_dir: the run folder. `hub.json` (the repository's name) and `README.md` are written into it.
        repo_id: `owner/name`, or `name` for the owner of the token.
        private: whether a new repository is private. The visibility of an existing one is never changed.
        token: Hub token; default: the one that `hf auth login` stored, or HF_TOKEN.
        commit_message: first line of the commit.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The commit.

    Raises:
        OutputError: if the folder holds no complete student, or cannot be written.
        HubError: if there is no token, the Hub refuses it or the metadata, or the connection breaks.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token

    run_dir = Path(run_dir)
    _require_student(run_dir)
    what = f"Cannot push to {repo_id}"
    if not is_repo_id(repo_id):
        raise HubError(f"{what}: expected `owner/name` (letters, digits, '-', '_' and '.'), got {repo_id!r}.")
    with _hub_errors(what):
        token = token or get_token()
        if not token:
            raise HubError(f"{what}: there is no access token. {_NO_TOKEN}")
        api = HfApi(token=token, library_name="minitron-hf")
        if "/" not in repo_id:
            repo_id = f"{api.whoami(cache=True)['name']}/{repo_id}"

    _require_teacher_metadata(run_dir, token)
    write_json(run_dir / "hub.json", {"repo_id": repo_id})
    content = write_model_card(run_dir).read_text(encoding="utf-8")
    files = uploaded_files(run_dir)

    with _hub_errors(what):
        ModelCard(content).validate(repo_type="model")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and revision != "main" and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if private and info.private is False:
            logger.warning("%s already exists and is public: it stays public.", repo_id)
        present = [sibling.rfilename for sibling in info.siblings or []]
        stale = [name for name in present if name not in files and matches(name, OWNED)]
        # One list of operations is one commit, also with Xet storage, where upload_folder may make several.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=commit_message or "Upload student, plan, measurements and card",
            revision=revision,
            create_pr=create_pr,
        )


def _require_teacher_metadata(run_dir: Path, token: str) -> None:
    """Look up the teacher's licence if the run did not; a student is not published without having asked."""
    if (run_dir / "teacher.json").is_file() or not (run_dir / "pruning_plan.json").is_file():
        return
    teacher = read_json(run_dir / "pruning_plan.json").get("teacher") or {}
    name = teacher.get("name_or_path")
    try:
        if not name or not (Path(name).is_dir() or is_repo_id(name)):
            raise HubError(f"The teacher is recorded as {name!r}, which is neither a folder here nor a Hub id.")
        write_teacher_metadata(run_dir, name, revision=teacher.get("revision"), token=token)
    except HubError as error:
        logger.warning("%s The card will name no licence; write teacher.json to name one.", error)


def uploaded_files(run_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Files of a run folder that a push uploads: path in the repository → local path, sorted."""
    run_dir = Path(run_dir)
    found = {}
    for pattern in UPLOADED:
        for path in run_dir.glob(pattern):
            if path.is_file() and not matches(path.name, NEVER_UPLOADED):
                found[path.relative_to(run_dir).as_posix()] = path
    return dict(sorted(found.items()))


def _require_student(run_dir: Path) -> None:
    """Refuse a folder without a student that stock Transformers can load, before anything is asked of the Hub."""
    from safetensors import SafetensorError, safe_open

    if not run_dir.is_dir():
        raise OutputError(f"{run_dir} does not exist. Give the folder of a finished run.")
    if not (run_dir / "config.json").is_file():
        raise OutputError(f"{run_dir} holds no config.json, so no student. Give the folder of a finished run.")
    index = run_dir / "model.safetensors.index.json"
    single = run_dir / "model.safetensors"
    if single.is_file() or not index.is_file():
        weights = [single]
    else:
        weights = [run_dir / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for path in weights:
        if not path.is_file():
            raise OutputError(f"{run_dir} holds no {path.name}: its student is not complete. Finish the run first.")
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} is damaged ({error}). Run the stage that writes it again.") from error
    if not any(any(run_dir.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise OutputError(
            f"{run_dir} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Save the teacher's there: "
            "AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)."
        )


@contextlib.contextmanager
def _hub_errors(what: str, repeat: str = _REPEAT) -> Iterator[None]:
    """Turn what the Hub client raises into a `HubError` that says what to do; everything else passes."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # The client's transport errors (refused or broken connections, time-outs) share the first base of its HTTP errors,
    # whose module depends on the version of huggingface_hub (httpx, httpx2).
    transport_error: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"{what}: there is no access token. {_NO_TOKEN}") from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: the Hub is switched off. Unset HF_HUB_OFFLINE.") from error
    except (OSError, RuntimeError, ValueError, transport_error) as error:
        # Workers wrap the error of an upload: the reason is the first HTTP error down the chain, or else its end.
        reason: BaseException = error
        while not isinstance(reason, HfHubHTTPError) and reason.__cause__ is not None:
            reason = reason.__cause__
        if isinstance(reason, HfHubHTTPError):
            raise HubError(f"{what}: {_http_advice(reason)}") from error
        if isinstance(error, ValueError):
            raise HubError(f"{what}: {error}") from error
        text = f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__
        raise HubError(f"{what}: the connection failed ({text}). {repeat}".rstrip()) from error


def _http_advice(error: Any) -> str:
    """What a refusal of the Hub means for the user; `error` is an `HfHubHTTPError`."""
    status = error.response.status_code
    message = (error.server_message or "").rstrip(".")
    said = f" The Hub says: {message}." if message else ""
    if status == 401:
        return f"the Hub does not accept the access token (401).{said} {_NO_TOKEN}"
    if status == 403:
        return f"the access token may not do this (403).{said} Use a token with write access to this owner."
    if status == 404:
        return f"not found, or private and not visible with this token (404).{said} Check the name and the revision."
    return f"the Hub answered {status}.{said or ' ' + str(error)}"
