"""TRL can train on an exported file: its preparation and its collator keep our columns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset

from dpofast.data import load_preferences, tokenize_preferences
from dpofast.demo.model import make_tokenizer
from dpofast.export import Source, export_pairs
from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference, reference_logps
from dpofast.reference.store.store import ReferenceStore
from tests.reference.stubs import StubScorer, batches_of, identity

trl = pytest.importorskip("trl", reason="needs the extra `bench`")

pytestmark = pytest.mark.peer
ROWS = [
    {"prompt": f"Say {word}: ", "chosen": word, "rejected": f"{word}, ok"}
    for word in ("one", "two", "three", "four")
]


def test_trl_reads_the_columns_beside_the_same_ids(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = make_tokenizer()
    tokens, report = tokenize_preferences(load_preferences(ROWS), tokenizer, max_length=None)
    namespace = ReferenceStore.open(tmp_path / "store", create=True).namespace(identity())
    options = BuildOptions(progress=False)
    answers = read_answers(tokens)
    build_reference(namespace, answers, StubScorer(), batches=batches_of(4), options=options)
    path = tmp_path / "pairs.parquet"
    export_pairs(path, Source(ROWS), tokens, report, namespace)

    cache = str(tmp_path / "cache")
    found = load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    theirs = trl.DPOTrainer._prepare_dataset(trainer, found, tokenizer, args, "train")
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert theirs[name][:] == tokens[name][:]
    batch = DataCollatorForPreference(pad_token_id=0)(list(theirs))
    got = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], 1)
    np.testing.assert_array_equal(got.numpy(), np.float32(reference_logps(namespace, answers)))
