"""Finds out before training what would keep its result from being saved, and checks what was saved.

Nothing here writes weights. Small files are written to a temporary folder, just as they will be
written at the end.
"""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dpofast.errors import ConfigError, DPOFastError, ModelError, one_line
from dpofast.model.model_types import PAD_ROW_LOST
from dpofast.model.parts import causal_lm, is_peft_model
from dpofast.model.saved_names import can_have_pad, difference_in_files, difference_in_memory
from dpofast.model.vocabulary import vocabulary_of
from dpofast.monitor.card import CARD_FILE
from dpofast.options.config import DPOConfig
from dpofast.zero.weights import spread

logger = logging.getLogger(__name__)


def check_saving(model: nn.Module, tokenizer: Any, config: DPOConfig) -> None:
    """Runs before the first step all parts of a save but the weights.

    Args:
        model: the policy.
        tokenizer: tokenizer, which is saved with it.
        config: options of the run.

    Raises:
        ConfigError: the options can't be saved.
        ModelError: the model, its generation config or its tokenizer can't be saved, or not in a
            way that from_pretrained could load. Or it would lose the end of an answer in loading.
    """
    _refuse_pad_without_row(model, tokenizer)
    _check_pad_row(model, tokenizer)
    _check_names(model)
    with tempfile.TemporaryDirectory() as folder:
        card = Path(config.output_dir) / CARD_FILE
        if card.is_file():  # peft reads it and writes it again
            shutil.copy(card, folder)
        for what, save in _small_saves(model, tokenizer, folder):
            with _refusing(what):
                save()
    with _refusing("The options (training_args.bin)", ConfigError):
        pickle.dumps(config)


def check_saved(folder: str | Path, model: nn.Module) -> None:
    """Compares the tensors in a saved model's files with those that from_pretrained expects.

    Args:
        folder: folder that the trainer has written.
        model: the policy.

    Raises:
        ModelError: from_pretrained would fill some of the weights at random. The files stay.
    """
    difference = difference_in_files(folder, model)
    if difference.is_harmful:
        raise ModelError(
            f"{folder}: the saved tensors aren't those that from_pretrained expects of "
            f"{type(causal_lm(model)).__name__}: {difference}. The files are kept, and hold the "
            "trained weights; rename the tensors before loading them."
        )
    if difference:
        logger.warning("%s: from_pretrained will leave tensors unread: %s.", folder, difference)


def _check_names(model: nn.Module) -> None:
    difference = difference_in_memory(model)
    if difference.is_harmful:
        raise ModelError(
            f"{type(causal_lm(model)).__name__}: its tensors aren't those of a new model of its "
            f"class and config, so from_pretrained couldn't load what is saved: {difference}. Was "
            "a module wrapped, taken out, resized or tied? Undo that, or change the config with it."
        )
    if difference:
        logger.warning(
            "The model has tensors that from_pretrained will leave unread: %s.", difference
        )


def _refuse_pad_without_row(model: nn.Module, tokenizer: Any) -> None:
    """Raises ModelError if the pad id that is saved in the config has no row in the embedding."""
    if is_peft_model(model):  # the config of the base isn't saved
        return
    vocabulary, pad = vocabulary_of(model), tokenizer.pad_token_id
    has_row = pad is None or 0 <= pad < vocabulary.size
    if not has_row and not can_have_pad(model, pad):
        raise ModelError(
            f"The tokenizer's pad token {tokenizer.pad_token!r} has the id {pad}, which is not one "
            f"of the {vocabulary.size} of {vocabulary.model}, so the saved model couldn't be "
            "loaded: give the model a row for it with "
            "model.resize_token_embeddings(len(tokenizer)), or set pad_token to a token that has "
            "one."
        )


def _check_pad_row(model: nn.Module, tokenizer: Any) -> None:
    """Says what loading does to the pad token's embedding, and refuses if answers end with it."""
    lm = causal_lm(model)
    if is_peft_model(model) or lm.config.model_type not in PAD_ROW_LOST:
        return
    name = type(lm).__name__
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"transformers sets the embedding of the pad token to 0 whenever it loads {name}, and "
            f"the tokenizer's pad token is its eos_token {tokenizer.eos_token!r}, with which "
            "answers end; set pad_token to another token."
        )
    logger.warning(
        "transformers will set the embedding of the pad token to 0 when it loads the saved %s.",
        name,
    )


def _small_saves(model: Any, tokenizer: Any, folder: str) -> Iterator[tuple[str, Any]]:
    """What is saved beside the weights, each with a function that saves it."""
    lm = causal_lm(model)
    if is_peft_model(model):
        yield f"The model card ({CARD_FILE})", lambda: model.create_or_update_model_card(folder)
        for name, adapter in model.peft_config.items():
            config = copy.deepcopy(adapter)
            yield f"The config of the adapter {name!r}", lambda c=config: c.save_pretrained(folder)
    else:
        yield "The config", lambda: copy.deepcopy(lm.config).save_pretrained(folder)
        if lm.can_generate():
            yield (
                "The generation config (model.generation_config, or generation_config.json in the "
                "model's folder)",
                lambda: _aligned(lm.generation_config, tokenizer).save_pretrained(folder),
            )
        yield "The weights", lambda: _refuse_shared(lm)
    yield "The tokenizer", lambda: tokenizer.save_pretrained(folder)


def _aligned(generation_config: Any, tokenizer: Any) -> Any:
    """A copy with the tokenizer's special tokens, which the Trainer sets when training begins.

    transformers saves a config with smaller faults only if nothing in it was changed.
    """
    generation_config = copy.deepcopy(generation_config)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        own, known = getattr(tokenizer, name), getattr(generation_config, name)
        if own is not None and own not in (known if isinstance(known, list) else [known]):
            setattr(generation_config, name, own)
    return generation_config


def _refuse_shared(lm: nn.Module) -> None:
    """Raises transformers' error if weights share memory in a way that safetensors can't save."""
    from transformers import modeling_utils

    check = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if check is not None and not spread(lm.parameters()):  # shards have no memory of their own
        check(dict(lm.state_dict()), lm)


@contextmanager
def _refusing(what: str, kind: type[DPOFastError] = ModelError) -> Iterator[None]:
    """Turns any failure inside the `with` block into an error of ours that says what fails."""
    try:
        yield
    except Exception as error:  # tokenizers and configs with code of their own can raise anything
        reason = one_line(error).rstrip(".")
        raise kind(
            f"{what} couldn't be saved after training: {reason}. Mend that first."
        ) from error
