"""Rows with many answers give the pairs, id by id, that a file of these pairs gives."""

from __future__ import annotations

import pytest

from dpofast.data import load_preferences, tokenize_preferences, tokenize_ranked
from tests.data.builders import (
    CHAT_TEMPLATE,
    THINKING_TEMPLATE,
    assistant,
    byte_bpe,
    metaspace,
    user,
    word_level,
)

MERGES = (("b", "c"), ("bc", "d"))
TOKENIZERS = {
    "merges": byte_bpe(MERGES),
    "blank": byte_bpe(MERGES, prefix_space=True),
    "bos and eos": byte_bpe(MERGES, bos=True, eos=True),
    "metaspace": metaspace("ab cd"),
    "words": word_level("ab cd x xx"),
}
TEXTS = [
    {"prompt": "ab", "completions": ["cdx", "xx", "x", "xx"], "scores": [3, 1, 2, 0]},
    {"prompt": "a b", "completions": [" cd", "x x"], "scores": [0.5, 1]},
    {"prompt": "x", "completions": ["x x", "ab", "cdcd", "x"], "scores": [0, 3, 2, 1]},
]
CHATS = [
    {
        "prompt": [user(row["prompt"])],
        **{k: v for k, v in row.items() if k != "prompt"},
        "completions": [[assistant(text)] for text in row["completions"]],
    }
    for row in TEXTS
]
IDS = [
    {"prompt_ids": [5, 6, 7, 8], "completions_ids": [[1, 2, 3], [1, 2, 4], [9]], "ranks": [2, 1, 3]}
]


def pairs_of(rows):
    """The same data as a file of pairs: one row for each pair, with the row it is from."""
    pairs = []
    for row in rows:
        ids = "_ids" if "prompt_ids" in row else ""
        answers = row[f"completions{ids}"]
        scores = row.get("scores") or [-rank for rank in row.get("ranks", ())]
        wanted = [
            (i, j) if scores[i] > scores[j] else (j, i)
            for i in range(len(answers))
            for j in range(i + 1, len(answers))
            if scores[i] != scores[j]
        ]
        pairs += [
            {
                f"prompt{ids}": row[f"prompt{ids}"],
                f"chosen{ids}": answers[chosen],
                f"rejected{ids}": answers[rejected],
            }
            for chosen, rejected in wanted
        ]
    return pairs


def both(rows, tokenizer, **limits):
    """The pairs of ranked rows, and of the equivalent file of pairs, each with its report."""
    limits = {"max_length": None, **limits}
    ranked = tokenize_ranked(load_preferences(rows), tokenizer, **limits)
    return ranked, tokenize_preferences(load_preferences(pairs_of(rows)), tokenizer, **limits)


def ids_of(pairs):
    return [[pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for pair in pairs]


LIMITS = [{}, {"max_length": 4}, {"max_completion_length": 2}, {"max_prompt_length": 1}]


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@pytest.mark.parametrize("limits", LIMITS)
def test_texts_give_the_pairs_of_a_paired_file(tokenizer, limits):
    (pooled, report), (plain, of_plain) = both(TEXTS, tokenizer, **limits)
    assert ids_of(pooled) == ids_of(plain)
    assert (report.pairs_read, report.pairs_kept) == (of_plain.pairs_read, of_plain.pairs_kept)
    assert {k: len(v) for k, v in report.left_out.items()} == {
        k: len(v) for k, v in of_plain.left_out.items()
    }


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING_TEMPLATE])
@pytest.mark.parametrize("limits", [{}, {"max_length": 40}])
def test_messages_give_the_pairs_of_a_paired_file(template, limits):
    (pooled, report), (plain, of_plain) = both(CHATS, byte_bpe(chat_template=template), **limits)
    assert ids_of(pooled) == ids_of(plain)
    assert report.rerendered_prompts == of_plain.rerendered_prompts


@pytest.mark.parametrize("length", [5, 6, 7])
def test_token_ids_give_the_pairs_of_a_paired_file(length):
    (pooled, _), (plain, _) = both(IDS, None, max_length=length)
    assert ids_of(pooled) == ids_of(plain)


def test_under_keep_end_the_longest_answer_of_a_row_cuts_the_prompt_of_all_its_pairs():
    options = {"max_length": 6, "truncation_mode": "keep_end"}
    (pooled, _), _ = both(IDS, None, **options)
    assert [pair["prompt_ids"] for pair in pooled] == [[6, 7, 8]] * 3
    # A pair of the shorter answers alone keeps its whole prompt.
    rows = [{**IDS[0], "completions_ids": [[1, 2, 3, 4], [5], [9]]}]
    (pooled, report), (plain, _) = both(rows, None, **options)
    assert [pair["prompt_ids"] for pair in pooled] == [[7, 8]] * 3
    assert [pair["prompt_ids"] for pair in plain] == [[7, 8], [7, 8], [5, 6, 7, 8]]
    assert [pair["chosen_ids"] for pair in pooled] == [pair["chosen_ids"] for pair in plain]
    assert (report.prompts_cut, report.answers_cut, report.tokens_cut) == (1, 0, 2)


def test_a_useless_pair_is_left_out_without_the_others_of_its_row():
    rows = [
        {"prompt_ids": [5], "completions_ids": [[1, 2], [1, 3], [4]], "scores": [3, 2, 1]},
        {"prompt_ids": [5, 6], "completions_ids": [[1], [1], [4]], "scores": [3, 2, 1]},
        {"prompt_ids": [5, 6, 7], "completions_ids": [[1], [2], [4]], "scores": [3, 2, 1]},
    ]
    (pooled, report), (plain, of_plain) = both(rows, None, max_length=2)
    assert ids_of(pooled) == ids_of(plain)[:4] == [[[5], [1], [4]]] * 2
    assert report.left_out == {
        "identical answers": (1,),
        "no room for an answer": (1, 1, 2, 2, 2),
        "identical answers after the cut": (0,),
    }
    assert report.pairs_read == of_plain.pairs_read == 9
    assert "left out, no room for an answer: 5 (rows from 0: 1, 2)" in "\n".join(report.lines())
    # Both answers of the pair that is left out are in other pairs, and are cut once.
    assert (report.answers_cut, report.tokens_cut) == (2, 2)
    assert pooled.answers["completion"][:] == [0, 1, 2]
