"""Makes the corpora and held-out texts of a benchmark: one JSONL file each, and `corpora.json` with their origin.

A source is a file or a Hub dataset. Its documents are shuffled with the seed of the mix; the first `count` go into the
mix, the rest is left over: `--hold-out` takes held-out documents from there, so that they are never trained on.
Run from the repository root, for example:

    python -m benchmarks.real.corpora work/data --mix books.jsonl:600 --mix peps.jsonl:600 --mix stories.jsonl:1500 \
        --corpus stories=stories.jsonl --hold-out peps=peps.jsonl:200 --held-out wikitext2=wikitext2_valid.jsonl

A Hub dataset is named as its loader wants it, `ID`, `ID/CONFIG@SPLIT`: `Salesforce/wikitext/wikitext-2-raw-v1@test`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_hf import load_text_dataset
from minitron_hf.files import file_digest, read_json, write_json, write_text
from minitron_hf.names import public_name

MANIFEST_NAME = "corpora.json"
TEXT_FIELD = "text"


def read_texts(source: str) -> list[str]:
    """Non-empty texts of a file or a Hub dataset."""
    path, name, split = source, None, "train"
    if not Path(source).exists():
        path, _, split = source.partition("@")
        if path.count("/") > 1:
            path, _, name = path.rpartition("/")
    dataset = load_text_dataset(path, name=name, split=split or "train")
    return [row[TEXT_FIELD] for row in dataset if row[TEXT_FIELD].strip()]


def mixed(sources: Sequence[tuple[str, int]], seed: int = 0) -> tuple[list[str], dict[str, list[str]]]:
    """A shuffled mix of documents, and the unused documents of each source.

    Args:
        sources: source and number of documents, in the order in which they are shuffled.
        seed: seed of all shuffles.
    """
    order, documents, left = random.Random(seed), [], {}
    for source, count in sources:
        texts = read_texts(source)
        order.shuffle(texts)
        if count > len(texts):
            raise ValueError(f"{source} has {len(texts)} documents, {count} were asked for. Lower the count.")
        documents += texts[:count]
        left[source] = texts[count:]
    order.shuffle(documents)
    return documents, left


class Corpora:
    """Writes the files of a folder and records the origin of their documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {"train": {}, "held_out": {}}

    def add(self, kind: str, name: str, texts: Iterable[str], origin: Mapping[str, Any]) -> None:
        """Write one file; `kind` is `"train"` or `"held_out"`."""
        path = Path(kind) / f"{name}.jsonl"
        lines = [json.dumps({TEXT_FIELD: text}) + "\n" for text in texts]
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / path, "".join(lines))
        self.entries[kind][name] = {
            "file": path.as_posix(),
            "documents": len(lines),
            "digest": file_digest(self.folder / path),
            **origin,
        }

    def finish(self) -> None:
        """Write `corpora.json`."""
        write_json(self.folder / MANIFEST_NAME, self.entries)


def corpus_files(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The entries of `corpora.json`, with paths of the files."""
    entries = read_json(folder / MANIFEST_NAME)
    return {
        kind: {name: {**entry, "file": str(folder / entry["file"])} for name, entry in found.items()}
        for kind, found in entries.items()
    }


def given_file(path: str) -> dict[str, Any]:
    """The entry of a file that was not written here."""
    return {"file": path, "digest": file_digest(path), "sources": [{"source": public_name(path)}]}


def main() -> None:
    """Write the corpora that the command line names."""
    arguments = parse_arguments()
    corpora = Corpora(arguments.folder)
    left: dict[str, list[str]] = {}
    if arguments.mix:
        sources = [(source, int(count)) for source, _, count in (given.rpartition(":") for given in arguments.mix)]
        documents, left = mixed(sources, arguments.seed)
        origin = [{"source": public_name(source), "documents": count} for source, count in sources]
        corpora.add("train", "mixed", documents, {"seed": arguments.seed, "sources": origin})
    for name, given in _named(arguments.hold_out):
        source, _, count = given.rpartition(":")
        if source not in left:
            raise SystemExit(f"--hold-out {name}={source}: not among the sources of --mix.")
        documents, left[source] = left[source][: int(count)], left[source][int(count) :]
        origin = {"seed": arguments.seed, "sources": [{"source": public_name(source), "part": "left out of the mix"}]}
        corpora.add("held_out", name, documents, origin)
    for name, source in _named(arguments.corpus):
        held_out = {
            text
            for entry in corpora.entries["held_out"].values()
            for text in read_texts(str(arguments.folder / entry["file"]))
        }
        documents = [text for text in read_texts(source) if text not in held_out]
        corpora.add("train", name, documents, {"sources": [{"source": public_name(source)}]})
    for name, source in _named(arguments.held_out):
        corpora.add("held_out", name, read_texts(source), {"sources": [{"source": public_name(source)}]})
    corpora.finish()
    for kind, entries in corpora.entries.items():
        for name, entry in entries.items():
            print(f"{kind} {name}: {entry['documents']:,} documents, {entry['digest'][:19]}")


def _named(given: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, source) for name, _, source in (one.partition("=") for one in given)]


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mix", action="append", default=[], metavar="SOURCE:COUNT", help="a part of the mix")
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=SOURCE", help="another corpus")
    parser.add_argument(
        "--hold-out", action="append", default=[], metavar="NAME=SOURCE:COUNT", help="of what --mix left"
    )
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=SOURCE", help="a held-out text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
