"""Reading YAML files and overrides, before names and values are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.cli.given import read_overrides, read_yaml
from dpofast.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_keeps_names_values_and_their_file(tmp_path: Path) -> None:
    path = written(tmp_path, "beta: 0.2\nlora_target_modules: [q_proj, v_proj]\n")
    given = read_yaml(path)
    assert given["beta"].value == 0.2
    assert given["beta"].where == str(path)
    assert given["lora_target_modules"].value == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "'beta' is given twice, in lines 1 and 3"),
        ("dataset_columns: {prompt: a, prompt: b}\n", "'prompt' is given twice"),
        ("beta: [1, 2\nseed: 3\n", "not YAML at line"),
        ("seed: 3\nbeta 0.1\n", "not YAML at line 2"),
        ("seed: 3\nbeta: 'a\n", "not YAML at line 2"),
        ("? [beta]\n: 0.1\n", "not YAML at line 1: found unhashable key"),
        ("- beta\n", "got a list"),
        ("", "got an empty file"),
        ("beta: !!python/object/apply:os.getcwd []\n", "not YAML at line 1"),
    ],
)
def test_refuses_a_file_that_is_no_set_of_options(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        read_yaml(path)
    assert message in str(caught.value)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: can't be read: No such file"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_overrides_in_every_spelling() -> None:
    arguments = "--beta 0.2 --seed=3 --max-length 64 --use_peft --lora_target_modules q v --note -1"
    values = {name: given.value for name, given in read_overrides(arguments.split()).items()}
    assert values == {
        "beta": 0.2,
        "seed": 3,
        "max_length": 64,
        "use_peft": True,
        "lora_target_modules": ["q", "v"],
        "note": -1,
    }


def test_override_that_looks_like_yaml_stays_text() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert read_overrides(["--chat_template", template])["chat_template"].value == template


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("0.2 --beta 3", "'0.2' belongs to no option"),
        ("--beta 1 --beta 2", "--beta is given twice"),
    ],
)
def test_refuses_what_belongs_to_no_option(arguments: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_overrides(arguments.split())
