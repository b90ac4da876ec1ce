"""Steering by changing the belief: every guidance takes a denoiser and is one."""

from tropism.guidance.cfg import Guided, Scale, constant, interval, network_cond, step

__all__ = ["Guided", "Scale", "constant", "interval", "network_cond", "step"]
