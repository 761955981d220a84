"""Which channels go for a budget."""
