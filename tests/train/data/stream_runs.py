"""Streams of pairs, and runs over them."""

from __future__ import annotations

import datasets

from tests.support import make_trainer, token_pairs

ROWS = token_pairs(10).to_list()
# Two of the rows are left out of the steps.
TEXTS = [
    {"prompt": f"{i}: ", "chosen": "c" * (1 + i % 4), "rejected": "r" * (1 + i % 3)}
    for i in range(11)
]
TEXTS[2]["rejected"] = TEXTS[2]["chosen"]
TEXTS[7]["chosen"] = ""
# Steps and windows end between pairs of one row.
SEVERAL = [
    {"prompt": f"{i}: ", "chosen": "c" * (1 + i), "rejected": ["r" * (1 + n + i) for n in range(3)]}
    for i in range(4)
]


def stream_of(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def logs_of(trainer):
    """Every figure of every step's log, apart from times and the epoch."""
    left_out = ("epoch", "pairs_per_second", "tokens_per_second")
    return [
        {name: value for name, value in log.items() if name not in left_out}
        for log in trainer.state.log_history
        if "grad_norm" in log
    ]


def run(folder, pairs, *, resume=None, **arguments):
    """The logs of a run; in a stream's order also for a list."""
    options = {"train_sampling_strategy": "sequential", "max_steps": 7}
    options |= arguments.pop("options", {})
    trainer = make_trainer(folder, pairs=pairs, options=options, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, logs_of(trainer)
