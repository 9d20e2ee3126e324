"""The training set of a run, whether it is a dataset or a stream."""

from __future__ import annotations

import logging
from typing import Any

from dpofast.data import PairStream, TokenStream, is_stream, warn_of_rerendered_prompts
from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.train.data.dataset import PairPreparer, RunDataset
from dpofast.train.data.sampler import planned_steps, train_sampler
from dpofast.train.data.stream import RunStream

logger = logging.getLogger(__name__)

TrainingSet = RunDataset | RunStream


def prepare_training_set(
    data: PairPreparer, given: Any, world_size: int | None = None
) -> TrainingSet:
    """Tokenise the training set, or the beginning of a stream, unless the run has it already.

    Args:
        data: prepares the run's datasets.
        given: pairs in any form that `load_preferences` reads; or a PairStream.
        world_size: ranks that share a step of a stream; by default those of this run.

    Raises:
        DataError: the data can't be used; names the file and the row.
        ConfigError: it is a stream, and max_steps isn't set.
    """
    known = data.known(given, RunStream)
    if known is not None:
        return known
    if not (isinstance(given, PairStream) or is_stream(given)):
        return data.prepare(given, "train")
    data.check_stream()
    stream = _prepare_stream(data, given, world_size or data.config.world_size)
    data.datasets.append(stream)
    return stream


def total_steps(config: DPOConfig, train_set: TrainingSet) -> int:
    """Number of optimizer steps in the whole run.

    Raises:
        ConfigError: there is no step to train.
    """
    if isinstance(train_set, RunStream):
        return train_set.num_steps
    # The number of steps doesn't depend on the packing, so no token limit is needed.
    epoch = train_sampler(config, len(train_set), None, prompts=train_set.prompts)
    return planned_steps(config, epoch)


def _prepare_stream(data: PairPreparer, given: Any, world_size: int) -> RunStream:
    config, name = data.config, data.free_name("train")
    if config.max_steps <= 0:
        raise ConfigError(
            f"max_steps: {name} is a stream, whose length nobody knows, so num_train_epochs can't "
            "say when the run ends; set max_steps."
        )
    if config.group_by_prompt:
        raise ConfigError(
            f"group_by_prompt: {name} is a stream, which is read in its own order, so pairs of a "
            "prompt can't be brought together; leave it out (pairs of a prompt that follow each "
            "other mostly share a step), or give a dataset without streaming."
        )
    _refuse_split_by_rank(given, config)
    _refuse_other_names(given, data)
    stream = given
    if not isinstance(given, PairStream):
        stream = PairStream(
            given,
            columns=data.columns,
            roles=data.roles,
            name=name,
            answer_pairs=config.answer_pairs,
        )
    tokens = TokenStream(
        stream,
        data.tokenizer,
        limits=config.length_limits(),
        strict=config.strict,
        skip_bad_rows=config.skip_bad_rows,
        name=name,
    )

    prepared = RunStream(name, given, tokens, config, data.check, world_size)
    first = prepared.window(0).taken
    data.say_untemplated(first.is_text, name)
    data.say_weights(first.pairs, name)
    warn_of_rerendered_prompts(prepared.report)
    if config.should_log:
        for line in _how_it_is_read(prepared):
            logger.info("%s", line)
    return prepared


def _refuse_split_by_rank(given: Any, config: DPOConfig) -> None:
    """Raise ConfigError for the result of datasets.distributed.split_dataset_by_node."""
    source = given.source if isinstance(given, PairStream) else given
    if config.world_size > 1 and getattr(source, "_distributed", None) is not None:
        raise ConfigError(
            "train_dataset was split by rank (split_dataset_by_node), but every rank reads the "
            "whole stream and takes its own part of each step; give the dataset as it was before."
        )


def _refuse_other_names(given: Any, data: PairPreparer) -> None:
    """Raise ConfigError if a PairStream doesn't have the trainer's names and `answer_pairs`."""
    for name in ("columns", "roles"):
        ours = dict(getattr(data, name) or {})
        if isinstance(given, PairStream) and ours and getattr(given, name) != ours:
            raise ConfigError(
                f"{name}: train_dataset is a PairStream, which has {name} of its own; give these "
                "to it, or pass what it was made of."
            )
    wanted = data.config.answer_pairs
    if isinstance(given, PairStream) and wanted not in (None, given.answer_pairs):
        raise ConfigError(
            f"answer_pairs: train_dataset is a PairStream, which has {given.answer_pairs!r} of its "
            "own; give this option to it, or pass what it was made of."
        )


def _how_it_is_read(stream: RunStream) -> list[str]:
    """What a user should know about the options of a run over a stream."""
    config = stream.config
    lines = [
        f"{stream.name} is a stream: max_steps {stream.num_steps}, {stream.pairs_per_step} pairs a "
        "step, in the stream's order. Its rows are read, tokenised and scored some steps ahead."
    ]
    if config.train_sampling_strategy == "random":
        lines.append(
            f"{stream.name}: a stream isn't shuffled by train_sampling_strategy: random; call "
            "dataset.shuffle(seed=..., buffer_size=...) on it if its order matters."
        )
    for option in ("dataloader_num_workers", "dataset_num_proc"):
        if getattr(config, option):
            lines.append(f"{option} has no effect on a stream, which the training process reads.")
    return lines
