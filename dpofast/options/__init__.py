"""The options of a run: ours, those of other tools, and the arguments of old TRL scripts."""
