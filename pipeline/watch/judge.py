"""`python -m pipeline.watch.judge ROOT SNAPSHOT`: judge a model that is still training, aside.

Samples of fixed captions and seeds are compared with training images at the model's own resolution: kernel distance
in whitened random features, and the log ratio of power in the top octave. The numbers go to scores.jsonl beside the
snapshot and are drawn with some of the samples (picture.py). There are few samples, of few steps: enough for curves
to look at. The evaluation measures the finished model on the test split.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.adversarial.few_step import generate_images
from pipeline.adversarial.random_features import RandomDistance
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import run_main
from pipeline.evaluation.metrics import log_power_gap, top_octave
from pipeline.evaluation.statistics import Int64, spaced
from pipeline.models.resample import rescale
from pipeline.models.shape import Images, in_order, map_images, on_one_canvas
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.processes import signal_on_parent_death
from pipeline.watch import picture

SAMPLES = 64
STEPS = 8  # of the sampler, at most
REAL = 512  # training images, at most
CHUNK = 16  # of these in float32 at once
SHOWN = 8  # samples in a row of pictures


def some_rows(dataset: PreparedDataset, split: str, limit: int) -> Int64:
    """At most `limit` rows of a split, evenly spaced."""
    rows = dataset.split(split)
    chosen: Int64 = rows[spaced(len(rows), limit)]
    return chosen


def watched_rows(dataset: PreparedDataset) -> Int64:
    """Rows whose captions are drawn, SAMPLES at most: for validation or, if there are none, for training."""
    rows = some_rows(dataset, "val", SAMPLES)
    return rows if len(rows) else some_rows(dataset, "train", SAMPLES)


def draw_samples(snapshot: Snapshot, dataset: PreparedDataset) -> Images:
    """SAMPLES uint8 images of the captions and shapes of `watched_rows`, in turn; seeds are the positions."""
    rows = np.resize(watched_rows(dataset), SAMPLES)
    own = snapshot.config.sampling
    # Other guides may need weights that only the finished model has.
    quick = replace(own, guide="unconditional", guidance=1.0, num_steps=min(own.num_steps, STEPS))
    samples: dict[int, Tensor] = {}
    for seeds, text, shape in dataset.requests(rows):
        samples |= zip(seeds, generate_images(snapshot, text, seeds, quick, shape=shape).images, strict=True)
    return in_order(samples)


def real_images(dataset: PreparedDataset, resolution: int) -> Images:
    """uint8 training images, halved by box means as in training."""
    images = dataset.pictures(some_rows(dataset, "train", REAL))

    def halved(alike: Tensor) -> Tensor:
        parts = (rescale(few.float(), resolution).round() for few in alike.split(CHUNK))
        return torch.cat([part.to(torch.uint8) for part in parts])

    return map_images(halved, images)


def compare(real: Images, fake: Images, resolution: int) -> dict[str, float]:
    """Kernel distance and `log_power_gap` of two sets of uint8 images of `resolution`."""
    return {
        "watch/kid": RandomDistance(real, resolution)(fake),
        "watch/top_octave": log_power_gap(top_octave(real), top_octave(fake)),
    }


def judge(root: Path, path: Path) -> None:
    """Measure the snapshot at `path`, named `nimg-<digits>`; add the result to the files beside it."""
    nimg, folder = int(path.name.removeprefix("nimg-")), path.parent
    dataset, snapshot = PreparedDataset(root / "data" / "prepared"), load_snapshot(path)
    samples = draw_samples(snapshot, dataset)
    metrics = compare(real_images(dataset, snapshot.resolution), samples, snapshot.resolution)
    rows = watched_rows(dataset)
    shown = spaced(len(rows), SHOWN)
    picture.save_row(folder, nimg, on_one_canvas([samples[i] for i in shown.tolist()]))
    scores = folder / "scores.jsonl"
    records = [json.loads(line) for line in scores.read_text().splitlines()] if scores.exists() else []
    new = {"nimg": nimg, "time": time.time(), "resolution": snapshot.resolution, "metrics": metrics}
    records = sorted([*(r for r in records if r["nimg"] != nimg), new], key=lambda r: int(r["nimg"]))
    picture.write_csv(folder / "watch.csv", records)
    picture.draw(folder, records, dataset.names(rows[shown].tolist()))
    artifacts.write_atomic(scores, "".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    """Judge one snapshot; ends with the driver that asked for it."""
    signal_on_parent_death(signal.SIGKILL)
    judge(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_main(main)
