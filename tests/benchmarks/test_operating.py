"""At the size of the demo the gate fails no good model and every bad one: real drawings, a teacher made of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import operating
from benchmarks.planted import BAD, BASELINE, GOOD, MORE_CALLS, OTHER_SEEDS, Pool, build_pool, draw_evidence
from pipeline.config.params import load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import damage
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.evaluate import margins_of
from pipeline.evaluation.features import randconv
from pipeline.evaluation.judging import thresholds_of
from pipeline.prepare.framing import Framing
from pipeline.prepare.sources.openmoji import OpenMoji
from tests.conftest import write_dataset

ROOT = Path(__file__).resolve().parents[2]
PROMOTION = load_params(ROOT / "params.yaml").promotion
RESOLUTION = 64
TRAIN, TEST = 200, 75  # families to draw from
DRAWN = 182, 65  # families of the demo
DRAWS = 4
RULES = {  # that must find a fault
    "blurred, 1 px": "sharpness",
    "over-sharpened": "sharpness",
    "dithered": "kid_randconv",
    "half of the families missing": "recall",
    "captions shuffled": "captions",
    "one image for all": "coverage",
    "20% copies, noised": "copies",
    "20% copies, shifted": "copies",
    "20% copies, blurred": "copies",
    "worse at equal cost": "equal_cost_randconv",
    "worse than the champion": "kid_randconv",
}


def drawings(count: int) -> tuple[list[str], Tensor]:
    """Subgroups and images uint8 [count,3,R,R] of one drawing of each of `count` families, at random."""
    source = OpenMoji("17.0.0", Framing(RESOLUTION, "crop", (255, 255, 255)))
    first = {item.family: item for item in reversed(source.listing().items)}
    items = sorted(first.values(), key=lambda item: item.id)
    chosen = [items[i] for i in np.random.default_rng(0).permutation(len(items))[:count]]
    pixels = [source.decode(source.read(item), item.where).pixels for item in chosen]
    return [item.subgroup for item in chosen], torch.from_numpy(np.stack(pixels)).permute(
        0, 3, 1, 2
    ).contiguous()


def as_teacher(images: Tensor, seed: int) -> Tensor:
    """Real images as an imperfect model might draw them: a little soft, with some noise of its own."""
    soft = (0.95 * images.float() + 0.05 * damage.blur(images, 1.0).float()).round().to(torch.uint8)
    return damage.add_noise(soft, 5, seed)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Measurements of drawings; their captions' vectors are projections of the drawings themselves."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("operating") / "prepared"
    groups, images = drawings(TRAIN + TEST)
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1).numpy()
    vectors = (small - small.mean(0)) @ np.random.default_rng(0).standard_normal((small.shape[1], 64)) / 1000
    rows = [
        {
            "id": str(i),
            "split": "train" if i < TRAIN else "test",
            "base": f"{i:04d}",
            "group": group,
            "subgroup": group,
            "captions": [i],
        }
        for i, group in enumerate(groups)
    ]
    stacked = np.repeat(vectors[:, None].astype(np.float16), 3, 1)
    write_dataset(path, images.numpy(), rows, [f"drawing {i}" for i in range(len(images))], stacked, 32)

    def draw(captions: CaptionSet) -> Mapping[str, Tensor]:
        names = (BASELINE, OTHER_SEEDS, MORE_CALLS)
        return {name: as_teacher(captions.images, seed) for seed, name in enumerate(names)}

    dataset = PreparedDataset(path)
    return build_pool(dataset, [randconv(RESOLUTION)], draw, margins_of(PROMOTION), log=lambda line: None)


@pytest.mark.slow
def test_good_models_do_not_fail_and_bad_ones_do_for_the_right_reason(pool: Pool) -> None:
    thresholds = thresholds_of(PROMOTION)
    results = operating.characterise(pool, thresholds, *DRAWN, draws=DRAWS)
    assert set(results) == {*GOOD, *BAD} == {*GOOD, *RULES}
    print(operating.as_table(results))
    for name in GOOD:
        assert results[name].outcomes["failed"] == 0, (name, results[name])
    for name, rule in RULES.items():
        assert results[name].outcomes["failed"] == DRAWS, (name, results[name])
        assert results[name].failed[rule] == DRAWS, (name, results[name])
    assert set(results["worse at equal cost"].failed) == {"equal_cost_randconv"}, "as good as the baseline"


def test_a_draw_holds_the_families_that_were_asked_for(pool: Pool) -> None:
    evidence = draw_evidence(pool, 100, 30, np.random.default_rng(1))
    assert len(np.unique(evidence.conditions["train"].families)) == 100
    assert len(np.unique(evidence.conditions["train"].real_families)) == 100
    assert len(np.unique(evidence.conditions["heldout"].families)) == 30
    assert len(np.unique(evidence.reference.families)) == 100
    for case in (*GOOD.values(), *BAD.values()):
        assert {case.images, case.equal_cost, case.baseline} <= set(evidence.measured["train"])
    copied = evidence.measured["heldout"]["20% copies, shifted"]
    base = evidence.measured["heldout"][OTHER_SEEDS]
    assert (copied.rho != base.rho).sum() == round(0.2 * 30)
    assert (copied.rho < 1 / 3).sum() >= round(0.2 * 30) - 1
    assert evidence.measured["train"]["20% copies, shifted"] is evidence.measured["train"][OTHER_SEEDS]
