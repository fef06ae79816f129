"""Clients of the local Hub, each in a process of its own that need not import the libraries.

`huggingface_hub` reads `HF_ENDPOINT` and `HF_HOME` when it is imported, which takes seconds with all that needs it. So
one process imports everything once, and every client is forked from it: the Hubs of a test session listen on one port
after the other's end, and `HF_HOME` is a link to the home of the client.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import IO, Any

#: What the first process imports.
WARM = (
    "transformers.models.llama.modeling_llama",
    "minitron_hf.evaluation",
    "minitron_hf.publishing.hub",
    "minitron_hf.pruning.streaming",
    "minitron_hf.recipe.runner",
)
SETTINGS = {
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


class Port:
    """A port of this machine that stays free for the servers of this process."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", 0))  # nobody listens on it, so a server of this process can
        self.number: int = self.socket.getsockname()[1]


class Warm:
    """The process that clients are forked from."""

    def __init__(self, endpoint: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.home, self.address = Path(self.folder.name, "home"), str(Path(self.folder.name, "socket"))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = kept | SETTINGS | {"HF_ENDPOINT": endpoint, "HF_HOME": str(self.home)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        atexit.register(self.stop)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Client:
    """A forked process with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, warm: Warm, code: str, arguments: list[str], home: Path, environment: dict[str, str]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            warm.home.unlink()
        warm.home.symlink_to(home)
        self.returncode: int | None = None
        self._pipes = [os.pipe(), os.pipe()]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(warm.address)
        request = json.dumps({"code": code, "arguments": arguments, "environment": environment}).encode()
        ends = [write for _, write in self._pipes]
        socket.send_fds(self._connection, [b"%12d" % len(request)], ends)
        self._connection.sendall(request)
        for end in ends:
            os.close(end)
        self._answers: IO[str] = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, and its errors, when it has ended; after `timeout` seconds it is killed."""
        said: list[str] = ["", ""]

        def read(place: int) -> None:
            with open(self._pipes[place][0], encoding="utf-8") as file:
                said[place] = file.read()

        readers = [threading.Thread(target=read, args=(place,)) for place in range(2)]
        late = threading.Timer(timeout or 600, self.send_signal, [signal.SIGKILL])
        for thread in (*readers, late):
            thread.start()
        for thread in readers:
            thread.join()
        self.returncode = int(self._answers.readline())
        late.cancel()
        self._connection.close()
        return said[0], said[1]


# ---- The first process ----


def serve(address: str) -> None:
    """Import everything, and fork a process for every connection."""
    for name in WARM:
        __import__(name)
    gc.freeze()  # what was imported stays: collecting it takes longer than most clients
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
            os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run one client: say its process, wait for it, and say its exit code."""
    length, ends, *_ = socket.recv_fds(connection, 12, 2)
    content = b""
    while len(content) < int(length):
        content += connection.recv(1 << 16)
    client = os.fork()
    if client == 0:
        connection.close()
        os.dup2(ends[0], 1)
        os.dup2(ends[1], 2)
        for end in ends:
            os.close(end)
        os._exit(run(json.loads(content)))
    for end in ends:
        os.close(end)
    connection.sendall(b"%d\n" % client)
    _, status = os.waitpid(client, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def run(request: dict[str, Any]) -> int:
    """Execute the code as `python -c` does."""
    os.environ.update(request["environment"])
    sys.argv = ["-c", *request["arguments"]]
    try:
        exec(compile(request["code"], "<client>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
