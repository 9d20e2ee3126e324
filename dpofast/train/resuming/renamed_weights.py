"""Loads weights that a checkpoint's files hold under other names than the model does.

For many mixtures of experts, and for classes for pictures as well as text, `save_pretrained` writes
the names and shapes that older versions of transformers had, and `from_pretrained` turns them back.
transformers' Trainer reads a checkpoint by the model's own names, and leaves all other weights as
they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpofast.errors import CheckpointError
from dpofast.model.saved_names import saved_shapes


def has_other_names(model: Any, folder: str) -> bool:
    """Whether a checkpoint lacks some of a model's weights by their names and shapes.

    Args:
        model: a whole model, whose weights aren't sharded.
        folder: the checkpoint.
    """
    saved = saved_shapes(Path(folder))
    if saved is None:  # no safetensors files, which nothing here can name
        return False
    own = model.state_dict()
    # Only one of several tensors that share their memory is in the files.
    known = {
        tensor.data_ptr() for name, tensor in own.items() if saved.get(name) == tuple(tensor.shape)
    }
    return any(tensor.numel() and tensor.data_ptr() not in known for tensor in own.values())


def load_renamed(model: Any, folder: str) -> None:
    """Load a checkpoint's weights into a model the way `from_pretrained` does.

    Args:
        model: a whole model of transformers.
        folder: the checkpoint.

    Raises:
        CheckpointError: the checkpoint doesn't have all weights.
    """
    # The widest dtype of the model: every weight comes back as it was saved.
    dtype = max((each.dtype for each in model.parameters()), key=lambda each: each.itemsize)
    config = type(model.config).from_pretrained(folder)
    loaded, found = type(model).from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"The checkpoint {folder!r} lacks {len(missing)} of the model's weights, such as "
            f"{missing[0]}, so a run can't go on from it; use another checkpoint."
        )
    model.load_state_dict(loaded.state_dict())
