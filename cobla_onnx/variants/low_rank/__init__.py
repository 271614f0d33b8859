"""How one weight is factorised."""
