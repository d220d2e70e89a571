"""Loading shuffled batches from a warm cache."""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count as numbers_from
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.data.synthetic import CLASSES, Bytes, encoded, photo, squares
from benchmarks.measure import Run, absent, build, interleave, ratio, show, significant, table
from pipeline import artifacts
from pipeline.data import storage
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.storage import Bucket
from pipeline.prepare import shards

BATCH = 64
LEAD = 8  # batches before the clock starts, so that workers have started and worked ahead
Open = Callable[[], Iterator[Any]]  # starts to load: endless, BATCH images each


def write_prepared(folder: Path, images: Bytes, encoding: str, dim: int = 384) -> None:
    """What `prepare` would write, with captions of random vectors of length `dim`."""
    from safetensors.numpy import save_file

    count, side, rng = len(images), images.shape[-1], np.random.default_rng(0)
    rows = [
        {"id": str(i), "split": "train", "base": str(i), "group": "g", "subgroup": "s"} for i in range(count)
    ]
    with artifacts.commit_directory(folder, {"resolution": side}) as place:
        stored = (storage.encode(image, encoding) for image in images)
        sums = (shards.box_sums(image, 2) for image in images)
        shards.write_images(place, stored, sums, [Bucket(side, side, count)], encoding)
        names = [f"number {i}" for i in range(count)]
        shards.write_index(place, rows, ((name,) for name in names), names)
        vectors = rng.standard_normal((count, 17, dim)).astype(np.float16)
        mask = np.ones((count, 16), np.uint8)
        text: dict[str, NDArray[Any]] = {
            "pooled": vectors[:, 0].copy(),
            "tokens": vectors[:, 1:].copy(),
            "mask": mask,
        }
        save_file(text, place / "text.safetensors")


def prepared(scratch: Path, images: Bytes, encoding: str) -> PreparedDataset:
    folder = scratch / f"prepared-{encoding}"
    if not folder.exists():
        write_prepared(folder, images, encoding)
    return PreparedDataset(folder)


def _rows(count: int) -> Iterator[NDArray[np.int64]]:
    """Shuffled row numbers, BATCH at a time, without end."""
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)


def _by_images(encoding: str, scratch: Path, images: Bytes) -> Open:
    dataset = prepared(scratch, images, encoding)
    return lambda: map(dataset.images, _rows(len(images)))


def _by_batches(encoding: str, scratch: Path, images: Bytes) -> Open:
    batches = Batches(prepared(scratch, images, encoding), "train", seed=0, batch_size=BATCH, shards=1)
    return lambda: (batches.at(number * BATCH, 0) for number in numbers_from())


def _by_memory_map(scratch: Path, images: Bytes) -> Open:
    np.save(scratch / "all.npy", images)
    mapped = np.load(scratch / "all.npy", mmap_mode="r")
    return lambda: (mapped[rows] for rows in _rows(len(images)))


