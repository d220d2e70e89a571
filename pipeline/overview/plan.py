"""What `dvc repro` would run, and what it would take: parameters, float operations, memory, time, money.

Counts follow from params.yaml (counting.py); times and memory are those of a rehearsal (rehearsal.py), carried on
to the whole run. What cannot be rehearsed has counts alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline import artifacts
from pipeline.compute import ComputeProfile, load_profile
from pipeline.config.params import CORE_MODEL, Params, load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import ConfigError, StorageError
from pipeline.launch.endings import seconds_taken
from pipeline.launch.session import inside_ray_job
from pipeline.launch.stage import runs_folder
from pipeline.models.counting import GPU_MEMORY
from pipeline.models.snapshot import read_config
from pipeline.overview.counting import Data, count_stages
from pipeline.overview.rehearsal import TRAINING, Measured, Pace, Rehearsal
from pipeline.overview.stages import StageState, latest_run, stage_states
from pipeline.registry import pins
from pipeline.workers.finetune import growth_rounds
from pipeline.workers.refine import refining_rounds

PLAN = "plan.json"  # in the folder of runs: what was planned last
PREPARED = "data/prepared"
ORDER = (*TRAINING, "evaluate")


@dataclass(frozen=True)
class Estimate:
    """What a stage will take. parameters and multiply_adds: of one call for one image, of the model that it makes;
    None for stages that make none. flops: of the whole stage. seconds and memory (bytes): None where it was not
    rehearsed. gpu_memory: bytes that it takes on each GPU."""

    stage: str
    images: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    flops: int | None = None
    seconds: float | None = None
    memory: int | None = None
    gpu_memory: int | None = None

    def with_measured(self, measured: Measured, seconds: float) -> Estimate:
        """With what a rehearsal has measured."""
        return replace(self, seconds=seconds, memory=measured.memory, gpu_memory=measured.gpu_memory)


class Actual(NamedTuple):
    """What the newest run of a fresh stage took: seconds, and bytes on each GPU; None where that is not known."""

    seconds: float | None = None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Row:
    """A stage of the plan."""

    state: StageState
    estimate: Estimate
    actual: Actual = Actual()


@dataclass(frozen=True)
class Plan:
    """failure: with which a rehearsal ended; what comes after it was not rehearsed."""

    rows: list[Row]
    failure: StorageError | None = None


def make_plan(root: Path, wanted: Sequence[str], log: Callable[[str], None]) -> Plan:
    """Count what all stages take, and rehearse those that would run, or those that are named.

    Raises ConfigError for an unknown stage, StorageError or InputMissing where the prepared data or a pinned model
    are damaged or not to be had."""
    params, profile = load_params(root / "params.yaml"), load_profile(root)
    runs = runs_folder(root, profile)
    states = {state.name: state for state in stage_states(root, runs)}
    for name in wanted:
        if name not in states:
            raise ConfigError(
                "E-CFG-086", "plan", f"{name!r} is no stage", f"choose from {', '.join(states)}"
            )
    due = list(wanted) or [name for name, state in states.items() if state.state != "fresh"]
    dataset = PreparedDataset(root / PREPARED) if (root / PREPARED).is_dir() else None
    log("counting")
    counted = count(root, runs, params, dataset)
    rehearsed: dict[str, Estimate] = {}
    failure = None
    if set(due) & set(counted):
        if why := why_not_rehearsed(params, profile, dataset):
            log(f"nothing is rehearsed, so there are no times: {why}")
        else:
            rehearsed, failure = _rehearse(root, runs, params, states, due, counted, log)
    planned = _read(runs / PLAN) | rehearsed
    if rehearsed:
        artifacts.write_atomic(runs / PLAN, json.dumps([asdict(each) for each in planned.values()]))
    rows = []
    for name, state in states.items():
        estimate = counted.get(name, Estimate(name))
        if name in rehearsed or (name in planned and state.state == "fresh"):
            estimate = _updated(estimate, planned[name])
        rows.append(Row(state, estimate, _actual(state, runs)))
    return Plan(rows, failure)


def count(root: Path, runs: Path, params: Params, dataset: PreparedDataset | None) -> dict[str, Estimate]:
    """What follows from params.yaml, by stage."""
    start = pinned_resolution(root, runs, params)
    loads = count_stages(params, Data.planned(params) if dataset is None else Data.of(dataset), start)
    counted = {stage: Estimate(stage, None, *load) for stage, load in loads.items()}
    grown = len(growth_rounds(params, start or params.core.resolution))
    images = {
        "pretrain": 0 if start else params.pretrain.num_images,
        "finetune": params.finetune.num_images * grown,
        "refine": sum(refining_rounds(params).values()),
    }
    return counted | {stage: replace(counted[stage], images=images[stage]) for stage in TRAINING}


def pinned_resolution(root: Path, runs: Path, params: Params) -> int | None:
    """px of the model that finetune grows, where that is pinned."""
    section = params.finetune
    if section.init_from == CORE_MODEL:
        return None
    folder = pins.fetch(root, section.init_from, section.init_sha256, runs / "init")
    return read_config(folder / "config.json").resolution


def why_not_rehearsed(params: Params, profile: ComputeProfile, dataset: PreparedDataset | None) -> str:
    """Why no stage can be rehearsed here; empty where it can."""
    if profile.address is not None and not inside_ray_job():
        return f"the stages would run on the cluster at {profile.address}"
    if dataset is None:
        return f"{PREPARED} is missing; run `dvc repro prepare`"
    if dataset.resolution != params.data.resolution:
        was, now = dataset.resolution, params.data.resolution
        return f"{PREPARED} has {was} px, params.yaml asks for {now}; run `dvc repro prepare`"
    return ""


def _rehearse(
    root: Path,
    runs: Path,
    params: Params,
    states: Mapping[str, StageState],
    due: Sequence[str],
    counted: Mapping[str, Estimate],
    log: Callable[[str], None],
) -> tuple[dict[str, Estimate], StorageError | None]:
    """Estimates of the stages among `due`, up to the first whose rehearsal fails, and how that did."""
    found: dict[str, Estimate] = {}
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=runs) as folder:
        rehearsal = Rehearsal(root, Path(folder) / "project", params)
        last = max(ORDER.index(stage) for stage in due if stage in ORDER)
        try:
            for stage in ORDER[: last + 1]:
                if stage not in due and states[stage].state == "fresh":
                    rehearsal.link(TRAINING[stage], root)
                    continue
                log(f"rehearsing {stage}")
                if stage == "evaluate":
                    measured, flops = rehearsal.evaluate()
                    estimate = replace(counted[stage], flops=flops).with_measured(measured, measured.seconds)
                else:
                    measured, paces = rehearsal.train(stage)
                    seconds = measured.seconds + further_seconds(params, stage, paces)
                    estimate = counted[stage].with_measured(measured, seconds)
                if stage in due:
                    found[stage] = estimate
        except StorageError as error:
            return found, error
    return found, None


def further_seconds(params: Params, stage: str, paces: Sequence[Pace]) -> float:
    """What a whole stage takes beyond its rehearsal."""
    section = getattr(params, stage)
    every, lengths = section.sample_images, [section.num_images] * len(paces)
    if stage == "refine":
        every, lengths = section.check_images, list(refining_rounds(params).values())
    pauses = (max(images // every - 2, 0) for images in lengths)  # a rehearsal has two, the last at its end
    return sum(
        pace.update * (images - pace.images) + pace.pause * count
        for pace, images, count in zip(paces, lengths, pauses, strict=True)
    )


def _actual(state: StageState, runs: Path) -> Actual:
    """What the newest run of a stage took; nothing where something changed since."""
    run = latest_run(runs / state.name)
    if run is None or state.state != "fresh":
        return Actual()
    try:
        gpu_memory = int(json.loads((run / GPU_MEMORY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # it had none
        gpu_memory = None
    return Actual(seconds_taken(run), gpu_memory)


def _updated(counted: Estimate, planned: Estimate) -> Estimate:
    """What was planned, with the counts that an older version did not make."""
    values = {name: value for name, value in asdict(planned).items() if value is not None}
    return replace(counted, **values)


def _read(path: Path) -> dict[str, Estimate]:
    """What was planned last, by stage."""
    try:
        return {each["stage"]: Estimate(**each) for each in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or of another version
        return {}


def lines(rows: Sequence[Row], profile: ComputeProfile) -> Iterator[str]:
    """The plan as text, a line each: of every stage, and of all."""
    titles = ("images", "parameters", "GMAC/call", "FLOP", "GiB", "GPU GiB", "time", "took", "FLOP/s")
    yield f"{'stage':9} {'state':9} {_columns(titles)}"
    for row in rows:
        why = f"  {'; '.join(row.state.why[:3])}" if row.state.why else ""
        yield f"{row.state.name:9} {row.state.state:9} {_columns(_cells(row.estimate, row.actual))}{why}".rstrip()
    yield f"{'all':9} {'':9} {_columns(_cells(*total(rows)))}".rstrip()
    due = [row.estimate for row in rows if row.state.state != "fresh"]
    known = [each.seconds for each in due if each.seconds is not None]
    if known:
        work = sum(each.flops or 0 for each in due)
        yield f"to run: {tqdm.format_interval(sum(known))}, {work:.2e} FLOP{_costs(sum(known) / 3600, profile)}"
    elif all(row.state.state == "fresh" for row in rows):
        yield "nothing would run"


def total(rows: Sequence[Row]) -> tuple[Estimate, Actual]:
    """Of all stages whose work is counted: sums, None where one lacks it, and the most memory."""
    counted = [row for row in rows if row.estimate.flops is not None]
    each = [row.estimate for row in counted]
    estimate = Estimate(
        "all",
        flops=round(_sum(e.flops for e in each) or 0) or None,
        seconds=_sum(e.seconds for e in each),
        memory=max((e.memory for e in each if e.memory), default=None),
        gpu_memory=max((e.gpu_memory for e in each if e.gpu_memory), default=None),
    )
    peaks = [row.actual.gpu_memory for row in counted if row.actual.gpu_memory]
    return estimate, Actual(_sum(row.actual.seconds for row in counted), max(peaks, default=None))


def _sum(values: Iterable[float | None]) -> float | None:
    """Of all values; None where one is not known."""
    every = list(values)
    known = [value for value in every if value is not None]
    return sum(known) if known and len(known) == len(every) else None


def _cells(planned: Estimate, actual: Actual) -> tuple[str, ...]:
    """A row's cells. Memory of a GPU: planned, and taken; float operations a second: of the time taken, else of
    that planned."""
    memory = [f"{each / 2**30:.1f}" for each in (planned.gpu_memory, actual.gpu_memory) if each]
    seconds = actual.seconds or planned.seconds
    return (
        f"{planned.images:,}" if planned.images else "",
        f"{planned.parameters / 1e6:.2f} M" if planned.parameters else "",
        f"{planned.multiply_adds / 1e9:.3f}" if planned.multiply_adds else "",
        f"{planned.flops:.2e}" if planned.flops is not None else "",
        f"{planned.memory / 2**30:.1f}" if planned.memory else "",
        ", ".join(memory),
        "" if planned.seconds is None else tqdm.format_interval(planned.seconds),
        "" if actual.seconds is None else tqdm.format_interval(actual.seconds),
        f"{planned.flops / seconds:.1e}" if planned.flops and seconds else "",
    )


def _columns(cells: Sequence[str]) -> str:
    return " ".join(
        f"{cell:>{width}}" for cell, width in zip(cells, (11, 10, 9, 8, 5, 10, 8, 8, 8), strict=True)
    )


def _costs(hours: float, profile: ComputeProfile) -> str:
    """GPU-hours, and money where the profile has a price."""
    gpus = profile.max_workers * profile.use_gpu
    text = f", {gpus * hours:.2f} GPU-hours" if gpus else ""
    price = profile.price_per_hour
    return text if price is None else f"{text}, {price * hours:.2f} at {price:g} an hour"
