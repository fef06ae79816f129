"""What `make survey` lists, against records that were changed by hand, and the record of this repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from minitron_hf.compat import decoder_types, image_text_types
from minitron_hf.families import REFUSED, families, wrapped_families
from minitron_hf.survey.changes import code_digest, main, modelling_digest, survey, to_record

RECORD = Path(__file__).parents[1] / "tools" / "survey.json"


@pytest.fixture(scope="module")
def found():
    return survey({})


@pytest.mark.slow
def test_everything_is_new_without_a_record(found):
    known = {*families(), *(outer for outer, _ in wrapped_families()), *REFUSED}
    assert set(found.without_table) == {*decoder_types(), *image_text_types()} - known
    assert "bert" in found.without_table
    assert "llama" not in found.without_table
    assert found.changed == found.missing == ()
    assert len(found.modelling_files) > 100


@pytest.mark.slow
def test_what_was_looked_at_is_not_listed_again(found):
    record = to_record(found, {})
    again = survey(record)
    assert again.lines() == []
    assert to_record(again, record) == record


@pytest.mark.slow
def test_changed_files_and_new_types_are_listed(found):
    record = to_record(found, {})
    record["modelling_files"]["llama"] = "0" * 16
    record["without_table"].remove("bert")
    assert survey(record).lines() == [
        "no table for the decoder or wrapper: bert",
        "read the modelling file again, it changed: llama",
    ]


def test_a_name_that_moved_is_listed(monkeypatch):
    from minitron_hf.compat import WRAPPED, ForeignName

    monkeypatch.setattr("minitron_hf.survey.changes.WRAPPED", [*WRAPPED, ForeignName("trl.gone", "trl 1.0", "a test")])
    assert survey({}).missing == ("trl.gone (trl 1.0)",)


def test_comments_and_docstrings_are_no_change():
    one = 'def f(x):\n    """Says."""\n    return x + 1  # more\n'
    assert code_digest(one) == code_digest("def f(x):\n\n    return (x + 1)\n")
    assert code_digest(one) != code_digest(one.replace("+ 1", "+ 2"))
    assert modelling_digest("llama") != modelling_digest("mistral")
    assert modelling_digest("no_such_type") is None


def test_the_command_prints_writes_and_says_by_its_exit_code(tmp_path, capsys):
    record = tmp_path / "survey.json"
    assert main([str(record)]) == 1
    assert "no table for the decoder or wrapper: bert" in capsys.readouterr().out
    assert not record.exists()
    assert main([str(record), "--write"]) == 0
    assert main([str(record)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 to look at.")


def test_the_record_is_that_of_the_tested_version():
    record = json.loads(RECORD.read_text())
    if record["transformers"] != transformers.__version__:
        pytest.skip("another Transformers than the tested one")
    assert survey(record).lines() == []
