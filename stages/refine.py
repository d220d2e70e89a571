"""`python -m stages.refine`: adversarial refinement into a model of few passes, to models/refined."""

import json
import sys

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.judging import Judge
from pipeline.launch.stage import open_stage
from pipeline.launch.worker import WorkerConfig
from pipeline.workers import choices


def train(config: WorkerConfig) -> None:
    """What each training process does. Only there is torch imported, which takes seconds and 280 MiB."""
    from pipeline.workers.refine import refine

    refine(config)


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with open_stage("refine", params) as stage:
        stage.run(train, judge=Judge(params.evaluate.watch_images.refine))
        stage.export({"result/model": "models/refined", "result/reports": "reports/refine"})
    metrics = json.loads((stage.root / "reports/refine/metrics.json").read_text())
    for line in choices.describe_passes(metrics) + choices.describe_upscaling(metrics):
        print(f"refine: {line}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
