"""Channel graph: the channels of a network that can only be removed together."""
