"""What a user types: the whole pipeline by DVC at tiny size, again, and with a change."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.evaluation.verdict import Verdict
from tests.checkout import PROCESS, STAGES, copy_checkout, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `dvc repro` has run all five stages, and its answer."""
    folder = copy_checkout(tmp_path_factory.mktemp("pipeline") / "checkout")
    (folder / "log").write_text(run("dvc repro 2>&1", folder).stdout)
    run("git add dvc.lock && git commit -qm trained", folder)
    return folder


def stages_run(output: str) -> list[str]:
    """Stages that DVC reports as run."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


def test_one_command_trains_evaluates_and_draws(checkout: Path) -> None:
    log = (checkout / "log").read_text()
    assert stages_run(log) == STAGES
    for stage, total in (("pretrain", 48), ("finetune", 96), ("refine", 96)):
        assert f"{stage} {total}/{total} images" in log
    assert "Traceback" not in log
    assert "Warning" not in log, log
    # So small a model may gain nothing by refinement; then it comes back unchanged.
    config = json.loads((checkout / "models/refined/config.json").read_text())
    kept = config.get("passes", [])
    assert set(kept) <= {1, 2, 4} and log.count("; kept") == len(kept)
    verdict = Verdict.read(checkout / "reports/verdict.json")
    judged = [each.passes for each in verdict.refused or verdict.verdicts]
    assert judged == (kept or [config["sampling"]["num_steps"]])
    images = ("evaluation/heldout_captions.png", "evaluation/quality.png", "refine/samples.png")
    for image in (*images, "finetune/samples.png", "finetune/samples_16.png"):
        assert (checkout / "reports" / image).read_bytes().startswith(b"\x89PNG")
    assert "data:image/" in (checkout / "reports/evaluation/index.html").read_text()
    assert (checkout / "reports/data_docs/index.html").exists()
    status = run("git status --porcelain", checkout).stdout.split()
    assert status == ["??", "log"], "results must be ignored by git"


def test_again_it_runs_nothing(checkout: Path) -> None:
    again = run("dvc repro", checkout).stdout
    assert stages_run(again) == []
    assert "up to date" in again
    assert run("dvc status", checkout).stdout.strip() == "Data and pipelines are up to date."


def test_the_compute_profile_makes_nothing_stale(checkout: Path) -> None:
    answer = run("dvc status", checkout, env=PROCESS)
    assert answer.stdout.strip() == "Data and pipelines are up to date."


def test_a_plan_rehearses_a_stage_and_leaves_the_project_as_it_is(checkout: Path) -> None:
    before = run("git status --porcelain; ls runs/pretrain", checkout).stdout
    shown = run("crescendo plan pretrain", checkout, env=PROCESS).stdout
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("pretrain"))
    assert row[1:3] == ["fresh", "48"] and row[3] != "0.00", shown
    counted = [line.split()[1] for line in shown.splitlines() if line.startswith("all")]
    assert 0 < float(row[6]) < float(counted[0]), shown
    assert shown.splitlines()[-1] == "nothing would run"
    assert run("git status --porcelain; ls runs/pretrain", checkout).stdout == before
    assert not list((checkout / "runs").glob("rehearsal-*"))


def test_the_model_is_registered_and_draws_images(checkout: Path) -> None:
    default = json.loads((checkout / "reports/verdict.json").read_text())["default_passes"]
    refused = run("crescendo promote", checkout, status=0 if default else 1)
    assert default or "E-GATE" in refused.stderr
    promoted = run("crescendo promote --allow-candidate", checkout).stdout
    assert "version 1" in promoted, promoted
    number = json.loads((checkout / "models/refined/config.json").read_text()).get("passes", [1])[0]
    steps = f"--num 4 --steps {number}"
    output = run(f"crescendo generate 'red heart' {steps} --out g.png", checkout).stdout
    assert output.startswith("model: models:/crescendo@" + ("champion" if default else "candidate"))
    folder = run(f"crescendo generate 'red heart' {steps} --out f.png --model models/refined", checkout)
    assert "models/refined" in folder.stdout
    assert Image.open(checkout / "g.png").tobytes() == Image.open(checkout / "f.png").tobytes()
    for size in (8, 16, 32):
        output = run(
            f"crescendo generate 'red heart' --num 1 --resolution {size} --out f.png", checkout
        ).stdout
        assert f"wrote 1 image of {size}x{size} px" in output
    larger = run("crescendo upscale g.png --steps 1 --out f.png", checkout).stdout
    with Image.open(checkout / "g.png") as small, Image.open(checkout / "f.png") as large:
        assert large.size == (2 * small.width, 2 * small.height), larger
    (checkout / "g.png").unlink()
    (checkout / "f.png").unlink()


def test_the_tracker_finds_a_run_of_every_stage_by_its_outputs(checkout: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{checkout / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "crescendo"]
    runs = client.search_runs([experiment.experiment_id])
    stages = [r for r in runs if r.data.tags["crescendo.kind"] == "stage"]
    children = {r.data.tags["mlflow.runName"]: r for r in stages}
    assert sorted(children) == sorted(STAGES)
    assert len(stages) == len(STAGES), "nothing is logged twice"
    [parent] = {r.data.tags["mlflow.parentRunId"] for r in stages}
    assert client.get_run(parent).data.tags["crescendo.kind"] == "pipeline"
    assert {r.info.status for r in children.values()} == {"FINISHED"}
    manifest = json.loads((checkout / "data/prepared/manifest.json").read_text())
    tags = children["prepare"].data.tags
    assert tags["crescendo.validation"] == manifest["meta"]["validation"]["digest"]
    history = client.get_metric_history(children["pretrain"].info.run_id, "loss")
    assert [point.step for point in history] == list(range(8, 49, 8))
    watched = client.get_metric_history(children["pretrain"].info.run_id, "watch/kid")
    assert [point.step for point in watched] == [48]
    assert (checkout / "runs/pretrain/watch.png").read_bytes().startswith(b"\x89PNG")


def test_a_clone_has_everything_and_keeps_it_when_the_source_is_missing(
    checkout: Path, tmp_path: Path
) -> None:
    run("mkdir data/raw && touch data/raw/a.png && dvc add -q data/raw", checkout)
    run(f"dvc remote add -dq here {tmp_path}/remote", checkout)
    run("git add data .dvc && git commit -qm images && dvc push -q", checkout)
    run(f"git clone -q --depth 1 file://{checkout} {tmp_path}/clone", checkout)
    run(f"git worktree add -q {tmp_path}/tree", checkout)
    for folder in (tmp_path / "clone", tmp_path / "tree"):
        run("dvc pull -q", folder)
        assert stages_run(run("dvc repro", folder).stdout) == []
        assert (folder / "data/raw/a.png").exists()
    text = (folder / "params.yaml").read_text().replace("data/README.md", "data/none")
    (folder / "params.yaml").write_text(text)
    assert "data/none" in run("dvc repro", folder, status=255).stderr
    assert (folder / "data/prepared/manifest.json").exists()


def test_a_version_is_made_again_in_a_clone_with_the_same_bits(checkout: Path, tmp_path: Path) -> None:
    run(f"git clone -q {checkout} {tmp_path}/clone", checkout)
    registry = {**PROCESS, "MLFLOW_TRACKING_URI": f"sqlite:///{checkout}/mlflow.db"}
    command = "crescendo reproduce models:/crescendo/1 --only pretrain --environment here --json"
    found = json.loads(run(command, tmp_path / "clone", env=registry).stdout)
    assert found["outcome"] == "identical" and found["inputs"] == {
        "data/prepared": "DVC's remote, if it has it"
    }
    (stage,) = found["stages"]
    assert [output["path"] for output in stage["outputs"]] == ["models/core"]
    assert run("git status --porcelain; git worktree list | tail -n +2", tmp_path / "clone").stdout == ""


def test_a_change_reruns_what_follows_from_it_and_going_back_computes_nothing(checkout: Path) -> None:
    """In a folder of DVC's own, which is removed afterwards."""
    ran = run("dvc exp run --temp -n slower -S finetune.lr=0.005 2>&1", checkout, env=PROCESS).stdout
    assert stages_run(ran) == ["finetune", "refine", "evaluate"]
    run("dvc exp apply slower", checkout)
    changed = json.loads(run("dvc metrics diff --json", checkout).stdout)
    assert "reports/finetune/metrics.json" in changed
    assert "reports/pretrain/metrics.json" not in changed
    run("dvc plots diff", checkout)
    page = (checkout / "dvc_plots/index.html").read_text()
    for curve in ("loss", "generator_loss", "samples"):
        assert curve in page
    assert "slower" in run("dvc exp show --csv", checkout).stdout
    run("git checkout -q params.yaml && rm -r dvc_plots", checkout)
    back = run("dvc repro 2>&1", checkout, env=PROCESS).stdout
    assert back.count("is finished; exporting it") == len(stages_run(back)) == 3
    assert run("git status --porcelain", checkout).stdout.split() == ["??", "log"]
