"""`crescendo preset` and `crescendo pin`: commands that change params.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path


def _preset(args: argparse.Namespace) -> int:
    from pipeline.presets import apply_preset, presets

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
