"""Documents, tokenised once into memory-mapped shards."""
