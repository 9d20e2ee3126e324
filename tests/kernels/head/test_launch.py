"""Which entry of the launch table serves which architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dpofast_kernels.head.launch import architecture, launch_options, launch_table, table_entry


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("sm_90", "sm_90"),
        ("sm_75", "sm_80"),  # older than all
        ("sm_87", "sm_86"),
        ("sm_89", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx942", "gfx942"),
        ("gfx90a", "gfx942"),
        ("cpu", "cpu"),
    ],
)
def test_the_nearest_older_entry_of_the_same_maker(name, entry):
    assert table_entry(name) == entry


@pytest.mark.parametrize(
    ("hip", "properties", "name"),
    [
        (None, {"major": 9, "minor": 0}, "sm_90"),
        (None, {"major": 12, "minor": 1}, "sm_121"),
        ("7.0", {"gcnArchName": "gfx942:sramecc+:xnack-"}, "gfx942"),
    ],
)
def test_a_device_by_its_name(hip, properties, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties)
    )
    device = torch.device("cuda", 7)
    architecture.cache_clear()
    try:
        assert architecture(device) == name
        options = launch_options("score_tiles", device)
    finally:
        architecture.cache_clear()
    assert options == launch_table()[table_entry(name)]["score_tiles"]
