"""One store, several checkouts: promotions take turns, and what a killed one leaves is tidied up."""

import shutil
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import Busy, StorageError
from pipeline.registry import journal
from pipeline.registry.journal import Journal
from pipeline.registry.package import Registry
from pipeline.registry.promote import Request, promote
from pipeline.registry.repair import fsck, verify
from tests.registry.conftest import write_model, write_verdict
from tests.registry.processes import copy_project, promote_all, promote_and_die

NAME = "crescendo"


@pytest.fixture
def shared(root: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> Path:
    """The project `root` with a store in a folder of its own."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copy(empty_store / "mlflow.db", folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return folder


def test_four_checkouts_make_one_version_of_each_model_and_one_champion(
    root: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    projects = [copy_project(root, tmp_path_factory.mktemp("project")) for _ in range(4)]
    for project in projects[2:]:
        write_verdict(project, write_model(project / "models/refined", seed=7))
    outcomes = promote_all(projects)
    assert sorted(outcomes) == ["E-GATE-002", "E-GATE-002", "champion", "champion"]
    registry = Registry(root)
    assert len({version.digest for version in registry.versions(NAME)}) == len(registry.versions(NAME)) == 2
    entries = Journal(registry, NAME).entries()
    assert [move.before for entry in entries for move in entry.moves if move.alias == "champion"] == [None]
    assert {entry.state for entry in entries} == {"done"}
    verify(root, NAME, everything=True)


@pytest.mark.parametrize(
    ("method", "call", "after", "champion"),
    [
        ("create_model_version", 1, True, None),  # holds the lock
        ("log_model_artifacts", 1, False, None),  # the upload has not begun
        ("create_model_version", 2, False, None),  # uploaded, not registered
        ("create_model_version", 2, True, None),  # registered, not in the journal
        ("set_registered_model_alias", 2, False, None),  # the candidate alone
        ("set_registered_model_alias", 2, True, "1"),  # everything but the end
    ],
)
def test_what_a_killed_promotion_leaves_is_tidied_up_and_promoted_again(
    root: Path, shared: Path, method: str, call: int, after: bool, champion: str | None
) -> None:
    assert promote_and_die(root, method, call, after)
    registry, lines = Registry(root), []
    assert registry.aliases(NAME).get("champion") == champion
    fsck(root, NAME, lines.append)
    assert lines and "promote by" in lines[0], lines
    assert registry.aliases(NAME).get("champion") == champion
    assert not Journal(registry, NAME).queue()
    kept = list((shared / "mlartifacts/models").glob("*")) if (shared / "mlartifacts/models").exists() else []
    assert len(kept) == len(registry.versions(NAME))
    lines.clear()
    fsck(root, NAME, lines.append)
    assert lines == ["crescendo: nothing was left behind"]
    assert promote(root, load_params(root / "params.yaml"))
    assert registry.aliases(NAME) == {"candidate": "1", "champion": "1"}
    assert len(registry.versions(NAME)) == 1


def test_a_silent_holder_on_another_machine_is_taken_for_dead_and_gives_up_when_it_looks(
    root: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LEASE", 0.3)
    here = journal.this_process()
    log = Journal(Registry(root), NAME)
    with pytest.raises(Busy, match="E-BUSY-043"), log.turn("promote", print) as stopped:
        lines: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(journal, "this_process", lambda: "elsewhere/1")
            with log.turn("rollback", lines.append) as turn:
                turn.check()
                assert lines[0].startswith("waiting for promote") and here in lines[1]
                stopped.check()


def test_an_alias_that_was_set_outside_is_told_and_nothing_is_moved_over_it(root: Path, shared: Path) -> None:
    params = load_params(root / "params.yaml")
    promote(root, params)
    registry = Registry(root)
    write_verdict(root, write_model(root / "models/refined", seed=3), "failed")
    promote(root, params, Request(allow_candidate=True))
    with pytest.raises(Busy, match="points to version 1, and to no version when it was read"):
        with Journal(registry, NAME).turn("promote", print) as turn:
            turn.move("champion", None, registry.version(NAME, "2"))
    assert registry.aliases(NAME)["champion"] == "1"
    registry.connection[0].set_registered_model_alias(NAME, "champion", "2")
    lines: list[str] = []
    with pytest.raises(StorageError, match="0 of 1 versions do not verify, 1 aliases"):
        verify(root, NAME, log=lines.append)
    assert lines[-1] == "champion points to version 2, which was set outside of the journal; it has version 1"
