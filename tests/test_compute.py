"""Compute profiles: chosen by the environment, refused in one line."""

import pytest

from pipeline.compute import load_profile
from pipeline.errors import ConfigError
from tests.conftest import ROOT


def profile(tmp_path, monkeypatch, text, name="here"):
    folder = tmp_path / "infra" / "compute"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "here.yaml").write_text(text)
    monkeypatch.setenv("CRESCENDO_COMPUTE", name)
    return load_profile(tmp_path)


def test_a_profile_is_chosen_by_the_environment_and_has_defaults(tmp_path, monkeypatch) -> None:
    assert profile(tmp_path, monkeypatch, "workers: 2\n").workers == (2, 2)
    assert profile(tmp_path, monkeypatch, "workers: [1, 2]\n").workers == (1, 2)
    assert profile(tmp_path, monkeypatch, "").precision == "auto"


@pytest.mark.parametrize("name", ["ther", "../here", "a b"])
def test_an_unknown_profile_is_refused_with_a_list_of_profiles(tmp_path, monkeypatch, name) -> None:
    with pytest.raises(ConfigError, match="choose one of: here"):
        profile(tmp_path, monkeypatch, "", name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker: 2", "infra/compute/here.yaml: worker: unknown key. Fix: did you mean 'workers'?"),
        ("storage: relative/path", "not an absolute path"),
        ("address: http://head:8265", "storage: a cluster"),
        (
            "threads: 2",
            "threads: is gone. Fix: remove it, and set threads_per_shard of the training stages in",
        ),
        ("data: bucket/prepared", "data: 'bucket/prepared' is not a URL"),
        ("data: s3://bucket/prepared", "data: needs cache"),
        ("backup: bucket/runs", "backup: 'bucket/runs' is not a URL"),
        ("cache: here", "cache: 'here' is not an absolute path"),
        ("workers: -1", "greater than or equal to 0"),
        ("workers: [0, 2]", "workers: [0, 2] is not [min, max]"),
        ("workers: [3, 2]", "workers: [3, 2] is not [min, max]"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path, monkeypatch, text, words) -> None:
    with pytest.raises(ConfigError) as caught:
        profile(tmp_path, monkeypatch, text)
    assert words in str(caught.value)


def test_every_shipped_profile_is_valid() -> None:
    names = [path.stem for path in (ROOT / "infra" / "compute").glob("*.yaml")]
    assert "local" in names
    for name in names:
        load_profile(ROOT, name)
