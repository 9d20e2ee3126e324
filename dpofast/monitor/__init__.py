"""What a run reports: metrics, throughput, files and plots, made from plain facts."""
