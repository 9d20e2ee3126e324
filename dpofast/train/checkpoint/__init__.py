"""dpofast's own part of a checkpoint, and the rules for resuming from one."""
