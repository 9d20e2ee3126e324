"""Trains tiny models by `dpofast train`, and loads what was saved.

`python -m tests.trained_families` does so for every model type that docs/model-types.md doesn't
call trained with this version of transformers, and writes the page. After an interruption, it goes
on where it was. With model types as arguments, it trains these.
"""

from __future__ import annotations

import contextlib
import re
import string
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpofast.cli import main
from dpofast.cli import train as train_command
from dpofast.model.model_types import PACKABLE, PAD_ROW_LOST
from dpofast.model.parts import body_of
from dpofast.model.unreached import reached_modules
from tests.cli.runs import run_arguments
from tests.families import FAMILIES, tiny_model
from tests.model_types import PAGE, TRAINABLE, trained_with, type_when_loaded, with_tables

_SPECIAL = ("<pad>", "<s>", "</s>")
_CHARACTERS = string.ascii_letters + " .,"
# Parameters that get no gradient though text reaches them: an indexer chooses tokens and a bias of
# the routers' choice chooses experts, which has no gradient; HRM's first state is a constant.
_WITHOUT_GRADIENT = re.compile(r"\.indexer\.|correction_bias$|expert_bias$|z_L_init$")
_REPORTS = "dpofast.train.reports.reports_run"


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


def family_of_each_type() -> dict[str, str]:
    """By model type, the first of FAMILIES that is of it; types that are too new have none."""
    found: dict[str, str] = {}
    for family, (class_name, _) in FAMILIES.items():
        if (config_class := getattr(transformers, class_name, None)) is not None:
            found.setdefault(type_when_loaded(config_class.model_type), family)
    return {each: family for each, family in found.items() if each in TRAINABLE}


@dataclass(frozen=True)
class TrainedFamily:
    """What came out of two steps of `dpofast train`.

    Attributes:
        layout: name of the layout that the run took.
        start: the model as it was stored before.
        trained: the model as it was in memory at the end.
        loaded: the model as transformers loads it from the run's folder.
    """

    layout: str
    start: Any
    trained: Any
    loaded: Any


def train_family(family: str, folder: Path, *options: str) -> TrainedFamily:
    """Train a family's tiny model for two steps on text, by the command line.

    Args:
        family: key of FAMILIES.
        folder: an empty folder.
        options: more arguments of `dpofast train`.
    """
    stored, run, made = folder / "model", folder / "run", []
    model = tiny_model(family)
    model.save_pretrained(stored)
    small_tokenizer().save_pretrained(stored)
    more = ["--save_strategy=no", *options]
    make_trainer = train_command.make_trainer

    def kept(*arguments: Any) -> Any:
        made.append(make_trainer(*arguments))
        return made[0]

    with mock.patch.object(train_command, "make_trainer", kept):
        assert main(run_arguments(folder, stored, *more)) == 0, "the run has failed"
    (trainer,) = made
    start, loaded = (AutoModelForCausalLM.from_pretrained(each) for each in (stored, run))
    return TrainedFamily(trainer.layout.name, start, trainer.model, loaded)


def check_trained(result: TrainedFamily) -> None:
    """Assert that text trained what it reaches, and that all of it was saved and can be loaded."""
    start, trained, loaded = result.start, result.trained, result.loaded
    assert type(start) is type(trained) is type(loaded)
    model_type = type_when_loaded(trained.config.model_type)
    assert result.layout == ("shared" if model_type in PACKABLE else "padded")
    reached = {
        id(parameter)
        for part in (body_of(trained), trained.get_output_embeddings())
        for _, module in reached_modules(part)
        for parameter in module.parameters(recurse=False)
    }
    with _pad_rows_kept(result):
        before, after = start.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in trained.state_dict().items():
            assert torch.equal(after[name], tensor), f"{name} isn't loaded as it was trained"
        for name, parameter in trained.named_parameters():
            has_changed = not torch.equal(after[name], before[name])
            is_trained = id(parameter) in reached and not _WITHOUT_GRADIENT.search(name)
            assert has_changed == is_trained, f"{name} has changed: {has_changed}"
        assert torch.equal(_logits(loaded), _logits(trained))


@contextlib.contextmanager
def _pad_rows_kept(result: TrainedFamily) -> Iterator[None]:
    """Gives the loaded model the row of the pad token that transformers sets to 0, if it does."""
    if result.trained.config.model_type in PAD_ROW_LOST:
        pad = result.trained.config.pad_token_id
        rows: Tensor = result.loaded.get_input_embeddings().weight
        with torch.no_grad():
            assert not rows[pad].any()
            rows[pad] = result.trained.get_input_embeddings().weight[pad]
    yield


def _logits(model: Any) -> Tensor:
    """[1, 20, V]: logits of a few tokens."""
    input_ids = torch.arange(20)[None] * 7 % len(_CHARACTERS) + len(_SPECIAL)
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=input_ids, use_cache=False).logits
    return logits


def train_and_write(model_types: list[str]) -> int:
    """Train types one after the other, and write down in docs/model-types.md which could be.

    Returns:
        How many could not.
    """
    families, failed = family_of_each_type(), 0
    for model_type in model_types:
        trained = trained_with(PAGE.read_text(encoding="utf-8"))
        trained.pop(model_type, None)
        try:
            with tempfile.TemporaryDirectory() as folder, mock.patch(f"{_REPORTS}.plot_run"):
                check_trained(train_family(families[model_type], Path(folder)))
            trained[model_type] = transformers.__version__
        except Exception:
            traceback.print_exc()
            failed += 1
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_tables(page, trained), encoding="utf-8")
        print(f"{model_type}: {'trained' if model_type in trained else 'FAILED'}", flush=True)
    return failed


if __name__ == "__main__":
    known = trained_with(PAGE.read_text(encoding="utf-8"))
    new = [
        each
        for each in sorted(family_of_each_type())
        if known.get(each) != transformers.__version__
    ]
    sys.exit(train_and_write(sys.argv[1:] or new))
