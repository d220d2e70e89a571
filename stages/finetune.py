"""`python -m stages.finetune`: a shell around the core, one octave up, to models/finetuned."""

from pipeline import launch
from pipeline.config import load_params
from pipeline.errors import run_main
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    with launch.stage("finetune", load_params()) as stage:
        stage.run(workers.finetune)
        stage.export({"result/model": "models/finetuned", "result/reports": "reports/finetune"})


if __name__ == "__main__":
    run_main(main)
