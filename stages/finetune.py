"""`python -m stages.finetune`: shells around a trained model, up to data.resolution, to models/finetuned."""

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.judging import Judge
from pipeline.launch.stage import open_stage
from pipeline.registry import pins
from pipeline.workers import finetune


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with open_stage("finetune", params) as stage:
        judge = Judge(params.evaluate.watch_images.finetune)
        stage.run(finetune.finetune, init=pins.pinned(stage, params.finetune), judge=judge)
        stage.export({"result/model": "models/finetuned", "result/reports": "reports/finetune"})


if __name__ == "__main__":
    run_main(main)
