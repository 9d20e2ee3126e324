"""What a run writes about itself: logs, summary.json, the plot and the model card."""
