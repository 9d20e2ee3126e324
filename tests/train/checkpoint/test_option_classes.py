"""Every option of a run is known as one that decides its numbers, or as one that doesn't."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from dpofast import DPOConfig
from dpofast.options.allowed_changes import ALLOWABLE, FIXED
from dpofast.options.allowed_changes import ROUNDING as ROUNDING_FACTS
from dpofast.options.trl_fields import RULES
from dpofast.train.checkpoint.option_classes import CLASSES, COMPARED, ROUNDING
from dpofast.train.resuming.run_facts import REPLACED, option_facts


def test_every_option_is_in_exactly_one_class():
    counts = Counter(name for names in CLASSES.values() for name in names)
    assert {name: count for name, count in counts.items() if count > 1} == {}
    own = {item.name for item in fields(DPOConfig)} - RULES.keys()
    assert own - counts.keys() == set(), "put a new option into one of the classes"


def test_every_compared_option_has_a_rule(tmp_path):
    config = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    facts = option_facts(config, 10)
    ruled = ALLOWABLE | FIXED.keys() | ROUNDING_FACTS
    assert facts.keys() >= COMPARED - REPLACED
    assert ruled >= COMPARED
    assert ruled >= ROUNDING
    assert facts.keys() <= ruled | {"num_steps", "warmup"}
