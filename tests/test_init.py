from __future__ import annotations

import pytest

import dpofast


def test_public_names_are_those_of_their_modules():
    public = {name: getattr(dpofast, name) for name in dpofast.__all__ if name != "__version__"}
    assert public.keys() == dpofast.HOMES.keys()
    assert {name: thing.__module__ for name, thing in public.items()} == dpofast.HOMES


def test_other_names_are_an_error():
    with pytest.raises(AttributeError, match="'DPOTrainr'"):
        dpofast.DPOTrainr  # noqa: B018
