"""A node of a cluster is lost while a stage trains on it, and comes back: fewer workers go on, then all of them.

The cluster is a head and two nodes of one core on this machine. A client submits the stage to it as a job, as users
do; it is compared with one that was trained in a process of its own, bit by bit and point by point.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos.kills import ForkedAttempt, tiny_project
from benchmarks.chaos.ray_cluster import ray_head, ray_node, worker
from benchmarks.chaos.results import Findings
from benchmarks.chaos.stores import Store
from pipeline.config.strict_yaml import read_yaml
from pipeline.drill.killing import Attempt
from pipeline.drill.receipt import differences, named
from pipeline.drill.scratch import Scratch, make_scratch
from pipeline.launch.session import require_token
from pipeline.rng import key
from pipeline.training.records import NOTICES, read_records

STAGE = "pretrain"
# Of the stage: as long as it takes Ray to count its nodes anew twice, which it does once a minute.
IMAGES, CHECKPOINT, LOG = 96_000, 1_600, 800
PATIENCE = 300.0  # s, for a change of the number of workers
PROFILE = "workers: [1, 2]\nmax_failures: -1\naddress: {url}\nstorage: {storage}\n"


def lose_a_node(seed: int, folder: Path, _: Store) -> Findings:
    """Lose one of two nodes at a random moment of a run, and start it again at another."""
    require_token()
    draw = random.Random(key(seed, "chaos-nodes"))
    project = tiny_project(folder.parent)
    params = read_yaml(project / "params.yaml")
    length = {
        "num_images": IMAGES,
        "checkpoint_images": CHECKPOINT,
        "log_images": LOG,
        "sample_images": IMAGES,
    }
    params[STAGE] = {**params[STAGE], **length}
    params["evaluate"] = {**params["evaluate"], "watch_images": {STAGE: 0, "finetune": 0, "refine": 0}}
    quiet = ForkedAttempt(Scratch(folder / "quiet", STAGE, "process"), False)
    lost = Attempt(Scratch(folder / "lost", STAGE, "nodes"), True)
    for attempt in (quiet, lost):
        make_scratch(attempt.scratch, project, params)
    quiet.finish()
    found = Findings()
    with ExitStack() as stack:
        home, url, address = stack.enter_context(ray_head())
        nodes = [stack.enter_context(ray_node(home / name, worker(address, 1))) for name in ("one", "two")]
        (lost.scratch.folder / "infra").unlink()
        profile = lost.scratch.folder / "infra/compute/nodes.yaml"
        profile.parent.mkdir(parents=True)
        profile.write_text(PROFILE.format(url=url, storage=lost.scratch.folder))
        stack.callback(lost.end)
        lost.start()
        image = draw.randint(1, IMAGES // 10)
        lost.wait_until(lambda: lost.image() >= image)
        time.sleep(draw.random())
        changed = time.monotonic()
        os.killpg(nodes.pop(draw.randrange(2)).pid, signal.SIGKILL)
        found.require(awaited(lost, "1 of 2 workers train"), "nobody trains on after a node is lost")
        found.counts["s to train on without it"] += round(time.monotonic() - changed)
        time.sleep(10 * draw.random())
        changed = time.monotonic()
        nodes.append(stack.enter_context(ray_node(home / "again", worker(address, 1))))
        found.require(awaited(lost, "2 of 2 workers train"), "a node that came back is not taken in")
        found.counts["s to train on with it"] += round(time.monotonic() - changed)
        lost.finish()
        compared = differences(quiet.scratch, lost.scratch)
    for name in ("differing", "missing", "extra", "repeated", "logged_otherwise"):
        found.require(not compared[name], f"seed {seed}: {name} {named(compared[name])}")
    found.require(compared["runs"] == ["FINISHED"], f"seed {seed}: runs {compared['runs']}")
    found.counts += Counter(
        {"nodes lost and back": 1, "points": compared["points"], "files": compared["files"]}
    )
    return found


def awaited(attempt: Attempt, words: str) -> bool:
    """Wait for a notice of the stage, for PATIENCE and as long as it runs; whether it came."""
    deadline = time.monotonic() + PATIENCE
    attempt.wait_until(lambda: said(attempt, words) or time.monotonic() > deadline)
    return said(attempt, words)


def said(attempt: Attempt, words: str) -> bool:
    """Whether there is a notice of the stage with these words."""
    run_dir = attempt.scratch.run_dir()
    return run_dir is not None and any(words in record["text"] for record in read_records(run_dir / NOTICES))
