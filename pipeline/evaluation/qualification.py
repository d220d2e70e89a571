"""Which extractors may be trusted on the data at hand: those whose distance orders damage by its strength.

KID to the training images must grow from real held-out images over slightly and heavily damaged ones to pure noise,
with 95% intervals clear of each other, at the number of held-out images that the evaluation has. An extractor that
fails does not see what it is asked about, or sees it too vaguely for so few images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pipeline.evaluation import damage, statistics
from pipeline.evaluation.features import Extractor, Whitening
from pipeline.evaluation.metrics import Float64, Metric
from pipeline.models.shape import Images, map_images, take

MAX_IMAGES = 128  # images that are damaged
MAX_REFERENCE = 600  # training images that they are compared with

# Slight damage is visible to a careful eye, heavy damage at a glance. Radii are pixels of the images at any
# resolution: it is their finest octave that an extractor has to see.
LADDERS: Mapping[str, tuple[tuple[str, Callable[[Tensor], Tensor]], ...]] = {
    "blur": (
        ("blur 0.7 px", partial(damage.blur, sigma_px=0.7)),
        ("blur 2 px", partial(damage.blur, sigma_px=2.0)),
    ),
    "noise": (
        ("noise 16 levels", partial(damage.add_noise, std=16, seed=0)),
        ("noise 64 levels", partial(damage.add_noise, std=64, seed=0)),
    ),
}
REAL, NOTHING = "real", "pure noise"  # the ends of every ladder


@dataclass(frozen=True)
class Qualification:
    """Whether an extractor orders damage, why not if not, and KID to the training images in each case."""

    extractor: str
    qualified: bool
    reason: str  # "" for a qualified one
    table: tuple[tuple[str, Metric], ...]  # (case, KID)


def qualify(
    extractor: Extractor,
    whitening: Whitening,
    reference: Float64,
    reference_families: Sequence[str],
    images: Images,
    families: Sequence[str],
) -> Qualification:
    """Judge `extractor` on whitened features [n,k] of training images, and m held-out uint8 images.

    No family may be in both. Of more images than MAX_REFERENCE and MAX_IMAGES, evenly spaced ones are used."""
    some = statistics.spaced(len(reference), MAX_REFERENCE)
    held_out = statistics.spaced(len(images), MAX_IMAGES)
    (family_a, family_b), num_families = statistics.number_families(
        [reference_families[i] for i in some], [families[i] for i in held_out]
    )
    counts = statistics.resample_counts(num_families, statistics.generator(0, "qualification"))

    def kid(damaged: Images) -> Metric:
        white = whitening(extractor(damaged))
        return statistics.KidSamples.measure(reference[some], family_a, white, family_b, counts).metric

    real = take(images, held_out)
    table = {REAL: kid(real)}
    for ladder in LADDERS.values():
        table |= {case: kid(map_images(change, real)) for case, change in ladder}
    table[NOTHING] = kid(map_images(partial(damage.noise_like, seed=0), real))
    reason = find_disorder(table)
    return Qualification(extractor.name, not reason, reason, tuple(table.items()))


def find_disorder(table: Mapping[str, Metric]) -> str:
    """The first step of a ladder that does not clearly go up, as a sentence; "" if all do."""
    for ladder in LADDERS.values():
        cases = [REAL, *(case for case, _ in ladder), NOTHING]
        for less, more in itertools.pairwise(cases):
            lower, upper = table[less], table[more]
            if upper.low is None or lower.high is None:
                return str(upper.reason or lower.reason)
            if upper.low <= lower.high:
                return f"KID of {more} {_shown(upper)} is not clear of {less} {_shown(lower)}"
    return ""


def _shown(metric: Metric) -> str:
    return f"{metric.value:.3g} [{metric.low:.3g}, {metric.high:.3g}]"
