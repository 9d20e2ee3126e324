"""Gathers what a run's model card says. Every option is named here, so that no path gets in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache

from dpofast.data import PairStream
from dpofast.errors import ConfigError
from dpofast.model.parts import causal_lm, is_peft_model
from dpofast.monitor.card import CARD_FILE, DPO, CardData, CardFacts
from dpofast.monitor.guard import ReportGuard
from dpofast.monitor.public_names import hub_id, is_personal, public_name
from dpofast.monitor.summary import hardware, versions
from dpofast.options.beta_fields import beta_in_words
from dpofast.options.named_loss import loss_names
from dpofast.options.weighting_fields import weighting_facts
from dpofast.train.data.dataset import RunDataset
from dpofast.train.data.stream import RunStream
from dpofast.train.data.training_set import TrainingSet
from dpofast.train.steps.memory import zero_stage

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
LOCAL = "local data"  # in place of a name that isn't published
DATASET_ARGUMENTS = ("dataset_name", "dataset_tags", "dataset")  # the first that is given counts
# Options that the card quotes as they are; those that are None or 0 are left out.
QUOTED = (
    "max_grad_norm",
    "weight_decay",
    "max_length",
    "max_prompt_length",
    "max_completion_length",
    "truncation_mode",
    "router_aux_loss_coef",
    "seed",
)

# Methods that aren't DPO: names and papers, by the name of the loss.
METHODS: dict[str, tuple[str, str | None]] = {
    "kto": ("KTO", "2402.01306"),
    "apo_zero_unpaired": ("APO", "2408.06266"),
    **dict.fromkeys(("cpo", "cpo_hinge", "cpo_ipo"), ("CPO", "2401.08417")),
    "simpo": ("SimPO", "2405.14734"),
    "alphapo": ("AlphaPO", "2501.03884"),
    "orpo": ("ORPO", "2403.07691"),
}
FINE_TUNING = ("fine-tuning on the chosen answers", None)


def card_facts(trainer: Any, given: Mapping[str, Any], guard: ReportGuard) -> CardFacts:
    """The facts about a run; a part that fails is left out, and named in a warning.

    Nothing here talks to other ranks.

    Args:
        trainer: the DPOTrainer.
        given: arguments of `create_model_card` that aren't None.
        guard: turns failures into warnings.
    """
    lm, published = causal_lm(trainer.model), _published(trainer)
    base = hub_id(given.get("finetuned_from")) or trainer.base_model
    parts: dict[str, Callable[[], Any]] = {
        "adapter": lambda: _adapter_kind(trainer.model),
        "is_chat": lambda: bool(getattr(trainer.processing_class, "chat_template", None)),
        "method": lambda: _method(trainer),
        "examples": lambda: examples_of(trainer),
        "reference": lambda: _reference(trainer),
        "datasets": lambda: _datasets(trainer, given),
        "options": lambda: card_options(trainer),
        "versions": versions,
        "hardware": lambda: _hardware(trainer),
        "tags": lambda: _tags(trainer, given),
        "license": lambda: given.get("license") or _license(lm, base),
    }
    found = {}
    for name, part in parts.items():
        with guard(f"{CARD_FILE}: its part {name!r}"):
            found[name] = part()
    return CardFacts(
        model_name=card_title(trainer, given),
        architecture=type(lm).__name__,
        base_model=base,
        hub_model_id=published if published and "/" in published else None,
        **_logs(trainer),
        languages=_listed(given.get("language")),
        tasks=_listed(given.get("tasks")),
        **found,
    )


def check_card_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `create_model_card` that a card can't have.

    Args:
        given: the arguments that aren't None.

    Raises:
        ConfigError: names the argument and what is expected.
    """
    for name in ("model_name", "finetuned_from", "license"):
        if not isinstance(given.get(name, ""), str):
            raise ConfigError(f"create_model_card: {name}: got {given[name]!r}, expected a string.")
    for name in ("tags", "language", "tasks", *DATASET_ARGUMENTS, "dataset_args"):
        _listed(given.get(name), name)
    license_id = given.get("license")
    if license_id is not None and not _LICENSE.fullmatch(license_id):
        raise ConfigError(
            f"create_model_card: license: got {license_id!r}, expected an id that the hub knows, "
            "such as apache-2.0, or other."
        )


