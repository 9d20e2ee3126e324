"""From token lengths to micro-batches: plan each optimizer step, then lay out its rows."""
