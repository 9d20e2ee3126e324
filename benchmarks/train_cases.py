"""The cases of the race of whole DPO steps: a model, its pairs and the steps.

The process of the race tokenises the pairs and writes them into a folder with the case. The
contenders' processes read them there, and don't have to tokenise any text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.answer_pairs import answer_pairs, num_pairs, rows_needed

BETA = 0.1
MAX_GRAD_NORM = 1.0
SEED = 0
TINY_VOCABULARY = 300
# Pairs in a step of a race with more than two answers to a prompt.
GROUPED_PAIRS = 24
LORA_LAYERS = "all-linear"  # PEFT leaves the head out
# By dtype: allowed relative differences of a step's loss and gradient norm from naive's.
TOLERANCES = {
    "float32": {"loss": 1e-4, "grad_norm": 1e-3},
    "bfloat16": {"loss": 5e-2, "grad_norm": 1e-1},
}


def _shape(
    model_type: str,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: tuple[int, int],  # query heads, key heads
    **others: Any,
) -> tuple[str, dict[str, Any]]:
    """A model type of transformers, and the fields of its config."""
    return model_type, {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads[0],
        "num_key_value_heads": num_heads[1],
        "max_position_embeddings": 8192,
        **others,
    }


def _hybrid(hidden_size: int, intermediate_size: int, head_dim: int) -> tuple[str, dict[str, Any]]:
    """A Qwen3.5 of four layers, of which three have a state, as its config says by itself.

    As in the large ones, the values of a layer's states are as wide as the model, and their keys
    half as wide.

    Args:
        head_dim: size of each head, of attention and of states.
    """
    sizes = dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), head_dim)
    states = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    return _shape("qwen3_5_text", hidden_size, intermediate_size, 4, (4, 2), **sizes, **states)


# Shapes without a vocabulary size get the tokenizer's.
_TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
SHAPES = {
    "tiny": _shape("llama", 32, 48, 2, (4, 2)),
    "tiny hybrid": _hybrid(32, 48, 8),
    "hybrid": _hybrid(256, 688, 64),
    "race": _shape("llama", 256, 688, 4, (4, 2)),
    "0.5b": _shape("qwen2", 896, 4864, 24, (14, 2), **_TIED),
    "3b": _shape("qwen2", 2048, 11008, 36, (16, 2), **_TIED),
    "7b": _shape("qwen2", 3584, 18944, 28, (28, 4), vocab_size=152064),
    "8b": _shape("llama", 4096, 14336, 32, (32, 8), vocab_size=128256, rope_theta=500000.0),
}


@dataclass(frozen=True)
class Case:
    """One race.

    Attributes:
        shape: shape of the model, a key of SHAPES.
        layers: number of layers; None for the shape's.
        dtype: torch's name for the dtype of the weights and of all arithmetic.
        data: preference file whose first pairs are trained on; "random" for short random pairs.
        answers: answers to a prompt, all of whose pairs are trained; 2 for the file's own pairs.
        pairs_per_step: pairs in an optimizer step.
        steps: timed steps, each with pairs of its own. An untimed step comes first, with the pairs
            of the first timed one.
        max_length: largest number of tokens in prompt and answer.
        max_tokens: largest number of tokens in a packed micro-batch (`max_tokens_per_microbatch`).
        checkpointing: whether all contenders recompute activations in the backward.
        lora: whether adapters on all layers except the head are trained, and the weights frozen.
        learning_rate: constant learning rate.
        fixed_batch: pairs in a micro-batch, for contenders that `batch_sizes` doesn't name.
        batch_sizes: micro-batch sizes to try for a contender, which races with the fastest.
    """

    shape: str
    layers: int | None = None
    dtype: str = "float32"
    data: str = "dpo_en_demo"
    answers: int = 2
    pairs_per_step: int = 8
    steps: int = 4
    max_length: int = 4096
    max_tokens: int = 2048
    checkpointing: bool = False
    lora: bool = False
    learning_rate: float = 2e-5
    fixed_batch: int = 4
    batch_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise ValueError(f"Pairs need at least 2 answers to a prompt, not {self.answers}.")
        if self.pairs_per_step % num_pairs(self.answers):
            raise ValueError(
                f"Steps of {self.pairs_per_step} pairs can't be made of whole prompts, which have "
                f"{num_pairs(self.answers)} pairs each."
            )
        for name, sizes in {"ours": (self.fixed_batch,), **self.batch_sizes}.items():
            if all(self.pairs_per_step % size for size in sizes):
                raise ValueError(
                    f"Steps of {self.pairs_per_step} pairs can't be made of micro-batches of "
                    f"{' or '.join(map(str, sizes))} pairs ({name})."
                )

    @property
    def prompts(self) -> int:
        """Prompts of the timed steps."""
        return self.pairs_per_step * self.steps // num_pairs(self.answers)

    @property
    def tolerances(self) -> dict[str, float]:
        return TOLERANCES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def batches_of(self, contender: str) -> tuple[int, ...]:
        """Micro-batch sizes to try for a contender, without those that don't divide a step."""
        wanted = self.batch_sizes.get(contender, (self.fixed_batch,))
        return tuple(dict.fromkeys(size for size in wanted if self.pairs_per_step % size == 0))

    def config(self, vocab_size: int, pad_token_id: int) -> Any:
        """The model's config; `vocab_size` is used if the shape has none."""
        model_type, shape = SHAPES[self.shape]
        fields = {"vocab_size": vocab_size, **shape}
        if self.layers is not None:
            fields["num_hidden_layers"] = self.layers
        return AutoConfig.for_model(model_type, pad_token_id=pad_token_id, **fields)

    def model(self, tokenizer: Any, device: str = "cpu", attention: str = "sdpa") -> Any:
        """The causal LM with random weights, the same in every process."""
        torch.manual_seed(SEED)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                self.config(len(tokenizer), tokenizer.pad_token_id),
                dtype=self.torch_dtype,
                attn_implementation=attention,
            )


