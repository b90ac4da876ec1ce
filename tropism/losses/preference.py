"""Preference losses: functions of a margin, by how much the preferred one is likelier than before, against the other.

Unreduced: one shape in and the same shape out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def logistic(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(margin), the Bradley-Terry likelihood of the label (DPO, 2305.18290, eq. 7), to be minimised.

    margin (any shape) = beta (log-ratio of the preferred - log-ratio of the other) to the reference. ``smoothing`` is
    the chance that a label is wrong, 0 to below 1/2: conservative DPO, (1 - e) l(m) + e l(-m), whose optimum is at
    margin log((1 - e) / e). Raises ValueError for other values of it.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing is the chance of a wrong label: wanted 0 to below 0.5; got {smoothing}")
    loss = -logsigmoid(margin)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * logsigmoid(-margin)
