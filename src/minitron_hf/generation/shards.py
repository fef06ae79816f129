"""One file of a generated corpus: rows are appended batch by batch, and the finished file is written once."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MismatchError, OutputError
from ..files import remove, write_text
from .prompts import OTHER_PROMPTS, Prompt


class Shard:
    """One file of a corpus.

    Args:
        folder: of the corpus.
        number: of the file, from 0.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"train-{number:05d}.jsonl"
        self.unfinished_path = folder / f".unfinished-{number:05d}.jsonl"
        self._rows: dict[int, dict[str, Any]] = {}

    def unfinished(self, prompts: Sequence[Prompt], digests: Sequence[str]) -> set[int]:
        """Read the rows that an interrupted call left; a torn last line is dropped.

        Args:
            prompts: prompts of the file.
            digests: digest of every prompt's token ids.

        Returns:
            The indices of these rows.

        Raises:
            MismatchError: if a row belongs to another prompt.
        """
        expected = {prompt.index: value for prompt, value in zip(prompts, digests)}
        lines = self.unfinished_path.read_bytes().split(b"\n")[:-1] if self.unfinished_path.exists() else []
        for line in lines:
            try:
                kept = json.loads(line)
            except ValueError as error:
                raise MismatchError(
                    f"{self.unfinished_path} is damaged ({error}). Delete it; its rows are generated again."
                ) from error
            if expected.get(kept["row"]["index"]) != kept["prompt"]:
                raise MismatchError(f"{self.unfinished_path} was generated from other prompts: {OTHER_PROMPTS}")
            self._rows[kept["row"]["index"]] = kept["row"]
        if self.unfinished_path.exists():  # without the torn line, which the next would be appended to
            self._truncate(sum(len(line) + 1 for line in lines))
        return set(self._rows)

    def append(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        """Add the rows of a batch, with the digests of their prompts. They are on disk when this returns.

        Raises:
            OutputError: if they cannot be written.
        """
        lines = [json.dumps({"prompt": of, "row": row}, ensure_ascii=False) for row, of in rows]
        try:
            with self.unfinished_path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.unfinished_path} cannot be written: {error.strerror or error}. Free space; the same call then "
                "resumes."
            ) from error
        for row, _ in rows:
            self._rows[row["index"]] = dict(row)

    def finish(self) -> None:
        """Write the file, its rows in the order of their prompts."""
        lines = [json.dumps(self._rows[index], ensure_ascii=False) for index in sorted(self._rows)]
        write_text(self.path, "".join(f"{line}\n" for line in lines))
        remove(self.unfinished_path, missing_ok=True)

    def entry(self, prompts_digest: str) -> dict[str, Any]:
        """What the record says of the finished file.

        Args:
            prompts_digest: digest of its prompts.
        """
        with contextlib.suppress(OSError):  # finished, and the call was killed before it removed this
            self.unfinished_path.unlink()
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
        return {
            "file": self.path.name,
            "num_rows": len(rows),
            "num_new_tokens": sum(row["num_new_tokens"] for row in rows),
            "num_finished": sum(row["finished"] for row in rows),
            "digest": prompts_digest,
        }

    def _truncate(self, size: int) -> None:
        with self.unfinished_path.open("r+b") as file:
            file.truncate(size)
