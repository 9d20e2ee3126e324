"""Contenders of the race of whole DPO steps: our layouts, TRL, and plain PyTorch.

All train the same model on the same pairs in the same steps, with the same AdamW. A contender runs
all steps and reports the end, the loss and the gradient norm of each to its `Meter`.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, set_seed

from benchmarks.cudnn import right_attention
from benchmarks.harness import AbsentError
from benchmarks.train_cases import BETA, MAX_GRAD_NORM, SEED, Work

IGNORED = -100
CHECKPOINTING = {"use_reentrant": False}


class Meter:
    """Time, tokens and losses of a contender's steps.

    Time and tokens leave out the first step, which warms up.

    Attributes:
        losses: loss of every step, the mean over its pairs.
        grad_norms: gradient norm of every step, before clipping.
        body_tokens: positions that went through the embedding, padding and reference included.
        head_rows: positions that went through the head.
        seconds: time of all steps after the first.
        attention: name of the attention implementation that the contender uses.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.body_tokens = self.head_rows = 0
        self.seconds = 0.0
        self.attention: str | None = None
        self._started: float | None = None

    def watch(self, model: Any, head: bool = True) -> None:
        """Count the positions in a causal LM's embedding and, with `head`, in its head."""

        def count_tokens(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            self.body_tokens += inputs[0].numel()

        def count_rows(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            self.head_rows += inputs[0].shape[:-1].numel()

        model.get_input_embeddings().register_forward_hook(count_tokens)
        if head:
            model.get_output_embeddings().register_forward_hook(count_rows)

    def step_ends(self) -> None:
        """Read the clock; to be called after every optimizer step."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._started is not None:
            self.seconds = now - self._started
            return
        # The end of the first step, which doesn't count.
        self.body_tokens = self.head_rows = 0
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()


class StepCallback(TrainerCallback):
    """Reports a Trainer's steps to a meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.step_ends()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "grad_norm" in logs:  # absent from the log at the end of the run
            self.meter.losses.append(float(logs["loss"]))
            self.meter.grad_norms.append(float(logs["grad_norm"]))


@dataclass(frozen=True)
class Entry:
    """A contender.

    Attributes:
        run: function that does all the work and reports to the meter; raises if it can't.
        note: description.
        layout: layout of our contenders; None for others.
        merges: whether our contender runs the pairs of a prompt together.
        on: devices where it takes part without being asked for.
    """

    run: Callable[[Work, Meter], Any]
    note: str
    layout: str | None = None
    merges: bool = True
    on: tuple[str, ...] = ("cpu", "cuda")


def trainer_options(work: Work, name: str) -> dict[str, Any]:
    """The options that our DPOConfig and TRL's have in common."""
    case = work.case
    return {
        "output_dir": str(work.folder / "runs" / name),
        "per_device_train_batch_size": work.batch_size,
        "gradient_accumulation_steps": case.pairs_per_step // work.batch_size,
        "max_steps": 1 + work.num_steps,
        "train_sampling_strategy": "sequential",
        "max_length": case.max_length,
        "beta": BETA,
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": case.checkpointing,
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "bf16": False,  # autocast has nothing to do: the weights are in the case's dtype
        "use_cpu": work.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": SEED,
    }


def _ours(layout: str, merges: bool = True) -> Callable[[Work, Meter], None]:
    """Train with our trainer. All layouts share one reference store, which the first one fills.

    Args:
        layout: the option of that name.
        merges: whether the pairs of a prompt run together; no option of a run switches that off.
    """

    def run(work: Work, meter: Meter) -> None:
        from dpofast import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            work.model(),
            args=DPOConfig(
                **trainer_options(work, layout),
                layout=layout,
                max_tokens_per_microbatch=work.case.max_tokens,
                reference_store=str(work.folder / "store"),
            ),
            train_dataset=work.pairs,
            processing_class=work.tokenizer,
            callbacks=[StepCallback(meter)],
            peft_config=work.adapter(),
        )
        if not merges:
            trainer.loaders.layout = replace(trainer.loaders.layout, merges=False)
        meter.watch(trainer.model)
        meter.attention = work.attention if layout == "padded" else packed_attention_of(work)
        trainer.train()

    return run


def packed_attention_of(work: Work) -> str:
    """The back end that our attention uses in this case's layers."""
    from dpofast_kernels.attention import backend_for

    config = work.case.config(1, 0)
    heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
    # The choice depends only on the dtype, device and head size of these tensors.
    query, key = (
        torch.empty(1, number, size, dtype=work.case.torch_dtype, device=work.device)
        for number in heads
    )
    return backend_for(query, key)


def token_trainer() -> Any:
    """TRL's DPOTrainer for pairs of token ids; the original would tokenise texts."""
    import trl

    class TokenTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenTrainer


def _trl(precompute: bool = True, compact: bool = False) -> Callable[[Work, Meter], None]:
    """Train with TRL's trainer.

    Args:
        precompute: whether TRL computes the reference's log-probs before training and keeps them
            in the dataset's cache. Otherwise a second model runs in every step.
        compact: whether to make TRL's head score only the answers, also on devices where it would
            score every position.
    """

    def run(work: Work, meter: Meter) -> None:
        import trl
        from trl.trainer import utils

        count_trl_rows(meter)
        if compact:
            # TRL's head calls this function to choose what to score. TRL's kernels keep
            # calling the original.
            utils._use_triton = lambda _device: True
        model = work.model()
        # If an adapter is trained, TRL's reference is the model with the adapter switched off.
        needs_reference = not (precompute or work.case.lora)
        trainer = token_trainer()(
            model,
            ref_model=copy.deepcopy(model) if needs_reference else None,
            args=trl.DPOConfig(**trainer_options(work, "trl"), precompute_ref_log_probs=precompute),
            train_dataset=work.pairs,
            processing_class=work.tokenizer,
            callbacks=[StepCallback(meter)],
            peft_config=work.adapter(),
        )
        for watched in filter(None, (trainer.model, trainer.ref_model)):
            meter.watch(watched, head=False)
        meter.attention = right_attention(work.attention, work.device)
        trainer.train()

    return run


def count_trl_rows(meter: Meter) -> None:
    """Let a meter count the positions in TRL's head, from now on in this process."""
    import trl
    from trl.trainer import utils

    names = ("_use_triton", "_ChunkedLogProbFunction")
    if not all(hasattr(utils, name) for name in names):
        raise AbsentError(f"TRL {trl.__version__} has another head than the one measured here")
    utils._ChunkedLogProbFunction = _CountedHead(utils._ChunkedLogProbFunction, meter)


class _CountedHead:
    """Counts positions in TRL's head, which uses the head's weight and never calls the module."""

    def __init__(self, function: Any, meter: Meter) -> None:
        self.function, self.meter = function, meter

    def apply(self, hidden_states: Tensor, *others: Any) -> Any:
        self.meter.head_rows += len(hidden_states)
        return self.function.apply(hidden_states, *others)


def _naive(work: Work, meter: Meter) -> None:
    """Train with plain PyTorch: padded sequences, all logits, the reference scored in every step.

    The reference is a second model or, if an adapter is trained, the same model without it. The
    code follows DPO's authors (github.com/eric-mitchell/direct-preference-optimization), except
    that sequences run without a mask. That is faster, and causal models need no mask if padding is
    on the right.
    """
    model, adapter, reference = work.model(), work.adapter(), None
    if adapter is None:
        reference = copy.deepcopy(model).eval()
        meter.watch(reference)
    else:
        from peft import get_peft_model

        set_seed(SEED)
        model = get_peft_model(model, adapter)
    meter.watch(model)
    meter.attention = right_attention(work.attention, work.device)
    model.train()
    if work.case.checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
        if adapter is not None:
            model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.case.learning_rate, weight_decay=0.0, fused=True)
    for step in work.steps():
        total = 0.0
        for pairs in step:
            batch = naive_batch(pairs, work.tokenizer.pad_token_id, work.device)
            logps = naive_logps(model, *batch)
            with torch.no_grad(), _adapter_off(model, reference) as ref_model:
                ref_logps = naive_logps(ref_model, *batch)
            loss = naive_loss(logps, ref_logps) / len(step)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            del logps, loss  # frees what backward left of the graph, before the next forward
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        meter.step_ends()
        meter.losses.append(total)
        meter.grad_norms.append(norm.item())


