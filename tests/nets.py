"""Networks and schedules that the tests of kernels and denoisers share."""

import torch

from tropism.schedules import RectifiedFlow, ddpm_table, flow_grid

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TABLE, FLOW = ddpm_table(1000, **SD), RectifiedFlow()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wavy(x, number, cond):
    """A network that no kernel can be right about by accident."""
    number = number.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return 0.9 * x + 0.3 * torch.sin(3 * x + number / 150)


def flow_rows():
    """Five rows at different times of one shifted grid, the first at pure noise and the last at the last step."""
    grid = flow_grid(10, 3.0)
    return grid, grid[[0, 1, 4, 8, 9]], grid[[1, 2, 5, 9, 10]]
