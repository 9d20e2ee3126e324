"""Options of how a run is saved, resumed and stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpofast.options.data_fields import DataFields


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class RunFields(DataFields):
    """The fields; docs/checkpoints.md says what they do.

    Attributes:
        overwrite_output_dir: move the checkpoints of another run in `output_dir` aside.
        verify_checkpoint: compare the checksum of each file before a run resumes.
        trust_checkpoint: read pickled classes of a checkpoint that DeepSpeed doesn't need.
        allow_changed: names of facts that may differ between a checkpoint and the run that resumes
            from it.
        save_on_signal: signals at which a run saves a checkpoint and ends.
        rank_timeout: seconds after which a rank that isn't heard from ends the run; 0 for never.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Move another run's checkpoints in output_dir aside."}
    )
    verify_checkpoint: bool = field(
        default=True, metadata={"help": "Compare each file's checksum before resuming."}
    )
    trust_checkpoint: bool = field(
        default=False, metadata={"help": "Read any pickled class in a checkpoint."}
    )
    allow_changed: list[str] | str | None = field(
        default=None, metadata={"help": "What may differ from the checkpoint that is resumed."}
    )
    save_on_signal: list[str] | str | None = field(
        default_factory=lambda: ["SIGTERM", "SIGUSR1"],
        metadata={"help": "Signals at which a run saves a checkpoint and ends."},
    )
    rank_timeout: float = field(
        default=20.0, metadata={"help": "Seconds without news of a rank that end the run."}
    )
