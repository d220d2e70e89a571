"""`python -m stages.finetune`: shells around a trained model, up to data.resolution, to models/finetuned."""

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.judging import Judge
from pipeline.launch.stage import open_stage
from pipeline.launch.worker import WorkerConfig
from pipeline.registry import pins


def train(config: WorkerConfig) -> None:
    """What each training process does. Only there is torch imported, which takes seconds and 280 MiB."""
    from pipeline.workers.finetune import finetune

    finetune(config)


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with open_stage("finetune", params) as stage:
        judge = Judge(params.evaluate.watch_images.finetune)
        stage.run(train, init=pins.pinned(stage, params.finetune), judge=judge)
        stage.export({"result/model": "models/finetuned", "result/reports": "reports/finetune"})


if __name__ == "__main__":
    run_main(main)
