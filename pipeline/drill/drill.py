"""A drill: the same stage twice in scratch projects, left alone and killed at random, and the receipt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline import artifacts
from pipeline.compute import load_profile
from pipeline.config.params import parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.drill.killing import Attempt, killed, timed
from pipeline.drill.plan import planned, scaled
from pipeline.drill.receipt import Receipt, differences
from pipeline.drill.scratch import Scratch, make_scratch
from pipeline.errors import ConfigError

FOLDER = "runs/drill"


def drill(
    root: Path, stage: str, kills: int, minutes: float, profile: str, seed: int, say: Callable[[str], None]
) -> Receipt:
    """Kill `stage` of the project in `root` some times, for some minutes at most; the receipt, which is also
    written to runs/drill/STAGE/receipt.json. The scratch projects beside it stay where the drill has failed.

    Raises ConfigError where the profile trains on a cluster, Busy where the stage fails by itself."""
    compute = load_profile(root, profile)
    if compute.address:
        problem = (
            f"compute profile {profile} trains on a cluster; a drill kills processes of this machine only"
        )
        raise ConfigError("E-CFG-150", "crescendo drill", problem, "choose --under ray or --under process")
    params = scaled(read_yaml(root / "params.yaml"), stage)
    parse_params(params)
    folder = root / FOLDER / stage
    with artifacts.lease(folder.with_suffix(".lease")):
        shutil.rmtree(folder, ignore_errors=True)
        quiet, noisy = (
            Attempt(Scratch(folder / name, stage, profile), compute.max_workers > 0)
            for name in ("quiet", "killed")
        )
        for attempt in (quiet, noisy):
            make_scratch(attempt.scratch, root, params)
        say(f"{stage} is left alone first; its words are in {quiet.scratch.log}")
        receipt = compare(quiet, noisy, kills, seed, 60 * minutes, say)
        artifacts.write_atomic(folder / "receipt.json", json.dumps(receipt.to_json(), indent=1) + "\n")
        if receipt.passed:
            for attempt in (quiet, noisy):
                shutil.rmtree(attempt.scratch.folder)
    return receipt


def compare(
    quiet: Attempt, noisy: Attempt, kills: int, seed: int, seconds: float, say: Callable[[str], None]
) -> Receipt:
    """Run a stage twice, left alone and killed `kills` times at moments that `seed` draws, fewer if both would take
    more than `seconds`. No process is left of either, whatever happens.

    Raises Busy where the stage fails by itself."""
    scratch = quiet.scratch
    try:
        timing = timed(quiet)
        plan = planned(scratch.stage, kills, seed, timing.records)
        killed_seconds = killed(noisy, plan, timing, seconds - timing.total, say)
    finally:
        remaining = []
        for attempt in (quiet, noisy):
            attempt.end()
            remaining += attempt.remaining()
    return Receipt(
        stage=scratch.stage,
        profile=scratch.profile,
        seed=seed,
        images=timing.records[-1],
        asked=kills,
        kills=[asdict(blow) for blow in noisy.blows],
        quiet_seconds=timing.total,
        start_seconds=timing.start,
        killed_seconds=killed_seconds,
        leftover_processes=remaining,
        **differences(scratch, noisy.scratch),
    )
