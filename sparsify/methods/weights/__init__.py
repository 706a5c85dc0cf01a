"""Weight sparsity: methods that set weights of the linear projections to zero, once and for all tokens."""
