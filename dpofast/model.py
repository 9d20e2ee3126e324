"""A transformers causal LM during our steps: its body, then one call of its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpofast.attention import Calls, packed_attention
from dpofast.data.batch import PackedPairs, TokenIds
from dpofast.data.layout import Layout
from dpofast.errors import ModelError
from dpofast.head import HeadTask, ScoreTask, bind, head_forwards, head_options
from dpofast_kernels.attention import SharedLayout
from dpofast_kernels.head.naive import naive_logits
from dpofast_kernels.rounding import product_precision

# A part of the model may differ from stock by this much of the logits' size, by rounding alone.
HEAD_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

# Options of loading that say nothing of what the model computes.
_OF_WEIGHTS = {"dtype", "use_safetensors", "device_map", "low_cpu_mem_usage", "variant"}


class BodyTask(Protocol):
    """What else is made of the body's outputs than the head does: a tensor."""

    def __call__(
        self,
        outputs: Any,
        uses: Tensor,  # [B, L], those of PackedPairs
    ) -> Tensor: ...


def load_policy(name_or_path: str, **options: Any) -> Any:
    """A causal LM from a folder or the hub: safetensors only, float32 unless `dtype` says else.

    Args:
        name_or_path: folder or hub name.
        options: for `from_pretrained`; a string `dtype` such as "bfloat16" is taken, too.

    Raises:
        ModelError: nothing there, or nothing that a causal LM can be loaded from.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "use_safetensors": True, **options}
    if isinstance(options["dtype"], str) and options["dtype"] != "auto":
        options["dtype"] = _dtype_named(options["dtype"])
    _refuse_missing_folder(name_or_path)
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The model {name_or_path!r} can't be loaded: {error}") from error


def load_skeleton(name_or_path: str, **options: Any) -> Any:
    """A causal LM built from its config alone, on the device "meta": it has no weights.

    Args:
        name_or_path: folder or hub name.
        options: what `load_policy` takes.

    Raises:
        ModelError: there is no config, or none that a causal LM can be built from.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_missing_folder(name_or_path)
    trusted = bool(options.get("trust_remote_code"))
    own = {name: value for name, value in options.items() if name not in _OF_WEIGHTS}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **own)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"The model {name_or_path!r} can't be built from its config: {error}"
        ) from error


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype: got {name!r}, expected auto, bfloat16, float16 or float32.")
    return dtype


def load_tokenizer(
    name_or_path: str, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    _refuse_missing_folder(name_or_path)
    remedy = (
        "save one there with tokenizer.save_pretrained, or name one (tokenizer_name_or_path on the "
        "command line, processing_class in Python)"
    )
    folder = Path(name_or_path)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise ModelError(f"The model folder {name_or_path!r} has no tokenizer: {remedy}.")
    try:
        return AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"No tokenizer can be loaded from {name_or_path!r} ({error}): {remedy}."
        ) from error


def _refuse_missing_folder(name_or_path: str) -> None:
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).expanduser().is_dir():
        raise ModelError(f"The model folder {name_or_path!r} does not exist.")


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def body_of(model: Any) -> nn.Module:
    """What makes the hidden states that the head gets.

    Raises:
        ModelError: an encoder-decoder, or no body apart from the head.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models are supported."
        )
    body = model.get_decoder()
    if body is None or body is model:
        body = model.base_model
    if body is model:
        body = getattr(model, "model", model)  # Llama4 names another attribute than it has
    if body is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no body and head to be called apart.")
    return body


def num_layers(model: Any) -> int:
    """Decoder layers; each calls attention once at least, where it has any."""
    return int(model.config.get_text_config().num_hidden_layers)


def _pair_forward(
    model: Any,
    input_ids: Tensor,  # [B, L]
    rows: Tensor,  # [N]
    head_task: HeadTask,
    position_ids: Tensor | None = None,  # [B, L]
    shared_layout: SharedLayout | None = None,
    body_task: Callable[[Any], Tensor] | None = None,
    **_unused: Any,  # PEFT adds arguments of its own, all None here
) -> Any:
    """The causal LM's forward during a step."""
    inputs = {
        "position_ids": position_ids,
        "shared_layout": shared_layout,
        "output_router_logits": None if body_task is None else True,
    }
    given = {name: value for name, value in inputs.items() if value is not None}
    calls = Calls.count
    outputs = body_of(model)(input_ids=input_ids, use_cache=False, **given)
    if shared_layout is not None and Calls.count - calls < num_layers(model):
        raise ModelError(
            f"{type(model).__name__} ran a packed row through an attention that would mix its "
            "sequences; set layout: padded."
        )
    scored = outputs[0].flatten(0, 1).index_select(0, rows)  # [N, H]
    result = model.get_output_embeddings()(scored, head_task)
    return result if body_task is None else (*result, body_task(outputs))


