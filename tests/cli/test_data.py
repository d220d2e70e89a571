"""`crescendo data`: a dry run of prepare, and a contact sheet."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.errors import BadData, ConfigError
from tests.conftest import write_prepared


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def write_squares(folder: Path, count: int = 40) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")


def test_checking_data_says_what_prepare_would_do_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_squares(root / "mine/red cats")
    (root / "mine/red cats/07.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    before = sorted(root.rglob("*"))
    assert main.run(["data", "check", "mine"]) == 0
    out = capsys.readouterr().out
    assert "folder: 40 images, 39 usable, 1 to quarantine, 0 duplicates" in out
    assert "1 x E-IMG-00" in out and "mine/red cats/07.png" in out
    assert "prepare would write" in out and "1 captions" in out
    report = root / "reports/data_check.jsonl"
    assert set(root.rglob("*")) - set(before) <= {report.parent, report}
    assert "07.png" in report.read_text()


def test_checking_bad_data_ends_as_prepare_would(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_squares(root / "mine", 4)
    (root / "mine/broken.png").write_bytes(b"nothing")
    with pytest.raises(BadData, match="E-DAT-001 folder: 1 of 5 images are unusable"):
        main.run(["data", "check", "mine"])
    with pytest.raises(ConfigError, match="'nowhere' is neither there nor a known source"):
        main.run(["data", "check", "nowhere"])


def test_a_contact_sheet_shows_prepared_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prepared(root / "data/prepared")
    assert main.run(["data", "show", "--num", "9", "--split", "train", "--out", "sheet.png"]) == 0
    assert "wrote 9 of 16 images of train to sheet.png" in capsys.readouterr().out
    assert pixels("sheet.png").shape == (2 * (128 + 54) + 6, 8 * (128 + 6) + 6, 3)
    with pytest.raises(ConfigError, match="no PNG file"):
        main.run(["data", "show", "--out", "sheet.jpg"])
