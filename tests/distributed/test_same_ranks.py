"""A run resumed on ranks is the same run: at each save point, and on another number of ranks."""

from __future__ import annotations

import re
import shlex
import sys

import numpy as np
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.same_jobs import checkpoint, job, run_jobs

MODES = {"one": ("ddp", 1), "ddp": ("ddp", 2), **{f"zero{n}": (f"zero{n}", 2) for n in (1, 2, 3)}}
WAYS = ("dropout", "workers", "adapter", "epoch edge", "grouped")
# A tenth of all save points, modes and ways: each mode, each way, steps inside and at the end of an
# epoch, and between two logs.
ON_ONE_RANK = [("one", "dropout", (2, 7))]
WITH_WORKERS = [("ddp", "workers", (4, 5))]
ON_TWO_RANKS = [
    ("ddp", "dropout", (7,)),
    ("zero1", "adapter", (2,)),
    ("zero2", "epoch edge", (10, 11)),
    ("zero2", "grouped", (7,)),
    ("zero3", "dropout", (4,)),
]


def run_whole_and_resumed(root, sample, *, fresh):
    """Compare runs that resume after some steps with those that were never stopped.

    Args:
        root: folder of all runs, which have one number of ranks.
        sample: mode, way and steps of each.
        fresh: whether the resumed runs have processes of their own.
    """
    wholes, resumed = {}, {}
    for mode, way, steps in sample:
        kind, ranks = MODES[mode]
        whole = wholes[mode, way] = job(root, f"{mode}-{way}", kind, way, None)
        for step in steps:
            saved = checkpoint(root, whole, step)
            resumed[mode, way, step] = job(
                root, f"{mode}-{way}-{step}", kind, way, saved, save_strategy="no"
            )
    first, then = [*wholes.values()], [*resumed.values()]
    found = {}
    for names in [first, then] if fresh else [[*first, *then]]:
        found |= dict(zip(names, run_jobs(root, ranks, names, 3000.0), strict=True))
    for (mode, way, step), name in resumed.items():
        expected = found[wholes[mode, way]]
        assert expected["logs"][0]["step"] > 1, "a resume between two logs has sums to go on with"
        assert found[name] == expected, (mode, way, step)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sample", "fresh"), [(ON_ONE_RANK, True), (WITH_WORKERS, False), (ON_TWO_RANKS, False)]
)
def test_a_resumed_run_is_equal_bit_for_bit(tmp_path, sample, fresh):
    run_whole_and_resumed(tmp_path, sample, fresh=fresh)


@pytest.mark.torture
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_all_twelve_save_points(tmp_path, mode, way):
    run_whole_and_resumed(tmp_path, [(mode, way, range(1, 13))], fresh=True)


def losses(found):
    assert "logs" in found, found["error"]
    return np.array([(log["loss"], log["grad_norm"]) for log in found["logs"] if "loss" in log])


def convert(error):
    """Run the command that an error names."""
    command = re.search(r"python (-m deepspeed\.checkpoint\.ds_to_universal [^\n]*)", error)
    assert command is not None, error
    run_ranks([sys.executable, *shlex.split(command[1])])


def run_converted(root, ranks, names):
    """Run jobs, of which those under ZeRO are refused until their checkpoints are converted."""
    found = dict(zip(names, run_jobs(root, ranks, names), strict=True))
    again = [name for name in names if "error" in found[name]]
    assert again == [name for name in names if "zero" in name]
    for name in again:
        convert(found[name]["error"])
    return found | dict(zip(again, run_jobs(root, ranks, again), strict=True))


@pytest.mark.distributed
def test_two_ranks_to_one_and_back_to_two(tmp_path):
    """In float32 all losses agree within 1e-6. In bfloat16 each number of ranks rounds gradients
    in its own way, so they agree as closely as those of two runs that were never broken off."""
    jobs = {}
    for name in ("ddp", "zero2", "zero3", "zero3 in bf16"):
        options = {"bf16": "bf16" in name, "logging_steps": 1, "max_steps": 6, "save_steps": 2}
        two, four = checkpoint(tmp_path, f"{name}-whole", 2), checkpoint(tmp_path, f"{name}-one", 4)
        smaller = {**options, "gradient_accumulation_steps": 2}
        mode = name.partition(" ")[0]
        jobs[name] = (
            job(tmp_path, f"{name}-whole", mode, "plain", None, **options),
            job(tmp_path, f"{name}-one", mode, "plain", two, **options),
            job(tmp_path, f"{name}-back", mode, "plain", four, **options),
        )
    wrong = job(tmp_path, "wrong", "ddp", "plain", checkpoint(tmp_path, "ddp-whole", 2), **smaller)
    whole, one, back = (list(names) for names in zip(*jobs.values(), strict=True))
    found = dict(zip(whole, run_jobs(tmp_path, 2, whole), strict=True))
    found |= run_converted(tmp_path, 1, one)
    found |= run_converted(tmp_path, 2, back)
    for name, parts in jobs.items():
        first, *others = (losses(found[part]) for part in parts)
        for other in others:
            rtol = 3e-3 if "bf16" in name else 1e-6
            np.testing.assert_allclose(other, first, rtol=rtol, err_msg=name)
        assert [found[part]["weight_decay"] for part in parts] == [[0.1, 0.0]] * 3
    (refused,) = run_jobs(tmp_path, 1, [wrong])
    assert "pairs_per_step: 4 in the checkpoint, 2 now" in refused["error"]


@pytest.mark.distributed
def test_changes_are_applied_under_deepspeed_or_refused(tmp_path):
    options = {"logging_steps": 1, "max_steps": 4, "save_steps": 2}
    change = {"learning_rate": 1e-3, "weight_decay": 0.3, "max_grad_norm": 0.5}
    names = ["learning_rate", "weight_decay", "max_grad_norm"]
    jobs = []
    for mode in ("zero2", "zero3"):
        jobs.append(job(tmp_path, mode, mode, "plain", None, **options))
        saved = checkpoint(tmp_path, mode, 2)
        changed = {**options, **change}
        jobs.append(job(tmp_path, f"{mode}-refused", mode, "plain", saved, **changed))
        jobs.append(
            job(tmp_path, f"{mode}-allowed", mode, "plain", saved, **changed, allow_changed=names)
        )
    saved = checkpoint(tmp_path, "zero2", 2)
    jobs.append(job(tmp_path, "other-stage", "zero3", "plain", saved, **options))
    jobs.append(job(tmp_path, "no-stage", "ddp", "plain", saved, **options))
    found = dict(zip(jobs, run_jobs(tmp_path, 2, jobs), strict=True))
    for mode in ("zero2", "zero3"):
        for name in names:
            assert f"\n  {name}: " in found[f"{mode}-refused"]["error"]
        allowed = found[f"{mode}-allowed"]
        rates = [log["learning_rate"] for log in allowed["logs"] if "loss" in log]
        assert rates == pytest.approx([5e-3, 3.75e-3, 5e-4, 2.5e-4])
        assert (allowed["weight_decay"], allowed["clip"]) == ([0.3, 0.0], 0.5)
        assert losses(allowed)[2].tolist() == losses(found[mode])[2].tolist()
        assert losses(allowed)[3].tolist() != losses(found[mode])[3].tolist()
    assert "deepspeed: zero2 in the checkpoint, zero3 now" in found["other-stage"]["error"]
    assert "deepspeed: zero2 in the checkpoint, none now" in found["no-stage"]["error"]
