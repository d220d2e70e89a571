"""Atomic writes, directories with a manifest of sha256 digests, and leases.

A directory is written under a temporary name, its `manifest.json` last, synced to disk, and renamed into
place: a reader sees the old directory or the new one, never half of one. Standard library and safetensors
only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from pipeline.errors import Busy, PipelineError, StorageError

MANIFEST = "manifest.json"
LOCK_WAITS = (0.0, 0.01, 0.05)  # seconds before each try to lock a file
SCHEMA = 1
_RESTORE = "restore the folder or recreate it"


# --- Digests.


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(obj: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(obj: Any) -> str:
    """Hex sha256 of `canonical_json(obj)`."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


# --- Atomic writes.


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Sync a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file so that readers, even after a crash, see the old content or the new. Creates parent folders."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{_token()}")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(target.parent)


@contextlib.contextmanager
def commit_directory(
    path: str | os.PathLike[str], meta: dict[str, Any] | None = None, forced: bool = True
) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path`, with a manifest, when the block ends without error.

    `meta` (JSON values) is read at the end of the block, so it may be filled inside. Whatever was at `path` is
    replaced as a whole; if the block raises, nothing changes. An operating system error inside safetensors is
    raised as the OSError it was. One writer at a time: hold a `lease` if there may be more. With `forced`,
    everything is synced to disk; without, a crash of the machine may leave a directory that does not verify,
    which is good enough for a cache.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    token = _token()
    temporary = target.with_name(f"{target.name}.tmp-{token}")
    temporary.mkdir()
    try:
        yield temporary
        _seal(temporary, meta or {}, forced)
        _swap(temporary, target, aside=target.with_name(f"{target.name}.old-{token}"))
    except BaseException as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(exc, SafetensorError) and (match := re.search(r"os error (\d+)", str(exc))):
            number = int(match[1])
            raise OSError(number, os.strerror(number), str(target)) from exc
        raise


def _token() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _seal(directory: Path, meta: dict[str, Any], forced: bool) -> None:
    assert not (directory / MANIFEST).exists(), "the manifest is written last, by commit_directory"
    files = {name: _describe(directory / name) for name in _files_below(directory)}
    body = {"schema": SCHEMA, "meta": meta, "files": files}
    text = json.dumps({**body, "digest": digest(body)}, sort_keys=True, indent=1, allow_nan=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    if forced:
        for name in (*files, MANIFEST):
            fsync_path(directory / name)
        for folder, _, _ in os.walk(directory):
            fsync_path(folder)


def _swap(temporary: Path, target: Path, aside: Path) -> None:
    moved = target.is_symlink() or target.exists()
    if moved:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        if moved:
            os.rename(aside, target)
        raise
    fsync_path(target.parent)
    if moved:
        remove(aside)


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _files_below(directory: Path) -> list[str]:
    """Relative POSIX names of all files below `directory`, sorted. Raises StorageError for links and devices."""
    names = []
    for folder, subfolders, files in os.walk(directory):
        for name in subfolders + files:
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise StorageError("E-IO-010", str(path), "is neither a plain file nor a folder", "remove it")
            if path.is_file() and relative != MANIFEST:
                names.append(relative)
    return sorted(names)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It runs, as another user.
        return True
    return True


def _tidy(target: Path) -> None:
    """Clean up after killed writers of `target`: remove partial copies, restore a version that was moved aside."""
    pattern = re.compile(re.escape(target.name) + r"\.(tmp|old)-(\d+)-[0-9a-f]{8}")
    for sibling in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if match is None or is_alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            os.rename(sibling, target)
        else:
            remove(sibling)


def sweep(folder: Path) -> None:
    """Remove the parts of files below `folder` that killed writers left; who calls it holds the folder's lease."""
    for path in sorted(folder.rglob("*.tmp-*")):
        match = re.search(r"\.tmp-(\d+)-[0-9a-f]{8}$", path.name)
        if match and path.is_file() and not is_alive(int(match[1])):
            remove(path)


# --- Reading.


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an artifact directory, checked against its own digest; files are not read.

    Raises:
        StorageError: it is missing or damaged, or has a schema that this version does not know.
    """
    where = Path(path, MANIFEST)
    try:
        return parse_manifest(where.read_bytes(), str(where))
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {MANIFEST}, so it is incomplete"
        raise StorageError("E-IO-011", str(path), problem, _RESTORE) from None


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """`read_manifest` of its bytes."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        raise StorageError("E-IO-012", where, "is not JSON", _RESTORE) from None
    if not isinstance(manifest, dict) or set(manifest) != {"schema", "meta", "files", "digest"}:
        raise StorageError("E-IO-012", where, "is not a manifest", _RESTORE)
    if manifest["schema"] != SCHEMA:
        problem = f"has schema {manifest['schema']}, this version reads {SCHEMA}"
        raise StorageError("E-IO-013", where, problem, "use the version that wrote it")
    if digest({key: manifest[key] for key in ("schema", "meta", "files")}) != manifest["digest"]:
        raise StorageError("E-IO-014", where, "does not match its own digest", _RESTORE)
    return manifest


def verify_directory(path: str | os.PathLike[str], exact: bool = True) -> dict[str, Any]:
    """Check every file of an artifact directory against its manifest, and return the manifest.

    exact: that there are no other files.

    Raises:
        StorageError: names the first file that is missing, unexpected, or differs in size or sha256.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    expected, present = manifest["files"], set(_files_below(directory))
    for name in sorted(present | set(expected) if exact else expected):
        where, fix = str(directory / name), _RESTORE
        if name not in present:
            raise StorageError("E-IO-015", where, "is missing", fix)
        if name not in expected:
            raise StorageError("E-IO-016", where, "is not in the manifest", "remove it")
        size = (directory / name).stat().st_size
        if size != expected[name]["size"]:
            problem = f"has {size} bytes, expected {expected[name]['size']}"
            raise StorageError("E-IO-017", where, problem, fix)
        actual = sha256_file(directory / name)
        if actual != expected[name]["sha256"]:
            problem = f"has sha256 {actual[:12]}, expected {expected[name]['sha256'][:12]}"
            raise StorageError("E-IO-018", where, problem, fix)
    return manifest


def directory_digest(path: str | os.PathLike[str]) -> str:
    """Digest of an artifact directory from its manifest: covers meta, and each file's name, size and sha256."""
    return str(read_manifest(path)["digest"])


def latest_valid(
    parent: str | os.PathLike[str],
    prefix: str,
    check: Callable[[Path], None] | None = None,
    passed_over: Callable[[Path, PipelineError], None] | None = None,
) -> Path | None:
    """The last child directory `prefix*`, by name, that verifies, or None.

    `check(child)` raises StorageError where a directory that verifies is still of no use. Damaged and useless ones
    are given to `passed_over`, with the reason, and moved to `parent/quarantine/`, each with a file that gives the
    reason; partial copies of killed writers are removed. So only the process that writes may call it.
    """
    folder = Path(parent)
    if not folder.is_dir():
        return None
    for leftover in folder.glob(f"{prefix}*.tmp-*"):
        remove(leftover)
    for aside in sorted(folder.glob(f"{prefix}*.old-*")):
        original = aside.with_name(aside.name.split(".old-")[0])
        remove(aside) if original.exists() else os.rename(aside, original)
    for child in sorted(folder.glob(f"{prefix}*"), reverse=True):
        if not child.is_dir() or child.is_symlink():
            continue
        try:
            verify_directory(child)
            if check is not None:
                check(child)
        except PipelineError as exc:
            _quarantine(child, str(exc))
            if passed_over is not None:
                passed_over(child, exc)
            continue
        return child
    return None


def _quarantine(path: Path, reason: str) -> None:
    place = path.parent / "quarantine" / f"{path.name}-{secrets.token_hex(4)}"
    place.parent.mkdir(exist_ok=True)
    os.rename(path, place)
    write_atomic(place.with_name(f"{place.name}.reason.txt"), reason + "\n")


# --- Leases.


@contextlib.contextmanager
def lease(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock the file `path` (created if missing) for the block; the kernel releases it if the process dies.

    Raises:
        Busy: another process holds it; the message names its pid.
    """
    where = Path(path)
    where.parent.mkdir(parents=True, exist_ok=True)
    with open(where, "a+", encoding="ascii") as file:
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            problem = f"is held by process {holder}"
            raise Busy("E-BUSY-001", str(where), problem, "wait until it ends, or stop it")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Lock a file, unless it stays locked; `is_held` locks it for a moment."""
    for wait in LOCK_WAITS:
        time.sleep(wait)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether a process, of any machine that shares the disk, holds the lease at `path`; nothing is written."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def copy_into_place(source: Path, target: Path, alone: bool = False) -> None:
    """Copy a file or folder to `target`, atomically; whatever was there is replaced as a whole. `alone`: no other
    machine writes it meanwhile, so that what killed writers left beside it is cleaned up."""
    token = _token()
    temporary, aside = (target.with_name(f"{target.name}.{kind}-{token}") for kind in ("tmp", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if alone:
        _tidy(target)
    try:
        if source.is_dir():
            _copy_folder(source, temporary)
        else:
            shutil.copy2(source, temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
    finally:
        for leftover in (temporary, aside):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder. Raises the first error as the OSError it was, of which shutil makes a list of texts."""
    try:
        shutil.copytree(source, target)
    except shutil.Error as error:
        _, path, text = error.args[0][0]
        match = re.match(r"\[Errno (\d+)\]", text)
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
