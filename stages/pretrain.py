"""`python -m stages.pretrain`: the low-resolution core, trained or taken from a pinned model, to models/core."""

from pipeline.config.params import load_params
from pipeline.errors import run_main
from pipeline.launch.judging import Judge
from pipeline.launch.stage import open_stage
from pipeline.registry import pins
from pipeline.workers import pretrain


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with open_stage("pretrain", params) as stage:
        judge = Judge(params.evaluate.watch_images.pretrain)
        stage.run(pretrain.pretrain, init=pins.pinned(stage, params.finetune), judge=judge)
        stage.export({"result/model": "models/core", "result/reports": "reports/pretrain"})


if __name__ == "__main__":
    run_main(main)
