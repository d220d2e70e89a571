"""The model card: what it says, and what it says it does not know."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.evaluation.verdict import Verdict
from pipeline.models.snapshot import read_config
from pipeline.registry import card
from pipeline.registry.card import Subject, write_card
from pipeline.registry.packaging import defaults

HOSTILE = "<img src=x onerror=alert(1)> | `a` [x](javascript:alert(1)) \x1b[31m &lt; *b*"
META = {
    "source": "folder of <b>mine</b>",
    "licence": None,
    "subset": [],
    "counts": {"train": 1234, "val": 5, "test": 6, "n_in": 1250, "n_duplicate": 3, "n_quarantined": 2},
    "validation": {"success": True, "warnings": ["few images"]},
}
KID = {"value": 0.21894, "low": 0.131, "high": 0.33, "families": 182, "n": 196}
SHARE = {"value": 0.0255, "low": 0.0, "high": 0.0625}


def subject_of(root: Path, verdict: Verdict) -> Subject:
    config = read_config(root / "models/refined/config.json")
    lineage = {"model": {"folder": "models/refined"}, "commit": None, "files": {}, "stages": []}
    return Subject("a_name", root / "models/refined", config, verdict, lineage, defaults(config, 2))


def test_a_card_says_what_is_known_and_captions_stay_text(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with artifacts.commit_directory(root / "data/prepared", META):
        pass
    with artifacts.commit_directory(root / "reports/evaluation") as folder:
        (folder / "evidence.safetensors").write_text("evidence")
        tables = {"refined_1": {"kid": KID, "alike": SHARE}, "real": {"alike": {"value": 0.0}}}
        fd = {"value": None, "reason": "fd: n=176, needs 200"}
        heldout = {"refined_1": {"kid": {"value": 0.5}, "fd": fd}}
        (folder / "metrics.json").write_text(json.dumps({"train": tables, "heldout": heldout}))
    verdict = replace(
        Verdict.read(root / "reports/verdict.json"),
        data_digest=artifacts.directory_digest(root / "data/prepared"),
        evidence_digest=artifacts.sha256_file(root / "reports/evaluation/evidence.safetensors"),
    )
    monkeypatch.setattr(card, "heldout_captions", lambda *_: [HOSTILE, "cat"])
    write_card(root / "card", root, subject_of(root, verdict))
    text, page = ((root / "card" / name).read_text() for name in ("README.md", "card.html"))
    for words in (
        "1,234 for training",
        "**not known**",
        "| KID | 0.219 [0.131,\u00a00.33] | 0.5 |",
        "too few images: 176, needs 200",
        "| alike | 2.5% [0.0%,\u00a06.2%] |",
        "**Verdict: passed**",
        "| `steps` | integer | 2 |",
        '"data": [["cat"]]',
    ):
        assert words in text, words
    assert (
        "\x1b" not in text and "onerror=alert" in page and "<img src=x" not in page and "<b>mine" not in page
    )
    assert not re.search(r"(src|href)=\"(?!data:)", page) and page.count("data:image/png;base64,") == 2
    assert Image.open(root / "card/samples/2.png").size == (4 * 34 + 2, 36)


def test_what_is_of_another_evaluation_is_left_out(root: Path) -> None:
    write_card(root / "card", root, subject_of(root, Verdict.read(root / "reports/verdict.json")))
    text = (root / "card/README.md").read_text()
    assert "its source, licence and size are not known" in text and "*no caption*" in text
    assert (
        "The report of its evaluation was not at hand" in text and "| recall | passed | 0.5 | 0.9 |" in text
    )
