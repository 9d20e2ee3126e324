"""The same rows give the same tokens from every source: what the chat template makes of them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpofast.data import load_preferences, tokenize_preferences
from tests.data.builders import byte_bpe

# It writes every field of a message as JSON, in the message's own order, with nulls. So any change
# of a message changes the tokens.
WHOLE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if depth is defined %}{{ depth }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m | tojson }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# It takes text or blocks, as the templates of vision models do.
BLOCKS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for b in m['content'] or [] %}{{ b['text'] }}{% endfor %}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# It takes only text, and writes anything else as Python does.
TEXT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ (m['content'] or '') | trim }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ["user", "assistant", "tool", "observation", "ipython", "Human", "model", " user "]
# The long count takes minutes, as every row goes through ten sources.
COUNTS = [8, pytest.param(300, marks=pytest.mark.slow)]
TEMPLATES = {"whole": WHOLE, "blocks": BLOCKS, "text": TEXT}


class Rows:
    """Random rows that Arrow can hold: the same key has values of the same type everywhere."""

    def __init__(self, seed: int, nulls: bool) -> None:
        self.random, self.nulls = random.Random(seed), nulls

    def text(self) -> str:
        alphabet = "abc XYZ 019 äß中🙂 \n\t\"'\\{}[]<|>é"
        return "t" + "".join(self.random.choices(alphabet, k=self.random.randrange(9)))

    def maybe(self, *fields: tuple[str, Any]) -> dict[str, Any]:
        """Some of the fields, in the given order; with nulls in the place of some of them."""
        chosen = {}
        for name, make in fields:
            draw = self.random.random()
            if draw < 0.6:
                chosen[name] = make()
            elif draw < 0.75 and self.nulls:
                chosen[name] = None
        return chosen

    def arguments(self, depth: int = 2) -> dict[str, Any]:
        fields: list[tuple[str, Any]] = [
            ("unit", self.text),
            ("city", self.text),
            ("count", lambda: self.random.randrange(-9, 10**9)),
            ("share", self.random.random),
            ("exact", lambda: self.random.random() < 0.5),
            ("days", lambda: [self.text() for _ in range(self.random.randrange(3))]),
        ]
        if depth:
            fields.append(("more", lambda: self.arguments(depth - 1)))
        return self.maybe(*fields)

    def call(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "arguments": self.arguments()}}

    def message(self, role: str, blocks: bool) -> dict[str, Any]:
        content: Any = self.text()
        if blocks:
            content = [{"type": "text", "text": self.text()} for _ in range(2)]
        calls = ("tool_calls", lambda: [self.call() for _ in range(self.random.randrange(1, 3))])
        return {"role": role, "content": content, **self.maybe(calls, ("name", self.text))}

    def conversation(self, blocks: bool) -> list[dict[str, Any]]:
        system = [self.message("system", blocks)] if self.random.random() < 0.4 else []
        roles = self.random.choices(ROLES, k=self.random.randrange(3))
        turns = [self.message(role, blocks) for role in roles]
        return [*system, *turns, self.message("user", blocks)]

    def row(self, blocks: bool) -> dict[str, Any]:
        answers = {
            column: [{**self.message("assistant", blocks), "content": content}]
            for column, content in (("chosen", "good" + self.text()), ("rejected", self.text()))
        }
        if blocks:
            for answer in answers.values():
                answer[0]["content"] = [{"type": "text", "text": answer[0]["content"]}]
        tools = [{"type": "function", "function": {"name": "f", "parameters": self.arguments()}}]
        options = {"depth": self.random.randrange(9)}
        return {
            "prompt": self.conversation(blocks),
            **answers,
            **self.maybe(("tools", lambda: tools), ("chat_template_kwargs", lambda: options)),
        }


def full_row(blocks: bool) -> dict[str, Any]:
    """A row with every field, so that Arrow's structs have the fields in the order of the rows."""

    class Full(Rows):
        def maybe(self, *fields: tuple[str, Any]) -> dict[str, Any]:
            return {name: make() for name, make in fields}

    full = Full(0, False)
    row = full.row(blocks)
    row["prompt"] = [full.message("system", blocks), full.message("user", blocks)]
    return row


