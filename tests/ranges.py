"""Run the `ranges` tests with the oldest direct dependencies that `setup.cfg` allows, and with the newest there are.

    python tests/ranges.py [oldest] [newest] [older-transformers]
    python tests/ranges.py --write    # constraints-oldest.txt anew, from setup.cfg

Python is the one that runs this, PyTorch the one of constraints.txt: other CPU builds are not always to be had.
PyTorch is installed once; every other environment sees it through a path file. `older-transformers` has Transformers
4.57 read students that were written here, and compares logits and tokens.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".ranges"
OLDEST = ROOT / "constraints-oldest.txt"
OLDER_TRANSFORMERS = "transformers==4.57.6"
#: Where the marked tests are; collecting all others would take longer than running these.
FILES = ("tests/test_ranges.py", "tests/test_compat.py", "tests/test_trainer.py")
HEADER = "# Lower bounds of setup.cfg, by `python tests/ranges.py --write`. PyTorch is that of constraints.txt.\n"


def requirements(extra: str = "test") -> list[str]:
    """What `setup.cfg` requires, without PyTorch."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].split() + parser["options.extras_require"][extra].split()
    return [line for line in lines if not re.match(r"torch\b", line)]


def oldest_constraints() -> str:
    """Every lower bound as an exact version."""
    return HEADER + "".join(f"{line.replace('>=', '==')}\n" for line in requirements())


def pinned_torch() -> str:
    return next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))


def environment(name: str, *arguments: str, base: Path | None = None) -> Path:
    """The Python of a virtual environment with what `pip install ARGUMENTS` brings; made anew if they changed."""
    folder = FOLDER / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed.txt"
    # The newest versions change without a change of the arguments: such an environment lasts a day.
    wanted = "\n".join((*arguments, time.strftime("%F") if name == "newest" else ""))
    if done.is_file() and done.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    if base is not None:
        purelib = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        (Path(purelib) / "pytorch.pth").write_text(f"{base}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], check=True)
    done.write_text(wanted)
    return python


def packages_of(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def run(python: Path, *arguments: str) -> bool:
    settings = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, *arguments], cwd=ROOT, env={**os.environ, **settings}).returncode == 0


def report(python: Path) -> None:
    names = [re.split(r"[<>=]", line)[0] for line in requirements()]
    code = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {names!r}), sep=', ')"
    subprocess.run([python, "-c", code], check=True)


def main(chosen: list[str]) -> int:
    if chosen == ["--write"]:
        OLDEST.write_text(oldest_constraints())
        return 0
    base = packages_of(environment("pytorch", pinned_torch()))
    failed = []
    tests = ("-m", "pytest", "-q", "-m", "ranges", "-p", "no:cacheprovider", *FILES)
    for name, arguments in (("oldest", [*requirements(), "-c", str(OLDEST)]), ("newest", requirements())):
        if name in chosen or not chosen:
            python = environment(name, *arguments, base=base)
            print(f"== {name}", flush=True)
            report(python)
            if not run(python, *tests):
                failed.append(name)
    if "older-transformers" in chosen or not chosen:
        print(f"== {OLDER_TRANSFORMERS}", flush=True)
        newest = environment("newest", *requirements(), base=base)
        older = environment("older-transformers", OLDER_TRANSFORMERS, base=base)
        with tempfile.TemporaryDirectory() as folder:
            script = str(ROOT / "tests" / "older_transformers.py")
            if not (run(newest, script, "write", folder) and run(older, script, "read", folder)):
                failed.append("older-transformers")
    print(f"Ranges: {', '.join(failed)} failed." if failed else "Ranges: all passed.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
