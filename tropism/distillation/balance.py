"""How much a second loss counts: so much that it pulls as hard as the first (VQGAN, 2012.09841, eq. 7; CTM, 2310.02279).

weight = |gradient of the first| / (|gradient of the second| + 1e-4), in one weight matrix, at most 1e4. Departure: it is
measured over a whole update, on all processes, and holds for the next one (the first has 1), because a ratio of one
minibatch would make the update depend on how the batch is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tropism.processes import Processes


class Balance:
    """``balance(first, second)`` -> what to add to ``first``; ``parameter`` is where both are felt."""

    def __init__(self, parameter: nn.Parameter, most: float = 1e4) -> None:
        self.parameter, self.most, self.weight = parameter, most, 1.0
        self._pulls = torch.zeros(2, *parameter.shape, dtype=torch.float64, device=parameter.device)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Two sums over the rows of a minibatch, () each -> the weighted second."""
        for pull, loss in zip(self._pulls, (first, second), strict=True):
            pull += torch.autograd.grad(loss, self.parameter, retain_graph=True)[0]
        return self.weight * second

    def after_step(self, processes: Processes) -> None:
        """The weight of the next update."""
        first, second = processes.summed(self._pulls).flatten(1).norm(dim=1).tolist()
        self.weight = min(first / (second + 1e-4), self.most)
        self._pulls.zero_()


def last_matrix(parameters: list[nn.Parameter]) -> nn.Parameter:
    """The last trainable parameter with at least two dimensions. Raises ValueError where there is none."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    if not matrices:
        raise ValueError("no trainable parameter of this model is a matrix, in which two losses could be compared")
    return matrices[-1]
