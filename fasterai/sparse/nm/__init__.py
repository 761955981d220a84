"""N:M sparsity from the start: of every M neighbouring inputs N are used, chosen anew at every step of a training.

Import from `fasterai.sparse.all`.
"""
