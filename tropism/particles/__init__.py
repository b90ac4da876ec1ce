"""Sequential Monte Carlo over any kernel of the house: steering by rewards, correctors, search."""

from tropism.particles.fk import Proposal, fk_steer, schedule, through
from tropism.particles.fkc import Factor, Tilt, fkc, guidance
from tropism.particles.intermediate import Intermediate, Sampled, around, by_chain, learned, predicted
from tropism.particles.particles import Particles, ess
from tropism.particles.potentials import POTENTIALS, Memory, Potential
from tropism.particles.resampling import SCHEMES, Resample, multinomial, residual, stratified, systematic
from tropism.particles.search import beam_search, best_of_n
from tropism.particles.trace import Step, Trace
from tropism.particles.walking import Score, Seen, Walk, Walker

__all__ = [
    "POTENTIALS",
    "SCHEMES",
    "Factor",
    "Intermediate",
    "Memory",
    "Particles",
    "Potential",
    "Proposal",
    "Resample",
    "Sampled",
    "Score",
    "Seen",
    "Step",
    "Tilt",
    "Trace",
    "Walk",
    "Walker",
    "around",
    "beam_search",
    "best_of_n",
    "by_chain",
    "ess",
    "fk_steer",
    "fkc",
    "guidance",
    "learned",
    "multinomial",
    "predicted",
    "residual",
    "schedule",
    "stratified",
    "systematic",
    "through",
]
