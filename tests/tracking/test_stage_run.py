"""MLflow runs in a real SQLite store: parents, restarts, replays, and an unreachable server."""

from pathlib import Path

import pytest

from pipeline.tracking import runs, stage_run, store
from pipeline.tracking.spool import Spool


def test_a_restarted_stage_continues_its_run_and_replayed_metrics_are_there_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params = {"pretrain": {"lr": 0.01, "ema_std": [0.05, 0.1]}}
    records = [{"nimg": n, "time": 1000.0 + n, "metrics": {"loss": 1.0 / (1 + n)}} for n in range(5)]
    with pytest.raises(RuntimeError), stage_run.start_stage_run("pretrain", tmp_path, params, {}) as first:
        first.log_batch(records)
        raise RuntimeError("killed")
    client, experiment = store.connect(tmp_path)
    assert first.run_id is not None
    assert client.get_run(first.run_id).info.status == "FAILED"
    with stage_run.start_stage_run("pretrain", tmp_path, params, {}) as again:
        again.log_batch(records)
        again.log_outputs({"models/core": "abc"})
    assert again.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"pretrain.lr": "0.01", "pretrain.ema_std": "[0.05, 0.1]"}
    history = client.get_metric_history(first.run_id, "loss")
    assert [(m.step, m.timestamp) for m in history] == [(n, 1000000 + 1000 * n) for n in range(5)]
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["stage.pretrain"] == first.run_id
    assert len(client.search_runs([experiment])) == 2
    assert runs.find_run_by_output("models/core", "abc", tmp_path) == first.run_id
    assert runs.find_run_by_output("models/core", "other", tmp_path) is None
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_a_value_that_is_logged_twice_at_once_is_there_once(tmp_path: Path) -> None:
    with stage_run.start_stage_run("refine", tmp_path, {"a": 1}, {}) as run:
        run.log_batch([{"nimg": 0, "time": when, "metrics": {"score": 3.0}} for when in (1.0, 2.0)])
    assert run.run_id is not None
    client, _ = store.connect(tmp_path)
    assert [m.value for m in client.get_metric_history(run.run_id, "score")] == [3.0]


def test_a_picture_that_a_restarted_stage_finds_again_is_sent_once(tmp_path: Path) -> None:
    picture = {"kind": "image", "path": "a.png", "digest": "d", "name": "samples", "step": 8}
    Spool(tmp_path, "server").append([picture, picture])
    again = Spool(tmp_path, "server")
    again.append([picture, picture | {"digest": "e"}])
    assert [waiting.entry["digest"] for waiting in again.waiting] == ["d", "e"]


def test_stages_share_a_parent_and_name_the_producers_of_their_inputs(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    with stage_run.start_stage_run("pretrain", tmp_path, {}, {"s3://a/b": "far"}) as core:
        core.log_outputs({"models/core": "abc"})
    with stage_run.start_stage_run("finetune", tmp_path, {}, {"models/core": "abc"}) as shell:
        shell.log_metrics({"loss": float("inf")}, step=3, timestamp=1.0)
    client, _ = store.connect(tmp_path)
    assert core.run_id and shell.run_id
    one, two = (client.get_run(run).data.tags for run in (core.run_id, shell.run_id))
    assert one["mlflow.parentRunId"] == two["mlflow.parentRunId"]
    assert one["input.s3:/a/b"] == "far"
    assert two["producer.models/core"] == core.run_id
    assert two["infinite.loss"] == "inf at nimg 3"


def test_an_unreachable_server_warns_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with stage_run.start_stage_run("pretrain", tmp_path, {"a": 1}, {}) as run:
        for n in range(20):
            run.log_metrics({"loss": 1.0}, step=n)
    err = capsys.readouterr().err
    assert run.run_id is None and run.pending > 20
    assert err.count("does not answer") == 1 and len(err.splitlines()) == 2
    assert "secret" not in err


def test_the_queue_is_sent_in_order_when_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_run, "RETRY_SECONDS", 0.0)
    real, refusals = store.connect, iter([OSError("unreachable")] * 2)

    def sometimes(root: Path) -> object:
        for error in refusals:
            raise error
        return real(root)

    monkeypatch.setattr(stage_run, "connect", sometimes)
    with stage_run.start_stage_run("pretrain", tmp_path, {"a": 1}, {}) as run:
        run.log_metrics({"loss": 2.0}, step=1, timestamp=1.0)
        run.log_metrics({"loss": 1.0}, step=2, timestamp=2.0)
    assert run.pending == 0 and run.run_id
    client, _ = real(tmp_path)
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [2.0, 1.0]
    assert capsys.readouterr().err.count("does not answer") == 1