def random_rows(count: int, seed: int, *, nulls: bool, blocks: bool) -> list[dict[str, Any]]:
    rows = Rows(seed, nulls)
    return [full_row(blocks), *(rows.row(blocks) for _ in range(count - 1))]


def json_sources(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Sources that keep every value of the rows, nulls included."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "array.json").write_text(json.dumps(rows))
    (folder / "lines.json").write_text(lines)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({name: json.dumps(value) for name, value in row.items()} for row in rows)
    # A column of JSON, as `datasets` and the hub have it.
    table = pa.table(
        {
            name: pa.array(
                [None if row.get(name) is None else json.dumps(row[name]) for row in rows],
                pa.string(),
            ).cast(pa.json_())
            for name in names
        }
    )
    pa.parquet.write_table(table, folder / "json.parquet")
    files = {path.name: path for path in folder.iterdir()}
    return {"list": rows, "Dataset of JSON": datasets.Dataset(table), **files}


def arrow_sources(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Sources with structs, in which every row has the fields of all rows."""
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    table = dataset.with_format("arrow")[:]
    with pa.ipc.new_file(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    files = {name: folder / name for name in ("rows.parquet", "rows.arrow", "saved")}
    splits = datasets.DatasetDict(train=dataset)
    return {"Dataset": dataset, "DatasetDict": splits, **files}


def texts_of(source: Any, tokenizer: Any) -> list[tuple[str, str, str]]:
    pairs, _ = tokenize_preferences(load_preferences(source), tokenizer, max_length=None)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tuple(tokenizer.decode(pair[c]) for c in columns) for pair in pairs]


def expected(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[str, str, str]]:
    """What the template makes of the messages as they are in the rows."""

    def render(row: dict[str, Any], answer: str | None) -> str:
        messages = row["prompt"] + (row[answer] if answer else [])
        options = {**(row.get("chat_template_kwargs") or {}), "tools": row.get("tools")}
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None, **options
        )

    texts = []
    for row in rows:
        prompt, *wholes = (render(row, answer) for answer in (None, "chosen", "rejected"))
        assert all(whole.startswith(prompt) for whole in wholes)
        texts.append((prompt, *(whole[len(prompt) :] for whole in wholes)))
    return texts


def all_sources(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    return json_sources(rows, folder) | arrow_sources(rows, folder)


def check(sources: dict[str, Any], template: str, rows: list[dict[str, Any]]) -> None:
    """Compare what is made of each source with what the template makes of `rows`."""
    tokenizer = byte_bpe(chat_template=template)
    wanted = expected(rows, tokenizer)
    for name, source in sources.items():
        assert texts_of(source, tokenizer) == wanted, name


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.slow
def test_json_in_any_file_gives_the_tokens_of_the_template(tmp_path, template, count):
    rows = random_rows(count, seed=1, nulls=True, blocks=False)
    check(json_sources(rows, tmp_path), template, rows)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.slow
def test_structs_of_arrow_give_the_tokens_of_the_template(tmp_path, template, count):
    rows = random_rows(count, seed=2, nulls=False, blocks=False)
    check(arrow_sources(rows, tmp_path), template, rows)


@pytest.mark.parametrize("count", COUNTS)
def test_blocks_reach_a_template_that_takes_them(tmp_path, count):
    rows = random_rows(count, seed=3, nulls=False, blocks=True)
    check(all_sources(rows, tmp_path), BLOCKS, rows)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.slow
def test_blocks_become_text_for_a_template_that_takes_only_text(tmp_path, count):
    rows = random_rows(count, seed=3, nulls=False, blocks=True)
    flat = json.loads(json.dumps(rows))
    for row in flat:
        for message in (m for column in ("prompt", "chosen", "rejected") for m in row[column]):
            message["content"] = "".join(block["text"] for block in message["content"])
    check(all_sources(rows, tmp_path), TEXT, flat)


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.booleans())
def test_any_rows(tmp_path_factory, seed, blocks):
    rows = random_rows(4, seed, nulls=False, blocks=blocks)
    check(all_sources(rows, tmp_path_factory.mktemp("rows")), WHOLE, rows)
