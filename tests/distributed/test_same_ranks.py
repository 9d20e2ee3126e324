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
# A tenth of all save points, modes and ways: each mode, each way, steps inside and at the end of an
# epoch, and between two logs.
SAMPLE = [
    ("one", "dropout", 7),
    ("ddp", "workers", 5),
    ("zero1", "adapter", 2),
    ("zero2", "epoch edge", 10),
    ("zero3", "dropout", 4),
]
ALL = [(mode, way) for mode in MODES for way in ("dropout", "workers", "adapter", "epoch edge")]


def check_resumes(root, mode, way, steps):
    """Compare runs that resume after some steps with the one that was never stopped."""
    kind, ranks = MODES[mode]
    whole = job(root, "whole", kind, way, None, save_only_model=False)
    (expected,) = run_jobs(root, ranks, [whole])
    names = [
        job(root, f"from-{step}", kind, way, checkpoint(root, "whole", step), save_strategy="no")
        for step in steps
    ]
    for step, found in zip(steps, run_jobs(root, ranks, names), strict=True):
        assert found == expected, (mode, way, step)
    assert expected["logs"][0]["step"] > 1, "a resume between two logs has sums to go on with"


@pytest.mark.distributed
@pytest.mark.parametrize(("mode", "way", "step"), SAMPLE)
def test_a_resumed_run_is_equal_bit_for_bit(tmp_path, mode, way, step):
    check_resumes(tmp_path, mode, way, [step])


@pytest.mark.torture
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("mode", "way"), ALL)
def test_all_save_points_of_all_modes(tmp_path, mode, way):
    check_resumes(tmp_path, mode, way, range(1, 13))


def losses(found):
    return np.array([(log["loss"], log["grad_norm"]) for log in found["logs"] if "loss" in log])


def converted(folder, error):
    """Run the command that an error names."""
    command = re.search(r"python (-m deepspeed\.checkpoint\.ds_to_universal [^\n]*)", error)
    assert command is not None, error
    run_ranks([sys.executable, *shlex.split(command[1])])
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mode", "bf16", "rtol"), [("ddp", False, 1e-6), ("zero2", False, 1e-6), ("zero3", True, 1e-4)]
)
def test_two_ranks_to_one_and_back_to_two(tmp_path, mode, bf16, rtol):
    options = {"bf16": bf16, "logging_steps": 1, "max_steps": 6, "save_steps": 2}
    if bf16:  # ZeRO-3 rounds gradients to bfloat16, and on each rank by itself
        options["layout"] = "padded"
    (expected,) = run_jobs(tmp_path, 2, [job(tmp_path, "whole", mode, "plain", None, **options)])
    one, two = checkpoint(tmp_path, "whole", 2), checkpoint(tmp_path, "one", 4)
    back = job(tmp_path, "back", mode, "plain", two, **options)
    alone = job(tmp_path, "one", mode, "plain", one, **options)
    wrong = job(tmp_path, "wrong", mode, "plain", one, gradient_accumulation_steps=2, **options)
    refused, found = run_jobs(tmp_path, 1, [wrong, alone])
    assert "pairs_per_step: 4 in the checkpoint, 2 now" in refused["error"]
    if mode != "ddp":
        converted(one, found["error"])
        (found,) = run_jobs(tmp_path, 1, [alone])
    np.testing.assert_allclose(losses(found), losses(expected), rtol=rtol)
    assert found["weight_decay"] == [0.1, 0.0]
    (found,) = run_jobs(tmp_path, 2, [back])
    if mode != "ddp":
        converted(two, found["error"])
        (found,) = run_jobs(tmp_path, 2, [back])
    np.testing.assert_allclose(losses(found), losses(expected), rtol=rtol)
    assert found["weight_decay"] == [0.1, 0.0]


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
