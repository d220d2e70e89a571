"""`python -m stages.pretrain`: the low-resolution core, from data/prepared to models/core."""

from pipeline import launch
from pipeline.config import load_params
from pipeline.errors import run_main
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    with launch.stage("pretrain", load_params()) as stage:
        stage.run(workers.pretrain)
        stage.export({"result/model": "models/core", "result/reports": "reports/pretrain"})


if __name__ == "__main__":
    run_main(main)
