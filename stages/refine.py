"""`python -m stages.refine`: adversarial refinement into a model of few passes, to models/refined."""

import json
import sys

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.judging import Judge
from pipeline.launch.stage import open_stage
from pipeline.workers import refine, upscale_choice


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with open_stage("refine", params) as stage:
        stage.run(refine.refine, judge=Judge(params.evaluate.watch_images.refine))
        stage.export({"result/model": "models/refined", "result/reports": "reports/refine"})
    metrics = json.loads((stage.root / "reports/refine/metrics.json").read_text())
    lines = refine.describe_choice(refine.unflat(metrics)) + upscale_choice.describe(metrics)
    for line in lines:
        print(f"refine: {line}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
