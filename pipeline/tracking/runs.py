"""MLflow runs of the pipeline: one parent, one child per stage, found by their tags."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.tracking.store import connect, store_exists

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def git_commit(root: Path) -> str | None:
    """Commit of the work tree: `CRESCENDO_GIT_COMMIT` (for machines without git), else from git; or None."""
    return os.environ.get("CRESCENDO_GIT_COMMIT") or checked_out_commit(root)


def checked_out_commit(root: Path) -> str | None:
    """What git says is checked out at `root`; None without git, a repository or a commit."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


class Pipeline(NamedTuple):
    """What a parent run stands for: one version of code and parameters. id: a digest of both."""

    id: str
    name: str
    commit: str | None


def this_pipeline(root: Path) -> Pipeline:
    """The pipeline at `root`; its id is a digest of the git commit, params.yaml and `DVC_EXP_NAME`."""
    params, commit = root / "params.yaml", git_commit(root)
    experiment = os.environ.get("DVC_EXP_NAME") or None
    identity = {
        "commit": commit,
        "params": hashlib.sha256(params.read_bytes() if params.is_file() else b"").hexdigest(),
        "experiment": experiment,
    }
    name = experiment or (f"pipeline-{commit[:7]}" if commit else "pipeline")
    return Pipeline(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(), name, commit)


def _equal(key: str, value: str) -> str:
    """A comparison in MLflow's filter language; our keys and values contain no quotes."""
    return f"tags.`{key}` = '{value}'"


def _search(client: MlflowClient, experiment: str, condition: str, newest: bool = False) -> list[str]:
    order = "DESC" if newest else "ASC"
    runs = client.search_runs([experiment], condition, order_by=[f"attributes.start_time {order}"])
    return [run.info.run_id for run in runs]


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    identity: Mapping[str, str],
    name: str,
    tags: Mapping[str, str] | None = None,
    unfinished: bool = False,
) -> str:
    """Id of the oldest run with the `identity` tags; if there is none, it is created, with `tags` as well.

    MLflow repeats a create request whose response was lost, which may create two runs: hence the oldest, searched
    again after creating. `unfinished` ignores finished runs.
    """
    conditions = [_equal(key, value) for key, value in identity.items()]
    if unfinished:
        conditions.append("attributes.status != 'FINISHED'")
    condition = " and ".join(conditions)
    run_ids = _search(client, experiment, condition)
    if not run_ids:
        run = client.create_run(experiment, run_name=name, tags={**identity, **(tags or {})})
        run_ids = _search(client, experiment, condition) or [run.info.run_id]
    return run_ids[0]


def parent_run(client: MlflowClient, experiment: str, pipeline: Pipeline) -> str:
    """Id of a pipeline's parent run, found by the tag `crescendo.pipeline`, or created."""
    identity = {"crescendo.kind": "pipeline", "crescendo.pipeline": pipeline.id}
    tags = {"mlflow.source.git.commit": pipeline.commit} if pipeline.commit else {}
    return find_or_create_run(client, experiment, identity, pipeline.name, tags)


def child_run(
    client: MlflowClient,
    experiment: str,
    pipeline: Pipeline,
    kind: str,
    name: str,
    key: str,
    unfinished: bool = False,
    known: str | None = None,
) -> tuple[str, str]:
    """(run id, parent id) of the run of `kind` called `name` with the fingerprint `key`: the one with the id
    `known`, if it exists, else found or created.

    A run that another pipeline started (another commit or params file, but the same stage fingerprint) is continued
    under its own parent; this pipeline's parent refers to it by the tag `stage.<name>`.
    """
    parent = parent_run(client, experiment, pipeline)
    if known is not None and _exists(client, known):
        run = known
    else:
        identity = {"crescendo.kind": kind, "crescendo.stage": name, "crescendo.run": key}
        tags = {"mlflow.parentRunId": parent, "crescendo.pipeline": pipeline.id}
        run = find_or_create_run(client, experiment, identity, name, tags, unfinished)
    client.set_tag(parent, f"stage.{name}", run)
    return run, parent


def _exists(client: MlflowClient, run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run).info.lifecycle_stage) == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def find_producer(client: MlflowClient, experiment: str, path: str, digest: str) -> str | None:
    """Id of the newest run that wrote the output `path` with this digest."""
    run_ids = _search(client, experiment, _equal(f"output.{path}", digest), newest=True)
    return run_ids[0] if run_ids else None


def find_run_by_output(path: str, digest: str, root: Path) -> str | None:
    """As `find_producer`, in the store of the repository at `root`; None also if nothing was ever tracked."""
    if not store_exists(root):
        return None
    client, experiment = connect(root)
    return find_producer(client, experiment, path, digest)
