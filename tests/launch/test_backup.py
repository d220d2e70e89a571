"""Copies of a run's state in a store: what is kept there, and what a run goes on from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline import artifacts
from pipeline.data import folders
from pipeline.launch.backup import KEEP, RECORDS, Backup, folders_of


@pytest.fixture
def store() -> Iterator[Any]:
    """An object store in memory, empty."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()


def train(run_dir: Path, nimg: int) -> None:
    """Leave what a run of two rounds of growth has at image `nimg`, of the second."""
    first = run_dir / "to-32"
    for path in (
        first / "result",
        first / f"checkpoints/nimg-{8:012d}",
        run_dir / f"to-64/averages_32/nimg-{nimg:012d}",
        run_dir / f"to-64/checkpoints/nimg-{nimg:012d}",
    ):
        if not path.exists():
            with artifacts.commit_directory(path, {"nimg": nimg}) as folder:
                (folder / "state.safetensors").write_text(f"{path.name} of {path.parent}")
    with open(run_dir / "progress.jsonl", "a") as file:
        file.write(f"{nimg}\n")


def content(run_dir: Path) -> dict[str, bytes]:
    """All that a run goes on from."""
    parts = [run_dir / name for name in RECORDS if (run_dir / name).exists()]
    parts += [path for folder in folders_of(run_dir) for path in folder.iterdir()]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in parts}


def backup(run_dir: Path) -> Backup:
    run_dir.mkdir(exist_ok=True)
    return Backup("finetune", run_dir, "memory://bucket/runs")


def test_a_run_goes_on_from_the_newest_state_that_is_whole(
    store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, seen = tmp_path / "a/run", []
    here.mkdir(parents=True)
    sender = backup(here)
    assert not sender.restore()
    for nimg in (16, 24, 32):
        train(here, nimg)
        sender.send_new()
        sender.send_new()  # nothing new
        seen.append(content(here))
    assert [path.name for path in here.iterdir() if path.name.startswith("backup-")] == []
    place = "/bucket/runs/finetune/run"
    assert len(store.find(f"{place}/states")) == KEEP
    states = [sender._read(number) for number in sender._states()]
    assert {Path(path).name for path in store.find(f"{place}/objects")} == {
        file.sha256 for state in states for file in state.values()
    }

    (tmp_path / "b").mkdir()
    assert backup(tmp_path / "b/run").restore() and content(tmp_path / "b/run") == seen[2]
    own = states[-1][f"to-64/checkpoints/nimg-{32:012d}/state.safetensors"]
    store.pipe_file(f"{place}/objects/{own.sha256}", b"x" * own.size)
    (tmp_path / "c").mkdir()
    assert backup(tmp_path / "c/run").restore() and content(tmp_path / "c/run") == seen[1]
    assert f"objects/{own.sha256}: is not what was sent; the state before is used" in capsys.readouterr().err


def test_a_store_that_is_away_costs_one_line_and_gets_the_next_state(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sender = backup(tmp_path / "run")
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise ConnectionError("refused")

        patch.setattr(folders, "WAITS", ())
        patch.setattr(type(store), "put_file", away)
        for nimg in (16, 24):
            train(tmp_path / "run", nimg)
            sender.send_new()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "finetune: its state is not copied to memory://bucket/runs/finetune/run for now (E-BUSY-062"
    )
    assert sender._states() == []
    with sender:
        pass  # the end sends what has not been
    assert sender._states() == [1]


def test_a_name_that_leads_out_of_the_run_folder_is_refused(store: Any, tmp_path: Path) -> None:
    sender = backup(tmp_path / "run")
    store.pipe_file("/bucket/runs/finetune/run/states/00000001", b'{"../x": ["00", 2]}')
    assert not sender.restore() and not (tmp_path / "x").exists()
