"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two cores are often shared with other test workers; more threads than cores cost several times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real models and text, named by MINITRON_TEST_DATA; tests that need it are skipped without it."""
    name = os.environ.get("MINITRON_TEST_DATA")
    if not name or not Path(name).is_dir():
        pytest.skip("MINITRON_TEST_DATA does not name a folder of real models and text")
    return Path(name)
