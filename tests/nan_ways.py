"""Ways for a NaN or an infinity to come into a run, each with what must become of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from dpofast import DPOTrainer
from dpofast.errors import DataError, DPOFastError, NonFiniteError, ReferenceStoreError
from dpofast.model.finite import own_part
from dpofast.reference.build.answers import read_answers
from dpofast.reference.store.segments import Columns, FloatLists, write_segment
from tests.support import make_trainer, tiny_llama, token_pairs

WEIGHT = "model.layers.0.mlp.up_proj.weight"
POISONED_AFTER = 3  # steps


@dataclass(frozen=True)
class Way:
    """What becomes of a NaN: the error, what it names, and the last checkpoint's step."""

    names: str
    last: int | None = POISONED_AFTER
    error: type[DPOFastError] = NonFiniteError
    exit_code: int = 3


WAYS = {
    "rate of 1e38": Way("learning_rate", None),
    "rate of 1e38, SGD": Way("lower learning_rate", 1),  # whose weights are large, but finite
    "weights": Way(WEIGHT),
    "weights on one rank": Way(WEIGHT),
    "update": Way(f"checkpoint-4 isn't saved, as {WEIGHT}"),
    "last update": Way(f"The trained model isn't saved, as {WEIGHT}", None),
    "weights at start": Way(WEIGHT, None),
    "gradient": Way(f"gradient of {WEIGHT}"),
    "loss": Way("NaN or infinite at row 7 of train", None),
    "row in columns": Way("ref_chosen_logps", None, DataError, 2),
    "row in the store": Way("the log-prob of", None, ReferenceStoreError, 2),
    "reference": Way(f"The reference can't be used: {WEIGHT}", None),
}


def run_way(root: Path, way: str, **options: Any) -> Exception | None:
    """Train until the error, which is returned; a checkpoint is saved after every step."""
    try:
        trainer = _trainer(root, way, options)
        trainer.train()
        trainer.save_model()
    except Exception as error:
        return error
    return None


def assert_clean(folder: Path, last: int | None) -> None:
    """Assert that no file below a run's folder has a NaN, and which checkpoint is the newest."""
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
    assert max(steps, default=None) == last, steps
    assert not list(folder.glob("*.safetensors")), "an export"
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
        elif path.suffix in (".pt", ".pth", ".bin"):
            loaded = torch.load(path, map_location="cpu", weights_only=False)
            assert all(tensor.isfinite().all() for tensor in _tensors(loaded)), path
        elif path.suffix in (".json", ".jsonl", ".md"):
            assert not {"NaN", "Infinity", "nan"} & set(path.read_text().replace(",", " ").split())


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


class _Poison(TrainerCallback):
    """Puts a NaN into a weight before a step, or an infinity after its update."""

    def __init__(self, weight: Any, is_update: bool) -> None:
        self.weight, self.is_update = weight, is_update

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == POISONED_AFTER and not self.is_update:
            own_part(self.weight).view(-1)[0] = math.nan

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == POISONED_AFTER and self.is_update:
            own_part(self.weight).view(-1)[0] = math.inf


def _trainer(root: Path, way: str, options: dict[str, Any]) -> DPOTrainer:
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **options}
    arguments: dict[str, Any] = {}
    pairs = token_pairs(10)
    if way.startswith("rate"):
        options |= {"learning_rate": 1e38, "optim": "sgd" if "SGD" in way else "adamw_torch"}
    if way == "last update":
        options |= {"save_strategy": "no", "max_steps": POISONED_AFTER + 1}
    if way == "row in columns":
        pairs = pairs.add_column("ref_chosen_logps", [-1.0, math.nan, *[-1.0] * 8])
        pairs = pairs.add_column("ref_rejected_logps", [-1.0] * 10)
    if way == "reference":
        arguments["ref_model"] = _poisoned(tiny_llama(1))
    if way == "loss":
        arguments["loss_fn"] = _loss_with_nan_at(pairs[7])
    # A path, as ZeRO-3 shards a model while it loads it.
    model = str(root.parent / "model") if options.get("deepspeed") else tiny_llama()
    trainer = make_trainer(root, model, pairs, options=options, **arguments)
    weight = trainer.model.get_parameter(WEIGHT)
    if way == "weights at start":
        _poisoned(trainer.model)
    if way == "row in the store":
        _poison_store(trainer)
    everywhere = ("weights", "update", "last update")
    if way in everywhere or (way == "weights on one rank" and _is_last_rank(trainer)):
        trainer.add_callback(_Poison(weight, "update" in way))
    if way == "gradient":
        _poison_gradient(trainer, weight)
    return trainer


def _loss_with_nan_at(pair: dict[str, list[int]]) -> Any:
    sizes = torch.tensor([len(pair["chosen_ids"]), len(pair["rejected_ids"])])

    def loss_fn(chosen: torch.Tensor, rejected: torch.Tensor, lengths: torch.Tensor) -> Any:
        losses = torch.nn.functional.softplus(rejected - chosen)
        return torch.where((lengths == sizes).all(1), math.nan, losses)

    return loss_fn


def _poisoned(model: Any) -> Any:
    with torch.no_grad():
        own_part(model.get_parameter(WEIGHT)).view(-1)[0] = math.nan
    return model


def _is_last_rank(trainer: DPOTrainer) -> bool:
    return bool(trainer.args.process_index == trainer.args.world_size - 1)


def _poison_gradient(trainer: DPOTrainer, weight: Any) -> None:
    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        is_time = trainer.state.global_step == POISONED_AFTER and _is_last_rank(trainer)
        return gradient * math.nan if is_time else gradient

    weight.register_hook(poisoned)


def _poison_store(trainer: DPOTrainer) -> None:
    """Write a NaN into the store in a way that no writer of ours does."""
    trainer.reference.settle()
    if not trainer.is_world_process_zero():
        return
    namespace = trainer.reference.store.namespace
    keys = read_answers(trainer.train_set().pairs).keys[:1]
    empty = FloatLists.of([np.empty(0, np.float32)])
    namespace.writer()  # makes the folder
    columns = Columns(
        keys=keys,
        logps=np.array([math.nan]),
        num_tokens=np.array([1], np.int32),
        per_token_logps=empty,
        per_token_logsumexps=empty,
    )
    write_segment(namespace.folder, namespace.digest, columns, 0)
