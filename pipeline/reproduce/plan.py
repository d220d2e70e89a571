"""What making a version again takes: work tree, environment, inputs, stages, and the time that they took."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.compute import DEFAULT, PROFILE_VARIABLE
from pipeline.config.params import CORE_MODEL
from pipeline.config.strict_yaml import read_yaml
from pipeline.errors import ConfigError, InputMissing
from pipeline.launch.machine import LOCK
from pipeline.registry import pins
from pipeline.registry.package import Registry, Version
from pipeline.reproduce import worktree
from pipeline.reproduce.environment import Environment, choose
from pipeline.reproduce.graph import Graph
from pipeline.reproduce.inputs import Inputs, Source
from pipeline.reproduce.recipe import Recipe, read_recipe
from pipeline.reproduce.workplace import Workplace


@dataclass(frozen=True)
class Request:
    """only: a stage, with the inputs that it had. here: use the present packages. own_data: use the project's
    raw data whatever their digest is. dry_run: only say what would be done."""

    only: str | None = None
    here: bool = False
    own_data: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Plan:
    """tree: the project in the work tree. profile: compute profile. changed: by stage, code and parameters that
    are not those of dvc.lock."""

    recipe: Recipe
    tree: Path
    graph: Graph
    stages: list[str]
    environment: Environment
    sources: list[Source]
    profile: str
    changed: Mapping[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "version": self.recipe.uri,
            "digest": self.recipe.digest,
            "commit": self.recipe.commit,
            "environment": self.environment.words,
            "new_environment": self.environment.new,
            "profile": self.profile,
            "inputs": {source.path: source.where for source in self.sources},
            "stages": [
                {
                    "stage": stage,
                    "outputs": self.graph.compared(stage),
                    "seconds": self.recipe.seconds.get(stage),
                }
                for stage in self.stages
            ],
            "changed": dict(self.changed),
        }

    def head(self) -> Iterator[str]:
        """What is known before stages run, for people."""
        yield f"{self.recipe.uri}  {self.recipe.model} {self.recipe.digest[:12]}, commit {self.recipe.commit[:12]}"
        yield f"environment  {self.environment.words}; compute profile {self.profile}"
        for source in self.sources:
            yield f"input        {source.path}: {source.where}"
        for stage, names in self.changed.items():
            yield f"beware       {stage}: {', '.join(names)} is not what dvc.lock of the version has"

    def lines(self) -> Iterator[str]:
        """All of it, and what the stages took."""
        yield from self.head()
        known = [self.recipe.seconds.get(stage) for stage in self.stages]
        for stage, seconds in zip(self.stages, known, strict=True):
            took = f"took {seconds:.0f} s" if seconds is not None else "its time is not known"
            device = self.recipe.facts.get(stage, {}).get("device")
            where = f" on {device}" if device else ""
            yield f"{stage:12} {', '.join(self.graph.compared(stage))}: {took}{where}"
        total = sum(seconds for seconds in known if seconds is not None)
        more = ", and what is not known" if None in known else ""
        download = ", and an environment to download" if self.environment.new else ""
        yield f"in all       {total:.0f} s then{more}{download}"


def make_plan(root: Path, registry: Registry, version: Version, request: Request, place: Workplace) -> Plan:
    """Fetch the version, lay out its work tree, and find out what it takes; no stage runs.

    Raises InputMissing for a commit, digest or input that is nowhere, ConfigError for a stage or profile that
    is of no use, StorageError where git fails or files of the version were changed."""
    recipe = read_recipe(registry, version, place.version)
    worktree.require_commit(root, recipe.commit, recipe.uri)
    tree = worktree.add(root, recipe.commit, place.checkout, recipe.files)
    profile = os.environ.get(PROFILE_VARIABLE) or DEFAULT
    _require_this_machine(tree, profile)
    graph = Graph(tree, recipe.model)
    stages = graph.chosen(request.only)
    if not any(map(recipe.digest_of, graph.compared(stages[-1]))):
        problem = f"does not say what its stage {stages[-1]} made"
        raise InputMissing(
            "E-INP-169", recipe.uri, problem, "reproduce it without --only, which compares the model"
        )
    inputs = Inputs(root, tree, recipe, registry, request.own_data, place.inputs)
    inputs.lock.lay()
    sources = [inputs.find(path, raw=graph.maker(path) is None) for path in graph.brought(stages)]
    sources += list(_pinned(root, tree, stages, place))
    environment = choose(recipe.files / LOCK, request.here, place.environment)
    return Plan(recipe, tree, graph, stages, environment, sources, profile, inputs.lock.changes(stages))


def _require_this_machine(tree: Path, profile: str) -> None:
    path = tree / f"infra/compute/{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml"))) or "none"
        problem = f"the version has no compute profile {profile!r}"
        raise ConfigError("E-CFG-163", PROFILE_VARIABLE, problem, f"choose one of: {known}")
    if (read_yaml(path) or {}).get("address"):
        problem = (
            f"compute profile {profile} trains on a cluster, where the data of the project would be replaced"
        )
        raise ConfigError(
            "E-CFG-162", PROFILE_VARIABLE, problem, "set CRESCENDO_COMPUTE=process, also on its machines"
        )


def _pinned(root: Path, tree: Path, stages: list[str], place: Workplace) -> Iterator[Source]:
    """Models that params.yaml names by address and digest, which stages take from runs/init."""
    params = read_yaml(tree / "params.yaml")
    grown, judged = params.get("finetune", {}), params.get("evaluate", {})
    wanted = []
    if {"pretrain", "finetune"} & set(stages) and grown.get("init_from", CORE_MODEL) != CORE_MODEL:
        wanted.append((grown["init_from"], grown["init_sha256"]))
    if "evaluate" in stages and judged.get("baseline"):
        wanted.append((judged["baseline"], judged["baseline_sha256"]))
    for address, digest in wanted:
        kept = root / "runs/init" / digest
        if kept.is_dir():
            artifacts.copy_into_place(kept, tree / "runs/init" / digest)
        else:
            pins.fetch(root, address, digest, tree / "runs/init")
        yield Source(address, f"snapshot {digest[:12]}", lambda: None)
