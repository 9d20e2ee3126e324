"""The same token ids as TRL 0.28, the last with `max_prompt_length` and `max_completion_length`.

`trl_row` says again what its `DPOTrainer.tokenize_row` did. GOLDEN are digests of what that
function itself, taken from the source of TRL 0.28.0, made of these rows with this tokenizer and
these limits. The versions from 0.12 on make the same ids of text.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import xxhash

from benchmarks.data import find_data, race_tokenizer
from dpofast.columns import ID_COLUMNS
from dpofast.data import load_preferences, tokenize_preferences
from tests.data.builders import plain_rows

FILES = ("dpo_en_demo", "instruction_preference", "kto_en_demo")
# max_prompt_length, max_completion_length, max_length: lengths of which some rows are longer.
LIMITS = {
    "dpo_en_demo": (300, 400, 600),
    "instruction_preference": (16, 16, 28),
    "kto_en_demo": (150, 400, 500),
}
GOLDEN = {
    ("dpo_en_demo", "generated"): "dda64c7ab939d79ee789490e84bceeb7",
    ("instruction_preference", "generated"): "89901f555178dcb77f7b045a0dcece6b",
    ("kto_en_demo", "generated"): "b6509a52255babc5960713dedd9c6d86",
    ("dpo_en_demo, messages", "generated"): "77960f9a83425229f290f4c64c8da7d9",
    ("instruction_preference, messages", "generated"): "2e62e1edd82f5ab95d418fd55299569a",
    ("dpo_en_demo", "file"): "5c0e625819a3157db60f1ab9619ff296",
    ("instruction_preference", "file"): "726222163f27e6ea649571d77c37fb9e",
    ("kto_en_demo", "file"): "65366ac88078b8f9d3c2f140d9ea8bbf",
    ("dpo_en_demo, messages", "file"): "348924e0367dde8273948e9add85cc22",
    ("instruction_preference, messages", "file"): "d53cfbfaa690bc3b822076d127cca2e6",
}


def text_rows(name):
    """A quarter of a file's pairs as prompt and answers in text, and a tokenizer of the texts."""
    path, source = find_data(name)
    if name == "kto_en_demo":  # unpaired: each row's answer against the next row's
        turns = [[m["content"] for m in row["messages"]] for row in json.loads(path.read_text())]
        answers = [turn[-1] for turn in turns]
        rows = [
            {"prompt": "\n".join(turn[:-1]) + "\nAnswer:", "chosen": own, "rejected": other}
            for turn, own, other in zip(turns, answers, answers[1:], strict=False)
        ]
        path = find_data("dpo_en_demo")[0]
    else:
        pairs = plain_rows(load_preferences(path))
        rows = [
            {
                "prompt": "\n".join(m["content"] for m in pair["prompt"]) + "\nAnswer:",
                **{part: pair[part][0]["content"] for part in ("chosen", "rejected")},
            }
            for pair in pairs
        ]
    for row in rows:
        row |= {part: f" {row[part]}" for part in ("chosen", "rejected")}
    return rows[::4], race_tokenizer(path, 2_000), source


def trl_row(row, tokenizer, prompt_limit, answer_limit, is_chat=False):
    """Ids of prompt and answers; an answer in text gets its EOS before it is cut."""
    prompt, *answers = (
        tokenizer(row[part], add_special_tokens=False)["input_ids"]
        for part in ("prompt", "chosen", "rejected")
    )
    end = [] if is_chat else [tokenizer.eos_token_id]
    return [prompt[-prompt_limit:], *((answer + end)[:answer_limit] for answer in answers)]


def digest(rows):
    ids = [np.asarray([len(part), *part], "<i4") for row in rows for part in row]
    return xxhash.xxh3_128(np.concatenate(ids).tobytes()).hexdigest()


def ours(rows, tokenizer, *limits):
    """Ids of prompt and answers of each row that is kept, by row, and the report."""
    names = ("max_prompt_length", "max_completion_length", "max_length")
    options = {"max_length": None, **dict(zip(names, limits, strict=False))}
    tokens, report = tokenize_preferences(load_preferences(rows), tokenizer, **options)
    columns = (tokens[name][:] for name in ("row", *ID_COLUMNS))
    return {row: list(ids) for row, *ids in zip(*columns, strict=True)}, report


def assert_same_ids(rows, theirs, tokenizer, limits):
    """Compare ours with TRL's, first without and then with max_length, which TRL applied last."""
    found, report = ours(rows, tokenizer, *limits[:2])
    assert report.prompts_cut > 10
    assert report.answers_cut > 10
    assert found == {row: ids for row, ids in enumerate(theirs) if ids[1] != ids[2]}
    found, _ = ours(rows, tokenizer, *limits)
    expected = {}
    for row, (prompt, *answers) in enumerate(theirs):
        kept = [(prompt + answer)[len(prompt) : limits[2]] for answer in answers]
        if kept[0] != kept[1]:  # both are empty if the prompt leaves no room
            expected[row] = [prompt, *kept]
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_ids_of_text(name):
    rows, tokenizer, source = text_rows(name)
    theirs = [trl_row(row, tokenizer, *LIMITS[name][:2]) for row in rows]
    assert digest(theirs) == GOLDEN[name, source]
    assert_same_ids(rows, theirs, tokenizer, LIMITS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES[:2])
def test_ids_of_messages(name):
    path, source = find_data(name)
    rows = plain_rows(load_preferences(path))[::4]
    rows = [{part: row[part] for part in ("prompt", "chosen", "rejected")} for row in rows]
    tokenizer = race_tokenizer(path, 2_000)
    texts = [templated(row, tokenizer) for row in rows]
    theirs = [trl_row(text, tokenizer, *LIMITS[name][:2], is_chat=True) for text in texts]
    assert digest(theirs) == GOLDEN[f"{name}, messages", source]
    assert_same_ids(rows, theirs, tokenizer, LIMITS[name])


def templated(row, tokenizer):
    """The texts that TRL's `apply_chat_template` makes of a row."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    wholes = (
        tokenizer.apply_chat_template(row["prompt"] + row[part], tokenize=False)
        for part in ("chosen", "rejected")
    )
    chosen, rejected = (whole[len(prompt) :] for whole in wholes)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