@dataclass(frozen=True, eq=False)
class Work:
    """A case with its pairs, as a contender's process reads it from the folder.

    Attributes:
        folder: folder that `prepare` has filled; contenders write their files there, too.
        device: device of the steps, "cpu" or "cuda".
        batch_size: pairs in a micro-batch; packed contenders split a step by tokens instead.
        num_steps: timed steps, the case's number or fewer.
        case_type: class of the case.
    """

    folder: Path
    device: str
    batch_size: int
    num_steps: int
    case_type: ClassVar[type[Case]] = Case

    @cached_property
    def case(self) -> Case:
        fields = json.loads((self.folder / "case.json").read_text(encoding="utf-8"))
        sizes = {name: tuple(each) for name, each in fields.pop("batch_sizes").items()}
        return self.case_type(**fields, batch_sizes=sizes)

    @cached_property
    def timed_pairs(self) -> Dataset:
        """The pairs of the timed steps in order, with prompt_ids, chosen_ids and rejected_ids."""
        return load_from_disk(str(self.folder / "pairs"))

    @cached_property
    def pairs(self) -> Dataset:
        """All pairs in training order: the untimed step takes those of the first timed step."""
        first_again = self.timed_pairs.select(range(self.case.pairs_per_step))
        return concatenate_datasets([first_again, self.timed_pairs])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(str(self.folder / "tokenizer"))

    @property
    def attention(self) -> str:
        """transformers' name for the fastest attention that is installed for this device."""
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        if self.device == "cuda" and is_flash_attn_3_available():
            return "flash_attention_3"
        if self.device == "cuda" and is_flash_attn_2_available():
            return "flash_attention_2"
        return "sdpa"

    def model(self) -> Any:
        return self.case.model(self.tokenizer, self.device, self.attention)

    def adapter(self) -> Any:
        """Config of the LoRA adapter to train; None if the weights are trained."""
        if not self.case.lora:
            return None
        from peft import LoraConfig

        return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_LAYERS)

    def steps(self) -> Iterator[list[list[dict[str, list[int]]]]]:
        """The micro-batches of each optimizer step, the untimed one first."""
        rows, per_step = self.pairs.to_list(), self.case.pairs_per_step
        for number in range(1 + self.num_steps):
            step = rows[number * per_step : (number + 1) * per_step]
            starts = range(0, per_step, self.batch_size)
            yield [step[first : first + self.batch_size] for first in starts]


