"""L4: changes to a model that keep what it computes: batch norms folded into their layers, linear layers factorised."""
