"""Who is compared: the refined model in each number of passes, the fine-tuned model at every budget, the
champion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.config.params import Params
from pipeline.config.sides import side_unit
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import ConfigError
from pipeline.evaluation import statistics
from pipeline.evaluation.comparison import RealImages
from pipeline.evaluation.conditions import build_caption_set
from pipeline.evaluation.contenders import (
    Contender,
    Cost,
    budgets_of,
    call_costs,
    choose,
    cost_of,
    has_early_exit,
    measure_cost,
)
from pipeline.evaluation.cores import side_by_side
from pipeline.evaluation.evidence import CHAMPION, TEACHER
from pipeline.evaluation.features import Extractor, to_resolution
from pipeline.evaluation.samples import CaptionBatch, batches_of
from pipeline.models.shape import in_order
from pipeline.models.snapshot import Snapshot, load_snapshot

COST_IMAGES = 8  # by which the cost of early exit is measured
CHOICE_IMAGES = 64  # of training captions, by which settings of the fine-tuned model are chosen


@dataclass(frozen=True)
class Champion:
    """The pinned model that promotion would replace: its folder, address, and how many passes it is used with
    (None for its fewest, or a model that is not refined)."""

    folder: Path
    address: str
    passes: int | None = None


@dataclass(frozen=True)
class Field:
    """All contenders, with their models and costs."""

    contenders: list[Contender]
    snapshots: dict[str, Snapshot]  # by the name of a model
    folders: dict[str, tuple[str, str]]  # folder and digest of each model
    costs: dict[str, Cost]  # by contender
    candidates: dict[int, str]  # contender by number of passes, or of steps if it is not refined
    tried: dict[str, dict[str, float]]  # KID of each setting that was tried for a budget
    champion: Champion | None

    @property
    def baseline(self) -> str:
        """The contender that candidates are compared with."""
        return TEACHER if self.champion is None else CHAMPION

    @property
    def baseline_address(self) -> str:
        """Of that contender's model."""
        return "models/finetuned" if self.champion is None else self.champion.address

    @property
    def equal_cost(self) -> dict[int, str]:
        """The contender that costs as much as a number of passes, where there is one."""
        names = {each.name for each in self.contenders}
        return {n: f"equal_cost_{n}" for n in self.candidates if f"equal_cost_{n}" in names}


def enter(
    params: Params,
    models: Path,
    dataset: PreparedDataset,
    real: RealImages,
    extractor: Extractor,
    device: str,
    champion: Champion | None,
    log: Callable[[str], None],
) -> Field:
    """Load the models below `models`, and choose the fine-tuned model's setting for each budget by `extractor`.

    Raises InputMissing or StorageError for a model that is missing or damaged, ConfigError for a champion
    that was trained with another text encoder."""
    paths = {"refined": models / "refined", TEACHER: models / "finetuned"}
    if champion is not None:
        paths[CHAMPION] = champion.folder
    snapshots = {name: load_snapshot(path, device) for name, path in paths.items()}
    if champion is not None:
        check_champion(snapshots[CHAMPION], champion, dataset)
    teacher, refined = snapshots[TEACHER], snapshots["refined"]
    text = dataset.text(([i for i in real.captions if i >= 0] or real.captions)[:COST_IMAGES])
    of_a_call = {name: call_costs(snapshot, text) for name, snapshot in snapshots.items()}
    candidates: dict[int, Contender] = {}
    if refined.config.is_refined:
        for n in passes_to_measure(refined, params.evaluate.num_passes, log):
            candidates[n] = Contender(f"refined_{n}", "refined", passes=n)
    else:
        log("models/refined is the fine-tuned model, since refinement gained nothing: it is judged as it is")
    cost_of_passes = {n: cost_of(each, refined, of_a_call["refined"]) for n, each in candidates.items()}
    contenders = [*candidates.values()]
    tried: dict[str, dict[str, float]] = {}
    distance = _choice_distance(teacher, dataset, real, extractor, params)
    for budget in budgets_of(cost_of_passes):
        chosen, tried[budget.name] = choose(teacher, TEACHER, of_a_call[TEACHER], budget, distance)
        if chosen is None:
            log(f"{budget.name}: the fine-tuned model has no setting that costs so little")
            continue
        contenders.append(chosen)
        log(f"{budget.name}: {chosen.describe()}, the best of {max(len(tried[budget.name]), 1)}")
    contenders.append(Contender(TEACHER, TEACHER))
    if champion is not None:
        contenders.append(Contender(CHAMPION, CHAMPION, passes=champion.passes))
    costs = {
        each.name: measure_cost(each, snapshots[each.model], text)
        if has_early_exit(each, snapshots[each.model])
        else cost_of(each, snapshots[each.model], of_a_call[each.model])
        for each in contenders
    }
    folders = {name: (str(path), snapshots[name].digest) for name, path in paths.items()}
    names = {n: each.name for n, each in candidates.items()} or {refined.config.sampling.num_steps: TEACHER}
    return Field(contenders, snapshots, folders, costs, names, tried, champion)


