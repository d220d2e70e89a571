"""Checkpoints: everything that a run needs to continue, written atomically.

A checkpoint is a folder `nimg-<12 digits>/` with state.safetensors and a manifest, which is written last
(artifacts.py). Only rank 0 writes; every worker loads what it holds. The files are the same whether the state is
sharded or not, so any number of workers can continue. None is written with a value that is not finite, and none is
read.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import artifacts
from pipeline.errors import PipelineError, StorageError
from pipeline.models.finite import require_finite
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.numerics import changed
from pipeline.training.records import notice
from pipeline.training.state import TrainState

NAME = re.compile(r"nimg-[0-9]{12}")
KEEP = 2  # newest checkpoints that are not removed


def path_of(folder: Path, nimg: int) -> Path:
    """Folder of the checkpoint at `nimg`."""
    return folder / f"nimg-{nimg:012d}"


def save(
    folder: Path,
    state: TrainState,
    shared: Callable[[int], bool] = lambda nimg: False,
    numerics: Mapping[str, str] = {},
) -> None:
    """Commit the state at its `nimg` and remove old checkpoints, on the first worker; all call it together. The
    newest one whose nimg is `shared` with longer runs, which may begin there, is kept as well. `numerics`: how the
    state was computed (numerics.py).

    Raises StorageError, and keeps the checkpoints that there are, where a value is not finite."""
    first = rank_and_size()[0] == 0
    whole = {name: tensor for name, tensor in state.whole() if first}
    if not first:
        return
    path = path_of(folder, state.nimg)
    require_finite(whole, str(path), "run it again: it continues from the checkpoint before")
    tensors = {name: tensor.cpu() for name, tensor in whole.items()}
    with artifacts.commit_directory(path, {"nimg": state.nimg, "numerics": dict(numerics)}) as temporary:
        save_file(tensors, temporary / "state.safetensors")
    stored = sorted(folder.glob("nimg-????????????"))
    kept = [path for path in stored if shared(int(path.name[-12:]))][-1:]
    for old in stored[:-KEEP]:
        if old not in kept:
            artifacts.remove(old)


def newest(folder: Path) -> int:
    """nimg of the newest checkpoint that verifies and is finite, the same on every worker; -1: there is none.

    Those passed over are named in one line each, with the reason and what is used instead."""
    found = find(folder) if rank_and_size()[0] == 0 else None
    nimg = torch.tensor(-1 if found is None else found)
    return int(broadcast(nimg.cuda() if torch.cuda.is_available() else nimg))


def find(folder: Path) -> int | None:
    """`newest`, on the first worker; None: there is none."""
    passed: list[tuple[Path, PipelineError]] = []
    found = artifacts.latest_valid(folder, "nimg-", check, lambda *each: passed.append(each))
    start = 0 if found is None else int(found.name[-12:])
    instead = "no other is left" if found is None else f"{found.name} is used instead"
    for path, error in passed:
        images = int(path.name[-12:]) - start if NAME.fullmatch(path.name) else 0
        again = f"training starts again from image {start}, and {images} images are trained again"
        aside = f"the checkpoint is moved to {folder / 'quarantine'}"
        notice(
            folder.parent, start, f"{error.code} {error.where}: {error.problem}; {aside}; {instead}; {again}"
        )
    return None if found is None else start


def check(path: Path) -> None:
    """Raise StorageError where a checkpoint is not what its name says, cannot be read, or is not finite."""
    file, fix = path / "state.safetensors", "use another checkpoint"
    nimg = artifacts.read_manifest(path)["meta"].get("nimg")
    if not NAME.fullmatch(path.name) or nimg != int(path.name[-12:]):
        raise StorageError("E-IO-024", str(path), f"holds the checkpoint at image {nimg}", fix)
    try:
        tensors = load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise StorageError("E-IO-025", str(file), f"cannot be read ({error})", fix) from None
    require_finite(tensors, str(file), fix)


def resume(folder: Path, state: TrainState, numerics: Mapping[str, str] = {}) -> None:
    """Load the newest checkpoint that is of use, if any, into `state`, on every worker. One line says so where it
    was computed with other `numerics` than these."""
    nimg = newest(folder)
    if nimg < 0:
        return
    path = path_of(folder, nimg)
    state.load(load_file(path / "state.safetensors"), nimg, str(path / "state.safetensors"))
    stored = artifacts.read_manifest(path)["meta"].get("numerics", {})
    if rank_and_size()[0] == 0 and (changes := changed(stored, numerics)):
        text = f"{path}: {changes}; the last bits may differ from those of an unbroken run"
        notice(folder.parent, nimg, text)
