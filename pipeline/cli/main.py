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
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.cli.data import _data_check, _data_show
from pipeline.cli.images import _generate, _upscale
from pipeline.cli.models import _promote
from pipeline.cli.params import _pin, _preset
from pipeline.errors import run_main


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