def card_options(trainer: Any) -> dict[str, Any]:
    """The options that decide what is learnt, by name; None for those without effect."""
    config, loss, state = trainer.user_args, trainer.pair_loss, trainer.state
    optimizer, scheduler = trainer.given_optimizers
    function = getattr(loss, "function", None)  # of a loss of the user's own
    options = {
        "loss_type": ", ".join(loss_names(config, loss)),
        "loss_fn": None if function is None else _function_name(function),
        "beta": getattr(loss, "beta", None),
        "beta_schedule": beta_in_words(config),
        "label_smoothing": getattr(loss, "label_smoothing", None) or None,
        **_own_options(loss),
        "likelihood": trainer.data.likelihood.weight or None,
        "ld_alpha": config.length_discount(),
        **weighting_facts(config),
        "learning_rate": config.learning_rate if optimizer is None else None,
        "lr_scheduler_type": _value(config.lr_scheduler_type),
        "warmup_steps": config.warmup_steps or None,
        "warmup_ratio": (not config.warmup_steps and config.warmup_ratio) or None,
        "optim": _value(config.optim) if optimizer is None else type(optimizer).__name__,
        f"{examples_of(trainer)} per step": _pairs_per_step(config),
        "steps": state.global_step or None,
        "epochs": round(state.epoch, 2) if state.epoch else None,
        **{name: getattr(config, name, None) or None for name in QUOTED if name != "seed"},
        "seed": config.seed,
        "precision": _precision(trainer),
        "quantisation": _quantisation(causal_lm(trainer.model).config),
        **_adapter_options(trainer.model),
    }
    if scheduler is not None:
        options |= {"lr_scheduler_type": type(scheduler).__name__}
        options |= dict.fromkeys(("warmup_steps", "warmup_ratio"))
    if stage := zero_stage(config)[0]:
        options["DeepSpeed"] = f"ZeRO stage {stage}"
    return options


def _pairs_per_step(config: Any) -> int | str:
    pairs: int = config.pairs_per_rank * config.world_size
    return f"{pairs} or more, with all pairs of a prompt" if config.group_by_prompt else pairs


def examples_of(trainer: Any) -> str:
    """What the trainer learns from, in the plural."""
    return "answers" if trainer.takes_answers else "pairs"


def _own_options(loss: Any) -> dict[str, Any]:
    """What only some losses have, by the name of the option."""
    divergence, coefficient = getattr(loss, "divergence", None), getattr(loss, "coefficient", None)
    loss = getattr(loss, "loss", loss)
    parts = getattr(loss, "parts", (loss,))
    return {
        "loss_weights": list(loss.weights) if hasattr(loss, "weights") else None,
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": coefficient if divergence == "alpha_divergence" else None,
        **{
            name: getattr(part, name)
            for part in parts
            for name in getattr(part, "option_names", ())
        },
    }


def _logs(trainer: Any) -> dict[str, Any]:
    """The logs of the saved weights: those of the best step if these were loaded at the end."""
    state, config = trainer.state, trainer.user_args
    best = state.best_global_step
    if trainer.is_in_train or not config.load_best_model_at_end or not best:
        return {"log_history": state.log_history}
    logs = [log for log in state.log_history if log.get("step", 0) <= best]
    metric = config.metric_for_best_model
    by = "metric_for_best_model" if is_personal(metric) else metric  # it may name a held-out set
    return {
        "log_history": logs,
        "saved_step": f"those of step {best} of {state.global_step}, the best by {by}",
    }


def card_title(trainer: Any, given: Mapping[str, Any]) -> str:
    """The title of a card: what is given, else a name of the model or of its folder.

    Args:
        trainer: the DPOTrainer.
        given: arguments of `create_model_card` that aren't None.
    """
    name = given.get("model_name")
    if name and "/" not in name:
        return str(name)
    published = _published(trainer)
    own = published.split("/")[-1] if published else public_name(trainer.args.output_dir)
    base = trainer.base_model
    start = base.split("/")[-1] if base else causal_lm(trainer.model).config.model_type
    method = _method(trainer)
    short = {DPO: "DPO", FINE_TUNING: "SFT"}.get(method, method[0])
    return public_name(name) or own or f"{start}-{short}"


def _published(trainer: Any) -> str | None:
    """The id under which the model is on the hub, or will be."""
    ids = (trainer.hub_model_id, trainer.args.hub_model_id)
    return next((name for name in ids if isinstance(name, str)), None)


def _known(trainer: Any, given: Any) -> TrainingSet | None:
    """What the run knows about a dataset; None for one that isn't prepared yet.

    Preparing it here would hang: the other ranks would not come.
    """
    dataset: TrainingSet | None = trainer.data.known(given, RunDataset)
    stream: TrainingSet | None = trainer.data.known(given, RunStream)
    # A stream that is trained on can be a held-out set, too.
    return (stream or dataset) if given is trainer.train_dataset else (dataset or stream)


def _method(trainer: Any) -> tuple[str, str | None]:
    """The name of the method, and the number of its paper on arXiv."""
    names = loss_names(trainer.user_args, trainer.pair_loss)
    named = next((METHODS[name] for name in names if name in METHODS), None)
    # A mixture with a loss of DPO has a reference, and is DPO.
    if trainer.takes_answers and named is not None:
        return named
    if not trainer.pair_loss.is_reference_free:
        return DPO
    return named or FINE_TUNING


def _reference(trainer: Any) -> str:
    if trainer.pair_loss.is_reference_free:
        return "none"
    training = _known(trainer, trainer.train_dataset)
    if training is not None and training.brings_ref_logps:
        return "log-probs that came with the pairs"
    if trainer.ref_model is None:
        return "the policy before its first step"
    name = hub_id(getattr(causal_lm(trainer.ref_model).config, "_name_or_path", None))
    return f"[{name}](https://huggingface.co/{name})" if name else "a separate model"


