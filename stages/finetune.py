"""`python -m stages.finetune`: shells around a trained model, up to data.resolution, to models/finetuned."""

from pipeline import launch
from pipeline.config import CORE_MODEL, load_params
from pipeline.errors import run_main
from pipeline.registry import pins
from pipeline.training import workers


def main() -> None:
    """Train, or continue, or only export a finished run."""
    params = load_params()
    source, digest = params.finetune.init_from, params.finetune.init_sha256
    with launch.stage("finetune", params) as stage:
        init = {}
        if source != CORE_MODEL and not stage.finished():
            init["init"] = str(pins.fetch(stage.root, source, digest, stage.run_dir.parents[1] / "init"))
        stage.run(workers.finetune, **init)
        stage.export({"result/model": "models/finetuned", "result/reports": "reports/finetune"})


if __name__ == "__main__":
    run_main(main)
