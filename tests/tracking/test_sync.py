"""What is logged while the server is away, or before a kill, is there in the end, once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.cli import main
from pipeline.errors import Busy, StorageError
from pipeline.tracking import entries, stage_run, store
from pipeline.tracking.spool import SPOOL, STATE, Spool
from pipeline.tracking.stage_run import StageRun
from pipeline.tracking.sync import send_waiting

ROOT = Path(__file__).parents[2]
Switch = Callable[[bool], None]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Switches the server off and on; it is off at first."""
    real, state = store.connect, {"on": False}

    def connect(root: Path) -> object:
        if not state["on"]:
            raise OSError("unreachable")
        return real(root)

    monkeypatch.setattr(stage_run, "connect", connect)
    monkeypatch.setattr(stage_run, "RETRY_SECONDS", 0.0)
    return lambda on: state.update(on=on)


def records(*steps: int, offset: float = 0.0) -> list[dict[str, object]]:
    return [{"nimg": n, "time": 1000.0 + n + offset, "metrics": {"loss": 1.0 / (1 + n)}} for n in steps]


def start(root: Path, folder: str = "a", fresh: bool = True) -> StageRun:
    path = root / "runs/pretrain" / folder
    return stage_run.start_stage_run("pretrain", root, {"lr": 0.1}, {}, folder=path, fresh=fresh)


def history(root: Path, run_id: str) -> list[tuple[int, float]]:
    client, _ = store.connect(root)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")]


def runs_of(root: Path) -> dict[str, str]:
    """Ids and states of the stages' runs."""
    client, experiment = store.connect(root)
    found = client.search_runs([experiment], "tags.`crescendo.kind` = 'stage'")
    return {run.info.run_id: run.info.status for run in found}


def test_what_waits_at_the_end_is_sent_by_sync(
    tmp_path: Path, server: Switch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "infra/compute", tmp_path / "infra/compute")
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    (tmp_path / "gone.txt").write_text("first")
    with start(tmp_path) as run:
        run.log_batch(records(*range(5)))
        run.log_image(tmp_path / "grid.png", "samples", 4)
        run.log_artifact(tmp_path / "gone.txt")
    err = capsys.readouterr().err
    assert err.count("does not answer") == 1 and "`crescendo sync` sends them to mlflow.db" in err
    assert "5 points of metrics and 6 other entries wait in" in err
    with pytest.raises(Busy, match="E-BUSY-041 mlflow.db: MLflow does not answer; 5 points of metrics"):
        main.run(["sync"])
    server(True)
    (tmp_path / "gone.txt").write_text("second")  # another file than what was logged
    with pytest.raises(StorageError, match="can never be sent"):
        main.run(["sync"])
    assert "gone.txt has changed since" in capsys.readouterr().err
    [(run_id, status)] = runs_of(tmp_path).items()
    assert status == "FINISHED"
    assert history(tmp_path, run_id) == [(n, 1.0 / (1 + n)) for n in range(5)]
    client, _ = store.connect(tmp_path)
    assert len(client.list_artifacts(run_id, "images")) == 2  # with its thumbnail
    assert main.run(["sync"]) == 0
    assert capsys.readouterr().out == "nothing waits for MLflow\n"
    assert len(history(tmp_path, run_id)) == 5


