"""A worker that counts to five in a file, and its config."""

import json
import os
import signal
import time
from pathlib import Path

from pipeline import artifacts
from pipeline.config.params import load_params
from pipeline.errors import BadData
from pipeline.launch.worker import WorkerConfig
from tests.conftest import ROOT


def toy(config: WorkerConfig, kill: bool = False, fail: bool = False) -> None:
    """Count to 5 together, a checkpoint each; the last worker kills itself once at 3, or fails at 4."""
    import torch
    import torch.distributed as dist

    run_dir = config.run_dir
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    saved = run_dir / "count"
    start = int(saved.read_text()) if saved.exists() else 0
    for count in range(start + 1, 6):
        total = torch.tensor(count)
        if size > 1:
            dist.all_reduce(total)
        if rank == size - 1 and count == 3 and kill and not (run_dir / "killed").exists():
            (run_dir / "killed").write_text(str(count))
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == size - 1 and count == 4 and fail:
            raise BadData("E-DAT-999", "toy", "has a bad\nimage", "remove it")
        if size > 1:
            dist.barrier()
        if rank == 0:
            assert int(total) == count * size
            artifacts.write_atomic(saved, str(count))
            with open(run_dir / "progress.jsonl", "a") as file:
                record = {"nimg": count, "total": 5, "time": time.time(), "metrics": {"loss": 1 / count}}
                file.write(json.dumps(record) + "\n")
    if rank == 0 and start < 5:
        with artifacts.commit_directory(run_dir / "result") as folder:
            (folder / "starts").write_text(f"{start} {size}")


def config_of(run_dir: Path) -> WorkerConfig:
    run_dir.mkdir(exist_ok=True)
    return WorkerConfig(load_params(ROOT / "params.yaml"), root=run_dir, run_dir=run_dir)
