"""What a user may set: one module per section, its fields next to its checks."""
