"""`python -m stages.evaluate`: measure refined model, fine-tuned model and pinned champion; report and verdict."""

import sys

import torch

from pipeline import artifacts
from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.evaluation.entry import Champion
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.samples import run_locally
from pipeline.launch.session import inside_ray_job
from pipeline.launch.stage import Stage, open_stage
from pipeline.models.counting import note_gpu_memory
from pipeline.registry.pins import pinned_baseline


def main() -> None:
    """Sample, measure, judge and report, or only export a finished run."""
    params = load_params()
    with open_stage("evaluate", params) as stage:
        gpu = torch.cuda.is_available()
        # On one machine its threads are as fast as workers of Ray, and start at once.
        spread = inside_ray_job() and not gpu
        if not stage.exports_finished():
            with artifacts.commit_directory(stage.run_dir / "result", {"stage": "evaluate"}) as result:
                metrics = evaluate(
                    params,
                    stage.root,
                    result,
                    lambda line: print(f"evaluate: {line}", file=sys.stderr),
                    device="cuda" if gpu else "cpu",
                    map_tasks=stage.map_tasks if spread else run_locally,
                    champion=pinned_champion(stage),
                )
            note_gpu_memory(stage.run_dir, "cuda" if gpu else "cpu")
            stage.log_metrics(metrics)
        stage.export(
            {"result/evaluation": "reports/evaluation", "result/verdict.json": "reports/verdict.json"}
        )
        stage.log_artifact("reports/verdict.json")


def pinned_champion(stage: Stage) -> Champion | None:
    """The model that `evaluate.baseline` pins, with the passes that it is used with."""
    section = stage.params.evaluate
    folder = pinned_baseline(stage.root, section, stage.run_dir.parents[1] / "init")
    return None if folder is None else Champion(folder, section.baseline, section.baseline_passes or None)


if __name__ == "__main__":
    run_main(main)
