"""How a run's datasets are prepared, and what the log and the summary say of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from dpofast import DPOConfig, DPOTrainer
from dpofast.columns import PAIR_COLUMNS
from dpofast.data import mix_preferences
from dpofast.errors import ConfigError, DataError
from dpofast.train.data.dataset import PairPreparer
from tests.data.builders import CHAT_TEMPLATE, assistant, byte_bpe, user
from tests.support import tiny_llama

TEXT = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
MESSAGES = [{"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}]
IDS = [{"prompt_ids": [10], "chosen_ids": [11], "rejected_ids": [12]}]


def preparer(folder, chat_template=CHAT_TEMPLATE, **options):
    config = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **options)
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
    assert caplog.text.count("give prompts and answers as lists of messages") == times


def test_a_mixture_is_counted_by_its_sets(tmp_path):
    mixture = mix_preferences({"x": TEXT * 3, "y": TEXT})
    assert preparer(tmp_path).prepare(mixture, "train").sources == {"x": 3, "y": 1}
    assert preparer(tmp_path).prepare(TEXT, "train").sources == {}


LONG = [{"prompt": "abcdefgh", "chosen": "xyzuvw", "rejected": "123456"}]


@pytest.mark.parametrize("answer_limit", ["max_completion_length", "max_target_length"])
def test_pairs_are_cut_as_the_options_say(tmp_path, answer_limit):
    options = {"max_prompt_length": 5, answer_limit: 4, "max_length": 8}
    prepared = preparer(tmp_path, **options).prepare(LONG, "train")
    texts = [byte_bpe().decode(prepared.pairs[0][f"{part}_ids"]) for part in PAIR_COLUMNS]
    assert texts == ["defgh", "xyz", "123"]
    plain = prepared.report.as_dict()
    limits = ("max_prompt_length", "max_completion_length", "max_length")
    assert [plain[name] for name in limits] == [5, 4, 8]


@pytest.mark.parametrize(
    ("option", "limit"),
    [("max_prompt_length", 7), ("max_completion_length", 5), ("max_length", 12)],
)
def test_log_probs_of_whole_answers_are_refused_for_cut_pairs(tmp_path, option, limit):
    rows = [{**LONG[0], "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]
    with pytest.raises(DataError, match=rf"cut to .*{option} {limit}.*raise .*{option}"):
        preparer(tmp_path, **{option: limit}).prepare(rows, "train")
    assert preparer(tmp_path, **{option: 30}).prepare(rows, "train").brings_ref_logps


def test_the_trainer_maps_columns_and_roles_of_all_datasets(tmp_path):
    def rows(question):
        return [
            {
                "question": [{"from": "oracle", "value": question}],
                "chosen": [{"from": "gpt", "value": "yes"}],
                "rejected": [{"from": "gpt", "value": "no"}],
            }
        ]

    names = {"columns": {"prompt": "question"}, "roles": {"oracle": "user"}}
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
    tokenizer = byte_bpe(chat_template=CHAT_TEMPLATE)
    trainer = DPOTrainer(
        tiny_llama(vocab_size=len(tokenizer)),
        args=DPOConfig(**options),
        train_dataset=rows("a"),
        eval_dataset={"one": rows("b"), "two": rows("c")},
        processing_class=tokenizer,
        **names,
    )
    prompts = [
        tokenizer.decode(pairs[0]["prompt_ids"])
        for pairs in (trainer.train_dataset, *trainer.eval_dataset.values())
    ]
    assert prompts == [f"<|user|>{question}</s><|assistant|>" for question in "abc"]
    assert np.isfinite(trainer.evaluate(rows("d"))["eval_loss"])
    with pytest.raises(DataError, match=r"no column 'question', which columns gives for 'prompt'"):
        trainer.evaluate(TEXT)


def test_two_names_of_one_limit_must_agree(tmp_path):
    limits = {"max_completion_length": 4, "max_target_length": 5}
    with pytest.raises(ConfigError, match=r"max_target_length is an older name of .* 5 and 4; set"):
        preparer(tmp_path, **limits)
    config = preparer(tmp_path, **dict.fromkeys(limits, 4)).config
    assert (config.max_completion_length, config.max_target_length) == (4, None)
    assert replace(config, max_completion_length=3).max_completion_length == 3
