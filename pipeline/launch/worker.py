"""What launch hands to the worker processes of a training stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.params import Params, parse_params


@dataclass(frozen=True)
class WorkerConfig:
    """Everything that one worker process needs to train a stage, on this machine or another.

    root: the folder with data/prepared and models/. prepared: the digest that the former had when the stage began.
    data: where the prepared data are instead, a URL that ends with their digest; cache and cache_gib are those of
    the compute profile for it. run_dir: working state; the finished model and its reports go to run_dir/result.
    init: a pinned model to start from, in place of models/core.
    precision, recompute, cuda_graphs, compile and shard_state are those of the compute profile
    (pipeline/compute.py).
    watch_images: training images between snapshots in run_dir/watch, which the result does not depend on; 0: none.
    """

    params: Params
    root: Path
    run_dir: Path
    init: Path | None = None
    precision: str = "auto"
    recompute: bool = False
    cuda_graphs: bool = True
    compile: bool = False
    shard_state: bool = False
    watch_images: int = 0
    prepared: str | None = None
    data: str | None = None
    cache: str | None = None
    cache_gib: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for Ray and for JSON."""
        paths = {"root": str(self.root), "run_dir": str(self.run_dir), "init": self.init and str(self.init)}
        return {**asdict(self), **paths, "params": self.params.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkerConfig:
        """The inverse of `to_dict`."""
        init = values["init"]
        paths = {
            "root": Path(values["root"]),
            "run_dir": Path(values["run_dir"]),
            "init": init and Path(init),
        }
        return cls(**{**values, **paths, "params": parse_params(values["params"])})


Worker = Callable[[WorkerConfig], None]
