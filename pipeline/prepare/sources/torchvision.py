"""Labelled sets that torchvision knows, downloaded if they are not there; a caption is the name of the class.

CIFAR is also read from its binary version, if that lies in the folder: then no pickle is opened at all.
(torchvision unpickles CIFAR's Python version only after it has checked its md5.)
"""

from __future__ import annotations

import importlib
import io
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import BadData, ConfigError, InputMissing, PipelineError, reason
from pipeline.prepare import images
from pipeline.prepare.framing import DecodedImage, Framing
from pipeline.prepare.limits import MAX_BYTES
from pipeline.prepare.sources.files import PerProcess
from pipeline.prepare.sources.parquet import class_name
from pipeline.prepare.sources.source import Item, Listing
from pipeline.text.captions import plain_english

TIMEOUT = 60.0  # seconds that a server may be silent
_Parts = Mapping[str, Mapping[str, Any]]  # Part of the set -> what its class is called with.
_TRAIN: _Parts = {"train": {"train": True}, "test": {"train": False}}
_SPLIT: _Parts = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: _Parts = {**_SPLIT, "val": {"split": "val"}}
_SETS: Mapping[str, _Parts] = MappingProxyType(
    {
        "CIFAR10": _TRAIN,
        "CIFAR100": _TRAIN,
        "DTD": _THREE,
        "EuroSAT": {"all": {}},
        "FashionMNIST": _TRAIN,
        "Flowers102": _THREE,
        "Food101": _SPLIT,
        "KMNIST": _TRAIN,
        "MNIST": _TRAIN,
        "OxfordIIITPet": {"trainval": {"split": "trainval"}, "test": {"split": "test"}},
        "STL10": _SPLIT,
        "SVHN": _SPLIT,
    }
)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERED = re.compile(r"^\d+ - ")  # MNIST: `7 - seven`
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")  # EuroSAT: `AnnualCrop`


class _Binary(NamedTuple):
    """How the binary version of a CIFAR lies in its folder."""

    folder: str
    files: tuple[str, ...]
    names: str
    labels: int  # bytes before the pixels of a record; the last is the class


