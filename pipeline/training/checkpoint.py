"""Checkpoints: everything that a run needs to continue, written atomically.

A checkpoint is a folder `nimg-<12 digits>/` with state.safetensors and a manifest, which is written last
(artifacts.py). Only rank 0 writes, since all workers hold the same state; every worker loads.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.state import TrainState

KEEP = 2  # newest checkpoints that are not removed


def save(folder: Path, state: TrainState) -> None:
    """Commit the state at its `nimg` and remove old checkpoints; a no-op on all workers but the first."""
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
    start = int(broadcast(nimg))
    if start >= 0:
        path = folder / f"nimg-{start:012d}" / "state.safetensors"
        state.load(load_file(path), start, str(path))
