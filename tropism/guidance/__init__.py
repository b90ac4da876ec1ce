"""Steering by changing the belief: every guidance takes a denoiser and is one."""

from tropism.guidance.cfg import ROW, Guided, Scale, constant, interval, network_cond, step
from tropism.guidance.reward import RewardGuided, Value, beside, dps, lgd_mc, mpgd, through, ugd, window
from tropism.guidance.safe import KernelOdds, Odds, Safe
from tropism.guidance.told import Told, by_row, interpolated

__all__ = [
    "ROW",
    "Guided",
    "KernelOdds",
    "Odds",
    "RewardGuided",
    "Safe",
    "Scale",
    "Told",
    "Value",
    "beside",
    "by_row",
    "constant",
    "dps",
    "interpolated",
    "interval",
    "lgd_mc",
    "mpgd",
    "network_cond",
    "step",
    "through",
    "ugd",
    "window",
]
