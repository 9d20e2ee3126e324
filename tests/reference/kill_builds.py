"""Kills builds at random moments and counts what is lost; run by test_crashes.py.

    python tests/reference/kill_builds.py kill|real|parallel FOLDER ROUNDS SEED

Builds are forked from this process once it is warm, so that a kill falls into the build and not
into imports. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import numpy as np

from dpofast.reference.build.answers import read_answers
from dpofast.reference.build.builder import BuildOptions, build_reference, reference_logps
from dpofast.reference.store.files import TEMPORARY_PREFIX
from dpofast.reference.store.keys import row_key
from dpofast.reference.store.prune import prune
from dpofast.reference.store.store import ReferenceStore
from dpofast.reference.store.verify import verify
from dpofast.reference.store.writer import Writer
from tests.reference.stubs import batches_of, identity, pairs, stub_logps

COUNTS = ("acknowledged", "lost", "wrong", "most_redone", "duplicates", "torn", "bad_stores")
NUM_PAIRS, BATCH, COMMIT_ROWS = 100, 4, 16
DATASET = pairs(NUM_PAIRS)
ANSWERS = read_answers(DATASET)
SEQUENCES = {
    row_key(pair["prompt_ids"], pair[side]): (pair["prompt_ids"], pair[side])
    for pair in DATASET
    for side in ("chosen_ids", "rejected_ids")
}


def score_by_stub(sequences):
    time.sleep(0.0005)
    return [stub_logps(*sequence) for sequence in sequences]


class Scoring:
    """The scorer, the right log-probs, and by how many nats a row can differ from these."""

    score = staticmethod(score_by_stub)
    expected: ClassVar = {key: stub_logps(*sequence) for key, sequence in SEQUENCES.items()}
    tolerance = 0.0


def score_by_model():
    """Make a small model the scorer, with packed calls as in a run."""
    import torch

    from dpofast.data.packing.collate import Layout
    from dpofast.model.scorer import SequenceScorer
    from tests.support import tiny_llama

    torch.set_num_threads(1)  # forked processes don't inherit PyTorch's threads
    Scoring.score = SequenceScorer(tiny_llama(vocab_size=1000), nullcontext, Layout("shared"))
    Scoring.expected = {
        key: Scoring.score([sequence])[0].astype(np.float32) for key, sequence in SEQUENCES.items()
    }
    Scoring.tolerance = 1e-5  # the other answers in a call change a row by rounding


def is_right(values, key):
    expected = Scoring.expected[key]
    return len(values) == len(expected) and np.abs(values - expected).max() <= Scoring.tolerance


def all_right(store):
    """Whether a store has every answer's summed log-prob."""
    got = reference_logps(namespace(store), ANSWERS)  # [n, 2]
    of_pairs = [
        [
            Scoring.expected[row_key(pair["prompt_ids"], pair[side])].sum(dtype=np.float64)
            for side in ("chosen_ids", "rejected_ids")
        ]
        for pair in DATASET
    ]
    return bool((np.abs(got - np.array(of_pairs)) <= 10 * Scoring.tolerance).all())


def namespace(store):
    return ReferenceStore.open(store, create=True).namespace(identity())


def build(store, log):
    """Build, and log outside the store which keys were scored and which were acknowledged."""
    scored, acknowledged = (
        os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("scored", "acknowledged")
    )
    pending = []
    add, commit = Writer.add, Writer.commit

    def noting_add(writer, key, scores, name=""):
        add(writer, key, scores, name)
        pending.append(key)

    def acknowledging_commit(writer):
        count = commit(writer)
        os.write(acknowledged, b"".join(pending))
        pending.clear()
        return count

    def scorer(sequences):
        os.write(scored, b"".join(row_key(*sequence) for sequence in sequences))
        return Scoring.score(sequences)

    Writer.add, Writer.commit = noting_add, acknowledging_commit
    options = BuildOptions(commit_rows=COMMIT_ROWS, progress=False)
    return build_reference(
        namespace(store), ANSWERS, scorer, batches=batches_of(BATCH), options=options
    )


def start(store, log):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        build(store, log)
        code = 0
    finally:
        os._exit(code)


def keys_in(path):
    content = path.read_bytes() if path.exists() else b""
    return [content[i : i + 16] for i in range(0, len(content) - 15, 16)]


def check(store, log, report):
    """Count acknowledged rows that are gone, rows that are wrong, and work that was repeated."""
    rows = namespace(store)
    keys = list(SEQUENCES)
    stored = rows.read(keys)
    at = {key: place for place, key in enumerate(keys)}
    acknowledged = keys_in(log / "acknowledged")
    report["acknowledged"] += len(acknowledged)
    report["lost"] += sum(not bool(stored.found[at[key]]) for key in acknowledged)
    for place, key in enumerate(keys):
        if stored.found[place]:
            report["wrong"] += not is_right(stored.per_token_logps[place], key)
    redone = len(keys_in(log / "scored")) - len(acknowledged)
    report["most_redone"] = max(report["most_redone"], redone)
    report["duplicates"] += len(rows) - rows.num_unique_rows()
    report["torn"] += len(list(store.glob(f"*/{TEMPORARY_PREFIX}*")))


def kill_rounds(folder, rounds, rng):
    report = dict.fromkeys([*COUNTS, "killed", "finished"], 0)
    store, log = folder / "store", folder / "log"
    started = time.monotonic()
    log.mkdir(parents=True)
    os.waitpid(start(store, log), 0)
    whole = time.monotonic() - started
    shutil.rmtree(store)
    while report["killed"] < rounds:
        shutil.rmtree(log)
        log.mkdir()
        pid = start(store, log)
        time.sleep(rng.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        report["killed"] += os.WIFSIGNALED(status)
        check(store, log, report)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            report["finished"] += 1
            report["bad_stores"] += not verify(store).ok
            shutil.rmtree(store)
    build(store, log)
    report["bad_stores"] += not verify(store).ok
    report["complete"] = all_right(store)
    return report


def parallel_rounds(folder, rounds, rng):
    """Run four independent builds and a prune at the same time, and kill one of the builds."""
    report = dict.fromkeys([*COUNTS, "incomplete", "merged", "killed", "longest_wait"], 0)
    index = -1
    while report["killed"] < rounds:  # a build that ends before its kill doesn't count
        index += 1
        store, logs = folder / f"store{index}", [folder / f"log{index}.{i}" for i in range(4)]
        for log in logs:
            log.mkdir(parents=True)
        started = time.monotonic()
        pids = [start(store, log) for log in logs]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pids[0], signal.SIGKILL)
        _, status = os.waitpid(pids[0], 0)
        report["killed"] += os.WIFSIGNALED(status)
        if (store / "store.json").exists():
            prune(store)  # while the other builds go on
        for pid in pids[1:]:
            _, status = os.waitpid(pid, 0)
            assert os.WIFEXITED(status)
            assert os.WEXITSTATUS(status) == 0
        report["longest_wait"] = max(report["longest_wait"], time.monotonic() - started)
        report["merged"] += prune(store).duplicates
        for log in logs:
            check(store, log, report)
        report["incomplete"] += not all_right(store)
        report["bad_stores"] += not verify(store).ok
    return report


if __name__ == "__main__":
    mode, target, num_rounds, seed = sys.argv[1:]
    if mode == "real":
        score_by_model()
    run = parallel_rounds if mode == "parallel" else kill_rounds
    print(json.dumps(run(Path(target), int(num_rounds), random.Random(int(seed)))))
