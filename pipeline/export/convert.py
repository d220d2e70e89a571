"""From a module to files, and how far what they hold is from it: a program of `torch.export`, and ONNX.

Both are read back and run before anybody else does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import InputMissing, StorageError
from pipeline.export.example import load_program

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BATCH = 4096
EXTERNAL = 1 << 30  # bytes of weights beyond which ONNX wants them in a file of their own
TOLERANCE = {"generator": 0.5, "text": 1e-3}  # half a grey level; of vectors of unit length


def require_packages() -> None:
    """Raises InputMissing where the extra `export` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"{', '.join(missing)} not installed"
        raise InputMissing("E-INP-088", "export", problem, "pip install 'crescendo[export]'")


@torch.no_grad()
def write_programs(
    folder: Path,
    name: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    names: tuple[Sequence[str], Sequence[str]],
) -> None:
    """Write `name`.pt2 and `name`.onnx for batches of any size; `names` are those of inputs and outputs."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    program = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=[{0: batch} for _ in inputs])
    torch.export.save(program, folder / f"{name}.pt2")
    weights = sum(each.nbytes for each in module.state_dict().values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program,
            f=folder / f"{name}.onnx",
            input_names=names[0],
            output_names=names[1],
            dynamo=True,
            external_data=weights > EXTERNAL,
            optimize=False,  # ONNX Runtime does that when it loads the file; this takes minutes for long loops
            verbose=False,
        )


@torch.no_grad()
def differences(folder: Path, name: str, module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, float]:
    """The largest difference of each written program from its module, over its outputs, for a whole batch and for
    its first row.

    Raises StorageError where one is beyond TOLERANCE."""
    found: dict[str, float] = {}
    for runtime, ending in (("torch", "pt2"), ("onnx", "onnx")):
        program, file = load_program(folder, name, runtime), f"{name}.{ending}"
        found[file] = max(
            _largest(
                module(*rows), [torch.from_numpy(each) for each in program(*(row.numpy() for row in rows))]
            )
            for rows in (inputs, [each[:1] for each in inputs])
        )
        if not found[file] <= TOLERANCE[name]:
            problem = f"differs from the model by {found[file]:.2g}, more than {TOLERANCE[name]}"
            fix = "report it, with the versions of torch and onnxruntime"
            raise StorageError("E-IO-088", file, problem, fix)
    return found


def _largest(wanted: Tensor | Iterable[Tensor], found: Sequence[Tensor]) -> float:
    expected = [wanted] if isinstance(wanted, Tensor) else wanted
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
