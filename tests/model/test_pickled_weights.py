"""Weights that are only a pickle: the error names a command, and the command converts them."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpofast.errors import ModelError
from dpofast.model.load import load_policy
from dpofast.model.pickled_weights import refuse_pickled_on_hub
from tests.support import tiny_llama


def run_command(message: str) -> None:
    """Run the Python code of the command with which an error ends."""
    program, option, code = shlex.split(message[message.index("python -c") :])
    assert (program, option) == ("python", "-c")
    exec(code, {})


def pickled_model(folder, shards):
    model = tiny_llama()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = model.state_dict()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return weights
    names = list(weights)
    place = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        torch.save({name: weights[name] for name in names[shard::shards]}, folder / file)
        place |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize(("shards", "file"), [(1, "bin"), (3, "bin.index.json")])
def test_the_command_converts_a_model(tmp_path, shards, file):
    folder = tmp_path / 'it\'s "here"'
    weights = pickled_model(folder, shards)
    with pytest.raises(ModelError, match=rf"weights as pytorch_model\.{file}, but only") as caught:
        load_policy(str(folder))
    assert load_policy(str(folder), use_safetensors=False).dtype == torch.float32
    run_command(str(caught.value))
    loaded = load_policy(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert list(folder.glob("pytorch_model*.bin"))


def test_the_command_converts_an_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"weights as adapter_model\.bin") as caught:
        load_policy(str(folder))
    run_command(str(caught.value))
    converted = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())
    load_policy(str(folder))


def test_a_hub_name_gets_a_command_that_writes_a_folder():
    error = OSError("some/model ... and thus cannot be loaded with `safetensors`. Please ...")
    options = {"revision": "v1", "use_safetensors": True, "dtype": torch.float32}
    with pytest.raises(ModelError, match="no safetensors on the hub") as caught:
        refuse_pickled_on_hub("some/model", options, error)
    code = shlex.split(str(caught.value)[str(caught.value).index("python -c") :])[2]
    compile(code, "command", "exec")
    assert 'f = "some/model"' in code
    assert code.count(", revision='v1'") == 2
    assert code.count('.save_pretrained("model")') == 2
    refuse_pickled_on_hub("some/model", options, OSError("offline"))
