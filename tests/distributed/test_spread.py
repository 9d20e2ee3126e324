"""A reference that ZeRO-3 partitions over two ranks is scored without ever being gathered whole."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BioGptConfig, BioGptForCausalLM, GPT2Config, GPT2LMHeadModel

from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import build_reference, reference_logps
from dpofast.reference.store.store import ReferenceStore
from tests.distributed.launch import launch
from tests.distributed.spread_ranks import (
    BATCH_SEQUENCES,
    QUIET,
    detailed_scores,
    load,
    scorer_of,
)
from tests.reference.stubs import batches_of, identity
from tests.rope import ORIGINAL_LENGTH, rope_parameters
from tests.support import VOCAB_SIZE, tiny_llama, tiny_mixtral, token_pairs

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("spread_ranks.py")
LAYERS = 6
GPT2: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BIOGPT = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "tied": lambda: tiny_llama(num_hidden_layers=LAYERS, tie_word_embeddings=True),
    "checkpointed": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "mixtral": lambda: tiny_mixtral(num_hidden_layers=LAYERS),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **GPT2, **NO_DROPOUT)),
    "dynamic rope": lambda: tiny_llama(
        num_hidden_layers=LAYERS,
        max_position_embeddings=ORIGINAL_LENGTH,
        rope_parameters=rope_parameters("dynamic", frequencies=4),
    ),
    "lora": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "biogpt": lambda: BioGptForCausalLM(
        BioGptConfig(vocab_size=VOCAB_SIZE, num_hidden_layers=LAYERS, **BIOGPT)
    ),
}
if importlib.util.find_spec("peft") is None:
    del MODELS["lora"]
UNKNOWN_BLOCKS = {"biogpt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("spread")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(root / name)
        if name == "lora":
            import peft

            lora = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
            adapter = root / name / "adapter"
            peft.get_peft_model(model, lora).save_pretrained(adapter, save_embedding_layers=False)
    launch(SCRIPT, 2, str(root))
    return root


@pytest.fixture(scope="module")
def reports(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def stored(folder):
    namespace = ReferenceStore.open(folder).namespace(identity())
    return reference_logps(namespace, read_answers(token_pairs(6)))


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_same_batches_under_the_whole_model(folder, tmp_path, name):
    expected = ReferenceStore.open(tmp_path, create=True).namespace(identity())
    scorer = scorer_of(load(folder / name))
    options = {"batches": batches_of(BATCH_SEQUENCES), "options": QUIET}
    answers = read_answers(token_pairs(6))
    report = build_reference(expected, answers, scorer, **options)
    assert report.forward_passes == 3
    got = stored(folder / name / "store")
    np.testing.assert_allclose(got, reference_logps(expected, answers), rtol=1e-6)
    assert len(np.unique(got)) == got.size


def test_log_sum_exps_are_those_of_the_whole_model(folder, reports):
    expected = detailed_scores(load(folder / "llama"))
    for report in reports:
        for got, wanted in zip(report["detailed"], expected, strict=True):
            assert np.shape(got) == (2, len(wanted[0]))
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_a_rank_with_fewer_batches_runs_the_model_as_often(reports):
    for name in MODELS:
        assert [report[name]["passes"] for report in reports] == [2, 2]
        assert [report[name]["rows"] for report in reports] == [8, 4]
    assert [report["one batch"] for report in reports] == [1, 1]


def test_ranks_that_do_not_share_a_folder_score_the_rest_together(folder, reports):
    # Two passes while the ranks have 2 and 1 batches, two more while they have 1 and 2.
    assert [report["apart"] for report in reports] == [4, 4]
    expected = stored(folder / "llama" / "store")
    for rank in (0, 1):
        np.testing.assert_allclose(stored(folder / f"apart{rank}"), expected, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_no_more_than_the_largest_unit_is_whole_at_once(reports, name):
    model: Any = MODELS[name]()
    num_elements = sum(p.numel() for p in model.parameters())
    if name in UNKNOWN_BLOCKS:
        expected = num_elements
    else:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS]
        units = [*ends, *blocks[0]]
        expected = max(sum(p.numel() for p in unit.parameters()) for unit in units)
        assert expected < num_elements / 3
    assert [report[name]["most"] for report in reports] == [expected] * 2


def test_nor_is_it_in_a_run_before_its_first_step(reports):
    for report in reports:
        assert report["trainer"]["most"] == report["llama"]["most"]
        assert report["trainer"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_log_prob_that_is_not_finite_on_one_rank_stops_all(folder, reports):
    assert "and is not stored" in reports[1]["nan"]
    assert reports[0]["nan"] == f"Rank 1 stopped the build: {reports[1]['nan']}"
    kept = ReferenceStore.open(folder / "nan").namespace(identity())
    assert len(kept) == 7  # a batch of rank 0, and the finite log-probs of rank 1
