"""The demo: a small model learns by DPO which answers people prefer, within minutes on a CPU."""
