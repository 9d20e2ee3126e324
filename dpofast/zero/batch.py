"""The batch sizes in a DeepSpeed configuration: checked against the options, then replaced.

An item of the trainer's loader is a whole optimizer step of this rank, with as many micro-batches
as it needs. DeepSpeed must neither divide their losses by a number of accumulation steps nor wait
for more items. So while the trainer runs, DeepSpeed's configuration says that a step has a single
micro-batch with all of its pairs, and no accumulation. The user still sees their own values.
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

# Names that transformers uses in its list of mismatches, if they aren't the names of options.
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
    """Check a DeepSpeed configuration against the options, and connect DeepSpeed to the ranks.

    Args:
        args: transformers' TrainingArguments with a `deepspeed_plugin`. The plugin comes from the
            option `deepspeed` or from `accelerate launch`.

    Raises:
        ConfigError: a field of the configuration contradicts an option.
    """
    if args.deepspeed:
        where = source(args.deepspeed)
    else:  # `accelerate launch` passes its configuration through the environment
        where = source(os.environ.get(FILE_OF_ACCELERATE))
        _adopt(args, where)
    _refuse_contradictions(args, where)
    if torch.distributed.is_initialized():
        # On a CPU nothing else has told DeepSpeed of the process group, and ZeRO-3 needs it already
        # while it loads a model.
        from deepspeed import comm

        if not comm.is_initialized():
            comm.init_distributed(dist_backend=torch.distributed.get_backend())


def asked_by_launcher() -> bool:
    """Whether `accelerate launch` asks for DeepSpeed, which it does by the environment."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def refuse_missing_launcher(args: Any) -> None:
    """Raise ConfigError if DeepSpeed is asked for in a process that no launcher has started."""
    if args.deepspeed_plugin is not None and not torch.distributed.is_initialized():
        raise ConfigError(
            "deepspeed: it runs in processes that a launcher has started, also where there is but "
            "one: torchrun --nproc-per-node 1 -m dpofast train run.yaml."
        )


def _adopt(args: Any, where: str) -> None:
    """Treat a configuration from `accelerate launch` like one from the option `deepspeed`."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    plugin = args.deepspeed_plugin
    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(checked(plugin.deepspeed_config, where))
    # transformers and accelerate must share one dict, because it is changed in place later.
    plugin.hf_ds_config = args.hf_deepspeed_config
    plugin.deepspeed_config = args.hf_deepspeed_config.config
    args.hf_deepspeed_config.trainer_config_process(args)


def _refuse_contradictions(args: Any, where: str) -> None:
    """Raise ConfigError at the first field that contradicts an option.

    transformers has replaced each "auto" with the option's value by now, and has noted every other
    field that differs from its option as "- ds <field>=<value> vs hf <option>=<value>".
    """
    for noted in args.hf_deepspeed_config.mismatches:
        found = re.fullmatch(r"- ds (\S+?)=(.*) vs hf (.*?)=(.*)", noted)
        if found is None:  # not the form above, but still a mismatch
            raise ConfigError(f"{where}: {noted.removeprefix('- ')}; make the two agree.")
        name, theirs, option, ours = found.groups()
        raise ConfigError(
            f"{where}: {name} is {theirs}, but {COMPARED_WITH.get(option, option)} is {ours}; make "
            'the two agree, or write "auto" there.'
        )


class ShownBatch:
    """Switches the batch fields of a DeepSpeed configuration between the user's values and ours.

    The configuration has the user's values, except inside `one_item`.

    Args:
        plugin: accelerate's DeepSpeedPlugin with every "auto" filled in; None without DeepSpeed.
        pairs_per_rank: pairs of an optimizer step on one rank.
        world_size: number of ranks that share the step.

    Attributes:
        config: DeepSpeed's configuration, changed in place because others hold it too.
        shown: batch fields with the user's values.
        item: batch fields with the values for one item a step.
    """

    def __init__(self, plugin: Any, pairs_per_rank: int, world_size: int) -> None:
        self.plugin = plugin
        self.config: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
        self.shown = {name: self.config[name] for name in BATCH_FIELDS if self.config}
        sizes = (pairs_per_rank * world_size, pairs_per_rank, 1)
        self.item = dict(zip(BATCH_FIELDS, sizes, strict=True))

    @contextlib.contextmanager
    def one_item(self) -> Iterator[None]:
        """Inside the `with` block, the configuration says that a step is one item."""
        self.config.update(self.item)
        try:
            yield
        finally:
            self.config.update(self.shown)

    def as_shown(self) -> dict[str, Any]:
        """Copy the objects that hold the configuration, with the user's values in the copies.

        Returns:
            Copies by the names of TrainingArguments' attributes; no entries without DeepSpeed. Logs
            and checkpoints should show these copies while inside `one_item`.
        """
        if self.plugin is None:
            return {}
        plugin, hf_config = copy.copy(self.plugin), copy.copy(self.plugin.hf_ds_config)
        plugin.hf_ds_config = hf_config
        plugin.deepspeed_config = hf_config.config = {**self.config, **self.shown}
        return {"deepspeed_plugin": plugin, "hf_deepspeed_config": hf_config}
