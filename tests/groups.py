"""Answers to a prompt, pairs made of them, and the micro-batches that runs make of the pairs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset

from dpofast.columns import ID_COLUMNS
from dpofast.data.packing.batch import PackedPairs
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.plan import BatchShape, StepSampler
from dpofast.data.packing.prompt_groups import PromptGroups
from dpofast.data.packing.step_dataset import StepDataset
from dpofast.data.packing.token_limit import token_limit
from dpofast.train.steps.micro_batches import PairLossPass
from dpofast_kernels import make_loss
from tests.exactness import Case, Outcome, case_of, run_task
from tests.families import VOCAB_SIZE

Pair = tuple[int, int]  # chosen and rejected, of the answers to a prompt


@dataclass(frozen=True, eq=False)
class Pool:
    """A prompt with several answers, and pairs of them.

    Attributes:
        prompt: its length, or its token ids.
        answers: each one's token ids, or lengths: of a common start of all answers, of a start that
            neighbours (0 and 1, 2 and 3, ...) have in common, and of the rest.
        pairs: pairs of the answers.
    """

    prompt: int | list[int]
    answers: Sequence[tuple[int, int, int] | list[int]]
    pairs: Sequence[Pair]


def all_pairs(num_answers: int) -> list[Pair]:
    """All pairs, of which every other one has the later answer as the chosen one."""
    found = itertools.combinations(range(num_answers), 2)
    return [pair if i % 2 else (pair[1], pair[0]) for i, pair in enumerate(found)]


def chain(num_answers: int) -> list[Pair]:
    """Every answer but the last is chosen, and every one but the first rejected."""
    return [(i, i + 1) for i in range(num_answers - 1)]


def star(num_answers: int) -> list[Pair]:
    return [(0, i) for i in range(1, num_answers)]


def random_ids(generator: torch.Generator, count: int) -> list[int]:
    found: list[int] = torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist()
    return found


def case_of_pools(*pools: Pool, seed: int = 1, beta: float = 0.1) -> Case:
    """All pairs of these pools, in turns. An answer has one reference log-prob in all its pairs."""
    generator = torch.Generator().manual_seed(seed)
    of_pools = []
    for pool in pools:
        prompt = pool.prompt
        ids = random_ids(generator, prompt) if isinstance(prompt, int) else prompt
        answers = _answers(pool, generator)
        of_pools.append([(ids, answers[i]) for pair in pool.pairs for i in pair])
    taken = [pool[i : i + 2] for i in range(0, max(map(len, of_pools)), 2) for pool in of_pools]
    slots = [slot for pair in taken for slot in pair]
    known: dict[Any, float] = {}
    for (prompt_ids, answer), ref in zip(slots, case_of(slots, beta).ref_logps, strict=True):
        known.setdefault((tuple(prompt_ids), tuple(answer)), ref)
    refs = [known[tuple(prompt_ids), tuple(answer)] for prompt_ids, answer in slots]
    return Case(slots, refs, beta)


def _answers(pool: Pool, generator: torch.Generator) -> list[list[int]]:
    start: list[int] = random_ids(generator, 20)
    of_two: list[list[int]] = [random_ids(generator, 20) for _ in pool.answers[::2]]
    return [
        each
        if isinstance(each, list)
        else start[: each[0]] + of_two[i // 2][: each[1]] + random_ids(generator, each[2])
        for i, each in enumerate(pool.answers)
    ]


def dataset_of(case: Case) -> Dataset:
    """The tokenised pairs of a case."""
    slots = case.sequences
    columns = zip(
        *((slots[i][0], slots[i][1], slots[i + 1][1]) for i in range(0, len(slots), 2)), strict=True
    )
    return Dataset.from_dict(dict(zip(ID_COLUMNS, map(list, columns), strict=True)))


def rows_of(case: Case, layout: Layout, max_tokens: int) -> tuple[list[PackedPairs], list[int]]:
    """One step of all pairs of a case, as a run lays it out.

    Returns:
        The step's micro-batches; and the pairs in their order, counted in the case.
    """
    pairs = dataset_of(case)
    ref_logps = torch.tensor(case.ref_logps, dtype=torch.float64).view(-1, 2).numpy()
    limit = token_limit(PromptGroups.of(pairs), layout, max_tokens)
    shape = BatchShape(len(pairs), 1, 1)
    (planned,) = StepSampler(len(pairs), shape, 0, seed=None, limit=limit)
    steps = StepDataset(pairs, ref_logps, layout)
    step = steps.__getitems__(planned)
    return step.micro_batches, [pair for part in step.indices for pair in part]


def grouped(
    model: Any,
    case: Case,
    layout: Layout,
    max_tokens: int = 1_000_000,
    **head_options: Any,
) -> Outcome:
    """Run all pairs of a case as a run's step does; hidden states are in the case's order.

    Args:
        max_tokens: most tokens in a packed row.
        head_options: fields of HeadOptions, in place of the model's.
    """
    model.zero_grad()
    batches, order = rows_of(case, layout, max_tokens)
    passes = PairLossPass(model, None, contextlib.nullcontext, torch.device("cpu"))
    totals, slots = [], []
    for batch in batches:
        task = passes.task(batch, make_loss("sigmoid", beta=case.beta))
        task = replace(task, options=replace(task.options, **head_options))
        total, states = run_task(model, batch, task)
        totals.append(total.detach())
        of_sequences = states.detach().split(batch.bounds.diff().tolist())
        slots += [of_sequences[i] for i in batch.of_pairs(torch.arange(len(batch.bounds) - 1))]
    of_pairs = dict(zip(order, zip(slots[0::2], slots[1::2], strict=True), strict=True))
    in_order = [state for pair in range(len(order)) for state in of_pairs[pair]]
    return Outcome(model, torch.stack(totals).sum(), torch.cat(in_order))
