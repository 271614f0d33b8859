"""The use cases: compress, sweep, inspect, compare."""
