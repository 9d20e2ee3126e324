"""Options that TRL and older versions of transformers have, and dpofast only takes or refuses.

They are fields of DPOConfig, since a parser of dataclasses knows no other options: it would drop
them, and the run would train something else than its script says.
"""

from __future__ import annotations

from argparse import SUPPRESS
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Annotated, Any, get_type_hints

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dpofast.errors import ConfigError, options_error


class NoEffect:
    """A rule for an option whose values change nothing that is computed.

    Args:
        reason: why; a line in the log says so.
        neutral: values besides the default that need no line.
    """

    def __init__(self, reason: str, *neutral: Any) -> None:
        self.reason, self.neutral = reason, neutral


class Refused:
    """A rule for an option that would change the training.

    Args:
        remedy: what to do instead.
        neutral: values besides the default that change nothing.
    """

    def __init__(self, remedy: str, *neutral: Any) -> None:
        self.remedy, self.neutral = remedy, neutral


class Renamed:
    """A rule for an option that is taken under its present name, `now`."""

    def __init__(self, now: str) -> None:
        self.now = now
        self.neutral: tuple[Any, ...] = ()


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class TRLFields(TrainingArguments):
    """The fields, with TRL's defaults; each says why it has no effect, or what to do instead.

    Raises:
        ConfigError: a value would change the training, which dpofast can't do.
    """

    # TRL 1.16
    padding_free: Annotated[bool, NoEffect("layout decides whether rows have padding")] = False
    pad_to_multiple_of: Annotated[
        int | str | None, NoEffect("rows are as long as they need to be", None)
    ] = "auto"
    activation_offloading: Annotated[bool, NoEffect("activations stay on the device")] = False
    sync_ref_model: Annotated[
        bool, Refused("leave it out; the reference stays fixed during a run")
    ] = False
    ref_model_mixup_alpha: Annotated[float, NoEffect("the reference stays fixed during a run")] = (
        0.6
    )
    ref_model_sync_steps: Annotated[int, NoEffect("the reference stays fixed during a run")] = 512
    # older versions of TRL
    reference_free: Annotated[
        bool,
        Refused("set loss_type to a loss without a reference: cpo is sigmoid without one"),
    ] = False
    # 0.0 isn't neutral: TRL 0.9 multiplied the DPO loss by this number.
    rpo_alpha: Annotated[
        float | None,
        Refused("set loss_type: [sigmoid, sft] and loss_weights: [1.0, the number]"),
    ] = None
    is_encoder_decoder: Annotated[
        bool | None, Refused("use a decoder-only model; no other kind is supported", False)
    ] = None
    model_adapter_name: Annotated[
        str | None, Refused("call model.set_adapter with the name; the active adapter is trained")
    ] = None
    ref_adapter_name: Annotated[
        str | None,
        Refused(
            "leave it out if both adapters are alike, as the reference is the policy before step "
            "1; else merge the adapter into a model of its own, and pass that as ref_model"
        ),
    ] = None
    tools: Annotated[
        list[Any] | None, Refused("put the tools into a column `tools` of the dataset")
    ] = None
    force_use_ref_model: Annotated[bool, NoEffect("a ref_model is used whenever one is given")] = (
        False
    )
    use_logits_to_keep: Annotated[bool, NoEffect("only answers ever reach the head")] = False
    use_num_logits_to_keep: Annotated[bool, NoEffect("only answers ever reach the head")] = False
    use_liger_loss: Annotated[
        bool, NoEffect("the loss never makes the logits of a whole batch")
    ] = False
    base_model_attribute_name: Annotated[str, NoEffect("dpofast finds the model's body itself")] = (
        "model"
    )
    label_pad_token_id: Annotated[int, NoEffect("labels aren't padded")] = -100
    padding_value: Annotated[int | None, NoEffect("padding is never read")] = None
    generate_during_eval: Annotated[
        bool, NoEffect("evaluations generate no text; generate in a callback, or after training")
    ] = False
    dataset_kwargs: Annotated[
        dict[str, Any] | str | None, NoEffect("pairs are read and tokenised as docs/data.md says")
    ] = None
    # versions 4 of transformers
    evaluation_strategy: Annotated[IntervalStrategy | str | None, Renamed("eval_strategy")] = None
    no_cuda: Annotated[bool, Renamed("use_cpu")] = False
    per_gpu_train_batch_size: Annotated[int | None, Renamed("per_device_train_batch_size")] = None
    per_gpu_eval_batch_size: Annotated[int | None, Renamed("per_device_eval_batch_size")] = None
    push_to_hub_model_id: Annotated[str | None, Renamed("hub_model_id")] = None
    push_to_hub_token: Annotated[str | None, Renamed("hub_token")] = None
    logging_dir: Annotated[
        str | None, NoEffect("set TENSORBOARD_LOGGING_DIR in the environment")
    ] = None
    save_safetensors: Annotated[
        bool, Refused("leave it out; checkpoints are always safetensors")
    ] = True
    group_by_length: Annotated[
        bool,
        Refused("leave it out; steps see the pairs in the shuffled order, and rows are packed"),
    ] = False

    def settle_trl_fields(self) -> list[str]:
        """Take the options that only have another name now, and refuse what can't be done.

        Returns:
            One remark for each option that is given without effect.

        Raises:
            ConfigError: names each refused option, and what to do.
        """
        remarks, refused = [], []
        for name, rule in RULES.items():
            value = getattr(self, name)
            value = value.value if isinstance(value, Enum) else value  # old TRL's FDivergenceType
            if value in (_DEFAULTS[name], *rule.neutral):
                continue
            if isinstance(rule, Renamed):
                self._rename(name, rule.now)
            elif isinstance(rule, NoEffect):
                remarks.append(f"{name}={value!r} ({rule.reason})")
            else:
                refused.append(f"{name}={value!r} isn't supported: {rule.remedy}.")
        if refused:
            raise options_error(refused)
        return remarks

    def _rename(self, old: str, now: str) -> None:
        """Move a value from an option's old name to its present one."""
        value, present = getattr(self, old), getattr(self, now)
        if present not in (_DEFAULTS[now], value):
            raise ConfigError(
                f"{old}: {value!r} contradicts {now}={present!r}, which is its present name; keep "
                f"{now} only."
            )
        setattr(self, now, value)
        setattr(self, old, _DEFAULTS[old])  # so a copy may change the value

    def to_dict(self) -> dict[str, Any]:
        """The options for logs and checkpoints, without those that have no effect."""
        options: dict[str, Any] = super().to_dict()
        return {name: value for name, value in options.items() if name not in RULES}


def _rules() -> dict[str, NoEffect | Refused | Renamed]:
    hints = get_type_hints(TRLFields, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if hasattr(hint, "__metadata__")}


# The rule of each field above. Hints don't suggest these names, and logs don't show them.
RULES = _rules()
_DEFAULTS = {item.name: item.default for item in fields(TRLFields)}
for _item in fields(TRLFields):
    if isinstance(RULES.get(_item.name), Refused):  # HfArgumentParser's --help is long enough
        _item.metadata = MappingProxyType({"help": SUPPRESS})
