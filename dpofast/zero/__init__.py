"""DeepSpeed: its configuration, the batch sizes it is told, and weights that ZeRO-3 has sharded."""
