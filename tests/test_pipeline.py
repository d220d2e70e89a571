"""What a user types: the whole pipeline by DVC at tiny size, again, with a change, and when things go wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

from pipeline.config.strict_yaml import read_yaml
from tests.conftest import ROOT, merge_tiny, write_prepared

BINARIES = Path(sys.executable).parent
PROCESS = {"CRESCENDO_COMPUTE": "process"}  # without Ray, which takes seconds to start
STAGES = ["prepare", "pretrain", "finetune", "refine", "evaluate"]


def run(
    command: str, folder: Path, status: int | None = 0, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Type `command` in a shell in `folder`, with our programs on the path; check its exit status."""
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dropped = ("CRESCENDO_", "MLFLOW_", "DVC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **kept,
            **identity,
            "PATH": f"{BINARIES}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "DVC_NO_ANALYTICS": "1",
            **env,
        },
    )
    assert status is None or done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def write_params(folder: Path, **sections: dict[str, Any]) -> None:
    """Tiny params.yaml with two octaves, with some keys of some sections changed."""
    tree = merge_tiny(read_yaml(ROOT / "params.yaml"))
    tree["data"].update(subset=["heart", "geometric"], resolution=32)
    tree["shell"]["channels"] = [16, 8]
    for name, changes in sections.items():
        tree[name].update(changes)
    YAML(typ="safe").dump(tree, folder / "params.yaml")


def copy_checkout(folder: Path) -> Path:
    """The tracked files, tiny parameters, one commit."""
    folder.mkdir()
    run(f"git -C '{ROOT}' ls-files -z | tar -C '{ROOT}' --null -T - -c | tar x", folder)
    write_params(folder)
    run("git init -q && git add -A && git commit -qm tiny", folder)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which `dvc repro` has run all five stages, and its answer."""
    folder = copy_checkout(tmp_path_factory.mktemp("pipeline") / "checkout")
    (folder / "log").write_text(run("dvc repro 2>&1", folder).stdout)
    run("git add dvc.lock && git commit -qm trained", folder)
    return folder


def stages_run(output: str) -> list[str]:
    """Stages that DVC says it ran."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


def test_one_command_trains_evaluates_and_draws(checkout: Path) -> None:
    log = (checkout / "log").read_text()
    assert stages_run(log) == STAGES
    for stage, total in (("pretrain", 48), ("finetune", 96), ("refine", 48)):
        assert f"{stage} {total}/{total} images" in log
    assert "Traceback" not in log
    assert "Warning" not in log, log
    verdict = json.loads((checkout / "reports/verdict.json").read_text())
    assert verdict["passed"] == all(rule["passed"] for rule in verdict["rules"])
    pictures = ("evaluation/heldout_captions.png", "evaluation/quality.png", "refine/samples.png")
    for picture in (*pictures, "finetune/samples.png", "finetune/samples_16.png"):
        assert (checkout / "reports" / picture).read_bytes().startswith(b"\x89PNG")
    assert "<img" in (checkout / "reports/evaluation/index.html").read_text()
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


def test_the_model_is_registered_and_makes_pictures(checkout: Path) -> None:
    verdict = json.loads((checkout / "reports/verdict.json").read_text())
    refused = run("crescendo promote", checkout, status=0 if verdict["passed"] else 1)
    assert verdict["passed"] or "E-GATE" in refused.stderr
    promoted = run("crescendo promote --allow-candidate", checkout).stdout
    assert "version 1" in promoted, promoted
    made = run("crescendo generate 'red heart' --num 4 --steps 1 --out g.png", checkout).stdout
    assert made.startswith("model: models:/crescendo@" + ("champion" if verdict["passed"] else "candidate"))
    folder = run("crescendo generate 'red heart' --num 4 --out f.png --model models/refined", checkout)
    assert "models/refined" in folder.stdout
    assert (checkout / "g.png").read_bytes() == (checkout / "f.png").read_bytes()
    for size in (8, 16, 32):
        made = run(f"crescendo generate 'red heart' --num 1 --resolution {size} --out f.png", checkout).stdout
        assert f"wrote 1 pictures of {size}x{size} px" in made
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


def test_a_change_reruns_what_follows_from_it_and_can_be_compared(checkout: Path) -> None:
    ran = run("dvc exp run -n slower -S finetune.lr=0.005 2>&1", checkout, env=PROCESS).stdout
    assert stages_run(ran) == ["finetune", "refine", "evaluate"]
    changed = json.loads(run("dvc metrics diff --json", checkout).stdout)
    assert "reports/finetune/metrics.json" in changed
    assert "reports/pretrain/metrics.json" not in changed
    run("dvc plots diff", checkout)
    page = (checkout / "dvc_plots/index.html").read_text()
    for curve in ("loss", "generator_loss", "samples"):
        assert curve in page
    assert "slower" in run("dvc exp show --csv", checkout).stdout
    run("git checkout -q . && dvc checkout -q && rm -r dvc_plots", checkout)
    assert stages_run(run("dvc repro", checkout).stdout) == []


# --- When things go wrong: one line, the right exit status, nothing lost.


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The single line of an error."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("E-")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture()
def bare(tmp_path: Path) -> Path:
    """A checkout in which nothing has run."""
    return copy_checkout(tmp_path / "bare")


