"""A dataset on its way through a run: prepared first, then scored, then planned."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import datasets
import numpy as np

from dpofast.columns import PAIRED, RANKED, REF_COLUMNS, RowKind, kind_of_columns
from dpofast.data import (
    PooledPairs,
    PreparationReport,
    load_preferences,
    rows_by_source,
    tokenize_preferences,
    tokenize_ranked,
)
from dpofast.data.packing.answers import AnswerSteps
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.likelihood import NO_LIKELIHOOD, ChosenTokens, Likelihood
from dpofast.data.packing.plan import StepSampler
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.step_dataset import StepDataset
from dpofast.data.packing.token_limit import TokenLimit, token_limit
from dpofast.errors import DataError
from dpofast.model.context import Context, context_of, refuse_longer
from dpofast.model.vocabulary import refuse_unknown_ids, vocabulary_of
from dpofast.options.config import DPOConfig
from dpofast.progress import bars_as_lines
from dpofast.train.data.pair_weights import check_pair_weights, describe_pair_weights
from dpofast_kernels import PreferenceLoss

logger = logging.getLogger(__name__)

Known = TypeVar("Known", bound="HasGiven")


@dataclass(eq=False)
class RunDataset:
    """Everything that a run knows about one dataset.

    `PairPreparer` makes it. `RunReference.score` adds the reference log-probs, `measure_lengths`
    adds the lengths, and `StepLoaders.plan` adds the steps.

    Attributes:
        name: dataset name, used in messages and reports; unique within the run.
        given: the object that the user passed, by which the dataset is recognised later.
        pairs: tokenised pairs, with the columns prompt_ids, chosen_ids, rejected_ids and row;
            PooledPairs if they were made of rows with many answers.
        report: what the preparation kept, cut and left out.
        sources: name of each dataset in a mixture -> pairs read from it; empty for one dataset.
        ref_logps: [n, 2] fp64, summed reference log-probs of chosen and rejected, in nats; with
            `ld_alpha`, weighted sums. None until the dataset is scored.
        scored_by: digest of the reference that `ref_logps` come from; None until the dataset is
            scored, and for a dataset that comes with its own log-probs.
        token_limit: lengths of the pairs in a packed row, and the row's token limit; None until
            they are measured, and where rows are padded.
        plan: this rank's training steps; None until they are planned.
        usual_confidence: label_confidence of pairs that have none, if others have one.
        likelihood: likelihood terms of the loss.
        is_window: whether the pairs are a part of a stream, of which there are more.
    """

    name: str
    given: Any
    pairs: datasets.Dataset | PooledPairs
    report: PreparationReport
    sources: dict[str, int] = field(default_factory=dict)
    ref_logps: np.ndarray | None = None
    scored_by: str | None = None
    token_limit: TokenLimit | None = None
    plan: StepSampler | None = None
    usual_confidence: float = 1.0
    likelihood: Likelihood = NO_LIKELIHOOD
    is_window: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def brings_ref_logps(self) -> bool:
        """Whether the pairs come with reference log-probs of their own."""
        return set(REF_COLUMNS) <= set(self.pairs.column_names)

    def measure_lengths(self, layout: Layout, row_tokens: int | None) -> None:
        """Set `token_limit`. Lengths are counted once, however often the limit changes.

        Args:
            layout: layout of the micro-batches; it doesn't change within a run.
            row_tokens: most tokens of a packed row; None where rows are padded.
        """
        if row_tokens is None:
            self.token_limit = None
        elif self.token_limit is None:
            self.token_limit = self._count_tokens(layout, row_tokens)
        else:
            self.token_limit = replace(self.token_limit, max_tokens=row_tokens)

    def answer_pairs(self) -> datasets.Dataset:
        """All answers that are scored, with the column row.

        Returns:
            Pairs with prompt_ids, chosen_ids and rejected_ids; or, where `answer_index` isn't None,
            single answers with prompt_ids and completion_ids.
        """
        return self.pairs.answers if isinstance(self.pairs, PooledPairs) else self.pairs

    @property
    def answer_index(self) -> np.ndarray | None:
        """[n, 2] int64, the row of each pair's answers in `answer_pairs`; None if it has pairs."""
        return self.pairs.index if isinstance(self.pairs, PooledPairs) else None

    def chosen_tokens(self) -> ChosenTokens:
        """The tokens of each pair that a likelihood term takes a mean over."""
        if not isinstance(self.pairs, PooledPairs):
            return ChosenTokens.of(self.pairs)
        prompts, chosen, _ = self.pairs.lengths().T
        return ChosenTokens.of_lengths(prompts, chosen)

    def _count_tokens(self, layout: Layout, row_tokens: int) -> TokenLimit | None:
        return token_limit(self.groups, layout, row_tokens)

    @cached_property
    def groups(self) -> PromptGroups:
        """The prompts and the distinct answers of the pairs."""
        if isinstance(self.pairs, PooledPairs):
            return PromptGroups.of_pool(self.pairs.answers, self.pairs.index)
        return PromptGroups.of(self.pairs)

    def prompts(self) -> np.ndarray:
        """[n] int64, number of each pair's prompt."""
        return self.groups.prompts

    def padded_prompts(self, layout: Layout) -> np.ndarray | None:
        """`prompts`, if padded micro-batches run an answer once for all of its pairs there."""
        return None if layout.is_packed or not layout.runs_answers_once else self.prompts()

    def resume(self, recorded: Any) -> int:
        """The step from which a resumed run reads the dataset: any step is read as fast."""
        return 0

    def has_more(self, step: int) -> bool:
        """Whether answers are left to be scored while the run trains."""
        return False

    def step_dataset(
        self, layout: Layout, ld_alpha: float | None = None
    ) -> StepDataset | AnswerSteps:
        """The scored pairs, indexed by planned steps; arguments as in StepDataset."""
        assert self.ref_logps is not None, "the dataset is scored first"
        return StepDataset(
            *(self.pairs, self.ref_logps, layout, self.usual_confidence, self.likelihood),
            ld_alpha=ld_alpha,
            groups=self.groups if layout.runs_answers_once else None,
        )


