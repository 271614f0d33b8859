"""Files: read a model, map external data, write, tell contents apart."""
