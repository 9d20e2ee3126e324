"""The reports of a run: metrics, throughput, files and plots, all made from plain facts."""
