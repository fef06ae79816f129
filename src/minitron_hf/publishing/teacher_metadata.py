"""`teacher.json`: what the card of the teacher says of it, and the licence files that go with it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import replacing_file
from ..formats import write_artefact
from ..names import is_repo_id, local_folder, public_name
from ..privacy import is_outside_folder
from .card_values import BASE_RELATIONS, LEGAL_FILES, matches
from .hub_errors import hub_errors
from .licences import write_legal_texts

logger = logging.getLogger(__name__)


def write_teacher_metadata(
    run_dir: str | os.PathLike[str],
    teacher_name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write `teacher.json` from the metadata of the teacher's card, and the legal texts that go with the weights.

    The teacher's licence files are copied. Of licences that ask for an attribution or a copy, these texts are written
    where the teacher has none.

    What the card does not say is null: nothing is guessed. `hub_id` is null for a local folder, whose name means
    nothing to readers of the student's card. They get the `base_model` of its card, if that is one model of the Hub.

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
    run_dir = Path(run_dir)
    folder = local_folder(teacher_name_or_path)
    if folder is not None:
        hub_id, files = None, _own_files(folder)
        # A local path must not be published.
        name = public_name(folder)
    else:
        hub_id = name = str(teacher_name_or_path)
        revision, files = _fetch_card(hub_id, revision, token)

    data = _card_metadata(files.get("README.md"), name)
    teacher: dict[str, Any] = {
        "name_or_path": name,
        "hub_id": hub_id,
        "revision": revision,
        "license": _text_or_none(data.get("license")),
        "license_name": _text_or_none(data.get("license_name")),
        "license_link": _text_or_none(data.get("license_link")),
        "language": _strings(data.get("language")),
        "datasets": _strings(data.get("datasets")),
        "tags": _strings(data.get("tags")),
        **(_base_model(data) if hub_id is None else {}),
        "legal_files": [file for file in files if matches(file, LEGAL_FILES)] or None,
    }
    for file in teacher["legal_files"] or ():
        with replacing_file(run_dir / file) as temporary:
            shutil.copyfile(files[file], temporary)
    path = run_dir / "teacher.json"
    write_artefact(path, teacher)
    write_legal_texts(run_dir, teacher)
    return path


def _card_metadata(card: Path | None, name: str | None) -> dict[str, Any]:
    """The YAML block of a model card; empty where there is none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return (None if card is None else metadata_load(card)) or {}
    except (ValueError, OSError, yaml.YAMLError) as error:
        logger.warning("The card of %s cannot be read (%s); its licence is recorded as unknown.", name, error)
        return {}


def _base_model(data: Mapping[str, Any]) -> dict[str, str]:
    """The one model of the Hub that a card names as its base, and how the model was made from it."""
    named, relation = data.get("base_model"), data.get("base_model_relation")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    if len(names) != 1 or "/" not in str(names[0]) or not is_repo_id(str(names[0])):
        return {}
    return {"base_model": names[0]} | ({"base_model_relation": relation} if relation in BASE_RELATIONS else {})


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
        return snapshot.name, _own_files(snapshot)
    at = "" if revision is None else f" at revision {revision!r}"
    with hub_errors(f"Cannot read the card of the teacher {repo_id}{at}"):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = [name for name in names if name == "README.md" or ("/" not in name and matches(name, LEGAL_FILES))]
        files = {name: Path(hf_hub_download(repo_id, name, revision=info.sha, token=token)) for name in wanted}
    return info.sha, files


def _own_files(folder: Path) -> dict[str, Path]:
    """Name → path of a folder's files, without links that lead out of it: their targets are not the teacher's."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    for name in [name for name, path in files.items() if is_outside_folder(path, folder)]:
        del files[name]
        if name == "README.md" or matches(name, LEGAL_FILES):
            logger.warning("%s is a link out of its folder and is left out. Copy the file there.", folder / name)
    return files


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
