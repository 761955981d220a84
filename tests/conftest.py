"""All tests: so small networks are faster on one thread, many times so where other programs hold the cores."""

import torch

torch.set_num_threads(1)
