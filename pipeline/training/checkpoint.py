"""Checkpoints: everything a run needs to go on, committed whole or not at all.

A checkpoint is `nimg-<12 digits>/` with state.safetensors and a manifest written last (artifacts.py). Only
rank 0 writes, since all workers hold the same state; every worker loads.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.state import TrainState

KEEP = 2  # verified checkpoints that stay


def save(folder: Path, state: TrainState) -> None:
    """Commit the state at its `nimg` and drop older checkpoints; a no-op on other workers than the first."""
    if rank_and_size()[0]:
        return
    path = folder / f"nimg-{state.nimg:012d}"
    tensors = {name: tensor.cpu().clone() for name, tensor in state.tensors().items()}
    with artifacts.commit_directory(path, {"nimg": state.nimg}) as temporary:
        save_file(tensors, temporary / "state.safetensors")
    for old in sorted(folder.glob("nimg-????????????"))[:-KEEP]:
        artifacts.remove(old)


def resume(folder: Path, state: TrainState) -> None:
    """Load the newest checkpoint that verifies, if any, into `state`, on every worker."""
    newest = artifacts.latest_valid(folder, "nimg-") if rank_and_size()[0] == 0 else None
    nimg = torch.tensor(int(newest.name.removeprefix("nimg-")) if newest else -1)
    if torch.cuda.is_available():
        nimg = nimg.cuda()
    found = int(broadcast(nimg))
    if found >= 0:
        path = folder / f"nimg-{found:012d}" / "state.safetensors"
        state.load(load_file(path), found, str(path))