def _datasets(trainer: Any, given: Mapping[str, Any]) -> list[CardData]:
    entries = []
    if trainer.train_dataset is not None:
        lists = (_listed(given[name]) for name in DATASET_ARGUMENTS if name in given)
        names = next(lists, trainer.dataset_names)
        configs = _listed(given.get("dataset_args"))
        entries += _described(trainer, trainer.train_dataset, names, configs)
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict):
        for key, dataset in held_out.items():
            (entry, *_) = _described(trainer, dataset)
            name = entry.hub_id or public_name(key) or LOCAL
            entries.append(replace(entry, name=name, use="evaluation", set_name=key))
    elif held_out is not None:
        of_set = _described(trainer, held_out, trainer.eval_dataset_names)
        entries += [replace(entry, use="evaluation", set_name="eval") for entry in of_set]
    return entries


def _described(
    trainer: Any, dataset: Any, names: Sequence[str] = (), configs: Sequence[str] = ()
) -> list[CardData]:
    """One entry for each source of a dataset."""
    known = _known(trainer, dataset)
    counts: dict[str, int | None] = dict(known.sources) if known else {}
    if names and set(names) != set(counts):
        counts = dict.fromkeys(names)
    if not counts:
        counts = dict.fromkeys(_own_names(known.given if known else dataset))
    if known and len(counts) == 1:
        counts = dict.fromkeys(counts, known.report.pairs_kept)
    return [
        CardData(
            hub_id(name) or public_name(name) or LOCAL, hub_id(name), "training", pairs, config
        )
        for (name, pairs), config in zip_longest(counts.items(), configs[: len(counts)])
    ]


def _own_names(given: Any) -> list[str]:
    """Where data comes from, as far as it knows itself."""
    given = given.source if isinstance(given, PairStream) else given
    if isinstance(given, str | Path):
        return [str(given)]
    files = getattr(getattr(given, "info", None), "download_checksums", None) or {}
    found = dict.fromkeys(name for name in map(hub_id, files) if name)
    return list(found) or [LOCAL]


def _tags(trainer: Any, given: Mapping[str, Any]) -> list[str]:
    own = getattr(causal_lm(trainer.model), "model_tags", None) or ()
    kind = _adapter_kind(trainer.model)
    own = [tag for tag in own if tag != "dpo" or _method(trainer) == DPO]
    tags = [*own, *_listed(given.get("tags")), *([kind.lower()] if kind else [])]
    return list(dict.fromkeys(map(str, tags)))


def _license(lm: Any, base: str | None) -> str | None:
    """The license in the card of the model that was trained, if that card is on this disk."""
    folder = getattr(lm.config, "_name_or_path", None) or ""
    path: Any = Path(folder) / CARD_FILE
    if not folder or not path.is_file():
        path = try_to_load_from_cache(base, CARD_FILE) if base else None
    found = metadata_load(path) if isinstance(path, str | Path) else None
    known = (found or {}).get("license")
    return known if isinstance(known, str) and _LICENSE.fullmatch(known) else None


def _precision(trainer: Any) -> str:
    trained = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    weights = f"trained weights in {' and '.join(sorted(trained))}".replace("torch.", "")
    autocast = trainer.accelerator.mixed_precision
    return weights if autocast == "no" else f"{weights}, autocast in {autocast}"


def _quantisation(config: Any) -> str | None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, dict) else given.to_dict()
    bits = next((bits for bits in (4, 8) if values.get(f"load_in_{bits}bit")), None)
    method = str(_value(values.get("quant_method", "quantised")))
    return f"{method}, {bits} bits" if bits else method


def _adapter_kind(model: Any) -> str | None:
    if not is_peft_model(model):
        return None
    kind = str(_value(next(iter(model.peft_config.values())).peft_type))
    return {"LORA": "LoRA", "ADALORA": "AdaLoRA"}.get(kind, kind)


def _adapter_options(model: Any) -> dict[str, Any]:
    if not is_peft_model(model):
        return {}
    config = model.peft_config[model.active_adapter]
    options = {}
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    for name in (*names, "target_parameters", "use_rslora", "use_dora"):
        value: Any = getattr(config, name, None)
        if value is False:
            continue
        many = isinstance(value, set | list | tuple)
        options["rank r" if name == "r" else name] = ", ".join(sorted(value)) if many else value
    return options


def _hardware(trainer: Any) -> str:
    seen = hardware()
    names = seen["devices"] if trainer.args.device.type == "cuda" else []
    device = " and ".join(dict.fromkeys(names)) or f"CPU ({seen['machine']})"
    count = trainer.args.world_size
    return f"{count} process{'es' if count > 1 else ''}, {device}"


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "a function" if is_personal(name) else name


def _value(option: Any) -> Any:
    """The value of an enum; any other object as it is."""
    return getattr(option, "value", option)


def _listed(value: Any, name: str = "") -> list[str]:
    """A list of what may be one string, a list, or None."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple | set):
        return [str(item) for item in value if item is not None]
    raise ConfigError(
        f"create_model_card: {name}: got {value!r}, expected a string or a list of strings."
    )
