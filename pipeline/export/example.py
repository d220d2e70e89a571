"""Images from prompts with the programs beside this file, run by ONNX Runtime or by torch.

    python generate.py "grinning face" --num 4 --out images.png [--runtime torch] [--seed 0]

Needs numpy, pillow, tokenizers, and onnxruntime or torch.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = list[NDArray[Any]]
Program = Callable[..., Arrays]


def load_program(folder: Path, name: str, runtime: str) -> Program:
    """One of the programs: arrays in, arrays out."""
    if runtime == "torch":
        import torch

        module = torch.export.load(folder / f"{name}.pt2").module()

        def run(*inputs: NDArray[Any]) -> Arrays:
            with torch.no_grad():
                found = module(*map(torch.from_numpy, inputs))
            return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]

        return run
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def encode(folder: Path, facts: dict[str, Any], prompts: Sequence[str], runtime: str) -> Arrays:
    """Prompts to pooled [N,D], tokens [N,T,D] and mask [N,T]; an empty one means no caption."""
    clean = [" ".join(unicodedata.normalize("NFC", prompt).split()) for prompt in prompts]
    known = np.array([bool(prompt) for prompt in clean])
    if "labels" in facts:
        unknown = sorted({prompt for prompt in clean if prompt} - set(facts["labels"]))
        if unknown:
            raise SystemExit(f"not one of the labels in export.json: {unknown[0]!r}")
        pooled = np.zeros((len(clean), facts["dim"]), np.float32)
        for row, prompt in enumerate(clean):
            if prompt:
                pooled[row, facts["labels"].index(prompt)] = 1
        return [pooled, pooled[:, None].copy(), known[:, None]]
    if not facts["text"]:
        raise SystemExit("the text encoder is not part of this folder: see README.md")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(facts["tokens"])
    tokenizer.enable_padding(length=facts["tokens"])
    found = tokenizer.encode_batch(clean)
    ids = np.array([each.ids for each in found], np.int64)
    mask = np.array([each.attention_mask for each in found], np.bool_) & known[:, None]
    return [*load_program(folder, "text", runtime)(ids, mask), mask]


def noise(facts: dict[str, Any], seeds: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal numbers [N,K], each row from its own seed."""
    rows = [np.random.default_rng(seed).standard_normal(facts["noise_size"], np.float32) for seed in seeds]
    return np.stack(rows)


def generate(folder: Path, prompts: Sequence[str], seeds: Sequence[int], runtime: str) -> NDArray[np.uint8]:
    """One image per prompt and seed, uint8 [N,R,R,3]."""
    facts = json.loads((folder / "export.json").read_text())
    program = load_program(folder, "generator", runtime)
    (images,) = program(*encode(folder, facts, prompts, runtime), noise(facts, seeds))
    return images.round().astype(np.uint8).transpose(0, 2, 3, 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Images of a prompt, side by side in one PNG file.")
    parser.add_argument("prompt", help='"" for none')
    parser.add_argument("--num", type=int, default=1, help="images (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next one has seed + 1 (0)")
    parser.add_argument("--out", default="image.png", help="(image.png)")
    parser.add_argument("--runtime", choices=("onnx", "torch"), default="onnx", help="(onnx)")
    args = parser.parse_args()
    from PIL import Image

    seeds = range(args.seed, args.seed + args.num)
    images = generate(Path(__file__).parent, [args.prompt] * args.num, seeds, args.runtime)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(args.out)


if __name__ == "__main__":
    main()
