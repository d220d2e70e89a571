"""Requests to registered models: what is of a wrong type is refused before MLflow makes text of it."""

from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.inference.requests import check_request

CAT: dict[str, Any] = {"inputs": {"prompt": ["cat"]}}


@pytest.mark.parametrize(
    "request_",
    [
        CAT,
        {"inputs": ["cat"]},
        {"inputs": {"prompt": "cat"}, "params": None},
        {"instances": [{"prompt": "cat"}, "dog"]},
        {"dataframe_split": {"columns": ["x", "prompt"], "data": [[3, "cat"]]}},
        {"dataframe_records": [{"prompt": "cat", "x": 3}]},
        {"prompt": "cat", "steps": 2},
        {**CAT, "params": {"seed": 10**30, "guidance": 1, "steps": None}},
        # What MLflow refuses itself, or has no prompt.
        {"inputs": {"text": [3]}}, {"inputs": "cat"}, {"dataframe_split": {"data": [[3]]}}, {}, [], 3, None,
    ],
)  # fmt: skip
def test_what_has_text_for_prompts_and_numbers_for_params_is_passed_on(request_: Any) -> None:
    check_request(request_)


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        *(
            ({"inputs": {"prompt": value}}, "E-CFG-071 prompt: ")
            for value in (3, [3], None, [None], [["a", "b"], ["c"]], [["a"]], {"a": 1}, [True], ["cat", 1.5])
        ),
        ({"inputs": ["cat", 3]}, "E-CFG-071 prompt: 3 in row 1 is no text"),
        ({"instances": [{"prompt": 3}]}, "E-CFG-071 prompt: 3 in row 0"),
        ({"dataframe_split": {"columns": ["prompt"], "data": [["cat"], [None]]}}, "E-CFG-071 prompt: None"),
        ({"dataframe_records": [{"prompt": 3}]}, "E-CFG-071 prompt: 3 in row 0"),
        ({"prompt": 3}, "E-CFG-071 prompt: 3 in row 0"),
        ({"prompt": "cat", "steps": "x"}, "E-CFG-190 steps: 'x' is no whole number"),
        *(
            ({**CAT, "params": {"steps": value}}, "E-CFG-190 steps: ")
            for value in ("x", "1", 1.5, 2.0, True, [1], {}, float("inf"))
        ),
        ({**CAT, "params": {"guidance": "x"}}, "E-CFG-190 guidance: 'x' is no number"),
        *(({**CAT, "params": value}, "E-CFG-190 params: ") for value in (3, [], "x", True)),
        ({**CAT, "params": {"sed": 3}}, "E-CFG-191 params: 'sed' is unknown. Fix: did you mean 'seed'?"),
        ({**CAT, "params": {"x": 3}}, "E-CFG-191 params: 'x' is unknown. Fix: choose from seed, steps"),
    ],
)
def test_what_is_of_a_wrong_type_is_one_line(request_: Any, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_request(request_)
    assert str(error.value).startswith(line)
