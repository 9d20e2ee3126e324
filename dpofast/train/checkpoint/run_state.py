"""dpofast's own file in a checkpoint: the facts that a resumed run can't read from its options."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpofast.errors import ReferenceStoreError

STATE_FILE = "dpofast_state.json"


@dataclass(frozen=True)
class RunState:
    """The facts that a resumed run can't read from its options.

    The field names are the keys of the JSON file.

    Attributes:
        reference_digest: digest of the reference's identity.
        reference_description: the same identity in words.
        reference_store: folder of the stored log-probs; None if they weren't kept.
        row_tokens: most tokens of a packed row; None if rows are padded.
        reference_name: folder or hub name that the reference was loaded from; None if it has none,
            or is a ref_model.
        reference_revision: its commit on the hub; None for a folder.
        stream: where a run over a stream goes on in it, from `RunStream.recorded`; None for other
            runs.
        facts: what decides the numbers of the rest of the run, from `run_facts`.
        sums: what each rank has added up for its logs, in rank order.
        beta: where the controller of target_kl stands; None without it.
        recomputed_layers: layers that recompute their activations; None if the options name them.
    """

    reference_digest: str
    reference_description: dict[str, Any]
    reference_store: str | None
    # Checkpoints of early versions don't have these.
    row_tokens: int | None = None
    reference_name: str | None = None
    reference_revision: str | None = None
    stream: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None
    sums: list[dict[str, Any]] | None = None
    beta: dict[str, Any] | None = None
    recomputed_layers: int | None = None

    def save(self, checkpoint: str | Path) -> None:
        """Writes the state into a checkpoint's folder, which is made if it doesn't exist yet."""
        text = json.dumps(asdict(self), indent=2)
        folder = Path(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def load_run_state(checkpoint: str | Path) -> RunState:
    """Reads the state that `RunState.save` wrote.

    Raises:
        ReferenceStoreError: the file is missing or unreadable, so the reference isn't known.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ReferenceStoreError(
            f"{path} can't be read ({error}), so the reference that this checkpoint was trained "
            "against isn't known: resume from a checkpoint that dpofast wrote, or start a new run "
            "from it without resuming."
        ) from error
