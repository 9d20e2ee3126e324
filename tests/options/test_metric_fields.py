"""The option metrics: its forms, and names that are unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.options.metric_fields import TOKEN_METRICS
from dpofast_kernels import STATISTICS


def config(folder: Path, metrics: object) -> DPOConfig:
    return DPOConfig(str(folder), metrics=metrics, bf16=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "metrics"),
    [
        (None, []),
        ([], []),
        ("entropy", ["entropy"]),
        (["entropy", "logits/chosen", "entropy"], ["entropy", "logits/chosen"]),
    ],
)
def test_forms(tmp_path: Path, given: object, metrics: list[str]) -> None:
    assert config(tmp_path, given).metrics == metrics


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("entrpy", "'entrpy' is unknown, did you mean entropy; choose among mean_token_acc"),
        ("logits_chosen", "'logits_chosen' is unknown, did you mean logits/chosen; choose among"),
        ("perplexity", "'perplexity' is unknown; choose among mean_token_accuracy, entropy"),
        (3, "3 is unknown; choose among"),
    ],
)
def test_unknown_names(tmp_path: Path, name: object, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"metrics: {hint}"):
        config(tmp_path, ["entropy", name])


def test_something_else_than_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metrics: got 3, expected a list of names"):
        config(tmp_path, 3)


def test_each_metric_has_a_statistic_of_the_head() -> None:
    assert {metric.statistic for metric in TOKEN_METRICS.values()} <= set(STATISTICS)
