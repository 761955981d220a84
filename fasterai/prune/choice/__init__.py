"""Choice of the channels to remove for a budget."""
