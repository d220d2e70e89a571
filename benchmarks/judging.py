"""Load a model, sample it, judge the samples: what every benchmark of quality shares.

Samples are compared with real images through features that are whitened by the training split, as in the
evaluation; captions are those of the test split.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.conditions import CaptionSet, build_caption_set, family_of
from pipeline.evaluation.features import Extractor, Whitening, lite2, randconv
from pipeline.evaluation.metrics import Float64, kid, prdc
from pipeline.evaluation.retrieval import Judge, top_k
from pipeline.evaluation.statistics import Int64, kid_by_family, number_families
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import set_dtype
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.rng import key
from pipeline.training.numerics import precision

MAX_CAPTIONS = 256
SHEET_COLUMNS = 12

Label = TypeVar("Label")
Result = TypeVar("Result")


# --- Load.


def model_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with --model and --data."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/finetuned"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    return parser


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(path: Path) -> Snapshot:
    """A model on this machine's device, its networks and its early weights in the precision of training."""
    device = default_device()
    snapshot = load_snapshot(path, device)
    for denoiser in (snapshot.denoiser, snapshot.early):
        if denoiser is not None:
            set_dtype(denoiser, precision("auto", device))
    return snapshot


def images_at(dataset: PreparedDataset, rows: NDArray[np.int64], resolution: int) -> Tensor:
    """Images uint8 [n,3,r,r] of some rows, as prepared or at the core's resolution, rounded."""
    if resolution == dataset.resolution:
        return dataset.images(rows)
    assert resolution == dataset.low_resolution
    return dataset.low_images(rows).round().to(torch.uint8)


# --- Sample.


class Requests(NamedTuple):
    """Samples to draw: some of each held-out caption."""

    captions: CaptionSet
    which: Int64  # [N] caption of each sample
    seeds: list[int]
    text: Conditioning


def held_out_requests(
    dataset: PreparedDataset, draws: int, purpose: str = "ablate", limit: int = MAX_CAPTIONS
) -> Requests:
    """`draws` samples of each caption of the test split; seeds depend on purpose, caption and draw alone."""
    captions = build_caption_set(dataset, "heldout", "test", limit, 0)
    draw, which = (grid.ravel() for grid in np.mgrid[:draws, : len(captions.rows)])
    seeds = [key(0, f"{purpose}/{captions.captions[i]}", int(j)) for i, j in zip(which, draw, strict=True)]
    return Requests(captions, which, seeds, dataset.text([captions.caption_ids[i] for i in which]))


def compare(
    ways: Mapping[Label, Callable[[], Result]], cells: Callable[[Label, Result, float], list[str]]
) -> tuple[list[list[str]], list[Result]]:
    """Run each way once; return a table's lines, `cells(label, result, seconds)` each, and the results.

    Lines also go to stderr as they are finished."""
    lines, results = [], []
    for label, run in ways.items():
        start = time.perf_counter()
        results.append(run())
        lines.append(cells(label, results[-1], time.perf_counter() - start))
        print(", ".join(lines[-1]), file=sys.stderr, flush=True)
    return lines, results


def sheet_rows(count: int, columns: int = SHEET_COLUMNS) -> Tensor:
    """Evenly spaced indices [columns] among `count` samples, for a sheet."""
    return torch.linspace(0, count - 1, columns).long()


# --- Judge.


@dataclass(frozen=True)
class WhitenedFeatures:
    """Features [n,d] of images uint8 [n,3,R,R], whitened as those of the training split are."""

    extractor: Extractor
    whitening: Whitening

    @property
    def name(self) -> str:
        return self.extractor.name

    def __call__(self, images: Tensor) -> Float64:
        return self.whitening(self.extractor(images))


def whitened(extractors: Sequence[Extractor], images: Tensor) -> list[WhitenedFeatures]:
    """Fit the whitening of each extractor on images."""
    return [WhitenedFeatures(extractor, Whitening.fit(extractor(images))) for extractor in extractors]


def kids(features: Sequence[WhitenedFeatures], real: Tensor, samples: Tensor) -> dict[str, float]:
    """KID between two sets of images, by extractor."""
    return {each.name: kid(each(real), each(samples)) for each in features}


def caption_kid(captions: CaptionSet, real: Float64, fake: Float64, which: Int64) -> float:
    """KID between features of the real images of all captions and of samples of captions `which` [N], leaving out
    pairs of one family."""
    (unit_real, unit_fake), units = number_families(captions.families, [captions.families[i] for i in which])
    return float(kid_by_family(real, unit_real, fake, unit_fake, np.ones((1, units)))[0])


@dataclass(frozen=True)
class Judges:
    """What samples of held-out captions are compared with: features of real images, and a caption judge."""

    dataset: PreparedDataset
    resolution: int  # px
    features: list[WhitenedFeatures]
    retrieval: Judge

    def measure(self, samples: Tensor, requests: Requests) -> dict[str, float]:
        """KID, precision, recall, density, coverage and caption top-1 of samples uint8 [N,3,R,R]."""
        captions = requests.captions
        real = images_at(self.dataset, captions.rows, self.resolution)
        numbers, raw = {}, []
        for each in self.features:
            raw.append(each.extractor(samples))
            a, b = each(real), each.whitening(raw[-1])
            numbers[f"kid_{each.name}"] = caption_kid(captions, a, b, requests.which)
            if each.name == "randconv":
                numbers |= prdc(a, b)
        unique = sorted(set(captions.caption_ids))
        truth = np.searchsorted(unique, [captions.caption_ids[i] for i in requests.which])
        candidates = self.retrieval.vectors(self.dataset.text(unique).pooled.double().numpy())
        hits = top_k(self.retrieval.predict(np.concatenate(raw, 1)), candidates, truth, 1)
        assert hits.value is not None
        return numbers | {"retrieval": hits.value}


def fit_judges(dataset: PreparedDataset, resolution: int) -> Judges:
    """Fit on the training split at a resolution."""
    rows = dataset.split("train")
    images = images_at(dataset, rows, resolution)
    extractors = [randconv(resolution), lite2(resolution)]
    raw = [extractor(images) for extractor in extractors]
    ids = [dataset.caption_of(int(row)) for row in rows]
    captioned = np.array([i >= 0 for i in ids])
    vectors = dataset.text([i for i in ids if i >= 0]).pooled.double().numpy()
    families = [family_of(dataset.rows[row]) for row in rows[captioned]]
    judge = Judge.fit(np.concatenate(raw, 1)[captioned], vectors, families)
    features = [WhitenedFeatures(e, Whitening.fit(r)) for e, r in zip(extractors, raw, strict=True)]
    return Judges(dataset, resolution, features, judge)
