"""How a model becomes sparse: one method, one paper, one file."""
