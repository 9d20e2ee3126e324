"""Values as people write them are converted to the options' types, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from dpofast.cli.option_types import checked_value
from dpofast.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("1e-6", float, 1e-6),  # YAML reads 1e-6 as text
        (1, float, 1.0),
        ("3", int, 3),
        (2.0, int, 2),
        (True, bool, True),
        (7, str, "7"),
        ("sigmoid", list[str] | str, "sigmoid"),
        (["sigmoid"], list[str] | str, ["sigmoid"]),
        (None, int | None, None),
        ({"prompt": "question"}, dict[str, str] | None, {"prompt": "question"}),
    ],
)
def test_takes_what_people_write(value: Any, annotation: Any, expected: Any) -> None:
    got = checked_value("name", value, annotation, "run.yaml")
    assert got == expected
    assert type(got) is type(expected)


def test_one_value_on_the_command_line_is_a_list_where_a_list_is_needed() -> None:
    where = "command line"
    assert checked_value("name", 1, list[float] | None, where) == [1.0]
    assert checked_value("name", "lm_head", list[str] | None, where) == ["lm_head"]
    assert checked_value("name", None, list[str] | None, where) is None
    assert checked_value("name", "a", list[str] | str, where) == "a"
    with pytest.raises(ConfigError, match="got 'a', expected a list of texts or null"):
        checked_value("name", "a", list[str] | None, "run.yaml")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ([1, 2], float, "a number"),
        ("much", float, "a number"),
        (2.5, int, "a whole number"),
        (True, int, "a whole number"),
        ("maybe", bool, "true or false"),
        (None, float, "a number"),
        ({"a": 1}, list[str] | str, "a list of texts or text"),
    ],
)
def test_refuses_other_types_by_name(value: Any, annotation: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_value("beta", value, annotation, "run.yaml")
    assert str(caught.value) == f"run.yaml: beta: got {value!r}, expected {expected}."


def test_bare_no_of_yaml_is_a_strategy() -> None:
    assert checked_value("eval_strategy", False, str, "run.yaml") == "no"
