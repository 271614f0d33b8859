"""Low-rank factorisation of a weight."""