def test_an_image_that_is_sent_again_is_there_once_also_after_a_kill_between_it_and_its_thumbnail(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    client, experiment = store.connect(tmp_path)
    run = client.create_run(experiment).info.run_id
    entry = entries.image(tmp_path / "grid.png", tmp_path, "samples/64", 4)
    other = entries.image(tmp_path / "grid.png", tmp_path, "samples/64", 40)

    def names() -> set[str]:
        return {item.path for item in client.list_artifacts(run, "images")}

    def send(entry: entries.Entry) -> None:
        entries.SENDERS["image"](client, run, entry, tmp_path)

    send(entry)
    first = names()
    send(other)
    send(entry)
    assert first < names() and len(first) == 2 and len(names()) == 4, "each with its thumbnail"
    (picture,) = (path for path in first if path.endswith(".png"))
    (thumbnail,) = first - {picture}
    folder = tmp_path / "mlartifacts"
    (place,) = folder.rglob(Path(picture).name)
    (place.with_name(Path(thumbnail).name)).unlink()
    place.write_bytes(place.read_bytes()[:20])  # a copy that was cut off
    send(entry)
    assert len(names()) == 4 and first < names()
    assert Image.open(place).size == (4, 4)


def test_a_file_that_was_logged_again_is_sent_as_it_was_last(
    tmp_path: Path, server: Switch, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(tmp_path) as run:
        for text in ("first", "second"):
            (tmp_path / "scores.txt").write_text(text)
            run.log_artifact(tmp_path / "scores.txt", "watch")
    server(True)
    capsys.readouterr()
    [sync] = send_waiting(tmp_path, tmp_path / "runs")
    assert sync.complete and not sync.lost and capsys.readouterr().err == ""
    [(run_id, _)] = runs_of(tmp_path).items()
    client, _ = store.connect(tmp_path)
    assert Path(client.download_artifacts(run_id, "watch/scores.txt")).read_text() == "second"


def test_steps_that_are_repeated_after_a_kill_are_there_once(tmp_path: Path, server: Switch) -> None:
    server(True)
    killed = start(tmp_path)
    killed.log_batch(records(0, 1, 2))  # without an end: the process is gone
    with start(tmp_path, fresh=True) as again:  # from scratch, as no checkpoint was written
        again.log_batch(records(0, 1, 2, 3, offset=60.0))
    assert again.run_id == killed.run_id
    assert history(tmp_path, again.run_id or "") == [(n, 1.0 / (1 + n)) for n in range(4)]
    assert runs_of(tmp_path) == {again.run_id: "FINISHED"}


def test_the_next_stage_ends_what_was_killed_and_leaves_what_runs(tmp_path: Path, server: Switch) -> None:
    start(tmp_path, "killed").log_batch(records(0, 1))
    busy = start(tmp_path, "busy")
    server(True)
    with artifacts.lease(tmp_path / "runs/pretrain/busy/lease"):
        [sync] = send_waiting(tmp_path, tmp_path / "runs")
    assert sync.folder.name == "killed" and sync.complete and not sync.lost
    assert list(runs_of(tmp_path).values()) == ["KILLED"]
    assert busy.run_id is None and busy.pending == 3


def test_a_run_that_was_deleted_at_the_server_is_logged_again(tmp_path: Path, server: Switch) -> None:
    server(True)
    with start(tmp_path) as first:
        first.log_batch(records(0, 1))
    client, _ = store.connect(tmp_path)
    assert first.run_id
    client.delete_run(first.run_id)
    with start(tmp_path, fresh=False) as second:
        second.log_batch(records(0, 1, 2))
    assert second.run_id not in (None, first.run_id)
    assert [step for step, _ in history(tmp_path, second.run_id or "")] == [0, 1, 2]


def test_a_store_of_another_place_gets_nothing_twice(
    tmp_path: Path, server: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    server(True)
    with start(tmp_path / "old") as run:
        run.log_batch(records(0, 1))
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow's own, in this process
    with start(tmp_path / "new", fresh=False) as again:
        again.log_batch(records(0, 1))
    assert again.run_id == run.run_id
    assert len(history(tmp_path / "new", run.run_id or "")) == 2


@pytest.mark.parametrize("state", ["", "[]", '{"mlflow.db": 1}', None])
def test_a_damaged_state_sends_all_again_and_a_cut_line_costs_itself(
    tmp_path: Path, server: Switch, state: str | None
) -> None:
    server(True)
    with start(tmp_path) as run:
        run.log_batch(records(0, 1))
    folder = tmp_path / "runs/pretrain/a"
    if state is None:
        (folder / STATE).unlink()
    else:
        (folder / STATE).write_text(state)
    with open(folder / SPOOL, "ab") as file:
        file.write(b'{"kind": "poi')
    assert len(list(send_waiting(tmp_path, tmp_path / "runs"))) == 1
    assert list(send_waiting(tmp_path, tmp_path / "runs")) == []
    assert run.run_id and len(history(tmp_path, run.run_id)) == 2
    assert (folder / SPOOL).read_bytes().endswith(b"}\n")


def test_a_damaged_line_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SPOOL).write_bytes(b'{"kind": "tags", "tags": {}}\n{damaged\n{"kind": "tags", "tags": {}}\n')
    assert len(Spool(tmp_path, "mlflow.db").waiting) == 2
    assert "1 damaged lines are left out" in capsys.readouterr().err
