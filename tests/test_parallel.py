"""A chain found in parallel: exact after as many iterations as blocks, what it costs, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nets import wavy
from torch import Tensor

from tropism.base import Denoiser, Kernel
from tropism.denoisers import NetDenoiser
from tropism.guidance.cfg import Guided
from tropism.models.toy import PROMPTS, MixtureDenoiser, ToyNet, ToyTextToImage
from tropism.samplers import DDIM, Consistency, EulerODE, FlowSDE, Heun, refine, walk
from tropism.samplers.parallel import Refined
from tropism.schedules import EDM, RectifiedFlow

KERNELS: list[tuple[Any, Any]] = [
    (EulerODE(), RectifiedFlow()),
    (Heun(), RectifiedFlow()),
    (DDIM(0.0), EDM(variance_preserving=True)),
    (Heun(), EDM(variance_preserving=True)),
]
kernels = pytest.mark.parametrize(("kernel", "schedule"), KERNELS, ids=lambda value: type(value).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(schedule: Any) -> MixtureDenoiser:
    """Six modes in 16 dimensions."""
    means = 1.5 * torch.randn(6, 16, generator=generator())
    return MixtureDenoiser(means, torch.full((6,), 0.3), torch.full((6,), 1 / 6), schedule)


def times(moves: int) -> Tensor:
    return torch.linspace(1, 0, moves + 1)


def start(rows: int = 8) -> Tensor:
    return torch.randn(rows, 16, generator=generator(1))


def in_turn(kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor, cond: Any = None) -> Tensor:
    *_, last = walk(kernel, denoiser, x, ts, cond or {})
    return last.x_next


@kernels
@pytest.mark.parametrize("moves", [1, 2, 3, 7, 16, 25, 30])
def test_all_iterations_give_the_chain(kernel: Any, schedule: Any, moves: int) -> None:
    """Squares and others: the end is that of the chain in turn, and never more calls wait for one another."""
    denoiser, ts, x = mixture(schedule), times(moves), start()
    wanted = in_turn(kernel, denoiser, x, ts)
    found = refine(kernel, denoiser, x, ts, {})
    torch.testing.assert_close(found.x, wanted, atol=1e-6, rtol=1e-6)
    assert found.iterations == max(1, round(moves**0.5)) == len(found.changes)
    calls = _calls(kernel, denoiser, x, ts)
    assert found.serial_calls <= calls + (moves % found.iterations > 0) * isinstance(kernel, Heun)


def _calls(kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor) -> int:
    made = []

    class Heard:
        schedule = denoiser.schedule

        def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Any:
            made.append(len(x))
            return denoiser(x, t, cond)

    in_turn(kernel, Heard(), x, ts)
    return len(made)


def test_a_tiny_network_s_chain_with_guidance() -> None:
    """With conditions that differ by row, and a denoiser that asks twice."""
    toy = ToyTextToImage(ToyNet(generator()), torch.randn(8, 16, generator=generator(2)), "flow")
    cond = toy.encode(PROMPTS)
    guided = Guided(toy.denoiser, toy.null(), 3.0)
    x = torch.randn(8, 2, generator=generator(3))
    with torch.no_grad():
        found = refine(EulerODE(), guided, x, times(36), cond)
        wanted = in_turn(EulerODE(), guided, x, times(36), cond)
    torch.testing.assert_close(found.x, wanted, atol=1e-6, rtol=1e-6)
    picture = torch.randn(3, 3, 4, 4, generator=generator(4))
    denoiser = NetDenoiser(wavy, RectifiedFlow(), "flow")
    torch.testing.assert_close(
        refine(EulerODE(), denoiser, picture, times(9), {}).x,
        in_turn(EulerODE(), denoiser, picture, times(9)),
        atol=1e-6,
        rtol=1e-6,
    )


def test_the_more_iterations_the_closer() -> None:
    """And ``changes`` are what they say: the mean absolute change of the end in the row that moved most."""
    denoiser, ts, x = mixture(RectifiedFlow()), times(100), start()
    wanted = in_turn(EulerODE(), denoiser, x, ts)
    found = [refine(EulerODE(), denoiser, x, ts, {}, max_iterations=p) for p in range(1, 11)]
    errors = [float((each.x - wanted).abs().max()) for each in found]
    assert errors[0] > 1e-2 and errors[9] == 0
    assert all(after < before or before < 1e-6 for before, after in itertools.pairwise(errors))
    for before, after in itertools.pairwise(found):
        moved = float((after.x - before.x).abs().mean(1).max())
        assert after.changes[: len(before.changes)] == before.changes and after.changes[-1] == pytest.approx(moved)


def test_a_smaller_tolerance_costs_more_and_is_closer() -> None:
    denoiser, ts, x = mixture(RectifiedFlow()), times(100), start()
    wanted = in_turn(EulerODE(), denoiser, x, ts)
    found = [refine(EulerODE(), denoiser, x, ts, {}, tolerance=10.0**-power) for power in range(1, 7)]
    errors = [float((each.x - wanted).abs().max()) for each in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 100 * errors[-1]
    for name in ("iterations", "serial_calls", "total_calls"):
        counts = [getattr(each, name) for each in found]
        assert counts == sorted(counts) and counts[0] < counts[-1]
    for each, power in zip(found, range(1, 7), strict=True):
        assert each.changes[-1] <= 10.0**-power and all(change > 10.0**-power for change in each.changes[:-1])


@pytest.mark.parametrize(("moves", "blocks"), [(25, 5), (100, 10), (24, 6), (64, 16)])
def test_calls_are_as_many_as_the_formulas_say(moves: int, blocks: int) -> None:
    """B blocks of J moves, p iterations: p J + B - p rounds as they are made, B + p (J + B) less what is exact already
    when they wait. Fine moves of blocks that are exact are not made again."""
    denoiser, x, length = mixture(RectifiedFlow()), start(2), moves // blocks
    for most in range(1, blocks + 1):
        found = _cut(denoiser, x, moves, blocks, most, True)
        p = found.iterations  # fewer than asked for once nothing changes
        assert found.serial_calls == p * length + blocks - p
        waiting = _cut(denoiser, x, moves, blocks, most, False)
        assert torch.equal(found.x, waiting.x)
        assert waiting.serial_calls == blocks + sum(length + blocks - done for done in range(1, p + 1))
        fine = sum(length * (blocks - done) for done in range(p))
        assert waiting.total_calls == fine + blocks + sum(blocks - done for done in range(1, p + 1))
        assert waiting.total_calls <= found.total_calls and waiting.widest <= blocks


def _cut(denoiser: Denoiser, x: Tensor, moves: int, blocks: int, p: int, pipelined: bool) -> Refined:
    return refine(EulerODE(), denoiser, x, times(moves), {}, blocks=blocks, max_iterations=p, pipelined=pipelined)


@kernels
def test_microbatches_change_nothing(kernel: Any, schedule: Any) -> None:
    """But rounding; nor what is counted."""
    denoiser, ts, x = mixture(schedule), times(30), start(3)
    whole = refine(kernel, denoiser, x, ts, {}, max_iterations=3)
    for most in (1, 5, 1000):
        cut = refine(kernel, denoiser, x, ts, {}, max_iterations=3, microbatch=most)
        torch.testing.assert_close(cut.x, whole.x, atol=1e-6, rtol=1e-6)
        assert (cut.serial_calls, cut.iterations, cut.widest) == (whole.serial_calls, 3, whole.widest)
        assert cut.changes == pytest.approx(whole.changes, rel=1e-4, abs=1e-6)


def test_rows_do_not_know_of_one_another() -> None:
    denoiser, ts, x = mixture(RectifiedFlow()), times(36), start()
    together = refine(EulerODE(), denoiser, x, ts, {}, max_iterations=2)
    alone = torch.cat([refine(EulerODE(), denoiser, row[None], ts, {}, max_iterations=2).x for row in x])
    torch.testing.assert_close(together.x, alone, atol=1e-6, rtol=1e-6)


def test_another_kernel_makes_the_coarse_moves() -> None:
    """The chain in the end is the fine one's, whatever is coarse."""
    denoiser, ts, x = mixture(RectifiedFlow()), times(25), start()
    wanted = in_turn(Heun(), denoiser, x, ts)
    torch.testing.assert_close(refine(Heun(), denoiser, x, ts, {}, coarse=EulerODE()).x, wanted, atol=1e-6, rtol=1e-6)
    rough = [
        float((refine(EulerODE(), denoiser, x, ts, {}, coarse=by, max_iterations=2).x - exact).abs().mean())
        for exact in [in_turn(EulerODE(), denoiser, x, ts)]
        for by in (None, Heun())
    ]
    assert rough[0] != rough[1]


