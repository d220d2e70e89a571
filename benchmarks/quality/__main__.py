"""KID at equal training time: the demo beside diffusers, denoising-diffusion-pytorch and EDM2's configuration.

    python -m benchmarks.quality [--seconds T] [--only edm2 diffusers ddpm] [--images 196] [--sheet FILE]

Needs the demo's data and models (`make demo`). T are the CPU seconds that training the demo takes on one thread,
core, shells and refinement together, measured if they are not given; every peer is trained for as long on the same
images. Its size and learning rate are chosen by pilots of T / 20. All then draw the same held-out captions; of each
peer the sampler and the number of calls that turned out best are shown. What is finished stays in runs/quality, so
a stopped run goes on. benchmarks/README.md says what is alike and what is not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.judging import sheet_rows
from benchmarks.measure import MISSING, machine, significant, table
from benchmarks.quality.base import Conditions
from benchmarks.quality.contest import CANDIDATES, FOLDERS, Contest, Trial, installed
from benchmarks.quality.judge import Judge, Kids, difference, with_interval
from benchmarks.quality.ours import REFINEMENT, training_seconds, ways
from benchmarks.quality.peers import KINDS
from benchmarks.quality.training import Data
from pipeline.config.params import load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.extractors import load_extractors
from pipeline.models.conditioning import Conditioning
from pipeline.models.counting import count_parameters, flops
from pipeline.models.denoiser import Denoiser
from pipeline.training.reports import save_grid
from pipeline.workers.refine import refining_rounds

PILOT = 1 / 20  # of the training, of each candidate
SHEET = 8  # columns
HEADERS = ("contender", "sees", "network", "parameters", "GMAC a call", "images", "CPU s", "sampler", "calls")
HEADERS += ("GMAC an image",)


@dataclass(frozen=True)
class Row:
    """A contender sampled in one way. seconds: of training."""

    cells: tuple[str, ...]
    images: Tensor
    kids: Kids


def log(line: str) -> None:
    """Progress, to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def measured_seconds(root: Path, folder: Path) -> dict[str, float]:
    """What each part of training the demo takes, measured once."""
    path = folder / "seconds.json"
    if not path.is_file():
        measured = training_seconds(load_params(root / "params.yaml"), root)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=1))
    parts: dict[str, float] = json.loads(path.read_text())
    log("CPU seconds of the demo: " + ", ".join(f"{name} {value:.0f}" for name, value in parts.items()))
    return parts


def our_rows(root: Path, judge: Judge, parts: Mapping[str, float], folder: Path) -> Iterator[Row]:
    """Rows of our models; `parts` of their training take so many CPU seconds."""
    params = load_params(root / "params.yaml")
    images = f"{params.pretrain.num_images:,} + {len(params.shell.nets())} x {params.finetune.num_images:,}"
    seeds, text = judge.captions.seeds(0, "quality"), judge.text.select(slice(1))
    for way in ways(root):
        macs = flops(partial(way.sample, text, seeds[:1])) / 2
        drawn = way.sample_once(judge.text, seeds, folder)
        refined = " + ".join(f"{count:,}" for count in refining_rounds(params).values())
        seen = f"{images} + {refined}" if way.passes else images
        call = significant(whole_pyramid(way.snapshot.denoiser, text) / 1e9)
        network = (way.name, "captions", "pyramid", millions(count_parameters(way.snapshot.denoiser)), call)
        trained = sum(value for name, value in parts.items() if way.passes or name != REFINEMENT)
        cells = (*network, seen, f"{trained:.0f}", way.sampler, str(drawn.nfe))
        row = Row((*cells, significant(macs / 1e9)), drawn.images, judge.kids(drawn.images))
        log(f"{way.name}, {way.sampler}: {shown(row.kids)}")
        yield row


def whole_pyramid(denoiser: Denoiser, text: Conditioning) -> float:
    """Multiply-adds of one call of all levels for one image."""
    size = denoiser.resolution
    with torch.no_grad():
        return flops(lambda: denoiser(torch.zeros(1, 3, size, size), torch.ones(1), text)) / 2


def millions(parameters: int) -> str:
    """Such as 1.56M."""
    return f"{parameters / 1e6:.2f}M"


