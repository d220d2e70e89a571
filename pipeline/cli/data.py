"""`crescendo data`: check a source of images, and show prepared ones, before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.images import MAX_IMAGES, check_png
from pipeline.errors import ConfigError
from pipeline.project import find_root, from_root


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data check` and `data show`."""
    data = commands.add_parser("data", help="check and show images before training")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="validate a source and report what `prepare` would do with it",
        description="Reads, decodes and validates a source as the prepare stage does, but writes nothing except "
        "reports/data_check.jsonl. The exit status is the one the stage would end with.",
    )
    check.add_argument(
        "source",
        nargs="?",
        help="a folder, a zip, tar or Parquet file, or a source as params.yaml has it (default: its own)",
    )
    check.add_argument("--docs", type=Path, help="folder to write Data Docs to (default: none)")
    check.set_defaults(run=_check)
    show = actions.add_parser("show", help="draw a contact sheet of prepared images with their captions")
    show.add_argument("--split", choices=("train", "val", "test"), default="train", help="(train)")
    show.add_argument("--num", type=int, default=48, help="images, evenly spaced over the split (48)")
    show.add_argument("--out", type=Path, default=Path("data.png"), help="PNG file to write (data.png)")
    show.set_defaults(run=_show)


def _check(args: argparse.Namespace) -> int:
    from pipeline.config.params import load_params
    from pipeline.prepare.prepare import check
    from pipeline.prepare.sources.load import data_of

    params, root = load_params(), find_root()
    if args.source is not None:
        source = from_root(args.source, root)
        params = params.model_copy(update={"data": data_of(params.data, source, root)})
    check(params, root, args.docs, print)
    return 0


def _show(args: argparse.Namespace) -> int:
    import numpy as np

    from pipeline.data.dataset import PreparedDataset
    from pipeline.evaluation.figures import draw_sheet

    if not 1 <= args.num <= MAX_IMAGES:
        raise ConfigError("E-CFG-043", "--num", f"{args.num} is out of range", f"choose 1 to {MAX_IMAGES}")
    check_png(args.out)
    dataset = PreparedDataset(find_root() / "data/prepared")
    rows = dataset.split(args.split)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(args.num, len(rows))).astype(int))]
    ids = [dataset.caption_of(int(row)) for row in rows]
    captions = [dataset.captions[i] if i >= 0 else "" for i in ids]
    draw_sheet(args.out, captions, dataset.pictures(rows))
    print(f"wrote {len(rows)} of {len(dataset.split(args.split))} images of {args.split} to {args.out}")
    return 0
