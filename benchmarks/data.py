"""Data: decoding, preparation, loading and storage, each beside its peers.

    python -m benchmarks.data [--images 512] [--repeats 5] [--only decode|prepare|load|wait|store]

Images are made on the fly: smoothed noise with a gradient and shapes ("photo"), or flat shapes with outlines on
white ("flat"). One core and one process, unless a line says otherwise. README.md says how to install the peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count as numbers_from
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import (
    Rates,
    Run,
    absent,
    build,
    interleave,
    machine,
    per_second,
    ratio,
    show,
    significant,
    table,
)
from pipeline import artifacts
from pipeline.config.params import Finetune, Params, Pretrain, load_params
from pipeline.data import storage
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.statistics import measure_statistics
from pipeline.diffusion.noise import lognormal_sigma
from pipeline.models.denoiser import Denoiser, build_core, build_shell, set_dtype
from pipeline.prepare import images, shards
from pipeline.prepare.framing import Framing
from pipeline.prepare.prepare import prepare
from pipeline.training.context import precision
from pipeline.training.denoising import DenoisingStep

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

Bytes = NDArray[np.uint8]
Picture = Callable[[int, int, int], Image.Image]  # (seed, width, height)

ROOT = Path(__file__).resolve().parents[1]
FORMATS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 90}, "WEBP": {"quality": 90}}
FILE_SIZES = {64: (320, 256), 256: (640, 512)}  # of the files that are decoded, by the side that they get
CLASSES = 8  # folders of the files that are prepared
BATCH = 64
LEAD = 8  # batches taken before the clock starts: workers have started, and worked ahead
BICUBIC = Image.Resampling.BICUBIC
PACKAGES = (
    "torch",
    "torchvision",
    "pillow",
    "numpy",
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "datasets",
)


# --- Images made on the fly.


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Noise of all octaves, a gradient, ellipses and grain: as smooth, and as hard to compress, as photographs."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, rng.uniform(-60, 60), width)[None, :, None] + rng.uniform(60, 190, 3)
    for octave in range(2, 8):
        coarse = rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), BICUBIC)
        pixels = pixels + (np.asarray(smooth, np.float64) - 128) * 1.2 / 2 ** (octave - 1)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _ellipses(image, rng, count=3, outline=None)
    grain = rng.normal(0, 2, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def flat(seed: int, width: int, height: int) -> Image.Image:
    """A few flat shapes with black outlines on white, antialiased, as emoji are drawn."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (4 * width, 4 * height), "white")
    _ellipses(image, rng, count=5, outline="black")
    return image.resize((width, height), Image.Resampling.BOX)


def _ellipses(image: Image.Image, rng: np.random.Generator, count: int, outline: str | None) -> None:
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for _ in range(count):
        x, y, a, b = rng.uniform(0.1, 0.7, 4) * (width, height, width / 2, height / 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + a, y + b), fill=colour, outline=outline, width=max(width // 64, 1))


def encoded(image: Image.Image, format: str) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **FORMATS[format])
    return file.getvalue()


def squares(picture: Picture, count: int, side: int) -> Bytes:
    """Square pictures: uint8 [count, 3, side, side]."""
    return np.stack([np.asarray(picture(i, side, side)).transpose(2, 0, 1) for i in range(count)])


