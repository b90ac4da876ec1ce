"""Rewards: (samples, prompts, **columns) -> (B,) float32, higher is better, NaN = no score.

Nothing here imports transformers or diffusers; rewards that hold a CLIP are in ``tropism.models.clip_rewards``.
"""

from .callables import ScoredReward, as_reward
from .composed import Elsewhere, Hinge, Negated, Weighted
from .preprocess import Preprocess
from .programmatic import (
    PROGRAMMATIC,
    SMOOTH,
    STATISTICS,
    JpegCompressibility,
    JpegIncompressibility,
    PixelReward,
    jpeg_kilobytes,
    pixel_statistics,
)
from .scenes import ScenesReward
from .scores import RewardError, Scores, check_scores, score, statistics
from .weights import linear_head, open_clip_to_transformers, read_tensors

__all__ = [
    "PROGRAMMATIC",
    "SMOOTH",
    "STATISTICS",
    "Elsewhere",
    "Hinge",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Negated",
    "PixelReward",
    "Preprocess",
    "RewardError",
    "ScenesReward",
    "ScoredReward",
    "Scores",
    "Weighted",
    "as_reward",
    "check_scores",
    "jpeg_kilobytes",
    "linear_head",
    "open_clip_to_transformers",
    "pixel_statistics",
    "read_tensors",
    "score",
    "statistics",
]
