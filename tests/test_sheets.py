"""Sheets of pictures: cells as tall as what is in them."""

from __future__ import annotations

import torch

from tropism import pictures

SQUARES, STRIPS = torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 256)


def test_film_strips_have_low_cells():
    text, scores = ["a red fox", "a blue cube"], (torch.zeros(2), torch.ones(2))
    tall, low = pictures.grid(SQUARES, text), pictures.grid(STRIPS, text)
    assert tall.width == low.width and tall.height - low.height == pictures.TILE * 3 // 4
    tall, low = (pictures.before_after(x, x, text, scores, "title", "subtitle") for x in (SQUARES, STRIPS))
    assert tall.width == low.width and tall.height - low.height == 2 * (pictures.TILE * 3 // 4)
