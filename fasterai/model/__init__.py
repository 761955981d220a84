"""Looking at a model: its parameters, inputs, norms, and running it without leaving traces."""
