"""The real preference files that tests and benchmarks use, or generated replacements.

A file is looked for in the given folder, in $DPOFAST_DATA, and in ../shared/data next to the
repository. If it isn't found, a replacement is generated from a fixed seed and reported as such. It
has the same format, number of rows and lengths, and its texts consist of invented words.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import REPOSITORY
from dpofast.data import load_preferences
from dpofast.data.reading.files import data_suffix
from dpofast.data.reading.messages import content_text, decode_messages

REAL, GENERATED = "file", "generated"
# Raise this number whenever the generated text changes: older files may still be in the cache.
GENERATOR_VERSION = 1
SEED = 20_000

_LENGTHS = Path(__file__).with_name("lengths.json")
_IDENTICAL_ROWS = (122, 226, 400, 566, 628, 676)
_ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark's command line the option `--data`."""
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the real preference files (default: $DPOFAST_DATA, then ../shared/data)",
    )


def find_data(name: str, folder: str | Path | None = None) -> tuple[Path, str]:
    """Find a preference file, or generate its replacement.

    Args:
        name: "dpo_en_demo", "instruction_preference" or "kto_en_demo".
        folder: where to look first.
    Returns:
        The path of a JSON file, and "file" or "generated".
    Raises:
        ValueError: the name is unknown.
    """
    if name not in _GENERATORS:
        raise ValueError(f"no data named {name!r}; known are {', '.join(_GENERATORS)}")
    given = (folder, os.environ.get("DPOFAST_DATA"), REPOSITORY.parent / "shared" / "data")
    for place in given:
        path = Path(place) / f"{name}.json" if place else None
        if path is not None and path.is_file():
            return path, REAL
    return generate(name), GENERATED


def generate(name: str, folder: Path | None = None) -> Path:
    """Write the generated replacement for `name`, unless it exists already.

    Args:
        name: see `find_data`.
        folder: folder of the file; by default one in Hugging Face's cache.
    Returns:
        The path of the file.
    """
    folder = folder or Path(HF_HOME) / "dpofast" / f"generated-{GENERATOR_VERSION}"
    path = folder / f"{name}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Written to another name first: several processes can come here at once.
        draft = path.with_name(f".{name}.{os.getpid()}")
        rows = _GENERATORS[name](random.Random(f"{SEED} {name}"))
        draft.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        draft.replace(path)
    return path


def training_texts(path: str | Path) -> Iterator[str]:
    """Yield every text of a preference file, to train a tokenizer on."""
    if not data_suffix(Path(path)):
        raise ValueError(f"{path} is no data file")
    for row in load_preferences(str(path)):
        for column in ("prompt", "chosen", "rejected"):
            value = row[column]
            if isinstance(value, str):
                yield value
            else:
                yield from (content_text(m.get("content")) for m in decode_messages(value or ()))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad, BOS, EOS, role tokens and a simple chat template.

    It has fewer than `vocab_size` tokens if the texts run out of pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", *_ROLE_TOKENS.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(_ROLE_TOKENS.values()),
        chat_template=_CHAT_TEMPLATE,
    )


@functools.lru_cache(maxsize=4)
def race_tokenizer(path: Path, vocab_size: int = 16_000) -> PreTrainedTokenizerFast:
    """The tokenizer of the races: a BPE trained on the texts of one preference file."""
    return train_bpe(training_texts(path), vocab_size)


class _Words:
    """Invented words with the frequencies of a language: some common, most rare."""

    def __init__(self, rng: random.Random, size: int = 14_000) -> None:
        syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r")]
        words: dict[str, None] = {}
        while len(words) < size:
            words["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3))))] = None
        self.rng, self.words = rng, list(words)
        # Zipf's law; the shift by 100 keeps the commonest words from filling every text.
        total, self.cumulative = 0.0, []
        for rank in range(size):
            total += 1 / (rank + 100)
            self.cumulative.append(total)

    def text(self, count: int) -> str:
        """A text of `count` words, about one token each for a BPE trained on these words."""
        words = self.rng.choices(self.words, cum_weights=self.cumulative, k=max(1, count))
        return " ".join(words).capitalize()


def _conversations(rng: random.Random) -> list[dict[str, Any]]:
    """300 pairs like those of dpo_en_demo.json, with their turns and token lengths."""
    words, rows = _Words(rng), []
    lengths = json.loads(_LENGTHS.read_text(encoding="utf-8"))["dpo_en_demo"]
    for roles, prompt, chosen, rejected in lengths:
        speakers = [{"s": "system", "h": "human", "g": "gpt"}[role] for role in roles]
        # Spread the prompt's tokens evenly over its turns.
        share = max(1, prompt // len(speakers))
        rows.append(
            {
                "conversations": [{"from": who, "value": words.text(share)} for who in speakers],
                "chosen": {"from": "gpt", "value": words.text(chosen)},
                "rejected": {"from": "gpt", "value": words.text(rejected)},
            }
        )
    return rows


def _instructions(rng: random.Random) -> list[dict[str, Any]]:
    """1,100 short pairs like those of instruction_preference.json, six with identical answers.

    The rejected answer is the chosen one with a few words inserted, so both begin alike.
    """
    words, rows = _Words(rng), []
    for row in range(1_100):
        chosen = words.text(rng.randint(5, 17)).split()
        place = rng.randint(0, len(chosen))
        added = [] if row in _IDENTICAL_ROWS else words.text(rng.randint(1, 4)).lower().split()
        # A changed answer also loses up to two words at that place.
        kept = chosen[place + rng.randint(0, 2) :] if added else chosen[place:]
        answer = " ".join(chosen) + "."
        rows.append(
            {
                "instruction": words.text(rng.randint(4, 14)) + ".",
                "input": words.text(rng.randint(2, 9)) if rng.random() < 0.3 else "",
                "output": answer,
                "rejected": " ".join(chosen[:place] + added + kept) + ".",
                "chosen": answer,
            }
        )
    return rows


def _unpaired(rng: random.Random) -> list[dict[str, Any]]:
    """300 rows like those of kto_en_demo.json: a conversation and whether it is good."""
    words = _Words(rng)
    return [
        {
            "messages": [
                {"content": words.text(rng.randint(15, 400)), "role": "user"},
                {"content": words.text(rng.randint(20, 300)), "role": "assistant"},
            ],
            "label": row % 2 == 0,
        }
        for row in range(300)
    ]


_GENERATORS: dict[str, Callable[[random.Random], list[dict[str, Any]]]] = {
    "dpo_en_demo": _conversations,
    "instruction_preference": _instructions,
    "kto_en_demo": _unpaired,
}
