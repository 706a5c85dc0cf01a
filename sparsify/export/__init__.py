"""Checkpoints that other people load."""
