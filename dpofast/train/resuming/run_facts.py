"""The facts that decide the numbers of a run, as a checkpoint records them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from importlib import metadata
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from dpofast.columns import REF_COLUMNS
from dpofast.data import pairs_fingerprint
from dpofast.model.parts import causal_lm, is_peft_model
from dpofast.options.config import DPOConfig
from dpofast.options.loss_fields import loss_facts
from dpofast.reference.identity.options import scoring_options
from dpofast.reference.identity.weights import read_weights
from dpofast.train.checkpoint.option_classes import COMPARED, ROUNDING
from dpofast.train.data.dataset import RunDataset
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.exchange import exchange
from dpofast.zero.weights import gathered
from dpofast_kernels import PreferenceLoss

# Options of an adapter that say where it came from, or how its first weights are drawn.
ADAPTER_ORIGIN = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "peft_version",
        "revision",
        "task_type",
    }
)
# Options that several facts replace.
REPLACED = frozenset({"deepspeed", "max_steps", "num_train_epochs"})
# Options that a given optimizer or schedule has instead of the run.
OF_OPTIMIZER = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "optim", "optim_args"),
    *("optim_target_modules", "weight_decay"),
)
OF_SCHEDULE = ("lr_scheduler_kwargs", "lr_scheduler_type", "warmup_ratio", "warmup_steps")
VERSIONS = ("torch", "transformers", "deepspeed", "dpofast")


def option_facts(config: DPOConfig, num_steps: int) -> dict[str, Any]:
    """The options that decide the numbers, as JSON types.

    Args:
        config: options of the run, as the user gave them.
        num_steps: optimizer steps of the whole run.
    """
    shown = config.to_dict()
    names = sorted((COMPARED | ROUNDING) - REPLACED)
    facts = {name: shown.get(name) for name in names if hasattr(config, name)}
    # One option has two names, of which the older versions of transformers know the older one.
    facts["activation_checkpointing"] = shown["gradient_checkpointing"]
    # Checkpoints of early versions record a single name.
    facts["loss_type"] = config.loss_type if len(config.loss_type) > 1 else config.loss_type[0]
    facts |= loss_facts(config)
    facts["data_seed"] = config.seed if config.data_seed is None else config.data_seed
    facts["max_steps"] = config.max_steps if config.max_steps > 0 else None
    facts["num_train_epochs"] = None if config.max_steps > 0 else config.num_train_epochs
    facts["num_steps"] = num_steps
    facts["warmup"] = config.get_warmup_steps(num_steps)
    facts["ranks"] = int(config.world_size)
    facts["pairs_per_step"] = config.pairs_per_rank * config.world_size
    facts["device"] = config.device.type
    return facts | deepspeed_facts(config)


def deepspeed_facts(config: DPOConfig) -> dict[str, Any]:
    """The stage of DeepSpeed, what it offloads, and what it makes by itself; None each without."""
    facts: dict[str, Any] = dict.fromkeys(
        ("deepspeed", "deepspeed_optimizer", "deepspeed_scheduler")
    )
    if config.deepspeed_plugin is None:
        return facts
    given = config.deepspeed_plugin.deepspeed_config
    zero = given["zero_optimization"]
    offloaded = [
        part
        for part in ("optimizer", "param")
        if zero.get(f"offload_{part}", {}).get("device", "none") != "none"
    ]
    facts["deepspeed"] = " ".join([f"zero{zero.get('stage', 0)}", *_offload(offloaded)])
    facts["deepspeed_optimizer"] = given.get("optimizer", {}).get("type")
    facts["deepspeed_scheduler"] = given.get("scheduler")
    return facts


def _offload(parts: list[str]) -> list[str]:
    return [f"with offloaded {' and '.join(parts)}"] if parts else []


def given_facts(trainer: Any, has_optimizer: bool, has_schedule: bool) -> dict[str, Any]:
    """What replaces options: an optimizer, a schedule and a loss that the trainer was given.

    Args:
        trainer: the trainer.
        has_optimizer, has_schedule: whether it was given one.
    """
    facts: dict[str, Any] = {"optimizer": None, "lr_scheduler": None}
    if has_optimizer:
        facts |= dict.fromkeys(OF_OPTIMIZER)
        facts["optimizer"] = _kind(trainer.optimizer)
    if has_schedule:
        facts |= dict.fromkeys(OF_SCHEDULE)
        facts["lr_scheduler"] = _kind(trainer.lr_scheduler)
    return facts | {"loss_fn": loss_name(trainer.pair_loss)}


def loss_name(loss: PreferenceLoss) -> str | None:
    """The name of a loss_fn; None for a loss of the library."""
    function = getattr(loss, "function", None)
    if function is None:
        return None
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None)}.{name}"


def data_facts(train_set: TrainingSet, is_first: bool) -> dict[str, Any]:
    """A fingerprint of the training pairs; None for a stream, which has a rule of its own.

    All ranks must call this together.

    Args:
        train_set: the training set.
        is_first: whether this is rank 0, which reads the token ids for all.
    """
    fingerprint = None
    if isinstance(train_set, RunDataset) and is_first:
        fingerprint = pairs_fingerprint(train_set.pairs)
        if train_set.brings_ref_logps:
            columns = [np.asarray(train_set.pairs[name], dtype="<f8") for name in REF_COLUMNS]
            fingerprint += f"-{xxhash.xxh3_128_hexdigest(np.stack(columns).tobytes())}"
    return {"data": exchange(fingerprint)[0]}


def model_facts(
    model: Any,
    config: DPOConfig,
    identity: dict[str, Any] | None,
    autocast_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The policy's config, dtypes, trained weights and adapter.

    All ranks must call this together, as ZeRO-3 may have sharded the weights.

    Args:
        model: the policy.
        config: options of the run.
        identity: description of the reference's identity if that is the policy without an adapter
            that contributes; None otherwise.
        autocast_dtype: dtype of the autocast context; None without autocast.
    """
    own = causal_lm(model)
    options = json.loads(json.dumps(own.config.to_dict(), default=str))
    kept = scoring_options(options)
    if not config.disable_dropout:  # otherwise these are all 0
        kept |= {name: options[name] for name in options if _is_dropout(name)}
    kept.pop("quantization_config", None)  # says how weights were quantised, not what they are
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    facts = {
        "model": type(own).__name__,
        "attention": own.config._attn_implementation,
        "dtype": " and ".join(sorted({str(p.dtype).partition(".")[2] for _, p in trained})),
        "trained_weights": _summary(trained),
        **{f"config.{name}": value for name, value in sorted(kept.items())},
    }
    if is_peft_model(model):
        facts["base_model"] = _base_digest(model, config, identity, autocast_dtype)
        for name in model.active_adapters:
            for option, value in sorted(_adapter_options(model.peft_config[name]).items()):
                facts[f"adapter.{option}"] = value
    return facts


