"""What a user meets when things go wrong: one line, the right exit status, nothing lost."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.checkout import PROCESS, copy_checkout, run, write_params
from tests.conftest import write_prepared

pytestmark = pytest.mark.slow


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
    mount = "mount -t tmpfs -o size=64k none data && touch data/README.md"
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
    unjudged = {"watch_images": {"pretrain": 0, "finetune": 0, "refine": 0}}
    write_params(bare, pretrain={"num_images": 240, "sample_images": 240}, evaluate=unjudged)
    run("python -m stages.pretrain", bare, env=PROCESS)
    files = ("models/core/model.safetensors", "reports/pretrain/curves.csv")
    whole = [(bare / name).read_bytes() for name in files]
    run("rm -r runs models reports", bare)
    stop = (
        "python -m stages.pretrain & p=$!; until ls runs/pretrain/*/checkpoints/nimg-* >/dev/null 2>&1; "
        "do sleep 0.1; done; kill $p; wait $p"
    )
    done = run(stop, bare, status=75, env=PROCESS)
    reached = int(
        re.search(r"E-STOP-001 pretrain: stopped at image (\d+), with a checkpoint", done.stderr)[1]
    )
    assert reached % 8 == 0 and list(bare.glob(f"runs/pretrain/*/checkpoints/nimg-{reached:012d}"))
    assert not (bare / "models").exists() and not list(bare.glob("runs/pretrain/*/stop"))
    run("python -m stages.pretrain", bare, env=PROCESS)
    assert [(bare / name).read_bytes() for name in files] == whole


REGISTER = """
from pathlib import Path
from pipeline.registry.journal import Journal
from pipeline.registry.package import Registry
from pipeline.registry.registration import register
registry, project = Registry(Path(".")), Path("scratch/project")
project.mkdir(parents=True)
with Journal(registry, "crescendo").turn("register", print) as turn:
    register(registry, turn, "crescendo", Path("models/core"), project, {}, None)
"""


def test_a_registered_model_is_pinned_and_grown_and_another_digest_is_refused(bare: Path) -> None:
    """A core that was registered, in the place of which models/core holds another one."""
    write_prepared(bare / "data/prepared", resolution=32)
    few = {"num_images": 16, "sample_images": 16}
    asked = {"max_calls": 400}
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