@contextlib.contextmanager
def pair_step(model: nn.Module) -> Iterator[None]:
    """Inside, a call of the model runs its body and a `head_task`; outside, the model is stock.

    Call whatever wraps the model (DDP, DeepSpeed's engine, a PeftModel) with `run_batch`.
    """
    lm = causal_lm(model)
    replaced = [(lm, _pair_forward), *head_forwards(lm.get_output_embeddings())]
    # accelerate keeps an autocasting forward of its own on the instance
    kept = [(module, module.__dict__.get("forward")) for module, _ in replaced]
    for module, function in replaced:
        bind(module, function)
    try:
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def run_batch(
    wrapped: nn.Module,
    batch: PackedPairs,
    head_task: HeadTask,
    body_task: BodyTask | None = None,
) -> Any:
    """One forward pass inside `pair_step`, and for a packed row `packed_attention`.

    Returns:
        What the head's task returns: where there is a `body_task`, too, a tuple, and behind it what
        that one returns.
    """
    return wrapped(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        shared_layout=batch.shared_layout,
        rows=batch.rows,
        head_task=head_task,
        body_task=None if body_task is None else partial(body_task, uses=batch.uses),
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class SequenceScorer:
    """Log-probs of answers under a fixed model, by the kernel that the training steps use.

    Args:
        model: causal LM or PeftModel, on the device where it is to run.
        autocast: makes the context of a forward pass.
        layout: how answers are laid out; those of one prompt should be neighbours.
        with_logsumexps: give the log-sum-exps of the logits, too.
    """

    def __init__(
        self, model: nn.Module, autocast: Any, layout: Layout, with_logsumexps: bool = False
    ) -> None:
        self.model, self.autocast, self.layout = model, autocast, layout
        self.with_logsumexps = with_logsumexps
        self.options = head_options(causal_lm(model).config)

    def __call__(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[np.ndarray]:
        """One forward pass over (prompt ids, answer ids).

        Returns:
            Of each answer [num_tokens] fp64, its per-token log-probs in nats; or [2, num_tokens],
            the log-sum-exps below them.
        """
        batch = self.layout.collate(sequences, by_prompt=True)
        batch = batch.to(next(self.model.parameters()).device)
        attention = packed_attention(causal_lm(self.model).config, batch.shared_layout)
        with attention, evaluating(self.model), pair_step(self.model), self.autocast():
            task = ScoreTask(batch.labels, self.options, self.with_logsumexps)
            scores = run_batch(self.model, batch, task)  # [N] or [2, N]
        # float64, so that what is summed later is what the head gave, whatever its precision
        return np.split(scores.double().cpu().numpy(), batch.bounds[1:-1].numpy(), axis=-1)

    def num_tokens(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> int:
        """Positions that the body runs over in a call with these, padding included."""
        return self.layout.num_tokens(sequences, by_prompt=True)


def check_head(model: nn.Module) -> None:
    """Compare body, head and what follows it with the model's own forward, on a few tokens.

    Raises:
        ModelError: they differ, so the family does something to its hidden states or logits that
            `head_options` doesn't know; training on it would be wrong.
    """
    lm = causal_lm(model)
    vocab_size = shape(lm.get_input_embeddings().weight)[0]
    device = next(lm.parameters()).device
    input_ids = torch.arange(8, device=device)[None] * 7 % vocab_size  # [1, 8]
    batch = PackedPairs(
        input_ids=input_ids,
        position_ids=None,
        rows=torch.arange(8, device=device),
        labels=input_ids[0],
        bounds=torch.tensor([0, 8]),
        ref_logps=None,
        num_tokens=8,
        uses=torch.ones_like(input_ids),
    )
    options = head_options(lm.config)
    with evaluating(model):
        stock = model(input_ids=input_ids, use_cache=False)
        with pair_step(model):
            ours = run_batch(model, batch, _LogitsTask(options))
    expected = stock.logits[0].float()  # [8, V]
    error = ((ours.float() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    dtype = product_precision(lm.get_output_embeddings().weight.dtype, device)
    if not error <= HEAD_TOLERANCE[dtype]:
        raise ModelError(
            f"{type(lm).__name__} does something to its logits that dpofast doesn't know "
            f"(they differ by {error:.1%} from body and head alone), so its log-probs would be "
            "wrong; please report this model type."
        )


class _LogitsTask:
    """A head task that gives the logits themselves; for `check_head` alone."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def __call__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return naive_logits(hidden_states, weight, replace(self.options, bias=bias))


def numel(parameter: Tensor) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has spread over the ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape(parameter: Tensor) -> torch.Size:
    """Of a parameter, also of one that ZeRO-3 has spread over the ranks."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every dropout above 0: (module, attribute), whether a layer or a number.

    The noise that a mixture of experts puts on what its routers see counts as one.
    """
    noises = ("jitter_noise", "input_jitter_noise")
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = (
                name == "p"
                if isinstance(module, nn.modules.dropout._DropoutNd)
                else ("drop" in name or name in noises)
            )
            if is_rate and isinstance(value, float) and value > 0.0:
                yield module, name


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, LoRA's included; the model's config keeps what it says."""
    for module, name in list(dropouts(model)):
        setattr(module, name, 0.0)
