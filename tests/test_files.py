"""Writes that are whole or not at all, what killed ones leave, digests of large files, and one run in a folder."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_hf import file_digests, files
from minitron_hf.data.loading import local_dataset
from minitron_hf.distillation.checks import refuse_launch
from minitron_hf.errors import DataError, DistributedError, HubError, OutputError
from minitron_hf.file_digests import cached_file_digest, cached_files_digest
from minitron_hf.files import move_into, remove, remove_abandoned, replacing_file, replacing_folder, require_empty
from minitron_hf.locks import LOCK_NAME, launched_processes, locked_folder
from minitron_hf.names import local_folder, local_path


def killed(code: str, *arguments: object) -> None:
    """Run code in a process that kills itself."""
    script = f"import os, signal, sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n{code}\n"
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_what_a_killed_write_leaves_is_cleared_by_the_next(tmp_path):
    killed(
        f"""
from minitron_hf.files import replacing_file, replacing_folder
with replacing_file(folder / "a.txt") as file, replacing_folder(folder / "b") as inner:
    (inner / "half").write_text("x")
    file.write_text("half")
    {KILL}
""",
        tmp_path,
    )
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert all(name.startswith(".") for name in left)
    assert require_empty(tmp_path) == tmp_path, "working files of a killed process are nobody's files"
    with replacing_file(tmp_path / "a.txt") as file:
        file.write_text("whole")
    with replacing_folder(tmp_path / "b") as inner:
        (inner / "whole").write_text("x")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a.txt", "b", "b/whole"]


def test_a_write_of_a_living_process_is_left_alone(tmp_path):
    with replacing_file(tmp_path / "a") as first, replacing_file(tmp_path / "a") as second:
        remove_abandoned(tmp_path)
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"


def test_a_folder_is_replaced_by_renaming(tmp_path, monkeypatch):
    """Nobody sees a part of the old folder or of the new one."""
    for name in "abcdef":
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("old")
    seen = []
    delete = files.shutil.rmtree

    def watched(path, **kwargs):
        seen.append(sorted(file.read_text() for file in (tmp_path / "model").glob("*")))
        delete(path, **kwargs)

    monkeypatch.setattr(files.shutil, "rmtree", watched)
    with replacing_folder(tmp_path / "model") as temporary:
        (temporary / "a").write_text("new")
    assert seen == [[], ["new"]]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_move_into_a_folder_that_has_the_same_folders(tmp_path):
    """As `additional_chat_templates` of a student that is saved again."""
    for name in ("new", "model"):
        (tmp_path / name / "templates").mkdir(parents=True)
        (tmp_path / name / "templates" / f"{name}.jinja").write_text(name)
        (tmp_path / name / "config.json").write_text(name)
    move_into(tmp_path / "new", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model" / "templates").iterdir()] == ["new.jinja"]
    assert (tmp_path / "model" / "config.json").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_and_folders_get_the_users_permissions_without_touching_the_umask(tmp_path, monkeypatch, umask):
    """The umask is of the whole process: a thread that reads it by setting it opens the files of all others."""
    before = os.umask(umask)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        with replacing_file(tmp_path / "file") as temporary:
            temporary.unlink()  # as safetensors does: a new file, for the owner alone
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / "within").mkdir()
            os.close(os.open(temporary / "within" / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        monkeypatch.undo()
        os.umask(before)
    names = ("file", "folder", "folder/within/model.safetensors")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["within"]


def test_a_digest_is_computed_anew_when_any_byte_changes(tmp_path, monkeypatch):
    """Also in the middle of the file, with the size and the time of modification as they were."""
    monkeypatch.setattr(file_digests, "CACHED_DIGEST_BYTES", 1 << 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(5 << 20))
    before, times = cached_file_digest(path), path.stat()
    assert before == files.file_digest(path)
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"\x01")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cached_file_digest(path) == files.file_digest(path) != before


def test_the_digest_of_a_large_file_is_remembered_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "CACHED_DIGEST_BYTES", 1 << 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 12))
    first = cached_file_digest(path)
    file_digests._digest_in_state.cache_clear()
    hashed = []
    monkeypatch.setattr(file_digests, "file_digest", lambda path: hashed.append(path))
    assert cached_file_digest(path) == first
    assert not hashed


def test_the_digest_of_many_files_is_remembered_on_disk_until_one_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "CACHED_DIGEST_BYTES", 1 << 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 1000)
    first = cached_files_digest(paths)
    file_digests._files_digest_in_state.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(file_digests, "file_digest", lambda path: pytest.fail("a file was read again"))
        assert cached_files_digest(paths) == first
    paths[1].write_bytes(bytes([7]) * 1000)
    assert cached_files_digest(paths) != first


def test_removing_a_folder_leaves_no_part_under_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    remove(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        remove(tmp_path / "a")
    remove(tmp_path / "a", missing_ok=True)


# ---- Locks ----

HOLD = """
import sys, time
from minitron_hf.locks import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(tmp_path, holder):
    with (
        pytest.raises(OutputError, match=rf"in use by process {holder.pid} on .*choose another"),
        locked_folder(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK_NAME).exists(), "what a killed run leaves"
    with locked_folder(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_covers_folders_within_and_processes_that_were_started(tmp_path):
    """Processes that outlive the one that started them still hold the folder."""
    killed(
        f"""
import subprocess
from minitron_hf.locks import held_descriptors, locked_folder
with locked_folder(folder), locked_folder(folder / "inner"):
    command = [sys.executable, "-c", {HOLD!r}, str(folder / "inner")]
    pipes = {{"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}}
    child = subprocess.Popen(command, text=True, pass_fds=held_descriptors(), **pipes)
    assert child.stdout.readline() == "held\\n", "the parent's lock is the child's"
    (folder.parent / "child").write_text(str(child.pid))
    {KILL}
""",
        tmp_path / "run",
    )
    words = r"in use by processes that process \d+ on .* started before it ended\."
    with pytest.raises(OutputError, match=words), locked_folder(tmp_path / "run"):
        pass
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    for _ in range(100):
        with contextlib.suppress(OutputError), locked_folder(tmp_path / "run"):
            return
        time.sleep(0.05)
    pytest.fail("the folder stays locked")


def test_a_lock_clears_what_killed_runs_left(tmp_path):
    remains = tmp_path / "inner" / ".model.0badc0de-1-00000000.partial"
    remains.mkdir(parents=True)
    own = remains.with_name(f".weights.{files._host()}-{os.getppid()}-00000000.partial")  # its process lives
    mine = remains.with_name(".download.partial")  # of another program
    for path in (own, mine):
        path.write_text("kept")
    locked = tmp_path / "locked" / remains.name
    locked.mkdir(parents=True)
    (locked.parent / LOCK_NAME).touch()  # of a run on another machine
    with locked_folder(tmp_path):
        assert not remains.exists()
        assert own.exists()
        assert mine.exists()
        assert locked.exists()


@pytest.mark.parametrize("rank", ["", "0"])
def test_empty_variables_of_a_launcher_say_nothing(tmp_path, monkeypatch, rank):
    """Job managers export them empty."""
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", rank)
    with locked_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).is_file()
    refuse_launch(SimpleNamespace(num_processes=1, parallelism_config=None))
    assert launched_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="2 processes were launched"):
        refuse_launch(SimpleNamespace(num_processes=1, parallelism_config=None))


