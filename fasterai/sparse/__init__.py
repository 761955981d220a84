"""L3: the sparsifier and what stands around it."""
