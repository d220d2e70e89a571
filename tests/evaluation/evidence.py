"""Evidence of random numbers, with models of known faults."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipeline.evaluation.evidence import Conditions, Description, Evidence, Measured, Reference

DIM = 8
BASELINE, CANDIDATE = "finetuned", "refined_1"


def images(rng: np.random.Generator, n: int, shift: float = 0.0) -> Measured:
    """N images like real ones; `shift` moves their features."""
    return Measured(
        features={"randconv": rng.standard_normal((n, DIM)) + shift},
        power=rng.uniform(90, 110, n),
        caption_rank=rng.uniform(0.8, 1.0, n),
        rho=rng.uniform(0.4, 1.0, n),
        distance=rng.uniform(20, 40, n),
    )


def evidence(
    families: int = 120, candidate: Mapping[str, Measured] | None = None, seed: int = 0, **changes: object
) -> Evidence:
    """Two images per family; the candidate is as good as the baseline where none is given (by caption set).
    `changes` are those of the description."""
    rng = np.random.default_rng(seed)
    n = 2 * families
    conditions, measured = {}, {}
    for split in ("train", "heldout"):
        of = np.repeat(np.arange(families), 2)
        real = {"randconv": rng.standard_normal((n, DIM))}
        conditions[split] = Conditions(of, of % 3, rng.uniform(90, 110, n), real, of)
        measured[split] = {name: images(rng, n) for name in (BASELINE, CANDIDATE, "equal_cost_1")}
        if candidate and split in candidate:
            measured[split][CANDIDATE] = candidate[split]
    about = Description(
        seed=0,
        extractors=["randconv"],
        margins={"randconv": 0.1},
        heldout_margins={"randconv": 0.2},
        floors={"train/randconv": 0.02},
        candidates={1: CANDIDATE},
        equal_cost={1: "equal_cost_1"},
        baseline=BASELINE,
        nfe={CANDIDATE: 2},
        multiply_adds={CANDIDATE: 100},
    )
    reference = Reference(
        rng.uniform(0.4, 1.0, n), np.repeat(np.arange(families), 2), np.repeat(np.arange(families), 2) % 3
    )
    return Evidence(replace(about, **changes), conditions, measured, reference)  # type: ignore[arg-type]
