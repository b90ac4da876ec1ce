"""The table of (image, move) cells: which are learnt from, how they are cut, and that a row is what it was."""

from __future__ import annotations

import pytest
import torch

from tropism.base import Rollout
from tropism.rollout import gather, slices, trainable

B, K = 6, 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rollout(**changes) -> Rollout:
    """Values that name their place: image 10 x row + level."""
    place = 10.0 * torch.arange(B)[:, None] + torch.arange(K + 1)
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[:, -1] = False
    fields = dict(
        xs=place[..., None].expand(B, K + 1, 3),
        ts=torch.linspace(1, 0, K + 1),
        log_prob=place[:, :K] / 100,
        mask=mask,
        cond={"c": torch.arange(B)[:, None].expand(B, 2), "guidance_low": torch.arange(B) / 2},
        reward=torch.arange(B).float(),
        advantage=torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, 0.0]),
        group=torch.zeros(B, dtype=torch.int64),
    )
    return Rollout(**(fields | changes))


def test_cells_are_credited_and_random():
    """Images 2 and 5 have no advantage, the last move no density."""
    rows, columns = trainable(rollout(), 1.0, skip_last=False)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(r, c) for r in (0, 1, 3, 4) for c in range(4)]


def test_the_last_move_is_left_out_when_asked_and_a_deterministic_one_always():
    every = torch.ones(B, K, dtype=torch.bool)
    _, columns = trainable(rollout(mask=every), 1.0, skip_last=True)
    assert set(columns.tolist()) == {0, 1, 2, 3}
    _, columns = trainable(rollout(mask=every), 1.0, skip_last=False)
    assert set(columns.tolist()) == {0, 1, 2, 3, 4}
    some = every.clone()
    some[:, 1] = False
    assert set(trainable(rollout(mask=some), 1.0, skip_last=True)[1].tolist()) == {0, 2, 3}


@pytest.mark.parametrize(
    ("fraction", "each"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)]
)
def test_a_share_of_the_moves_of_each_image_is_drawn_rounded_up(fraction, each):
    rows, columns = trainable(rollout(), fraction, False, seeded())
    assert rows.bincount(minlength=B).tolist() == [each, each, 0, each, each, 0]
    assert columns.max() < 4


def test_the_share_is_drawn_for_each_image_anew_and_evenly():
    many = 4000
    big = rollout(
        xs=torch.zeros(many, K + 1, 1),
        log_prob=torch.zeros(many, K),
        mask=torch.ones(many, K, dtype=torch.bool),
        advantage=torch.ones(many),
        reward=torch.zeros(many),
        cond={},
    )
    _, columns = trainable(big, 0.4, False, seeded())
    counts = columns.bincount(minlength=K)
    assert counts.sum() == 2 * many and (counts / many - 0.4).abs().max() < 0.03
    again = trainable(big, 0.4, False, seeded())[1]
    assert torch.equal(columns, again) and not torch.equal(columns, trainable(big, 0.4, False, seeded(1))[1])


def test_images_without_a_score_do_not_change_the_draws_of_others():
    whole = rollout()
    fewer = rollout(**{name: getattr(whole, name)[:4] for name in ("xs", "log_prob", "mask", "advantage", "reward")})
    rows, columns = trainable(whole, 0.5, False, seeded())
    assert [pair for pair in zip(rows.tolist(), columns.tolist(), strict=True) if pair[0] < 4] == list(
        zip(*(part.tolist() for part in trainable(fewer, 0.5, False, seeded())), strict=True)
    )


@pytest.mark.parametrize(
    ("count", "updates", "minibatch", "sizes"),
    [
        (10, 1, 100, [[10]]),
        (10, 1, 4, [[4, 4, 2]]),
        (10, 3, 4, [[4], [3], [3]]),
        (10, 4, 2, [[2, 1], [2, 1], [2], [2]]),
        (2, 4, 8, [[1], [1], [], []]),
        (0, 2, 8, [[], []]),
    ],
)
def test_slices_are_as_many_as_asked_nearly_equal_and_whole(count, updates, minibatch, sizes):
    order = torch.randperm(count, generator=seeded())
    cut = slices(order, updates, minibatch)
    assert [[len(part) for part in parts] for parts in cut] == sizes
    assert torch.equal(torch.cat([order[:0], *(part for parts in cut for part in parts)]), order)


def test_gathered_cells_are_the_rows_they_were():
    """Images and moves in any mixture, times and condition with them."""
    rows, columns = torch.tensor([4, 0, 4, 1]), torch.tensor([3, 0, 1, 2])
    info = {"reward_mean": 2.5}
    cells = gather(rollout(), rows, columns, True, info)
    assert cells.x[:, 0].tolist() == [43, 0, 41, 12] and cells.x_next[:, 2].tolist() == [44, 1, 42, 13]
    torch.testing.assert_close(cells.t, torch.tensor([0.4, 1.0, 0.8, 0.6]))
    torch.testing.assert_close(cells.s, torch.tensor([0.2, 0.8, 0.6, 0.4]))
    torch.testing.assert_close(cells.log_prob, torch.tensor([0.43, 0.0, 0.41, 0.12]))
    assert cells.advantage.tolist() == [0.5, 1.0, 0.5, -2.0]
    assert cells.cond["c"][:, 0].tolist() == [4, 0, 4, 1] and cells.cond["guidance_low"].tolist() == [2, 0, 2, 0.5]
    assert cells.on_policy and cells.info is info
