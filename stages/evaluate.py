"""`python -m stages.evaluate`: measure core, fine-tuned and refined model; reports/evaluation and the verdict."""

import sys

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.evaluation.evaluate import evaluate
from pipeline.launch.stage import open_stage


def main() -> None:
    """Sample, measure, judge and report."""
    params = load_params()
    with open_stage("evaluate", params) as stage:
        metrics = evaluate(params, stage.root, lambda line: print(f"evaluate: {line}", file=sys.stderr))
        stage.log_metrics(metrics)
        stage.log_artifact("reports/evaluation")
        stage.log_artifact("reports/verdict.json")


if __name__ == "__main__":
    run_main(main)
