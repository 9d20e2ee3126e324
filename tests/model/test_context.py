"""Pairs that are longer than a model's context are refused with their row, or warned of."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset

from dpofast.data.packing.collate import Layout
from dpofast.errors import DataError
from dpofast.model.context import context_of
from tests.exactness import SHORT, compare
from tests.families import FAMILIES, tiny_model
from tests.support import make_trainer, tiny_llama, train

TABLES = (
    *(
        "bert-generation",
        "biogpt",
        "codegen",
        "ctrl",
        "git",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "mpt",
    ),
    *("openai-gpt", "opt", "opt, norms last"),
)
UNLIMITED = ("bloom", "falcon_mamba", "mamba", "mamba2", "xlstm")


@pytest.mark.slow
def test_contexts_of_all_families():
    hard = set()
    for family in FAMILIES:
        if not hasattr(transformers, FAMILIES[family][0]) or family in UNLIMITED:
            continue
        context = context_of(tiny_model(family))
        assert context.length == (2048 if family == "falcon" else 64), family
        hard |= {family} if context.is_hard else set()
    assert hard == set(TABLES)
    assert [context_of(tiny_model(family)) for family in UNLIMITED] == [None] * len(UNLIMITED)


@pytest.mark.parametrize("family", TABLES)
def test_hard_ones_run_as_far_as_that_and_no_further(family):
    model = tiny_model(family).eval()
    context = context_of(model)
    ids = torch.ones(1, context.length + 1, dtype=torch.int64)
    model(ids[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_of_many_pairs_may_be_longer_than_the_context(family):
    assert sum(len(prompt) + len(answer) for prompt, answer in SHORT.sequences[::2]) > 64
    compare(tiny_model(family).double(), SHORT, Layout("shared"))


def long_pairs() -> Dataset:
    """Three pairs whose longer sequences have 8, 66 and 70 tokens."""
    lengths = [(3, 5, 4), (60, 2, 6), (30, 40, 9)]
    return Dataset.from_list(
        [
            {"prompt_ids": [5] * prompt, "chosen_ids": [6] * chosen, "rejected_ids": [7] * rejected}
            for prompt, chosen, rejected in lengths
        ]
    )


def test_a_pair_that_the_model_cannot_run_is_refused_with_its_row(tmp_path):
    message = (
        r"^train, row 2 \(counted from 0\): a prompt and its answer have 70 tokens, and "
        r"OPTForCausalLM has 64 positions; set max_length to 64 or less\.$"
    )
    model = tiny_model("opt")
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, model, long_pairs())
    with pytest.raises(DataError, match=r"^eval, row 2 "):
        make_trainer(tmp_path, model, long_pairs().select([0]), eval_dataset=long_pairs())
    with pytest.raises(DataError, match=r"^train, row 2 .* OPTForCausalLM has 64 positions"):
        make_trainer(tmp_path, tiny_llama(), long_pairs(), ref_model=model)


def test_max_length_cuts_it_and_the_model_trains(tmp_path, caplog):
    caplog.set_level("INFO", logger="dpofast")
    options = {"max_length": 64, "max_steps": 2}
    assert len(train(make_trainer(tmp_path, tiny_model("opt"), long_pairs(), options=options))) == 2
    assert not [record for record in caplog.records if "positions" in record.message]


def test_rope_goes_on_with_a_warning(tmp_path, caplog):
    caplog.set_level("WARNING", logger="dpofast")
    model = tiny_llama(max_position_embeddings=64)
    assert len(train(make_trainer(tmp_path, model, long_pairs(), options={"max_steps": 1}))) == 1
    lines = [record.message for record in caplog.records if "positions" in record.message]
    assert lines == [
        "train: 2 pairs are longer than the 64 positions of LlamaForCausalLM, the longest has 70 "
        "tokens (train, row 2 (counted from 0)); unless that is meant, set max_length to 64."
    ]
