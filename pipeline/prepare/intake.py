"""From decoded images to records: duplicates and unusable ones are set aside, families found, splits drawn."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.storage import Bucket
from pipeline.errors import BadData, ConfigError
from pipeline.prepare.clusters import Clusters, connected
from pipeline.prepare.disk_list import DiskList
from pipeline.prepare.ingest import IngestedItem
from pipeline.prepare.measure import ImageMeasures, near_duplicates
from pipeline.prepare.sources.source import Item, Listing, Source
from pipeline.prepare.splits import SPLITS
from pipeline.prepare.validation import Record, Report
from pipeline.text.captions import text_flaws
from pipeline.text.encoder import TextEncoder

PREPARED = "data/prepared"
QUARANTINE = "data/quarantine"
DATA_DOCS = "reports/data_docs"
REPORTS = "reports/prepare"


@dataclass
class SortedItems:
    """Where every item went."""

    ok: Sequence[IngestedItem] = field(default_factory=list)
    quarantined: list[IngestedItem] = field(default_factory=list)
    duplicates: list[tuple[IngestedItem, IngestedItem]] = field(
        default_factory=list
    )  # (left out, the one kept)

    def counts(self) -> dict[str, int]:
        """n_in = n_ok + n_quarantined + n_duplicate."""
        ok, bad, double = len(self.ok), len(self.quarantined), len(self.duplicates)
        return {"n_in": ok + bad + double, "n_ok": ok, "n_quarantined": bad, "n_duplicate": double}


@dataclass(frozen=True)
class Inspection:
    """A source after reading, sorting and validation. Only its Data Docs are written yet."""

    source: Source
    listing: Listing
    items: SortedItems
    clusters: Clusters  # of the families of usable images
    splits: dict[str, str]  # of each cluster
    captions: list[str]  # by id; one empty caption where there is none
    encoder: TextEncoder
    encoding: str
    report: Report
    buckets: tuple[Bucket, ...] = ()  # in the order of usable images; none where all images are square

    @property
    def notes(self) -> tuple[BadData, ...]:
        """On files beside the images."""
        return self.listing.notes

    @property
    def families(self) -> list[str]:
        """What each usable image shares its split with: the name of its cluster."""
        return self.clusters.names

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row of index.jsonl per usable image, without its captions. There, `base` is the cluster."""
        for image, family in zip(self.items.ok, self.families, strict=True):
            yield {
                "id": image.item.id,
                "split": self.splits[family],
                "base": family,
                "group": image.item.group,
                "subgroup": image.item.subgroup,
            }

    def split_sizes(self, captioned: bool) -> tuple[dict[str, int], dict[str, int]]:
        """Images and families of each split; with `captioned`, only of images with captions in splits that have
        some."""
        split_of = [self.splits[family] for family in self.families]
        known = [bool(image.item.captions) for image in self.items.ok] if captioned else []
        some = {split for split, own in zip(split_of, known, strict=True) if own} if captioned else set()
        counted = [
            (split, family)
            for i, (split, family) in enumerate(zip(split_of, self.families, strict=True))
            if split not in some or known[i]
        ]
        images = Counter(split for split, _ in counted)
        families = Counter(split for split, _ in set(counted))
        return {name: images[name] for name in SPLITS}, {name: families[name] for name in SPLITS}

    def metrics(self) -> dict[str, Any]:
        """What reports/prepare/metrics.json holds."""
        images, families = self.split_sizes(captioned=False)
        found = {
            "counts": self.items.counts() | images,
            "families": families,
            "clusters": self.clusters.summary(),
            "captions": len([text for text in self.captions if text]),
            "failed_expectations": {name: len(self.report.failed(name)) for name in ("critical", "warning")},
        }
        sizes = {f"{bucket.width}x{bucket.height}": bucket.num_images for bucket in self.buckets}
        return found | ({"buckets": sizes} if sizes else {})


def select(items: Sequence[Item], subset: Sequence[str]) -> Sequence[Item]:
    """Items whose group or subgroup is in `subset`; all of them where it is empty.

    Raises ConfigError for a name that selects nothing.
    """
    if not subset:
        return items
    known = {item.group for item in items} | {item.subgroup for item in items}
    for name in subset:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            few = ", ".join(sorted(known)[:8])
            fix = f"did you mean {close[0]!r}?" if close else f"use names such as: {few}"
            problem = f"{name!r} is not a group or subgroup of this source"
            raise ConfigError("E-CFG-012", "params.yaml: data.subset", problem, fix)
    return DiskList(item for item in items if item.group in subset or item.subgroup in subset)


