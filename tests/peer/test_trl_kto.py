"""KTO and apo_zero_unpaired train as with TRL's KTOTrainer, step by step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

from benchmarks.data import REAL, find_data
from dpofast import KTOConfig, KTOTrainer
from tests.peer.test_trl_losses import OPTIONS, column, logs_of, race_llama
from tests.peer.test_trl_reference_free import exact
from tests.support import byte_tokenizer

pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # imports TRL

STEPS, ROWS_PER_STEP = 10, 6
# TRL adds log-probs up in float32, which loses the digits that are compared if answers are long.
MOST_LETTERS = 600
REAL_ROWS_PER_STEP = 2
CASES = [
    {},
    {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    {"loss_type": "apo_zero_unpaired"},
]


def texts():
    """Rows of text that the byte tokenizer reads letter by letter; no prompt is there twice."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghij "))

    def text(most):
        return "".join(generator.choice(letters, int(generator.integers(2, most))))

    return Dataset.from_list(
        [
            {
                "prompt": f"{number} {text(12)}:",
                "completion": text(14),
                "label": bool(generator.random() < 0.5),
            }
            for number in range(STEPS * ROWS_PER_STEP)
        ]
    )


def real_texts():
    """Short rows of real conversations, as text that the byte tokenizer knows."""
    path, source = find_data("kto_en_demo")
    if source != REAL:
        pytest.skip("kto_en_demo.json isn't here; set DPOFAST_DATA to its folder")
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        *earlier, completion = [message["content"] for message in row["messages"]]
        prompt = "\n".join([*earlier, ""])
        if (prompt + completion).isascii() and len(prompt + completion) < MOST_LETTERS:
            rows.append({"prompt": prompt, "completion": completion, "label": row["label"]})
    # Every step gets rows of both labels.
    sides = [[row for row in rows if row["label"] == label] for label in (True, False)]
    mixed = [row for pair in zip(*sides, strict=False) for row in pair]
    assert len(mixed) >= STEPS * REAL_ROWS_PER_STEP
    return Dataset.from_list(mixed[: STEPS * REAL_ROWS_PER_STEP])


@pytest.mark.parametrize("options", CASES, ids=str)
def test_kto(tmp_path, options):
    compare(tmp_path, texts(), options)


def test_kto_on_real_conversations(tmp_path):
    compare(tmp_path, real_texts(), {"learning_rate": 1e-6, "beta": 0.05})


def compare(tmp_path, rows, options):
    """Train with TRL and here, and compare the logs."""
    from trl import KTOConfig as TheirConfig
    from trl import KTOTrainer as TheirTrainer

    options = {**OPTIONS, **options, "max_steps": STEPS, "max_length": 2 * MOST_LETTERS}
    options |= {"per_device_train_batch_size": len(rows) // STEPS}
    options |= {"train_sampling_strategy": "sequential"}
    theirs = exact(TheirTrainer)(
        race_llama(),
        ref_model=race_llama(),
        args=TheirConfig(output_dir=str(tmp_path / "trl"), **options),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    names = ["prompt_ids", "completion_ids", "label"]
    ours = KTOTrainer(
        race_llama(),
        args=KTOConfig(
            output_dir=str(tmp_path / "ours"), reference_store=str(tmp_path / "store"), **options
        ),
        train_dataset=theirs.train_dataset.select_columns(names),
        processing_class=byte_tokenizer(),
    )
    if "loss_type" not in options:
        # TRL rotates the answers of each batch, where ours are rotated over the whole dataset.
        kept = theirs.train_dataset.remove_columns("KL_completion_ids")
        mismatched = ours.train_set().pairs["mismatched_ids"][:]
        theirs.train_dataset = kept.add_column("KL_completion_ids", mismatched)
    theirs, ours = logs_of(theirs), logs_of(ours)
    assert len(ours) == len(theirs) == STEPS
    losses = column(theirs, "loss")
    assert max(abs(loss / losses[0] - 1) for loss in losses) > 0.02, losses
    for name in ("loss", "grad_norm"):
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, rtol=1e-4, err_msg=name)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        expected = column(theirs, name)
        np.testing.assert_allclose(column(ours, name), expected, atol=1e-3, rtol=0, err_msg=name)
    for name in ("logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(column(ours, name), column(theirs, name), rtol=1e-4)
    if "loss_type" not in options:
        assert max(column(theirs, "kl")) > 0.01
        np.testing.assert_allclose(column(ours, "kl"), column(theirs, "kl"), atol=1e-3, rtol=0)


def test_options_have_trls_defaults():
    from dataclasses import fields

    from trl import KTOConfig as TheirConfig

    ours = {item.name: item.default for item in fields(KTOConfig)}
    theirs = {item.name: item.default for item in fields(TheirConfig)}
    assert theirs.keys() <= ours.keys()
    own = ("loss_type", "beta", "desirable_weight", "undesirable_weight", "max_length")
    for name in (*own, "learning_rate", "disable_dropout"):
        assert ours[name] == theirs[name], name
    assert (ours["train_sampling_strategy"], theirs["train_sampling_strategy"]) == (
        "random",
        "sequential",
    )
