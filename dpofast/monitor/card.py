"""Writes the model card of a run: README.md with metadata that the Hugging Face Hub reads.

The card is made of plain facts. It quotes options by name, one by one, and never a path.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dpofast.monitor.card_metrics import evaluations, metrics_table, table
from dpofast.monitor.public_names import public_name

CARD_FILE = "README.md"
PIPELINE = "text-generation"
GENERATED = "generated_from_trainer"  # the hub's tag for cards that a Trainer writes
# Shows that dpofast wrote the card, and by a hash of the rest that nobody has changed it since.
_MARK = re.compile(r"<!-- Written by dpofast \(([0-9a-f]{16})\)[^\n]*-->\n")

CITATION = """\
```bibtex
@inproceedings{rafailov2023direct,
    title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and
              Stefano Ermon and Chelsea Finn},
    booktitle = {Advances in Neural Information Processing Systems 36},
    year = {2023},
    url = {https://arxiv.org/abs/2305.18290},
}
```"""


DPO = ("Direct Preference Optimization", "2305.18290")


@dataclass(frozen=True)
class CardData:
    """A dataset of the run.

    Attributes:
        name: name for readers: a hub id, a file's name, or what the data is.
        hub_id: id on the hub; None if it isn't known to be there.
        use: "training" or "evaluation".
        pairs: pairs or single answers used; None if the number is unknown.
        config: configuration of a hub dataset.
        set_name: name of an evaluation set in the logs; "eval" for a single one.
    """

    name: str
    hub_id: str | None = None
    use: str = "training"
    pairs: int | None = None
    config: str | None = None
    set_name: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        model_name: the card's title.
        architecture: class of the model.
        base_model: hub id of the model before training; None if it isn't known to be there.
        adapter: kind of adapter, such as LoRA; None for a whole model.
        hub_model_id: id under which the model is published; None if it is not.
        is_chat: whether the tokenizer has a chat template.
        method: name of the method, and the number of its paper on arXiv if it has one.
        examples: what the run counts: pairs or answers.
        reference: what the reference was; "none" for a method without one.
        datasets: datasets of the run.
        options: options that decide what was learnt, by name.
        log_history: one dict per log event, with `step`, as transformers' TrainerState keeps them;
            only those up to the step whose weights are saved.
        saved_step: which step's weights are saved, in words; empty for the last one.
        versions: package -> version; None for a package that isn't installed.
        hardware: processes and kinds of devices.
        tags, languages, tasks: metadata; text-generation if no task is given.
        license: id of a license that the hub knows; None if it is unknown.
    """

    model_name: str
    architecture: str
    base_model: str | None = None
    adapter: str | None = None
    hub_model_id: str | None = None
    is_chat: bool = False
    method: tuple[str, str | None] = DPO
    examples: str = "pairs"
    reference: str = ""
    datasets: Sequence[CardData] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    log_history: Sequence[dict[str, Any]] = ()
    saved_step: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    hardware: str = ""
    tags: Sequence[str] = ()
    languages: Sequence[str] = ()
    tasks: Sequence[str] = ()
    license: str | None = None


def model_card(facts: CardFacts, plot: str | None = None) -> str:
    """The text of README.md.

    Args:
        facts: what the card says.
        plot: file of the run's plot in the card's folder; None if there is none.
    """
    sections = (
        f"# {facts.model_name}",
        _introduction(facts),
        f"## Use\n\n{_use(facts)}",
        f"## Training\n\n{_training(facts, plot)}",
        f"### Data\n\n{_data(facts)}",
        f"### Options\n\n{table(('option', 'value'), _written(facts.options))}",
        f"### Framework versions\n\n{_versions(facts)}",
        f"## Citation\n\n{CITATION}" if facts.method == DPO else "",
    )
    body = "\n\n".join(filter(None, sections))
    text = f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}\n"
    mark = f"<!-- Written by dpofast ({_digest(text)}); a card that you change is kept. -->\n"
    return text.replace("\n---\n", f"\n---\n{mark}", 1)


def is_unchanged_card(text: str) -> bool:
    """Whether dpofast wrote this card and nobody has changed it since."""
    mark = _MARK.search(text)
    return mark is not None and _digest(_MARK.sub("", text, count=1)) == mark.group(1)


def is_kept(folder: Path) -> bool:
    """Whether the folder has a card that isn't overwritten: one that somebody else wrote."""
    path = folder / CARD_FILE
    if not path.is_file():
        return False
    return not is_unchanged_card(path.read_text(encoding="utf-8", errors="replace"))


