"""Artifact directories: written whole or not at all, and every changed byte is detected."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import artifacts
from pipeline.errors import Busy, StorageError


def make(path, content=b"one", meta=None):
    with artifacts.commit_directory(path, meta) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(content)
        (folder / "b.txt").write_text("b")
    return path


def test_a_committed_directory_verifies_and_lists_every_file(tmp_path) -> None:
    make(tmp_path / "x", meta={"n": 1})
    manifest = artifacts.verify_directory(tmp_path / "x")
    assert set(manifest["files"]) == {"sub/a.bin", "b.txt"}
    assert manifest["files"]["sub/a.bin"]["size"] == 3
    assert manifest["meta"] == {"n": 1}
    assert os.listdir(tmp_path) == ["x"]


def test_meta_may_be_filled_inside_the_block(tmp_path) -> None:
    meta = {}
    with artifacts.commit_directory(tmp_path / "x", meta) as folder:
        (folder / "a").write_text("a")
        meta["late"] = True
    assert artifacts.read_manifest(tmp_path / "x")["meta"] == {"late": True}


def test_a_failed_block_changes_nothing(tmp_path) -> None:
    make(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError), artifacts.commit_directory(tmp_path / "x") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert (tmp_path / "x" / "sub" / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("forced", [True, False])
def test_only_forced_directories_are_synced_to_disk(tmp_path, monkeypatch, forced) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    with artifacts.commit_directory(tmp_path / "x", forced=forced) as folder:
        (folder / "a").write_text("a")
    names = {os.path.basename(path) for path in synced}
    assert ({"a", "manifest.json"} <= names) == forced
    artifacts.verify_directory(tmp_path / "x")


def test_a_second_commit_replaces_the_first_whole(tmp_path) -> None:
    make(tmp_path / "x", b"old")
    with artifacts.commit_directory(tmp_path / "x") as folder:
        (folder / "only").write_text("new")
    assert sorted(os.listdir(tmp_path / "x")) == ["manifest.json", "only"]
    assert os.listdir(tmp_path) == ["x"]


def test_equal_content_gives_equal_bytes_and_digest(tmp_path) -> None:
    one, two = make(tmp_path / "1", meta={"b": 1, "a": 2}), make(tmp_path / "2", meta={"a": 2, "b": 1})
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()
    assert artifacts.directory_digest(one) == artifacts.directory_digest(two)
    other = make(tmp_path / "3", meta={"a": 3, "b": 1})
    assert artifacts.directory_digest(one) != artifacts.directory_digest(other)


DAMAGES = {
    "is missing": lambda p: (p / "b.txt").unlink(),
    "is not in the manifest": lambda p: (p / "new").write_text("n"),
    "has 2 bytes, expected 3": lambda p: (p / "sub" / "a.bin").write_bytes(b"on"),
    "has sha256": lambda p: (p / "sub" / "a.bin").write_bytes(b"onf"),
    "neither a plain file": lambda p: (p / "link").symlink_to("/etc/passwd"),
    "has no manifest.json": lambda p: (p / "manifest.json").unlink(),
    "is not JSON": lambda p: (p / "manifest.json").write_text("{"),
    "is not a manifest": lambda p: (p / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damage_is_detected_and_named(tmp_path, words) -> None:
    make(tmp_path / "x")
    DAMAGES[words](tmp_path / "x")
    with pytest.raises(StorageError, match=words):
        artifacts.verify_directory(tmp_path / "x")


def test_an_edited_manifest_is_detected(tmp_path) -> None:
    path = make(tmp_path / "x", meta={"kid": 0.5}) / "manifest.json"
    path.write_text(path.read_text().replace("0.5", "0.1"))
    with pytest.raises(StorageError, match="own digest"):
        artifacts.read_manifest(tmp_path / "x")


def test_another_schema_is_refused(tmp_path) -> None:
    path = make(tmp_path / "x") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(StorageError, match="schema 99"):
        artifacts.read_manifest(tmp_path / "x")


def test_latest_valid_walks_down_and_quarantines_with_a_reason(tmp_path) -> None:
    for number in (1, 2, 3):
        make(tmp_path / f"nimg-{number:03d}")
    (tmp_path / "nimg-003" / "b.txt").write_text("c")
    (tmp_path / "nimg-004.tmp-1-00000000").mkdir()
    assert artifacts.latest_valid(tmp_path, "nimg-") == tmp_path / "nimg-002"
    (reason,) = (tmp_path / "quarantine").glob("nimg-003-*.reason.txt")
    assert "b.txt" in reason.read_text()
    assert sorted(os.listdir(tmp_path)) == ["nimg-001", "nimg-002", "quarantine"]


def test_latest_valid_restores_what_was_moved_aside(tmp_path) -> None:
    make(tmp_path / "nimg-001").rename(tmp_path / "nimg-001.old-1-00000000")
    assert artifacts.latest_valid(tmp_path, "nimg-") == tmp_path / "nimg-001"


def test_latest_valid_of_nothing_is_none(tmp_path) -> None:
    assert artifacts.latest_valid(tmp_path / "none", "nimg-") is None
    assert artifacts.latest_valid(tmp_path, "nimg-") is None


def test_a_killed_writer_leaves_the_old_version_and_the_next_one_cleans_up(tmp_path) -> None:
    make(tmp_path / "x", b"old")
    program = (
        "import os, sys, signal\nfrom pipeline import artifacts\n"
        "with artifacts.commit_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert artifacts.verify_directory(tmp_path / "x") and len(os.listdir(tmp_path)) == 2
    make(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == ["x"]


def test_a_version_moved_aside_by_a_killed_writer_returns(tmp_path) -> None:
    make(tmp_path / "x", b"old").rename(tmp_path / "x.old-99999999-00000000")
    with pytest.raises(RuntimeError), artifacts.commit_directory(tmp_path / "x"):
        raise RuntimeError
    assert (tmp_path / "x" / "sub" / "a.bin").read_bytes() == b"old"


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path) -> None:
    artifacts.write_atomic(tmp_path / "sub" / "a", "longer text")
    artifacts.write_atomic(tmp_path / "sub" / "a", b"short")
    assert (tmp_path / "sub" / "a").read_bytes() == b"short"
    assert os.listdir(tmp_path / "sub") == ["a"]


def test_a_lease_is_exclusive_names_its_holder_and_ends_with_it(tmp_path) -> None:
    program = (
        "import sys\nfrom pipeline import artifacts\n"
        "with artifacts.lease(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "lease")], **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match=f"process {holder.pid}"), artifacts.lease(tmp_path / "lease"):
            pass
        holder.kill()
    with artifacts.lease(tmp_path / "lease"):
        assert (tmp_path / "lease").read_text().strip() == str(os.getpid())


def test_digest_does_not_depend_on_key_order_and_refuses_nan() -> None:
    assert artifacts.digest({"a": 1, "b": [1, 2]}) == artifacts.digest({"b": [1, 2], "a": 1})
    with pytest.raises(ValueError):
        artifacts.digest({"a": float("nan")})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(JSON.filter(lambda value: "\\ud" not in json.dumps(value)))
def test_a_digest_survives_a_trip_through_json(value) -> None:
    assert artifacts.digest(json.loads(json.dumps(value))) == artifacts.digest(value)


def test_parts_of_files_that_killed_writers_left_are_swept(tmp_path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", ""])
    writer.wait()
    kept = [f"a.json.tmp-{os.getpid()}-0123abcd", f"a.json.tmp-{writer.pid}-x", "a.tmp-b"]
    (tmp_path / "below").mkdir()
    for name in (*kept, f"a.json.tmp-{writer.pid}-0123abcd"):
        (tmp_path / "below" / name).touch()
    artifacts.sweep(tmp_path)
    assert sorted(path.name for path in (tmp_path / "below").iterdir()) == sorted(kept)
