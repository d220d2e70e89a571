"""What the refine stage chose at its end, and by which distances, as its metrics say it: a driver has no more."""

from collections.abc import Mapping
from typing import NamedTuple

UPSCALING = "upscale_distance_"  # how names of metrics begin that end with a number of steps


class Distances(NamedTuple):
    """Kernel distance to training images in some number of passes, and of the model before refinement in as many
    steps of every level."""

    refined: float
    unrefined: float


def passes_to_keep(distances: Mapping[int, Distances]) -> tuple[int, ...]:
    """The numbers of passes in which refinement gained something."""
    return tuple(n for n, each in distances.items() if each.refined < each.unrefined)


def describe_passes(metrics: Mapping[str, float]) -> list[str]:
    """What was chosen, a line for each number of passes."""
    distances = unflat(metrics)
    kept = passes_to_keep(distances)
    lines = []
    for n, (refined, unrefined) in distances.items():
        passes, what = "1 pass" if n == 1 else f"{n} passes", "kept" if n in kept else "dropped"
        lines.append(f"{passes}: distance {refined:.3g}, before refinement {unrefined:.3g}; {what}")
    if not kept:
        lines.append("nothing was gained: models/refined is the fine-tuned model, unchanged")
    return lines


def flat(distances: Mapping[int, Distances]) -> dict[str, float]:
    """Distances as metrics."""
    return {
        f"{name}_distance_{n}": value
        for n, each in distances.items()
        for name, value in each._asdict().items()
    }


def unflat(metrics: Mapping[str, float]) -> dict[int, Distances]:
    """The inverse of `flat`, which leaves other metrics out."""
    passes = sorted(int(name.rpartition("_")[2]) for name in metrics if name.startswith("refined_distance_"))
    return {n: Distances(*(metrics[f"{name}_distance_{n}"] for name in Distances._fields)) for n in passes}


def steps_to_upscale(metrics: Mapping[str, float]) -> int | None:
    """The number of steps of the lowest distance; None where that is the model before refinement."""
    distances = _by_steps(metrics)
    return min(distances, key=lambda n: distances[n]) or None if distances else None


def describe_upscaling(metrics: Mapping[str, float]) -> list[str]:
    """What `steps_to_upscale` chose, in one line; none for a model without shells."""
    distances, best = _by_steps(metrics), steps_to_upscale(metrics)
    if not distances:
        return []
    steps = [f"in {n} step{'s' * (n > 1)} {value:.3g}" for n, value in distances.items() if n]
    choice = f"it upscales in {best}" if best else "models/finetuned upscales better"
    return [f"upscaling: distance {', '.join(steps)}, before refinement {distances[0]:.3g}; {choice}"]


def _by_steps(metrics: Mapping[str, float]) -> dict[int, float]:
    return {
        int(name[len(UPSCALING) :]): value for name, value in metrics.items() if name.startswith(UPSCALING)
    }