_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_BINARY = {
    "CIFAR10": _Binary(
        "cifar-10-batches-bin",
        (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
        "batches.meta.txt",
        labels=1,
    ),
    "CIFAR100": _Binary("cifar-100-binary", ("train.bin", "test.bin"), "fine_label_names.txt", labels=2),
}


class _Samples(Protocol):
    """Labelled images, by a name that holds the number after a colon."""

    def items(self) -> Iterator[Item]: ...

    def image(self, name: str) -> Image.Image: ...


def clean_class(name: str) -> str:
    """A name of a class as one types it: `AnnualCrop` is `annual crop`, `7 - seven` is `seven`."""
    return plain_english(_CAMEL.sub(" ", _NUMBERED.sub("", name)))


def _item(name: str, where: str, version: str, label: int, names: Sequence[str]) -> Item:
    flaw = None
    if label >= len(names) > 0:
        flaw = BadData(
            "E-TVS-002", where, f"is of class {label}, there are {len(names)}", "fetch the files again"
        )
    group = class_name(label, names)
    return Item(name, where, version, None, group, group, (group,) if group else (), flaw)


class _BinarySamples:
    """The binary version of CIFAR: records of label bytes and 3x32x32 bytes, red, green, blue."""

    def __init__(self, place: Path, name: str, binary: _Binary) -> None:
        self._place = place / binary.folder
        self._name = f"{name}/{binary.folder}"
        self._binary = binary
        self._record = binary.labels + _PIXELS

    def items(self) -> Iterator[Item]:
        """Raises InputMissing for a missing file, BadData E-TVS-001 for one of a wrong size."""
        names = self._names()
        for file in self._binary.files:
            path, where = self._place / file, f"{self._name}/{file}"
            if not path.is_file():
                raise InputMissing("E-INP-066", where, "is not there", "unpack the archive again")
            status = path.stat()
            if status.st_size == 0 or status.st_size % self._record:
                problem = f"has {status.st_size} bytes, not a multiple of {self._record}"
                raise BadData("E-TVS-001", where, problem, "fetch the binary version again")
            labels = np.memmap(path, np.uint8, "r").reshape(-1, self._record)[:, self._binary.labels - 1]
            version = f"{status.st_size}-{status.st_mtime_ns}"
            for number, label in enumerate(labels.tolist()):
                yield _item(f"{file}:{number}", f"{where}:{number}", version, label, names)

    def _names(self) -> list[str]:
        path = self._place / self._binary.names
        if not path.is_file():
            fix = "unpack the archive again"
            raise InputMissing("E-INP-066", f"{self._name}/{path.name}", "is not there", fix)
        return list(filter(None, map(clean_class, path.read_text("utf-8", "replace").splitlines())))

    def image(self, name: str) -> Image.Image:
        file, _, number = name.rpartition(":")
        start = int(number) * self._record + self._binary.labels
        planes = np.fromfile(self._place / file, np.uint8, _PIXELS, offset=start)
        return Image.fromarray(planes.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


class _LibrarySamples:
    """A class of torchvision.datasets, in its parts."""

    def __init__(self, place: Path, name: str, kind: str) -> None:
        self._place = place
        self._name = name
        self._kind = kind
        self._parts: PerProcess[dict[str, Any]] = PerProcess()

    def _open(self) -> dict[str, Any]:
        datasets = importlib.import_module("torchvision.datasets")
        kind = getattr(datasets, self._kind)
        fix = f"check the network, or put what torchvision.datasets.{self._kind} wants into {self._name}"
        if self._kind in _BINARY:
            fix += f" (or its binary version, {_BINARY[self._kind].folder})"
        try:
            with _timeout(TIMEOUT):
                return {
                    part: kind(self._place, download=True, **how) for part, how in _SETS[self._kind].items()
                }
        except Exception as exc:  # Networks, archives and files raise anything.
            problem = f"torchvision cannot get {self._kind} ({reason(exc)})"
            raise InputMissing("E-INP-067", self._name, problem, fix) from None

    def items(self) -> Iterator[Item]:
        """Raises InputMissing where the set is not there and cannot be downloaded."""
        for part, samples in self._parts.get(self._open).items():
            names = [clean_class(name) for name in getattr(samples, "classes", _DIGITS)]
            for number, label in enumerate(_labels(samples)):
                name = f"{part}:{number}"
                yield _item(name, f"{self._kind}/{name}", f"{self._kind}-{len(samples)}", label, names)

    def image(self, name: str) -> Image.Image:
        part, _, number = name.rpartition(":")
        image: Image.Image = self._parts.get(self._open)[part][int(number)][0]
        return image


def _labels(samples: Any) -> list[int]:
    """The class of every sample, without decoding them; torchvision has no one name for it."""
    values = next(getattr(samples, key) for key in ("targets", "labels", "_labels") if hasattr(samples, key))
    labels: list[int] = np.asarray(values).tolist()
    return labels


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


class Torchvision:
    """The set `name` of torchvision.datasets below `root / path`, training and test parts together."""

    licence: str | None = None

    def __init__(self, root: Path, path: str, name: str, framing: Framing) -> None:
        """Raises ConfigError for a set that is not one of single labelled images."""
        if name not in _SETS:
            fix = f"use one of {', '.join(_SETS)}"
            raise ConfigError("E-CFG-018", "params.yaml: data.source", f"torchvision:{name} is unknown", fix)
        self._framing = framing
        self.limits = framing.limits
        binary = _BINARY.get(name)
        self._samples: _Samples = _LibrarySamples(root / path, path, name)
        if binary is not None and (root / path / binary.folder).is_dir():
            self._samples = _BinarySamples(root / path, path, binary)

    def listing(self) -> Listing:
        """All samples, part by part. Raises InputMissing, BadData."""
        return Listing(tuple(self._samples.items()))

    def read(self, item: Item, limit: int = MAX_BYTES) -> bytes:
        """One image as PNG, without loss; always the same bytes. Raises BadData E-IMG-005."""
        try:
            image = self._samples.image(item.id)
        except PipelineError:
            raise
        except Exception as exc:  # Decoders of damaged files raise anything.
            problem = f"is damaged ({reason(exc)})"
            raise BadData("E-IMG-005", item.where, problem, "fetch the files again") from None
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def decode(self, content: bytes, where: str) -> DecodedImage:
        """See `images.decode_square`."""
        return images.decode_square(content, where, self._framing)
