"""`crescendo generate` and `crescendo upscale`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.models import load_model, load_upscaler
from pipeline.errors import BadData, ConfigError
from pipeline.project import find_root

if TYPE_CHECKING:
    from pipeline.inference.generator import Generator

MAX_IMAGES = 4096  # one grid, held in memory
TOGETHER = 64  # images of a file of prompts that are held in memory; each is what it would be alone


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` and `upscale`."""
    _add_generate(commands)
    _add_upscale(commands)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate images from prompts",
        description="Generates one image per prompt and seed: as one PNG grid, or with --prompts as a PNG each.",
    )
    generate.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help='what to show, such as "grinning face"; "" for no caption',
    )
    generate.add_argument(
        "--prompts", dest="file", type=Path, metavar="FILE", help="one prompt a line, instead"
    )
    generate.add_argument("--num", type=int, help="images per prompt (16; 1 with --prompts)")
    generate.add_argument(
        "--steps",
        type=int,
        help="passes of a refined model (the fewest that passed its evaluation), sampler steps of others (the "
        "model's own default)",
    )
    generate.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; the next one has seed + 1 (0)"
    )
    generate.add_argument(
        "--out",
        type=Path,
        help="PNG file to write (grid.png); with --prompts the folder (images), with a list of what is which",
    )
    generate.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder (champion, candidate or models/refined)",
    )
    generate.add_argument("--guidance", type=float, help="guidance strength, 1 = off; not for refined models")
    generate.add_argument(
        "--guide",
        help="guide away from: unconditional, early_weights or low_band (the model's own default); not for refined "
        "models",
    )
    generate.add_argument(
        "--sampler",
        help="heun, dpmpp_2m, sde_dpmpp_2m or adaptive (the model's own default); not for refined models",
    )
    generate.add_argument("--resolution", type=int, help="px, of any level of the model (the finest)")
    generate.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="px, such as 160x96; best about as large as the model's squares",
    )
    generate.set_defaults(run=_generate)


def _add_upscale(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    upscale = commands.add_parser(
        "upscale",
        help="enlarge an image by 2 or 4",
        description="Adds detail to an image of any size with the shells of a model, tile by tile. The "
        "result is sRGB; transparency is enlarged by plain interpolation.",
    )
    upscale.add_argument(
        "image", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file"
    )
    upscale.add_argument("--factor", type=int, choices=(2, 4), default=2, help="(2)")
    upscale.add_argument(
        "--out", type=Path, default=Path("upscaled.png"), help="PNG file to write (upscaled.png)"
    )
    upscale.add_argument("--prompt", default="", help="what the image shows (default: no prompt)")
    upscale.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder (that of `generate` if it upscales better than "
        "models/finetuned, else this)",
    )
    upscale.add_argument("--steps", type=int, help="sampler steps (a refined model's best, 8 for others)")
    upscale.add_argument(
        "--strength",
        type=float,
        help="noise added to the image, 0.005 to 0.5: more invents more (0.2 for a refined model in one step, else "
        "0.05)",
    )
    upscale.add_argument(
        "--no-project", action="store_true", help="allow the result's 2x2 means to differ from the image"
    )
    upscale.add_argument("--seed", type=int, default=0, help="of the detail (0)")
    upscale.set_defaults(run=_upscale)


def check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError("E-CFG-044", "--out", f"{str(path)!r} is no PNG file", "let it end in .png")


def _generate(args: argparse.Namespace) -> int:
    if bool(args.prompts) == (args.file is not None):
        problem = "prompts are given twice" if args.prompts else "nothing to show is given"
        raise ConfigError("E-CFG-082", "generate", problem, "write prompts, or --prompts FILE")
    return _generate_grid(args) if args.file is None else _generate_files(args)


def _generate_grid(args: argparse.Namespace) -> int:
    """All images in one PNG file, a row for each prompt."""
    from pipeline import artifacts
    from pipeline.inference.generator import tile
    from pipeline.inference.png import encode_png

    num, out = 16 if args.num is None else args.num, args.out or Path("grid.png")
    total = num * len(args.prompts)
    if num < 1 or total > MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"makes {total} images", f"choose 1 to {MAX_IMAGES} in all")
    check_png(out)
    generator = _generator(args, num)
    prompts = [prompt for prompt in args.prompts for _ in range(num)]
    options = _options(args)
    seeds = [*range(args.seed, args.seed + num)] * len(args.prompts)
    images = generator.images(prompts, seeds, **options)
    columns = num if len(args.prompts) > 1 else math.ceil(math.sqrt(num))
    sheet = {"prompts": args.prompts, "seed": args.seed, "num": num, "columns": columns}
    artifacts.write_atomic(out, encode_png(tile(images, columns), generator.made(**options) | sheet))
    height, width = images.shape[2:]
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    print(f"wrote {count} of {width}x{height} px to {out}{_effort(generator, args)}")
    return 0


