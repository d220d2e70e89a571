"""Champions: back to the former one, deleted ones, expected ones, and versions that were tampered with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import Busy, GateFailed, InputMissing, PipelineError, StorageError
from pipeline.registry import champions
from pipeline.registry.journal import DONE, Entry, Move, is_gone, this_process
from pipeline.registry.package import Registry, Version
from tests.registry.conftest import write_model, write_verdict

NAME = "crescendo"
Remake = Callable[..., str]


def entries(*moves: tuple[str, str | None, str]) -> list[Entry]:
    """Entries of moves of `champion`: (action, before, after)."""
    return [
        Entry(i, DONE, "", "", action, "", "", (Move("champion", before, after),), {}, 0)
        for i, (action, before, after) in enumerate(moves)
    ]


@pytest.mark.parametrize(
    ("moves", "former"),
    [
        ([], []),
        ([("promote", None, "1")], ["1"]),
        ([("promote", "4", "5")], ["5", "4"]),  # the first that the journal saw
        ([("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "3")], ["3", "2", "1"]),
        (
            [("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "3"), ("rollback", "3", "2")],
            ["2", "1"],
        ),
        ([("promote", None, "1"), ("promote", "7", "2")], ["2", "7", "1"]),  # 7 was set outside of it
        ([("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "1")], ["1", "2"]),
    ],
)
def test_a_rollback_takes_off_what_a_promotion_put_on(
    moves: list[tuple[str, str | None, str]], former: list[str]
) -> None:
    assert champions.former(entries(*moves)) == former


def test_rolling_back_history_and_what_is_expected(
    root: Path, remake: Remake, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Busy, match="points to version none, 4 was expected"):
        main.run(["promote", "--expect", "4"])
    main.run(["promote", "--dry-run"])
    assert "would register models/refined" in capsys.readouterr().out
    assert Registry(root).aliases(NAME) == {}, "nothing is written"
    main.run(["promote", "--expect", "none"])
    remake(1)
    main.run(["promote", "--expect", "1", "--dry-run"])
    assert "would move champion from version 1 to (new)" in capsys.readouterr().out
    main.run(["promote", "--expect", "1"])
    assert Registry(root).aliases(NAME)["champion"] == "2"
    main.run(["rollback"])
    assert "version 1 is the champion, in place of 2" in capsys.readouterr().out
    with pytest.raises(InputMissing, match="E-INP-072.*no version was the champion before version 1"):
        main.run(["rollback"])
    main.run(["rollback", "--to", "2"])
    main.run(["history"])
    lines = capsys.readouterr().out.splitlines()
    lines = [line.split("  ") for line in lines if "UTC" in line]
    assert [(line[1], line[3]) for line in lines] == [
        ("promote", "registered version 1, candidate none -> 1, champion none -> 1"),
        ("promote", "registered version 2, candidate 1 -> 2, champion 1 -> 2"),
        ("rollback", "champion 2 -> 1"),
        ("rollback", "champion 1 -> 2"),
    ]
    main.run(["promote", "--to", "staging"])
    assert Registry(root).aliases(NAME)["staging"] == "2"


def test_a_champion_that_was_deleted_is_missed_everywhere_and_the_line_says_how_to_go_on(
    root: Path, remake: Remake, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    remake(1)
    main.run(["promote"])
    registry = Registry(root)
    registry.connection[0].delete_model_version(NAME, "2")
    remake(2)
    line = "E-INP-071 models:/crescendo@champion: version 2, to which it pointed, was deleted. "
    line += "Fix: run `crescendo rollback --to 1`"
    for command in (
        ["generate", "cat"],
        ["generate", "cat", "--model", "models:/crescendo@champion"],
        ["promote"],
    ):
        with pytest.raises(InputMissing) as error:
            main.run(command)
        assert str(error.value) == line
    with pytest.raises(StorageError, match="1 aliases are not as they were set"):
        main.run(["verify"])
    assert line in capsys.readouterr().out
    main.run(["rollback", "--to", "1"])
    assert Registry(root).aliases(NAME)["champion"] == "1"


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("moves", "["),
        ("moves", '[{"alias": 1}]'),
        ("moves", "[3]"),
        ("moves", '[{"alias": "a", "before": null, "after": 2}]'),
        ("registered", '{"x": "1"}'),
        ("registered", '{"version": 7}'),
        ("registered", "[]"),
    ],
)
def test_an_entry_that_somebody_else_wrote_is_named(tag: str, value: str) -> None:
    with pytest.raises(StorageError, match="E-IO-048 models:/crescendo.journal/7: is no entry"):
        Entry.of(Version("crescendo.journal", "7", {f"crescendo.{tag}": value}))


@pytest.mark.parametrize("number", ["", "x", "-1", "9" * 30, "\u0661"])
def test_a_process_with_an_odd_number_is_not_known_to_be_gone(number: str) -> None:
    machine = this_process().partition("/")[0]
    assert not is_gone(f"{machine}/{number}")


def test_only_a_former_champion_or_one_that_passed_is_rolled_back_to(root: Path) -> None:
    main.run(["promote"])
    write_verdict(root, write_model(root / "models/refined", seed=1), "failed")
    main.run(["promote", "--allow-candidate"])
    with pytest.raises(GateFailed, match="E-GATE-003 models:/crescendo/2: it was never the champion"):
        main.run(["rollback", "--to", "2"])
    with pytest.raises(InputMissing, match="models:/crescendo/9"):
        main.run(["rollback", "--to", "9"])


def test_a_changed_tag_makes_no_second_version_and_is_set_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    registry = Registry(root)
    digest = registry.version(NAME, "1").digest
    registry.set_tags(registry.version(NAME, "1"), {"crescendo.model_digest": "0" * 64})
    with pytest.raises(StorageError):
        main.run(["verify"])
    assert "the tag crescendo.model_digest is not that of its registration" in capsys.readouterr().out
    main.run(["promote"])
    assert [version.digest for version in registry.versions(NAME)] == [digest]
    assert "its tags said snapshot 000000000000" in capsys.readouterr().out
    main.run(["verify", "--all"])


def test_files_that_were_changed_after_their_registration_are_refused(root: Path) -> None:
    main.run(["promote"])
    (folder,) = (path.parent for path in (root / "mlartifacts").rglob("MLmodel"))
    for file, words in {
        "artifacts/refined/manifest.json": "manifest.json",
        "code/pipeline/inference/generator.py": "code or settings were changed",
        "served.py": "code or settings were changed",
        "artifacts/refined/model.safetensors": "model.safetensors",
    }.items():
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StorageError, match=words):
            main.run(["rollback", "--to", "1"])
        if "safetensors" not in file:
            (folder / file).write_bytes(content)
    for command in (["promote"], ["generate", "cat", "--num", "1"]):
        with pytest.raises(StorageError, match="model.safetensors"):
            main.run(command)


def test_an_edited_verdict_is_refused_before_anything_is_registered(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(root)
    path = root / "reports/evaluation/evidence.safetensors"
    path.unlink()
    with pytest.raises(PipelineError, match="evidence.safetensors: is missing"):
        main.run(["promote"])
    path.write_bytes(b"something else")
    with pytest.raises(PipelineError, match="E-DAT-045 .*verdict.json: names evidence"):
        main.run(["promote"])
    assert not (root / "mlflow.db").exists()
