"""The registered model: MLflow stores this file, and executes it when it loads the model ("models from code").

No pickle: the weights are the snapshot's safetensors, and the modules that it imports are stored beside it.
Input: a column `prompt` (string). Output: a column `image` (PNG bytes, which name model, prompt and seed), n rows a
prompt, of seeds `seed`, `seed` + 1, ..., as `crescendo generate` draws them. Params are those of the model's
signature, whose defaults are its own settings (`packaging.defaults`).

What a caller can mend is one line: MLflow's server answers it with status 400, and its command line prints it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click
import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.utils.yaml_utils import read_yaml

from pipeline import artifacts
from pipeline.errors import BUG, ConfigError, PipelineError
from pipeline.inference.generator import Generator, check_count, check_guidance, load_generator
from pipeline.inference.png import encode_png

META = "registered_model_meta"  # MLflow writes it
MAX_IMAGES = 4096  # of a call, which holds them in memory
TOGETHER = 64  # images that are made in one go


class Refusal(MlflowException, click.ClickException):  # type: ignore[misc]  # mlflow is not read by the type checker
    """One line for a caller. MLflow's server would put the data before it, and its command line a traceback."""

    def __init__(self, line: str, status: int, code: int = INVALID_PARAMETER_VALUE) -> None:
        MlflowException.__init__(self, line, error_code=code)
        self.line, self.status = line, status

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.line})

    def show(self, file: IO[Any] | None = None) -> None:
        print(self.line, file=file or sys.stderr)
        sys.exit(self.status)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn the errors of the block into Refusal."""
    try:
        yield
    except PipelineError as error:
        raise Refusal(str(error), error.exit_status) from None
    except Exception:  # noqa: BLE001 - a bug, whose traceback belongs into the log, not into an answer
        traceback.print_exc(file=sys.stderr)
        line = "the model failed on this request; its log says why"
        raise Refusal(line, BUG, INTERNAL_ERROR) from None


class TextToImage(PythonModel):  # type: ignore[misc]
    """Prompts to PNG files."""

    def __init__(self) -> None:
        self._generator: Generator | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Verify the package, and load the snapshot inside."""
        snapshot = Path(context.artifacts["snapshot"])
        package, default = snapshot.parents[1], context.model_config["default_passes"] or None
        with one_line():
            artifacts.verify_directory(package, exact=False)
            self._generator = load_generator(snapshot, default_passes=default, address=address_of(package))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """[m] prompts to [m n] PNG files. Raises Refusal for prompts and params that cannot be served."""
        assert self._generator is not None, "mlflow calls load_context first"
        given = {name: value for name, value in (params or {}).items() if value is not None}
        with one_line():
            return pd.DataFrame({"image": draw(self._generator, list(model_input["prompt"]), given)})


def address_of(package: Path) -> str:
    """models:/NAME/VERSION of a package that MLflow has fetched by its name; "" of a folder."""
    if not (package / META).is_file():
        return ""
    facts = read_yaml(str(package), META)
    return f"models:/{facts['model_name']}/{facts['model_version']}"


def draw(generator: Generator, prompts: list[Any], params: dict[str, Any]) -> list[bytes]:
    """n PNG files of each prompt. Raises ConfigError for what is out of range."""
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            fix = 'write text; "" for no caption'
            raise ConfigError("E-CFG-071", "prompt", f"{str(prompt)[:60]} in row {row} is no text", fix)
    n, first = params.get("n", 1), params.get("seed", 0)
    if n < 1 or n * len(prompts) > MAX_IMAGES:
        problem = f"{n} makes {n * len(prompts)} images"
        raise ConfigError("E-CFG-072", "n", problem, f"choose 1 to {MAX_IMAGES} in all")
    options = options_of(generator, params)
    made = generator.made(**options)
    wanted = [(prompt, first + i) for prompt in prompts for i in range(n)]
    files = []
    for start in range(0, len(wanted), TOGETHER):
        part = wanted[start : start + TOGETHER]
        images = generator.images([prompt for prompt, _ in part], [seed for _, seed in part], **options)
        for (prompt, seed), image in zip(part, images, strict=True):
            files.append(encode_png(image, made | {"prompt": prompt, "seed": seed}))
    return files


def options_of(generator: Generator, params: dict[str, Any]) -> dict[str, Any]:
    """Params as options of `Generator.images`. 0, and what is not there, is the model's own."""
    config = generator.snapshot.config
    guidance, resolution = params.get("guidance"), params.get("resolution") or None
    check_guidance(guidance)
    if config.is_refined and guidance not in (None, config.sampling.guidance):
        problem = f"{guidance:g} would have no effect: a refined model has it built in"
        raise ConfigError("E-CFG-070", "guidance", problem, "leave it out")
    side = config.resolution
    size = params.get("width") or side, params.get("height") or side
    return {
        "num_steps": check_count(params.get("steps") or None),
        "guidance": None if config.is_refined else guidance,
        "resolution": resolution,
        "size": None if size == (side, side) else size,
    }


mlflow.models.set_model(TextToImage())
