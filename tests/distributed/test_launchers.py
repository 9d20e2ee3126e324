"""Each launcher starts the command line and a script on two ranks, which train as one process does.

The commands are those of docs/distributed.md, with the options that a machine without a GPU needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dpofast import DPOConfig, DPOTrainer
from dpofast.demo.model import make_tokenizer
from dpofast.zero.config import BATCH_FIELDS
from tests.distributed.launch import free_port, run_ranks, torchrun
from tests.support import history, tiny_llama

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("launched.py")
BIN = Path(sys.executable).parent
PAIRS = [
    {"prompt": f"Say {word}.", "chosen": word, "rejected": f"{word}, I guess"}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]
OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
}


def command(launcher):
    """The start of a command that runs on two ranks."""
    accelerate = [
        str(BIN / "accelerate"), "launch", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", free_port(), "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    match launcher:
        case "torchrun":
            return torchrun(2)
        case "accelerate":
            return [*accelerate, "--multi_gpu"]
        case "accelerate, ZeRO-2":
            return [*accelerate, "--use_deepspeed", "--zero_stage", "2"]
        case _:
            return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", free_port()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model and pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    return folder


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """(loss, gradient norm) of three steps of four pairs in one process, which fills the store."""
    folder = tmp_path_factory.mktemp("one")
    options = OPTIONS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    config = DPOConfig(
        output_dir=str(folder / "run"), reference_store=str(inputs / "store"), **options
    )
    pairs = str(inputs / "pairs.json")
    trainer = DPOTrainer(str(inputs / "model"), args=config, train_dataset=pairs)
    trainer.train()
    return history(trainer)


@pytest.fixture
def folder(inputs, tmp_path):
    """A folder with a model, pairs, and a YAML file that names them and the common store."""
    for name in ("model", "pairs.json"):
        (tmp_path / name).symlink_to(inputs / name)
    paths = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "pairs.json",
        "output_dir": tmp_path / "run",
        "reference_store": inputs / "store",
    }
    named = {name: str(path) for name, path in paths.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(named | OPTIONS))
    return tmp_path


def check(folder, expected, rows_scored):
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]
    assert len(steps) == len(expected) == 3
    for got, wanted in zip(steps, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(folder / "run")
    start = AutoModelForCausalLM.from_pretrained(folder / "model")
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(saved.parameters(), start.parameters(), strict=True)
    ]
    assert min(moved) > 0.0  # the weights of all layers were trained and saved whole
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["pairs_per_step"]) == (2, 4)
    assert summary["ref_rows_scored"] == rows_scored


@pytest.mark.parametrize(
    ("launcher", "deepspeed"),
    [
        ("torchrun", "zero3"),
        ("accelerate", None),
        ("accelerate, ZeRO-2", None),
        ("deepspeed", "zero2"),
    ],
)
def test_a_launcher_starts_the_command_line(folder, expected, launcher, deepspeed):
    module = "--module" if launcher == "deepspeed" else "-m"
    words = [module, "dpofast", "train", str(folder / "run.yaml")]
    more = ["--deepspeed", deepspeed] if deepspeed else []
    run_ranks([*command(launcher), *words, *more])
    # The reference is recognised, whether ZeRO-3 partitions it or not.
    check(folder, expected, rows_scored=0)
    checkpoint = folder / "run" / "checkpoint-3"
    args = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (args.deepspeed, args.gradient_accumulation_steps) == (deepspeed, 2)
    if args.deepspeed_plugin is not None:
        told = args.deepspeed_plugin.deepspeed_config
        assert [told[name] for name in BATCH_FIELDS] == [4, 1, 2]
    assert json.loads((checkpoint / "trainer_state.json").read_text())["train_batch_size"] == 1


@pytest.mark.parametrize(
    ("launcher", "deepspeed"),
    [("torchrun", None), ("accelerate", "zero1"), ("deepspeed", "zero3")],
)
def test_a_launcher_starts_a_script(folder, expected, launcher, deepspeed):
    run_ranks([*command(launcher), str(SCRIPT), str(folder), *([deepspeed] if deepspeed else [])])
    check(folder, expected, rows_scored=20)
