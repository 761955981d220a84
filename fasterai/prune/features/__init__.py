"""Features of the inputs: which of them a network keeps, the data with these alone, and the network without the others."""
