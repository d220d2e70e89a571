"""Compute profiles: where a stage runs (`infra/compute/NAME.yaml`, chosen by CRESCENDO_COMPUTE)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.strict_yaml import Section, parse_section, read_yaml, require
from pipeline.errors import ConfigError

PROFILE_VARIABLE = "CRESCENDO_COMPUTE"
DEFAULT = "local"


def _as_range(value: object) -> object:
    """One number of workers as [min, max]."""
    return (value, value) if isinstance(value, int) else value


Workers = Annotated[int, Field(ge=0, le=4096)]


class ComputeProfile(Section):
    """Where a stage runs. Nothing here makes a stage stale. What is computed is the same to the last bit, except
    that `precision` and `compile` round differently, as another device does (docs/reliability.md).

    workers: processes of a training stage, each of which takes whole shards; 0 trains in the calling process. With
        [min, max] a run goes on with fewer of them where nodes are lost.
    max_failures: restarts from the last checkpoint before a stage gives up; -1 = unlimited.
    address: dashboard URL of a Ray cluster (jobs API); null runs on this machine.
    storage: absolute path of a folder that all nodes share; null uses the working tree.
    data: URL such as s3://bucket/prepared. Training stages copy data/prepared there, once per digest, and workers
        read it from there; null: from the working tree or `storage`.
    cache: absolute path of a folder on each node's own disk, for what workers have read from `data`.
    cache_gib: what this folder may hold, in GiB, of all workers and data sets together.
    backup: URL such as s3://bucket/runs, below which the state of a run is copied while it trains, and from which
        it goes on where the run folder is lost; null: nowhere.
    price_per_hour: of all that the profile uses, in any currency, for `crescendo plan`; null: unknown.
    recompute: recompute activations in the backward pass, for less memory and about a third more time.
    cuda_graphs: on a GPU, record the passes of a training step once and replay them; has no effect with recompute.
    compile: on a GPU, torch.compile the denoising losses: takes a minute or two per level, then 1.5 times as fast.
    shard_state: each worker holds one slice of Adam's moments and of the weight averages instead of all of them,
        for less memory and half as much traffic again. Has no effect on one worker.
    """

    workers: Annotated[tuple[Workers, Workers], BeforeValidator(_as_range)] = (0, 0)
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=-1)] = 3
    address: str | None = None
    storage: str | None = None
    data: str | None = None
    cache: str | None = None
    cache_gib: Annotated[float, Field(gt=0)] = 64.0
    backup: str | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    cuda_graphs: bool = True
    compile: bool = False
    shard_state: bool = False

    @property
    def min_workers(self) -> int:
        """The fewest that a stage trains on."""
        return self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most that a stage trains on."""
        return self.workers[1]

    @model_validator(mode="after")
    def _check(self) -> ComputeProfile:
        few, many = self.min_workers, self.max_workers
        require(
            few <= many and (few > 0 or many == 0), f"workers: [{few}, {many}] is not [min, max], from 1 on"
        )
        for key, path in (("storage", self.storage), ("cache", self.cache)):
            require(path is None or Path(path).is_absolute(), f"{key}: {path!r} is not an absolute path")
        for key, url in (("data", self.data), ("backup", self.backup)):
            require(url is None or "://" in url, f"{key}: {url!r} is not a URL such as s3://bucket/prepared")
        require(
            self.data is None or self.cache is not None, "data: needs cache, a folder on each node's disk"
        )
        needs = self.address is None or self.storage is not None
        require(needs, "storage: a cluster (address) needs a folder that its nodes share")
        return self


def load_profile(root: str | os.PathLike[str] = ".", name: str | None = None) -> ComputeProfile:
    """Read `infra/compute/NAME.yaml`; NAME is CRESCENDO_COMPUTE or `local` unless given."""
    name = name or os.environ.get(PROFILE_VARIABLE) or DEFAULT
    folder = Path(root, "infra", "compute")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not (folder / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
        problem = f"there is no compute profile {name!r} in infra/compute"
        raise ConfigError("E-CFG-007", PROFILE_VARIABLE, problem, f"choose one of: {known}")
    return parse_section(ComputeProfile, read_yaml(folder / f"{name}.yaml"), f"infra/compute/{name}.yaml")
