"""Dense checkpoint → sparse-activated checkpoint."""
