"""Clips longer than a model draws: each goes on from the one before it (CoNo, Wang et al. 2024, 2406.05082;
``samplers.cono``).

Clip k + 1 starts from the noise of clip k reordered, and its first ``shared`` frames are the last of clip k. Then, with
``look_back``, a clip is drawn across every seam: its first frames are told what was believed of clip k, its last
``look_back`` frames of clip k + 1, and the free frames between them, which lie on the seam, are kept.

How the clip across a seam is placed is our reading: the authors' repository is empty. The free frames take the noise of
the clip that the long clip has them from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Prediction
from tropism.policy import Policy
from tropism.randomness import Randomness, each_row
from tropism.samplers.chain import Move, walk
from tropism.samplers.cono import Continued, Overlap, beliefs, extended_noise, frames_of


@dataclass(frozen=True)
class Extension:
    """How clips are joined. ``until`` is the paper's (10 of 50 moves are left), its clips of 16 frames share 6 and look
    back 8.

    ``shared`` frames of two neighbours are the same; until time ``until`` the one is told what was believed of the
    other, and above 1 never. ``step`` draws the means of the believed noise together, 1 makes them equal. ``look_back``
    is how many frames of the later clip hold the clip across a seam; 0: none is drawn.
    """

    shared: int = 2
    until: float = 0.2
    step: float = 0.0
    look_back: int = 1

    def check(self, frames: int) -> None:
        """Raises ValueError for numbers that do not fit clips of so many frames."""
        if not 1 <= self.shared < frames:
            raise ValueError(f"shared is {self.shared}; wanted 1 to {frames - 1}, for clips of {frames} frames")
        if not 0 <= self.look_back < frames - self.shared:
            raise ValueError(
                f"look_back is {self.look_back} and shared {self.shared}; wanted them to leave a frame free of the "
                f"{frames} of a clip"
            )
        if self.until < 0 or not 0 <= self.step <= 1:
            raise ValueError(f"until is {self.until} and step {self.step}; wanted at least 0, and 0 to 1")


@torch.no_grad()
def extend(
    policy: Policy,
    prompts: Sequence[Sequence[str]],
    generator: Randomness = None,
    how: Extension | None = None,
) -> Tensor:
    """Long clips: clean latents (P, ...) with n + (K - 1) (n - shared) frames, from P times K ``prompts``, one a clip.

    ``decode`` of a clip model takes as many frames. One generator seeds every row's own, as in ``Policy.draw``, and the
    first clip is the one that ``draw`` draws. Raises ValueError for a model that draws no clips, for prompts that are
    not as many in every row, for numbers that do not fit, for a policy that walks in its own way, and for a kernel with
    chance: its draws would differ in what two clips share.
    """
    how = how or Extension()
    axis: int | None = getattr(policy.model, "frame_axis", None)
    if axis is None:
        raise ValueError(f"{type(policy.model).__name__} draws single images; wanted a clip model, such as AnimateDiff")
    how.check(policy.model.latent_shape[axis - 1])
    if policy.walker is not walk:
        raise ValueError("a guide of this policy decides how its chain is walked, and so do long clips; leave it out")
    clips = {len(row) for row in prompts}
    if len(clips) != 1 or 0 in clips:
        raise ValueError(f"rows of prompts are {sorted(clips)} long; wanted one row or more, each with a prompt a clip")
    generator = each_row(generator, len(prompts))
    ends = []
    for rows in torch.arange(len(prompts)).split(policy.microbatch):
        some = [generator[row] for row in rows]
        ends.append(_Long(policy, axis, how).drawn([prompts[row] for row in rows], policy.noise(len(rows), some)))
    return torch.cat(ends)


@dataclass(frozen=True)
class _Clip:
    """One drawn: where its first frame is in the long clip, its noise and its moves."""

    start: int
    noise: Tensor
    moves: Sequence[Move]

    @property
    def latents(self) -> Tensor:
        return self.moves[-1].x_next


@dataclass(frozen=True)
class _Long:
    policy: Policy
    axis: int
    how: Extension

    def drawn(self, prompts: Sequence[Sequence[str]], noise: Tensor) -> Tensor:
        """The whole of rows that are drawn together."""
        frames, shared = noise.shape[self.axis], self.how.shared
        told = [self.policy.model.encode([row[place] for row in prompts]) for place in range(len(prompts[0]))]
        clips = [self._clip(0, noise, told[0])]
        for cond in told[1:]:
            before = clips[-1]
            start = extended_noise(before.noise, shared, self.axis)
            overlap = self._overlap([(before, range(frames - shared, frames))], range(shared), before)
            clips.append(self._clip(before.start + frames - shared, start, cond, overlap))
        whole = torch.cat(
            [
                clip.latents.narrow(self.axis, shared * bool(k), frames - shared * bool(k))
                for k, clip in enumerate(clips)
            ],
            self.axis,
        )
        if self.how.look_back:
            for one, other, cond in zip(clips, clips[1:], told[1:], strict=False):
                bridge = self._bridge(one, other, cond)
                free = frames - shared - self.how.look_back
                whole.narrow(self.axis, bridge.start + shared, free).copy_(
                    bridge.latents.narrow(self.axis, shared, free)
                )
        return whole

    def _bridge(self, one: _Clip, other: _Clip, cond: Cond) -> _Clip:
        """The clip across the seam between two, with the prompt of the later."""
        frames, shared, back = one.noise.shape[self.axis], self.how.shared, self.how.look_back
        free = frames - shared - back
        seam = one.start + frames
        start = seam - free // 2 - shared
        left = range(start - one.start, start + shared - one.start)
        right = range(start + frames - back - other.start, start + frames - other.start)
        cut = min(seam - start, frames - back)
        noise = torch.cat(
            [
                frames_of(one.noise, range(start - one.start, start + cut - one.start), self.axis),
                frames_of(other.noise, range(start + cut - other.start, start + frames - other.start), self.axis),
            ],
            self.axis,
        )
        places = [*range(shared), *range(frames - back, frames)]
        return self._clip(start, noise, cond, self._overlap([(one, left), (other, right)], places, one))

    def _overlap(self, parts: Sequence[tuple[_Clip, range]], places: Sequence[int], content: _Clip) -> Overlap:
        """What frames ``places`` are told: frames of several clips, one after the other."""
        each = [beliefs(clip.moves, frames, self.axis) for clip, frames in parts]
        told = [
            Prediction(torch.cat([b.x0 for b in move], self.axis), torch.cat([b.eps for b in move], self.axis))
            for move in zip(*each, strict=True)
        ]
        return Overlap(places, told, [move.prediction.eps.mean(self.axis, keepdim=True) for move in content.moves])

    def _clip(self, start: int, noise: Tensor, cond: Cond, overlap: Overlap | None = None) -> _Clip:
        policy = self.policy
        if overlap is not None:
            policy = policy.with_(walker=Continued(overlap, self.axis, self.how.until, self.how.step))
        moves = list(policy.chain(noise, cond))
        if any(bool(move.transition.is_random.any()) for move in moves):
            raise ValueError(
                f"{policy.kernel} draws noise in its moves, which would differ in frames that two clips share; take "
                "one without, such as DDIM(0)"
            )
        return _Clip(start, noise, moves)
