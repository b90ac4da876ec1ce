"""One step per file; a step is a kernel. ``chain.walk`` is the one loop; ``parallel.refine`` gives its end in fewer
serial calls."""

from tropism.samplers.chain import Move, Walk, walk
from tropism.samplers.consistency import Consistency
from tropism.samplers.ddim import DDIM
from tropism.samplers.flow import ConstantSDE, EulerODE, FlowSDE
from tropism.samplers.heun import Heun
from tropism.samplers.inversion import invert
from tropism.samplers.jump import Jump
from tropism.samplers.next_token import NextPart, NextToken
from tropism.samplers.parallel import Refined, refine
from tropism.samplers.recurrent import noised_up, recurrent_walk
from tropism.samplers.solver import solver, stochastic_solver
from tropism.samplers.until import noise_until
from tropism.samplers.widen import widen

__all__ = [
    "DDIM",
    "Consistency",
    "ConstantSDE",
    "EulerODE",
    "FlowSDE",
    "Heun",
    "Jump",
    "Move",
    "NextPart",
    "NextToken",
    "Refined",
    "Walk",
    "invert",
    "noise_until",
    "noised_up",
    "recurrent_walk",
    "refine",
    "solver",
    "stochastic_solver",
    "walk",
    "widen",
]
