"""Which kernel a model walks by when its method does not name one."""

from __future__ import annotations

from tropism.base import Denoiser, Kernel
from tropism.denoisers import ConsistencyDenoiser
from tropism.samplers.consistency import Consistency
from tropism.samplers.ddim import DDIM
from tropism.samplers.flow import EulerODE
from tropism.schedules import RectifiedFlow


def solver(denoiser: Denoiser, eta: float = 0.0) -> Kernel:
    """Euler's method on a flow, hops of a consistency model (which draw noise whatever ``eta`` is), else DDIM(eta)."""
    if isinstance(denoiser.schedule, RectifiedFlow):
        return EulerODE()
    return Consistency() if isinstance(denoiser, ConsistencyDenoiser) else DDIM(eta)
