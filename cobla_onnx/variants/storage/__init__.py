"""Storage precision: weights as codes of few bits into a table of levels."""
