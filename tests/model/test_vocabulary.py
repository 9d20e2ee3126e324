"""Token ids outside a model's vocabulary are refused with their row, before anything runs."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from dpofast.data import mix_preferences
from dpofast.errors import DataError
from dpofast.model.vocabulary import Vocabulary, refuse_unknown_ids, vocabulary_of
from tests.families import tiny_model
from tests.support import make_trainer, tiny_llama, token_pairs, train


def pairs_with(token_id: int, column: str) -> Dataset:
    """Four pairs; the third has this token id at the end of the column."""
    rows = token_pairs(4).to_list()
    rows[2][column][-1] = token_id
    return Dataset.from_list(rows)


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_an_id_out_of_range_is_named_with_its_row(tmp_path, column):
    message = (
        rf"^train, row 2 \(counted from 0\): the token id 256 in {column} is not one of "
        r"the 256 of LlamaForCausalLM: use that model's tokenizer, or "
    )
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, tiny_llama(vocab_size=256), pairs_with(256, column))


def test_in_a_mixture_the_row_is_named_with_its_dataset(tmp_path):
    mixture = mix_preferences({"a": token_pairs(4), "b": pairs_with(256, "chosen_ids")})
    with pytest.raises(DataError, match=r"^b, row 2 .* id 256 in chosen_ids"):
        make_trainer(tmp_path, tiny_llama(vocab_size=256), mixture)


def test_the_held_out_pairs_and_the_reference_count_too(tmp_path):
    pairs = pairs_with(256, "chosen_ids")
    with pytest.raises(DataError, match=r"^eval, row 2 .* id 256 in chosen_ids"):
        make_trainer(tmp_path, tiny_llama(vocab_size=256), token_pairs(4), eval_dataset=pairs)
    smaller = tiny_llama(vocab_size=256)
    with pytest.raises(DataError, match=r"^train, row 2 .* one of the 256 of LlamaForCausalLM"):
        make_trainer(tmp_path, tiny_llama(vocab_size=257), pairs, ref_model=smaller)


def test_a_smaller_table_of_tokens_in_the_layers_counts(tmp_path):
    model = tiny_model("gemma4")
    table = model.model.embed_tokens_per_layer
    table.weight = torch.nn.Parameter(table.weight[:90])
    assert vocabulary_of(model) == Vocabulary("Gemma4ForCausalLM", 90)
    rows = [{key: [token % 90 for token in row[key]] for key in row} for row in token_pairs(4)]
    rows[2]["chosen_ids"][-1] = 90
    with pytest.raises(DataError, match=r"^train, row 2 .* id 90 in chosen_ids is not one of the"):
        make_trainer(tmp_path, model, Dataset.from_list(rows))


def test_the_last_id_is_trained(tmp_path):
    pairs = pairs_with(256, "chosen_ids")
    model = tiny_llama(vocab_size=257)
    assert vocabulary_of(model) == Vocabulary("LlamaForCausalLM", 257)
    assert train(make_trainer(tmp_path, model, pairs, options={"max_steps": 1}))


def test_no_pairs_have_no_wrong_ids():
    empty = token_pairs(4).add_column("row", range(4)).select([])
    refuse_unknown_ids(empty, "train", [Vocabulary("Model", 1)])
