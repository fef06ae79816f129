"""What a push uploads: the names that this package and `save_pretrained` write, and nothing else of the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import MismatchError, OutputError
from ..files import read_json
from ..privacy import SECRET, is_outside_folder
from .card_values import REPORT_NAME, legal_files, round_folders
from .eval_results import EVAL_RESULTS_NAME
from .plots import PLOTS

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
#: Weights of an adapter, as PEFT names them.
ADAPTER_NAME = "adapter_model.safetensors"
#: Names of the parts of weights that are too large for one file.
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

#: Files of tokenizers; Transformers can load a tokenizer that has any one of them.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
)
#: The other files of models, tokenizers and processors.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "merges.txt",
    "bpe.codes",
    "emoji.json",
)
#: Folder of the named chat templates of a tokenizer. The tokenizer loads all files in it.
TEMPLATES = "additional_chat_templates"

#: Files of the stages, at the root and in the folder of every round before the last.
ROUND_ARTEFACTS = ("pruning_plan.json", "pruning_plan.safetensors", "pruner_config.json", "distillation.json")
ARTEFACTS = (
    *ROUND_ARTEFACTS,
    "scores.safetensors",
    "teacher.json",
    "evaluation.json",
    "benchmarks.json",
    "samples.json",
    "costs.json",
    "search.json",
    "recipe.yaml",
    "hub.json",
    "README.md",
    REPORT_NAME,
    EVAL_RESULTS_NAME,
    *(f"plots/{name}" for name in PLOTS),
)

#: Values of a model on every document of a benchmark task.
_DOCUMENTS = r"benchmarks/[\w.-]+\.json"

#: Files that a push manages in the repository. It deletes files of earlier pushes that the folder no longer has, in
#: the same commit. Otherwise a stale shard would be loaded, and a stale file would change a card that is rendered
#: again.
_OWNED = re.compile(
    "|".join(
        (
            r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?",
            r"rounds/\d+/[^/]+",
            _DOCUMENTS,
            *(re.escape(name) for name in ARTEFACTS if name != "README.md"),
        )
    )
)


def is_owned(name: str) -> bool:
    """Whether a path in a repository is one that pushes write and delete."""
    return _OWNED.fullmatch(name) is not None


def uploaded_files(run_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Files of a run folder that a push uploads: path in the repository → local path, sorted.

    Raises:
        OutputError: if one of them is a link out of the folder.
    """
    run_dir = Path(run_dir)
    found = {name: run_dir / name for name in sorted(_names(run_dir)) if (run_dir / name).is_file()}
    for name, path in found.items():
        if is_outside_folder(path, run_dir):
            raise OutputError(
                f"{path} is a link to {path.resolve()}, outside of the folder, and is not published. "
                f"Replace it by a copy: cp --remove-destination $(readlink -f {name}) {name}"
            )
    return found


def _names(run_dir: Path) -> Iterator[str]:
    """The names that belong to a student and its run, there or not."""
    yield from (*SETTINGS, *VOCABULARIES, *ARTEFACTS, *legal_files(run_dir))
    yield from weight_names(run_dir)
    if not (run_dir / WEIGHTS_NAME).is_file():
        yield INDEX_NAME
    for template in (run_dir / TEMPLATES).glob("*.jinja"):
        yield f"{TEMPLATES}/{template.name}"
    for folder in round_folders(run_dir):
        yield from (f"rounds/{folder.name}/{name}" for name in ROUND_ARTEFACTS)
    yield from _documents_of_benchmarks(run_dir / "benchmarks.json")


def _documents_of_benchmarks(path: Path) -> Iterator[str]:
    """Files with the values on every document that `benchmarks.json` was made from."""
    if not path.is_file():
        return
    named = read_json(path).get("documents")
    for files in named.values() if isinstance(named, Mapping) else ():
        for name in files.values() if isinstance(files, Mapping) else ():
            if re.fullmatch(_DOCUMENTS, str(name)):
                yield str(name)


def weight_names(run_dir: Path) -> list[str]:
    """Names of the files that hold a student's weights: one, or those that its index names.

    Raises:
        OutputError: if the index names anything but its parts.
    """
    index = run_dir / INDEX_NAME
    if (run_dir / WEIGHTS_NAME).is_file() or not index.is_file():
        return [WEIGHTS_NAME]
    try:
        named = read_json(index).get("weight_map")
    except MismatchError as error:
        raise OutputError(f"{error}") from error
    names = sorted({str(name) for name in named.values()}) if isinstance(named, Mapping) else []
    strange = [name for name in names if not SHARD.fullmatch(name)]
    if strange or not names:
        raise OutputError(
            f"{index} names {', '.join(map(repr, strange[:3])) or 'no files'}, expected parts such as "
            "'model-00001-of-00002.safetensors' in its own folder. Save the student again with save_pretrained."
        )
    return names


def require_weights(run_dir: Path) -> None:
    """Refuse a folder without the weights of a student, or of an adapter.

    Raises:
        OutputError: naming the files that are looked for.
    """
    if not any((run_dir / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME, ADAPTER_NAME)):
        raise OutputError(
            f"{run_dir} holds no {WEIGHTS_NAME}, {INDEX_NAME} or {ADAPTER_NAME}: there is no student to describe. "
            "Give the folder of a finished run."
        )


def require_student(run_dir: Path) -> None:
    """Refuse a folder without a student that stock Transformers can load, before anything is asked of the Hub.

    Raises:
        OutputError: naming what is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not run_dir.is_dir():
        raise OutputError(f"{run_dir} does not exist. Give the folder of a finished run.")
    if not (run_dir / "config.json").is_file():
        raise OutputError(f"{run_dir} holds no config.json, so no student. Give the folder of a finished run.")
    for name in weight_names(run_dir):
        path = run_dir / name
        if not path.is_file():
            raise OutputError(f"{run_dir} holds no {name}: its student is not complete. Finish the run first.")
        try:
            with safe_open(path, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{path} is damaged ({error}). Run the stage that writes it again.") from error
    if not any((run_dir / name).is_file() for name in VOCABULARIES):
        raise OutputError(
            f"{run_dir} holds no tokenizer (looked for {', '.join(VOCABULARIES)}). Save the teacher's there: "
            "AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)."
        )


def require_no_secret(files: Mapping[str, Path], known: Iterable[str | None]) -> None:
    """Refuse to upload what holds an access token.

    Args:
        files: path in the repository → local path.
        known: tokens that are in use here; anything else is recognised by its form, except in vocabularies.

    Raises:
        OutputError: naming the file.
    """
    tokens = [token.encode() for token in known if token]
    for name, path in files.items():
        content = _readable_part(path)
        found = any(token in content for token in tokens)
        if not found and Path(name).name not in (*VOCABULARIES, "merges.txt", "bpe.codes"):
            found = SECRET.search(content.decode("utf-8", "replace")) is not None
        if found:
            raise OutputError(
                f"{path} holds what looks like an access token or a private key, and nothing was uploaded. Remove it "
                "there; if it was ever published, revoke it (https://huggingface.co/settings/tokens)."
            )


def _readable_part(path: Path) -> bytes:
    """A file's bytes; of weights, the header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(int.from_bytes(file.read(8), "little"), 100 << 20))
        return file.read()
