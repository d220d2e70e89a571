"""Errors: one line, a status for each kind, and the way through pickling."""

import errno
import pickle
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from pipeline import errors

KINDS = [
    (errors.ConfigError, 78),
    (errors.InputMissing, 66),
    (errors.BadData, 65),
    (errors.StorageError, 74),
    (errors.Busy, 75),
    (errors.AccessError, 77),
    (errors.GateFailed, 1),
]


@pytest.mark.parametrize(("kind", "status"), KINDS)
def test_each_kind_has_its_exit_status_and_survives_pickling(kind, status) -> None:
    error = pickle.loads(pickle.dumps(kind("E-X-001", "a.png", "is empty", "remove it")))
    assert type(error) is kind
    assert str(error) == "E-X-001 a.png: is empty. Fix: remove it"
    assert errors.exit_status_of(error) == status


def test_an_error_is_one_line_whatever_the_file_is_called() -> None:
    text = str(errors.BadData("E-X-001", "a\nb\x1b[31m\u2028.png", "bad", "fix"))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text and r"a\nb\x1b[31m\u2028.png" in text


def exit_of(body):
    """Status and stderr of a process that runs `body` as its main."""
    program = (
        "import os, signal, time\nfrom pipeline.errors import *\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"def main():\n    {body}\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        (
            "raise BadData('E-DAT-001', 'data', 'is bad', 'mend it')",
            65,
            "E-DAT-001 data: is bad. Fix: mend it",
        ),
        (f"raise OSError({errno.ENOSPC}, 'No space left', 'x')", 74, "disk full"),
        (f"raise OSError({errno.EROFS}, 'Read-only', 'x')", 77, "E-ACC-001 x: Read-only"),
        ("open('/does/not/exist')", 74, "E-IO-002 /does/not/exist"),
        ("raise KeyboardInterrupt", 75, "stopped"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 75, "stopped"),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(30)", 75, "stopped"),
    ],
)
def test_run_main_ends_with_one_line_and_the_right_status(body, status, words) -> None:
    code, stderr = exit_of(body)
    assert code == status
    assert words in stderr and len(stderr.splitlines()) == (1 if words else 0)


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o002), (0o022, 0o022), (0o077, 0o077)])
def test_nothing_is_writable_by_everybody(before: int, after: int) -> None:
    code, stderr = exit_of(f"os.umask({before}); run_main(lambda: print(oct(os.umask(0)), file=sys.stderr))")
    assert (code, stderr) == (0, f"{oct(after)}\n")


def test_a_bug_shows_its_traceback_and_status_70() -> None:
    code, stderr = exit_of("return 1 / 0")
    assert code == 70
    assert "ZeroDivisionError" in stderr and "Traceback" in stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "from pipeline.errors import run_main\nrun_main(lambda: print('x' * 10_000_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_statuses_of_other_exceptions() -> None:
    assert errors.exit_status_of(KeyboardInterrupt()) == 75
    assert errors.exit_status_of(PermissionError(errno.EACCES, "no")) == 77
    assert errors.exit_status_of(RuntimeError()) == 70


# Codes that more than one module raises, and what each means there.
SHARED_CODES = {
    "E-CAP-003": "captions that are too long",
    "E-CAP-004": "captions that cannot be read from a row",
    "E-CAP-005": "captions of images that are not there",
    "E-CAP-006": "what may be captions and is not read",
    "E-CAP-010": "captions that are not used, since an image has others",
    "E-CFG-020": "a model to start from that is of the wrong resolution",
    "E-CFG-043": "a number of images out of range",
    "E-IMG-001": "an empty image file",
    "E-IMG-004": "an image with too many pixels",
    "E-IMG-005": "a damaged image file",
}


def test_a_code_has_one_meaning() -> None:
    root = Path(errors.__file__).parents[1]
    modules = defaultdict(set)
    for path in [*root.glob("pipeline/**/*.py"), *root.glob("stages/*.py")]:
        for code in re.findall(r'"(E-[A-Z]+-\d{3})"', path.read_text("utf-8")):
            modules[code].add(path.relative_to(root).as_posix())
    assert {code for code, files in modules.items() if len(files) > 1} == SHARED_CODES.keys()


def test_a_page_names_every_code_and_follows_the_code() -> None:
    root = Path(errors.__file__).parents[1]
    made = subprocess.run(
        [sys.executable, root / "docs/errors.py"], capture_output=True, text=True, check=True
    )
    page = (root / "docs/errors.md").read_text("utf-8")
    assert page == made.stdout, "run `python docs/errors.py > docs/errors.md`"
    files = [*root.glob("pipeline/**/*.py"), *root.glob("stages/*.py")]
    used = {code for path in files for code in re.findall(r"[\"']?(E-[A-Z]+-\d{3})", path.read_text("utf-8"))}
    assert used == set(re.findall(r"^\| (E-[A-Z]+-\d{3}) ", page, re.MULTILINE))
