"""`python -m stages.refine`: adversarial refinement into a model of few passes, to models/refined."""

from pipeline import launch
from pipeline.config import load_params
from pipeline.errors import run_main
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    with launch.open_stage("refine", load_params()) as stage:
        stage.run(workers.refine)
        stage.export({"result/model": "models/refined", "result/reports": "reports/refine"})


if __name__ == "__main__":
    run_main(main)
