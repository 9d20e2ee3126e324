"""What `dpofast inspect` prints of a pair."""

from __future__ import annotations

import pytest
from rich.console import Console

from dpofast.data import load_preferences, load_unpaired
from dpofast.data.tokens.truncate import LengthLimits
from dpofast.errors import DataError
from dpofast.inspect.pair import render_pair, render_untokenised_pair
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, user


def printed(renderable):
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def row_of(prompt, chosen, rejected):
    return load_preferences([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])[0]


def test_answers_that_begin_differently_are_said_to():
    text = printed(render_untokenised_pair(row_of("a", "x", "y"), byte_bpe()))
    assert "the answers begin with different tokens" in text


def test_every_part_is_named_with_its_tokens():
    text = printed(render_untokenised_pair(row_of("a\nb", " xy", " xz"), byte_bpe()))
    assert "row 0 (counted from 0): prompt 3 tokens, chosen 4, rejected 4" in text
    assert "the answers share their first 2 tokens" in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[1:] == [
        "prompt, masked (3)     a|⏎|b",
        "both answers begin (2)  |x",
        "chosen, scored (2)     y|</s>",
        "rejected, scored (2)   z|</s>",
    ]


def test_what_is_cut_is_shown():
    row = row_of("abcdef", "uvwxyz", "123")
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=LengthLimits(8)))
    assert "max_length 8 (keep_start): cut 0 tokens of the prompt on its left, 5 of chosen" in text
    assert "chosen, cut (5)      w|x|y|z|</s>" in text
    limits = LengthLimits(8, "keep_end")
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=limits))
    assert "prompt, cut on the left (5) a|b|c|d|e" in text
    limits = LengthLimits(8, "keep_start", max_prompt_length=4, max_completion_length=3)
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=limits))
    assert "max_prompt_length 4, max_completion_length 3, max_length 8 (keep_start): cut 2" in text
    assert "prompt, cut on the left (2) a|b" in text
    assert "chosen, cut (4)             x|y|z|</s>" in text


@pytest.mark.parametrize(
    ("row", "max_length", "reason"),
    [
        (("a", "b", "b"), None, "identical answers"),
        (("abcdef", "u", "v"), 6, "no room for an answer"),
        (("a", "xxu", "xxv"), 3, "identical answers after the cut"),
    ],
)
def test_pairs_that_training_leaves_out_say_why(row, max_length, reason):
    limits = LengthLimits(max_length)
    text = printed(render_untokenised_pair(row_of(*row), byte_bpe(), limits=limits))
    assert f"left out of training: {reason}\n" in text


def test_a_merge_across_the_boundary_is_told():
    text = printed(render_untokenised_pair(row_of("ab", "cd", "x"), byte_bpe((("b", "c"),))))
    assert "the tokenizer merges prompt and answer" in text
    assert "merges" not in printed(
        render_untokenised_pair(row_of("ab", "d", "x"), byte_bpe((("b", "c"),)))
    )


def test_long_parts_are_shortened():
    row = row_of("a" * 50 + "b" * 50, "x", "y")
    text = printed(render_untokenised_pair(row, byte_bpe(), max_tokens=4))
    assert "a|a ... 96 tokens ... b|b" in text


def test_messages_show_their_template():
    row = load_preferences(
        [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}]
    )[0]
    assert "|a|</s>|" in printed(
        render_untokenised_pair(row, byte_bpe(chat_template=CHAT_TEMPLATE))
    )
    with pytest.raises(DataError, match="no chat template"):
        render_untokenised_pair(row, byte_bpe())


def test_brackets_are_text_and_not_markup():
    ids = byte_bpe()("[red]", add_special_tokens=False)["input_ids"]
    example = {"prompt_ids": ids, "chosen_ids": [5], "rejected_ids": [6]}
    assert "[|r|e|d|]" in printed(render_pair(example, byte_bpe()))


@pytest.mark.parametrize(("label", "word"), [(True, "desirable"), (False, "undesirable")])
def test_an_unpaired_row_is_shown_with_its_label(label, word):
    row = load_unpaired([{"prompt": "a\nb", "completion": " xy", "label": label}])[0]
    text = printed(render_untokenised_pair(row, byte_bpe()))
    assert [line.rstrip() for line in text.splitlines()] == [
        f"row 0 (counted from 0): prompt 3 tokens, completion 4; {word}",
        "prompt, masked (3)     a|⏎|b",
        "completion, scored (4)  |x|y|</s>",
    ]
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=LengthLimits(5)))
    assert "cut 0 tokens of the prompt on its left, 2 of completion on its right" in text
    assert "completion, cut (2)    y|</s>" in text
    text = printed(render_untokenised_pair(row, byte_bpe(), limits=LengthLimits(3)))
    assert "left out of training: no room for an answer" in text