@contextlib.contextmanager
def _adapter_off(model: Any, reference: Any) -> Any:
    """Context of the reference's forward pass: a second model, or the model without its adapter."""
    if reference is not None:
        yield reference
        return
    with model.disable_adapter():
        yield model


def naive_batch(
    pairs: list[dict[str, list[int]]], pad_token_id: int, device: str
) -> tuple[Tensor, Tensor]:
    """Batch the chosen, then the rejected sequences, padded on the right.

    Returns:
        Input ids and labels, [2P, L] int64; labels are IGNORED at positions that aren't scored.
    """
    input_ids, labels = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            input_ids.append(torch.tensor(pair["prompt_ids"] + pair[side]))
            labels.append(torch.tensor([IGNORED] * len(pair["prompt_ids"]) + pair[side]))
    return (
        pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id).to(device),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
    )


def naive_logps(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """[2P] fp64: each answer's log-prob, in nats, from all logits [2P, L, V]."""
    logits = model(input_ids, use_cache=False).logits.float()[:, :-1]
    labels = labels[:, 1:]
    targets = labels.clamp(min=0)[..., None]
    per_token_logps = logits.log_softmax(-1).gather(-1, targets)[..., 0]  # [2P, L-1]
    return per_token_logps.double().masked_fill(labels == IGNORED, 0.0).sum(-1)


def naive_loss(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The mean over pairs of DPO's loss."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


ENTRIES: dict[str, Entry] = {
    "shared": Entry(_ours("shared"), "ours: packed rows, what a pair begins with once", "shared"),
    "unshared": Entry(_ours("unshared"), "ours: packed rows, each sequence for itself", "unshared"),
    "padded": Entry(_ours("padded"), "ours: a row for each sequence", "padded"),
    "grouped": Entry(_ours("shared"), "ours: packed rows, each answer to a prompt once", "shared"),
    "ungrouped": Entry(
        _ours("shared", merges=False),
        "ours: packed rows, what a pair begins with once, each pair for itself",
        "shared",
        merges=False,
    ),
    "trl": Entry(_trl(), "TRL, reference log-probs precomputed"),
    "trl_compact": Entry(
        _trl(compact=True),
        "the same, its head made to score answers alone, as on a GPU",
        on=("cpu",),
    ),
    "trl_plain": Entry(_trl(precompute=False), "TRL, reference on every step", on=("cuda",)),
    "naive": Entry(_naive, "plain PyTorch: two models, padded, all logits"),
}
TRUTH = "naive"
_RIVALS = ("trl", "trl_compact", "trl_plain", TRUTH)
# The races of pairs, of prompts with several answers, and of a hybrid. Ours comes first in each.
OF_PAIRS = ("shared", "unshared", "padded", *_RIVALS)
OF_ANSWERS = ("grouped", "ungrouped", *_RIVALS)
OF_HYBRIDS = ("shared", "padded", TRUTH)
