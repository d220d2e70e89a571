"""`crescendo`: what is done before training and after it. Training itself is `dvc repro`.

    crescendo data check [SOURCE]
    crescendo data show [--split train] [--num 48] [--out data.png]
    crescendo preset [NAME]
    crescendo pin MODEL
    crescendo promote [--allow-candidate]
    crescendo generate PROMPT... [--num 16] [--steps 1] [--seed 0] [--out grid.png] [--model M] [--guidance G]
                       [--guide no_text|early|low] [--sampler heun|dpmpp_2m|sde_dpmpp_2m|adaptive]
                       [--resolution 64]
    crescendo upscale PICTURE [--factor 2|4] [--out upscaled.png] [--prompt TEXT] [--model M] [--steps N]
                      [--strength S] [--no-project] [--seed 0]

Heavy imports wait for the command that needs them, so that `crescendo --help` is quick.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.errors import BadData, ConfigError, run_main

if TYPE_CHECKING:
    from pipeline.registry.generator import Generator
    from pipeline.registry.package import Registry

MAX_IMAGES = 4096  # one grid, held in memory


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="crescendo", description="Around `dvc repro`: data, presets, promotion, pictures."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="look at images before they are trained on")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="validate a source and say what `prepare` would do with it",
        description="Reads, decodes and validates a source as the prepare stage does, and writes nothing but a "
        "report. Ends with the status that the stage would end with.",
    )
    check.add_argument(
        "source",
        nargs="?",
        help="a folder, zip, tar or Parquet file, or a source as in params.yaml (that of params.yaml)",
    )
    check.add_argument("--docs", type=Path, help="folder to write Data Docs to (none)")
    check.set_defaults(run=_data_check)
    show = actions.add_parser("show", help="draw a contact sheet of prepared images with their captions")
    show.add_argument("--split", choices=("train", "val", "test"), default="train", help="(train)")
    show.add_argument("--num", type=int, default=48, help="pictures, evenly spread over the split (48)")
    show.add_argument("--out", type=Path, default=Path("data.png"), help="PNG file to write (data.png)")
    show.set_defaults(run=_data_show)

    preset = commands.add_parser(
        "preset",
        help="change params.yaml as a file of presets/ says",
        description="Writes the values of presets/NAME.yaml into params.yaml, whose comments stay; look at "
        "`git diff` afterwards. Without a name, lists what there is.",
    )
    preset.add_argument("name", nargs="?")
    preset.set_defaults(run=_preset)

    pin = commands.add_parser(
        "pin",
        help="choose the model that the finetune stage grows",
        description="Verifies a model and writes its address and its digest into params.yaml (finetune.init_from, "
        "finetune.init_sha256), whose comments stay. An alias becomes the version that it means now.",
    )
    pin.add_argument(
        "model",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder; models/core is that of the pretrain stage",
    )
    pin.set_defaults(run=_pin)

    promote = commands.add_parser(
        "promote",
        help="register models/refined; make it the champion if its verdict passed",
        description="Registers models/refined as the candidate, and moves the alias `champion` to it if "
        "reports/verdict.json passed. Ends with 1 and the rule that failed if not.",
    )
    promote.add_argument(
        "--allow-candidate", action="store_true", help="end with 0 if it stays the candidate"
    )
    promote.set_defaults(run=_promote)

    generate = commands.add_parser(
        "generate",
        help="make pictures from prompts",
        description="Makes one picture a prompt and seed, as a PNG grid.",
    )
    generate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help='what to show, such as "grinning face"'
    )
    generate.add_argument("--num", type=int, default=16, help="pictures of each prompt (16)")
    generate.add_argument(
        "--steps",
        type=int,
        help="passes of a refined model, sampler steps of others (the model's own default)",
    )
    generate.add_argument(
        "--seed", type=int, default=0, help="seed of the first picture; the next has seed + 1 (0)"
    )
    generate.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG file to write (grid.png)")
    generate.add_argument(
        "--model",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder (champion, candidate or models/refined)",
    )
    generate.add_argument(
        "--guidance", type=float, help="strength of the prompt, 1 = off; not for refined models"
    )
    generate.add_argument(
        "--guide",
        help="no_text, early or low: what is led away from (the model's own); not for refined models",
    )
    generate.add_argument(
        "--sampler", help="heun, dpmpp_2m, sde_dpmpp_2m or adaptive (the model's own); not for refined models"
    )
    generate.add_argument("--resolution", type=int, help="px, of any level of the model (the finest)")
    generate.set_defaults(run=_generate)

    upscale = commands.add_parser(
        "upscale",
        help="make a picture 2 or 4 times as large",
        description="Adds detail to a picture of any size with the shells of a fine-tuned model, in tiles. The "
        "result is sRGB; transparency is enlarged by plain interpolation.",
    )
    upscale.add_argument("picture", type=Path, help="PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file")
    upscale.add_argument("--factor", type=int, choices=(2, 4), default=2, help="(2)")
    upscale.add_argument(
        "--out", type=Path, default=Path("upscaled.png"), help="PNG file to write (upscaled.png)"
    )
    upscale.add_argument("--prompt", default="", help="what the picture shows (nothing said)")
    upscale.add_argument("--model", default="models/finetuned", help="a folder (models/finetuned)")
    upscale.add_argument("--steps", type=int, help="sampler steps; 1 gives the mean of what may be there (8)")
    upscale.add_argument(
        "--strength", type=float, help="noise on the picture, 0.005 to 0.5: more lets more be invented (0.05)"
    )
    upscale.add_argument(
        "--no-project", action="store_true", help="let the result's 2x2 means differ from the picture"
    )
    upscale.add_argument("--seed", type=int, default=0, help="of the detail (0)")
    upscale.set_defaults(run=_upscale)
    return top


def _data_check(args: argparse.Namespace) -> int:
    from pipeline.config import load_params
    from pipeline.data.prepare import check
    from pipeline.data.sources import data_of

    params, root = load_params(), Path.cwd()
    if args.source is not None:
        params = params.model_copy(update={"data": data_of(params.data, args.source, root)})
    check(params, root, args.docs, print)
    return 0


def _data_show(args: argparse.Namespace) -> int:
    import numpy as np

    from pipeline.data.dataset import PreparedDataset
    from pipeline.evaluation.report import draw_sheet

    if not 1 <= args.num <= MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"{args.num} is out of range", f"choose 1 to {MAX_IMAGES}")
    _check_png(args.out)
    dataset = PreparedDataset(Path("data/prepared"))
    rows = dataset.split(args.split)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(args.num, len(rows))).astype(int))]
    ids = [dataset.caption_of(int(row)) for row in rows]
    captions = [dataset.captions[i] if i >= 0 else "" for i in ids]
    draw_sheet(args.out, captions, dataset.images(rows))
    print(f"wrote {len(rows)} of {len(dataset.split(args.split))} images of {args.split} to {args.out}")
    return 0


def _preset(args: argparse.Namespace) -> int:
    from pipeline.config import apply_preset, presets

    known = presets(Path.cwd())
    if args.name is None:
        for name, first in known.items():
            print(f"{name:<12} {first}")
        return 0
    for line in apply_preset(Path.cwd(), args.name):
        print(line)
    return 0


def _pin(args: argparse.Namespace) -> int:
    from pipeline.registry.pins import pin

    for line in pin(Path.cwd(), args.model):
        print(line)
    return 0


def _check_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ConfigError("E-CFG-044", "--out", f"{str(path)!r} is no PNG file", "let it end in .png")


def _promote(args: argparse.Namespace) -> int:
    from pipeline.config import load_params
    from pipeline.registry.promote import promote

    promote(Path.cwd(), load_params().promotion.name, args.allow_candidate)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from pipeline import artifacts
    from pipeline.registry.generator import check_seed, encode_png, tile

    total = args.num * len(args.prompts)
    if args.num < 1 or total > MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"makes {total} pictures", f"choose 1 to {MAX_IMAGES} in all")
    _check_png(args.out)
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise ConfigError("E-CFG-045", "--guidance", f"{args.guidance} is out of range", "choose 0 or more")
    for seed in (args.seed, args.seed + args.num - 1):
        check_seed(seed)
    generator = _load(args.model, Path.cwd())
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
    from pipeline.data import images
    from pipeline.registry.generator import encode_png

    _check_png(args.out)
    with open(args.picture, "rb") as file:
        content = file.read(images.MAX_BYTES + 1)
    picture, alpha = images.whole(content, str(args.picture))
    height, width = (args.factor * side for side in picture.shape[:2])
    if height * width > images.MAX_PIXELS:
        problem = f"would have {width}x{height} pixels, the most is {images.MAX_PIXELS}"
        raise BadData("E-IMG-004", str(args.out), problem, "scale the picture down, or choose --factor 2")
    generator = _load(args.model, Path.cwd())
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


def _load(model: str | None, root: Path) -> Generator:
    """The model that was asked for, or the best there is; says which."""
    from pipeline.registry.generator import load_generator

    if model is not None and not model.startswith("models:"):
        print(f"model: {model}")
        return load_generator(model)
    uri = model or _best(root)
    if uri is None:
        from pipeline.registry.promote import MODEL

        print(f"model: {MODEL} (nothing is registered)")
        return load_generator(root / MODEL)
    from pipeline.registry.package import Registry

    return _load_registered(Registry(root), uri)


def _load_registered(registry: Registry, uri: str) -> Generator:
    from pipeline.registry.generator import load_generator

    version = registry.resolve(uri)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        generator = load_generator(registry.fetch(version, Path(folder)))
    print(f"model: {uri}, version {version.number} ({generator.snapshot.digest[:12]})")
    return generator


def _best(root: Path) -> str | None:
    """Address of the champion, else of the candidate; None if neither is there."""
    from pipeline import tracking

    if not tracking.store_exists(root):
        return None
    from pipeline.config import load_params
    from pipeline.registry.package import CANDIDATE, CHAMPION, Registry

    name = load_params(root / "params.yaml").promotion.name
    aliases = Registry(root).aliases(name)
    return next((f"models:/{name}@{alias}" for alias in (CHAMPION, CANDIDATE) if alias in aliases), None)


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what `arguments` (default: the command line's) say; the exit status. Raises PipelineError."""
    args = parser().parse_args(arguments)
    status: int = args.run(args)
    return status


def main() -> NoReturn:
    """The console script: errors become one line and a status (`errors.run_main`)."""
    run_main(run)


if __name__ == "__main__":
    main()
