"""What several nodes of a run must share, and what each must have for itself."""

from __future__ import annotations

from pathlib import Path

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast.ranks.member import own_node
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
        _check_leaders(config)
        check_separate(output_dir, exchange)
    elif trains:
        remedy = ", or set save_on_each_node: true to keep a part of each checkpoint on each node"
        folders["output_dir"] = (output_dir, remedy)
    store = config.reference_folder()
    if store is not None:
        remedy = ", or set precompute_ref_log_probs: false, and each rank scores what it needs"
        folders["reference_store"] = (store.absolute(), remedy)
    check_shared(folders, exchange)


def _check_leaders(config: DPOConfig) -> None:
    """Check that one rank of each node saves for it, which transformers sees by LOCAL_RANK."""
    leaders: dict[str, list[int]] = {}
    for rank, (node, is_leader) in enumerate(exchange((own_node(), config.should_save))):
        leaders.setdefault(node, []).extend([rank] * is_leader)
    for node, ranks in leaders.items():
        if len(ranks) != 1:
            host = node.partition("/")[0] or "this one"
            raise ConfigError(
                f"save_on_each_node: LOCAL_RANK is 0 on {len(ranks)} ranks of host {host}, where "
                "one rank saves for the whole machine. Start the ranks with torchrun, or number "
                "those of each machine from 0."
            )
