"""Text files, datasets and token files, read as documents."""
