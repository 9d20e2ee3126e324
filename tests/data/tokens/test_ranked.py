"""Rows with many answers give the pairs, id by id, that a file of these pairs gives."""

from __future__ import annotations

import random
import time

import pytest

from dpofast.data import load_preferences, mix_preferences, tokenize_preferences, tokenize_ranked
from dpofast.errors import DataError
from dpofast.reference.build.answers import read_answers
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


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS)
def test_random_texts_give_the_pairs_of_a_paired_file(limits):
    rng = random.Random(5)

    def text(longest):
        return "".join(rng.choice("abcdx ") for _ in range(rng.randint(0, longest)))

    rows = []
    for _ in range(200):
        scores = [rng.randrange(3) for _ in range(rng.randint(2, 5))]
        answers = [text(5) + "b" for _ in scores]
        if len(set(scores)) > 1:
            rows.append({"prompt": "a" + text(6), "completions": answers, "scores": scores})
    # In the vocabulary of whole words, an answer decides on how another one is split.
    for name in TOKENIZERS.keys() - {"words"}:
        (pooled, _), (plain, _) = both(rows, TOKENIZERS[name], **limits)
        assert ids_of(pooled) == ids_of(plain), name


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
    (pooled, _), (plain, _) = both(IDS, None, **options)
    assert [pair["prompt_ids"] for pair in pooled] == [[6, 7, 8]] * 3
    # Each pair has one of the longest answers, so a file of pairs gives the same.
    assert ids_of(pooled) == ids_of(plain)
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


def test_an_empty_answer_after_rendering_leaves_out_its_pairs_alone():
    tokenizer = byte_bpe(
        chat_template="{% for m in messages %}{{ m['content'] | replace('z', '') + eos_token }}"
        "{% endfor %}"
    )
    texts = ["z", "a", "b"]
    rows = [
        {
            "prompt": [user("q")],
            "completions": [[assistant(text)] for text in texts],
            "scores": [3, 2, 1],
        }
    ]
    (pooled, report), (plain, _) = both(rows, tokenizer)
    assert ids_of(pooled) == ids_of(plain)
    assert len(pooled) == 1
    assert report.left_out == {"empty answer": (0, 0)}


def test_strict_refuses_a_row_with_a_useless_pair():
    rows = [{"prompt_ids": [5], "completions_ids": [[1], [1], [4]], "scores": [3, 2, 1]}]
    with pytest.raises(DataError, match=r"train, row 0 .*: the row has identical answers"):
        tokenize_ranked(load_preferences(rows), None, max_length=None, strict=True)


def test_a_row_that_the_template_refuses_is_a_bad_row():
    template = "{% if messages[-1]['content'] == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    tokenizer = byte_bpe(chat_template=template + CHAT_TEMPLATE)
    rows = load_preferences([*CHATS, {**CHATS[1], "completions": [[assistant("a")]] * 2}])
    with pytest.raises(DataError, match=r"2 of 4 rows can't be used:\n.*row 0.*no x.*\n.*row 2"):
        tokenize_ranked(rows, tokenizer, max_length=None)
    pooled, report = tokenize_ranked(rows, tokenizer, max_length=None, skip_bad_rows=True)
    assert set(pooled["row"]) == {1}
    assert [len(report.problems), len(report.left_out["bad row"])] == [2, 12]
    assert report.pairs_read == 14


def test_rows_that_were_left_out_when_they_were_read_are_reported():
    rows = [*IDS, {**IDS[0], "completions_ids": [[1], [], [2]]}, {**IDS[0], "ranks": [1, 1, 1]}]
    data = load_preferences(rows, skip_bad_rows=True)
    pooled, report = tokenize_ranked(data, None, max_length=None, skip_bad_rows=True)
    assert len(pooled) == report.pairs_kept == 4
    assert report.left_out == {"empty answer": (1, 1), "bad row": (2,)}
    assert report.pairs_read == 7
    assert report.answers_read == {"prompts": 2, "answers": 5}


