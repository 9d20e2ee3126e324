"""Both answers have the same prompt ids, and no token crosses the boundary."""

from __future__ import annotations

import logging

import pytest

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.tokens.boundary import BoundaryTokenizer, RowTexts
from dpofast.errors import DataError
from tests.data.builders import (
    CHAT_TEMPLATE,
    THINKING_TEMPLATE,
    assistant,
    byte_bpe,
    metaspace,
    system,
    user,
    word_level,
)

# "b" at the end of a prompt merges with "c" at the beginning of an answer.
MERGES = (("b", "c"), ("bc", "d"))


def tokenise(rows, tokenizer, **options):
    pairs = load_preferences(rows)
    return tokenize_preferences(pairs, tokenizer, **{"max_length": None, **options})


def one(row, tokenizer):
    (pair,), report = tokenise([row], tokenizer)
    return pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"], report


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_where_nothing_merges_the_answer_is_what_follows():
    tokenizer = byte_bpe(MERGES)
    prompt, chosen, rejected, report = one(
        {"prompt": "ab", "chosen": "xy", "rejected": "xbcd"}, tokenizer
    )
    assert prompt == ids_of(tokenizer, "ab")
    assert chosen == [*ids_of(tokenizer, "xy"), tokenizer.eos_token_id]
    assert rejected == [*ids_of(tokenizer, "xbcd"), tokenizer.eos_token_id]
    assert report.boundary_merges == 0


def test_a_merge_across_the_boundary_is_undone_in_the_answer_that_has_it():
    tokenizer = byte_bpe(MERGES)
    prompt, chosen, rejected, report = one(
        {"prompt": "ab", "chosen": "cdx", "rejected": "xx"}, tokenizer
    )
    assert prompt == ids_of(tokenizer, "ab")
    assert chosen == [*ids_of(tokenizer, "cdx"), tokenizer.eos_token_id]
    assert rejected == [*ids_of(tokenizer, "xx"), tokenizer.eos_token_id]
    assert report.boundary_merges == 1
    whole = ids_of(tokenizer, "abcdx")
    assert prompt + chosen[:-1] != whole
    assert tokenizer.decode(prompt + chosen[:-1]) == tokenizer.decode(whole) == "abcdx"


def test_a_blank_that_the_tokenizer_puts_before_every_text_stays_out_of_the_answer():
    tokenizer = byte_bpe(MERGES, prefix_space=True)
    prompt, chosen, _, report = one({"prompt": "ab", "chosen": "cx", "rejected": "x"}, tokenizer)
    assert report.boundary_merges == 1
    assert prompt == ids_of(tokenizer, "ab")
    assert tokenizer.decode(prompt + chosen[:-1]) == " abcx"


def test_sentencepiece_words_follow_without_a_merge():
    tokenizer = metaspace("▁hello ▁world ▁there")
    prompt, chosen, _, report = one(
        {"prompt": "hello", "chosen": " world", "rejected": " there"}, tokenizer
    )
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<s>", "▁hello"]
    assert tokenizer.convert_ids_to_tokens(chosen) == ["▁world", "</s>"]
    assert report.boundary_merges == 0


def test_a_sentencepiece_word_that_grows_over_the_boundary():
    tokenizer = metaspace("▁hello ▁world ▁wor ld")
    prompt, chosen, rejected, report = one(
        {"prompt": "hello wor", "chosen": "ld", "rejected": "m"}, tokenizer
    )
    assert tokenizer.decode(prompt + chosen) == "<s> hello world</s>"
    assert tokenizer.decode(prompt + rejected) == "<s> hello worm</s>"
    assert report.boundary_merges == 1


def test_words_that_grow_together_keep_their_prompt():
    tokenizer = word_level("a b ab c ac </s>")
    prompt, chosen, _, report = one(
        {"prompt": "a", "chosen": "b </s>", "rejected": "c </s>"}, tokenizer
    )
    assert prompt == ids_of(tokenizer, "a")
    assert chosen == ids_of(tokenizer, "b </s>")
    assert report.boundary_merges == 1


def test_where_no_other_way_keeps_the_text_the_answer_begins_earlier():
    tokenizer = word_level("q a b ab c ac")
    prompt, chosen, rejected, report = one(
        {"prompt": "q a", "chosen": "b </s>", "rejected": "c </s>"}, tokenizer
    )
    assert prompt == ids_of(tokenizer, "q")
    assert chosen == ids_of(tokenizer, "ab </s>")
    assert rejected == ids_of(tokenizer, "ac </s>")
    assert report.boundary_merges == 1


@pytest.mark.parametrize("prompt", ["ab", "<s>ab"])
def test_one_bos_and_one_eos(prompt):
    tokenizer = byte_bpe(MERGES, bos=True, eos=True)
    prompt_ids, chosen, rejected, _ = one(
        {"prompt": prompt, "chosen": "x", "rejected": "y</s>"}, tokenizer
    )
    assert prompt_ids == [tokenizer.bos_token_id, *ids_of(tokenizer, "ab")]
    assert chosen == [*ids_of(tokenizer, "x"), tokenizer.eos_token_id]
    assert rejected == [*ids_of(tokenizer, "y"), tokenizer.eos_token_id]


def test_text_that_was_rendered_before_gets_no_second_eos():
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    _, chosen, _, _ = one({"prompt": "a", "chosen": "x</s>\n", "rejected": "y</s>\n"}, tokenizer)
    assert chosen == ids_of(tokenizer, "x</s>\n")


