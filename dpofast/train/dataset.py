"""The trainer's datasets: any form of preference data -> tokenised pairs, each once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from dpofast.columns import REF_COLUMNS
from dpofast.data import PreparationReport, load_preferences, tokenize_preferences
from dpofast.errors import DataError
from dpofast.model.context import context_of, refuse_longer
from dpofast.model.vocabulary import refuse_unknown_ids, vocabulary_of
from dpofast.options.config import DPOConfig

logger = logging.getLogger(__name__)


class PreparedData:
    """Tokenises datasets as the options say, and remembers which it has seen.

    Args:
        config: options of the run.
        tokenizer: of the policy.
        models: that will run the pairs; None among them is left out.
    """

    def __init__(self, config: DPOConfig, tokenizer: Any, models: Iterable[Any] = ()) -> None:
        self.config, self.tokenizer = config, tokenizer
        given = [model for model in models if model is not None]
        self._vocabularies = dict.fromkeys(map(vocabulary_of, given))
        found = map(context_of, given)
        self._contexts = dict.fromkeys(context for context in found if context is not None)
        self.reports: dict[str, PreparationReport] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}  # id -> the dataset given, its pairs

    def prepare(self, dataset: Any, name: str) -> Any:
        """A datasets.Dataset of prompt_ids, chosen_ids, rejected_ids; None stays None.

        Raises:
            DataError: the data can't be used, or not by the model; with file and row.
        """
        if dataset is None:
            return None
        for given, pairs in self._seen.values():
            if dataset is given or dataset is pairs:
                return pairs
        name = self._free_name(name)
        config = self.config
        with config.main_process_first(local=False, desc=f"tokenising {name}"):
            pairs = load_preferences(dataset, strict=config.strict, name=name)
            pairs, report = tokenize_preferences(
                pairs,
                self.tokenizer,
                max_length=config.max_length,
                truncation_mode=config.truncation_mode,
                strict=config.strict,
                num_proc=config.dataset_num_proc,
                name=name,
            )
        self._refuse_cut_scores(pairs, report)
        refuse_unknown_ids(pairs, name, self._vocabularies)
        refuse_longer(pairs, name, self._contexts)
        self.reports[name] = report
        self._seen[id(dataset)] = (dataset, pairs)
        if config.should_log:
            for line in report.lines():
                logger.info("%s", line)
        return pairs

    def prepare_sets(self, datasets: Any, name: str) -> Any:
        """The same for a dict of named datasets, or for one."""
        if not isinstance(datasets, dict):
            return self.prepare(datasets, name)
        return {key: self.prepare(dataset, f"{name}_{key}") for key, dataset in datasets.items()}

    def _free_name(self, name: str) -> str:
        names = [name, *(f"{name}_{number}" for number in range(2, len(self.reports) + 3))]
        return next(free for free in names if free not in self.reports)

    def _refuse_cut_scores(self, pairs: Any, report: PreparationReport) -> None:
        if set(REF_COLUMNS) <= set(pairs.column_names) and report.tokens_cut:
            raise DataError(
                f"{report.name}: {report.answers_cut} answers and {report.prompts_cut} prompts "
                f"were cut to max_length={report.max_length}, so {' and '.join(REF_COLUMNS)} "
                "don't belong to them any more: raise max_length, or leave these columns out to "
                "have them computed."
            )
