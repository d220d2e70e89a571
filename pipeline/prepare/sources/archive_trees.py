"""Files in zip and tar archives, which are never unpacked."""

from __future__ import annotations

import bz2
import gzip
import lzma
import posixpath
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from pipeline.errors import BadData
from pipeline.prepare.limits import too_many_bytes
from pipeline.prepare.sources.files import (
    File,
    PerProcess,
    T,
    Tree,
    damage,
    is_ignored,
    kind_of_ignored,
    missing,
    printable,
)

MAX_MEMBERS = 1_000_000
MAX_RATIO = 200  # unpacked to packed size; images hardly shrink
SMALL = 2**20  # bytes; the ratio of smaller files is not limited
MAX_NAME = 4096  # bytes
MAX_SHOWN = 255  # characters of a name that cannot be
MAX_HEADER = 64 * 1024  # bytes that a tar may spend on the name and attributes of one member
_LEADS_OUT = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:[/\\]")
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}


class _Member(NamedTuple):
    """A member as the archive has it. `flaw` is (code, problem, fix); `place` is what finds its bytes."""

    name: str
    size: int
    version: str
    flaw: tuple[str, str, str] | None
    place: Any


def _name_flaw(name: str) -> tuple[str, str, str] | None:
    if not name.strip("/.") or "\0" in name or len(name.encode("utf-8", "surrogatepass")) > MAX_NAME:
        return "E-ARC-011", "has a name that no file can have", "rename it and pack the archive again"
    if _LEADS_OUT.search(name):
        return "E-ARC-010", "has a name that leads out of the archive", "pack it with a relative name"
    return None


def _admit(archive: str, members: Iterable[_Member], ignored: Counter[str]) -> dict[str, tuple[File, Any]]:
    """The files of an archive, each with its place, by name; `ignored` counts others. Of members with one name, the
    first has it."""
    admitted: dict[str, tuple[File, Any]] = {}
    repeated: list[tuple[str, _Member]] = []
    for member in members:
        parts = [part for part in member.name.split("/") if part not in {"", "."}]
        flaw = _name_flaw(member.name)
        name = member.name[:MAX_SHOWN] if flaw else "/".join(parts)
        if not flaw and (hidden := next(filter(is_ignored, parts), "")):
            ignored[kind_of_ignored(hidden)] += 1
            continue
        if name in admitted:
            repeated.append((name, member))
        else:
            admitted[name] = _file(archive, name, member, flaw or member.flaw), member.place
    again: Counter[str] = Counter()
    for name, member in repeated:
        stem, suffix = posixpath.splitext(name)
        while (other := f"{stem}#{again[name] + 2}{suffix}") in admitted:
            again[name] += 1
        flaw = "E-ARC-015", f"has the name of an earlier member, {printable(name)!r}", "rename one of them"
        admitted[other] = _file(archive, other, member, flaw), None
    return admitted


def _file(archive: str, name: str, member: _Member, flaw: tuple[str, str, str] | None) -> File:
    problem = flaw and BadData(flaw[0], f"{archive}/{printable(name)}", *flaw[1:])
    return File(name, member.size, member.version, problem)


def _counted(archive: str, members: Iterable[T]) -> Iterator[T]:
    for number, member in enumerate(members, start=1):
        if number > MAX_MEMBERS:
            fix = "split it into several folders or archives"
            raise BadData("E-ARC-002", archive, f"has more than {MAX_MEMBERS} members", fix)
        yield member


