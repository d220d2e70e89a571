"""How much a verdict depends on the seed of training: refine and evaluate, repeated.

    python -m benchmarks.seeds --seeds 3 [--write]

An interval in a verdict is about one trained model: it covers the choice of captions and of noise. Trained with
another seed, the model is another one. This trains the refine stage with several seeds on the same data and the
same fine-tuned model, and evaluates each result with the seed of params.yaml, so captions and noise are the same.
Each seed has a project folder of its own in runs/seeds, made of links; training that was stopped continues there.
With --write the spread becomes `evaluate.training_spread` in params.yaml, so that the next verdict and its page
show it beside the intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy.stats
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from benchmarks import measure
from pipeline import artifacts
from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.evaluation.verdict import Rule, RuleOutcome, Verdict
from pipeline.presets import change_params
from pipeline.tracking import store

FOLDER = "runs/seeds"
OWN = (
    "models",
    "reports",
    "runs",
    "params.yaml",
    "mlflow.db",
    "mlartifacts",
)  # what a project folder does not share

Run = Callable[[str, Path, Path], None]  # runs a stage in a project folder of the project at `root`


@dataclass(frozen=True)
class Spread:
    """One rule with one number of passes, over training seeds; None where there is no number.

    spread: half width of the 95% interval of `values` by Student's t, which for three seeds is 4.3 standard
    deviations. sampling_error: mean half width of the rule's 95% intervals."""

    passes: int
    rule: str
    values: list[float | None]
    outcomes: list[RuleOutcome]
    mean: float | None
    spread: float | None
    sampling_error: float | None


def run_stage(name: str, folder: Path, root: Path) -> None:
    """Run a stage with a tracking store of its own, and the registry of `root`, which may hold the baseline.

    Ends the program with its status if it fails."""
    registry = os.environ.get("MLFLOW_REGISTRY_URI") or store.tracking_uri(root)
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "MLFLOW_REGISTRY_URI": registry}
    env = {**os.environ, **own}
    done = subprocess.run([sys.executable, "-m", f"stages.{name}"], cwd=folder, env=env)
    if done.returncode:
        sys.exit(done.returncode)


def judge(root: Path, seed: int, run: Run) -> Verdict:
    """The verdict on a model that was refined with `seed`, in a project folder that shares all else with `root`."""
    folder = root / FOLDER / f"seed-{seed}"
    link_project(root, folder)
    unwatched = {"evaluate": {"watch_images": {"refine": 0}}}
    shutil.copyfile(root / "params.yaml", folder / "params.yaml")
    change_params(folder, {"seed": seed, **unwatched}, f"params.yaml with seed {seed}")
    run("refine", folder, root)
    shutil.copyfile(root / "params.yaml", folder / "params.yaml")
    run("evaluate", folder, root)
    return Verdict.read(folder / "reports" / "verdict.json")


def link_project(root: Path, folder: Path) -> None:
    """Fill `folder` with links to what `root` holds, except for OWN, and to models/finetuned."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    shared = [path.name for path in root.iterdir() if not path.name.startswith((".", *OWN))]
    for name in (*shared, "models/finetuned"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to((root / name).resolve())


def spreads(verdicts: Sequence[Verdict]) -> list[Spread]:
    """Every rule with every number of passes, in the order of the verdicts."""
    rules: dict[tuple[int, str], list[Rule]] = {}
    for verdict in verdicts:
        for each in verdict.refused or verdict.verdicts:
            for rule in each.rules:
                rules.setdefault((each.passes, rule.name), []).append(rule)
    return [_spread(passes, name, found) for (passes, name), found in rules.items()]


def half_width(values: Sequence[float]) -> float:
    """Within which 95% of further values are expected around the mean of the law that these, at least two, come
    from: the quantile of Student's t times their standard deviation."""
    return float(scipy.stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values)


def _spread(passes: int, name: str, rules: Sequence[Rule]) -> Spread:
    values = [rule.value for rule in rules]
    known = [value for value in values if value is not None]
    halves = [(r.high - r.low) / 2 for r in rules if r.low is not None and r.high is not None]
    return Spread(
        passes=passes,
        rule=name,
        values=values,
        outcomes=[rule.outcome for rule in rules],
        mean=statistics.mean(known) if known else None,
        spread=half_width(known) if len(known) > 1 else None,
        sampling_error=statistics.mean(halves) if halves else None,
    )


def as_param(found: Sequence[Spread], num_passes: Sequence[int]) -> CommentedSeq:
    """The value of `evaluate.training_spread`: of every rule that has a spread, one rule a line."""
    by_rule: dict[str, dict[int, float]] = {}
    for each in found:
        if each.spread is not None:
            by_rule.setdefault(each.rule, {})[each.passes] = float(f"{each.spread:.3g}")
    lines = CommentedSeq()
    for rule, known in by_rule.items():
        line = CommentedMap(rule=rule, half_widths=[known.get(passes) for passes in num_passes])
        line.fa.set_flow_style()
        lines.append(line)
    return lines


def table(found: Sequence[Spread]) -> str:
    """The spread over seeds beside the sampling error, for each rule and number of passes."""
    rows = [
        [
            each.rule,
            str(each.passes),
            *(
                "\u2013" if number is None else f"{number:.3g}"
                for number in (each.mean, each.spread, each.sampling_error)
            ),
            ", ".join(f"{count} {outcome}" for outcome, count in Counter(each.outcomes).items()),
        ]
        for each in found
    ]
    headers = ["rule", "passes", "mean", "spread over seeds", "sampling error", "outcomes"]
    return measure.table(headers, rows)


def main(arguments: Sequence[str] | None = None, run: Run = run_stage) -> None:
    """Train, judge, print the table, write runs/seeds/seeds.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from the seed of params.yaml on (3)")
    parser.add_argument("--write", action="store_true", help="into params.yaml: evaluate.training_spread")
    args = parser.parse_args(arguments)
    count = args.seeds
    if count < 2:
        parser.error("--seeds: a spread needs 2 or more")
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    seeds = list(range(params.seed, params.seed + count))
    verdicts = [judge(root, seed, run) for seed in seeds]
    found = spreads(verdicts)
    tree = {
        "seeds": seeds,
        "models": [verdict.model_digest for verdict in verdicts],
        "baseline": asdict(verdicts[0].baseline),
        "rules": [asdict(each) for each in found],
    }
    artifacts.write_atomic(root / FOLDER / "seeds.json", json.dumps(tree, indent=1, allow_nan=False) + "\n")
    distinct = len(set(tree["models"]))  # fewer where refine ends with the state it began with
    heading = f"{count} seeds, {distinct} different models; spread and sampling error are half widths of 95%"
    print(f"{heading}\n\n{table(found)}", end="")
    if args.write:
        change = {"evaluate": {"training_spread": as_param(found, params.evaluate.num_passes)}}
        change_params(root, change, "params.yaml with the spread over seeds")
        print("\nwritten to params.yaml; `dvc repro evaluate` shows it in the verdict and on its page")


if __name__ == "__main__":
    run_main(main)
