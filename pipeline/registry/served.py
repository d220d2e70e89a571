"""The registered model: MLflow stores this file, and executes it when it loads the model ("models from code").

No pickle: the weights are the snapshot's safetensors, and the modules that it imports are stored beside it.
Input: a column `prompt` (string). Output: a column `image` (PNG bytes). Params: `seed` of the first row, row i has
seed + i; `steps`, the number of passes, and `resolution` in px, of any level of the model; 0 is the model's own.
Its own number of passes is `default_passes` of the model's configuration, the fewest that passed the evaluation; 0,
where none did, is the snapshot's fewest.
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline.inference.generator import Generator, encode_png, load_generator


class TextToImage(PythonModel):  # type: ignore[misc]  # mlflow is not read by the type checker
    """Prompts to PNG files."""

    def __init__(self) -> None:
        self._generator: Generator | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the snapshot inside the model, once."""
        default_passes = context.model_config["default_passes"] or None
        self._generator = load_generator(context.artifacts["snapshot"], default_passes=default_passes)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """[n] prompts to [n] PNG files; raises ConfigError for a seed, steps or a resolution out of range."""
        assert self._generator is not None, "mlflow calls load_context first"
        params = params or {}
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        if not prompts:
            return pd.DataFrame({"image": pd.Series([], dtype=object)})
        first, steps, resolution = (int(params.get(name, 0)) for name in ("seed", "steps", "resolution"))
        seeds = range(first, first + len(prompts))
        images = self._generator.images(prompts, seeds, steps or None, resolution=resolution or None)
        return pd.DataFrame({"image": [encode_png(image) for image in images]})


mlflow.models.set_model(TextToImage())