@dataclass(frozen=True, eq=False)
class ReadPairs:
    """A dataset that was just read and tokenised.

    Attributes:
        pairs, report, sources: as in RunDataset.
        is_text: whether the rows were text, and not messages or ids.
    """

    pairs: datasets.Dataset | PooledPairs
    report: PreparationReport
    sources: dict[str, int]
    is_text: bool


class HasGiven(Protocol):
    """A dataset that is recognised by the objects it was made of; see RunDataset."""

    given: Any
    pairs: Any


class PairPreparer:
    """Tokenises a run's datasets as its options say.

    Args:
        config: options of the run.
        tokenizer: tokenizer of the policy.
        models: models that will run the pairs; None entries are ignored.
        columns, roles: arguments of `load_preferences`, the same for all datasets.
        loss: the loss of the run; by default that of its options, with their likelihood terms.

    Attributes:
        datasets: all datasets prepared so far, in the order of their preparation: RunDataset, and
            RunStream for a training set that is a stream.
    """

    dataset_class: ClassVar[type[RunDataset]] = RunDataset
    kind: ClassVar[RowKind] = PAIRED

    def __init__(
        self,
        config: DPOConfig,
        tokenizer: Any,
        models: Iterable[Any] = (),
        columns: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        loss: PreferenceLoss | None = None,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.loss = config.make_loss() if loss is None else loss
        self.likelihood = config.likelihood()
        self.columns, self.roles = columns, roles
        given = [model for model in models if model is not None]
        self._vocabularies = dict.fromkeys(map(vocabulary_of, given))
        found = map(context_of, given)
        self._contexts = dict.fromkeys(context for context in found if context is not None)
        self._warned: set[Context] = set()  # that pairs of a stream have exceeded
        self.datasets: list[Any] = []

    def prepare(self, dataset: Any, name: str) -> RunDataset:
        """Tokenise a dataset, unless the run has it already.

        Args:
            dataset: pairs in any form that `load_preferences` reads, or PooledPairs; a RunDataset,
                or an object that was given before, is not prepared again.
            name: dataset name; gets a number appended if another dataset of the run has that name.

        Raises:
            DataError: the data can't be used at all, or can't be used by one of the models; names
                the file and the row.
        """
        if isinstance(dataset, RunDataset):
            return dataset
        known = self.known(dataset, RunDataset)
        if known is not None:
            return known
        name = self.free_name(name)
        config = self.config
        # All other ranks wait for rank 0, and then find what it has downloaded.
        with bars_as_lines(), config.main_process_first(local=False, desc=f"tokenising {name}"):
            found = self.read(dataset, name)
        self.say_untemplated(found.is_text, name)
        prepared = self.dataset_class(name, dataset, found.pairs, found.report, found.sources)
        self.check(prepared)
        self.datasets.append(prepared)
        if config.should_log:
            log_report(found.report)
            self.say_weights(found.pairs, name)
        return prepared

    def check_stream(self) -> None:
        """Refuse a stream as the training set, if the loss can't train one.

        Raises:
            ConfigError: it can't.
        """

    def read(self, dataset: Any, name: str) -> ReadPairs:
        """Read and tokenise a dataset; arguments as in `prepare`.

        Raises:
            DataError: the data can't be used at all; names the file and the row.
        """
        config = self.config
        if isinstance(dataset, PooledPairs):  # some of the pairs of a dataset of this run
            dataset = dataset.written_out()
        pairs = load_preferences(
            dataset,
            columns=self.columns,
            roles=self.roles,
            strict=config.strict,
            skip_bad_rows=config.skip_bad_rows,
            name=name,
            answer_pairs=config.answer_pairs,
        )
        sources = rows_by_source(pairs)
        is_text = pairs.features.get("prompt") == datasets.Value("string")
        is_ranked = kind_of_columns(pairs.column_names) is RANKED
        tokens, report = (tokenize_ranked if is_ranked else tokenize_preferences)(
            pairs,
            self.tokenizer,
            **vars(config.length_limits()),
            strict=config.strict,
            skip_bad_rows=config.skip_bad_rows,
            num_proc=config.dataset_num_proc,
            name=name,
        )
        return ReadPairs(tokens, report, sources, is_text)

    def check(self, dataset: RunDataset) -> None:
        """Refuse pairs that a model of the run can't run, or the loss can't use.

        The dataset learns what the loss asks of its pairs.

        Raises:
            DataError: there is such a pair; names its row.
        """
        dataset.usual_confidence = 1.0 - self.loss.label_smoothing
        dataset.likelihood = self.likelihood
        if not self.loss.is_reference_free:
            _refuse_cut_scores(dataset)
            _refuse_own_sums(dataset, self.config.length_discount())
        is_whole = not dataset.is_window
        check_pair_weights(dataset.pairs, dataset.name, self.loss, is_whole=is_whole)
        pairs = dataset.answer_pairs()
        refuse_unknown_ids(pairs, dataset.name, self._vocabularies)
        contexts = self._contexts.keys() - (self._warned if dataset.is_window else set())
        warned = refuse_longer(pairs, dataset.name, contexts)
        if dataset.is_window:  # one warning is enough for a stream
            self._warned.update(warned)

    def prepare_sets(self, given: Any, name: str) -> Any:
        """One RunDataset, or a dict of them for a dict of named datasets; None stays None."""
        if given is None:
            return None
        if not isinstance(given, dict):
            return self.prepare(given, name)
        return {key: self.prepare(dataset, f"{name}_{key}") for key, dataset in given.items()}

    def known(self, dataset: Any, kind: type[Known]) -> Known | None:
        """The dataset of the run that was made of this object; None for an object of the user's.

        Args:
            dataset: what the user gave, or what transformers' Trainer has in its place.
            kind: RunDataset or RunStream. An object can be both, if a stream is evaluated, too.
        """
        for each in self.datasets:
            if isinstance(each, kind) and (dataset is each.given or dataset is each.pairs):
                return each
        return None

    def say_untemplated(self, is_text: bool, name: str) -> None:
        """Log that text goes to a chat model as it is, which may not be what was meant."""
        if is_text and getattr(self.tokenizer, "chat_template", None) and self.config.should_log:
            logger.info(
                "%s: the %ss are text, so they are tokenised as they are, without the tokenizer's "
                "chat template. If the model is to see a conversation, give prompts and answers as "
                "lists of messages.",
                *(name, self.kind.noun),
            )

    def say_weights(self, pairs: Any, name: str) -> None:
        """Log which weights the pairs have, as a column may have been meant otherwise."""
        line = describe_pair_weights(pairs, name)
        if line is not None and self.config.should_log:
            logger.info("%s", line)

    def free_name(self, name: str) -> str:
        """The name, with a number if another dataset of the run has it already."""
        taken = {dataset.name for dataset in self.datasets}
        names = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
        return next(free for free in names if free not in taken)


def log_report(report: PreparationReport) -> None:
    """Log what became of a dataset's pairs."""
    for line in report.lines():
        logger.info("%s", line)


def pairs_of(prepared: Any) -> Any:
    """The tokenised pairs of a RunDataset, or of each in a dict; None stays None."""
    if isinstance(prepared, dict):
        return {key: dataset.pairs for key, dataset in prepared.items()}
    return None if prepared is None else prepared.pairs


def _refuse_cut_scores(dataset: RunDataset) -> None:
    """Raise DataError if the dataset has its own reference log-probs but its answers were cut."""
    report = dataset.report
    if dataset.brings_ref_logps and report.tokens_cut:
        raise DataError(
            f"{report.name}: {report.answers_cut} answers and {report.prompts_cut} prompts "
            f"were cut to {report.limits}, so {' and '.join(REF_COLUMNS)} don't belong to them "
            f"any more: raise {report.limits.names}, or leave these columns out to have them "
            "computed."
        )


def _refuse_own_sums(dataset: RunDataset, ld_alpha: float | None) -> None:
    """Raise DataError if the dataset brings sums of log-probs, whose parts ld_alpha needs."""
    if dataset.brings_ref_logps and ld_alpha is not None:
        raise DataError(
            f"{dataset.name} brings {' and '.join(REF_COLUMNS)}, sums over whole answers, but "
            f"ld_alpha={ld_alpha:g} needs the reference's log-prob of each token: leave these "
            "columns out to have them computed, or leave ld_alpha out."
        )
