"""The metrics that are measured only if they are asked for: means over the tokens of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpofast.errors import ConfigError
from dpofast.options.head_fields import HeadFields
from dpofast.spelling import nearest_name


class TokenMetric(NamedTuple):
    """A mean over tokens.

    Attributes:
        statistic: what is averaged, one of `dpofast_kernels.STATISTICS`.
        answers: the answers whose tokens count, in a list of chosen and rejected in turn.
    """

    statistic: str
    answers: slice


_ALL, _CHOSEN, _REJECTED = slice(None), slice(0, None, 2), slice(1, None, 2)
# TRL's names and definitions.
TOKEN_METRICS = {
    "mean_token_accuracy": TokenMetric("is_top", _CHOSEN),
    "entropy": TokenMetric("entropy", _ALL),
    "logits/chosen": TokenMetric("mean_logit", _CHOSEN),
    "logits/rejected": TokenMetric("mean_logit", _REJECTED),
}
# The one that needs no further pass over the vocabulary.
USUAL_METRICS = ("mean_token_accuracy",)


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class MetricFields(HeadFields):
    """The field; docs/configuration.md says what each metric is.

    Attributes:
        metrics: names of metrics to measure in addition to those of every run:
            mean_token_accuracy, entropy, logits/chosen and logits/rejected; an empty list for none.
    """

    metrics: list[str] | str | None = field(
        default_factory=lambda: list(USUAL_METRICS),
        metadata={"help": f"Further metrics to measure: {', '.join(TOKEN_METRICS)}."},
    )


def settle_metrics(config: Any) -> None:
    """Give the option its usual form, a list without repetitions.

    Raises:
        ConfigError: it names no metrics, or one that is unknown.
    """
    given = config.metrics
    if given is not None and not isinstance(given, str | list | tuple):
        raise ConfigError(f"metrics: got {given!r}, expected a list of names.")
    names = [given] if isinstance(given, str) else list(given or [])
    for name in names:
        if name not in TOKEN_METRICS:
            nearest = nearest_name(str(name), TOKEN_METRICS)
            hint = "" if nearest is None else f", did you mean {nearest}"
            raise ConfigError(
                f"metrics: {name!r} is unknown{hint}; choose among {', '.join(TOKEN_METRICS)}, or "
                "measure others in metrics_fn."
            )
    config.metrics = list(dict.fromkeys(names))
