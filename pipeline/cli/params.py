"""`crescendo preset` and `crescendo pin`: commands that change params.yaml."""

from __future__ import annotations

import argparse

from pipeline.project import find_root, from_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `preset` and `pin`."""
    preset = commands.add_parser(
        "preset",
        help="apply a file of presets/ to params.yaml",
        description="Writes the values of presets/NAME.yaml into params.yaml and keeps its comments; see "
        "`git diff` afterwards. Without a name, lists the presets.",
    )
    preset.add_argument("name", nargs="?")
    preset.set_defaults(run=_preset)
    pin = commands.add_parser(
        "pin",
        help="choose the model that the finetune stage grows, or the one to compare with",
        description="Verifies a model and writes its address and its digest into params.yaml (finetune.init_from, "
        "init_sha256; with --baseline: evaluate.baseline, baseline_sha256, baseline_passes); comments are kept. "
        "An alias is resolved to the version it currently points to.",
    )
    model = pin.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "model",
        nargs="?",
        help="models:/NAME@ALIAS, models:/NAME/3 or a folder; models/core is the pretrain stage's own",
    )
    model.add_argument(
        "--baseline",
        metavar="ADDRESS",
        help="compare with models:/NAME@ALIAS or models:/NAME/3 in the evaluate stage; teacher (or '') is the "
        "fine-tuned model",
    )
    pin.set_defaults(run=_pin)


def _preset(args: argparse.Namespace) -> int:
    from pipeline.presets import apply_preset, presets

    root = find_root()
    known = presets(root)
    if args.name is None:
        for name, first in known.items():
            print(f"{name:<12} {first}")
        return 0
    for line in apply_preset(root, args.name):
        print(line)
    return 0


def _pin(args: argparse.Namespace) -> int:
    from pipeline.registry.pins import pin, pin_baseline

    change = pin if args.baseline is None else pin_baseline
    root = find_root()
    for line in change(root, from_root(args.model if args.baseline is None else args.baseline, root)):
        print(line)
    return 0
