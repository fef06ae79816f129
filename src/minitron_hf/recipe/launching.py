"""Starts several processes with `accelerate launch`, by packaged or own configurations.

Run as a module it is `accelerate launch` itself, with two differences: a process that fails is one message and no
traceback of the launcher's, and an interrupt is left to whoever started it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import MESSAGES, DataError, DistributedError, MinitronError, MissingDependencyError, did_you_mean
from ..locks import held_descriptors

CONFIGS = Path(__file__).parent / "accelerate_configs"
#: Names of the packaged configurations.
CONFIG_NAMES = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))

#: How long processes may take to end when asked to, in seconds.
_TERMINATION_SECONDS = 60


def accelerate_config(name: str | os.PathLike[str]) -> Path:
    """The path of a packaged configuration, or of one's own.

    Raises:
        DataError: if there is none.

    >>> accelerate_config("ddp").name
    'ddp.yaml'
    """
    if str(name) in CONFIG_NAMES:
        return CONFIGS / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise DataError(
        f"There is no Accelerate configuration {os.fspath(name)!r}.{did_you_mean(os.fspath(name), CONFIG_NAMES)} "
        f"Expected {', '.join(CONFIG_NAMES)}, or a file "
        "that `accelerate config` wrote."
    )


def require_launchable(config: str | os.PathLike[str], num_processes: int | None) -> int:
    """Refuse what `launch` could not start on this machine.

    Returns:
        The number of processes: as given, or one for every accelerator here.

    Raises:
        DataError: if there is no such configuration, or no such number of processes.
        DistributedError: if it needs accelerators, or more of them than there are.
        MissingDependencyError: if it needs DeepSpeed.
    """
    import torch
    import yaml

    path = accelerate_config(config)
    try:
        kind = yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not an Accelerate configuration: no distributed_type. Let `accelerate config` write one."
        ) from error
    devices = torch.accelerator.device_count()
    if num_processes is not None and num_processes < 1:
        raise DataError(f"num_processes={num_processes}: expected at least 1.")
    if num_processes is None and not devices:
        raise DataError("This machine has no accelerators to count. Say how many processes to start: num_processes=N.")
    if devices and num_processes is not None and num_processes > devices:
        raise DistributedError(f"num_processes={num_processes}: this machine has {devices} accelerators.")
    if not devices and kind in ("FSDP", "DEEPSPEED"):
        raise DistributedError(
            f"{os.fspath(config)}: Accelerate splits models over accelerators only, and there are none. Use ddp."
        )
    if kind == "DEEPSPEED":
        from accelerate.utils import is_deepspeed_available

        if not is_deepspeed_available():
            raise MissingDependencyError(
                f"{os.fspath(config)} needs DeepSpeed: pip install 'minitron-hf[deepspeed]'. fsdp2 does without."
            )
    return devices if num_processes is None else num_processes


def launch(arguments: Sequence[str], config: str | os.PathLike[str], num_processes: int | None = None) -> None:
    """Run a command of `minitron-hf` in several processes, and wait for them.

    Args:
        arguments: of the command line.
        config: name of a packaged Accelerate configuration, or a file.
        num_processes: None: as many as there are accelerators.

    Raises:
        MinitronError: what a process refused, or that one has died.
        KeyboardInterrupt: once the processes have ended.
    """
    number = require_launchable(config, num_processes)
    import torch

    environment = dict(os.environ)
    if not torch.accelerator.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory(prefix="minitron-hf-") as messages:
        environment[MESSAGES] = messages
        command = [sys.executable, "-m", __name__, "--config_file", str(accelerate_config(config))]
        command += ["--num_processes", str(number), "--module", "minitron_hf.cli", *arguments]
        process = subprocess.Popen(command, env=environment, pass_fds=held_descriptors(), stdout=_standard_output())
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TERMINATION_SECONDS)
            process.kill()
            raise
        if code == 0:
            return
        said = [path.read_text(encoding="utf-8") for path in sorted(Path(messages).iterdir())]
    refusals = [text for text in said if not text.startswith("exit code")]
    if refusals:
        raise MinitronError(refusals[0])
    what = "; ".join(said) or f"exit code {code}"
    raise DistributedError(
        f"Training in {number} processes failed ({what}); what they said is above. The same command resumes from the "
        "last checkpoint."
    )


def _standard_output() -> int | None:
    """Where this process prints now, for the processes that it starts: they do not know of `redirect_stdout`."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, or one in memory: they print where this process began
        return None


def write_error_message(text: str) -> bool:
    """Write an error message for the process that started this one.

    Returns:
        Whether there is one that waits for it.
    """
    folder = os.environ.get(MESSAGES)
    if folder is None or not Path(folder).is_dir():
        return False
    (Path(folder) / f"{os.environ.get('RANK', 'launcher')}.txt").write_text(text, encoding="utf-8")
    return True


def _accelerate_launch(arguments: Sequence[str]) -> int:
    """`accelerate launch`, without its traceback."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..compat import launch_processes

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_processes(arguments, "SIGTERM,SIGHUP,SIGQUIT")
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            write_error_message(f"exit code {failure.exitcode} of process {rank}{_reason(failure.exitcode)}")
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _reason(exit_code: int) -> str:
    killed = exit_code == -signal.SIGKILL
    return ", killed: often because the memory was full" if killed else ""


if __name__ == "__main__":
    sys.exit(_accelerate_launch(sys.argv[1:]))
