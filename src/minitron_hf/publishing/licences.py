"""What the licence of a teacher asks of its student, and the texts that carry it out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text

_CHANGES = "The weights were changed: the model was pruned and distilled with minitron-hf."


@dataclass(frozen=True)
class Duties:
    """What a licence asks of derived models.

    Attributes:
        licence: pattern of the licence's id or name on the Hub, in lower case without hyphens and spaces.
        text: sentences of the card.
        notice: content of the file `NOTICE` that the licence asks for; `{version}` is what the pattern's group found.
        name_start: how the name of a derived model must begin, for people.
        forbids_sharing: whether derived models may not be shared.
    """

    licence: str
    text: str
    notice: str | None = None
    name_start: str | None = None
    forbids_sharing: bool = False


_META = "Copyright © Meta Platforms, Inc. All Rights Reserved."
_LLAMA_NAME = "Built with Llama. This licence asks that the name of a derived model begins with “{}”."

#: The licences that ask for more than to be named. The first that matches holds.
LICENCES = (
    Duties(
        r"(meta)?llama3(communitylicense)?",
        _LLAMA_NAME.format("Llama 3"),
        f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_META}",
        "Llama-3",
    ),
    Duties(
        r"(?:meta)?llama(3\.\d|4).*",
        _LLAMA_NAME.format("Llama"),
        f"Llama {{version}} is licensed under the Llama {{version}} Community License, {_META}",
        "Llama",
    ),
    Duties(
        r"llama2.*",
        "The licence and its use policy hold for derived models, too.",
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        "Reserved.",
    ),
    Duties(
        r"gemma.*",
        "The Gemma terms ask that modified files say so (this card does), and that the terms and their use "
        "restrictions are passed on to everyone who gets the model.",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    Duties(
        r"nvidiaopenmodel.*",
        "This licence asks for the notice in `NOTICE` and that its text goes with the model.",
        "Licensed by NVIDIA Corporation under the NVIDIA Open Model License",
    ),
    Duties(r"(?:qwen|tongyi).*", "Built with Qwen. This licence asks that derived models say so."),
    Duties(
        r"apache2\.0",
        "Its text and the teacher's notices go with the weights, and changes are stated: the weights were modified as "
        "described above.",
    ),
    Duties(r"(mit|bsd.*)", "It asks that its copyright notice goes with the weights."),
    Duties(r".*openrail.*", "Its use restrictions hold for derived models, too, and must be passed on."),
    Duties(
        r"ccby(?:nc)?nd.*",
        "It forbids sharing changed versions, and a pruned model is one.",
        forbids_sharing=True,
    ),
    Duties(
        r"ccbyncsa.*", "It forbids commercial use of the model, and asks that derived models carry the same licence."
    ),
    Duties(r"ccby.*nc.*", "It forbids commercial use of the model."),
    Duties(r"ccbysa.*", "It asks that derived models carry the same licence."),
)


def duties_of(teacher: Mapping[str, Any]) -> Duties | None:
    """What the teacher's licence asks for; None if it is unknown, or asks for nothing that is known here.

    Args:
        teacher: content of `teacher.json`.
    """
    found = _matching(teacher)
    return found[0] if found else None


def _matching(teacher: Mapping[str, Any]) -> tuple[Duties, str] | None:
    """The duties, and the version in the licence's name."""
    names = [
        re.sub(r"[-_ ]", "", str(teacher[key]).lower()) for key in ("license", "license_name") if teacher.get(key)
    ]
    for duties in LICENCES:
        for name in names:
            if match := re.fullmatch(duties.licence, name):
                return duties, (match.groups() or ("",))[0] or ""
    return None


def write_legal_texts(run_dir: Path, teacher: Mapping[str, Any]) -> None:
    """Write the texts that the teacher's licence asks for and that the teacher's repository does not have.

    `NOTICE` is the licence's attribution; `LICENSE` is the text of the Apache licence. Files that exist stay.

    Args:
        run_dir: the run folder.
        teacher: content of `teacher.json`.
    """
    found = _matching(teacher)
    if found is None:
        return
    duties, version = found
    if duties.notice and not any(run_dir.glob("NOTICE*")):
        write_text(run_dir / "NOTICE", f"{duties.notice.format(version=version)}\n\n{_CHANGES}\n")
    if duties.licence.startswith("apache") and not [*run_dir.glob("LICENSE*"), *run_dir.glob("LICENCE*")]:
        packaged = Path(__file__).parent / "templates" / "apache-2.0.txt"
        write_text(run_dir / "LICENSE", packaged.read_text(encoding="utf-8"))


def sharing_problem(teacher: Mapping[str, Any]) -> str | None:
    """Why a student may not be shared under the teacher's licence; None if nothing speaks against it.

    Args:
        teacher: content of `teacher.json`.

    >>> sharing_problem({"license": "apache-2.0"})
    >>> sharing_problem({"license": "cc-by-nc-nd-4.0"})
    "the teacher's licence (cc-by-nc-nd-4.0) forbids sharing changed versions. Ask its owner for leave."
    """
    duties = duties_of(teacher)
    if duties is None or not duties.forbids_sharing:
        return None
    return f"the teacher's licence ({_known_as(teacher)}) forbids sharing changed versions. Ask its owner for leave."


def name_problem(name: str, teacher: Mapping[str, Any]) -> str | None:
    """What is wrong with the name of a repository under the teacher's licence; None if nothing is.

    Args:
        name: `owner/name` or `name`.
        teacher: content of `teacher.json`.

    >>> name_problem("me/Llama-3.2-0.7B", {"license": "llama3.2"})
    >>> name_problem("me/tiny", {"license": "llama3.2"})
    "the teacher's licence (llama3.2) asks that the name begins with 'Llama', such as me/Llama-tiny."
    """
    duties = duties_of(teacher)
    if duties is None or duties.name_start is None:
        return None
    owner, _, own = name.rpartition("/")
    plain = re.sub(r"[-_. ]", "", own.lower())
    if plain.startswith(re.sub(r"[-_. ]", "", duties.name_start.lower())):
        return None
    better = f"{owner}/{duties.name_start}-{own}" if owner else f"{duties.name_start}-{own}"
    asked = f"asks that the name begins with {duties.name_start!r}, such as {better}."
    return f"the teacher's licence ({_known_as(teacher)}) {asked}"


def _known_as(teacher: Mapping[str, Any]) -> Any:
    return teacher["license"] if teacher.get("license") != "other" else teacher.get("license_name")
