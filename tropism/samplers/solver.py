"""Which kernel a model walks by when its method does not name one."""

from __future__ import annotations

from tropism.base import Denoiser, Kernel
from tropism.denoisers import ConsistencyDenoiser, FlowMap, OnePass, TokenDenoiser
from tropism.samplers.consistency import Consistency
from tropism.samplers.ddim import DDIM
from tropism.samplers.flow import EulerODE, FlowSDE
from tropism.samplers.jump import Jump
from tropism.samplers.next_token import NextPart, NextToken
from tropism.schedules import RectifiedFlow


def solver(denoiser: Denoiser, eta: float = 0.0) -> Kernel:
    """Hops of a consistency model (which draw noise whatever ``eta`` is), jumps of a flow map, tokens of a token model
    (drawn, whatever ``eta`` is) or parts of its student, Euler's method on a flow, else DDIM(eta)."""
    own = getattr(denoiser, "was", denoiser)  # of a teacher, the denoiser that it is without its training
    if isinstance(own, TokenDenoiser):
        return NextToken(own.codes)
    if isinstance(own, OnePass):
        return NextPart()
    if isinstance(denoiser, ConsistencyDenoiser):
        return Consistency()
    if isinstance(denoiser, FlowMap):
        return Jump()
    return EulerODE() if isinstance(denoiser.schedule, RectifiedFlow) else DDIM(eta)


def stochastic_solver(denoiser: Denoiser, eta: float = 1.0, noise_level: float = 0.7) -> Kernel:
    """The same with chance in it: on a flow Flow-GRPO's SDE with this noise level."""
    kernel = solver(denoiser, eta)
    return FlowSDE(noise_level) if isinstance(kernel, EulerODE) else kernel
