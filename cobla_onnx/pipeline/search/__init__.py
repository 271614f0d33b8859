"""Search strategies: from a budget and measurements to a plan and its factors."""
