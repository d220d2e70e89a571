"""Make docs/film.png, the film strip of all training stages in one picture, from a finished project.

python docs/film.py docs/film.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from pipeline.compute import load_profile
from pipeline.data.dataset import PreparedDataset
from pipeline.launch.stage import runs_folder
from pipeline.overview.stages import latest_run
from pipeline.project import find_root
from pipeline.training.film import frames, sampled_captions, save_film

STAGES = ("pretrain", "finetune", "refine")


def main() -> None:
    """Draw what the newest run of each stage sampled."""
    root = find_root()
    dataset = PreparedDataset(root / "data/prepared")
    columns = []
    for stage in STAGES:
        run = latest_run(runs_folder(root, load_profile(root)) / stage)
        if run is None:
            sys.exit(f"runs/{stage}: has no run. Fix: run `dvc repro`")
        columns += frames(stage, run, run / "result/reports/samples.png")
    path = Path(sys.argv[1])
    save_film(path, columns, *sampled_captions(dataset))
    with Image.open(path) as film:  # a third of the size, for git
        small = film.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
