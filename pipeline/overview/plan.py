"""What `dvc repro` would run, and what it would take: parameters, float operations, memory, time, money.

Counts follow from params.yaml; times are those of a rehearsal (rehearsal.py), carried on to the whole run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from pipeline import artifacts
from pipeline.compute import ComputeProfile, load_profile
from pipeline.config.params import Params, load_params
from pipeline.errors import ConfigError, InputMissing
from pipeline.launch.endings import seconds_taken
from pipeline.launch.session import inside_ray_job
from pipeline.launch.stage import runs_folder
from pipeline.overview.rehearsal import TRAINING, Pace, Rehearsal, rounds_of
from pipeline.overview.stages import StageState, latest_run, stage_states

PLAN = "plan.json"  # in the folder of runs: what was planned last


@dataclass(frozen=True)
class Estimate:
    """What a stage will take. parameters and multiply_adds: of one call for one image, of the model that it makes;
    None for stages that make none. seconds and memory (bytes): None where it was not rehearsed. gpu_memory: bytes
    that a training stage takes on each GPU."""

    stage: str
    images: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    seconds: float | None = None
    memory: int | None = None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Row:
    """A stage of the plan. taken: seconds of its newest run, where it is fresh."""

    state: StageState
    estimate: Estimate | None
    taken: float | None


def make_plan(root: Path, wanted: Sequence[str], log: Callable[[str], None]) -> list[Row]:
    """Rehearse the stages that would run, or those that are named, and estimate what they take.

    Raises ConfigError for an unknown stage, InputMissing where there are no prepared data, StorageError where a
    rehearsal fails."""
    params, profile = load_params(root / "params.yaml"), load_profile(root)
    runs = runs_folder(root, profile)
    states = {state.name: state for state in stage_states(root, runs)}
    for name in wanted:
        if name not in states:
            raise ConfigError(
                "E-CFG-086", "plan", f"{name!r} is no stage", f"choose from {', '.join(states)}"
            )
    due = list(wanted) or [name for name, state in states.items() if state.state != "fresh"]
    planned = _read(runs / PLAN)
    if profile.address is not None and not inside_ray_job():
        log(f"the cluster at {profile.address} is not rehearsed on: no times")
    elif set(due) - {"prepare"}:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=runs) as folder:
            for estimate in _rehearse(root, Path(folder) / "project", params, states, due, log):
                planned[estimate.stage] = estimate
        artifacts.write_atomic(runs / PLAN, json.dumps([asdict(each) for each in planned.values()]))
    return [
        Row(state, planned.get(name) if name in due or state.state == "fresh" else None, _taken(state, runs))
        for name, state in states.items()
    ]


def _rehearse(
    root: Path,
    folder: Path,
    params: Params,
    states: Mapping[str, StageState],
    due: Sequence[str],
    log: Callable[[str], None],
) -> Iterator[Estimate]:
    """Estimates of the training stages and the evaluation among `due`, in order."""
    if not (root / "data/prepared").is_dir():
        fix = "run `dvc repro prepare`: the other stages are rehearsed on its result"
        raise InputMissing("E-INP-080", "data/prepared", "is missing", fix)
    rehearsal = Rehearsal(root, folder, params)
    for stage, model in TRAINING.items():
        if stage not in due and states[stage].state == "fresh":
            rehearsal.link(model, root)
            continue
        log(f"rehearsing {stage}")
        measured, paces = rehearsal.train(stage)
        if stage in due:
            images = getattr(params, stage).num_images
            parameters, multiply_adds = _size_of(folder / model)
            seconds = measured.seconds + further_seconds(params, stage, paces)
            total = images * rounds_of(params, stage)
            costs = (seconds, measured.memory, measured.gpu_memory)
            yield Estimate(stage, total, parameters, multiply_adds, *costs)
    if "evaluate" in due:
        log("rehearsing evaluate")
        seconds, memory = rehearsal.evaluate()
        yield Estimate("evaluate", seconds=seconds, memory=memory)


def further_seconds(params: Params, stage: str, paces: Sequence[Pace]) -> float:
    """What a whole stage takes beyond its rehearsal."""
    section = getattr(params, stage)
    every = section.check_images if stage == "refine" else section.sample_images
    pauses = max(section.num_images // every - 2, 0)  # a rehearsal has two, the last at its end
    return sum(pace.update * (section.num_images - pace.images) + pace.pause * pauses for pace in paces)


def _size_of(model: Path) -> tuple[int, int]:
    """Parameters of a model, and multiply-adds of one call for one image."""
    from pipeline.evaluation.contenders import call_costs
    from pipeline.inference.generator import load_generator

    generator = load_generator(model)
    parameters = sum(p.numel() for p in generator.snapshot.denoiser.parameters())
    return parameters, call_costs(generator.snapshot, generator.text([""]))[-1]


def _taken(state: StageState, runs: Path) -> float | None:
    """Seconds that the newest run of a stage took; None where something changed since."""
    run = latest_run(runs / state.name)
    return None if run is None or state.state != "fresh" else seconds_taken(run)


def _read(path: Path) -> dict[str, Estimate]:
    """What was planned last, by stage."""
    try:
        return {each["stage"]: Estimate(**each) for each in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or of another version
        return {}


def lines(rows: Sequence[Row], profile: ComputeProfile) -> Iterator[str]:
    """The plan as text, a line each."""
    titles = ("images", "parameters", "GMAC/call", "GiB", "GPU GiB", "time", "took")
    yield f"{'stage':9} {'state':9} {_columns(titles)}"
    for row in rows:
        each = row.estimate or Estimate(row.state.name)
        cells = (
            f"{each.images:,}" if each.images else "",
            f"{each.parameters / 1e6:.2f} M" if each.parameters else "",
            f"{each.multiply_adds / 1e9:.3f}" if each.multiply_adds else "",
            f"{each.memory / 2**30:.1f}" if each.memory else "",
            f"{each.gpu_memory / 2**30:.1f}" if each.gpu_memory else "",
            "" if each.seconds is None else tqdm.format_interval(each.seconds),
            "" if row.taken is None else tqdm.format_interval(row.taken),
        )
        why = f"  {'; '.join(row.state.why[:3])}" if row.state.why else ""
        yield f"{row.state.name:9} {row.state.state:9} {_columns(cells)}{why}".rstrip()
    due = [row.estimate.seconds for row in rows if row.state.state != "fresh" and row.estimate is not None]
    known = [seconds for seconds in due if seconds is not None]
    if known:
        yield f"to run: {tqdm.format_interval(sum(known))}{_costs(sum(known) / 3600, profile)}"
    elif all(row.state.state == "fresh" for row in rows):
        yield "nothing would run"


def _columns(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (12, 11, 10, 6, 8, 9, 9), strict=True))


def _costs(hours: float, profile: ComputeProfile) -> str:
    """GPU-hours, and money where the profile has a price."""
    gpus = profile.max_workers * profile.use_gpu
    text = f", {gpus * hours:.2f} GPU-hours" if gpus else ""
    price = profile.price_per_hour
    return text if price is None else f"{text}, {price * hours:.2f} at {price:g} an hour"
