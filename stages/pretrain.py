"""`python -m stages.pretrain`: the low-resolution core, trained or out of a pinned model, to models/core."""

from pipeline import launch
from pipeline.config import load_params
from pipeline.errors import run_main
from pipeline.registry import pins
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    with launch.open_stage("pretrain", params) as stage:
        stage.run(workers.pretrain, **pins.pinned(stage, params.finetune))
        stage.export({"result/model": "models/core", "result/reports": "reports/pretrain"})


if __name__ == "__main__":
    run_main(main)
