"""How a run's datasets are prepared, and what the log and the summary say of them."""

from __future__ import annotations

import logging

import pytest

from dpofast import DPOConfig
from dpofast.data import mix_preferences
from dpofast.train.dataset import PairPreparer
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, user

TEXT = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
MESSAGES = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}]
IDS = [{"prompt_ids": [10], "chosen_ids": [11], "rejected_ids": [12]}]


def preparer(folder, chat_template=CHAT_TEMPLATE):
    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False)
    return PairPreparer(config, byte_bpe(chat_template=chat_template))


@pytest.mark.parametrize(
    ("rows", "chat_template", "times"),
    [
        (TEXT, CHAT_TEMPLATE, 1),
        (mix_preferences({"x": TEXT, "y": TEXT}), CHAT_TEMPLATE, 1),
        (TEXT, None, 0),
        (MESSAGES, CHAT_TEMPLATE, 0),
        (IDS, CHAT_TEMPLATE, 0),
    ],
)
def test_text_beside_a_chat_template_is_named_once(tmp_path, caplog, rows, chat_template, times):
    with caplog.at_level(logging.INFO, logger="dpofast"):
        preparing = preparer(tmp_path, chat_template)
        preparing.prepare(rows, "train")
        preparing.prepare(rows, "train")
    assert (
        caplog.text.count("train: the pairs are text, so they are tokenised as they are") == times
    )
    assert caplog.text.count("give prompt, chosen and rejected as lists of messages") == times


def test_a_mixture_is_counted_by_its_sets(tmp_path):
    mixture = mix_preferences({"x": TEXT * 3, "y": TEXT})
    assert preparer(tmp_path).prepare(mixture, "train").sources == {"x": 3, "y": 1}
    assert preparer(tmp_path).prepare(TEXT, "train").sources == {}