def sort_out(items: Sequence[IngestedItem]) -> SortedItems:
    """Every item as ok, quarantined or duplicate. Of equal images the first is kept."""
    firsts = _firsts(each.measured.pixels if each.measured else "" for each in items)
    quarantined: list[IngestedItem] = []
    doubles: list[tuple[IngestedItem, int]] = []  # (left out, place of the one kept)

    def usable() -> Iterator[IngestedItem]:
        for number, (each, first) in enumerate(zip(items, firsts, strict=True)):
            if first == number:
                yield each
            elif first < 0:
                quarantined.append(each)
            else:
                doubles.append((each, first))

    ok = DiskList(usable())
    places = {place for _, place in doubles}
    kept = {number: each for number, each in enumerate(items) if number in places} if places else {}
    return SortedItems(ok, quarantined, [(each, kept[place]) for each, place in doubles])


def _firsts(digests: Iterable[str]) -> list[int]:
    """The place of the first of equal hexadecimal digests, of each; -1 for an empty one."""
    values = np.frombuffer(b"".join(bytes.fromhex(text or "00" * 32) for text in digests), "V32")
    _, first, label = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[label]
    firsts[values == np.zeros(1, "V32")] = -1
    numbers: list[int] = firsts.tolist()
    return numbers


def find_families(images: Sequence[IngestedItem]) -> list[str]:
    """The family of each image: its own or, where the source knows none, that of images whose perceptual hashes are
    nearly equal, named after the first of them."""
    facts = [(each.item.family, _measured(each).phash, _measured(each).pixels[:16]) for each in images]
    free = [number for number, (family, _, _) in enumerate(facts) if family is None]
    first = iter(connected(len(free), near_duplicates(facts[number][1] for number in free)))
    return [facts[free[next(first)]][2] if family is None else family for family, _, _ in facts]


def _measured(image: IngestedItem) -> ImageMeasures:
    assert image.measured is not None
    return image.measured


def side_of(image: IngestedItem, resolution: int) -> int:
    """px of the shorter side of a file or, where its bucket is no square, of a square that would be reduced by as
    much to `resolution`."""
    measured, (width, height) = _measured(image), image.size
    return min(measured.width * resolution // width, measured.height * resolution // height)


def make_records(
    images: Sequence[IngestedItem],
    families: Sequence[str],
    splits: dict[str, str],
    encoder: TextEncoder,
    resolution: int,
    most: int,
) -> list[Record]:
    """The table that is validated: a record for each of at most `most` images of `resolution` px, evenly spaced."""
    count = min(most, len(images))
    numbers = [i * len(images) // count for i in range(count)]
    chosen = set(numbers)
    hashes, some = [], []
    for number, image in enumerate(images):
        hashes.append(_measured(image).phash)
        if number in chosen:
            some.append(image)
    names = [image.item.captions[0] if image.item.captions else None for image in some]
    unique = list(dict.fromkeys(name or "" for name in names))
    tokens = dict(zip(unique, encoder.count_tokens(unique), strict=True))
    texts = {text for image in some for text in image.item.captions}
    flaws = {text: text_flaws(text) for text in texts}
    near: dict[int, set[str]] = defaultdict(set)  # splits of each image's near duplicates
    for a, b in near_duplicates(hashes).tolist():
        if families[a] != families[b]:
            near[a].add(splits[families[b]])
            near[b].add(splits[families[a]])
    return [
        Record(
            id=image.item.id,
            split=splits[families[number]],
            family=families[number],
            group=image.item.group,
            subgroup=image.item.subgroup,
            caption=name,
            num_captions=len(image.item.captions),
            caption_flaws=", ".join(sorted({flaw for text in image.item.captions for flaw in flaws[text]})),
            tokens=tokens[name or ""],
            near_elsewhere=len(near[number] - {splits[families[number]]}),
            aspect=round(max(_measured(image)[1:3]) / min(_measured(image)[1:3]), 4),
            side=side_of(image, resolution),
            **_measured(image)._asdict(),
        )
        for number, image, name in zip(numbers, some, names, strict=True)
    ]
