"""Snapshots for whoever watches a run."""

from pathlib import Path

import pytest
from torch import Tensor

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.training.hooks import Snapshots
from pipeline.training.state import TrainState


def test_snapshots_follow_the_stages_clock_and_the_newest_stay(tmp_path: Path) -> None:
    def write(folder: Path, averages: list[Tensor]) -> None:
        (folder / "model").write_text(str(averages))

    hook = Snapshots(tmp_path, interval=20, batch_size=8, start=48, gather=list, write=write)
    for nimg in range(8, 49, 8):
        hook(TrainState({}, nimg), {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["nimg-000000000064", "nimg-000000000080"]
    for name in names:
        assert artifacts.verify_directory(tmp_path / name)["meta"] == {"nimg": int(name[5:])}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (
            StorageError("E-IO-023", "model", "is not finite", "wait"),
            "E-IO-023 model: is not finite. Fix: wait",
        ),
    ],
)
def test_a_full_disk_or_a_weight_that_is_not_finite_costs_a_snapshot_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, words: str
) -> None:
    def write(folder: Path, averages: list[Tensor]) -> None:
        raise error

    hook = Snapshots(tmp_path, interval=8, batch_size=8, start=0, gather=list, write=write)
    hook(TrainState({}, 8), {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == f"warning: no snapshot at image 8: {words}\n"
