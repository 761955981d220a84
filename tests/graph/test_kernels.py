from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.exported import exported
from fasterai.graph.kernels import computed_weights, kernels_in


class Several(nn.Module):
    """A kernel that is scaled, one that lies in another shape, one as it stands, and one by what the inputs say."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.flat = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 36))
        self.plain, self.given = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4, 4, 3, 3))
        self.gain = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.scaled / self.scaled.norm() * self.gain.exp(), padding=1)
        x = F.conv2d(x, self.flat.view(4, 4, 3, 3), padding=1)
        return F.conv2d(F.conv2d(x, self.plain), self.given * x.mean())


def test_what_is_computed_of_parameters_alone_and_is_a_kernel() -> None:
    (program,) = exported(Several(), (torch.randn(1, 3, 8, 8),))
    nodes = list(program.program.graph.nodes)
    computed = computed_weights(nodes, program.names)
    assert sorted(str(node.target).split(".")[1] for node in computed) == ["div", "exp", "linalg_vector_norm", "mul", "view"]
    assert [program.names[node.name] for node in kernels_in(nodes, computed)] == ["scaled"]
