"""A whole training update (forward, backward, optimizer, averages) beside those of diffusers' UNet2DModel and
denoising-diffusion-pytorch's Unet.

    python -m benchmarks.train [--size demo|small] [--only parameters|multiply-adds|update]
    python -m benchmarks.train --device cuda --out train.md
    python -m benchmarks.train --profile

Ours is a core and the shells above it. An image counts as seen when every level has had its own update on it, as
the stages do one after the other: the passes of frozen levels are paid for, and counted, once more for each shell.
Peers are trained by their own recipes, in autocast where the precision is bfloat16. What is alike and what is not
stands in README.md. Needs torch, numpy and safetensors alone, and the peers that are to take part.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from benchmarks.measure import machine
from benchmarks.train.settings import SIZES, Setting
from benchmarks.train.tables import device_name, profile, step_table, update_table, words
from benchmarks.train.timing import log

PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch", "ema-pytorch")
TABLES = ("parameters", "multiply-adds", "update")


def tables(args: argparse.Namespace) -> Iterator[str]:
    """The tables that were asked for, one by one."""
    gpu = args.device == "cuda"
    size = SIZES[args.size or ("small" if gpu else "demo")]()
    kinds = [args.dtype] if args.dtype else ["bfloat16"] if gpu else ["bfloat16", "float32"]
    for resolution in args.resolution or ([64, 128] if gpu else [64]):
        batch = args.batch or ((128 if resolution <= 64 else 64) if gpu else 16)
        for kind in kinds:
            device, dtype = torch.device(args.device), getattr(torch, kind)
            setting = Setting(device, dtype, resolution, batch, args.seconds, args.repeats)
            deadline = args.budget if resolution in (args.compile or []) else 0.0
            for equal in args.only or TABLES:
                log(f"{equal}: {words(setting)}")
                if equal == "update":
                    if (resolution, kind) == ((args.resolution or [64])[0], kinds[0]):
                        yield update_table(size, setting)
                else:
                    yield step_table(size, setting, equal, deadline if equal == "parameters" else 0.0)
                gc.collect()
                if gpu:
                    torch.cuda.empty_cache()


def main() -> None:
    """Print tables, or the profile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="of our networks; demo on a CPU, small on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--resolution", type=int, nargs="*", help="px")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--only", choices=TABLES, nargs="*")
    parser.add_argument("--compile", type=int, nargs="*", help="px at which compiled networks take part too")
    parser.add_argument(
        "--budget", type=float, default=120, help="seconds after which nothing more is compiled"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, help="file to which finished tables are added")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if args.profile:
        size = SIZES[args.size or "demo"]()
        kind = getattr(torch, args.dtype or "bfloat16")
        setting = Setting(torch.device(args.device), kind, (args.resolution or [64])[0], args.batch or 16)
        print(profile(size, setting))
        return
    name = device_name(torch.device(args.device))
    for text in chain([machine(PACKAGES) + (f" {name}." if name else "")], tables(args)):
        print(f"{text}\n", flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(f"{text}\n\n")


if __name__ == "__main__":
    main()
