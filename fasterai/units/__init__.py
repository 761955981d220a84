"""Units: their pools, what falls silent with them, and their scores."""
