"""Sets of torchvision: CIFAR's binary version without any pickle, others by torchvision's classes."""

import gzip
import io
import pickle
import socket
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from pipeline.errors import BadData, ConfigError, InputMissing
from pipeline.prepare.framing import Framing
from pipeline.prepare.sources.torchvision import Torchvision, clean_class

FRAMING = Framing(32, "crop", (255, 255, 255))
TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")


def planes(seed):
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path):
    """Two records a file; the label of record `n` is `n % 10`."""
    folder = tmp_path / "raw" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    for number, name in enumerate(FILES):
        records = [bytes([n % 10]) + planes(n).tobytes() for n in (2 * number, 2 * number + 1)]
        (folder / name).write_bytes(b"".join(records))
    return folder


@pytest.fixture
def cifar100(tmp_path):
    folder = tmp_path / "raw" / "cifar-100-binary"
    folder.mkdir(parents=True)
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine_{n}" for n in range(100)))
    for number, name in enumerate(("train.bin", "test.bin")):
        (folder / name).write_bytes(bytes([7, 40 + number]) + planes(number).tobytes())
    return folder


def source(root, name="CIFAR10"):
    return Torchvision(root, "raw", name, FRAMING)


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_the_binary_version_of_cifar10_is_read(tmp_path, cifar10) -> None:
    items = source(tmp_path).listing().items
    assert len(items) == 12
    assert items[3].id == "data_batch_2.bin:1"
    assert items[3].where == "raw/cifar-10-batches-bin/data_batch_2.bin:1"
    assert [item.captions for item in items] == [(TEN[n % 10],) for n in range(12)]
    assert [item.group for item in items] == [TEN[n % 10] for n in range(12)]
    for number, item in enumerate(items):
        assert np.array_equal(pixels(source(tmp_path).read(item)), planes(number).transpose(1, 2, 0))


def test_the_class_in_cifar100_is_the_second_byte(tmp_path, cifar100) -> None:
    items = source(tmp_path, "CIFAR100").listing().items
    assert [item.captions for item in items] == [("fine 40",), ("fine 41",)]
    content = source(tmp_path, "CIFAR100").read(items[1])
    assert np.array_equal(pixels(content), planes(1).transpose(1, 2, 0))


def test_a_pickled_source_gives_the_same_listing_and_bytes(tmp_path, cifar10) -> None:
    first = source(tmp_path)
    items = first.listing().items
    again = pickle.loads(pickle.dumps(first))
    assert again.listing().items == items
    assert again.read(items[5]) == first.read(items[5]) == first.read(items[5])


def test_pictures_are_framed(tmp_path, cifar10) -> None:
    found = source(tmp_path)
    item = found.listing().items[0]
    picture = found.decode(found.read(item), item.where)
    assert np.array_equal(picture.pixels, planes(0).transpose(1, 2, 0))
    assert picture[1:4] == (32, 32, "RGB")


@pytest.mark.parametrize("size", [0, 3072, 3073 * 2 + 1])
def test_a_file_of_a_wrong_size_is_one_line(tmp_path, cifar10, size) -> None:
    (cifar10 / "data_batch_3.bin").write_bytes(bytes(size))
    with pytest.raises(BadData) as caught:
        source(tmp_path).listing()
    assert str(caught.value) == (
        f"E-TVS-001 raw/cifar-10-batches-bin/data_batch_3.bin: has {size} bytes, "
        "not a multiple of 3073. Fix: fetch the binary version again"
    )


@pytest.mark.parametrize("name", ["data_batch_5.bin", "batches.meta.txt"])
def test_a_missing_file_is_input_missing(tmp_path, cifar10, name) -> None:
    (cifar10 / name).unlink()
    with pytest.raises(InputMissing, match=f"E-INP-066 raw/cifar-10-batches-bin/{name}: is not there"):
        source(tmp_path).listing()


def test_a_label_without_a_class_flaws_its_record(tmp_path, cifar10) -> None:
    (cifar10 / "test_batch.bin").write_bytes(bytes([200]) + planes(0).tobytes())
    items = source(tmp_path).listing().items
    assert [item.flaw.code for item in items if item.flaw] == ["E-TVS-002"] and items[-1].flaw


def test_a_file_that_shrinks_after_listing_is_bad_data(tmp_path, cifar10) -> None:
    found = source(tmp_path)
    item = found.listing().items[1]
    (cifar10 / "data_batch_1.bin").write_bytes(bytes(3073))
    with pytest.raises(BadData, match="E-IMG-005"):
        found.read(item)


def test_an_unknown_set_is_a_config_error_that_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match="E-CFG-018 .*torchvision:ImageNet is unknown. Fix: use one of CIFAR10"
    ):
        Torchvision(None, "raw", "ImageNet", FRAMING)


def test_every_allowed_set_is_a_class_of_torchvision() -> None:
    from pipeline.prepare.sources.torchvision import _SETS

    assert all(hasattr(torchvision.datasets, name) for name in _SETS)


@pytest.fixture
def mnist(tmp_path):
    """MNIST's own format, three digits a part, as torchvision unpacks it."""
    folder = tmp_path / "raw" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 3, 28, 28) + b"".join(bytes([n]) * 784 for n in range(3))
        labels = struct.pack(">2i", 2049, 3) + bytes([7, 0, 1])
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            (folder / name).write_bytes(content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def test_sets_that_are_there_are_read_by_torchvision_without_a_network(tmp_path, mnist, monkeypatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a network was asked"))
    found = pickle.loads(pickle.dumps(source(tmp_path, "MNIST")))
    items = found.listing().items
    assert [(item.id, item.captions) for item in items] == [
        ("train:0", ("seven",)), ("train:1", ("zero",)), ("train:2", ("one",)),
        ("test:0", ("seven",)), ("test:1", ("zero",)), ("test:2", ("one",)),
    ]  # fmt: skip
    assert np.array_equal(pixels(found.read(items[2])), np.full((28, 28), 2))
    again = pickle.loads(pickle.dumps(found))
    assert again.read(items[4]) == found.read(items[4])


def test_a_download_that_fails_is_one_line_and_says_where_to_put_the_files(tmp_path, monkeypatch) -> None:
    def fail(*args, **more) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(InputMissing) as caught:
        source(tmp_path).listing()
    assert str(caught.value) == (
        "E-INP-067 raw: torchvision cannot get CIFAR10 (<urlopen error no route to host>). Fix: check the "
        "network, or put what torchvision.datasets.CIFAR10 wants into raw (or its binary version, "
        "cifar-10-batches-bin)"
    )
    assert socket.getdefaulttimeout() is None


class Gadget:
    def __init__(self, canary) -> None:
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, "w")


def test_a_forged_pickle_is_never_opened(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "raw" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    canary = tmp_path / "canary"
    forged = pickle.dumps(Gadget(str(canary)))
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(forged)
    monkeypatch.setattr(
        torchvision.datasets.cifar, "download_and_extract_archive", lambda *args, **more: None
    )
    with pytest.raises(InputMissing, match="E-INP-067"):
        source(tmp_path).listing()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("AnnualCrop", "annual crop"),
        ("7 - seven", "seven"),
        ("aquatic_mammals", "aquatic mammals"),
        ("T-shirt/top", "t-shirt/top"),
        ("german shorthaired", "german shorthaired"),
    ],
)
def test_names_of_classes_are_as_one_types_them(name, clean) -> None:
    assert clean_class(name) == clean
