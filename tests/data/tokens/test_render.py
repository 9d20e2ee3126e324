"""What a chat template makes of blocks, of null contents and of text that it doesn't write."""

from __future__ import annotations

import json
import logging

import pytest

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.reading.row_error import RowError
from dpofast.data.tokens.boundary import RowTexts
from dpofast.data.tokens.render import render_row_texts, texts_missing
from dpofast.errors import DataError
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, system, user

END = "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
HEAD = "{% for m in messages %}<|{{ m['role'] }}|>"
# How templates write a content; blocks are right in none of them.
TEXT_ONLY = {
    "trim": "{{ m['content'] | trim }}",
    "print": "{{ m['content'] }}",
    "tilde": "{{ m['role'] ~ m['content'] }}",
    "plus": "{{ '' + m['content'] }}",
    "string": "{{ m['content'] | string }}",
    "format": "{{ '%s' | format(m['content']) }}",
    "leaves out": "{% if m['content'] is string %}{{ m['content'] }}{% endif %}",
}
WITH_BLOCKS = {
    "loop": "{% for b in m['content'] %}{{ b.text }}{% endfor %}",
    "typed": (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for b in m['content'] if b.type == 'text' %}{{ b['text'] }}{% endfor %}{% endif %}"
    ),
    "json": "{{ m['content'] | tojson }}",
}


def blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


def tokenise(rows, content, **options):
    tokenizer = byte_bpe(chat_template=HEAD + content + END)
    pairs, report = tokenize_preferences(
        load_preferences(rows), tokenizer, max_length=None, **options
    )
    texts = [
        [tokenizer.decode(pair[c]) for c in ("prompt_ids", "chosen_ids", "rejected_ids")]
        for pair in pairs
    ]
    return texts, report


ROW = {
    "prompt": [system(blocks("Be ", "short.")), user(blocks("hi"))],
    "chosen": [assistant(blocks("yo"))],
    "rejected": [assistant("hm")],
}


@pytest.mark.parametrize("content", TEXT_ONLY.values(), ids=TEXT_ONLY.keys())
def test_blocks_become_text_where_a_template_wants_text(content):
    flat = {
        "prompt": [system("Be short."), user("hi")],
        "chosen": [assistant("yo")],
        "rejected": [assistant("hm")],
    }
    assert tokenise([ROW], content)[0] == tokenise([flat], content)[0]


@pytest.mark.parametrize("content", WITH_BLOCKS.values(), ids=WITH_BLOCKS.keys())
def test_blocks_stay_blocks_where_a_template_takes_them(content):
    row = {**ROW, "rejected": [assistant(blocks("hm"))]}
    tokenizer = byte_bpe(chat_template=HEAD + content + END)
    ((prompt, chosen, _),) = tokenise([row], content)[0]
    messages = row["prompt"] + row["chosen"]
    assert prompt + chosen == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_short_block_is_not_found_within_a_longer_text():
    prompt = [system(blocks("income tax")), user(blocks("a question that is long: ", "tax"))]
    answers = [[assistant(blocks("yo"))], [assistant(blocks("hm"))]]
    wholes = [json.dumps(prompt + answer) for answer in answers]
    texts = RowTexts("", tuple(wholes))
    assert texts_missing([prompt, *answers], texts) == []
    texts = RowTexts("", tuple(whole.replace("income", "") for whole in wholes))
    assert texts_missing([prompt, *answers], texts) == [prompt[0]]


def test_a_text_that_looks_like_a_block_is_only_text():
    row = {**ROW, "prompt": [user("what is {'type': 'text', 'text': 'hi'}?")]}
    row["chosen"] = [assistant("a block")]
    assert "{'type': 'text'" in tokenise([row], TEXT_ONLY["trim"])[0][0][0]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


