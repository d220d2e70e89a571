"""`python -m stages.finetune`: shells around a trained model, up to data.resolution, to models/finetuned."""

from pipeline import launch
from pipeline.config import load_params
from pipeline.errors import run_main
from pipeline.registry import pins
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with launch.open_stage("finetune", params) as stage:
        stage.run(workers.finetune, **pins.pinned(stage, params.finetune))
        stage.export({"result/model": "models/finetuned", "result/reports": "reports/finetune"})


if __name__ == "__main__":
    run_main(main)