def metadata(facts: CardFacts) -> ModelCardData:
    """The metadata at the top of the card."""
    known = [data.hub_id for data in facts.datasets if data.hub_id]
    optional = {"base_model_relation": "adapter" if facts.adapter else "finetune"}
    return ModelCardData(
        base_model=facts.base_model,
        datasets=list(dict.fromkeys(known)) or None,
        eval_results=_eval_results(facts) or None,
        language=list(facts.languages) or None,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        model_name=facts.model_name,
        pipeline_tag=next(iter(facts.tasks), PIPELINE),
        tags=[GENERATED, *facts.tags],
        **(optional if facts.base_model else {}),
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """The last evaluation, as the hub shows it beside the card."""
    results = []
    found = evaluations(facts.log_history)
    for (name, values), split in zip(found.items(), _splits(list(found)), strict=True):
        parts = [data for data in facts.datasets if data.set_name == name]
        held_out = " and ".join(data.name for data in parts) or public_name(name) or "a set"
        hub_id = parts[0].hub_id if len(parts) == 1 else None
        for metric, kind, words in (
            ("rewards/accuracies", "accuracy", "Reward accuracy"),
            ("loss", "loss", "Loss"),
        ):
            if metric in values:
                results.append(
                    EvalResult(
                        task_type=PIPELINE,
                        dataset_type=hub_id or "preference-pairs",
                        dataset_name=held_out,
                        dataset_split=split,
                        metric_type=kind,
                        metric_name=words,
                        metric_value=round(values[metric], 6),
                    )
                )
    return results


def _splits(names: Sequence[str]) -> list[str | None]:
    """Names of held-out sets as splits, by which the hub tells them apart; None for a single set.

    Sets with the same type, configuration and split would be one on the hub, whatever their names.
    """
    if len(names) == 1:
        return [None]
    public = [public_name(name) or "a set" for name in names]
    return [
        word if public.count(word) == 1 else f"{word} {index}"
        for index, word in enumerate(public, start=1)
    ]


def _introduction(facts: CardFacts) -> str:
    base = _link(facts.base_model) if facts.base_model else "a local model"
    what = f"{facts.adapter} adapter for" if facts.adapter else "version of"
    kind = f"A {what} {base}" if facts.adapter else f"A fine-tuned {what} {base}"
    names = [_dataset(data) for data in facts.datasets if data.use == "training"]
    on = f" on {_and(names)}" if names else ""
    name, paper = facts.method
    method = f"[{name}](https://huggingface.co/papers/{paper})" if paper else name
    return f"{kind} (`{facts.architecture}`), trained{on} by {method} with dpofast."


def _use(facts: CardFacts) -> str:
    source = f'"{facts.hub_model_id}"' if facts.hub_model_id else '"."  # the folder of this card'
    lines = ["```python"]
    if facts.adapter:
        lines += ["# Needs `pip install peft`; loads the adapter on top of its base model."]
    lines += ["from transformers import pipeline", "", f"model = {source}"]
    lines += [f'generator = pipeline("{PIPELINE}", model=model)']
    if facts.is_chat:
        lines += ['prompt = [{"role": "user", "content": "What can you tell me about tea?"}]']
    else:
        lines += ['prompt = "What can you tell me about tea?"']
    lines += ["output = generator(prompt, max_new_tokens=128, return_full_text=False)"]
    return "\n".join([*lines, 'print(output[0]["generated_text"])', "```"])


def _training(facts: CardFacts, plot: str | None) -> str:
    known = {
        "Weights": facts.saved_step,
        "Reference": facts.reference,
        "Hardware": facts.hardware,
    }
    parts = ["\n".join(f"- {name}: {value}" for name, value in known.items() if value)]
    if plot:
        parts.append(f"![Loss, margins, accuracy and log-probs over the steps]({plot})")
    has_reference = facts.reference != "none"
    parts.append(
        metrics_table(facts.log_history, has_reference=has_reference, examples=facts.examples)
    )
    return "\n\n".join(filter(None, parts))


def _data(facts: CardFacts) -> str:
    rows = [
        (_dataset(data), data.use, "" if data.pairs is None else f"{data.pairs:,}")
        for data in facts.datasets
    ]
    return table(("dataset", "used for", facts.examples), rows)


def _versions(facts: CardFacts) -> str:
    return "\n".join(f"- {name} {found}" for name, found in facts.versions.items() if found)


def _dataset(data: CardData) -> str:
    name = _link(data.hub_id, "datasets/") if data.hub_id else f"`{data.name}`"
    return f"{name} ({data.config})" if data.config else name


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _link(hub_id: str, kind: str = "") -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})"


def _written(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in options.items() if value is not None]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
