"""Pictures that keep their shape (`data.fit: buckets`) against pictures cropped to squares, at equal cost.

    python -m benchmarks.buckets [--images 6400] [--out runs/buckets]

The pictures are fruit, vegetables and mammals of OpenMoji on canvases of five shapes: one on a square, two side by
side or one above the other on the rest. A crop to the square around the centre cuts those in half. Both models have
the same networks and the same number of training images; then both are asked for pictures of every shape, with
captions of the test split. KID is against the real pictures of that shape, in random features whitened by them
(`randconv`).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import machine, significant, table
from pipeline.config.params import Params, parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import generate
from pipeline.evaluation.features import Whitening, randconv
from pipeline.evaluation.metrics import kid
from pipeline.launch.worker import WorkerConfig
from pipeline.models.shape import on_one_canvas
from pipeline.models.snapshot import load_snapshot
from pipeline.prepare.framing import Framing
from pipeline.prepare.prepare import prepare
from pipeline.prepare.sources.openmoji import OpenMoji
from pipeline.training.reports import save_grid
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain

SUBGROUPS = ("food-fruit", "food-vegetable", "animal-mammal")
SIZES = ((96, 96), (160, 96), (96, 160), (192, 96), (96, 192))  # of canvases: width, height
COPIES = 160  # canvases of each size
FITS = ("crop", "buckets")
SAMPLES, STEPS, SHOWN = 96, 8, 8  # of each shape, their steps, and those on the sheet


class Drawing(NamedTuple):
    """Pixels and a name."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]  # [S,S,3]
    name: str


def drawings(side: int) -> list[Drawing]:
    """The emoji of SUBGROUPS, `side` px wide, on white."""
    source = OpenMoji("17.0.0", Framing(side, "crop", (255, 255, 255)))
    items = [item for item in source.listing().items if item.subgroup in SUBGROUPS and item.captions]
    return [Drawing(source.decode(source.read(item), item.where).pixels, item.captions[0]) for item in items]


def compose(folder: Path, copies: int) -> None:
    """Write `copies` canvases of each size, and their captions beside them."""
    draw, known, folder = np.random.default_rng(0), drawings(88), folder / "data/raw"
    folder.mkdir(parents=True)
    for number in range(copies * len(SIZES)):
        width, height = SIZES[number % len(SIZES)]
        canvas = np.full((height, width, 3), 255, np.uint8)
        wanted = 1 if width == height else 2
        chosen = [known[i] for i in draw.choice(len(known), wanted, replace=False)]
        for place, drawing in enumerate(chosen):
            span = max(width, height) // wanted
            side = min(span, 88)
            pixels = np.asarray(
                Image.fromarray(drawing.pixels).resize((side, side), Image.Resampling.BICUBIC)
            )
            along, across = place * span + (span - side) // 2, (96 - side) // 2
            top, left = (across, along) if width >= height else (along, across)
            canvas[top : top + side, left : left + side] = pixels
        Image.fromarray(canvas).save(folder / f"{number:05d}.png")
        text = (" and " if width > height else " above ").join(drawing.name for drawing in chosen)
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")


def params_of(fit: str, num_images: int) -> Params:
    """params.yaml for these pictures, at 64 px: a small core of 32 px and one shell."""
    tree = read_yaml(Path(__file__).parents[1] / "params.yaml")
    tree["data"] |= {"source": "folder", "path": "data/raw", "subset": [], "resolution": 64, "fit": fit}
    tree["core"] |= {"channels": 24, "channel_mult": [1, 2, 4]}
    tree["shell"] |= {"patch": 2, "channels": [16]}
    tree["sampling"] |= {"num_steps": STEPS}
    tree["pretrain"] |= {
        "num_images": num_images,
        "checkpoint_images": num_images,
        "sample_images": num_images,
    }
    fine = num_images // 4
    tree["finetune"] |= {"num_images": fine, "checkpoint_images": fine, "sample_images": fine}
    return parse_params(tree)


def train(root: Path, params: Params) -> float:
    """Prepare, pretrain and finetune below `root`; returns the CPU seconds of training."""
    prepare(params, root, root / "runs/prepare")
    start = time.process_time()
    for stage, kind, work in (("pretrain", "core", pretrain), ("finetune", "finetuned", finetune)):
        run = root / "runs" / stage
        run.mkdir(parents=True)
        work(WorkerConfig(params, root, run))
        shutil.copytree(run / "result/model", root / "models" / kind)
    return time.process_time() - start


def judge(roots: dict[str, Path], out: Path) -> list[list[str]]:
    """A line for each shape: real pictures, KID between halves of them, KID of each model. Writes a sheet."""
    dataset = PreparedDataset(roots["buckets"] / "data/prepared")
    models = {fit: load_snapshot(root / "models/finetuned") for fit, root in roots.items()}
    network, lines, shown = randconv(dataset.resolution), [], list[Tensor]()
    of_split = {name: dataset.split(name) for name in ("train", "val", "test")}
    every, start = np.arange(len(dataset.rows)), 0
    for bucket in dataset.buckets:
        own, start = every[start : start + bucket.num_images], start + bucket.num_images
        asked = np.resize(np.intersect1d(own, of_split["test"]), SAMPLES)
        text, shape = (
            dataset.text([dataset.caption_of(row) for row in asked.tolist()]),
            dataset.shape_of(own[0]),
        )
        raw = network(dataset.images(own))
        white = Whitening.fit(raw)
        real = white(raw)
        made = {
            fit: generate(model, text, range(SAMPLES), shape=shape).images for fit, model in models.items()
        }
        kids = [kid(real, white(network(made[fit]))) for fit in FITS]
        cells = [f"{bucket.width}x{bucket.height}", str(len(own)), significant(kid(real[::2], real[1::2]))]
        lines.append([*cells, *map(significant, kids)])
        for images in (dataset.images(asked[:SHOWN]), *(made[fit][:SHOWN] for fit in FITS)):
            shown += list(images)
    save_grid(out, on_one_canvas(shown), columns=SHOWN)
    return lines


def main() -> None:
    """Train both models and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6400, help="of the core; a quarter of the shell")
    parser.add_argument("--copies", type=int, default=COPIES, help="canvases of each shape")
    parser.add_argument("--out", type=Path, default=Path("runs/buckets"))
    args = parser.parse_args()
    print(machine(["torch"]))
    roots = {fit: args.out / fit for fit in FITS}
    for fit, root in roots.items():
        shutil.rmtree(root, ignore_errors=True)
        compose(root, args.copies)
        seconds = train(root, params_of(fit, args.images))
        print(f"{fit}: {args.images} and {args.images // 4} images in {seconds:.0f} CPU seconds", flush=True)
    lines = judge(roots, args.out / "sheet.png")
    print(table(["shape", "real", "KID of halves", *(f"KID {fit}" for fit in FITS)], lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
