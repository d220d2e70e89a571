"""The environment in which a version is made again: the present one where that has the packages of the version's
requirements.lock, else a new one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import Busy
from pipeline.launch import machine

MADE = "made"  # in a new environment, once it is complete
SHOWN = 3  # packages in a line


@dataclass(frozen=True)
class Environment:
    """python: its interpreter. words: what it is. new: made from `lock` when it is needed. packages: {name:
    version} that are not as in the lock."""

    python: Path
    words: str
    packages: dict[str, str]
    lock: Path
    new: bool = False

    def facts(self) -> dict[str, str]:
        """What stages are computed with there (launch/machine.py)."""
        return {**machine.facts_here(self.lock), "packages": json.dumps(self.packages, sort_keys=True)}

    def make(self, say: Callable[[str], None]) -> None:
        """Make it, if it is new and not yet made. Raises Busy where pip cannot."""
        folder = self.python.parents[1]
        if not self.new or (folder / MADE).exists():
            return
        say(f"making an environment from the version's {machine.LOCK}, which downloads its packages")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
        install = [str(self.python), "-m", "pip", "install", *quiet, "--require-hashes", "-r"]
        # The locked pip first: that of an old Python refuses locks of packages that others want with extras.
        if pip := re.search(r"^pip==.*\n(?:[ \t].*\n)*", self.lock.read_text(encoding="utf-8"), re.MULTILINE):
            alone = folder / "pip.lock"
            alone.write_text(pip[0], encoding="utf-8")
            _run([*install, str(alone)])
        _run([*install, str(self.lock)])
        (folder / MADE).touch()


def choose(lock: Path, here: bool, folder: Path) -> Environment:
    """The present environment, if it is asked for (`here`) or has the packages of the lock; else one in
    `folder`."""
    present = Path(sys.executable)
    if not lock.is_file():
        return Environment(present, f"this one; the version has no {machine.LOCK}", {}, lock)
    pins, unlike = machine.pins(lock), machine.unlike_lock(lock)
    if not unlike:
        return Environment(
            present, f"this one, {len(pins)} packages as in the version's {machine.LOCK}", {}, lock
        )
    named = [f"{name} {version} ({pins[name]})" for name, version in list(unlike.items())[:SHOWN]]
    more = f" and {len(unlike) - SHOWN} more" if len(unlike) > SHOWN else ""
    count, names = f"{len(unlike)} of {len(pins)} packages", ", ".join(named) + more
    differ = f"{count} are not as in the version's {machine.LOCK}: {names}"
    if here:
        return Environment(present, f"this one, though {differ}", unlike, lock)
    words = f"a new one of {len(pins)} packages; here {differ}"
    return Environment(folder / "bin/python", words, {}, lock, new=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or [
            "without a word"
        ]
        errors = [line for line in said if line.startswith("ERROR:")] or said
        problem = f"no environment can be made from it ({errors[0][:200]})"
        fix = "go online and run this again, or use the present packages with `--environment here`"
        raise Busy("E-BUSY-160", f"{machine.LOCK} of the version", problem, fix)