class OldTokenizer:
    """Renders a null as older versions of transformers do; newer ones leave the field out."""

    chat_template = "not empty"

    def apply_chat_template(self, messages, **_):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def test_a_null_content_that_is_written_as_none_is_refused():
    row = {"prompt": [user("None of them?"), CALL, user("so?")], "chosen": "a", "rejected": "b"}
    (loaded,) = load_preferences([row])
    with pytest.raises(RowError, match="which is null, as 'None'"):
        render_row_texts(loaded, OldTokenizer())
    (loaded,) = load_preferences([{**row, "prompt": [user("None of them?"), user("so?")]}])
    assert render_row_texts(loaded, OldTokenizer()).prompt == "<user>None of them?<user>so?"


@pytest.mark.parametrize("quote", ["'", '"'])
def test_blocks_that_are_written_as_text_are_refused(quote):
    content = "[{'type': 'text', 'text': 'hi'}]".replace("'", quote)
    with pytest.raises(DataError, match=r"content of prompt\[0\] is a list of blocks written as"):
        load_preferences([{**ROW, "prompt": [user(content)]}])


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_an_answer_that_the_template_does_not_write_is_refused(column):
    call = {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    row = {"prompt": [user("q")], "chosen": "x", "rejected": "y", column: [call]}
    with pytest.raises(DataError, match=f"{column} has no text, .*doesn't write its tool_calls"):
        tokenise([row], "{{ m['content'] }}")
    written = "{{ m['content'] }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
    assert "f" in "".join(tokenise([row], written)[0][0])


def test_an_empty_list_of_blocks_is_an_empty_text():
    row = {**ROW, "prompt": [system([]), user("hi")]}
    assert "[" not in tokenise([row], TEXT_ONLY["print"])[0][0][0]


LOSSY = {
    "unknown role": (
        "{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}{% endif %}",
        [{"role": "narrator", "content": "It rains."}, user("hi")],
        "narrator",
    ),
    "no system": (
        "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}",
        [system("Be short."), user("hi")],
        "system",
    ),
    "earlier thinking": (
        "{{ m['content'].split('</think>')[-1] }}",
        [user("a"), assistant("<think>b</think>c"), user("hi")],
        "assistant",
    ),
}


@pytest.mark.parametrize(("content", "prompt", "role"), LOSSY.values(), ids=LOSSY.keys())
def test_text_that_a_template_leaves_out_is_one_warning(caplog, content, prompt, role):
    rows = [{"prompt": prompt, "chosen": f"good {i}", "rejected": "bad"} for i in range(30)]
    with caplog.at_level(logging.WARNING):
        assert len(tokenise(rows, content, name="pairs")[0]) == 30
    (warning,) = [r.getMessage() for r in caplog.records if "leaves out text" in r.getMessage()]
    assert "pairs, row 0 (counted from 0)" in warning
    assert repr(role) in warning


def test_a_row_of_another_shape_is_looked_at_wherever_it_is(caplog):
    rows = [{"prompt": [user("a")], "chosen": "good", "rejected": "bad"} for _ in range(40)]
    rows[30] = {**rows[30], "prompt": [system("a hint"), user("this is a hint")]}
    with caplog.at_level(logging.WARNING):
        tokenise(rows, LOSSY["no system"][0])
    (warning,) = [r.getMessage() for r in caplog.records if "leaves out text" in r.getMessage()]
    assert "row 30 " in warning


WRITTEN = ["| trim", "| tojson", "| upper", "| e"]


@pytest.mark.parametrize("content", [f"{{{{ m['content'] {how} }}}}" for how in WRITTEN])
def test_text_that_is_there_is_no_warning(caplog, content):
    prompt = [system(" two\n\nlines\t\"quoted\" 'é' 🙂 "), user("<a> & b")]
    with caplog.at_level(logging.WARNING):
        tokenise([{"prompt": prompt, "chosen": "yo ", "rejected": " hm"}], content)
    assert not [r for r in caplog.records if "leaves out text" in r.getMessage()]


def test_a_tokenizer_without_template_stops_at_once():
    with pytest.raises(DataError, match=r"train, row 0 .*has no chat template"):
        tokenize_preferences(load_preferences([ROW] * 3), byte_bpe(), max_length=None)
    assert CHAT_TEMPLATE
