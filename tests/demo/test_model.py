"""The demo's tokenizer, its warm-up, and what it measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset

from dpofast.demo.data import DemoSize, make_data
from dpofast.demo.measure import answer, exact_share, score_policy
from dpofast.demo.model import make_model, make_tokenizer
from dpofast.demo.warmup import WarmupOptions, encode_turn, warm_up


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_tokenizer_has_one_token_a_byte(tokenizer: Any) -> None:
    text = 'Ελλάδα: 2 + 2,\n\t"quoted" \x00'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_template_splits_where_the_answer_begins(tokenizer: Any) -> None:
    prompt, tail = encode_turn(tokenizer, "Why?", "So.")
    assert tokenizer.decode(prompt) == "<|user|>Why?<|end|><|assistant|>"
    assert tokenizer.decode(tail) == "So.<|end|>"
    assert tail[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_warm_up_learns_and_is_repeatable(tokenizer: Any) -> None:
    texts = make_data(0, DemoSize(facts=2, lists=2, held_out=2, warmup_lists=4)).warmup[:32]
    options = WarmupOptions(epochs=6, batch_size=16, warmup_steps=4)
    losses: list[list[float]] = []
    for _ in range(2):
        losses.append([])
        model = make_model(tokenizer, seed=3)
        warm_up(model, tokenizer, texts, options, lambda _s, _n, loss: losses[-1].append(loss))
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_policy_scores_tell_which_answer_is_more_probable(tokenizer: Any) -> None:
    model = make_model(tokenizer, seed=0)
    warm_up(
        model,
        tokenizer,
        [("Yes or no?", "yes")] * 16,
        WarmupOptions(epochs=10, batch_size=8, warmup_steps=4),
    )
    prompt, yes = encode_turn(tokenizer, "Yes or no?", "yes")
    _, nah = encode_turn(tokenizer, "Yes or no?", "nah")
    _, longer = encode_turn(tokenizer, "Yes or no?", "yes, yes")
    rows = [(yes, nah), (nah, yes), (yes, longer)]
    pairs = Dataset.from_list(
        [{"prompt_ids": prompt, "chosen_ids": a, "rejected_ids": b} for a, b in rows]
    )
    scores = score_policy(model, pairs, tokenizer.pad_token_id, batch_pairs=2)
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.equal_length_accuracy == 0.5
    with torch.no_grad():
        ids = torch.tensor([prompt + yes])
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    expected = sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(yes))
    assert scores.logps[0, 0] == pytest.approx(expected, abs=1e-4)


def test_answers_are_the_most_probable_ones(tokenizer: Any) -> None:
    model = make_model(tokenizer, seed=0)
    texts = [("Yes or no?", "yes"), ("And you?", "me too")] * 4
    warm_up(model, tokenizer, texts, WarmupOptions(epochs=30, batch_size=8, warmup_steps=4))
    answers = answer(model, tokenizer, ["Yes or no?", "And you?"])
    assert answers == ["yes", "me too"]
    rows = [
        {"prompt": [], "chosen": [{"role": "assistant", "content": text}], "rejected": []}
        for text in ("yes", "no")
    ]
    assert exact_share(answers, rows) == 0.5
