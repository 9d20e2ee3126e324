"""Small tokenizers of several kinds, data files of every format, and short forms of messages."""

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpofast.columns import PAIR_COLUMNS
from dpofast.data.reading.messages import decode_messages

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Puts a thought after the generation prompt, but not into finished conversations.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "'<|assistant|>' }}{% endif", "'<|assistant|><t>' }}{% endif"
)


def byte_bpe(
    merges: tuple[tuple[str, str], ...] = (),
    *,
    bos: bool = False,
    eos: bool = False,
    prefix_space: bool = False,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges can cross words and blanks.

    Args:
        merges: the only merges it knows.
        bos, eos: add these tokens to every text.
        prefix_space: put a blank before every text, as SentencePiece models do.
        chat_template: the chat template, if it has one.
    """
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = specials + alphabet + [first + second for first, second in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if bos or eos:
        template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return _wrap(tokenizer, chat_template)


def word_level(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, the same at any place in a text."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *words.split()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(tokens[:4])
    return _wrap(tokenizer, None)


def metaspace(words: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece: letters, the given pieces, and a blank before every text."""
    letters = "▁abcdefghijklmnopqrstuvwxyz<|>/"
    pieces = [*letters, *words.split()]
    scores = [-4.0] * len(letters) + [-1.0] * (len(pieces) - len(letters))
    vocab = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    tokenizer = Tokenizer(models.Unigram([*vocab, *zip(pieces, scores, strict=True)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _wrap(tokenizer, chat_template)


def _wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a data file in the format that its ending names."""
    lines = "\n".join(json.dumps(row) for row in rows)
    table = pa.Table.from_pylist(rows)
    match path.name.partition(".")[2]:
        case "json":
            path.write_text(json.dumps(rows, indent=2))
        case "jsonl" | "ndjson" | "lines.json":
            path.write_text(f"{lines}\n\n")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "parquet":
            pa.parquet.write_table(table, path)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        case "stream.arrow":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        case "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    return path


def plain_rows(pairs: datasets.Dataset) -> list[dict[str, Any]]:
    """The rows of the normal form, with the messages decoded."""
    rows = pairs.to_list()
    for row in rows:
        for column in PAIR_COLUMNS:
            if isinstance(row.get(column), list):
                row[column] = decode_messages(row[column])
    return rows


def ids_row(prompt: int, chosen: int, rejected: int) -> dict[str, list[int]]:
    """A tokenised pair of these lengths, whose answers differ from their first token on."""
    return {
        "prompt_ids": list(range(10, 10 + prompt)),
        "chosen_ids": list(range(50, 50 + chosen)),
        "rejected_ids": list(range(90, 90 + rejected)),
    }


def random_rows(count: int) -> list[dict[str, list[int]]]:
    rng = random.Random(3)
    return [ids_row(*(rng.randint(1, 30) for _ in range(3))) for _ in range(count)]
