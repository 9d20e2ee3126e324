"""Any content becomes pairs with an exact boundary, or one DataError."""

from __future__ import annotations

import json

import datasets
import datasets.exceptions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.data.reading.formats import COLUMNS
from dpofast.errors import DataError
from tests.data.builders import CHAT_TEMPLATE, byte_bpe

datasets.disable_progress_bars()

MERGES = (("a", "b"), ("b", "b"), ("ab", "a"), ("Ġ", "a"), ("Ċ", "Ċ"), (">", "a"), (":", "Ġ"))
TOKENIZER = byte_bpe(MERGES, bos=True, chat_template=CHAT_TEMPLATE)
PLAIN_TOKENIZER = byte_bpe(MERGES)
quick = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

pieces = st.sampled_from(
    ["a", "b", " ", "\n", "\n\nAssistant:", "\n\nHuman:", "é", "😊", "</s>", "<s>"]
)
texts = st.one_of(st.lists(pieces, max_size=6).map("".join), st.text(max_size=6))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner),
    ),
    max_leaves=8,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts},
    optional={"name": texts, "tool_calls": st.lists(anything, max_size=1)},
)
turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "Human"]), "value": texts}
)
messages = st.lists(message, max_size=3)
answer = st.one_of(texts, message, messages)
SHAPES = (
    {"prompt": texts, "chosen": texts, "rejected": texts},
    {"prompt": messages, "chosen": answer, "rejected": answer},
    {"chosen": texts, "rejected": texts},
    {"chosen": messages, "rejected": messages},
    {"messages": messages, "chosen": answer, "rejected": answer},
    {"conversations": st.lists(turn, max_size=3), "chosen": turn, "rejected": turn},
    {"instruction": texts, "input": texts, "chosen": texts, "rejected": texts},
    {"messages": messages, "rejected_response": st.one_of(texts, st.lists(answer, max_size=3))},
    {"prompt": st.one_of(texts, messages), "chosen": answer, "rejected": st.lists(answer)},
    {"system": texts, "prompt": st.one_of(texts, messages), "chosen": messages, "rejected": answer},
    {
        "input": st.fixed_dictionaries({"messages": messages}),
        "preferred_output": answer,
        "non_preferred_output": answer,
    },
    dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), st.lists(st.integers(0, 300))),
    {
        f"{name}_{kind}": st.lists(st.integers(*bounds), max_size=2)
        for name in ("prompt", "chosen", "rejected")
        for kind, bounds in (("input_ids", (0, 300)), ("attention_mask", (1, 1)))
    },
)
rows = st.one_of(*(st.fixed_dictionaries(shape) for shape in SHAPES))


def check(source):
    """Read and tokenise with each tokenizer; accept a DataError, else check the boundary."""
    try:
        pairs = load_preferences(source)
    except DataError:
        return
    assert load_preferences(pairs.to_list()).to_list() == pairs.to_list(), "read once or twice"
    # A row with several rejected answers has several pairs. Here, each pair has its own number.
    pairs = pairs.remove_columns("row").add_column("row", list(range(len(pairs))))
    for tokenizer in (TOKENIZER, PLAIN_TOKENIZER):
        try:
            tokens, report = tokenize_preferences(pairs, tokenizer, max_length=None)
        except DataError:
            continue
        assert report.pairs_read == len(pairs)
        assert len(tokens) + sum(map(len, report.left_out.values())) == len(pairs)
        for pair in tokens:
            check_boundary(pair, pairs[pair["row"]], tokenizer)


def check_boundary(pair, row, tokenizer):
    assert pair["prompt_ids"]
    assert pair["chosen_ids"]
    assert pair["rejected_ids"]
    assert pair["chosen_ids"] != pair["rejected_ids"]
    if not isinstance(row.get("prompt"), str):
        return
    bos = [tokenizer.bos_token_id] if tokenizer is TOKENIZER else []
    alone = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    assert pair["prompt_ids"] in (bos + alone, alone)
    assert pair["prompt_ids"][: len(bos)] == bos
    for column in ("chosen", "rejected"):
        text = tokenizer.decode(pair[f"{column}_ids"]).rstrip().removesuffix("</s>")
        # With an empty prompt, a BOS that begins the answer becomes the prompt.
        written = row[column] if row["prompt"] or not bos else row[column].removeprefix("<s>")
        assert text.rstrip() == written.rstrip().removesuffix("</s>").rstrip()


@given(rows)
@quick
def test_rows_of_every_format(row):
    check([row])


@given(st.dictionaries(st.sampled_from(COLUMNS), anything))
@quick
def test_any_value_in_any_column(row):
    check([row])


@given(st.lists(rows, max_size=4))
@quick
def test_rows_of_several_formats(several):
    check(several)


@given(rows, st.sampled_from(["pairs.json", "pairs.jsonl"]), st.data())
@quick
def test_files_that_were_damaged(tmp_path, row, name, data):
    text = json.dumps([row]) if name.endswith(".json") else json.dumps(row)
    place = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(place, len(text)))
    damage = data.draw(st.text(max_size=3).filter(lambda s: s.isprintable()))
    path = tmp_path / name
    path.write_text(text[:place] + damage + text[end:], encoding="utf-8")
    check(path)


@given(st.binary(max_size=40), st.sampled_from(["json", "jsonl", "csv", "parquet", "arrow"]))
@quick
def test_files_of_any_bytes(tmp_path, content, ending):
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(content)
    check(path)


@given(rows)
@quick
def test_rows_that_went_through_arrow(row):
    try:
        dataset = datasets.Dataset.from_list([row])
    except (ValueError, TypeError, OverflowError, datasets.exceptions.DatasetsError):
        return  # `datasets` itself can't hold it
    check(dataset)
