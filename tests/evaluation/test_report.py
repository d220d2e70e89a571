"""The page shows what was measured, as one file that needs nothing else, in every window."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.params import Params, TrainingSpread
from pipeline.evaluation import pictures, report, wording
from pipeline.evaluation.entry import Champion
from pipeline.evaluation.judging import add_training_spread
from pipeline.evaluation.verdict import Baseline, PassVerdict, Rule, Verdict, combine, fewest_passed
from tests.evaluation.browser import AUDIT, CHROMIUM, Browser, open_browser
from tests.evaluation.evidence import CANDIDATE
from tests.evaluation.reports import Made, make


@pytest.fixture(scope="module")
def made(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report") / "data", tiny_params)


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    report.write(folder, *made.arguments())
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_folder_holds_the_page_and_the_pictures_that_dvc_plots(folder: Path) -> None:
    names = {"heldout_captions.png", "train_captions.png", "neighbours.png", "quality.png"}
    assert {path.name for path in folder.iterdir()} == names | {"index.html"}


@pytest.mark.slow
def test_equal_results_give_equal_bytes(made: Made, folder: Path, tmp_path: Path) -> None:
    report.write(tmp_path, *made.arguments())
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    for reference in re.findall(r'\b(?:src|href)="([^"]*)"', page):
        assert reference.startswith(("data:", "#")), reference
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page
    assert len(page) < 3_000_000


def test_hostile_captions_stay_text(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{7*7}}" in page, "nothing in a caption is evaluated"
    assert page.count("<style") == 1 + 2, "its own, and those of the charts"
    assert "&lt;b&gt;of&lt;/b&gt;" in page, "reasons are escaped, too"


def test_every_number_has_its_name_explained_and_its_evidence_named(made: Made, page: str) -> None:
    keys = {key for row in made.results.tables["heldout"].values() for key in row}
    assert keys <= set(wording.METRICS)
    for name, meaning, _ in wording.METRICS.values():
        assert f"<dt>{name}</dt>" in page
        assert meaning.endswith((".", "?"))
    kinds = {
        wording.split_rule(rule.name)[0] for each in made.results.verdict.verdicts for rule in each.rules
    }
    assert kinds <= set(wording.RULES)
    kid = made.results.tables["train"]["refined_1"]["kid"]
    assert wording.number(kid.value) in page
    assert f"{kid.families} families" in page
    for digest in "abcd":
        assert digest * 64 in page
    assert "no setting at the cost of 1 pass:" in page
    assert "needs two groups" in page, "the reason of the missing extractor"
    assert "evaluate.max_calls allows 60 images" in page


def test_too_few_images_give_reasons_and_no_numbers(tiny_params: Params, tmp_path: Path) -> None:
    made = make(tmp_path / "data", tiny_params, families=7)
    report.write(tmp_path, *made.arguments())
    page = (tmp_path / "index.html").read_text()
    assert "too few images: 14, needs 50" in page
    assert "too few images to measure" in page, "in the chart"
    assert "which takes the fewest, as no distance to real images could be measured" in page
    assert "How to decide what is undecided" in page


def test_few_families_give_values_without_intervals_and_say_so(tiny_params: Params, tmp_path: Path) -> None:
    made = make(tmp_path / "data", tiny_params, families=15)
    row = made.results.tables["train"][CANDIDATE]
    assert (row["caption_rank"].low, row["caption_rank"].families) == (None, 15)
    report.write(tmp_path, *made.arguments())
    page = (tmp_path / "index.html").read_text()
    assert "<small>15 families, an interval needs 20</small>" in page
    assert 'data-label="reason"><span>15 families, an interval needs 20</span>' in page


@pytest.mark.slow
def test_a_champion_is_shown_as_the_baseline_that_it_is(tiny_params: Params, tmp_path: Path) -> None:
    champion = Champion(tmp_path, "models:/emoji/3", 2)
    made = make(tmp_path / "data", tiny_params, champion=champion)
    report.write(tmp_path, *made.arguments())
    page = (tmp_path / "index.html").read_text()
    assert "models:/emoji/3" in page
    table = page.partition('aria-label="Quality and cost of every model"')[2].partition("</table>")[0]
    assert re.findall(r"</span>([^<]*)", table.partition("<tbody>")[2])[-1] == "champion"
    assert "It is compared with the present champion" in page.partition("<nav")[0]
    assert (
        "champion" in made.results.contenders
        and "champion" in page.partition("<svg")[2].partition("</svg>")[0]
    )


@pytest.mark.slow
def test_the_page_says_how_much_of_a_number_is_training(
    made: Made, tiny_params: Params, tmp_path: Path
) -> None:
    report.write(tmp_path, *made.arguments())
    assert "has not been measured (<code>make evaluate-seeds</code>)" in (tmp_path / "index.html").read_text()
    passes = [each.passes for each in made.results.verdict.verdicts]
    spread = TrainingSpread(rule="sharpness", half_widths=(0.1234,) * len(passes))
    section = tiny_params.evaluate.model_copy(
        update={"num_passes": tuple(passes), "training_spread": (spread,)}
    )
    verdicts = tuple(add_training_spread(each, section) for each in made.results.verdict.verdicts)
    whole = replace(made.results.verdict, verdicts=verdicts)
    report.write(tmp_path, *replace(made, results=replace(made.results, verdict=whole)).arguments())
    page = (tmp_path / "index.html").read_text()
    assert page.count("\u00b1 0.123 over training") == len(passes)
    assert (
        "how far from their mean 95% of such models are expected" in page
        and "has not been measured" not in page
    )


@pytest.mark.slow
def test_without_a_qualified_extractor_the_page_says_so(made: Made, tmp_path: Path) -> None:
    evidence = made.comparison.evidence
    about = replace(evidence.description, extractors=[], margins={}, heldout_margins={}, floors={})
    comparison = replace(made.comparison, evidence=replace(evidence, description=about))
    results = replace(made.results, reference={}, margins={"train": {}, "heldout": {}}, floors={})
    changed = replace(made, comparison=comparison, results=results)
    report.write(tmp_path, *changed.arguments())
    assert "No feature extractor qualified" in (tmp_path / "index.html").read_text()


# --- Words.


def verdict(*verdicts: PassVerdict) -> Verdict:
    template = dict.fromkeys(("data_digest", "model_digest", "evidence_digest"), "0" * 64)
    return Verdict(
        **template,
        baseline=Baseline("models/finetuned", "0" * 64),
        is_refined=True,
        verdicts=verdicts,
        default_passes=fewest_passed(verdicts),
    )


def judged(passes: int, *rules: Rule) -> PassVerdict:
    return PassVerdict(passes, passes + 1, combine(rule.outcome for rule in rules), rules)


def test_the_headline_says_what_was_decided_and_why() -> None:
    good = Rule("kid_randconv", "passed", reason="better than the baseline")
    bad = [
        Rule(name, "failed", reason="worse") for name in ("kid_randconv", "kid_lite2", "sharpness", "copies")
    ]
    near = Rule(
        "recall", "undecided", 0.9, 0.8, 1.0, 0.85, None, 190, "undecided: 190 families, about 760 needed"
    )
    far = Rule(
        "coverage", "undecided", 0.9, 0.8, 1.0, 0.6, None, 190, "undecided: 190 families, about 22 needed"
    )
    passed = verdict(judged(1, *bad), judged(2, good), judged(4, good))
    assert wording.headline(passed) == "Passed with 2 passes: better than the fine-tuned model"
    failed = verdict(judged(1, *bad), judged(2, bad[0]), judged(4, bad[0]))
    assert wording.headline(failed) == (
        "Not promoted: with 1 pass it fails on quality, sharpness and 1 more rule; "
        "with 2 or 4 passes it fails on quality"
    )
    unrefined = replace(verdict(judged(11, good)), is_refined=False)
    assert wording.headline(unrefined) == (
        "Passed: the fine-tuned model in 12 calls; refinement gained nothing"
    )
    refused = replace(verdict(judged(11, *bad)), is_refined=False)
    assert wording.headline(refused) == (
        "Not promoted: the fine-tuned model in 12 calls: it fails on quality, sharpness and 1 more rule; "
        "refinement gained nothing"
    )
    in_its_place = replace(unrefined, refused=(judged(1, *bad), judged(2, bad[0])))
    assert wording.headline(in_its_place) == (
        "Passed: the fine-tuned model in 12 calls; the refined model did not pass"
    )
    assert wording.by_passes(in_its_place.refused) == (
        "with 1 pass it fails on quality, sharpness and 1 more rule; with 2 passes it fails on quality"
    )
    undecided = verdict(judged(1, far, near, good))
    assert wording.headline(undecided) == (
        "Not promoted: with 1 pass undecided on coverage and recall (190 families, about 760 needed)"
    )


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("refined_1", "refined, 1 pass"),
        ("refined_4", "refined, 4 passes"),
        ("equal_cost_2", "fine-tuned, cost of 2 passes"),
        ("eight_calls", "fine-tuned, at most 8 calls"),
        ("finetuned", "fine-tuned, default"),
        ("champion", "champion"),
        ("real", "real images"),
    ],
)
def test_contenders_have_titles_for_people(name: str, title: str) -> None:
    assert wording.title_of(name) == title


def test_numbers_are_short() -> None:
    assert wording.number(-0.01234) == "−0.0123"
    assert wording.number(188_997.2) == "188,997"
    assert wording.number(0.1234, share=True) == "12.3%"
    assert wording.number(None) == "–"
    assert [wording.duration(value) for value in (0.0014, 0.1071, 0.9996, 12.3)] == [
        "1.4 ms",
        "107 ms",
        "1 s",
        "12 s",
    ]
    assert [wording.with_prefix(value) for value in (950, 41_200_000, 6.76e9)] == ["950", "41.2 M", "6.76 G"]


def test_the_drawing_of_a_rule_shows_interval_threshold_and_good_side() -> None:
    low = report.bar_of(Rule("kid_randconv", "undecided", 1.0, 0.0, 3.0, 2.0))
    assert low is not None
    assert low.low < low.value < low.threshold < low.low + low.width <= 100
    assert (low.good_from, low.good_width) == (0.0, low.threshold)
    high = report.bar_of(Rule("recall", "failed", 1.0, 0.5, 1.5, 2.0))
    assert high is not None
    assert high.good_from == high.threshold > high.low + high.width
    equal = report.bar_of(Rule("recall", "passed", 1.0, 1.0, 1.0, 1.0))
    assert equal is not None
    assert equal.width == 0
    assert report.bar_of(Rule("finite", "passed", 1.0, threshold=1.0)) is None


@pytest.mark.parametrize("resolution", [8, 64, 512])
def test_pictures_are_exact_up_to_their_largest_size(resolution: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, resolution, resolution), generator=generator, dtype=torch.uint8)
    shown = pictures.picture(image, "a cat", "refined")
    assert shown.alt == "refined: a cat"
    with Image.open(io.BytesIO(base64.b64decode(shown.source.partition(",")[2]))) as opened:
        assert opened.width == min(resolution, pictures.MAX_PX)
        if resolution <= pictures.MAX_PX:
            np.testing.assert_array_equal(np.asarray(opened), image.permute(1, 2, 0).numpy())


# --- In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the path")
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


OPEN_ALL = "document.querySelectorAll('details').forEach(each => each.open = true)"
WIDTHS = "[innerWidth, document.documentElement.scrollWidth]"
BROKEN = "[...document.images].filter(each => !each.complete || !each.naturalWidth).length"
NAMELESS = "[...document.images].filter(each => !each.alt).length"
SHOWN = "['.wide', '.narrow'].map(each => getComputedStyle(document.querySelector('.chart ' + each)).display)"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_its_window_asks_for_nothing_and_has_no_error(
    browser: Browser, folder: Path, width: int, scheme: str
) -> None:
    steps = [OPEN_ALL, WIDTHS, BROKEN, NAMELESS, SHOWN, AUDIT]
    visit = browser.visit(folder / "index.html", width, scheme, steps)
    _, (inner, needed), broken, nameless, shown, faults = visit.values
    assert inner == width
    assert needed <= inner
    assert broken == nameless == 0 and faults == []
    assert shown == (["none", "block"] if width == 400 else ["block", "none"])
    outside = [url for url in visit.requests if not url.startswith("data:")]
    assert outside == [(folder / "index.html").resolve().as_uri()]
    assert visit.problems == []


@pytest.mark.slow
def test_text_contrasts_with_its_background_in_both_schemes(browser: Browser, folder: Path) -> None:
    expression = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    for scheme in ("light", "dark"):
        (colours,) = browser.visit(folder / "index.html", 1280, scheme, [expression]).values
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
        assert abs(ink - paper) > 180
        assert (ink < paper) == (scheme == "light")
