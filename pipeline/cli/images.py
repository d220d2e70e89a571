"""`crescendo generate` and `crescendo upscale`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from pipeline.cli.models import load_model
from pipeline.errors import BadData, ConfigError

MAX_IMAGES = 4096  # one grid, held in memory


def check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError("E-CFG-044", "--out", f"{str(path)!r} is no PNG file", "let it end in .png")


def _generate(args: argparse.Namespace) -> int:
    from pipeline import artifacts
    from pipeline.inference.generator import check_seed, encode_png, tile

    total = args.num * len(args.prompts)
    if args.num < 1 or total > MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"makes {total} pictures", f"choose 1 to {MAX_IMAGES} in all")
    check_png(args.out)
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise ConfigError("E-CFG-045", "--guidance", f"{args.guidance} is out of range", "choose 0 or more")
    for seed in (args.seed, args.seed + args.num - 1):
        check_seed(seed)
    generator = load_model(args.model, Path.cwd())
    if generator.snapshot.config["kind"] == "refined":
        for option, value in (
            ("--guidance", args.guidance),
            ("--guide", args.guide),
            ("--sampler", args.sampler),
        ):
            if value is not None:
                print(f"warning: {option} has no effect: a refined model has it built in", file=sys.stderr)
    prompts = [prompt for prompt in args.prompts for _ in range(args.num)]
    seeds = [seed for _ in args.prompts for seed in range(args.seed, args.seed + args.num)]
    images = generator.images(
        prompts, seeds, args.steps, args.guidance, args.sampler, args.guide, args.resolution
    )
    columns = args.num if len(args.prompts) > 1 else math.ceil(math.sqrt(args.num))
    artifacts.write_atomic(args.out, encode_png(tile(images, columns)))
    size = images.shape[-1]
    print(f"wrote {len(images)} pictures of {size}x{size} px to {args.out}")
    return 0


def _upscale(args: argparse.Namespace) -> int:
    import torch

    from pipeline import artifacts
    from pipeline.inference.generator import encode_png
    from pipeline.prepare import images

    check_png(args.out)
    with open(args.picture, "rb") as file:
        content = file.read(images.MAX_BYTES + 1)
    picture, alpha = images.decode_full_size(content, str(args.picture))
    height, width = (args.factor * side for side in picture.shape[:2])
    if height * width > images.MAX_PIXELS:
        problem = f"would have {width}x{height} pixels, the most is {images.MAX_PIXELS}"
        raise BadData("E-IMG-004", str(args.out), problem, "scale the picture down, or choose --factor 2")
    generator = load_model(args.model, Path.cwd())
    if not any(shell["net"].get("bands") for shell in generator.snapshot.config["shells"]):
        hint = "it is better at it after training with finetune.upscale_probability above 0"
        print(f"note: this model was not trained to upscale; {hint}", file=sys.stderr)
    made = generator.upscale(
        picture,
        args.prompt,
        args.seed,
        args.factor,
        args.steps,
        args.strength,
        not args.no_project,
        _show_rows,
    )
    whole = made if alpha is None else images.with_alpha(made, alpha)
    artifacts.write_atomic(args.out, encode_png(torch.from_numpy(whole).permute(2, 0, 1)))
    print(f"wrote {width}x{height} px to {args.out}")
    return 0


def _show_rows(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\033[Kupscale: row {done} of {total}", end=end, file=sys.stderr, flush=True)
