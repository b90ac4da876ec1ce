"""Names for things, and the things themselves: methods, models, prompts, rewards, steerers. The only place that wires
them.

Methods and steerers are found, not registered: every module of their folder with a ``Settings`` class is one.
Functions that are called ``check_...`` load nothing; what they accept can still fail to load, with a sentence of its
own.
"""

from tropism.catalog.methods import distilling, method_names, method_settings
from tropism.catalog.models import (
    SHIPPED,
    WEIGHTS,
    check_model,
    describe_model,
    exporter,
    families,
    load_model,
    told,
    wrap,
)
from tropism.catalog.prompts import own_prompts, pairs, pictures, read_prompt_set
from tropism.catalog.rewards import (
    RewardSpec,
    build_reward,
    cached,
    check_held_out,
    check_rewards,
    own_rewards,
    packaged_rewards,
    parse_reward,
    reward_version,
    sample_pictures,
)
from tropism.catalog.steerers import steerer_names, steerer_settings

__all__ = [
    "SHIPPED",
    "WEIGHTS",
    "RewardSpec",
    "build_reward",
    "cached",
    "check_held_out",
    "check_model",
    "check_rewards",
    "describe_model",
    "distilling",
    "exporter",
    "families",
    "load_model",
    "method_names",
    "method_settings",
    "own_prompts",
    "own_rewards",
    "packaged_rewards",
    "pairs",
    "parse_reward",
    "pictures",
    "read_prompt_set",
    "reward_version",
    "sample_pictures",
    "steerer_names",
    "steerer_settings",
    "told",
    "wrap",
]
