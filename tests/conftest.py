"""Tiny parameters and a synthetic prepared data set, as the real stages would read them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import artifacts
from pipeline.config.params import Params, parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.data import storage
from pipeline.data.dataset import PreparedDataset
from pipeline.launch import session
from pipeline.prepare.buckets import buckets_of
from pipeline.prepare.shards import box_sums, write_images

ROOT = Path(__file__).resolve().parents[1]

session.require_token()  # Ray reads it once a process, as it does where servers listen, so all tests share it.
os.environ.update(session.PRIVATE_ENV)

# One thread a process: threads of tiny layers mostly wait for each other, and other tests have the other cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# The first backward pass of a process starts threads for all devices that are known by then, of which torch.export
# knows more; a process with such threads cannot be forked to train. So it comes before any test.
torch.ones(1, requires_grad=True).sum().backward()
# Ray's workers do what tests wait for; niced (15 by default), they would starve on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process of several ends up alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def merge_tiny(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` (of params.yaml) with the changes of tests/tiny.yaml."""
    changes = read_yaml(ROOT / "tests/tiny.yaml")
    return {
        key: {**value, **changes[key]} if isinstance(changes.get(key), dict) else value
        for key, value in tree.items()
    }


@pytest.fixture(scope="session")
def tiny_tree() -> dict[str, Any]:
    """params.yaml at tiny size, as plain values."""
    return merge_tiny(read_yaml(ROOT / "params.yaml"))


@pytest.fixture(scope="session")
def tiny_params(tiny_tree: dict[str, Any]) -> Params:
    """params.yaml at tiny size."""
    return parse_params(tiny_tree)


def write_prepared(
    path: Path,
    resolution: int = 16,
    count: int = 24,
    dim: int = 384,
    tokens: int = 16,
    low_resolution: int = 8,
    encoding: str = "raw",
) -> None:
    """A prepared data set of coloured squares: 2/3 train, 1/6 val, 1/6 test; captions with random vectors."""
    draw = np.random.default_rng(0)
    images = np.full((count, 3, resolution, resolution), 255, dtype=np.uint8)
    rows, names = [], []
    for i in range(count):
        size = int(draw.integers(3, resolution - 2))
        images[i, :, 1 : 1 + size, 1 : 1 + size] = draw.integers(0, 256, (3, 1, 1))
        split = "train" if i % 6 < 4 else "val" if i % 6 == 4 else "test"
        names.append(f"square number {i}")
        rows.append(
            {"id": str(i), "split": split, "base": str(i), "group": "g", "subgroup": "s", "captions": [i]}
        )
    vectors = draw.standard_normal((count, 1 + tokens, dim)).astype(np.float16)
    write_dataset(path, images, rows, names, vectors, low_resolution, encoding)


def write_bucketed(path: Path, sizes: list[tuple[int, int]], resolution: int = 16) -> None:
    """A prepared data set of coloured images of these sizes (height, width) with faint noise, stored bucket by
    bucket: 2/3 train, 1/6 val, 1/6 test."""
    draw, order = np.random.default_rng(0), sorted(range(len(sizes)), key=lambda i: sizes[i])
    images = [
        (draw.integers(0, 250, (3, 1, 1)) + draw.integers(0, 3, (3, *sizes[i]))).astype(np.uint8)
        for i in order
    ]
    splits = ["train", "val", "train", "train", "test", "train"]
    rows: list[dict[str, object]] = [
        {"id": str(n), "split": splits[n % 6], "base": str(n), "group": "g", "subgroup": "s", "captions": [n]}
        for n in range(len(images))
    ]
    vectors = draw.standard_normal((len(images), 17, 384)).astype(np.float16)
    write_dataset(
        path, images, rows, [f"noise {n}" for n in range(len(images))], vectors, resolution=resolution
    )


def write_dataset(
    path: Path,
    images: Sequence[np.ndarray],
    rows: list[dict[str, object]],
    names: list[str],
    vectors: np.ndarray,
    low_resolution: int = 8,
    encoding: str = "raw",
    resolution: int | None = None,
) -> None:
    """A prepared data set of images uint8 [3,R,R], or in buckets where `resolution` is given, with rows of
    index.jsonl, captions, and their vectors float16 [captions, 1 + tokens, dim], the pooled one first."""
    from safetensors.numpy import save_file

    buckets = buckets_of(image.shape[:0:-1] for image in images)
    count, bucketed, resolution = len(images), resolution is not None, resolution or images[0].shape[-1]
    meta: dict[str, Any] = {
        "source": "synthetic",
        "resolution": resolution,
        "background": [255, 255, 255],
        "text_encoder": {
            "name": "random",
            "sha256": "0" * 64,
            "dim": vectors.shape[2],
            "max_tokens": vectors.shape[1] - 1,
        },
        "counts": {"n_in": count, "n_ok": count, "n_quarantined": 0, "n_duplicate": 0},
        "validation": {"digest": "0" * 64, "success": True, "warnings": []},
    }
    if bucketed:
        meta["buckets"] = [bucket._asdict() for bucket in buckets]
    with artifacts.commit_directory(path, meta) as folder:
        sums = (box_sums(image, resolution // low_resolution) for image in images)
        stored = (storage.encode(image, encoding) for image in images)
        write_images(folder, stored, sums, buckets, encoding)
        (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "captions.jsonl").write_text("".join(json.dumps(name) + "\n" for name in names))
        mask = np.zeros((len(names), vectors.shape[1] - 1), dtype=np.uint8)
        mask[:, :5] = 1
        text = {
            "pooled": np.ascontiguousarray(vectors[:, 0]),
            "tokens": np.ascontiguousarray(vectors[:, 1:]),
            "mask": mask,
        }
        save_file(text, folder / "text.safetensors")


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/prepared, as a worker's root."""
    root = tmp_path_factory.mktemp("root")
    write_prepared(root / "data/prepared")
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an object store, S3 as the package moto serves it in this process."""
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    yield f"http://{host}:{port}"
    store.stop()


@pytest.fixture(scope="module")
def s3(s3_server: str) -> Iterator[str]:
    """URL of a bucket; the environment leads to its store."""
    import s3fs

    own = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("pictures")
        yield "s3://pictures"
        s3fs.S3FileSystem().rm("pictures", recursive=True)
        s3fs.S3FileSystem.clear_instance_cache()


def with_rows(folder: Path, change: Callable[[int], dict[str, object]]) -> PreparedDataset:
    """The data set in `folder`, after a change of the rows of its index."""
    lines = (folder / "index.jsonl").read_text().splitlines()
    rows = [json.dumps(json.loads(line) | change(i)) + "\n" for i, line in enumerate(lines)]
    (folder / "index.jsonl").write_text("".join(rows))
    return PreparedDataset(folder)
