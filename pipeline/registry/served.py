"""The registered model: MLflow stores this file, and executes it when it loads the model ("models from code").

No pickle: the weights are the snapshot's safetensors, and the modules that it imports are stored beside it. None of
them is imported before all files of the package are what its manifest says, and there are no others.
Input: a column `prompt` (string). Output: a column `image` (PNG bytes, which name model, prompt and seed), n rows a
prompt, of seeds `seed`, `seed` + 1, ..., as `crescendo generate` draws them. Params are those of the model's
signature, whose defaults are its own settings (`packaging.defaults`).

What a caller can mend is one line: MLflow's server answers it with status 400, and its command line prints it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext, scoring_server
from mlflow.utils.yaml_utils import read_yaml

if TYPE_CHECKING:
    from pipeline.inference.generator import Generator

META = "registered_model_meta"  # MLflow writes it
MANIFEST = "manifest.json"
CONFIG, DAMAGED, BUG = 78, 74, 70  # statuses of pipeline/errors.py


class Refusal(MlflowException, click.ClickException):
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
    from pipeline.errors import PipelineError

    try:
        yield
    except PipelineError as error:
        raise Refusal(str(error), error.exit_status) from None
    except Refusal:
        raise
    except MlflowException as error:
        from pipeline.errors import one_line as escaped
        from pipeline.inference.requests import EXAMPLE

        said = escaped(str(error.message).split("\nInput:")[0].rpartition("Error: ")[2].strip())
        line = f"E-CFG-192 request: {said[:300].rstrip('.')}. Fix: write one such as {EXAMPLE}"
        raise Refusal(line, CONFIG) from None
    except Exception:  # noqa: BLE001 - a bug, whose traceback belongs into the log, not into an answer
        traceback.print_exc(file=sys.stderr)
        line = "the model failed on this request; its log says why"
        raise Refusal(line, BUG, INTERNAL_ERROR) from None


class TextToImage(PythonModel):
    """Prompts to PNG files."""

    def __init__(self) -> None:
        self._generator: Generator | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Verify the package, and load the snapshot inside."""
        snapshot = Path(context.artifacts["snapshot"])
        package, default = snapshot.parents[1], context.model_config["default_passes"] or None
        changed = first_change(package)
        if changed is not None:
            raise Refusal(f"E-IO-190 {changed}. Fix: fetch the package again", DAMAGED)
        with one_line():
            from pipeline.inference.generator import load_generator

            self._generator = load_generator(snapshot, default_passes=default, address=address_of(package))
        check_types_first()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """[m] prompts to [m n] PNG files. Raises Refusal for prompts and params that cannot be served."""
        assert self._generator is not None, "mlflow calls load_context first"
        given = {name: value for name, value in (params or {}).items() if value is not None}
        with one_line():
            from pipeline.inference.requests import draw

            return pd.DataFrame({"image": draw(self._generator, list(model_input["prompt"]), given)})


def first_change(package: Path) -> str | None:
    """The first file of the package that is not as its manifest says, or that this does not name; None if there is
    none. Byte code counts: Python would run it in place of the code beside it."""
    try:
        files = json.loads((package / MANIFEST).read_bytes())["files"]
        expected = {name: each["sha256"] for name, each in files.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return f"{package / MANIFEST}: is no manifest"
    present = {
        (Path(folder) / name).relative_to(package).as_posix()
        for folder, folders, names in os.walk(package)
        for name in (*names, *(each for each in folders if (Path(folder) / each).is_symlink()))
    }
    for name in sorted(present.difference(expected, (MANIFEST, META))):
        return f"{package / name}: is not in the manifest"
    for name, digest in sorted(expected.items()):
        path = package / name
        if path.is_symlink() or not path.is_file():
            return f"{path}: is missing"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{path}: differs from the manifest"
    return None


def check_types_first() -> None:
    """Let MLflow check the types of a request before it casts them, and refuse in one line what it refuses itself.

    Its server and command line cast prompts to text, whatever they are, and pass over params of unknown names, both
    before they call a model. Requests to models of other params, in the same process, are left alone."""
    from pipeline.inference.requests import KINDS, check_params, check_request

    def is_own(schema: Any) -> bool:
        return schema is not None and {each.name for each in schema.params} == set(KINDS)

    def parsed(known: Callable[..., Any]) -> Callable[..., Any]:
        def parse(data: Any, metadata: Any, input_schema: Any) -> Any:
            if not is_own(metadata.get_params_schema()):
                return known(data, metadata, input_schema)
            with one_line():
                check_request(scoring_server._decode_json_input(data))
                return known(data, metadata, input_schema)

        return parse

    def validated(known: Callable[..., Any]) -> Callable[..., Any]:
        def validate(data: Any, params: Any, inputs: Any, schema: Any, *others: Any) -> Any:
            if not is_own(schema):
                return known(data, params, inputs, schema, *others)
            with one_line():
                check_params(params)
                return known(data, params, inputs, schema, *others)

        return validate

    def answered(known: Callable[..., Any]) -> Callable[..., Any]:
        def answer(data: Any, content_type: str | None, model: Any, input_schema: Any) -> Any:
            if not is_own(model.metadata.get_params_schema()):
                return known(data, content_type, model, input_schema)
            with one_line():
                return known(data, content_type or "", model, input_schema)

        return answer

    wrap(scoring_server, "invocations", answered)
    wrap(scoring_server, "_parse_json_data", parsed)
    wrap(mlflow.pyfunc, "_validate_prediction_input", validated)


def wrap(module: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a module by what `wrapper` makes of it, once; nothing where MLflow has none."""
    known = getattr(module, name, None)
    if known is not None and not hasattr(known, "__wrapped__"):
        setattr(module, name, functools.wraps(known)(wrapper(known)))


def address_of(package: Path) -> str:
    """models:/NAME/VERSION of a package that MLflow has fetched by its name; "" of a folder."""
    if not (package / META).is_file():
        return ""
    facts = read_yaml(str(package), META)
    return f"models:/{facts['model_name']}/{facts['model_version']}"


mlflow.models.set_model(TextToImage())
