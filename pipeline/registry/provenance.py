"""What is stored beside a registered model, so that it can say where it comes from.

These are the files that made it, the runs of its stages from the data to the model, their film strips, and the
verdict with its numbers. They are part of the version, and of the digest of its registration.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts
from pipeline.errors import BadData, one_line
from pipeline.evaluation.verdict import Verdict
from pipeline.launch import machine
from pipeline.tracking import runs
from pipeline.training.records import FILM

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    from pipeline.models.config import Lineage

FILES = ("params.yaml", "dvc.lock", "requirements.lock")
PATCH = "uncommitted.patch"
LINEAGE = "lineage.json"
VERDICT, EVIDENCE = "reports/verdict.json", "reports/evaluation/evidence.safetensors"
VERDICT_COPY, EVIDENCE_COPY = "verdict.json", "evidence.safetensors"  # what `promote` judges a version from
MADE_BY = {
    "models/core": "pretrain",
    "models/finetuned": "finetune",
    "models/refined": "refine",
}  # in their order
FILM_OF = "film-{}.png"  # of a stage
CODE = ("pipeline", "stages")  # whose new files belong to a patch, unless git ignores them


def copy_files(root: Path, folder: Path) -> None:
    """Copy FILES, and what is not committed of the project at `root` as PATCH, to `folder`; missing ones are left
    out."""
    folder.mkdir(parents=True)
    for name in FILES:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)
    patch = uncommitted(root, folder.parent / "index")
    if patch:
        (folder / PATCH).write_bytes(patch)


def copy_evidence(root: Path, verdict: Verdict, folder: Path) -> None:
    """Copy verdict and evidence of the project at `root` to `folder`. Raises BadData where the evidence is not that
    of the verdict any more."""
    shutil.copyfile(root / VERDICT, folder / VERDICT_COPY)
    shutil.copyfile(root / EVIDENCE, folder / EVIDENCE_COPY)
    digest = artifacts.sha256_file(folder / EVIDENCE_COPY)
    if (
        digest != verdict.evidence_digest
        or Verdict.read(folder / VERDICT_COPY).model_digest != verdict.model_digest
    ):
        problem = "was replaced while its model was being registered"
        raise BadData("E-DAT-192", f"{root / EVIDENCE}", problem, "run `crescendo promote` again")


def films_of(root: Path, model: str) -> dict[str, Path]:
    """{stage: film strip} of the stages that lead to the model in `root / model`, in order, where there is one."""
    stages = list(MADE_BY.values())[: list(MADE_BY).index(model) + 1] if model in MADE_BY else []
    films = {stage: root / "reports" / stage / FILM for stage in stages}
    return {stage: film for stage, film in films.items() if film.is_file()}


def copy_films(root: Path, model: str, folder: Path) -> None:
    """Copy `films_of` a model to `folder`, for `read_films`."""
    for stage, film in films_of(root, model).items():
        shutil.copyfile(film, folder / FILM_OF.format(stage))


def read_films(folder: Path) -> dict[str, bytes]:
    """{stage: film strip} of those that `copy_films` left in `folder`, in the order of training."""
    films = {stage: folder / FILM_OF.format(stage) for stage in MADE_BY.values()}
    return {stage: film.read_bytes() for stage, film in films.items() if film.is_file()}


def uncommitted(root: Path, index: Path) -> bytes:
    """What `git apply` turns the commit into the work tree with: changes of tracked files, and new files of CODE.

    `index`: a file for git's use. Empty without git or a commit."""
    if runs.checked_out_commit(root) is None:
        return b""
    environment = {**os.environ, "GIT_INDEX_FILE": str(index)}
    present = [name for name in CODE if (root / name).is_dir()]

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
        return done.stdout

    try:
        git("read-tree", "HEAD")
        git("add", "--update", ".")
        if present:
            git("add", *present)
        return git("diff", "--cached", "--binary", "--no-color", "--no-ext-diff", "HEAD")
    except (OSError, subprocess.SubprocessError) as error:
        print(one_line(f"warning: uncommitted changes are not stored: {error}"), file=sys.stderr)
        return b""


def write_lineage(
    folder: Path,
    root: Path,
    model: str,
    lineage: Lineage,
    verdict: Verdict,
    client: MlflowClient,
    experiment: str,
) -> None:
    """Write LINEAGE of the model in `root / model` to `folder`, beside its files. Raises MLflow's exceptions."""
    judged = artifacts.sha256_file(root / VERDICT)
    facts = {
        "model": {"folder": model, "digest": verdict.model_digest},
        "commit": runs.git_commit(root),
        "files": {path.name: artifacts.sha256_file(path) for path in sorted(folder.iterdir())},
        "data": {"digest": lineage.data or verdict.data_digest, "validation": lineage.validation},
        "grown_from": {"address": lineage.init_from, "digest": lineage.init_sha256},
        "stages": list(stages_of(client, experiment, model, verdict.model_digest)),
        "evaluation": list(stages_of(client, experiment, VERDICT, judged, alone=True)),
        "verdict": verdict.to_json(),
    }
    (folder / LINEAGE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def stages_of(
    client: MlflowClient, experiment: str, path: str, digest: str, alone: bool = False
) -> Iterator[dict[str, Any]]:
    """The run that wrote `path` with this digest, then those that wrote its inputs, and so on; each once."""
    waiting, seen = [runs.find_producer(client, experiment, path, digest)], set()
    while waiting:
        run_id = waiting.pop(0)
        if run_id is None or run_id in seen:
            continue
        seen.add(run_id)
        run = client.get_run(run_id)
        yield _describe_run(client, run)
        if not alone:
            waiting += [value for key, value in sorted(run.data.tags.items()) if key.startswith("producer.")]


def _describe_run(client: MlflowClient, run: Run) -> dict[str, Any]:
    tags = run.data.tags
    parent = tags.get("mlflow.parentRunId")
    commit = client.get_run(parent).data.tags.get("mlflow.source.git.commit") if parent else None
    return {
        "stage": tags.get("crescendo.stage", run.info.run_name),
        "run_id": run.info.run_id,
        "status": run.info.status,
        "started": run.info.start_time,
        "ended": run.info.end_time,
        "commit": commit,
        "inputs": _with_prefix(tags, "input."),
        "outputs": _with_prefix(tags, "output."),
        "machine": _with_prefix(tags, machine.TAG),
    }


def _with_prefix(tags: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in sorted(tags.items()) if key.startswith(prefix)}
