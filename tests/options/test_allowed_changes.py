from __future__ import annotations

import pytest

from dpofast import DPOConfig
from dpofast.errors import ConfigError
from dpofast.options.allowed_changes import ALLOWABLE, read_allowed


@pytest.mark.parametrize(
    "name", ["bf16", "deepspeed", "pairs_per_step", "config.rope_theta", "adapter.r", "dtype"]
)
def test_what_cannot_be_applied_cannot_be_allowed(name):
    with pytest.raises(ConfigError, match=rf"{name} can't change in a resumed run, as "):
        read_allowed([name])


def test_unknown_names_are_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="'learning_rat' is unknown; choose among adam_beta1, "):
        read_allowed("learning_rat")
    with pytest.raises(ConfigError, match="ranks needs no permission"):
        read_allowed(["ranks"])
    assert read_allowed("beta, seed") == {"beta", "seed"}
    assert read_allowed(sorted(ALLOWABLE)) == ALLOWABLE
    assert read_allowed(None) == set()


def test_a_typo_is_found_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="allow_changed: 'learning_rat' is unknown"):
        DPOConfig(output_dir=str(tmp_path), allow_changed=["learning_rat"])
