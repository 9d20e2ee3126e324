"""The batch that DeepSpeed is told of: checked against the options, then one item a step.

An item of the trainer's loader is a whole optimizer step of its rank, with as many micro-batches as
it needs. DeepSpeed may neither divide their losses nor wait for further items. So while the trainer
runs, its configuration has no accumulation, and one micro-batch of all the pairs of a step.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from dpofast.errors import ConfigError
from dpofast.zero.config import BATCH_FIELDS, checked, source

# transformers' words for what it compares a field with, where they aren't an option's name
COMPARED_WITH = {
    "train_batch_size (calculated)": (
        "per_device_train_batch_size x gradient_accumulation_steps x ranks"
    ),
    "adam_beta1+adam_beta2": "[adam_beta1, adam_beta2]",
    "fp16|fp16_full_eval": "fp16",
    "bf16|bf16_full_eval": "bf16",
}
FILE_OF_ACCELERATE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def settle_deepspeed(args: Any) -> None:
    """Compare a DeepSpeed configuration with the options, and join the ranks.

    Args:
        args: transformers' TrainingArguments with a `deepspeed_plugin`, of the option `deepspeed`
            or brought by `accelerate launch`.

    Raises:
        ConfigError: a field says other than the options.
    """
    if args.deepspeed:
        where = source(args.deepspeed)
    else:
        where = source(os.environ.get(FILE_OF_ACCELERATE))
        _adopt(args, where)
    _refuse_contradictions(args, where)
    if torch.distributed.is_initialized():
        # Nobody has told DeepSpeed on a CPU, where ZeRO-3 loads a model in parts by the ranks, too.
        from deepspeed import comm

        if not comm.is_initialized():
            comm.init_distributed(dist_backend=torch.distributed.get_backend())


def refuse_missing_launcher(args: Any) -> None:
    """Raise ConfigError where DeepSpeed is to run in a process that no launcher has started."""
    if args.deepspeed_plugin is not None and not torch.distributed.is_initialized():
        raise ConfigError(
            "deepspeed: it runs in processes that a launcher has started, also where there is but "
            "one: torchrun --nproc-per-node 1 -m dpofast train run.yaml."
        )


def _adopt(args: Any, where: str) -> None:
    """Treat a configuration that the launcher has brought as one given by the option."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    plugin = args.deepspeed_plugin
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(checked(plugin.deepspeed_config, where))
    plugin.hf_ds_config = args.hf_deepspeed_config
    plugin.deepspeed_config = args.hf_deepspeed_config.config
    args.hf_deepspeed_config.trainer_config_process(args)


def _refuse_contradictions(args: Any, where: str) -> None:
    """transformers has filled in "auto", and noted whatever else differs from the options."""
    for noted in args.hf_deepspeed_config.mismatches:
        found = re.fullmatch(r"- ds (\S+?)=(.*) vs hf (.*?)=(.*)", noted)
        if found is None:
            raise ConfigError(f"{where}: {noted.removeprefix('- ')}; make the two agree.")
        name, theirs, option, ours = found.groups()
        raise ConfigError(
            f"{where}: {name} is {theirs}, but {COMPARED_WITH.get(option, option)} is {ours}; make "
            'the two agree, or write "auto" there.'
        )


class ShownBatch:
    """A DeepSpeed configuration that shows the user's batch, and inside `one_item` that of an item.

    Args:
        plugin: accelerate's DeepSpeedPlugin with its configuration filled in; None without one.
        pairs_per_rank: of an optimizer step.
        world_size: ranks that share the step.
    """

    def __init__(self, plugin: Any, pairs_per_rank: int, world_size: int) -> None:
        self.plugin = plugin
        self.config: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
        self.shown = {name: self.config[name] for name in BATCH_FIELDS if self.config}
        sizes = (pairs_per_rank * world_size, pairs_per_rank, 1)
        self.item = dict(zip(BATCH_FIELDS, sizes, strict=True))

    @contextlib.contextmanager
    def one_item(self) -> Iterator[None]:
        """Inside, DeepSpeed reads one item a step."""
        self.config.update(self.item)
        try:
            yield
        finally:
            self.config.update(self.shown)

    def as_shown(self) -> dict[str, Any]:
        """Copies of the option's objects that show the user's batch, also inside `one_item`."""
        if self.plugin is None:
            return {}
        plugin, hf_config = copy.copy(self.plugin), copy.copy(self.plugin.hf_ds_config)
        plugin.hf_ds_config = hf_config
        plugin.deepspeed_config = hf_config.config = {**self.config, **self.shown}
        return {"deepspeed_plugin": plugin, "hf_deepspeed_config": hf_config}
