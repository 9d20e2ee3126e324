"""Compares a run with the checkpoint that it resumes from: which facts may differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dpofast.errors import DifferentRunError
from dpofast.options.allowed_changes import FIXED, LIMITS, ROUNDING, SCHEDULED, why_fixed

Facts = Mapping[str, Any]

# What versions did that don't record these facts, because there was nothing else.
FIRST_OPTIONS: Facts = {
    "alpha": None,
    "cpo_alpha": None,
    "beta_end": None,
    "beta_max": None,
    "beta_min": None,
    "beta_schedule": None,
    "desirable_weight": None,
    "discopop_tau": None,
    "dpop_lambda": None,
    "f_alpha_divergence_coef": None,
    "f_divergence_type": "reverse_kl",
    "group_by_prompt": False,
    "ld_alpha": None,
    "loss_weights": None,
    "simpo_gamma": None,
    "target_kl": None,
    "target_kl_gain": None,
    "undesirable_weight": None,
    "use_weighting": None,
    "weighting_clamp": None,
}
# Facts by which others are judged; they aren't compared themselves.
DERIVED = frozenset({"num_steps", "warmup"})
# Schedules that know more of the run than the number of the step.
ADAPTIVE = frozenset({"reduce_lr_on_plateau", "greedy"})


@dataclass(frozen=True)
class Change:
    """A fact whose value isn't the checkpoint's.

    Attributes:
        name: its name.
        before: its value in the checkpoint.
        now: its value in the run that resumes.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} in the checkpoint, {_shown(self.now)} now"


@dataclass(frozen=True)
class Changes:
    """What differs between a checkpoint and the run that resumes from it.

    Attributes:
        allowed: changes that the user allows, which the trainer must apply.
        harmless: changes of rounding only, and of the run's length where the schedule doesn't
            depend on it.
        unknown: names of facts that the checkpoint doesn't record.
    """

    allowed: tuple[Change, ...] = ()
    harmless: tuple[Change, ...] = ()
    unknown: tuple[str, ...] = ()


def compare(
    recorded: Facts, now: Facts, allowed: Collection[str], checkpoint: str, convert: str | None
) -> Changes:
    """Compare the facts of a run with those of the checkpoint that it resumes from.

    Args:
        recorded: facts in the checkpoint.
        now: facts of the run.
        allowed: names that may differ, from `read_allowed`.
        checkpoint: folder of the checkpoint, named in the error.
        convert: the command that makes the checkpoint readable on another number of ranks; None if
            it is readable.

    Raises:
        DifferentRunError: facts differ that may not; names each of them, and what to do.
    """
    if "loss_type" in recorded:
        recorded = {**FIRST_OPTIONS, **recorded}
    harmless, allows, refused = [], [], []
    for change in _changes(recorded, now):
        if change.name in ROUNDING or _is_only_length(change.name, recorded, now):
            harmless.append(change)
        elif change.name in allowed and _why_adaptive(change.name, recorded, now) is None:
            allows.append(change)
        else:
            refused.append(change)
    if convert is not None and not any(change.name == "deepspeed" for change in refused):
        refused += [change for change in harmless if change.name == "ranks"]
    if refused:
        raise DifferentRunError(_refusal(refused, recorded, now, checkpoint, convert))
    unknown = tuple(sorted(name for name in now if name not in recorded))
    return Changes(tuple(allows), tuple(harmless), unknown)


def _changes(recorded: Facts, now: Facts) -> list[Change]:
    """The facts that differ, in the order of the run's facts."""
    names = [*now, *(name for name in recorded if name not in now)]
    same_data = recorded.get("data") is not None and recorded.get("data") == now.get("data")
    found = []
    for name in names:
        if name in DERIVED or _is_unrecorded(name, recorded, now):
            continue
        if name in LIMITS and same_data:  # these limits cut nothing
            continue
        before, value = recorded.get(name), now.get(name)
        if before != value and not _is_same_in_effect(name, recorded, now):
            found.append(Change(name, before, value))
    return found


def _is_unrecorded(name: str, recorded: Facts, now: Facts) -> bool:
    """Whether a fact can't be compared, as one of the two versions doesn't know it."""
    if name in recorded and name in now:
        return False
    group, point, _ = name.partition(".")
    if not point:
        return name not in recorded
    # Another version of transformers or peft has other options. Without an adapter there is none.
    is_other_version = recorded.get("versions") != now.get("versions")
    has_group = all(
        any(each.startswith(f"{group}.") for each in facts) for facts in (recorded, now)
    )
    return is_other_version and has_group


def _is_same_in_effect(name: str, recorded: Facts, now: Facts) -> bool:
    """Whether options that differ come to the same number of steps."""
    if name in ("max_steps", "num_train_epochs"):
        return bool(recorded.get("num_steps") == now.get("num_steps"))
    if name in ("warmup_steps", "warmup_ratio"):
        return bool(recorded.get("warmup") == now.get("warmup"))
    return False


def _is_only_length(name: str, recorded: Facts, now: Facts) -> bool:
    """Whether a change of the run's length leaves the learning rate and beta of each step."""
    if name not in ("max_steps", "num_train_epochs"):
        return False
    if recorded.get("beta_schedule") or now.get("beta_schedule"):
        return False
    kinds = {recorded.get("lr_scheduler_type"), now.get("lr_scheduler_type")}
    if kinds == {"constant"}:
        return True
    return kinds == {"constant_with_warmup"} and recorded.get("warmup") == now.get("warmup")


def _why_adaptive(name: str, recorded: Facts, now: Facts) -> str | None:
    """Why a change of the schedule can't be applied; None if it can, or for other facts."""
    if name not in SCHEDULED:
        return None
    if now.get("deepspeed_scheduler") is not None:
        return FIXED["deepspeed_scheduler"]
    for facts in (recorded, now):
        if facts.get("lr_scheduler_type") in ADAPTIVE:
            return f"the schedule {facts['lr_scheduler_type']} follows from the steps before"
    return None


def _refusal(
    refused: list[Change], recorded: Facts, now: Facts, checkpoint: str, convert: str | None
) -> str:
    lines, can_be_allowed = [], []
    for change in refused:
        reason = why_fixed(change.name) or _why_adaptive(change.name, recorded, now)
        if change.name == "ranks":
            lines.append(f"{change}; first convert the states of the optimizer: {convert}")
        elif reason is not None:
            lines.append(f"{change}; this can't change, as {reason}")
        else:
            lines.append(str(change))
            can_be_allowed.append(change.name)
    remedies = ["Set back what differs"]
    if can_be_allowed:
        remedies.append(f"let it change by allow_changed: [{', '.join(can_be_allowed)}]")
    remedies.append(
        "start a new run from these weights: give the checkpoint as model_name_or_path, and leave "
        "resume_from_checkpoint out"
    )
    listed = "".join(f"\n  {line}" for line in lines)
    return (
        f"{checkpoint!r} belongs to a run that differs from this one:{listed}\n"
        f"{', or '.join(remedies)}."
    )


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
