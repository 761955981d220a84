"""Ternary groups: weights that are -a, 0 or a, with a scale `a` of their own for each small group along the inputs."""
