"""The figures of a model card: the first and the last log of training, and the last evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpofast.monitor.public_names import public_name

# Logged name -> what the card calls it.
METRICS = {
    "loss": "loss",
    "nll_loss": "negative log-likelihood per token",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "reward of chosen answers",
    "rewards/rejected": "reward of rejected answers",
    "logps/chosen": "log-prob of chosen answers",
    "logps/rejected": "log-prob of rejected answers",
}
REWARDS = (
    "A reward is beta times the log of an answer's probability under this model over its "
    "probability under the reference."
)
REWARDS_WITHOUT_REFERENCE = (
    "A reward is beta times the log of an answer's probability under this model, or its mean per "
    "token, as the loss compares them."
)
ACCURACY = "Reward accuracy is the share of pairs whose chosen answer has the higher reward. "

Log = dict[str, Any]


def evaluations(log_history: Sequence[Log]) -> dict[str, Log]:
    """The last evaluation of each set: name ("eval" for a single set) -> metrics and `step`.

    Args:
        log_history: one dict per log event, with `step`, as transformers' TrainerState keeps them.
    """
    found: dict[str, Log] = {}
    for log in log_history:
        for key in log:
            prefix = key.removesuffix("rewards/margins")
            if prefix != key and key.startswith("eval_"):
                values = {name: log[prefix + name] for name in METRICS if prefix + name in log}
                set_name = prefix.removeprefix("eval_").rstrip("_") or "eval"
                found[set_name] = {**values, "step": log["step"]}
    return found


def metrics_table(
    log_history: Sequence[Log], *, has_reference: bool = True, examples: str = "pairs"
) -> str:
    """A table of the metrics, in Markdown; empty if nothing was logged.

    Args:
        log_history: one dict per log event, with `step`, as transformers' TrainerState keeps them.
        has_reference: whether rewards compare the model with a reference.
        examples: what the run counts: pairs or answers.
    """
    training = [log for log in log_history if "loss" in log and "step" in log]
    columns: list[tuple[str, Log]] = []
    if len(training) > 1:
        columns.append((f"training, first log (step {training[0]['step']})", training[0]))
    if training:
        columns.append((f"training, last log (step {training[-1]['step']})", training[-1]))
    for name, log in evaluations(log_history).items():
        of = "evaluation" if name == "eval" else f"evaluation on {public_name(name) or 'a set'}"
        columns.append((f"{of} (step {log['step']})", log))
    if not columns:
        return ""
    rows = [
        (words, *(_number(log.get(metric)) for _, log in columns))
        for metric, words in METRICS.items()
        if any(metric in log for _, log in columns)
    ]
    rewards = REWARDS if has_reference else REWARDS_WITHOUT_REFERENCE
    titles = ("metric", *(title for title, _ in columns))
    accuracy = ACCURACY if any("rewards/accuracies" in log for _, log in columns) else ""
    return (
        f"{table(titles, rows)}\n\n{rewards} {accuracy}The columns of training are means over the "
        f"{examples} since the log before. Loss, rewards and log-probs are in nats."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [[cell.replace("|", "/").replace("<", "&lt;") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4) + 0.0:.4f}"  # no -0.0000