def passes_to_measure(refined: Snapshot, wanted: Sequence[int], log: Callable[[str], None]) -> list[int]:
    """The wanted numbers of passes that the refined model has: all but those that the refine stage dropped.
    Raises ConfigError where none is left."""
    known = refined.config.passes
    for n in sorted(set(wanted) - set(known)):
        log(
            f"refined_{n}: not measured: the refine stage found nothing gained in so many passes, and dropped them"
        )
    measured = sorted(set(wanted) & set(known))
    if not measured:
        problem = f"has {list(wanted)}, of which models/refined has none; it has {list(known)}"
        raise ConfigError("E-CFG-057", "params.yaml: evaluate.num_passes", problem, "add one of these")
    return measured


def check_champion(snapshot: Snapshot, champion: Champion, dataset: PreparedDataset) -> None:
    """Raise ConfigError where the champion reads captions by another text encoder than the data's, or cannot make
    images of the data's sizes."""
    known, given = snapshot.config.text_encoder, dataset.text_encoder
    if known.get("sha256") != given.get("sha256") or known.get("dim") != given.get("dim"):
        problem = f"{champion.address} has the text encoder {known.get('name')}, the data {given.get('name')}"
        fix = "run `crescendo pin --baseline teacher`, or prepare the data with its encoder"
        raise ConfigError("E-CFG-055", "params.yaml: evaluate.baseline", problem, fix)
    config = snapshot.config
    unit = side_unit(config.core.resolution, config.core.net, [shell.net for shell in config.shells])
    for height, width, _ in dataset.buckets if len(dataset.buckets) > 1 else ():
        if any(side * snapshot.resolution % (unit * dataset.resolution) for side in (height, width)):
            problem = f"{champion.address} cannot make images of {width}x{height} px, as the data have"
            fix = "run `crescendo pin --baseline teacher`, or choose another data.bucket_step"
            raise ConfigError("E-CFG-060", "params.yaml: evaluate.baseline", problem, fix)


def _choice_distance(
    teacher: Snapshot, dataset: PreparedDataset, real: RealImages, extractor: Extractor, params: Params
) -> Callable[[Contender], float]:
    """KID to the training images of CHOICE_IMAGES samples of training captions, with seeds that nothing else
    uses."""
    captions = build_caption_set(dataset, "choice", "train", CHOICE_IMAGES, params.seed)
    batches = list(batches_of(captions, dataset, params.seed, params.evaluate.batch_size, "choice"))
    drawn = [captions.families[i] for i in captions.which]
    (unit_real, unit_fake), total = statistics.number_families(real.families, drawn)
    white = real.white(extractor.name)

    def distance(contender: Contender) -> float:
        def drawn_for(batch: CaptionBatch) -> Tensor:
            made = contender.sample(teacher, batch.text, batch.seeds, len(batch.seeds), batch.shape)
            return to_resolution(made.images, dataset.resolution, batch.shape)

        images: dict[int, Tensor] = {}
        for batch, made in zip(batches, side_by_side(drawn_for, batches), strict=True):
            images |= zip(batch.places, made, strict=True)
        fake = real.whitening[extractor.name](extractor(in_order(images)))
        return float(statistics.kid_by_family(white, unit_real, fake, unit_fake, np.ones((1, total)))[0])

    return distance