def _endless(epochs: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from epochs


def _loader(dataset: Any, workers: int, **options: Any) -> Open:
    options |= {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}
    return lambda: _endless(DataLoader(dataset, BATCH, **options))


def _png_files(scratch: Path, images: Bytes) -> list[Path]:
    """The images as PNG files, in folders that name their class; written once."""
    paths = [scratch / f"folder/class {i % CLASSES}/{i:06d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), "PNG"))
    return paths


def _by_image_folder(workers: int, scratch: Path, images: Bytes) -> Open:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import PILToTensor

    folder = _png_files(scratch, images)[0].parents[1]
    return _loader(ImageFolder(folder, PILToTensor()), workers, shuffle=True)


def _by_webdataset(encoding: str, workers: int, scratch: Path, images: Bytes) -> Open:
    import webdataset as wds

    parts = [str(scratch / f"{encoding}-{number}.tar") for number in range(4)]
    contents = _contents(encoding, scratch, images)
    for number, part in enumerate(parts):
        with tarfile.open(part, "w") as tar:
            for i, content in contents[number :: len(parts)]:
                _add(tar, f"{i:06d}.{encoding}", content)
    dataset = wds.WebDataset(parts, shardshuffle=len(parts)).shuffle(1000)
    dataset = dataset.decode(*["torchrgb8"] * (encoding == "png")).to_tuple(encoding).map(_first)
    batches = dataset.repeat().batched(BATCH, partial=False)
    return lambda: iter(wds.WebLoader(batches, batch_size=None, num_workers=workers))


def _first(row: tuple[Any, ...]) -> Any:
    return torch.as_tensor(row[0])


def _contents(encoding: str, scratch: Path, images: Bytes) -> list[tuple[int, bytes]]:
    """All images, numbered, as PNG or npy files."""
    if encoding == "png":
        return [(i, path.read_bytes()) for i, path in enumerate(_png_files(scratch, images))]
    return [(i, _npy(image)) for i, image in enumerate(images)]


def _npy(image: Bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _by_mds(workers: int, scratch: Path, images: Bytes) -> Open:
    import streaming

    folder = str(scratch / f"mds-{workers}")
    shape = ",".join(map(str, images.shape[1:]))
    with streaming.MDSWriter(out=folder, columns={"image": f"ndarray:uint8:{shape}"}) as out:
        for image in images:
            out.write({"image": image})
    streaming.base.util.clean_stale_shared_memory()
    return _loader(streaming.StreamingDataset(local=folder, shuffle=True, batch_size=BATCH), workers)


def _by_litdata(workers: int, scratch: Path, images: Bytes) -> Open:
    import litdata
    from litdata.streaming.cache import Cache

    folder = str(scratch / f"litdata-{workers}")
    cache = Cache(folder, chunk_bytes="64MB")
    for number, image in enumerate(images):
        cache[number] = torch.from_numpy(image)
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(folder, shuffle=True, drop_last=True)
    return lambda: _endless(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers))


def _by_hugging_face(workers: int, scratch: Path, images: Bytes) -> Open:
    import datasets

    files = [{"bytes": path.read_bytes(), "path": None} for path in _png_files(scratch, images)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"image": files}, features).save_to_disk(scratch / "arrow")
    dataset = datasets.load_from_disk(str(scratch / "arrow")).with_format("torch")
    return _loader(dataset, workers, shuffle=True)


FOLDER, IN_ORDER = "ImageFolder, 2 workers", "Batches.at, raw: float32, with text"
RAW_PEERS = ("WebDataset raw", "MDS raw", "litdata raw")
LOADERS: dict[str, Callable[[Path, Bytes], Open]] = {
    "crescendo images, raw": partial(_by_images, "raw"),
    "crescendo images, png": partial(_by_images, "png"),
    f"crescendo {IN_ORDER}": partial(_by_batches, "raw"),
    "numpy memory map": _by_memory_map,
    FOLDER: partial(_by_image_folder, 2),
    "WebDataset PNG": partial(_by_webdataset, "png", 0),
    "WebDataset PNG, 2 workers": partial(_by_webdataset, "png", 2),
    "WebDataset raw": partial(_by_webdataset, "npy", 0),
    "WebDataset raw, 2 workers": partial(_by_webdataset, "npy", 2),
    "MDS raw": partial(_by_mds, 0),
    "MDS raw, 2 workers": partial(_by_mds, 2),
    "litdata raw": partial(_by_litdata, 0),
    "litdata raw, 2 workers": partial(_by_litdata, 2),
    "Hugging Face Image, 2 workers": partial(_by_hugging_face, 2),
}


def load_table(count: int, repeats: int, side: int, seconds: float = 0.5) -> str:
    """Loading shuffled batches of images of one size from a warm cache."""
    images = squares(photo, count, side)
    with tempfile.TemporaryDirectory() as scratch:
        makers = {
            name: partial(_timed, load, Path(scratch), images, seconds) for name, load in LOADERS.items()
        }
        rates = interleave(build(makers), repeats)
    peers = [name for name in rates if name.startswith(RAW_PEERS)]
    best = max(peers, key=lambda name: statistics.median(rates[name]), default=None)
    headers = [f"{side} px", "images/s", "to ImageFolder", "to the best raw peer"]
    lines = [
        [
            name,
            show(rates[name]),
            f"{significant(ratio(rates[name], rates[FOLDER]))}x",
            f"{significant(ratio(rates[name], rates[best]))}x" if best else "",
        ]
        if name in rates
        else absent(name, headers)
        for name in LOADERS
    ]
    return f"Load shuffled batches of {BATCH} of {count} images.\n\n" + table(headers, lines)


def _timed(load: Callable[[Path, Bytes], Open], scratch: Path, images: Bytes, seconds: float) -> Run:
    """Images per second. Each run opens its own loader and closes it, so that its workers disturb no other."""
    start_loading = load(scratch, images)

    def run() -> float:
        batches = start_loading()
        for _ in range(LEAD):
            next(batches)
        loaded, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or not loaded:
            next(batches)
            loaded += BATCH
        return loaded / (time.perf_counter() - start)

    return run
