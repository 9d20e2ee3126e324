"""The beta of each step: the values of schedules, and the moves of the controller."""

from __future__ import annotations

import json
import math

import pytest

from dpofast.train.steps.betas import BetaSchedule, KLController


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (0.7, 0.1), (0.3, 0.3)])
@pytest.mark.parametrize("num_steps", [2, 5, 1000])
def test_schedules_are_their_formulas_and_exact_at_both_ends(start, end, num_steps):
    for kind in ("linear", "cosine"):
        schedule = BetaSchedule(kind, start, end, num_steps)
        got = [schedule.of_step(index) for index in range(num_steps)]
        assert (got[0], got[-1], schedule.of_step(num_steps + 3)) == (start, end, end)
        for index, beta in enumerate(got):
            share = index / (num_steps - 1)
            way = share if kind == "linear" else (1 - math.cos(math.pi * share)) / 2
            assert beta == pytest.approx(start + (end - start) * way, rel=1e-12)


def test_a_run_of_one_step_has_the_first_beta():
    assert BetaSchedule("linear", 0.1, 0.5, 1).of_step(0) == 0.1


@pytest.mark.parametrize(
    ("drift", "factor"),
    [(0.055, 1.01), (0.045, 0.99), (0.05, 1.0), (0.0, 0.98), (9.0, 1.02), (math.inf, 1.02)],
)
def test_more_drift_than_the_target_raises_beta_by_the_clipped_error(drift, factor):
    controller = KLController(0.05, 0.1, 0.5, (0.1, 2.0))
    controller.update(0, drift)
    assert controller.of_step(0) == 0.5
    assert controller.of_step(1) == pytest.approx(0.5 * factor, rel=1e-12)


@pytest.mark.parametrize(("drift", "bound"), [(1.0, 0.6), (0.0, 0.45)])
def test_beta_stays_within_its_bounds(drift, bound):
    controller = KLController(0.05, 1.0, 0.5, (0.45, 0.6))
    for index in range(20):
        controller.update(index, drift)
        assert 0.45 <= controller.of_step(index + 1) <= 0.6
    assert controller.of_step(20) == bound


def test_a_drift_that_is_nan_leaves_beta_as_it_is():
    controller = KLController(0.05, 0.1, 0.5, (0.1, 2.0))
    controller.update(0, 1.0)
    controller.update(1, math.nan)
    assert controller.of_step(1) == controller.of_step(2) == 0.51


def test_a_restored_controller_goes_on_bit_for_bit_unless_the_user_changes_beta():
    drifts = [0.01, 0.3, 0.07, 0.0513, 0.2, 0.02]
    controllers = [KLController(0.05, 0.3, 0.1, (0.05, 1.0)) for _ in range(2)]
    straight, resumed = controllers
    for index, drift in enumerate(drifts):
        if index == 3:
            resumed.restore(json.loads(json.dumps(straight.recorded())))
            assert [resumed.of_step(i) for i in (2, 3)] == [straight.of_step(i) for i in (2, 3)]
        for controller in controllers[: 1 if index < 3 else 2]:
            controller.update(index, drift)
    assert resumed.of_step(6) == straight.of_step(6) != 0.1
    changed = KLController(0.05, 0.3, 0.2, (0.05, 1.0))
    changed.restore(straight.recorded())
    assert changed.of_step(6) == 0.2
    narrow = KLController(0.05, 0.3, 0.1, (0.0999, 0.1001))
    narrow.restore(straight.recorded())
    assert 0.0999 <= narrow.of_step(6) <= 0.1001
