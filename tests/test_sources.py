"""Every kind of source trains a model: folder, archive, Parquet, CIFAR's format, OpenMoji."""

import importlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.models.snapshot import load_snapshot
from tests.checkout import write_params
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

STAGES = ("prepare", "pretrain", "finetune", "refine", "evaluate")
WHOLE = (
    "folder",
    "cifar",
)  # captions of their own, and labels; what comes after training does not know the source
NAMES = ("red square", "green square", "blue square", "grey square")


def squares(count: int = 40, size: int = 32) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 [size,size,3]) of coloured squares on noise."""
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        edge = int(draw.integers(4, size // 2))
        channel = number % 4
        pixels[edge:-edge, edge:-edge] = 40
        pixels[edge:-edge, edge:-edge, channel if channel < 3 else slice(None)] = 220
        yield NAMES[channel], pixels


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def make_folder(raw: Path) -> None:
    for number, (name, pixels) in enumerate(squares()):
        path = raw / name.replace(" ", "_") / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(pixels, "JPEG"))


def make_archive(raw: Path) -> None:
    with zipfile.ZipFile(raw, "w") as archive:
        for number, (name, pixels) in enumerate(squares()):
            archive.writestr(f"{number:02d}.png", encoded(pixels))
            archive.writestr(f"{number:02d}.txt", name)


def make_parquet(raw: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"image": {"bytes": encoded(p), "path": f"{i}.png"}, "text": n} for i, (n, p) in enumerate(squares())
    ]
    pq.write_table(pa.Table.from_pylist(rows), raw, row_group_size=16)


def make_cifar(raw: Path) -> None:
    folder = raw / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [*NAMES, *(f"class {number}" for number in range(4, 10))]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n")
    for number, part in enumerate(np.array_split(np.arange(40), 6), start=1):
        images = [list(squares())[i] for i in part]
        records = [bytes([NAMES.index(n)]) + p.transpose(2, 0, 1).tobytes() for n, p in images]
        name = f"data_batch_{number}.bin" if number < 6 else "test_batch.bin"
        (folder / name).write_bytes(b"".join(records))


SOURCES: dict[str, tuple[str, str, Callable[[Path], None] | None]] = {
    "folder": ("folder", "data/raw", make_folder),
    "archive": ("archive", "data/squares.zip", make_archive),
    "parquet": ("parquet", "data/squares.parquet", make_parquet),
    "cifar": ("torchvision:CIFAR10", "data/raw", make_cifar),
    "openmoji": ("openmoji==17.0.0", "data/raw", None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_goes_through_the_stages(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path, make = SOURCES[kind]
    for name in ("pipeline", "stages", "infra"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    if make is not None:
        make(tmp_path / path)
    subset = ["heart", "geometric"] if make is None else []
    encoder = "label" if kind == "cifar" else "minilm"
    write_params(tmp_path, data={"source": source, "path": path, "subset": subset, "text_encoder": encoder})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRESCENDO_COMPUTE", "process")
    for stage in STAGES if kind in WHOLE else STAGES[:3]:
        importlib.import_module(f"stages.{stage}").main()
    meta = artifacts.verify_directory(tmp_path / "data/prepared")["meta"]
    counts = meta["counts"]
    assert counts["n_in"] == counts["n_ok"] + counts["n_quarantined"] + counts["n_duplicate"]
    assert counts["n_ok"] == 40 if make is not None else counts["n_ok"] > 50
    assert (meta["source"], meta["text_encoder"]["name"]) == (source, encoder)
    digest = artifacts.directory_digest(tmp_path / "data/prepared")
    assert load_snapshot(tmp_path / "models/finetuned").config.lineage.data == digest
    if kind in WHOLE:
        assert json.loads((tmp_path / "reports/verdict.json").read_text())["data_digest"] == digest