def test_bad_parameters_and_a_missing_source_are_one_line(bare: Path) -> None:
    text = (bare / "params.yaml").read_text()
    (bare / "params.yaml").write_text(text.replace("num_images:", "num_imges:", 1))
    done = run("python -m stages.pretrain", bare, status=78)
    assert "num_imges" in last_line(done)
    assert "did you mean 'num_images'" in last_line(done)
    write_params(bare, data={"source": "folder", "path": "data/none", "subset": []})
    assert "data/none" in last_line(run("python -m stages.prepare", bare, status=66))
    write_params(bare, data={"source": "openmoji==1.0.0"})
    assert "1.0.0" in last_line(run("python -m stages.prepare", bare, status=78))
    assert "data/prepared" in last_line(run("python -m stages.pretrain", bare, status=66))


def test_a_full_disk_is_one_line_and_prepare_goes_on_when_there_is_room(bare: Path) -> None:
    """In a mount namespace, `data` is a file system of 64 KiB."""
    mount = "mount -t tmpfs -o size=64k none data && mkdir data/raw"
    script = f"{mount} && python -m stages.prepare; code=$?; ls data; exit $code"
    done = run(f"unshare --map-root-user --mount sh -c '{script}'", bare, status=74, env=PROCESS)
    assert "disk full" in last_line(done)
    assert "prepared" not in done.stdout.split()


def test_no_permission_is_one_line(bare: Path) -> None:
    mount = "mount --bind data data && mount -o remount,ro,bind data && python -m stages.prepare"
    done = run(f"unshare --map-root-user --mount sh -c '{mount}'", bare, status=77, env=PROCESS)
    assert "data" in last_line(done)


def test_a_stopped_stage_ends_with_75_and_continues(bare: Path) -> None:
    """SIGTERM in the middle of pretrain; then the same command ends in the bits of an unbroken run."""

    write_prepared(bare / "data/prepared", resolution=32)
    write_params(bare, pretrain={"num_images": 480, "sample_images": 480})
    run("python -m stages.pretrain", bare, env=PROCESS)
    whole = (bare / "models/core/model.safetensors").read_bytes()
    run("rm -r runs models", bare)
    stop = (
        "python -m stages.pretrain & p=$!; until ls runs/pretrain/*/checkpoints/nimg-* >/dev/null 2>&1; "
        "do sleep 0.1; done; kill $p; wait $p"
    )
    done = run(stop, bare, status=75, env=PROCESS)
    assert "again to continue" in done.stderr
    assert not (bare / "models").exists()
    run("python -m stages.pretrain", bare, env=PROCESS)
    assert (bare / "models/core/model.safetensors").read_bytes() == whole


REGISTER = """
from pathlib import Path
from pipeline import artifacts
from pipeline.registry.package import Registry
core = Path("models/core")
Registry(Path(".")).register("crescendo", core, artifacts.directory_digest(core), {})
"""


def test_a_registered_model_is_pinned_and_grown_and_another_digest_is_refused(bare: Path) -> None:
    """A core that was registered, in the place of which models/core holds another one."""
    write_prepared(bare / "data/prepared", resolution=32)
    few = {"num_images": 16, "sample_images": 16}
    asked = {
        "heldout_captions": 4,
        "samples_per_caption": 1,
        "train_captions": 8,
        "teacher_train_captions": 4,
    }
    sections = {"pretrain": few, "finetune": few, "refine": few, "evaluate": asked}
    write_params(bare, **sections)
    run("python -m stages.pretrain", bare, env=PROCESS)
    run(f"python -c '{REGISTER}'", bare)
    registered = json.loads((bare / "models/core/manifest.json").read_text())["digest"]
    weights = (bare / "models/core/model.safetensors").read_bytes()
    write_params(bare, **{**sections, "pretrain": {**few, "lr": 0.01}})
    run("python -m stages.pretrain", bare, env=PROCESS)
    assert "models:/crescendo/1" in run("crescendo pin models:/crescendo/1", bare).stdout
    text = (bare / "params.yaml").read_text()
    (bare / "params.yaml").write_text(text.replace(registered, "f" * 64))
    refused = last_line(run("python -m stages.finetune", bare, status=74, env=PROCESS))
    assert registered[:12] in refused and "crescendo pin models:/crescendo/1" in refused
    (bare / "params.yaml").write_text(text)
    assert (bare / "models/core/model.safetensors").read_bytes() != weights
    run("python -m stages.pretrain", bare, env=PROCESS)
    assert (bare / "models/core/model.safetensors").read_bytes() == weights
    numbers = json.loads((bare / "reports/pretrain/metrics.json").read_text())
    assert numbers["num_images"] == 0 and (bare / "reports/pretrain/samples.png").is_file()
    run("python -m stages.finetune", bare, env=PROCESS)
    lineage = json.loads((bare / "models/finetuned/config.json").read_text())["lineage"]
    assert (lineage["init_from"], lineage["init_sha256"]) == ("models:/crescendo/1", registered)
    run("python -m stages.refine && python -m stages.evaluate", bare, env=PROCESS)
    lineage = json.loads((bare / "models/refined/config.json").read_text())["lineage"]
    assert (lineage["init_from"], lineage["init_sha256"]) == ("models:/crescendo/1", registered)
