"""What to run when a GPU is at hand for some minutes: stages, each a process with its own limit."""
