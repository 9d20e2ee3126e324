"""The folder in which a run keeps reference log-probs unless its options name another one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants


def default_folder() -> Path:
    """`dpofast/reference` in Hugging Face's folder for caches, which HF_HOME sets."""
    return Path(constants.HF_HOME) / "dpofast" / "reference"
