"""`crescendo serve` under load: its rate beside that of `generate`, latencies, memory, and an alias that moves.

    python -m benchmarks.serving [--users 8] [--seconds 600] [--moves 20] [--server-cores 0,1] [--client-cores 2]

A copy of the project's registry is served, with a second version of the champion's files. Each user asks for one
image in one pass (one step of each level, if it is not refined), waits for it, and asks for the next, always with a
new prompt. After `--seconds` the champion
moves between both versions, every five seconds, under as much load. `generate` makes images of as new prompts in
batches in the same run, before and after, on the cores of the server. CPU seconds are of all threads of a process.

The load comes from this process: keep it off the server's cores where a machine has others. The status is 1 unless
every request was answered with 200.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.measure import machine, significant, table
from pipeline.config.params import load_params
from pipeline.project import find_root
from pipeline.registry.package import CHAMPION, Registry, Version

WORDS = (
    "red", "green", "tiny", "old", "happy", "cat", "dog", "heart", "star", "face", "house", "rocket", "apple",
    "flag", "hand", "moon", "fish", "crown",
)  # fmt: skip
GENERATE = """
import itertools, json, sys, time
from pathlib import Path
from benchmarks.serving import prompt
from pipeline.inference.generator import load_generator
generator, first, count = load_generator(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
generator.images([prompt(first - 1)], [0], 1)
wall, cpu = time.perf_counter(), time.process_time()
generator.images([prompt(first + i) for i in range(count)], range(count), 1)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
alone = time.perf_counter()
generator.images([prompt(first + count + i) for i in range(4)], range(4), 1)
print(json.dumps([count / wall, count / cpu, time.perf_counter() - alone]))
"""


@dataclass(frozen=True)
class Generated:
    """What `generate` does: images a second and a CPU second, and seconds of one batch of four."""

    rate: float
    rate_cpu: float
    batch: float


@dataclass
class Load:
    """What users saw. latencies: seconds of each request. statuses: how many of each; of HTTP, or an exception's
    name. memory: (seconds since the start, MiB of the server)."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    moves: int = 0
    per_batch: float = 0.0  # images


def prompt(number: int) -> str:
    """Four words; another four for every number below 18^4."""
    places = (number // len(WORDS) ** place % len(WORDS) for place in range(4))
    return " ".join(WORDS[place] for place in places)


def slope(memory: Sequence[tuple[float, float]]) -> float:
    """MiB a minute by which memory grew in the second half of a run; 0 of too few points."""
    half = memory[len(memory) // 2 :]
    if len(half) < 3:
        return 0.0
    seconds, mib = zip(*half, strict=True)
    return statistics.linear_regression(seconds, mib).slope * 60


def on_cores(cores: str | None) -> list[str]:
    """What runs a command on cores such as 0,1; nothing for None."""
    return [] if cores is None else ["taskset", "-c", cores]


def generated(folder: Path, first: int, count: int, cores: str | None) -> Generated:
    """`count` images in a process of their own, by the model in a folder."""
    command = [*on_cores(cores), sys.executable, "-c", GENERATE, str(folder), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Generated(*json.loads(done.stdout))


@contextlib.contextmanager
def copied_project(root: Path) -> Iterator[tuple[Path, list[Version]]]:
    """A copy of a project's registry, and two versions of the champion's files in it."""
    name = load_params(root / "params.yaml").promotion.name
    with tempfile.TemporaryDirectory(prefix="crescendo-bench-") as scratch:
        copy = Path(scratch)
        for each in ("params.yaml", "infra", "mlflow.db", "mlartifacts"):
            place = root / each
            (shutil.copytree if place.is_dir() else shutil.copy)(place, copy / each)
        registry = Registry(copy)
        champion = registry.resolve(f"models:/{name}@{CHAMPION}")
        client, _ = registry.connection
        source = client.get_model_version(name, champion.number).source
        second = client.create_model_version(name, source, tags=dict(champion.tags))
        yield copy, [champion, registry.version(name, str(second.version))]


@contextlib.contextmanager
def served(root: Path, model: str | None, cores: str | None) -> Iterator[tuple[str, psutil.Process, float]]:
    """A service of the project: its address, its process, and the CPU seconds of its start."""
    options = [*([] if model is None else [model]), "--port", "0", "--poll", "1", "--queue", "256"]
    process = subprocess.Popen(
        [*on_cores(cores), sys.executable, "-m", "pipeline.cli", "serve", *options],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CRESCENDO_COMPUTE": "process"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit(f"the service ended with status {process.wait()}")
        server = psutil.Process(process.pid)
        yield found[0], server, cpu_seconds(server)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
        process.stdout.close()
    if status:
        raise SystemExit(f"the service ended with status {status}")


def cpu_seconds(process: psutil.Process) -> float:
    """Of all threads of a process, up to now."""
    times = process.cpu_times()
    return float(times.user + times.system)


def images_per_batch(address: str) -> float:
    """By the service's own metrics, since its start."""
    with urllib.request.urlopen(f"{address}metrics") as answer:
        text = answer.read().decode()
    total, count = (
        float(re.findall(rf"^crescendo_batch_images_{part} (\S+)$", text, re.MULTILINE)[0])
        for part in ("sum", "count")
    )
    return total / max(count, 1)


def use(address: str, numbers: Iterator[int], until: float, load: Load) -> None:
    """What one user does until a moment of time."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
    while time.monotonic() < until:
        body = {"prompt": prompt(number := next(numbers)), "seed": number, "steps": 1}
        start = time.monotonic()
        try:
            connection.request(
                "POST",
                "/v1/images/generations",
                json.dumps({**body, "response_format": "b64_json"}),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            load.statuses[type(error).__name__] += 1
            connection.close()
            continue
        load.latencies.append(time.monotonic() - start)
        load.statuses[str(answer.status)] += 1
        if answer.status == 200:
            load.versions[str(json.loads(content)["version"])] += 1
    connection.close()


def loaded(
    address: str,
    server: psutil.Process,
    users: int,
    seconds: float,
    numbers: Iterator[int],
    moves: Sequence[tuple[Registry, Version]] = (),
) -> Load:
    """Load on a service, while the champion moves."""
    load, start, cpu = Load(), time.monotonic(), cpu_seconds(server)
    end = start + seconds
    threads = [threading.Thread(target=use, args=(address, numbers, end, load)) for _ in range(users)]
    for thread in threads:
        thread.start()
    due = [start + seconds * (number + 0.5) / len(moves) for number in range(len(moves))]
    while time.monotonic() < end:
        load.memory.append((time.monotonic() - start, server.memory_info().rss / 2**20))
        if load.moves < len(moves) and time.monotonic() >= due[load.moves]:
            registry, version = moves[load.moves]
            registry.set_alias(version, CHAMPION)
            load.moves += 1
        time.sleep(max(0.0, min(1.0, end - time.monotonic())))
    for thread in threads:
        thread.join()
    load.per_batch = images_per_batch(address)
    load.seconds, load.cpu_seconds = time.monotonic() - start, cpu_seconds(server) - cpu
    return load


def as_table(loads: Sequence[Load], generate: Sequence[Generated]) -> str:
    """What users saw, a column each load, beside what `generate` does."""
    columns = [figures(load, generate) for load in loads]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(["crescendo serve", *(f"{load.seconds:.0f} s" for load in loads)], rows)


def figures(load: Load, generate: Sequence[Generated]) -> dict[str, str]:
    """One column, by the names of its rows."""
    count = load.statuses["200"]
    rate, rate_cpu = count / load.seconds, count / load.cpu_seconds
    base, base_cpu = (
        statistics.mean(getattr(each, name) for each in generate) for name in ("rate", "rate_cpu")
    )
    batch = statistics.mean(each.batch for each in generate)
    cuts = statistics.quantiles(load.latencies, n=100, method="inclusive")
    memory = [mib for _, mib in load.memory]
    return {
        "requests answered, others": f"{count:,}, {sum(load.statuses.values()) - count}",
        "images a second": f"{significant(rate)}, {rate / base:.2f} of `generate`",
        "images a CPU second": f"{significant(rate_cpu)}, {rate_cpu / base_cpu:.2f} of `generate`",
        "p50, p95, longest": f"{cuts[49]:.2f}, {cuts[94]:.2f}, {max(load.latencies):.2f} s",
        "p95 over a batch of four": f"{cuts[94] / batch:.1f} ({batch:.2f} s)",
        "images a batch": f"{load.per_batch:.1f}",
        "MiB at first, at most, at last": f"{memory[0]:.0f}, {max(memory):.0f}, {memory[-1]:.0f}",
        "MiB a minute, second half": f"{slope(load.memory):+.2f}",
        "moves of the alias, answers by version": f"{load.moves}, {dict(sorted(load.versions.items()))}",
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=8, help="(8)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the load (600)")
    parser.add_argument("--moves", type=int, default=20, help="of the alias, five seconds apart (20)")
    parser.add_argument("--images", type=int, default=128, help="of `generate`, before and after (128)")
    parser.add_argument("--server-cores", help="such as 0,1; without, the machine's")
    parser.add_argument("--client-cores", help="of the load")
    args = parser.parse_args()
    if args.client_cores is not None:
        os.sched_setaffinity(0, [int(core) for core in args.client_cores.split(",")])
    numbers, generate = itertools.count(), []
    with copied_project(find_root()) as (root, versions):
        registry = Registry(root)
        folder = registry.fetch(versions[0], root / "model")
        moves = [(registry, versions[(number + 1) % 2]) for number in range(args.moves)]
        first = 10**4
        generate.append(generated(folder, first, args.images, args.server_cores))
        with served(root, None, args.server_cores) as (address, server, start):
            loads = [loaded(address, server, args.users, args.seconds, numbers)]
            if moves:
                loads.append(loaded(address, server, args.users, 5.0 * args.moves, numbers, moves))
        generate.append(generated(folder, 2 * first, args.images, args.server_cores))
    print(machine(["torch", "uvicorn"]))
    print(f"The service's start took {start:.1f} CPU seconds; {args.users} users.\n")
    print(as_table(loads, generate))
    statuses, moved = sum((load.statuses for load in loads), Counter[str]()), loads[-1].moves
    if set(statuses) != {"200"} or moved < args.moves:
        raise SystemExit(f"not every request was answered: {dict(statuses)}, {moved} moves")


if __name__ == "__main__":
    main()
