"""Trains a tiny model of a family by `dpofast train`, and loads what was saved."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpofast.cli import main
from dpofast.cli import train as train_command
from dpofast.model.parts import body_of
from dpofast.model.unreached import reached_modules
from tests.cli.runs import run_arguments
from tests.families import FAMILIES, tiny_model

_SPECIAL = ("<pad>", "<s>", "</s>")
_CHARACTERS = string.ascii_letters + " .,"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per letter: fewer than the tiny models have rows for."""
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@dataclass(frozen=True)
class TrainedFamily:
    """What came out of two steps of `dpofast train`.

    Attributes:
        layout: name of the layout that the run took.
        start, trained: the model as it was stored before, and as it was in memory at the end.
        loaded: the model as transformers loads it from the run's folder.
    """

    layout: str
    start: Any
    trained: Any
    loaded: Any


def exists(family: str) -> bool:
    """Whether this version of transformers has the family."""
    return hasattr(transformers, FAMILIES[family][0])


def train_family(family: str, folder: Path, *options: str) -> TrainedFamily:
    """Train a family's tiny model for two steps on its text, by the command line.

    Args:
        family: key of FAMILIES.
        folder: an empty folder.
        options: more arguments of `dpofast train`.
    """
    stored, made = folder / "model", []
    tiny_model(family).save_pretrained(stored)
    small_tokenizer().save_pretrained(stored)

    def make_trainer(*args: Any) -> Any:
        made.append(own(*args))
        return made[0]

    own = train_command.make_trainer
    with mock.patch.object(train_command, "make_trainer", make_trainer):
        assert main(run_arguments(folder, stored, "--save_strategy=no", *options)) == 0
    (trainer,) = made
    start, loaded = (
        AutoModelForCausalLM.from_pretrained(each) for each in (stored, folder / "run")
    )
    return TrainedFamily(trainer.layout.name, start, trainer.model, loaded)
