"""Fingerprints: what DVC compares for a stage, as one digest."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, InputMissing
from pipeline.launch import fingerprint


def test_the_fingerprint_follows_code_inputs_and_the_stages_own_params_only(project: Path) -> None:
    first = fingerprint.stage_fingerprint("toy", project)
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("other: 2", "other: 3") + "# comment\n")
    assert fingerprint.stage_fingerprint("toy", project) == first
    (project / "params.yaml").write_text(params.replace("1e-4", "2e-4"))
    assert fingerprint.stage_fingerprint("toy", project) != first
    (project / "params.yaml").write_text(params)
    (project / "code.py").write_text("pass  # changed\n")
    assert fingerprint.stage_fingerprint("toy", project) != first
    (project / "code.py").write_text("pass\n")
    assert fingerprint.stage_fingerprint("toy", project) == first
    assert fingerprint.outputs("toy", project) == ["out", "other"]


def test_how_often_something_is_logged_or_drawn_makes_no_other_run(project: Path) -> None:
    def of(section: str) -> str:
        (project / "params.yaml").write_text(f"seed: 1\ntoy: {{init: data/in, lr: {section}}}\n")
        return fingerprint.stage_fingerprint("toy", project)

    first = of("{log_images: 8, sample_images: 8, batch_size: 8}")
    assert of("{log_images: 16, sample_images: 24, batch_size: 8}") == first
    assert of("{log_images: 8, sample_images: 8, batch_size: 16}") != first


def test_what_lies_behind_a_url_is_known_by_names_and_sizes() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.png", b"one")
    before = fingerprint.digest_url("memory://bucket")
    assert fingerprint.digest_url("memory://bucket") == before
    store.pipe("/bucket/b.png", b"two")
    assert fingerprint.digest_url("memory://bucket") != before
    one = fingerprint.digest_url("memory://bucket/a.png")
    store.pipe("/bucket/pictures.zip", b"one")
    archive = fingerprint.digest_url("memory://bucket/pictures.zip")
    store.pipe("/bucket/pictures.zip", b"other")
    assert len({one, archive, fingerprint.digest_url("memory://bucket/pictures.zip")}) == 3
    with pytest.raises(InputMissing, match="E-INP-061 nowhere://bucket"):
        fingerprint.digest_url("nowhere://bucket")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: 3", "E-CFG-002 dvc.yaml: stages: 3 is not valid"),
        ("{}", "E-CFG-003 dvc.yaml: stages: missing key"),
        ("stages: {toy: 5}", "E-CFG-002 dvc.yaml: stages.toy: 5 is not valid"),
        ("stages: {toy: {deps: 7}}", "E-CFG-002 dvc.yaml: stages.toy.deps: 7 is not valid"),
        ("stages: {toy: {params: [{other.yaml: [a]}]}}", "E-CFG-002 dvc.yaml: stages.toy.params"),
        ("stages: {other: {}}", "E-CFG-031 dvc.yaml: has no stage toy, but other"),
    ],
)
def test_a_broken_dvc_yaml_is_one_line(project: Path, text: str, message: str) -> None:
    (project / "dvc.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        fingerprint.stage_fingerprint("toy", project)
    assert str(caught.value).startswith(message)


def test_a_missing_dependency_is_named(project: Path) -> None:
    (project / "code.py").unlink()
    with pytest.raises(InputMissing, match=r"E-INP-032 code\.py: is missing, which stage toy reads"):
        fingerprint.stage_fingerprint("toy", project)
