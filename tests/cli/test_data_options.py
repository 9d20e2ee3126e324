"""Options that name, mix and split the data are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpofast.cli.run_options import read_options
from dpofast.errors import ConfigError

TWO = "dataset_name: [a, b]\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TWO + "dataset_shares: [1]", "dataset_shares: got 1 for 2 datasets; give one share for"),
        (TWO + "dataset_shares: [1, 1, 1]", "dataset_shares: got 3 for 2 datasets"),
        (TWO + "dataset_shares: []", "dataset_shares: got 0 for 2 datasets"),
        ("dataset_name: a\ndataset_shares: [1, 1]", "dataset_shares: got 2 for 1 datasets"),
        ("dataset_shares: [1]", "dataset_shares: got 1 for 0 datasets"),
        (TWO + "dataset_shares: [1, -0.5]", "dataset_shares: got -0.5 as the share of 'b', expect"),
        (TWO + "dataset_shares: [0, 1]", "dataset_shares: got 0.0 as the share of 'a'"),
        (TWO + "dataset_shares: [.nan, 1]", "dataset_shares: got nan as the share of 'a'"),
        (TWO + "dataset_shares: [.inf, 1]", "dataset_shares: got inf as the share of 'a'"),
        (TWO + "dataset_shares: 0.7", "dataset_shares: got 0.7, expected a list of numbers"),
        (TWO + "dataset_shares: [x, 1]", r"dataset_shares: got \['x', 1\], expected a list of num"),
        (TWO + "dataset_shares: {a: 1, b: 1}", "dataset_shares: got .*, expected a list of num"),
        (
            TWO + "dataset_weights: [1]",
            "dataset_weights: got 1 for 2 datasets; give one weight for",
        ),
        (TWO + "dataset_weights: [1, -2]", "dataset_weights: got -2.0 as the weight of 'b', expe"),
        (TWO + "dataset_weights: [.inf, 1]", "dataset_weights: got inf as the weight of 'a'"),
        (TWO + "dataset_weights: [0, 0]", "dataset_weights: all weights are 0, so nothing would"),
        (TWO + "dataset_weights: heavy", "dataset_weights: got 'heavy', expected a list of numb"),
        ("dataset_weights: [1]", "dataset_weights: got 1 for 0 datasets"),
        ("dataset_name: {a: 1}", "dataset_name: got {'a': 1}, expected a list of texts or text"),
        ("dataset_name: []", r"dataset_name: got \[\], expected a name, or a list of names"),
        ("dataset_name: ''", "dataset_name: got '', expected a name"),
        ("dataset_name: [a, '']", "dataset_name: got .*, expected a name"),
        ("dataset_name: [a, b, a]", "dataset_name: 'a' and 'a' are the same dataset"),
        ("dataset_name: [., ./, b]", "dataset_name: '.' and './' are the same dataset"),
        ("dataset_name: a\neval_split: 0", "eval_split: got 0 as eval_split, expected the part"),
        ("dataset_name: a\neval_split: 1.0", "eval_split: got 1.0 as eval_split"),
        ("dataset_name: a\neval_split: -3", "eval_split: got -3 as eval_split"),
        ("dataset_name: a\neval_split: true", "eval_split: got True, expected a whole number or"),
        ("dataset_name: a\neval_split: 5%", "eval_split: got '5%', expected a whole number or a"),
        ("eval_split: 0.1", "eval_split: there is no dataset_name to hold pairs out of"),
        (
            "dataset_name: a\neval_split: 0.1\neval_dataset_name: b",
            "eval_split: eval_dataset_name names held-out pairs, too; keep one of them",
        ),
        (
            "dataset_name: a\neval_split: 0.1\ndataset_test_split: test",
            "eval_split: dataset_test_split names held-out pairs, too",
        ),
        ("dataset_share: [1]", "there is no option 'dataset_share'; did you mean 'dataset_shares'"),
        ("eval_splits: 0.1", "there is no option 'eval_splits'; did you mean 'eval_split'"),
        ("dataset_mixer: {a: 0.5}", "dataset_mixer isn't an option here: list the names in datase"),
        ("dataset_mixture: {}", "dataset_mixture isn't an option here: list the names in dataset_"),
        ("datasets: [{path: a}]", "datasets=.* isn't supported: list the paths in dataset_name"),
        ("test_split_size: 0.1", "test_split_size=0.1 isn't supported: set eval_split"),
        ("val_set_size: 0.1", "val_set_size isn't an option here: set eval_split"),
        ("interleave_probs: 0.7,0.3", "interleave_probs isn't an option here: set dataset_shares"),
    ],
)
def test_refuses_with_the_file_the_option_and_the_remedy(
    tmp_path: Path, text: str, sentence: str
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"{text}\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml: {sentence}"):
        read_options(str(config), [])


def test_the_command_line_undoes_the_split_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: a\neval_split: 0.1\nuse_cpu: true\nbf16: false\n")
    held_out = ["--eval_dataset_name", "b"]
    with pytest.raises(ConfigError, match=r"`--eval_split null` .* undoes what a file says"):
        read_options(str(config), held_out)
    script = read_options(str(config), [*held_out, "--eval_split", "null"]).script
    assert (script.eval_split, script.eval_dataset_name) == (None, "b")


def test_options_of_trl_that_change_nothing_are_taken(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("datasets: []\nstreaming: false\ntest_split_size: null\nuse_cpu: true\n")
    assert read_options(str(config), ["--bf16=false"]).script.dataset_names == []
