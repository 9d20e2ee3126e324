"""Runs on two nodes, which are network namespaces: training, resuming, and losing a node.

Each node has one rank. The commands are those of docs/distributed.md.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpofast.train.checkpoint.lock import locked
from tests.distributed.inputs import write_inputs
from tests.distributed.nodes import cut_cable, environment, kill_all, torchrun, two_nodes
from tests.train.checkpoint.folders import flip_a_bit

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

WITHIN = 600.0  # seconds
PASSED_ON = (
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "TORCH_EXTENSIONS_DIR",
)


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture
def folder(tmp_path):
    """A folder with a model, pairs and a YAML file."""
    return write_inputs(tmp_path)


class Job:
    """A run on the nodes.

    Args:
        commands: a command for each node, or one that starts all nodes.
        variables: the environment.
    """

    def __init__(self, commands, variables) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.processes = [subprocess.Popen(command, env=variables, **pipes) for command in commands]

    def end(self, within=WITHIN):
        """(exit code, output) of each command."""
        end = time.monotonic() + within
        try:
            outputs = [
                each.communicate(timeout=max(0.1, end - time.monotonic()))[0]
                for each in self.processes
            ]
        finally:
            for each in self.processes:
                each.kill()
        codes = [each.returncode for each in self.processes]
        return list(zip(codes, outputs, strict=True))


def start_torchrun(nodes, folder, *words, own_folder=None):
    words = ["-m", "dpofast", "train", str(folder / "run.yaml"), *words]
    commands = [
        node.enter([*torchrun(nodes, number), *words], own_folder)
        for number, node in enumerate(nodes)
    ]
    return Job(commands, environment())


def start_deepspeed(nodes, folder, *words):
    variables = environment(
        DPOFAST_NODES=json.dumps({node.name: node.namespace for node in nodes}),
        DS_ENV_FILE=str(folder / "deepspeed_env"),
    )
    lines = [f"{name}={variables[name]}\n" for name in PASSED_ON if name in variables]
    (folder / "deepspeed_env").write_text("".join(lines))
    (folder / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile"]
    command = [*launcher, str(folder / "hostfile"), "--master_port", "29519", "--module"]
    return Job([[*command, "dpofast", "train", str(folder / "run.yaml"), *words]], variables)


def assert_success(found):
    failed = [output[-4000:] for code, output in found if code]
    assert not failed, "\n\n".join(failed)


def assert_refused(found, *texts):
    for code, output in found:
        assert code == 1  # torchrun's own
        assert output.count("dpofast: error: ") == 1, output
        (line,) = [line for line in output.splitlines() if line.startswith("dpofast: error: ")]
        assert all(text in line for text in texts), line


def losses(folder):
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}


def wait_for(path):
    end = time.monotonic() + WITHIN
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (start_torchrun, []),
        (start_deepspeed, ["--deepspeed", "zero3"]),
        pytest.param(start_torchrun, ["--deepspeed", "zero3"], marks=pytest.mark.torture),
        pytest.param(start_deepspeed, ["--deepspeed", "zero2"], marks=pytest.mark.torture),
    ],
    ids=["torchrun-ddp", "deepspeed-zero3", "torchrun-zero3", "deepspeed-zero2"],
)
def test_a_run_on_two_nodes_is_resumed(nodes, folder, start, words):
    found = start(nodes, folder, *words).end()
    assert_success(found)
    before = losses(folder)
    assert sorted(before) == [1, 2, 3, 4]
    shutil.rmtree(folder / "run" / "checkpoint-4")
    (folder / "run" / "model.safetensors").unlink()
    found = start(nodes, folder, *words, "--resume_from_checkpoint", "true").end()
    assert_success(found)
    assert losses(folder) == before
    assert (folder / "run" / "model.safetensors").exists()


def test_a_folder_that_the_nodes_do_not_share_is_refused(nodes, folder):
    """Node b has a disk of its own at output_dir, as a machine without the shared disk has."""
    own = [None, folder / "run"]
    words = ["-m", "dpofast", "train", str(folder / "run.yaml")]
    commands = [
        node.enter([*torchrun(nodes, number), *words], own[number])
        for number, node in enumerate(nodes)
    ]
    started = time.monotonic()
    found = Job(commands, environment()).end()
    for code, output in found:
        assert code == 1  # torchrun's own
        assert output.count("dpofast: error: ") == 1
        assert (
            f"output_dir: {folder / 'run'} isn't one folder on all nodes: rank 1 on host node-b "
            "can't see what rank 0 on host node-a writes there."
        ) in output
    assert time.monotonic() - started < WITHIN
    assert not list((folder / "run").iterdir())


class OwnDisks:
    """Runs with save_on_each_node, in which a node has a disk of its own at output_dir.

    Args:
        nodes: the nodes.
        folder: has the inputs; node a's output_dir is a part of it.
        more: options of all runs.

    Attributes:
        places: the output_dir of node a and of node b, as this process sees them.
    """

    def __init__(self, nodes, folder, *more):
        self.nodes, self.folder, self.more = nodes, folder, more
        self.places = folder / "run", folder / "disk-of-b"
        self.places[1].mkdir()

    def run(self, *options, of_disk=1):
        """(exit code, output) on each node; the node with number `of_disk` has node b's disk."""
        words = ["train", str(self.folder / "run.yaml"), "--save_on_each_node", "true"]
        bind = f'mount --bind {self.places[1]} {self.places[0]}; exec "$@"'
        commands = []
        for number, node in enumerate(self.nodes):
            command = [*torchrun(self.nodes, number), "-m", "dpofast", *words, *self.more, *options]
            own = ["sh", "-ec", bind, "sh", *command] if number == of_disk else command
            commands.append(node.enter(own))
        return Job(commands, environment()).end()

    def succeed(self, *options):
        assert_success(self.run(*options))
        return losses(self.folder)


