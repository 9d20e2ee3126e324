"""The reports of a run: metrics, throughput, files and plots."""
