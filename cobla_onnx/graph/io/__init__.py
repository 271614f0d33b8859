"""Model files: read and write models, map external data, compare contents by digest."""
