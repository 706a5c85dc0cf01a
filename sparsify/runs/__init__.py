"""What a run folder holds, readable without DeepSpeed."""
