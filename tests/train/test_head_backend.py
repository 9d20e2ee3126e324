"""The option head_backend: every pass of a run computes its head by the back end that it names."""

from __future__ import annotations

import pytest

from dpofast import DPOTrainer, KTOTrainer
from dpofast.errors import ConfigError
from dpofast.model import head_check
from dpofast_kernels.head import backends, chunked
from tests.support import make_trainer, token_pairs, train

SHORT = {"max_steps": 2, "bf16": False, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture
def used(monkeypatch):
    """The back end of each head that was computed."""
    names = []
    row_ops = chunked.row_ops

    def noted(backend, *rest):
        names.append(backend)
        return row_ops(backend, *rest)

    monkeypatch.setattr(chunked, "row_ops", noted)
    return names


def run(folder, trainer_class, **options):
    head_check.probed_head.cache_clear()  # each run computes what a first one does
    trainer = make_trainer(
        folder,
        pairs=token_pairs(4),
        options={**SHORT, **options},
        trainer_class=trainer_class,
        eval_dataset=token_pairs(2, seed=1),
    )
    steps = train(trainer)
    [metrics] = [log for log in trainer.state.log_history if "eval_loss" in log]
    return [*steps, (metrics["eval_loss"], 0.0)]


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [(DPOTrainer, {"layout": "shared"}), (KTOTrainer, {"loss_type": "kto"})],
)
def test_a_run_computes_every_head_by_the_named_back_end(tmp_path, used, trainer_class, options):
    """Scoring, training, z of KTO and evaluation."""
    expected = run(tmp_path / "auto", trainer_class, **options)
    assert set(used) == {"torch"}
    number = len(used)
    used.clear()
    found = run(tmp_path / "triton", trainer_class, **options, head_backend="triton")
    assert set(used) == {"triton"}
    assert len(used) == number
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="head_backend: got 'tritn', expected one of auto, triton_fused, triton"
    ):
        make_trainer(tmp_path, options={"head_backend": "tritn"})


def test_a_back_end_of_another_device_is_refused_before_anything_is_scored(
    tmp_path, used, monkeypatch
):
    head_check.probed_head.cache_clear()  # an earlier test may have passed it
    monkeypatch.setattr(backends, "is_interpreted", lambda kernel: False)
    trainer = make_trainer(tmp_path, options={"head_backend": "triton"})
    with pytest.raises(ConfigError, match=r"head_backend: .* the tensors are on cpu"):
        trainer.train()
    assert "triton" not in used
