"""Views of a model: its parameters, inputs and norms, and runs of it that leave no traces."""
