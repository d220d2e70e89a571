"""Pictures that keep their shape (`data.fit: buckets`) against pictures cropped to squares, at equal cost.

    python -m benchmarks.buckets [--pictures photographs] [--seed 0] [--out runs/buckets]

The pictures are fruit, vegetables and mammals of OpenMoji on canvases of five shapes: one on a square, two side by
side or one above the other on the rest. A crop to the square around the centre cuts those in half. Or they are
tiles of those shapes, cut out of the photographs that scikit-learn and scikit-image ship
(benchmarks/photographs.py). Both models have the same networks and the same number of training images; then both
are asked for pictures of every shape, with captions of the test split. KID is against the real pictures of that
shape, in random features whitened by them (`randconv`). Photographs have an error, too: that of the estimate of
tiles of held-out ones.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import machine, significant, table
from benchmarks.photographs import HELD_OUT, photographs, tiles
from pipeline.config.params import Params, parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import generate
from pipeline.evaluation.features import Whitening, randconv
from pipeline.evaluation.metrics import kid
from pipeline.launch.worker import WorkerConfig
from pipeline.models.conditioning import Conditioning
from pipeline.models.shape import on_one_canvas
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.prepare.framing import Framing
from pipeline.prepare.prepare import prepare
from pipeline.prepare.sources.openmoji import OpenMoji
from pipeline.rng import generator_for
from pipeline.training.reports import save_grid
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain

SUBGROUPS = ("food-fruit", "food-vegetable", "animal-mammal")
SIZES = ((96, 96), (160, 96), (96, 160), (192, 96), (96, 192))  # of canvases: width, height
COPIES = 160  # canvases of each size
FITS = ("crop", "buckets")
SAMPLES, STEPS, SHOWN = 96, 8, 8  # of each shape, their steps, and those on the sheet
RESOLUTION = {"emoji": 64, "photographs": 32}  # px
IMAGES = {"emoji": 6400, "photographs": 12800}  # that the core is trained on; a quarter for the shell
NOISE = (25.0, 50.0, 100.0, 200.0)  # grey levels, under which held-out photographs are estimated


class Drawing(NamedTuple):
    """Pixels and a name."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]  # [S,S,3]
    name: str


def drawings(side: int) -> list[Drawing]:
    """The emoji of SUBGROUPS, `side` px wide, on white."""
    source = OpenMoji("17.0.0", Framing(side, "crop", (255, 255, 255)))
    items = [item for item in source.listing().items if item.subgroup in SUBGROUPS and item.captions]
    return [Drawing(source.decode(source.read(item), item.where).pixels, item.captions[0]) for item in items]


def canvases(copies: int) -> list[tuple[Image.Image, str]]:
    """`copies` canvases of each size with emoji on them, and their captions."""
    draw, known, made = np.random.default_rng(0), drawings(88), []
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
        text = (" and " if width > height else " above ").join(drawing.name for drawing in chosen)
        made.append((Image.fromarray(canvas), text))
    return made


def write(folder: Path, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Write pictures, and their captions beside them."""
    folder.mkdir(parents=True)
    for number, (picture, caption) in enumerate(pictures):
        picture.save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(caption, encoding="utf-8")


def params_of(fit: str, resolution: int, num_images: int, seed: int = 0) -> Params:
    """params.yaml for these pictures: a small core of half the resolution, px, and one shell."""
    tree = read_yaml(Path(__file__).parents[1] / "params.yaml")
    tree["seed"] = seed
    tree["data"] |= {
        "source": "folder",
        "path": "data/raw",
        "subset": [],
        "resolution": resolution,
        "fit": fit,
    }
    core = {"resolution": resolution // 2, "channels": 24, "channel_mult": [1, 2, 4]}
    tree["core"] |= core | {"attention": [resolution // 8]}
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


@torch.no_grad()
def error(model: Snapshot, pictures: Sequence[tuple[Image.Image, str]], size: tuple[int, int]) -> float:
    """RMSE, in grey levels, of the estimate of pictures at a size, (width, height), without captions, under white
    noise of each of NOISE, the same for all models."""
    small = [np.asarray(each.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)) for each, _ in pictures]
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    std = torch.tensor(model.statistics.std)[:, None, None] * 255  # grey levels in a standardised px
    dim = int(str(model.config.text_encoder["dim"]))
    none = torch.zeros(len(images), dim), torch.zeros(len(images), 1, dim)
    text = Conditioning(*none, torch.zeros(len(images), 1, dtype=torch.bool))
    x, total = model.statistics.standardise(images), 0.0
    for number, level in enumerate(NOISE):
        noise = torch.randn(x.shape, generator=generator_for(0, "held-out photographs", number))
        sigma = level / float(std.mean())
        denoised = model.denoiser(x + sigma * noise, torch.full((len(x),), sigma), text)
        total += float(((denoised - x) * std).square().mean())
    return (total / len(NOISE)) ** 0.5


def judge(dataset: PreparedDataset, models: dict[str, Snapshot], out: Path) -> list[list[str]]:
    """A line for each shape: real pictures, KID between halves of them, KID of each model. Writes a sheet."""
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


def add_errors(
    lines: list[list[str]],
    dataset: PreparedDataset,
    models: dict[str, Snapshot],
    held_out: Sequence[tuple[Image.Image, str]],
) -> None:
    """Add the `error` of each model to the lines of `judge`, on the held-out pictures of each shape."""
    for line, bucket in zip(lines, dataset.buckets, strict=True):
        shape = bucket.width / bucket.height
        own = [each for each in held_out if abs(each[0].width / each[0].height - shape) < 0.1]
        line += [f"{error(model, own, (bucket.width, bucket.height)):.2f}" for model in models.values()]


def main() -> None:
    """Train both models and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", choices=list(RESOLUTION), default="emoji")
    parser.add_argument("--images", type=int, default=0, help="of the core; a quarter of the shell")
    parser.add_argument("--copies", type=int, default=COPIES, help="pictures of each shape")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--out", type=Path, default=Path("runs/buckets"))
    args = parser.parse_args()
    print(machine(["torch"]))
    images, held_out = args.images or IMAGES[args.pictures], []
    if args.pictures == "photographs":
        files = photographs()
        held_out = tiles(files[HELD_OUT], SIZES, args.copies // 2, seed=1)
        pictures = tiles([file for file in files if file not in files[HELD_OUT]], SIZES, args.copies)
    else:
        pictures = canvases(args.copies)
    for fit in FITS:
        root = args.out / fit
        shutil.rmtree(root, ignore_errors=True)
        write(root / "data/raw", pictures)
        seconds = train(root, params_of(fit, RESOLUTION[args.pictures], images, args.seed))
        print(f"{fit}: {images} and {images // 4} images in {seconds:.0f} CPU seconds", flush=True)
    models = {fit: load_snapshot(args.out / fit / "models/finetuned") for fit in FITS}
    dataset = PreparedDataset(args.out / "buckets/data/prepared")
    lines = judge(dataset, models, args.out / "sheet.png")
    head = ["shape", "real", "KID of halves", *(f"KID {fit}" for fit in FITS)]
    if held_out:
        head += [f"error {fit}" for fit in FITS]
        add_errors(lines, dataset, models, held_out)
    print(table(head, lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
