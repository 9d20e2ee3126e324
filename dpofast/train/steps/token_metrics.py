"""Means over the tokens of answers, from statistics that the head's pass has summed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpofast.options.metric_fields import TOKEN_METRICS


def statistics_of(metrics: Sequence[str]) -> tuple[str, ...]:
    """Names of the statistics that these metrics need, each once."""
    return tuple(dict.fromkeys(TOKEN_METRICS[name].statistic for name in metrics))


def token_metric_sums(
    metrics: Sequence[str],
    statistics: Tensor | None,  # [K, 2P]
    lengths: Tensor,  # [P, 2]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Numerators and denominators of token metrics, for `MetricSums.add`.

    Args:
        metrics: names of `TOKEN_METRICS`.
        statistics: [K, 2P] fp64, sums over each answer of `statistics_of(metrics)`; None if there
            is no metric.
        lengths: [P, 2] int64, scored tokens of chosen and rejected, on any device.

    Returns:
        The sums by name, [] fp64, and the numbers of their tokens, [] int64. The names are the same
        without pairs.
    """
    if statistics is None:
        return {}, {}
    of_statistic = dict(zip(statistics_of(metrics), statistics, strict=True))
    tokens, sums, counts = lengths.flatten(), {}, {}  # [2P]
    for name in metrics:
        statistic, answers = TOKEN_METRICS[name]
        sums[name] = of_statistic[statistic][answers].sum()
        counts[name] = tokens[answers].sum()
    return sums, counts