def test_one_move_is_one_move() -> None:
    denoiser, x = mixture(RectifiedFlow()), start()
    found = refine(EulerODE(), denoiser, x, times(1), {}, tolerance=0.1)
    assert torch.equal(found.x, in_turn(EulerODE(), denoiser, x, times(1)))
    assert (found.serial_calls, found.iterations, found.changes) == (1, 1, (0.0,))


@pytest.mark.parametrize("kernel", [DDIM(1.0), FlowSDE(), Consistency()], ids=repr)
def test_kernels_that_draw_are_refused(kernel: Any) -> None:
    with pytest.raises(ValueError, match="draws its states, and a chain found in parallel must be the same"):
        refine(kernel, mixture(RectifiedFlow()), start(), times(9), {})
    with pytest.raises(ValueError, match=r"take a deterministic kernel, such as DDIM\(0\), EulerODE or Heun"):
        refine(EulerODE(), mixture(RectifiedFlow()), start(), times(9), {}, coarse=kernel)


def test_impossible_arguments_are_refused() -> None:
    denoiser, x = mixture(RectifiedFlow()), start()
    for wrong in (dict(blocks=0), dict(blocks=10), dict(max_iterations=0), dict(tolerance=-1.0), dict(microbatch=0)):
        with pytest.raises(ValueError, match="wanted 1 to 9 blocks, at least 1 iteration, at least 0, and at least 1"):
            refine(EulerODE(), denoiser, x, times(9), {}, **wrong)
    with pytest.raises(ValueError, match="strictly decreasing"):
        refine(EulerODE(), denoiser, x, times(9).flip(0), {})
