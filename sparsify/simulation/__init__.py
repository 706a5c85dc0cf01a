"""Decoding from a memory that is smaller than the model: what a device would take, from masks and bandwidths."""
