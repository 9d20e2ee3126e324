"""The stages of a run on a GPU, in the order of their worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

PARTS = ("head", "step")
# Models of the step: those of `benchmarks.train_cases` with a vocabulary. The part of the head
# does without the packages that this module needs.
SHAPES = ("0.5b", "3b", "7b", "8b")
SLOWNESS_OF_A_CPU = 10.0  # in a dry run, whose limits only have to end what hangs
# Tests that decide whether the head and its figures can be trusted: results against float64, equal
# bits, no waiting for the device, a frozen head, and gradients no less exact than naive's.
HEAD_TESTS = (
    "(truth and plain and 256) or bit_for_bit or (waited_for and sigmoid) or frozen or less_exact"
)
# Attention of PyTorch in bf16, rows of many lengths, and a whole trainer in bf16.
STEP_TESTS = "(varlen and dtype0) or (many_rows and varlen) or (trains_as and True and auto)"


@dataclass(frozen=True)
class Stage:
    """One process of a run.

    Attributes:
        name: name of its JSON and log.
        seconds: its time limit. What earlier stages of the part leave is added to it.
        module: what it runs, `python -m module`; it must have the option --json.
        arguments: further arguments.
    """

    name: str
    seconds: float
    module: str
    arguments: tuple[str, ...] = ()


def stages_of(part: str, shape: str, *, is_quick: bool, dry_run: bool) -> list[Stage]:
    """The stages of a part.

    Args:
        part: one of PARTS.
        shape: model of the step, one of SHAPES.
        is_quick: whether the head's part must end in six minutes and the step's in four.
        dry_run: whether every stage runs at toy size on a CPU.
    """
    toy = ("--dry-run",) if dry_run else ()
    if part == "head":
        stages = _quick_head(toy) if is_quick else _head(toy)
    else:
        stages = _quick_step(toy, shape) if is_quick else _step(toy, shape)
    slowness = SLOWNESS_OF_A_CPU if dry_run else 1.0
    return [replace(stage, seconds=slowness * stage.seconds) for stage in stages]


def _quick_head(toy: tuple[str, ...]) -> list[Stage]:
    race: tuple[str, ...] = ("--tokens", "8192", "--rounds", "5", "--warmup", "1")
    # No memory, which takes a process for each contender, and none of those that compile long.
    less = ("--no-memory", "--skip", "compile", "liger_dpo", "cce_filtered")
    if toy:
        race = ("--rounds", "1", "--passes", "forward_backward")
    return [
        Stage("ceilings", 115.0, "benchmarks.gpu.ceilings", toy),
        Stage("head_tests", 75.0, "benchmarks.gpu.device_tests", (_HEAD_FILE, "-k", HEAD_TESTS)),
        Stage("head_race", 160.0, "benchmarks.head", (*_CUDA, *race, *less, *toy)),
    ]


def _quick_step(toy: tuple[str, ...], shape: str) -> list[Stage]:
    race = (*_CUDA, "--contenders", "trl", "--batch-sizes", "4")
    short = ("--rounds", "1", "--steps", "3")
    model = ("--shape", shape)
    profile = (*model, *toy)
    return [
        Stage("step_tests", 45.0, "benchmarks.gpu.device_tests", (_FOLDER, "-k", STEP_TESTS)),
        Stage("profile", 35.0, _PROFILE, profile),
        Stage("profile_plain", 30.0, _PROFILE, (*profile, *_PLAIN)),
        Stage("profile_liger", 25.0, _PROFILE, (*profile, *_PLAIN, "--liger")),
        Stage("race", 105.0, "benchmarks.train", (*race, *short, *model, *toy)),
    ]


def _head(toy: tuple[str, ...]) -> list[Stage]:
    on_gpu = (*_CUDA, *toy)
    return [
        Stage("ceilings", 300.0, "benchmarks.gpu.ceilings", toy),
        Stage("tests", 1500.0, "benchmarks.gpu.device_tests", (_FOLDER,)),
        Stage("head_race", 3600.0, "benchmarks.head", on_gpu),
        Stage("attention", 2400.0, "benchmarks.attention", on_gpu),
    ]


def _step(toy: tuple[str, ...], shape: str) -> list[Stage]:
    model = ("--shape", shape)
    on_gpu = (*_CUDA, *model, *toy)
    return [
        Stage("profile", 300.0, _PROFILE, (*model, *toy)),
        Stage("profile_plain", 300.0, _PROFILE, (*model, *toy, *_PLAIN)),
        Stage("profile_liger", 300.0, _PROFILE, (*model, *toy, *_PLAIN, "--liger")),
        Stage("race", 3600.0, "benchmarks.train", on_gpu),
        Stage("reference", 3600.0, "benchmarks.reference", on_gpu),
    ]


_CUDA = ("--device", "cuda")
_PROFILE = "benchmarks.gpu.step_profile"
_PLAIN = ("--no-checkpointing",)
_FOLDER = "tests/gpu"
_HEAD_FILE = "tests/gpu/test_head_gpu.py"
