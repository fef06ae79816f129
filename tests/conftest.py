"""Fixtures shared by all tests, and the processor that the tests see.

Whether this processor computes bfloat16 decides the dtypes of models. `MINITRON_TEST_BF16=0` (or `1`) runs all tests
as on a processor without it (or with it); tests marked `either_cpu` run as on both.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Generator, Iterator
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


@pytest.fixture(scope="session", autouse=True)
def _chosen_cpu() -> Iterator[None]:
    """The processor that MINITRON_TEST_BF16 names; commands that tests start in other processes see the real one."""
    wanted = os.environ.get("MINITRON_TEST_BF16")
    with pytest.MonkeyPatch.context() as patch:
        if wanted is not None:
            from minitron_hf import hardware

            patch.setattr(hardware, "_cpu_has_bf16", lambda: wanted == "1")
        yield


@pytest.fixture
def cpu_has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor of a test marked `either_cpu` computes bfloat16."""
    from minitron_hf import hardware

    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: request.param)
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("either_cpu"):
        if "cpu_has_bf16" not in metafunc.fixturenames:
            metafunc.fixturenames.append("cpu_has_bf16")
        metafunc.parametrize("cpu_has_bf16", [True, False], ids=["bf16_cpu", "plain_cpu"], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes most families, or cases, slow in the tests marked `sampled`: other families in each test."""
    places: dict[str, dict[str, int]] = {}
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            test, _, _ = item.nodeid.partition("[")
            known = places.setdefault(test, {})
            case = item.callspec  # type: ignore[attr-defined]
            place = known.setdefault(case.params.get("name", case.id), len(known))
            if (place + zlib.crc32(test.encode())) % sampled.args[0]:
                item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the many objects of 10,000 tests out of garbage collection, which otherwise takes half of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
