"""`columns` and `roles` that can't be meant are refused before any row is read."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from dpofast.data import PairStream, load_preferences
from dpofast.errors import ConfigError

ROWS = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]
EXPECTED = "expected a mapping of names, such as"


def read(**mappings: Any) -> None:
    load_preferences(ROWS, **mappings)


def stream(**mappings: Any) -> None:
    PairStream(datasets.Dataset.from_list(ROWS).to_iterable_dataset(), **mappings)


@pytest.mark.parametrize("give", [read, stream])
@pytest.mark.parametrize(
    ("mappings", "sentence"),
    [
        ({"columns": {"promt": "question"}}, "did you mean 'prompt'?"),
        ({"columns": {"question": "prompt"}}, "write it the other way round"),
        ({"columns": "prompt"}, f"columns: got 'prompt', {EXPECTED}"),
        ({"columns": ["prompt"]}, f"columns: got ['prompt'], {EXPECTED}"),
        ({"columns": {"prompt": None}}, EXPECTED),
        ({"roles": "human"}, f"roles: got 'human', {EXPECTED}"),
        ({"roles": {"human": ["user"]}}, EXPECTED),
        ({"roles": {"human": "usr"}}, "maps 'human' to 'usr', which no chat template knows; did"),
        ({"roles": {"human": "User"}}, "did you mean 'user'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(give: Any, mappings: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        give(**mappings)
    assert sentence in str(caught.value)


def test_a_role_that_only_the_template_knows_is_taken() -> None:
    read(roles={"oracle": "narrator", "bot": "assistant"}, columns={})
