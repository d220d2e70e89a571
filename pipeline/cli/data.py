"""`crescendo data`: look at images before they are trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli.images import MAX_IMAGES, check_png
from pipeline.errors import ConfigError


def _data_check(args: argparse.Namespace) -> int:
    from pipeline.config.params import load_params
    from pipeline.prepare.prepare import check
    from pipeline.prepare.sources.load import data_of

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
    check_png(args.out)
    dataset = PreparedDataset(Path("data/prepared"))
    rows = dataset.split(args.split)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(args.num, len(rows))).astype(int))]
    ids = [dataset.caption_of(int(row)) for row in rows]
    captions = [dataset.captions[i] if i >= 0 else "" for i in ids]
    draw_sheet(args.out, captions, dataset.images(rows))
    print(f"wrote {len(rows)} of {len(dataset.split(args.split))} images of {args.split} to {args.out}")
    return 0
