"""Where a run begins in its output_dir, and how a resumed run stays the same run."""
