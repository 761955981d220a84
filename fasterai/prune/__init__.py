"""L4: channels that live or die together, found in the network's own operations."""