class _ArchiveTree:
    """What zip and tar share: an index of their members, built once, and checks before one is read."""

    def __init__(self, path: Path, name: str) -> None:
        """`name` is the archive's, for messages."""
        self._path = path
        self._name = name
        self._index: dict[str, tuple[File, Any]] | None = None
        self.ignored: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[_ArchiveTree], tuple[Path, str]]:
        return type(self), (self._path, self._name)

    def files(self) -> list[File]:
        """See `Tree.files`. Raises BadData for an archive that is damaged, or is a bomb, as a whole."""
        return [file for file, _ in self._load_index().values()]

    def _load_index(self) -> dict[str, tuple[File, Any]]:
        if self._index is None:
            with damage("E-ARC-001", self._name, "fetch it again, or pack it again"):
                self._index = _admit(self._name, self._members(), self.ignored)
        return self._index

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`."""
        where = f"{self._name}/{printable(name)}"
        if name not in self._load_index():
            raise missing(where)
        file, place = self._load_index()[name]
        if file.flaw is not None:
            raise BadData(*file.flaw.args)  # A new one: each keeps the frames that it went through.
        if file.size > limit:
            raise too_many_bytes(where, file.size, limit)
        with damage("E-ARC-017", where, "pack the archive again"):
            content = self._content(place)
            if len(content) != file.size:
                raise EOFError(f"{len(content)} of {file.size} bytes")
        return content

    def _members(self) -> Iterator[_Member]:
        raise NotImplementedError

    def _content(self, place: Any) -> bytes:
        raise NotImplementedError


class ZipTree(_ArchiveTree):
    """Files in a zip archive, in the order of its directory."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._zip: PerProcess[zipfile.ZipFile] = PerProcess()

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self._path)

    def _members(self) -> Iterator[_Member]:
        for info in _counted(self._name, self._zip.get(self._open).infolist()):
            name = info.orig_filename  # `filename` ends at a NUL.
            if not name.endswith("/"):
                version = f"{info.CRC:08x}-{info.file_size}"
                yield _Member(name, info.file_size, version, _zip_flaw(info), info)

    def _content(self, place: Any) -> bytes:
        try:
            with self._zip.get(self._open).open(place) as file:
                return file.read(place.file_size + 1)
        except OSError:
            self._zip.clear()  # Its file may have been lost with a share.
            raise


def _zip_flaw(info: zipfile.ZipInfo) -> tuple[str, str, str] | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "E-ARC-012", "is a link", "pack the file that it points to"
    if kind not in {0, stat.S_IFREG}:
        return "E-ARC-013", "is not a plain file", "leave it out"
    if info.flag_bits & 0x1:
        return "E-ARC-014", "is encrypted", "pack it without a password"
    if info.compress_type not in _METHODS:
        return "E-ARC-018", f"is compressed by method {info.compress_type}", "pack it with deflate"
    if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
        problem = f"unpacks from {info.compress_size} to {info.file_size} bytes"
        return "E-ARC-016", problem, f"leave it out; the limit is {MAX_RATIO} to one"
    return None


class TarTree(_ArchiveTree):
    """Files in a tar archive, plain or compressed by gzip, bzip2 or xz, in the order that they lie in it.

    A compressed one is a stream: cheap to read in that order, and read from its start to go back.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._stream: PerProcess[IO[bytes]] = PerProcess()

    def _open(self) -> IO[bytes]:
        with self._path.open("rb") as file:
            start = file.read(6)
        openers = (opener for magic, opener in _COMPRESSED.items() if start.startswith(magic))
        stream: IO[bytes] = next(openers, lambda path: path.open("rb"))(self._path)
        return stream

    def _members(self) -> Iterator[_Member]:
        status = self._path.stat()
        with self._open() as stream:
            blocks = _Blocks(stream, self._name, max(SMALL, MAX_RATIO * status.st_size))
            with tarfile.TarFile(
                fileobj=cast(Any, blocks), encoding="utf-8", errors="surrogateescape"
            ) as tar:
                for info in _counted(self._name, iter(tar.next, None)):
                    tar.members.clear()  # type: ignore[attr-defined] # It would keep them all.
                    if info.size < 0:
                        raise tarfile.ReadError(f"a size of {info.size}")
                    if not info.isdir():
                        version = f"{info.offset_data}-{info.size}-{info.mtime}-{status.st_mtime_ns}"
                        place = info.offset_data, info.size
                        yield _Member(info.name, info.size, version, _tar_flaw(info), place)
            blocks.finish()

    def _content(self, place: Any) -> bytes:
        offset, size = place
        stream = self._stream.get(self._open)
        try:
            stream.seek(offset)
            return stream.read(size)
        except Exception:
            self._stream.clear()  # A decompressor is of no use after an error.
            raise


class _Blocks:
    """What tarfile may do with a stream: read headers of sensible size, and go forward up to `end`.

    tarfile takes a damaged header for the end of the archive, so the last block is kept to check it.
    """

    def __init__(self, stream: IO[bytes], archive: str, end: int) -> None:
        self._stream = stream
        self._archive = archive
        self._end = end
        self._last = b""

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, position: int) -> int:
        if position > self._end:
            problem = f"unpacks to more than {MAX_RATIO} times its size"
            raise BadData("E-ARC-016", self._archive, problem, "pack it without what shrinks so much")
        return self._stream.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self._last = self._stream.read(size)
        return self._last

    def finish(self) -> None:
        """Read to the end, where checksums lie. Raises ReadError unless the archive has its end mark."""
        if self._last != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header at byte {self._stream.tell() - len(self._last)}")
        while self._stream.read(MAX_HEADER):
            self.seek(self._stream.tell())


def _tar_flaw(info: tarfile.TarInfo) -> tuple[str, str, str] | None:
    if info.issym() or info.islnk():
        return (
            "E-ARC-012",
            "is a link",
            "pack the file that it points to (tar --dereference --hard-dereference)",
        )
    if info.issparse():
        return "E-ARC-018", "is stored as a sparse file", "pack it without --sparse"
    if not info.isreg():
        return "E-ARC-013", "is not a plain file", "leave it out"
    return None


def open_archive(path: Path, name: str) -> Tree:
    """The archive in a file, zip or tar by its first bytes. Raises BadData E-ARC-003 if it is neither."""
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipTree(path, name)
    if start.startswith(tuple(_COMPRESSED)) or start[257:262] == b"ustar":
        return TarTree(path, name)
    problem = "is neither a zip nor a tar archive" if start else "is empty"
    raise BadData("E-ARC-003", name, problem, "pack the images with zip or tar (tar: also .gz, .bz2, .xz)")
