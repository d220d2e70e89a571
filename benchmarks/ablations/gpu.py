"""Noise by region and kernels at the size `small`, on a GPU that several trainings share.

    python -m benchmarks.ablations.gpu train [--seeds 0 1] [--images 32768]   # needs neither Ray nor the extractors
    python -m benchmarks.ablations.gpu judge                                   # then anywhere

Every network is trained with every seed, each in a process of its own, inspected and sampled there; its samples
wait in benchmarks/ablations/samples for `judge`, which needs the extractors. All networks see equally many images,
an advantage for those whose update costs more. The data are those in data/prepared, of any resolution.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.ablations import run
from benchmarks.judging import fit_judges, held_out_requests
from pipeline.data.dataset import PreparedDataset

SIZE = ("core.patch=1", "core.channels=96", "core.num_blocks=3", "core.attention=[16, 8]")
BATCH = 32
IMAGES, DRAWS = 32768, 1  # seen in training; samples of each caption
RECIPE = (f"pretrain.batch_size={BATCH}", "pretrain.shards=1", "pretrain.checkpoint_images=10000000")
NETWORKS = {
    "small-plain": (),
    "small-regions": ("regions.probability=0.5",),
    "small-kernels_noise": ("core.kernels=noise",),
}
ROWS: dict[str, tuple[str, str, tuple[int, ...]]] = {  # network, sampler, steps
    "small-R0": ("small-plain", "sde_dpmpp_2m", (8, 16, 32)),
    "small-R1": ("small-regions", "sde_dpmpp_2m", (8, 16, 32)),
    "small-R2": ("small-regions", "adaptive", (8, 16, 32)),
    "small-K0": ("small-plain", "heun", (16,)),
    "small-K2": ("small-kernels_noise", "heun", (16,)),
}
SAMPLES = run.FOLDER / "samples"


def train(network: str, seed: int, images: int, changes: list[str]) -> None:
    """Train one network, inspect it, and draw the samples of its rows."""
    start = time.perf_counter()
    run.train(network, seed, images, [*SIZE, *RECIPE, *NETWORKS[network], *changes], None)
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    run.inspect(network, seed)
    dataset, snapshot, _ = run.load(network, seed)
    requests = run.requests_for(dataset, network, DRAWS)
    SAMPLES.mkdir(parents=True, exist_ok=True)
    for row, (of, sampler, steps) in ROWS.items():
        if of == network:
            samples = {
                n: run.draw_samples(snapshot, requests.text, requests.seeds, n, run.Way(sampler))
                for n in steps
            }
            arrays = {f"{n} {nfe}": images.numpy() for n, (images, nfe) in samples.items()}
            np.savez_compressed(SAMPLES / f"{row}-{seed}.npz", **arrays)
            print(f"{row} sampled after {time.perf_counter() - start:.0f} s", flush=True)


def train_all(seeds: list[int], images: int, changes: list[str]) -> int:
    """All networks with all seeds, side by side; return the number that failed."""
    running = []
    logs = Path("runs/ablate")
    logs.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for network in NETWORKS:
            command = [sys.executable, "-m", "benchmarks.ablations.gpu", "one", network]
            command += ["--seeds", str(seed), "--images", str(images)]
            command += [f"--set={change}" for change in changes]
            with open(logs / f"{network}-{seed}.log", "w") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return sum(process.wait() != 0 for process in running)


def judge() -> None:
    """Judge all samples that are there."""
    dataset = PreparedDataset(Path("data/prepared"))
    judges, requests = fit_judges(dataset, dataset.low_resolution), held_out_requests(dataset, DRAWS)
    for path in sorted(SAMPLES.glob("*.npz")):
        row, _, seed = path.stem.rpartition("-")
        with np.load(path) as arrays:
            samples = {int(k.split()[0]): (torch.from_numpy(arrays[k]), int(k.split()[1])) for k in arrays}
        run.judge(row, int(seed), judges, requests, samples)


def main() -> None:
    """Train, or judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("train", "one", "judge"))
    parser.add_argument("network", nargs="?", choices=tuple(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    args = parser.parse_args()
    if args.command == "judge":
        judge()
    elif args.command == "one":
        train(args.network, args.seeds[0], args.images, args.changes)
    else:
        sys.exit(train_all(args.seeds, args.images, args.changes))


if __name__ == "__main__":
    main()
