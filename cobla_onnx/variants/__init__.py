"""What may become of a layer, and the rewrite of the model."""