def peer_rows(contest: Contest, judge: Judge) -> Iterator[Row]:
    """A row for every sampler and number of calls of a trained peer; more calls only as long as they help."""
    run, trial = contest.trained(), contest.trials()[0]
    rows = judge.captions.rows[judge.captions.which]
    conditions = Conditions(judge.text, contest.data.numbers(rows))
    network = (contest.name, run.peer.sees, str(trial.setting.plan), millions(trial.parameters))
    for sampler in run.peer.samplers:
        lowest = math.inf
        for calls in run.peer.calls:
            images = contest.samples(run.peer, sampler, calls, conditions)
            cells = (
                significant(trial.macs / 1e9),
                f"{run.nimg:,}",
                f"{run.seconds:.0f}",
                sampler,
                str(calls),
            )
            macs = significant(calls * trial.macs / 1e9)
            row = Row((*network, *cells, macs), images, judge.kids(images))
            log(f"{contest.name}, {sampler}, {calls}: {shown(row.kids)}")
            yield row
            kid = row.kids[judge.extractors[0].name].value
            if kid >= lowest:
                break
            lowest = kid


def best(rows: Sequence[Row], extractor: str) -> Row:
    """The row of the lowest KID."""
    return min(rows, key=lambda row: row.kids[extractor].value)


def shown(kids: Kids) -> str:
    """All extractors in a line."""
    return ", ".join(f"{name} {with_interval(kid)}" for name, kid in kids.items())


def quality_table(rows: Sequence[Row], base: Kids, missing: Sequence[str]) -> str:
    """All rows; differences are to `base`."""
    names = list(base)
    headers = [*HEADERS, *(f"KID {name}" for name in names), *(f"{name}, to ours" for name in names)]
    lines = [
        [
            *row.cells,
            *(with_interval(row.kids[name]) for name in names),
            *("" if row.kids is base else difference(row.kids[name], base[name]) for name in names),
        ]
        for row in rows
    ]
    lines += [[name, MISSING, *[""] * (len(headers) - 2)] for name in missing]
    return table(headers, lines)


def trials_table(trials: Sequence[tuple[str, Trial]]) -> str:
    """The pilots of all peers."""
    headers = ["peer", "network", "parameters", "GMAC a call", "rate", "images", "held-out loss"]
    lines = [
        [
            name,
            str(trial.setting.plan),
            millions(trial.parameters),
            significant(trial.macs / 1e9),
            f"{trial.setting.lr:g}",
            f"{trial.nimg:,}",
            f"{trial.loss:.4f}",
        ]
        for name, trial in trials
    ]
    return table(headers, lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument(
        "--seconds", type=float, help="CPU seconds of the peers' training (as the demo takes)"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(FOLDERS.values()), help="of the peers")
    parser.add_argument("--images", type=int, default=196, help="of each contender (196)")
    parser.add_argument("--root", type=Path, default=Path("."), help="with params.yaml, data/ and models/")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where results are kept")
    parser.add_argument(
        "--sheet", type=Path, help="PNG with the first samples, a row for each of the table's"
    )
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    args = parse()
    torch.set_num_threads(1)
    dataset = PreparedDataset(args.root / "data/prepared")
    parts = measured_seconds(args.root, args.folder)
    seconds = args.seconds or sum(parts.values())
    names = [name for name in KINDS if not args.only or FOLDERS[name] in args.only]
    missing = [name for name in names if name not in installed(names)]
    if missing:
        log(f"not installed: {', '.join(missing)}. Fix: pip install 'crescendo[peers]'")
    contests = [
        Contest(
            name,
            Data(dataset),
            CANDIDATES[name],
            PILOT * seconds,
            seconds,
            args.folder / f"{FOLDERS[name]}-{seconds:.0f}",
            log,
        )
        for name in names
        if name not in missing
    ]
    for contest in contests:
        contest.trained()
    extractors, _ = load_extractors(load_params(args.root / "params.yaml").evaluate.extractors, dataset)
    judge = Judge.build(dataset, extractors, args.images)
    rows = list(our_rows(args.root, judge, parts, args.folder / "ours"))
    main_extractor = extractors[0].name
    base = best(rows, main_extractor).kids
    rows += [best(list(peer_rows(contest, judge)), main_extractor) for contest in contests]
    print(f"{machine(['torch', 'diffusers', 'denoising-diffusion-pytorch'])}\n")
    print(f"{args.images} images, {seconds:.0f} CPU s of training.\n")
    print(quality_table(rows, base, missing))
    print(trials_table([(each.name, trial) for each in contests for trial in each.trials()]))
    if args.sheet:
        shown_rows = sheet_rows(args.images, SHEET)
        save_grid(args.sheet, torch.cat([row.images[shown_rows] for row in rows]), SHEET)


if __name__ == "__main__":
    main()
