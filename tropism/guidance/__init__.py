"""Steering by changing the belief: every guidance takes a denoiser and is one."""

from tropism.guidance.cfg import Guided, Scale, constant, interval, network_cond, step
from tropism.guidance.told import Told

ROW = "guidance_row"
"""The entry of cond (B,) that says of which prompt a row is, for guides that look it up; no network sees it."""

__all__ = ["ROW", "Guided", "Scale", "Told", "constant", "interval", "network_cond", "step"]
