"""A step's forward against the stock model: log-probs, gradients, and the model afterwards."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from dpofast.data.packing.collate import Layout
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ModelError
from dpofast.model.checks import check_head
from dpofast.model.dropout import disable_dropout, dropouts
from dpofast.model.forward import micro_batch, pair_step, run_batch
from dpofast.model.head import PairLossTask, head_options
from dpofast.model.load import load_policy, load_tokenizer
from dpofast.model.parts import body_of
from dpofast.model.scorer import SequenceScorer, _copied_later
from dpofast_kernels import make_loss
from tests.support import VOCAB_SIZE, answer_logps, naive_margin, tiny_llama, token_pairs

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
HEAD_8 = {"head_dim": 8}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

FAMILIES = {
    "llama": ("LlamaConfig", SIZES),
    "llama_tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", SIZES),
    "gemma2": ("Gemma2Config", {**SIZES, **HEAD_8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, **HEAD_8, "final_logit_softcapping": 3.0}),
    "cohere": ("CohereConfig", {**SIZES, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 4.0}),
    "phi": ("PhiConfig", SIZES),  # a head with a bias
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", NEOX),
    "opt": (
        "OPTConfig",
        {**NEOX, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2}),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}


def make_model(family):
    class_name, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # large enough that a head left out, or scaled twice, would show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_its_own_log_probs_and_gradients(family):
    model, loss = make_model(family), make_loss("sigmoid", 0.3, 0.0)
    naive = copy.deepcopy(model)
    reference = make_model("llama")  # any other model
    check_head(model)
    pairs = list(token_pairs(3, seed=2))
    sequences = [
        (pair["prompt_ids"], pair[side])
        for pair in pairs
        for side in ("chosen_ids", "rejected_ids")
    ]
    with torch.no_grad():
        ref_logps = [answer_logps(reference, *sequence).item() for sequence in sequences]
    batch = collate_padded(sequences, ref_logps)
    task = PairLossTask(
        batch.labels, batch.bounds, batch.ref_logps, loss, head_options(model.config)
    )
    with micro_batch(model, batch):
        total, logps, *_ = run_batch(model, batch, task)
    total.backward()
    expected = [answer_logps(naive, *sequence) for sequence in sequences]
    np.testing.assert_allclose(logps.tolist(), [x.item() for x in expected], rtol=2e-5)
    margins = torch.stack([naive_margin(naive, reference, pair) for pair in pairs])
    (-nn.functional.logsigmoid(0.3 * margins)).sum().backward()
    norm = torch.stack([p.grad.norm() for p in naive.parameters() if p.grad is not None]).norm()
    for (name, got), want in zip(model.named_parameters(), naive.parameters(), strict=True):
        if want.grad is None:
            assert got.grad is None, name
        else:
            # the true gradient of a key's bias, say, is 0, and only rounding remains
            bound = 5e-5 * want.grad.norm() + 1e-6 * norm
            assert (got.grad - want.grad).norm() <= bound, name


def test_what_a_family_does_to_its_logits_unknown_to_us_is_found():
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2.0
            return output

    model = Doubled(tiny_llama().config)
    with pytest.raises(ModelError, match="logits"):
        check_head(model)


def test_scores_are_those_of_separate_sequences_and_leave_the_model_as_it_was():
    model = tiny_llama().train()
    scorer = SequenceScorer(model, torch.no_grad, Layout("padded"))
    sequences = [([5, 6, 7], [8, 9]), ([3], [4, 4, 4, 4])]
    got = scorer(sequences)
    at_once = scorer.launch(sequences)  # a CPU has nothing to wait for
    assert all(map(np.array_equal, got, at_once))
    assert model.training
    assert "forward" not in model.__dict__
    assert [len(values) for values in got] == [2, 4]
    for values, sequence in zip(got, sequences, strict=True):
        expected = answer_logps(model, *sequence).item()
        assert values.sum() == pytest.approx(expected, rel=1e-6)


def test_the_host_reads_a_gpus_scores_when_their_copy_is_there(monkeypatch):
    done, empty_like = [], torch.empty_like
    event = SimpleNamespace(synchronize=lambda: done.append("waited"))
    stream = SimpleNamespace(record_event=lambda: done.append("recorded") or event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    # Without a GPU, no memory can be pinned.
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: empty_like(x))
    fetch = _copied_later(torch.arange(3.0))
    assert done == ["recorded"]
    assert fetch().tolist() == [0.0, 1.0, 2.0]
    assert done == ["recorded", "waited"]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_log_sum_exps_are_those_of_the_models_own_logits(layout):
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5,
        )
    ).eval()  # fmt: skip
    model.get_input_embeddings().weight.data.mul_(50.0)  # the head's, too
    sequences = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 4, 4]), ([3], [4, 4, 4, 4])]
    plain = SequenceScorer(model, torch.no_grad, Layout(layout))(sequences)
    found = SequenceScorer(model, torch.no_grad, Layout(layout), True)(sequences)
    for (prompt, answer), logps, scores in zip(sequences, plain, found, strict=True):
        assert scores.shape == (2, len(answer))
        np.testing.assert_array_equal(scores[0], logps)
        with torch.no_grad():
            output = model(torch.tensor([prompt + answer]), output_hidden_states=True)
            assert model.lm_head(output.hidden_states[-1]).abs().max() > 1.0  # the cap has work
        expected = output.logits[0, len(prompt) - 1 : -1].double().logsumexp(-1).numpy()
        np.testing.assert_allclose(scores[1], expected, rtol=1e-6)


def test_a_step_that_fails_leaves_the_model_stock():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="boom"), pair_step(model):
        raise RuntimeError("boom")
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_a_forward_that_was_on_the_instance_comes_back():
    model = tiny_llama()
    model.forward = wrapper = lambda *args, **kwargs: "wrapped"
    with pair_step(model):
        assert model.forward is not wrapper
    assert model.forward is wrapper


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ModelError, match="decoder-only"):
        body_of(model)


def test_dropout_goes_whether_a_layer_or_a_number():
    model = tiny_llama(attention_dropout=0.2)
    model.extra = nn.Dropout(0.1)
    assert len(list(dropouts(model))) == 3  # two numbers of attention, and the layer
    disable_dropout(model)
    assert not list(dropouts(model))
    assert model.extra.p == 0.0


def test_a_missing_folder_or_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_policy(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file' is a file; name the model's folder"):
        load_policy(str(tmp_path / "file"))
    with pytest.raises(ModelError, match="name is empty"):
        load_tokenizer("")
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").touch()
    (broken / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match=r"not a valid JSON file\.\): mend this, or name another"):
        load_tokenizer(str(broken))
    with pytest.raises(ModelError, match=r"atn_implementation'; mend .* model_init_kwargs"):
        load_policy(str(tmp_path), atn_implementation="sdpa")
    assert load_policy(str(tmp_path)).dtype == torch.float32
    assert load_policy(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
