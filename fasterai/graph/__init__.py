"""The channel graph: which channels of a network go together."""
