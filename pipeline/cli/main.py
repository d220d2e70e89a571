"""`crescendo`: what is done before training and after it. Training itself is `dvc repro`.

    crescendo data check [SOURCE]
    crescendo data show [--split train] [--num 48] [--out data.png]
    crescendo preset [NAME]
    crescendo pin MODEL | --baseline ADDRESS
    crescendo promote [--to ALIAS] [--expect VERSION] [--dry-run] [--allow-candidate]
    crescendo rollback [--to VERSION]
    crescendo history | verify [--all] | fsck
    crescendo copy MODEL --to URI | sign MODEL --key FILE
    crescendo trace MODEL|FILE.png [--json]
    crescendo reproduce MODEL [--only STAGE] [--dry-run] [--environment here] [--data here] [--json]
    crescendo diff MODEL MODEL [--prompts PROMPT...] [--out diff.html]
    crescendo generate PROMPT... | --prompts FILE [--num 16] [--steps 1] [--seed 0] [--out grid.png] [--model M]
                       [--guidance G] [--guide unconditional|early_weights|low_band]
                       [--sampler heun|dpmpp_2m|sde_dpmpp_2m|adaptive] [--resolution 64] [--size 160x96]
    crescendo upscale IMAGE [--factor 2|4] [--out upscaled.png] [--prompt TEXT] [--model M] [--steps N]
                      [--strength S] [--no-project] [--seed 0]
    crescendo export FOLDER [--model M] [--steps 1] [--licence TEXT] [--force]
    crescendo serve [MODEL] [--port 8000] [--host 127.0.0.1]
    crescendo status [--watch [SECONDS]] [--json]
    crescendo plan [STAGE...]
    crescendo doctor
    crescendo clean [--keep 2] [--dry-run]
    crescendo drill [STAGE] [--kills 20] [--minutes 5] [--under ray|process] [--seed 0]

Heavy imports are inside the commands that need them, which keeps `crescendo --help` quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from pipeline.cli import (
    data,
    drill,
    export,
    housekeeping,
    images,
    models,
    overview,
    params,
    registry,
    reproduce,
    serving,
    tracking,
)
from pipeline.errors import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="crescendo", description="Everything around `dvc repro`: data, presets, promotion, images."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        data, params, models, registry, reproduce, images, export, serving, tracking, overview, housekeeping, drill
    ):  # fmt: skip
        module.add_commands(commands)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `arguments` defaults to sys.argv. Raises PipelineError."""
    args = build_parser().parse_args(arguments)
    status: int = args.run(args)
    return status


def main() -> NoReturn:
    """The console script: an error becomes one line and an exit status (`errors.run_main`)."""
    run_main(run)


if __name__ == "__main__":
    main()