def test_a_bos_gives_an_empty_prompt_something_to_predict_from():
    row = {"prompt": "", "chosen": "x", "rejected": "y"}
    tokenizer = byte_bpe(bos=True)
    prompt, chosen, _, _ = one(row, tokenizer)
    assert prompt == [tokenizer.bos_token_id]
    assert chosen == [*ids_of(tokenizer, "x"), tokenizer.eos_token_id]
    with pytest.raises(DataError, match=r"row 0 .*the prompt has no token"):
        one(row, byte_bpe())


def test_chat_templates_bring_their_own_bos_and_eos():
    tokenizer = byte_bpe(bos=True, eos=True, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    row = {
        "prompt": [system("s"), user("ab")],
        "chosen": [assistant("c")],
        "rejected": [assistant("d")],
    }
    prompt, chosen, rejected, report = one(row, tokenizer)
    assert prompt == ids_of(tokenizer, "<s><|system|>s</s><|user|>ab</s><|assistant|>")
    assert chosen == ids_of(tokenizer, "c</s>")
    assert rejected == ids_of(tokenizer, "d</s>")
    assert report.rerendered_prompts == 0


def test_a_template_whose_end_merges_with_the_answer():
    tokenizer = byte_bpe(((">", "c"),), chat_template=CHAT_TEMPLATE)
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    prompt, chosen, _, report = one(row, tokenizer)
    assert prompt == ids_of(tokenizer, "<|user|>a</s><|assistant|>")
    assert chosen == ids_of(tokenizer, "c</s>")
    assert (report.boundary_merges, report.rerendered_prompts) == (1, 0)


def test_a_template_that_renders_the_prompt_otherwise_before_an_answer(caplog):
    tokenizer = byte_bpe(chat_template=THINKING_TEMPLATE)
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    with caplog.at_level(logging.WARNING):
        pairs, report = tokenise([row, row], tokenizer)
    assert pairs[0]["prompt_ids"] == ids_of(tokenizer, "<|user|>a</s><|assistant|>")
    assert pairs[0]["chosen_ids"] == ids_of(tokenizer, "c</s>")
    assert (report.boundary_merges, report.rerendered_prompts) == (0, 2)
    assert len(caplog.records) == 1


def test_several_messages_are_one_answer():
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    turns = [assistant("c"), {"role": "tool", "content": "t"}, assistant("e")]
    row = {"prompt": [user("a")], "chosen": turns, "rejected": [assistant("d")]}
    _, chosen, _, _ = one(row, tokenizer)
    assert chosen == ids_of(tokenizer, "c</s><|tool|>t</s><|assistant|>e</s>")


def test_tools_and_template_options_reach_the_template():
    template = "{{ tools | length }}{{ mood }}" + CHAT_TEMPLATE
    row = {
        "prompt": [user("a")],
        "chosen": [assistant("c")],
        "rejected": [assistant("d")],
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"mood": "!"},
    }
    tokenizer = byte_bpe(chat_template=template)
    prompt, _, _, _ = one(row, tokenizer)
    assert prompt == ids_of(tokenizer, "1!<|user|>a</s><|assistant|>")


INSTRUCTION = {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"}


def test_instructions_use_the_chat_template_where_there_is_one():
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    prompt, chosen, _, _ = one(INSTRUCTION, tokenizer)
    assert prompt == ids_of(tokenizer, "<|user|>Add.\n2+2</s><|assistant|>")
    assert chosen == ids_of(tokenizer, "4</s>")


def test_instructions_become_plain_text_without_a_chat_template():
    tokenizer = byte_bpe()
    prompt, chosen, _, _ = one(INSTRUCTION, tokenizer)
    headings = "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n"
    assert prompt == ids_of(tokenizer, headings)
    assert chosen == ids_of(tokenizer, "4</s>")


def test_messages_without_a_chat_template_are_refused():
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    with pytest.raises(DataError, match=r"train, row 0 .*no chat template; give it one"):
        one(row, byte_bpe())


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must\nalternate') }}", "{{ messages[9]['role'] }}", "{{ 1 / 0 }}"],
)
def test_a_template_that_refuses_a_row_names_it(template):
    row = {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("d")]}
    with pytest.raises(DataError, match=r"train, row 0 .*chat template can't render") as caught:
        one(row, byte_bpe(chat_template=template))
    assert "\n" not in str(caught.value)


def test_text_without_an_eos_token_is_refused():
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        one({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer)


def test_an_answer_that_is_only_eos_is_left_out_as_empty():
    rows = [{"prompt": "a", "chosen": chosen, "rejected": "c"} for chosen in ("</s>", "b")]
    _, report = tokenize_preferences(load_preferences(rows), byte_bpe(), max_length=None)
    assert report.left_out == {"empty answer": (0,)}


def test_ids_of_another_tokenizer_are_named():
    row = {"prompt_ids": [1], "chosen_ids": [9_999], "rejected_ids": [2]}
    with pytest.raises(DataError, match="token id 9999 is beyond 258, the tokenizer's last"):
        one(row, byte_bpe())


def test_every_split_of_a_text_keeps_prompt_and_text():
    """The boundary falls at every place in a text, with merges of two to four letters around it."""
    tokenizer = byte_bpe((("a", "b"), ("ab", "a"), ("b", "b"), ("aba", "bb")))
    boundary = BoundaryTokenizer(tokenizer)
    text = "abbababbaabb"
    for place in range(1, len(text)):
        prompt, answer = text[:place], text[place:]
        (pair,) = boundary.split([RowTexts(prompt, (text, prompt + "b"))])
        assert pair.prompt_ids == ids_of(tokenizer, prompt)
        assert tokenizer.decode(pair.answers[0]) == answer
        assert tokenizer.decode(pair.answers[1]) == "b"
