"""Steering by changing the belief: every guidance takes a denoiser and is one."""

from tropism.guidance.cfg import Guided, Scale, constant, interval, network_cond, step
from tropism.guidance.told import Told, by_row, interpolated

__all__ = ["Guided", "Scale", "Told", "by_row", "constant", "interpolated", "interval", "network_cond", "step"]
