"""KID of samples of held-out captions, with intervals by families, also of differences between contenders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import statistics
from pipeline.evaluation.comparison import RealImages, measure_real
from pipeline.evaluation.conditions import CaptionSet, build_caption_set
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.statistics import Int64, KidSamples
from pipeline.models.conditioning import Conditioning

SEED = 0

Kids = dict[str, KidSamples]  # by extractor


@dataclass(frozen=True)
class Judge:
    """What samples are compared with: the real images of held-out captions, in whitened features."""

    captions: CaptionSet
    text: Conditioning  # of each image to draw
    real: RealImages
    extractors: Sequence[Extractor]
    of_real: Int64  # families
    of_drawn: Int64
    counts: Float64  # bootstraps

    @classmethod
    def build(cls, dataset: PreparedDataset, extractors: Sequence[Extractor], count: int) -> Judge:
        """For `count` samples, of each caption of the test split once before any comes twice."""
        captions = build_caption_set(dataset, "heldout", "test", count, SEED)
        drawn = [captions.families[i] for i in captions.which]
        (of_real, of_drawn), total = statistics.number_families(captions.families, drawn)
        counts = statistics.resample_counts(total, statistics.generator(SEED, "quality"))
        text = dataset.text([captions.caption_ids[i] for i in captions.which])
        real = measure_real(dataset, extractors, SEED)
        return cls(captions, text, real, extractors, of_real, of_drawn, counts)

    def kids(self, samples: Tensor) -> Kids:
        """KID of samples uint8 [N,3,R,R], image i of caption `captions.which[i]`."""
        kids = {}
        for each in self.extractors:
            white = self.real.whitening[each.name]
            real, drawn = white(each(self.captions.images)), white(each(samples))
            kids[each.name] = KidSamples.measure(real, self.of_real, drawn, self.of_drawn, self.counts)
        return kids


def with_interval(kid: KidSamples) -> str:
    """Such as `0.31 [0.25, 0.38]`."""
    return bracketed(kid.value, *statistics.interval(kid.bootstraps))


def difference(kid: KidSamples, other: KidSamples) -> str:
    """KID minus that of another contender with the same captions, whose families are resampled together."""
    low, high = statistics.interval(kid.bootstraps - other.bootstraps)
    return bracketed(kid.value - other.value, low, high, sign="+")


def bracketed(value: float, low: float, high: float, sign: str = "") -> str:
    """Three significant decimals below 1, two above."""
    digits = 3 if abs(value) < 1 else 2
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
