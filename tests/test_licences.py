"""What a teacher's licence asks of a student is on the card, in the files beside it and in the repository's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_hf.publishing.card import render_model_card
from minitron_hf.publishing.hub import write_teacher_metadata
from minitron_hf.publishing.licences import duties_of, name_problem, sharing_problem
from run_folder import TEACHER, write_json, write_run

APACHE = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
META = "Copyright © Meta Platforms, Inc. All Rights Reserved."


def texts(tmp_path: Path, card: str, **files: str) -> dict[str, str]:
    """The legal texts that a run gets from a teacher with this card and these files."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    for folder in (teacher, run):
        folder.mkdir()
    (teacher / "README.md").write_text(f"---\n{card}\n---\n")
    for name, text in files.items():
        (teacher / name).write_text(text)
    write_teacher_metadata(run, teacher)
    return {path.name: path.read_text(encoding="utf-8") for path in run.iterdir() if path.name != "teacher.json"}


@pytest.mark.parametrize(
    ("card", "notice"),
    [
        ("license: llama3", f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {META}"),
        ("license: llama3.2", f"Llama 3.2 is licensed under the Llama 3.2 Community License, {META}"),
        (
            "license: other\nlicense_name: llama-3.3",
            f"Llama 3.3 is licensed under the Llama 3.3 Community License, {META}",
        ),
        ("license: llama4", f"Llama 4 is licensed under the Llama 4 Community License, {META}"),
        (
            "license: llama2",
            "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
            "Reserved.",
        ),
        (
            "license: gemma",
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        ),
        (
            "license: other\nlicense_name: nvidia-open-model-license",
            "Licensed by NVIDIA Corporation under the NVIDIA Open Model License",
        ),
    ],
)
def test_the_notice_that_a_licence_prescribes_is_written(tmp_path, card, notice):
    found = texts(tmp_path, card)
    assert set(found) == {"NOTICE"}
    first, _, rest = found["NOTICE"].partition("\n\n")
    assert first == notice
    assert "changed" in rest


def test_texts_of_the_teacher_stay_as_they_are(tmp_path):
    found = texts(tmp_path, "license: llama3.2", NOTICE="Ours.", LICENSE="Terms.")
    assert found == {"NOTICE": "Ours.", "LICENSE": "Terms."}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("license: apache-2.0", {"LICENSE": APACHE}),
        ("license: mit", {}),
        ("license: cc-by-4.0", {}),
        ("language: en", {}),
    ],
)
def test_other_licences_get_the_text_that_is_known(tmp_path, card, expected):
    assert texts(tmp_path, card) == expected


@pytest.mark.parametrize(
    ("licence", "words", "may_share"),
    [
        ("cc-by-nc-4.0", "commercial use", True),
        ("cc-by-nc-sa-4.0", "same licence", True),
        ("cc-by-nd-4.0", "sharing changed versions", False),
        ("cc-by-nc-nd-4.0", "sharing changed versions", False),
    ],
)
def test_duties_of_creative_commons(licence, words, may_share):
    assert words in duties_of({"license": licence}).text
    assert (sharing_problem({"license": licence}) is None) == may_share


@pytest.mark.parametrize(
    ("licence", "name", "better"),
    [
        ("llama3.2", "me/tiny-model", "me/Llama-tiny-model"),
        ("llama3.2", "me/Llama-3.2-0.7B", None),
        ("llama3.1", "me/llama_small", None),
        ("llama4", "model", "Llama-model"),
        ("llama3", "me/Llama-small", "me/Llama-3-Llama-small"),
        ("llama3", "me/Llama3-small", None),
        ("llama2", "me/tiny", None),
        ("apache-2.0", "me/tiny", None),
        (None, "me/tiny", None),
    ],
)
def test_names_begin_as_the_licence_asks(licence, name, better):
    problem = name_problem(name, {"license": licence, "license_name": None})
    assert (problem is None) == (better is None)
    assert better is None or f"such as {better}." in problem


def test_the_card_names_duties_and_texts(tmp_path):
    folder = write_run(tmp_path / "run")
    write_json(folder / "teacher.json", TEACHER | {"license": "llama3.2"})
    content = render_model_card(folder)
    assert "\n# Llama-stories-10M-minitron\n" in content
    assert "Built with Llama." in content
    assert "Legal texts that go with the weights: [LICENSE](LICENSE)." in content
    (folder / "LICENSE").unlink()
    assert (
        "has no text of its licence. If you add one as `LICENSE` to this folder, it is published"
        in render_model_card(folder)
    )


@pytest.mark.parametrize("link", ["javascript://%0aalert(1)", "terms.pdf", "https://example.org/a b<c>"])
def test_a_link_that_is_no_address_is_not_linked(tmp_path, link):
    folder = write_run(tmp_path / "run")
    write_json(folder / "teacher.json", TEACHER | {"license": "other", "license_name": "own", "license_link": link})
    assert json.dumps(link)[1:-1] not in render_model_card(folder).split("## Licence")[1]
