"""What several nodes of a run must share, and what each must have for itself."""

from __future__ import annotations

from pathlib import Path

from dpofast.options.config import DPOConfig
from dpofast.ranks.shared import check_separate, check_shared
from dpofast.train.exchange import exchange


def check_shared_folders(config: DPOConfig, trains: bool) -> None:
    """Check that output_dir and reference_store are one and the same on all nodes.

    With save_on_each_node, each node must have an output_dir of its own instead.

    Args:
        config: options of the run.
        trains: whether the run trains, and so saves checkpoints, for which all ranks write files.

    Raises:
        ConfigError: a folder isn't shared, or it is although it must not be.
    """
    folders = {}
    output_dir = Path(config.output_dir).absolute()
    if trains and config.save_on_each_node:
        check_separate(output_dir, exchange)
    elif trains:
        remedy = ", or set save_on_each_node: true to keep a part of each checkpoint on each node"
        folders["output_dir"] = (output_dir, remedy)
    store = config.reference_folder()
    if store is not None:
        remedy = ", or set precompute_ref_log_probs: false, and each rank scores what it needs"
        folders["reference_store"] = (store.absolute(), remedy)
    check_shared(folders, exchange)
