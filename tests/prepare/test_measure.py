"""Numbers of a picture against hand-made ones, and near duplicates against all pairs."""

import numpy as np
import pytest
from PIL import Image

from pipeline.prepare.framing import DecodedImage
from pipeline.prepare.measure import measure, near_duplicates


def measured(pixels: np.ndarray):
    (found,) = measure([DecodedImage(pixels.astype(np.uint8), 100, 50, "RGB")])
    return found


def test_a_blank_picture_has_no_entropy_and_no_edges() -> None:
    found = measured(np.full((32, 32, 3), 200))
    assert (found.mean, found.std, found.entropy, found.sharpness) == (200.0, 0.0, 0.0, 0.0)
    assert (found.width, found.height, found.mode) == (100, 50, "RGB")


def test_blank_pictures_hash_to_their_mean_alone() -> None:
    assert {measured(np.full((48, 48, 3), level)).phash for level in range(1, 256)} == {"8000000000000000"}
    assert measured(np.zeros((48, 48, 3))).phash == "0" * 16


@pytest.mark.parametrize("side", [24, 64, 300])
def test_numbers_do_not_depend_on_company_nor_on_how_the_pixels_lie(side: int) -> None:
    draw = np.random.default_rng(side)
    planes = draw.integers(0, 256, (13, 3, side, side), dtype=np.uint8)
    pictures = [DecodedImage(own.transpose(1, 2, 0), side, side, "RGB") for own in planes]
    together = measure(pictures)
    assert together == [measure([picture._replace(pixels=picture.pixels.copy())])[0] for picture in pictures]
    assert [(one.mean, one.std) for one in together] == [
        (round(float(own.mean()), 4), round(float(own.std()), 4)) for own in planes.astype(np.float64)
    ]
    assert measure([]) == []


def test_entropy_counts_grey_levels_in_bits() -> None:
    halves = np.zeros((32, 32, 3))
    halves[:, 16:] = 255
    assert measured(halves).entropy == 1.0
    ramp = np.arange(256).repeat(4).reshape(32, 32)[..., None].repeat(3, 2)
    assert measured(ramp).entropy == 8.0


def test_sharpness_falls_when_a_picture_is_blurred() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(float)
    blurred = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, (1, 1), (0, 1))) / 4
    assert measured(blurred).sharpness < measured(noise).sharpness / 3


def test_equal_pixels_have_equal_digests_and_near_ones_near_hashes() -> None:
    draw = np.random.default_rng(1)
    first, second = (draw.integers(30, 226, (10, 10, 3), dtype=np.uint8) for _ in range(2))
    smooth, another = (np.asarray(Image.fromarray(p).resize((32, 32)), int) for p in (first, second))
    a, b, other = measured(smooth), measured(smooth + draw.integers(-1, 2, smooth.shape)), measured(another)
    assert a.pixels == measured(smooth).pixels != b.pixels
    distance = (int(a.phash, 16) ^ int(b.phash, 16)).bit_count()
    assert distance <= 3 < (int(a.phash, 16) ^ int(other.phash, 16)).bit_count()


@pytest.mark.parametrize("most", [0, 1, 3])
def test_near_duplicates_are_those_that_comparing_all_pairs_finds(most: int) -> None:
    draw = np.random.default_rng(most)
    values = [int(v) for v in draw.integers(0, 2**63, 60)]
    for i in range(60):
        flips = draw.choice(64, draw.integers(0, 5), replace=False)
        values.append(values[i] ^ sum(1 << int(bit) for bit in flips))
    draw.shuffle(values)
    expected = [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= most
    ]
    assert near_duplicates([f"{v:016x}" for v in values], most).tolist() == list(map(list, expected))
    assert expected


def test_no_and_one_hash_have_no_near_duplicates() -> None:
    assert near_duplicates([]).tolist() == near_duplicates(["0" * 16]).tolist() == []
