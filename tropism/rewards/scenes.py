"""The verifier of an embedded world as a reward. The verifier is an argument, so that rewards import no world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .scores import RewardError, Scores, as_images


class Verdict(Protocol):
    """What a verifier says of one picture."""

    @property
    def score(self) -> float: ...

    @property
    def parts(self) -> Mapping[str, bool]: ...

    @property
    def passed(self) -> bool: ...


Verify = Callable[[NDArray[np.float32], Sequence[str]], Sequence[Verdict]]
"""(N, 3, H, W) floats in [0, 1] and N captions -> N verdicts."""


class ScenesReward:
    """How well each picture shows what its caption claims: the verdict's score, or 1 and 0 for pass and fail.

    ``score`` adds as info ``passed`` (B,) and one (B,) tensor for every part: 1 holds, 0 does not, NaN not claimed.
    Pictures are clamped to [0, 1] first; ``world`` is what it is called after. Raises RewardError where the verifier
    fails or miscounts.
    """

    differentiable = False

    def __init__(self, verify_batch: Verify, mode: Literal["score", "pass"] = "score", world: str = "scenes") -> None:
        if mode not in ("score", "pass"):
            raise RewardError(f"there is no mode '{mode}'; choose 'score' or 'pass'")
        self.verify_batch = verify_batch
        self.mode = mode
        self.name = world if mode == "score" else f"{world}_pass"

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B captions -> (B,) float32 in [0, 1]."""
        return self.score(samples, prompts, **columns).values

    def score(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Scores:
        images = as_images(samples, prompts, self.name)
        pixels = images.detach().clamp(0, 1).cpu().numpy().astype(np.float32, copy=False)
        try:
            verdicts = self.verify_batch(pixels, list(prompts))
        except Exception as cause:
            said = f"{type(cause).__name__}: {cause}".strip().split("\n")[0]
            raise RewardError(f"the verifier of '{self.name}' raised {said}") from cause
        if len(verdicts) != len(prompts):
            got = f"{len(verdicts)} verdicts for {len(prompts)} pictures"
            raise RewardError(f"the verifier of '{self.name}' gave {got}")
        passed = torch.tensor([float(verdict.passed) for verdict in verdicts], device=images.device)
        scored = torch.tensor([float(verdict.score) for verdict in verdicts], device=images.device)
        info = {"passed": passed, **_parts(verdicts, images.device)}
        return Scores(scored if self.mode == "score" else passed, info)


def _parts(verdicts: Sequence[Verdict], device: torch.device) -> dict[str, Tensor]:
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    return {
        name: torch.tensor([float(verdict.parts.get(name, float("nan"))) for verdict in verdicts], device=device)
        for name in names
    }