def _generate_files(args: argparse.Namespace) -> int:
    """A PNG file for each prompt of a file and each seed, and a list of them."""
    from pipeline import artifacts
    from pipeline.cli.prompts import LIST, as_list, read_prompts, wanted
    from pipeline.inference.png import encode_png
    from pipeline.progress import ProgressBar

    num, out = 1 if args.num is None else args.num, args.out or Path("images")
    found = read_prompts(args.file)
    if not 1 <= num <= MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"makes {num} images", f"choose 1 to {MAX_IMAGES} per prompt")
    if out.is_file():
        raise ConfigError("E-CFG-083", "--out", f"{out} is a file", "name a folder")
    todo = list(wanted(found.prompts, range(args.seed, args.seed + num)))
    generator, options = _generator(args, num), _options(args)
    made = generator.made(**options)
    out.mkdir(parents=True, exist_ok=True)
    with ProgressBar("generate") as on_progress:
        for done in range(0, len(todo), TOGETHER):
            part = todo[done : done + TOGETHER]
            images = generator.images([each.prompt for each in part], [each.seed for each in part], **options)
            for each, image in zip(part, images, strict=True):
                own = {"prompt": each.prompt, "seed": each.seed}
                artifacts.write_atomic(out / each.file, encode_png(image, made | own))
            on_progress(done + len(part), len(todo))
    artifacts.write_atomic(out / LIST, as_list(todo))
    passed = [f"{found.repeated} repeated"] * bool(found.repeated) + [f"{found.empty} empty"] * bool(
        found.empty
    )
    print(
        f"wrote {len(todo)} images of {len(found.prompts)} prompts, and {LIST}, to {out}{_effort(generator, args)}"
        + (f"; {' and '.join(passed)} lines passed over" if passed else "")
    )
    return 0


def _generator(args: argparse.Namespace, num: int) -> Generator:
    """The model that was asked for; options out of range are refused, and those without effect named."""
    from pipeline.inference.generator import check_guidance, check_seed

    check_guidance(args.guidance)
    for seed in (args.seed, args.seed + num - 1):
        check_seed(seed)
    generator = load_model(args.model, find_root())
    if generator.snapshot.config.is_refined:
        given = {"guidance": args.guidance, "guide": args.guide, "sampler": args.sampler}
        for option in (name for name, value in given.items() if value is not None):
            print(f"warning: --{option} has no effect: a refined model has it built in", file=sys.stderr)
    return generator


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line, by their names in `Generator.images`."""
    from pipeline.serving.sizes import parse_size

    return {
        "num_steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler,
        "guide": args.guide,
        "resolution": args.resolution,
        "size": parse_size(args.size),
    }


def _effort(generator: Generator, args: argparse.Namespace) -> str:
    passes = generator.passes(args.steps)
    return "" if passes is None else ", in 1 pass" if passes == 1 else f", in {passes} passes"


def _upscale(args: argparse.Namespace) -> int:
    import torch

    from pipeline import artifacts
    from pipeline.inference.png import encode_png
    from pipeline.inference.upscaling import UpscaleSettings
    from pipeline.prepare import images
    from pipeline.prepare.limits import MAX_BYTES, MAX_PIXELS
    from pipeline.progress import ProgressBar

    check_png(args.out)
    with open(args.image, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    pixels, alpha = images.decode_full_size(content, str(args.image))
    height, width = (args.factor * side for side in pixels.shape[:2])
    if height * width > MAX_PIXELS:
        problem = f"would have {width}x{height} pixels, the limit is {MAX_PIXELS}"
        raise BadData("E-IMG-004", str(args.out), problem, "scale the image down, or choose --factor 2")
    root = find_root()
    generator = load_upscaler(root) if args.model is None else load_model(args.model, root)
    config = generator.snapshot.config
    if not (config.is_refined or config.learned_to_upscale):
        hint = "finetune.upscale_probability above 0 makes it better at that"
        print(f"note: this model was not trained to upscale; {hint}", file=sys.stderr)
    options = {"num_steps": args.steps, "sigma_low": args.strength}
    chosen = {name: value for name, value in options.items() if value is not None}
    settings = UpscaleSettings(args.factor, project=not args.no_project, **chosen)
    with ProgressBar("upscale", "rows") as on_progress:
        enlarged = generator.upscale(pixels, args.prompt, args.seed, settings, on_progress)
    if alpha is not None:
        enlarged = images.with_alpha(enlarged, alpha)
    made = generator.made_of(content, args.prompt, args.seed, settings)
    artifacts.write_atomic(args.out, encode_png(torch.from_numpy(enlarged).permute(2, 0, 1), made))
    print(f"wrote {width}x{height} px to {args.out}")
    return 0