LORA = ["--use_peft", "true", "--lora_target_modules", "all-linear"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="ddp"),
        pytest.param(["--deepspeed", "zero2"], marks=pytest.mark.torture, id="zero2"),
        pytest.param(["--deepspeed", "zero3"], marks=pytest.mark.torture, id="zero3"),
        pytest.param(
            ["--deepspeed", "zero3", *LORA], marks=pytest.mark.torture, id="zero3-adapter"
        ),
    ],
)
def test_with_save_on_each_node_each_node_resumes_from_its_own_folder(nodes, folder, more):
    disks = OwnDisks(nodes, folder, *more)
    before = disks.succeed()
    assert sorted(before) == [1, 2, 3, 4]
    weights = "adapter_model.safetensors" if LORA[0] in more else "model.safetensors"
    for place in disks.places:
        assert (place / "checkpoint-2" / "dpofast_manifest.json").is_file()
        gathers = "zero3" in more and place == disks.places[1]
        assert (place / "checkpoint-2" / weights).is_file() != gathers
        assert (place / weights).is_file() != gathers
    shutil.rmtree(disks.places[1] / "checkpoint-4")
    # Node b has lost its newest checkpoint, so the one before is taken on both.
    assert disks.succeed("--resume_from_checkpoint", "true") == before


@pytest.mark.torture
def test_what_is_on_one_node_only_is_noticed_on_both(nodes, folder):
    disks = OwnDisks(nodes, folder)
    before = disks.succeed()
    with locked(disks.places[1]):
        found = disks.run("--resume_from_checkpoint", "true")
    assert_refused(found, "rank 1 on host node-b: output_dir: ", "is in use by ")
    found = disks.run("--resume_from_checkpoint", "true", of_disk=0)
    assert_refused(found, "has no rng_state_0.pth, as another machine saved it")

    for path in disks.places[0].glob("checkpoint-*"):
        shutil.rmtree(path)
    refused = "holds checkpoint-2 and checkpoint-4 of an earlier run"
    assert_refused(disks.run(), "rank 1 on host node-b: output_dir: ", refused)
    found = disks.run("--resume_from_checkpoint", "auto")
    assert_refused(found, "rank 1 on host node-b", "but another node has none of them whole")

    assert disks.succeed("--overwrite_output_dir", "true") == before
    older = disks.places[1] / "_older-runs"
    assert len(list(older.glob("*/checkpoint-*"))) == 2

    found = disks.run("--overwrite_output_dir", "true", of_disk=None)
    assert_refused(found, "save_on_each_node: output_dir ")


@pytest.mark.torture
@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_the_best_checkpoint_of_each_node_counts(nodes, folder, harm):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    data = ["--eval_dataset_name", str(folder / "pairs.json"), "--eval_strategy", "steps"]
    largest = ["--greater_is_better", "true"]  # of checkpoint-2
    disks = OwnDisks(nodes, folder, *data, "--eval_steps", "2", *best, *largest)
    disks.succeed()
    lost = disks.places[1] / "checkpoint-2"
    if harm == "damaged":
        flip_a_bit(lost / "model.safetensors", random.Random(0))
        found = disks.run("--resume_from_checkpoint", "true")
        assert_refused(found, "rank 1 on host node-b: load_best_model_at_end: the best checkpoint")
    else:
        shutil.rmtree(lost)
        found = disks.run("--resume_from_checkpoint", "true")
        assert_success(found)
        assert "The best checkpoint isn't on the node of rank 1" in found[0][1]


@pytest.mark.torture
@pytest.mark.parametrize("harm", ["cut", "power"])
@pytest.mark.parametrize(
    ("start", "words"),
    [
        (start_torchrun, []),
        (start_torchrun, ["--deepspeed", "zero3"]),
        (start_deepspeed, ["--deepspeed", "zero3"]),
    ],
    ids=["torchrun-ddp", "torchrun-zero3", "deepspeed-zero3"],
)
def test_a_lost_node_ends_the_run_within_30_seconds(folder, start, words, harm):
    with two_nodes() as nodes:  # the module's own nodes keep their cable
        more = ["--max_steps", "100000", "--save_strategy", "no"]
        job = start(nodes, folder, *words, *more)
        wait_for(folder / "run" / "metrics.jsonl")
        time.sleep(2.0)
        cut_cable(nodes) if harm == "cut" else kill_all(nodes[1])
        found = job.end(within=30.0)
    assert all(code != 0 for code, _ in found)
    assert "dpofast: error: rank 1 on host node-b was lost: " in found[0][1]
    if harm == "cut":
        assert "dpofast: error: rank 0 on host node-a was lost: no answer for 20 s" in found[-1][1]