def version_facts() -> dict[str, Any]:
    """The versions of the packages that compute, and are installed."""
    found = []
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return {"versions": ", ".join(found)}


def _base_digest(
    model: Any,
    config: DPOConfig,
    identity: dict[str, Any] | None,
    autocast_dtype: torch.dtype | None,
) -> str:
    """A digest of the weights below an adapter."""
    if identity is not None and identity["adapter"] is None:
        return str(identity["weights"])
    gather = gathered if config.deepspeed_plugin is not None else None
    with model.disable_adapter():
        return read_weights(model, None, gather, autocast_dtype).digest


def _adapter_options(adapter: Any) -> dict[str, Any]:
    """The options of a peft adapter that decide what it computes, as JSON types."""
    kept = {}
    for name, value in adapter.to_dict().items():
        if name in ADAPTER_ORIGIN or (name.endswith("_config") and not value):
            continue
        kept[name] = sorted(value) if isinstance(value, (set, frozenset, list, tuple)) else value
    options: dict[str, Any] = json.loads(json.dumps(kept, default=str, sort_keys=True))
    return options


def _summary(trained: list[tuple[str, Tensor]]) -> str:
    """How many tensors are trained, how many numbers they have, and a hash of names and shapes."""
    shapes = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in trained]
    numbers = sum(math.prod(shape) for _, shape in shapes)
    text = repr([(name, [int(size) for size in shape]) for name, shape in shapes])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{len(shapes)} tensors of {numbers:,} numbers ({digest})"


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name or "layerdrop" in name


def _kind(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
