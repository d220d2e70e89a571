"""Extractors that order damage qualify; blind, crude and reversed ones do not, with the reason."""

import dataclasses

import pytest
import torch

from pipeline.evaluation import qualification
from pipeline.evaluation.features import Extractor, Whitening, randconv
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.qualification import Qualification, find_disorder, qualify
from tests.evaluation.test_features import drawings


def qualified(extractor: Extractor, held_out: int = 64, resolution: int = 32) -> Qualification:
    train, real = drawings(200, 0, resolution), drawings(held_out, 1, resolution)
    raw = extractor(train)
    whitening = Whitening.fit(raw)
    families = [f"train {i}" for i in range(len(train))]
    return qualify(
        extractor, whitening, whitening(raw), families, real, [f"test {i}" for i in range(held_out)]
    )


def test_randconv_qualifies_and_the_table_holds_all_cases() -> None:
    result = qualified(randconv(32))
    assert result.qualified, result.reason
    assert result.reason == ""
    cases = [case for case, _ in result.table]
    assert cases[0] == "real" and cases[-1] == "pure noise" and len(cases) == 6
    assert all(metric.n == 64 and metric.low is not None for _, metric in result.table)
    assert result == qualified(randconv(32)), "it repeats"


def test_an_extractor_that_sees_only_mean_colour_does_not_qualify() -> None:
    blind = Extractor("blind", "0" * 64, False, lambda images: images.mean((2, 3)), dim=3)
    result = qualified(blind)
    assert not result.qualified
    assert result.reason.startswith("KID of blur 0.7 px ")
    assert " is not clear of real " in result.reason


def test_too_few_images_do_not_qualify() -> None:
    assert qualified(randconv(32), held_out=20).reason == "kid: n=20, needs 50"


def test_more_images_than_the_limit_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualification, "MAX_IMAGES", 60)
    seen: list[int] = []

    def embed(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images.flatten(1)[:, :8]

    result = qualified(dataclasses.replace(randconv(32), embed=embed), held_out=90)
    assert all(metric.n == 60 for _, metric in result.table)


def ladder(**changes: float) -> dict[str, Metric]:
    values = dict.fromkeys(("real", "pure noise"), 0.0) | {"pure noise": 9.0}
    values |= {"blur 0.7 px": 1.0, "blur 2 px": 2.0, "noise 16 levels": 1.0, "noise 64 levels": 2.0}
    values |= {key.replace("_", " "): value for key, value in changes.items()}
    return {case: Metric(value, 60, value - 0.4, value + 0.4) for case, value in values.items()}


def test_every_step_has_to_go_up_clearly() -> None:
    assert find_disorder(ladder()) == ""
    assert find_disorder(ladder(noise_64_levels=1.5)) == (
        "KID of noise 64 levels 1.5 [1.1, 1.9] is not clear of noise 16 levels 1 [0.6, 1.4]"
    )
    assert find_disorder(ladder(pure_noise=1.0)).startswith(
        "KID of pure noise 1 [0.6, 1.4] is not clear of blur 2"
    )
