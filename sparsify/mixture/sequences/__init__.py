"""Training and held-out sequences: token shares, schedule, packing and reading."""
