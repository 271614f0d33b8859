"""Searches: from a budget and what was measured to a plan and its factors."""
