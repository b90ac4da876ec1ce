"""The model card of a run: a README.md with the header that hubs read, a snippet, the evaluation, and the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import yaml

from tropism import __version__
from tropism.catalog import SHIPPED, distilling
from tropism.evaluate import interval, paired_gain

if TYPE_CHECKING:
    from tropism.models.trainable import Trainable
    from tropism.plan import Plan
    from tropism.report import Outcome


def render(plan: Plan, model: Trainable, outcome: Outcome) -> str:
    """The whole text."""
    settings = plan.settings
    what = "All weights of the denoising network" if settings.full else "A LoRA"
    rewards = f"`{' '.join(settings.reward)}`"
    done, verb = f"on the reward {rewards}", "train"
    drawn = f"before and after (seed {settings.eval_seed}), {model.steps} deterministic steps, guidance "
    drawn += f"{model.guidance_scale:g}"
    if outcome.ends is not None:
        done, verb = f"to draw in {model.steps} moves, judged by {rewards}", "distill"
        drawn = f"by the {outcome.ends[0]} and by the {outcome.ends[1]} (seed {settings.eval_seed})"
    return "\n".join(
        [
            front_matter(settings.model, plan.method, lora=not settings.full),
            f"# {plan.method} on {settings.model}",
            "",
            f"{what} trained by tropism {__version__} with {plan.method} {done}: {outcome.steps} steps, "
            f"{outcome.images} images.",
            "",
            f"![The same prompts and seeds, {' and '.join(outcome.labels)}](before_after.png)",
            "",
            "## Use",
            "",
            _snippet(plan, model),
            "## Evaluation",
            "",
            f"{settings.eval_images} images of `{settings.eval_prompts}`, the same prompts from the same noise {drawn}"
            ". Means, with 95 % bootstrap intervals.",
            "",
            *_table(outcome),
            "",
            "![Rewards over the steps](curve.png)",
            "",
            "## Settings",
            "",
            f"`tropism {verb} {plan.method} --config config.yaml` runs this again.",
            "",
            "| setting | value |",
            "|---|---|",
            *setting_rows(asdict(plan.method_settings) | {k: v for k, v in asdict(settings).items() if k != "out"}),
            "",
        ]
    )


def front_matter(model: str, method: str, lora: bool) -> str:
    """The header that hubs read, with the name of the base model."""
    shipped = model in SHIPPED
    licence = {"license": "apache-2.0"} if shipped else {"license": "other", "license_name": "as-the-base-model"}
    what = "distillation" if method in distilling() else "reward-fine-tuning"
    tags = ["text-to-image", "diffusers", "tropism", what, method]
    facts = {
        "base_model": model,
        "library_name": "diffusers",
        **licence,
        "pipeline_tag": "text-to-image",
        "tags": [*tags, "lora", "template:sd-lora"] if lora else tags,
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _snippet(plan: Plan, model: Trainable) -> str:
    """How to draw with the result, in plain diffusers where that can be."""
    settings, prompt = plan.settings, plan.eval_prompts.text[0]
    shipped = settings.model in SHIPPED
    base = f"check_model({settings.model!r})" if shipped else repr(settings.model)
    lines = model.use(base, "adapter", settings.full, prompt)
    lines[0:0] = ["from tropism.catalog import check_model"] if shipped else []
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _table(outcome: Outcome) -> Iterable[str]:
    """One line a reward, and one for their sum where there are several."""
    yield f"| reward | {' | '.join(outcome.labels)} | gain | better | pairs |"
    yield "|---|---|---|---|---|---|"
    pairs = {name: (outcome.before.parts[name], outcome.after.parts[name]) for name in outcome.before.parts}
    if len(pairs) > 1 or not torch.equal(outcome.before.total.nan_to_num(), next(iter(pairs.values()))[0].nan_to_num()):
        pairs["weighted sum"] = (outcome.before.total, outcome.after.total)
    for name, (before, after) in pairs.items():
        gain = paired_gain(before, after)
        yield (
            f"| {name} | {_mean(before)} | {_mean(after)} | {gain.mean:+.4g} ({gain.low:+.4g} to {gain.high:+.4g}) | "
            f"{gain.win_rate:.0%} | {gain.pairs} |"
        )


def _mean(values: torch.Tensor) -> str:
    found = interval(values)
    return f"{found.mean:.4g} ({found.low:.4g} to {found.high:.4g})"


def setting_rows(entries: Mapping[str, Any]) -> Iterable[str]:
    """One line of a table a setting."""
    for name, value in entries.items():
        shown = (
            " ".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value is None else str(value)
        )
        yield f"| {name} | {shown.replace('|', chr(92) + '|')} |"
