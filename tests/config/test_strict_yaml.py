"""Reading YAML: what is not plain YAML 1.2 is refused in one line."""

import re

import pytest

from pipeline.config.params import load_params
from pipeline.errors import ConfigError, InputMissing
from tests.conftest import ROOT

TEXT = (ROOT / "params.yaml").read_text()


def with_line(key, value):
    """The text of params.yaml with the first value of `key` replaced."""
    return re.sub(rf"\b{key}: \S+", f"{key}: {value}", TEXT, count=1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 0\nseed: 1\n", "duplicate key"),
        ("a: [1\n", "E-CFG-005 params.yaml: line "),
        ("\tseed: 0\n", "E-CFG-005 params.yaml: line 1"),
        ("- 1\n- 2\n", "holds a list"),
        ("", "missing key"),
        ("just words", "holds a str"),
        ("seed: !!python/object/apply:os.system ['true']\n", "E-CFG-005"),
        ("a: " + "[" * 3000 + "]" * 3000, "E-CFG-"),
        ("x: '" + "y" * 70_000 + "'", "has 70"),
        ("seed: \xff", "E-CFG-005"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
         "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
         "e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "more than 10000 values"),
    ],
    ids=["twice", "open", "tab", "list", "empty", "text", "tag", "deep", "large", "latin1", "aliases"],
)  # fmt: skip
def test_a_file_that_is_not_plain_yaml_is_refused_in_one_line(tmp_path, text, words) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_numbers_and_words_are_read_by_the_rules_of_yaml_1_2(tmp_path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(with_line("lr", "1e-4"))
    assert load_params(path).pretrain.lr == 1e-4
    path.write_text(with_line("seed", "no"))
    with pytest.raises(ConfigError, match="seed: 'no' is not valid"):
        load_params(path)
    path.write_text(with_line("seed", "017"))
    assert load_params(path).seed == 17


def test_a_missing_file_is_input_missing(tmp_path) -> None:
    with pytest.raises(InputMissing):
        load_params(tmp_path / "params.yaml")
