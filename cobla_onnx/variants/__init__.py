"""What a layer may be replaced by, and the rewrite of the model."""
