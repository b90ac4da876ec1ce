"""Which noise goes with which sample of a batch."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def optimal(x0: Tensor, eps: Tensor, group: Tensor) -> Tensor:
    """eps (B, ...) in another order: that of the least sum of |x0 - eps|^2 (minibatch optimal transport, 2302.00482;
    2502.01441 for consistency training).

    Rows change places only within a ``group`` (B,): between prompts the noise would tell of the prompt.
    """
    order = torch.arange(len(eps))
    flat, noise = x0.flatten(1).double().cpu(), eps.flatten(1).double().cpu()
    for each in group.unique():
        rows = (group == each).nonzero().flatten().cpu()
        _, chosen = linear_sum_assignment((flat[rows] @ noise[rows].T).numpy(), maximize=True)
        order[rows] = rows[torch.from_numpy(chosen)]
    return eps[order.to(eps.device)]