def prepare(case: Case, folder: Path, data: Path | None) -> str:
    """Write the files that `Work` reads.

    Args:
        case: case to be run.
        folder: folder to write to.
        data: folder of the preference files; None for the usual places.
    Returns:
        Where the pairs come from: "file", "generated" or "random".
    """
    tokenizer, rows, origin = _texts(case, data) if case.data != "random" else _random(case)
    pairs = answer_pairs(rows, case.prompts, case.answers, case.max_length)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
    pairs.save_to_disk(str(folder / "pairs"))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return origin


def _texts(case: Case, data: Path | None) -> tuple[Any, Dataset, str]:
    # Imported here, because the contenders' processes don't need it.
    from benchmarks.data import find_data, race_tokenizer
    from dpofast.columns import ID_COLUMNS
    from dpofast.data import load_preferences, tokenize_preferences

    path, origin = find_data(case.data, data)
    tokenizer = race_tokenizer(path)
    wanted = rows_needed(case.prompts, case.answers)
    rows = load_preferences(str(path))
    if len(rows) < wanted:
        raise ValueError(f"{path} has {len(rows)} pairs, but the race needs {wanted}.")
    pairs, _ = tokenize_preferences(
        rows.select(range(wanted)), tokenizer, max_length=case.max_length
    )
    if len(pairs) < wanted:
        raise ValueError(f"{path}: {wanted - len(pairs)} of its first {wanted} pairs can't be run.")
    return tokenizer, pairs.select_columns(list(ID_COLUMNS)), origin


def _random(case: Case) -> tuple[Any, Dataset, str]:
    """A small tokenizer and short pairs of random tokens, for dry runs."""
    from benchmarks.data import train_bpe

    rng = random.Random(SEED)

    def ids() -> list[int]:
        return [rng.randrange(10, 250) for _ in range(rng.randint(1, 12))]

    rows = [
        {"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()}
        for _ in range(rows_needed(case.prompts, case.answers))
    ]
    return train_bpe(["some words"], TINY_VOCABULARY), Dataset.from_list(rows), "random"


def race_case(shape: str = "race") -> Case:
    """The race on a CPU."""
    sizes = (1, 2, 4, 8)
    return Case(shape, batch_sizes={"trl": sizes, "trl_compact": sizes})


def gpu_case(shape: str, batch_sizes: tuple[int, ...]) -> Case:
    """The race on a GPU: bf16, larger steps, each contender at its best batch size."""
    names = ("padded", "trl", "trl_plain", "naive")
    return Case(
        shape,
        dtype="bfloat16",
        learning_rate=1e-6,
        pairs_per_step=32,
        max_tokens=16384,
        checkpointing=True,
        batch_sizes=dict.fromkeys(names, batch_sizes),
    )


def with_answers(case: Case, answers: int) -> Case:
    """The same race on prompts with several answers: fewer, larger steps of whole prompts.

    A step has the pairs of as many prompts as make `GROUPED_PAIRS` pairs or fewer, and of at least
    one.
    """
    of_prompt = max(1, num_pairs(answers))  # fewer than two answers are refused by Case
    size = of_prompt * max(1, GROUPED_PAIRS // of_prompt)
    return replace(
        case,
        answers=answers,
        pairs_per_step=size,
        steps=2,
        max_tokens=max(case.max_tokens, case.max_length),  # a group is longer than a pair
        fixed_batch=next(each for each in range(case.fixed_batch, 0, -1) if size % each == 0),
    )


def tiny(case: Case) -> Case:
    """The same race with a tiny model and few short pairs, for a dry run."""
    sizes = {name: (1, 2) if len(each) > 1 else each for name, each in case.batch_sizes.items()}
    return replace(
        case,
        shape="tiny hybrid" if case.shape == "hybrid" else "tiny",
        data="random",
        pairs_per_step=4 if case.answers == 2 else 2 * num_pairs(case.answers),
        steps=2,
        max_tokens=64,
        fixed_batch=2,
        batch_sizes=sizes,
    )