def test_of_many_that_begin_at_once_one_runs_at_a_time(tmp_path):
    code = """
import sys
from pathlib import Path
from minitron_hf.errors import OutputError
from minitron_hf.locks import locked_folder
for _ in range(200):
    try:
        with locked_folder(sys.argv[1]):
            (Path(sys.argv[1]) / "mark").touch(exist_ok=False)
            (Path(sys.argv[1]) / "mark").unlink()
    except OutputError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


@pytest.mark.parametrize(
    "name", ["./x", "../x", "x/y/z", "x/", "here/x", "~/x", "/x", "", " ", pytest.param(Path("x"), id="Path")]
)
def test_a_name_that_can_only_be_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(HubError, match=r"The folder .* does not exist"):
        local_path(name)
    with pytest.raises(DataError, match=r"does not exist|has no name"):
        local_dataset(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner/name-1.5_b"])
def test_hub_ids_are_left_to_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path(name) is None
    assert local_dataset(name) is None


def test_what_is_there_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "rows.txt").write_text("x")
    assert local_folder("owner/name") == Path("owner/name")
    assert local_folder("~/owner/name") == tmp_path / "owner" / "name"
    assert local_dataset("rows.txt") == Path("rows.txt")
    with pytest.raises(HubError, match="is a file"):
        local_folder("rows.txt")
    with pytest.raises(DataError, match="does not exist"):
        local_dataset("other.txt")