def chunked(sequence: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (sequence[i : i + size] for i in range(0, len(sequence), size))


# --- A. Decode, crop, resize.

Decode = Callable[[bytes], Bytes]  # the bytes of a file to uint8 [64, 64, 3]


def _by_frame(px: int) -> Decode:
    framing = Framing(px, "crop", (255, 255, 255))
    return lambda content: images.decode_square(content, "benchmark", framing).pixels


def _shrunk(image: Image.Image, px: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.convert("RGB").crop((left, top, left + side, top + side))
    return cropped.resize((px, px), BICUBIC)


def _by_pillow(px: int) -> Decode:
    return lambda content: np.asarray(_shrunk(Image.open(io.BytesIO(content)), px))


def _by_torchvision(px: int) -> Decode:
    from torchvision.io import decode_image
    from torchvision.transforms import v2

    shrink = v2.Compose([v2.CenterCrop(min(FILE_SIZES[px])), v2.Resize(px, BICUBIC, antialias=True)])

    def decode(content: bytes) -> Bytes:
        pixels = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        small: Bytes = shrink(pixels).permute(1, 2, 0).contiguous().numpy()
        return small

    return decode


def _by_datasets(px: int) -> Decode:
    import datasets

    feature = datasets.Image()
    return lambda content: np.asarray(_shrunk(feature.decode_example({"bytes": content, "path": None}), px))


DECODERS = {
    "crescendo images.frame": _by_frame,
    "Pillow": _by_pillow,
    "torchvision decode, v2": _by_torchvision,
    "Hugging Face Image": _by_datasets,
}


def decode_table(count: int, repeats: int, px: int) -> str:
    """Decoding, cropping and shrinking files of each format."""
    share = max(count // len(FORMATS), 1)
    pictures = [photo(i, *FILE_SIZES[px]) for i in range(share)]
    files = {name: [encoded(picture, name) for picture in pictures] for name in FORMATS}
    decoders = build({name: partial(make, px) for name, make in DECODERS.items()})
    runs = {
        (name, form): per_second(partial(_decode_all, decode, contents))
        for form, contents in files.items()
        for name, decode in decoders.items()
    }
    rates = interleave(runs, repeats)
    mixed = {name: _mixed([rates[name, form] for form in FORMATS]) for name in decoders}
    headers = ["images/s", *FORMATS, "mixed", "ratio", "PSNR"]
    lines = []
    for name in DECODERS:
        if name not in decoders:
            lines.append(absent(name, headers))
            continue
        each = [significant(statistics.median(rates[name, form])) for form in FORMATS]
        agreement = min(_psnr(decoders[name], decoders["Pillow"], contents) for contents in files.values())
        compared = [f"{ratio(mixed[name], mixed['Pillow']):.2f}x", _decibels(agreement)]
        lines.append([name, *each, show(mixed[name]), *compared])
    title = (
        "Decode a {}x{} file, crop to a square, shrink to {} px. PSNR: against Pillow, of the worst format."
    )
    return title.format(*FILE_SIZES[px], px) + "\n\n" + table(headers, lines)


def _decode_all(decode: Decode, contents: Sequence[bytes]) -> int:
    for content in contents:
        decode(content)
    return len(contents)


def _mixed(rates: Sequence[Rates]) -> Rates:
    """Rates of equally many files of each format, round by round."""
    return [statistics.harmonic_mean(together) for together in zip(*rates, strict=True)]


def _psnr(decode: Decode, other: Decode, contents: Sequence[bytes]) -> float:
    errors = [np.square(decode(c).astype(float) - other(c)).mean() for c in contents]
    mean = float(np.mean(errors))
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


# --- B. Preparation from a folder. All of it runs in a process of its own that is bound to a number of cores.


class Bound:
    """A fresh process on `cores` cores, which imports and forks on its own."""

    def __init__(self, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_bind, initargs=(cores,))

    def __enter__(self) -> Bound:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run `work` there."""
        return self._pool.submit(work, *args).result()


def _bind(cores: int) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def write_files(root: Path, numbers: Iterable[int], px: int) -> None:
    """Files of all formats, in folders that name their class, below `root`/data/raw; to be shrunk to `px`."""
    for number in numbers:
        form = list(FORMATS)[number % len(FORMATS)]
        path = root / "data/raw" / f"class {number % CLASSES}" / f"{number:06d}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(number, *FILE_SIZES[px]), form))


def _folder_params(px: int) -> Params:
    params = load_params(ROOT / "params.yaml")
    changes = {
        "source": "folder",
        "path": "data/raw",
        "subset": (),
        "text_encoder": "label",
        "resolution": px,
    }
    return params.model_copy(update={"data": params.data.model_copy(update=changes)})


def seconds_to_prepare(root: Path, processes: int, px: int) -> tuple[float, int]:
    """Seconds that the stage takes below `root`, and the items that it decodes."""
    kept: list[int] = []  # items that the cache had, heard first of all

    def hear(what: str, done: int, total: int) -> None:
        if what == "images":
            kept.append(total - done)

    start = time.perf_counter()
    prepare(_folder_params(px), root, root / "work", processes=processes, progress=hear)
    return time.perf_counter() - start, kept[0]


def seconds_by_pillow(root: Path, px: int) -> float:
    """Seconds for a loop over the files with Pillow, and one `np.save`. Nothing is validated."""
    start = time.perf_counter()
    files = sorted((root / "data/raw").rglob("*.*"))
    np.save(root / "pillow.npy", np.stack([np.asarray(_shrunk(Image.open(file), px)) for file in files]))
    return time.perf_counter() - start


def seconds_by_datasets(root: Path, px: int) -> float:
    """Seconds for `imagefolder` and `map` into a fresh Arrow cache. Nothing is validated."""
    import datasets

    datasets.disable_progress_bars()
    cache = root / "arrow"
    shutil.rmtree(cache, ignore_errors=True)
    start = time.perf_counter()
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(root / "data/raw"), split="train", cache_dir=str(cache)
    )
    found.map(lambda row: {"image": _shrunk(row["image"], px)})
    return time.perf_counter() - start


OURS, LOOP, ARROW = "crescendo prepare", "Pillow, np.save", "Hugging Face map"
PREPARE_HEADERS = ("", "cores", "s", "images/s", "fixed s", "images/s beyond", "a core, to Pillow")
Times = dict[tuple[str, Path], Rates]


def prepare_table(count: int, repeats: int, px: int, cores: Sequence[int] = (1, 2)) -> str:
    """Preparation of a folder, whole and after 1% of it is new."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch, "few"), Path(scratch, "many")
        write_files(few, range(count // 4), px)
        write_files(many, range(count), px)
        parts = [_prepare_on(number, few, many, count, repeats, px) for number in cores]
    title = (
        f"Prepare {count} files of mixed formats, {{}}x{{}}, at {px} px. Fixed: seconds that do not grow with "
        "the files.\n\n"
    )
    lines = [line for lines, _ in parts for line in lines]
    return (
        title.format(*FILE_SIZES[px])
        + table(PREPARE_HEADERS, lines)
        + "".join(f"\n{note}" for _, note in parts)
    )


def _prepare_on(
    cores: int, few: Path, many: Path, count: int, repeats: int, px: int
) -> tuple[list[list[str]], str]:
    """Lines of the table for one number of cores, and a sentence on what is done again."""
    again: list[tuple[float, int]] = []  # (share of the first time, items decoded)
    peers: dict[str, Callable[[Path, int], float]] = {LOOP: seconds_by_pillow}
    if importlib.util.find_spec("datasets"):
        peers[ARROW] = seconds_by_datasets
    with Bound(cores) as run:
        runs: dict[tuple[str, Path], Run] = {
            (OURS, few): partial(_prepare_afresh, run, few, cores, px),
            (OURS, many): partial(_prepare_and_again, run, many, cores, px, count, again),
        }
        runs |= {
            (name, root): partial(run, work, root, px) for name, work in peers.items() for root in (few, many)
        }
        times = interleave(runs, repeats)
    lines = [
        _prepare_line(name, cores if name == OURS else 1, times, few, many, count) for name in (OURS, *peers)
    ]
    if ARROW not in peers:
        lines.append(absent(ARROW, PREPARE_HEADERS))
    shares, decoded = zip(*again[1:], strict=True)
    share = f"{statistics.median(shares):.0%} of the time before"
    return lines, f"With 1% more files, cores: {cores}; {share}, {decoded[0]} decoded.\n"


def _prepare_afresh(run: Bound, root: Path, cores: int, px: int) -> float:
    for name in ("work", "data/prepared", "data/quarantine", "reports"):
        shutil.rmtree(root / name, ignore_errors=True)
    return float(run(seconds_to_prepare, root, cores, px)[0])


def _prepare_and_again(
    run: Bound, root: Path, cores: int, px: int, count: int, again: list[tuple[float, int]]
) -> float:
    """Seconds to prepare; then `again` hears how it went with 1% more files, which are removed after."""
    first = _prepare_afresh(run, root, cores, px)
    extra = range(count, count + max(count // 100, 1))
    write_files(root, extra, px)
    second, decoded = run(seconds_to_prepare, root, cores, px)
    again.append((second / first, decoded))
    for number in extra:
        next((root / "data/raw").rglob(f"{number:06d}.*")).unlink()
    return first


def _prepare_line(name: str, cores: int, times: Times, few: Path, many: Path, count: int) -> list[str]:
    more = count - count // 4
    rates, base = (
        [more / (b - a) for a, b in zip(times[who, few], times[who, many], strict=True)]
        for who in (name, LOOP)
    )
    total, rate = statistics.median(times[name, many]), statistics.median(rates)
    fixed = max(total - count / rate, 0.0)
    figures = [significant(value) for value in (count / total, fixed, rate)]
    return [name, str(cores), show(times[name, many]), *figures, f"{ratio(rates, base) / cores:.2f}x"]


# --- C. Loading shuffled batches.

Open = Callable[[], Iterator[Any]]  # starts to load: endless, BATCH pictures each


def write_prepared(folder: Path, pictures: Bytes, encoding: str) -> None:
    """What `prepare` would write, with captions of random vectors."""
    from safetensors.numpy import save_file

    count, side, rng = len(pictures), pictures.shape[-1], np.random.default_rng(0)
    rows = [
        {"id": str(i), "split": "train", "base": str(i), "group": "g", "subgroup": "s"} for i in range(count)
    ]
    with artifacts.commit_directory(folder, {"resolution": side}) as place:
        stored = (storage.encode(picture, encoding) for picture in pictures)
        sums = (shards.box_sums(picture, side // 2) for picture in pictures)
        shards.write_images(place, stored, sums, count, side, encoding)
        shards.write_index(place, rows, [(f"number {i}",) for i in range(count)])
        vectors = rng.standard_normal((count, 17, 384)).astype(np.float16)
        mask = np.ones((count, 16), np.uint8)
        text: dict[str, NDArray[Any]] = {
            "pooled": vectors[:, 0].copy(),
            "tokens": vectors[:, 1:].copy(),
            "mask": mask,
        }
        save_file(text, place / "text.safetensors")


def _prepared(scratch: Path, pictures: Bytes, encoding: str) -> PreparedDataset:
    folder = scratch / f"prepared-{encoding}"
    if not folder.exists():
        write_prepared(folder, pictures, encoding)
    return PreparedDataset(folder)


def _rows(count: int) -> Iterator[NDArray[np.int64]]:
    """Shuffled row numbers, BATCH at a time, without end."""
    rng = np.random.default_rng(0)
    while True:
        yield from rng.permutation(count)[: count // BATCH * BATCH].reshape(-1, BATCH)


def _by_images(encoding: str, scratch: Path, pictures: Bytes) -> Open:
    dataset = _prepared(scratch, pictures, encoding)
    return lambda: map(dataset.images, _rows(len(pictures)))


def _by_batches(encoding: str, scratch: Path, pictures: Bytes) -> Open:
    batches = Batches(_prepared(scratch, pictures, encoding), "train", seed=0, batch_size=BATCH, shards=1)
    return lambda: (batches.at(number * BATCH, 0) for number in numbers_from())


def _by_memory_map(scratch: Path, pictures: Bytes) -> Open:
    np.save(scratch / "all.npy", pictures)
    mapped = np.load(scratch / "all.npy", mmap_mode="r")
    return lambda: (mapped[rows] for rows in _rows(len(pictures)))


def _endless(epochs: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from epochs


def _loader(dataset: Any, workers: int, **options: Any) -> Open:
    options |= {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}
    return lambda: _endless(DataLoader(dataset, BATCH, **options))


def _png_files(scratch: Path, pictures: Bytes) -> list[Path]:
    """The pictures as PNG files, in folders that name their class; written once."""
    paths = [scratch / f"folder/class {i % CLASSES}/{i:06d}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                encoded(Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))), "PNG")
            )
    return paths


def _by_image_folder(workers: int, scratch: Path, pictures: Bytes) -> Open:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2 import PILToTensor

    folder = _png_files(scratch, pictures)[0].parents[1]
    return _loader(ImageFolder(folder, PILToTensor()), workers, shuffle=True)


def _by_webdataset(encoding: str, workers: int, scratch: Path, pictures: Bytes) -> Open:
    import webdataset as wds

    parts = [str(scratch / f"{encoding}-{number}.tar") for number in range(4)]
    contents = _contents(encoding, scratch, pictures)
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


def _contents(encoding: str, scratch: Path, pictures: Bytes) -> list[tuple[int, bytes]]:
    """All pictures, numbered, as PNG or npy files."""
    if encoding == "png":
        return [(i, path.read_bytes()) for i, path in enumerate(_png_files(scratch, pictures))]
    return [(i, _npy(picture)) for i, picture in enumerate(pictures)]


def _npy(picture: Bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, picture)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _by_mds(workers: int, scratch: Path, pictures: Bytes) -> Open:
    import streaming

    folder = str(scratch / f"mds-{workers}")
    shape = ",".join(map(str, pictures.shape[1:]))
    with streaming.MDSWriter(out=folder, columns={"image": f"ndarray:uint8:{shape}"}) as out:
        for picture in pictures:
            out.write({"image": picture})
    streaming.base.util.clean_stale_shared_memory()
    return _loader(streaming.StreamingDataset(local=folder, shuffle=True, batch_size=BATCH), workers)


def _by_litdata(workers: int, scratch: Path, pictures: Bytes) -> Open:
    import litdata
    from litdata.streaming.cache import Cache

    folder = str(scratch / f"litdata-{workers}")
    cache = Cache(folder, chunk_bytes="64MB")
    for number, picture in enumerate(pictures):
        cache[number] = torch.from_numpy(picture)
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(folder, shuffle=True, drop_last=True)
    return lambda: _endless(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers))


def _by_hugging_face(workers: int, scratch: Path, pictures: Bytes) -> Open:
    import datasets

    files = [{"bytes": path.read_bytes(), "path": None} for path in _png_files(scratch, pictures)]
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
    """Loading shuffled batches of pictures of one size from a warm cache."""
    pictures = squares(photo, count, side)
    with tempfile.TemporaryDirectory() as scratch:
        makers = {
            name: partial(_timed, load, Path(scratch), pictures, seconds) for name, load in LOADERS.items()
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
    return f"Load shuffled batches of {BATCH} of {count} pictures.\n\n" + table(headers, lines)


def _timed(load: Callable[[Path, Bytes], Open], scratch: Path, pictures: Bytes, seconds: float) -> Run:
    """Pictures a second. Each run opens the loader anew and closes it, so that its workers disturb no other."""
    start_loading = load(scratch, pictures)

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


# --- D. What training waits for.


def wait_table(count: int, repeats: int) -> str:
    """A batch of the demo's core and shell as a share of the update that it is for (forward and backward)."""
    params = load_params(ROOT / "params.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        dataset = _prepared(Path(scratch), squares(photo, count, params.data.resolution), "raw")
        updates = {name: _update(params, dataset, name) for name in ("pretrain", "finetune")}
        runs = {(name, i): update[i] for name, update in updates.items() for i in range(2)}
        times = interleave(runs, repeats)
    lines = []
    for name in updates:
        load, step = times[name, 0], times[name, 1]
        share = ratio(load, step)
        lines.append([name, *(f"{show([1000 * t for t in each])}" for each in (load, step)), f"{share:.2%}"])
    headers = ("a shard of the demo's batch", "load ms", "load and train ms", "share")
    return f"Wait for data; {torch.get_num_threads()} thread.\n\n" + table(headers, lines)


def _update(params: Params, dataset: PreparedDataset, stage: str, times: int = 8) -> tuple[Run, Run]:
    """Seconds to load a shard of a batch; seconds to load it and train on it."""
    torch.manual_seed(0)
    net = params.core.model_dump(mode="json", exclude={"resolution"})
    denoiser: Denoiser = build_core(params.core.resolution, 384, net)
    settings: Pretrain | Finetune = params.pretrain
    if stage == "finetune":
        denoiser = build_shell(denoiser, 384, 0.05, params.shell.nets()[0])
        settings = params.finetune
    set_dtype(denoiser, precision("auto", torch.device("cpu")))
    batches = Batches(dataset, "train", 0, settings.batch_size, settings.shards, denoiser.resolution)
    step = DenoisingStep(
        denoiser=denoiser,
        batches=batches,
        statistics=measure_statistics(dataset, params.core.resolution),
        draw_sigma=_sigma,
        seed=0,
        batch_size=settings.batch_size,
        shards=settings.shards,
        lr=settings.lr,
        warmup_images=settings.warmup_images,
        num_images=settings.num_images,
        text_dropout=settings.text_dropout,
    )
    moments = numbers_from(0, settings.batch_size)

    def load(nimg: int) -> None:
        batches.at(nimg, 0).to("cpu")

    def train(nimg: int) -> None:
        step.shard_loss(nimg, 0)[0].backward()

    def timed(work: Callable[[int], None]) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work(next(moments))
        return (time.perf_counter() - start) / times

    return partial(timed, load), partial(timed, train)


def _sigma(batch: int, generator: torch.Generator) -> Tensor:
    return lognormal_sigma(batch, -1.0, 1.4, generator)


# --- E. Storage.

Codec = tuple[Callable[[Bytes], Any], Callable[[Any], Bytes]]


def _stored(encoding: str) -> Codec:
    return partial(storage.encode, encoding=encoding), lambda stored: storage.decode(stored).copy()


def _webp() -> Codec:
    def encode(pixels: Bytes) -> bytes:
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.save(file, "WEBP", lossless=True, method=0, quality=0)
        return file.getvalue()

    return encode, lambda content: np.array(Image.open(io.BytesIO(content))).transpose(2, 0, 1)


def _zstd() -> Codec:
    import pyarrow as pa

    def encode(pixels: Bytes) -> tuple[bytes, tuple[int, ...]]:
        return pa.compress(pixels.tobytes(), "zstd", asbytes=True), pixels.shape

    def decode(stored: tuple[bytes, tuple[int, ...]]) -> Bytes:
        content, shape = stored
        whole = pa.decompress(content, math.prod(shape), "zstd", asbytes=True)
        return np.frombuffer(whole, np.uint8).reshape(shape).copy()

    return encode, decode


CODECS: dict[str, Callable[[], Codec]] = {
    "raw": partial(_stored, "raw"),
    "png": partial(_stored, "png"),
    "WebP lossless": _webp,
    "zstd": _zstd,
}


def store_table(count: int, repeats: int) -> str:
    """Bytes, and rates of writing and reading, of ways to store pictures."""
    lines = []
    for kind, picture in {"photo": photo, "flat": flat}.items():
        for side in (64, 256):
            lines += [
                [kind, str(side), *line] for line in _store_lines(squares(picture, count, side), repeats)
            ]
    headers = ["images", "px", "stored as", "bytes", "share", "written/s", "read/s", "8 GiB hold"]
    return "Pictures in memory, encoded and decoded one at a time.\n\n" + table(headers, lines)


def _store_lines(pictures: Bytes, repeats: int) -> Iterator[list[str]]:
    codecs = {name: make() for name, make in CODECS.items()}
    stored = {name: [encode(picture) for picture in pictures] for name, (encode, _) in codecs.items()}
    runs: dict[tuple[str, str], Run] = {}
    for name, (encode, decode) in codecs.items():
        assert all(np.array_equal(decode(s), p) for s, p in zip(stored[name], pictures, strict=True))
        runs[name, "write"] = per_second(partial(_apply, encode, pictures))
        runs[name, "read"] = per_second(partial(_apply, decode, stored[name]))
    rates = interleave(runs, repeats)
    for name in codecs:
        size = statistics.mean(map(_size, stored[name]))
        written, read = (significant(statistics.median(rates[name, verb])) for verb in ("write", "read"))
        share = f"{size / pictures[0].nbytes:.0%}"
        yield [name, f"{size:,.0f}", share, "" if name == "raw" else written, read, f"{2**33 / size:,.0f}"]


def _apply(work: Callable[[Any], Any], things: Iterable[Any]) -> int:
    return sum(1 for _ in map(work, things))


def _size(stored: Any) -> int:
    if isinstance(stored, tuple):
        return len(stored[0])
    return stored.nbytes if isinstance(stored, np.ndarray) else len(stored)


# --- All of it.


def tables(only: str | None, count: int, repeats: int) -> Iterator[str]:
    """The tables one after the other; `only` is one of TABLES."""
    for name in TABLES if only is None else (only,):
        yield from TABLES[name](count, repeats)


TABLES: dict[str, Callable[[int, int], Iterable[str]]] = {
    "decode": lambda count, repeats: (decode_table(count, repeats, px) for px in FILE_SIZES),
    "prepare": lambda count, repeats: (
        prepare_table(n, repeats, px) for n, px in ((4 * count, 64), (2 * count, 256))
    ),
    "load": lambda count, repeats: (
        load_table(n, repeats, px) for n, px in ((8 * count, 64), (2 * count, 256))
    ),
    "wait": lambda count, repeats: [wait_table(count, repeats)],
    "store": lambda count, repeats: [store_table(max(count // 4, 1), repeats)],
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=TABLES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(PACKAGES))
    for text in tables(options.only, options.images, options.repeats):
        print(f"\n{text}", end="", flush=True)


if __name__ == "__main__":
    main()
