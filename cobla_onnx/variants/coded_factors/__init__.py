"""Two factors in place of a weight, both stored in fewer bits."""
