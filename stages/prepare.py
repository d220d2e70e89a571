"""`python -m stages.prepare`: from the source of images to data/prepared, with reports and quarantine."""

import sys
from pathlib import Path

from pipeline.compute import ComputeProfile
from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.session import inside_ray_job
from pipeline.launch.stage import open_stage
from pipeline.prepare import ingest, intake, prepare
from pipeline.processes import cpu_count
from pipeline.progress import ProgressBar
from pipeline.project import is_tracked

UNTRACKED = (
    "{0} is not tracked: clones, and `dvc exp run --temp` or `--queue`, lack it; `dvc add {0}` tracks it"
)

FED = 16  # decoders that one process keeps busy: 12 with photographs of 512 px, 18 with those of 2 megapixels


def needs_ray(profile: ComputeProfile) -> bool:
    """Whether Ray spreads the work: over a cluster, in its job, or over a machine of more cores than one process
    keeps busy. Elsewhere it would only take ten seconds to start."""
    return profile.max_workers > 0 and (inside_ray_job() or cpu_count() > FED)


def main() -> None:
    """Prepare the data, or explain in one line why that failed."""
    params = load_params()
    with open_stage("prepare", params) as stage:
        spread = needs_ray(stage.profile)
        map_tasks, processes = (stage.map_tasks, 1) if spread else (ingest.run_locally, cpu_count())
        work = stage.run_dir.parent / "cache"
        with ProgressBar("prepare") as bar:

            def log(line: str) -> None:
                bar.close()
                print(f"prepare: {line}", file=sys.stderr)

            metrics = prepare.prepare(params, stage.root, work, map_tasks, processes, bar, log)
        if not is_tracked(params.data.path, stage.root):
            log(UNTRACKED.format(params.data.path))
        counts = metrics["counts"]
        stage.log_metrics({name: float(value) for name, value in counts.items()})
        stage.tracker.set_tags({"crescendo.validation": prepare.validation_digest(stage.root)})
        stage.log_artifact(Path(intake.REPORTS))
    left_out = f"{counts['n_quarantined']} quarantined, {counts['n_duplicate']} duplicates"
    parts = prepare.splits_in_words(metrics)
    print(f"prepare: {counts['n_ok']} of {counts['n_in']} images, {parts}; {left_out}", file=sys.stderr)
    print(f"prepare: {prepare.similar_families(metrics)}", file=sys.stderr)
    print(f"prepare: see {intake.DATA_DOCS}/index.html", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
