"""Continued pretraining under DeepSpeed ZeRO."""