def test_the_report_counts_prompts_answers_and_ties():
    row = {**IDS[0], "completions_ids": [[1, 2, 3], [4, 2, 3], [9]]}
    rows = [{**row, "ranks": [1, 2, 2]}, row]
    _, report = tokenize_ranked(load_preferences(rows), None, max_length=6)
    lines = report.lines()
    assert lines[0] == "train: 5 pairs read, 5 kept"
    assert lines[1] == "  made of 2 prompts with 6 answers"
    assert lines[2] == "  1 pair of answers is not made, as the scores are equal"
    plain = report.as_dict()
    assert (plain["ties"], plain["answers_read"]) == (1, {"prompts": 2, "answers": 6})
    # Each answer that is cut counts once, though it is in two pairs.
    assert (report.answers_cut, report.tokens_cut) == (4, 4)
    assert plain["answer_lengths"]["longest"] == 3


def test_a_mixture_keeps_the_sources_and_weights_of_its_pairs():
    rows = [{**IDS[0], "weight": 2.0}]
    mixture = mix_preferences({"many": rows, "two": pairs_of(IDS)}, weights={"many": 3, "two": 1})
    pooled, _ = tokenize_ranked(mixture, None, max_length=None)
    assert pooled["source"] == ["many"] * 3 + ["two"] * 3
    assert pooled["weight"] == [6.0] * 3 + [1.0] * 3
    assert pooled["row"] == [0, 0, 0, 0, 1, 2]
    assert ids_of(pooled)[:3] == ids_of(pooled)[3:]
    assert len(pooled.answers) == 9
    assert set(pooled.answers["source"]) == {"many", "two"}


def test_processes_give_the_same_pairs():
    rows, tokenizer = load_preferences(TEXTS * 3), TOKENIZERS["merges"]
    alone, _ = tokenize_ranked(rows, tokenizer, max_length=None)
    shared, _ = tokenize_ranked(rows, tokenizer, max_length=None, num_proc=2)
    assert list(shared) == list(alone)


def test_ranked_rows_are_not_tokenised_as_pairs():
    with pytest.raises(DataError, match=r"train has rows with many answers; .* tokenize_ranked"):
        tokenize_preferences(load_preferences(IDS), None, max_length=None)


@pytest.mark.slow
def test_a_pool_of_a_thousand_prompts_is_prepared_in_seconds():
    rng = random.Random(0)

    def ids(length):
        return [rng.randrange(3, 1000) for _ in range(length)]

    rows = [
        {
            "prompt_ids": ids(200),
            "completions_ids": [ids(200) for _ in range(7)],
            "scores": list(range(7)),
        }
        for _ in range(1000)
    ]
    data = load_preferences(rows)
    start = time.process_time()
    pooled, _ = tokenize_ranked(data, None, max_length=None)
    tokenised = time.process_time()
    answers = read_answers(pooled.answers, pooled.index)
    order = rng.sample(range(len(pooled)), len(pooled))
    for first in range(0, 2400, 24):  # 100 steps
        pooled[order[first : first + 24]]
    read = time.process_time()
    assert (len(pooled), len(answers.first)) == (21_000, 7_000)
    assert tokenised - start < 15.0  # 2 s on a quiet core
    assert read - tokenised < 5.0


def test_answers_keep_their_places_in_the_source():
    row = {"prompt": [user("q")], "completions": ["a", "b", "c", "d"], "scores": [1, 3, 2, 0]}
    rows = load_preferences([row], answer_pairs="best_worst")
    pooled, _ = tokenize_ranked(rows, byte_bpe(chat_template=CHAT_TEMPLATE), max_length=None)
    assert pooled.answers["completion"][:] == [1, 3]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    rows = load_preferences(
        [{**row, "completions": ["a", "b", "c", [call]]}], answer_pairs="best_worst"
    )
    with pytest.raises(DataError, match=r"completions\[3\] has no text"):
        tokenize_ranked(rows, byte_bpe(chat_template=CHAT_TEMPLATE), max_length=None)
