"""Which changes of a run make it score reference log-probs again, and how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dpofast.model.load import load_policy
from dpofast.reference.build.answers import read_answers
from dpofast.reference.store.store import ReferenceStore
from tests.support import byte_tokenizer, make_trainer, tiny_llama

PAIRS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}, of course.", "rejected": f"No idea, {n}"}
    for n in range(6)
]
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def lines(**changes):
    return Dataset.from_list([pair | changes for pair in PAIRS])


def chats():
    def turn(role, text):
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": turn("user", pair["prompt"]),
                "chosen": turn("assistant", pair["chosen"]),
                "rejected": turn("assistant", pair["rejected"]),
            }
            for pair in PAIRS
        ]
    )


def templated(template=CHAT):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def scored(folder, pairs=None, model=None, **arguments):
    """-> the number of answers that a run has to score; its store is in `folder`."""
    trainer = make_trainer(folder, model, lines() if pairs is None else pairs, **arguments)
    trainer.score_datasets()
    return trainer.reference.store.totals().rows_scored


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    assert scored(folder) == 12
    return folder


@pytest.fixture
def store(filled, tmp_path):
    """A copy of the filled store, because most tests add to it."""
    for path in (filled / "store").rglob("*"):
        if path.is_file():
            target = tmp_path / "store" / path.relative_to(filled / "store")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


HITS = {
    "learning_rate": {"learning_rate": 1e-6},
    "beta": {"beta": 0.5},
    "loss": {"loss_type": "ipo"},
    "label smoothing": {"label_smoothing": 0.1},
    "output_dir": {"output_dir": "elsewhere"},
    "seed": {"seed": 8, "data_seed": 9},
    "batch": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
    "reference's batch": {"precompute_ref_batch_size": 1},
    "packing": {"max_tokens_per_microbatch": 100},
    "unshared": {"layout": "unshared"},
    "padded": {"layout": "padded"},
    "epochs": {"max_steps": -1, "num_train_epochs": 2},
    "optimizer": {"optim": "sgd", "weight_decay": 0.1, "max_grad_norm": 0.5},
    "checkpointing": {"gradient_checkpointing": True},
    "a max_length that cuts nothing": {"max_length": 60},
}


@pytest.mark.parametrize("options", HITS.values(), ids=HITS)
def test_what_changes_no_log_prob_costs_nothing(store, options):
    if "output_dir" in options:
        options = {"output_dir": str(store / "elsewhere")}
    assert scored(store, options=options) == 0


def test_order_and_sides_cost_nothing_and_added_rows_cost_themselves(store):
    assert scored(store, lines().shuffle(seed=1)) == 0
    turned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    assert scored(store, Dataset.from_list(turned)) == 0
    added = {"prompt": "And?", "chosen": "yes", "rejected": "no"}
    assert scored(store, Dataset.from_list([added, *PAIRS])) == 2
    mixed = PAIRS[0] | {"rejected": "another answer"}
    assert scored(store, Dataset.from_list([mixed, *PAIRS])) == 1


def with_a_byte_changed():
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.detach().view(torch.uint8)[3, 5] ^= 1
    return model


def with_a_trained_adapter():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_a_model_that_was_cast_is_another_than_one_loaded_in_that_dtype(tmp_path):
    """Casting rounds rotary frequencies, which loading leaves in float32."""
    cast = tiny_llama().bfloat16()
    cast.save_pretrained(tmp_path / "model")
    loaded = load_policy(str(tmp_path / "model"), dtype="bfloat16")
    for model, dtype in ((cast, torch.bfloat16), (loaded, torch.float32)):
        assert model.model.rotary_emb.inv_freq.dtype == dtype
    store = tmp_path / "store"
    assert scored(store, model=cast) == 12
    assert scored(store, model=loaded) == 12


MODELS = {
    "a byte of a weight": with_a_byte_changed,
    "dtype": lambda: tiny_llama().bfloat16(),
    "another checkpoint": lambda: tiny_llama(seed=1),
    "a softcap": lambda: tiny_llama(final_logit_softcapping=30.0),
    "rope": lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "an adapter that was trained": with_a_trained_adapter,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_another_model_scores_all(store, make):
    assert scored(store, model=make()) == 12
    assert scored(store, model=make()) == 0


def test_a_fresh_adapter_costs_nothing(store):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    assert scored(store, model=model) == 0


def test_another_ref_model_scores_all(store):
    assert scored(store, ref_model=tiny_llama(seed=1)) == 12
    assert scored(store, ref_model=tiny_llama()) == 0


def test_autocast_scores_all(store):
    assert scored(store, options={"bf16": True}) == 12


def test_whatever_cuts_tokens_scores_what_was_cut(store):
    """The answers have about 22 and 12 bytes, the prompts 10, and an EOS can follow."""
    start = scored(store, options={"max_length": 24})
    end = scored(store, options={"max_length": 24, "truncation_mode": "keep_end"})
    assert start == 6  # the chosen answers; the rejected ones fit
    assert end == 12  # a prompt that was cut changes both answers' keys


def test_eos_and_boundary_belong_to_the_tokens(store):
    spelled = [
        pair | {side: f"{pair[side]}</s>" for side in ("chosen", "rejected")} for pair in PAIRS
    ]
    assert scored(store, Dataset.from_list(spelled)) == 0  # otherwise it is added
    tokens = make_trainer(store, None, lines()).train_dataset.to_list()
    without = [
        {
            "prompt_ids": pair["prompt_ids"],
            "chosen_ids": pair["chosen_ids"][:-1],
            "rejected_ids": pair["rejected_ids"][:-1],
        }
        for pair in tokens
    ]
    assert {pair["chosen_ids"][-1] for pair in tokens} == {byte_tokenizer().eos_token_id}
    assert scored(store, Dataset.from_list(without)) == 12
    moved = Dataset.from_list(
        [
            pair
            | {"prompt": pair["prompt"][:-1]}
            | {side: f"?{pair[side]}" for side in ("chosen", "rejected")}
            for pair in PAIRS
        ]
    )
    assert scored(store, moved) == 12


def test_a_tokenizer_and_its_template_count_by_the_tokens_they_make(store):
    assert scored(store, chats(), processing_class=templated()) == 12
    assert scored(store, chats(), processing_class=templated()) == 0
    other = templated(CHAT.replace("[assistant]", "[bot]"))
    assert scored(store, chats(), processing_class=other) == 12
    # Plain text doesn't pass through the template, so its tokens stay the same.
    assert scored(store, lines(), processing_class=other) == 0


def test_all_these_references_lie_in_one_store_and_none_reads_anothers(store):
    for make in MODELS.values():
        scored(store, model=make())
    found = ReferenceStore.open(store / "store")
    namespaces = [found.namespace(found.identity(digest)) for digest in found.digests()]
    assert len(namespaces) == 1 + len(MODELS)
    keys = read_answers(make_trainer(store, None, lines()).train_dataset).keys
    logps = np.stack([each.lookup(keys)[0] for each in namespaces])  # [references, 12]
    assert np.isfinite(logps).all()
    assert len(np.unique(logps.round(12), axis=0)) >= len(MODELS)  # a byte may do nothing
