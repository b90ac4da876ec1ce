"""What ``tropism train``, ``demo``, ``sample`` and ``eval`` do, given settings that have been read."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tropism import catalog, pictures
from tropism.base import Reward
from tropism.config import EvalSettings, PickSettings, SampleSettings, TrainSettings
from tropism.data.prompts import PromptSet
from tropism.evaluate import Evaluation, deterministic, draw_images, evaluate, first_images, interval, paired_gain
from tropism.plan import (
    adapter_folder,
    as_bad_input,
    build_rewards,
    check_device,
    check_out,
    check_writable,
    given,
    load,
    make_plan,
)
from tropism.report import Outcome, in_words, summary
from tropism.rewards import as_reward
from tropism.run import execute
from tropism.steering import image_seeds, steer_policy
from tropism.steering_settings import made_steerers

if TYPE_CHECKING:
    from tropism.catalog.rewards import RewardSpec
    from tropism.models.trainable import Trainable
    from tropism.policy import Policy


def run_train(method: str, settings: TrainSettings, method_settings: Any) -> Outcome:
    """Trains, and says where the results are; of several processes the first one does."""
    plan = make_plan(method, settings, method_settings)
    with nullcontext() if plan.processes.first else redirect_stdout(io.StringIO()):
        outcome = execute(plan)
        print(summary(outcome))
    return outcome


def run_demo(method: str, settings: TrainSettings, method_settings: Any) -> Outcome:
    """The preset, with what happens in plain words."""
    drawn = settings.steps * method_settings.prompts_per_step * method_settings.images_per_prompt
    print(
        f"A small text-to-image model draws pictures of prompts; a reward ({' '.join(settings.reward)}) scores them; "
        f"the method {method} makes what scored well likelier: {drawn} pictures in {settings.steps} steps."
        "\nBefore and after, the same prompts are drawn from the same noise, so what differs is what was learnt.\n"
    )
    outcome = execute(make_plan(method, settings, method_settings))
    gain = outcome.gain
    verdict = "No difference is certain from these pictures."
    if gain.low > 0 or gain.high < 0:
        verdict = f"The model has become {'better' if gain.low > 0 else 'worse'} by its reward."
    print(f"\n{verdict}\n{summary(outcome)}")
    print(f'\nDraw with it: tropism sample --model {settings.model} --adapter {outcome.folder} --prompt "..."')
    return outcome


def run_sample(settings: SampleSettings, steering: Mapping[str, Any] | None = None) -> list[Path]:
    """Draws, and writes one PNG an image and a grid; returns the files. ``steering`` are values of the settings of
    ``settings.steer``."""
    settings.check()
    prompts = PromptSet(settings.prompt) if settings.prompt else catalog.read_prompt_set(str(settings.prompts))
    steerers = made_steerers(settings.steer, steering or {}) if settings.steer else []
    specs = _steered_by(settings, steerers)
    alone = settings.out is not None and settings.out.endswith(".png")
    out = Path(str(settings.out)).expanduser() if alone else check_out(settings.out, "sample")
    check_writable(out)
    model, policy = load_policy(settings)
    rows = first_images(prompts, len(prompts), settings.images)
    text, said = rows.text, f"{policy.steps} steps, guidance {_guidance(settings, model):g}"
    if steerers:
        known = (settings.model, model, prompts, policy.device, settings.reward_cache)
        reward: Reward = build_rewards(specs, *known) if specs else as_reward(_unasked)
        with as_bad_input(TypeError, ValueError):
            found, trace = steer_policy(policy, reward, rows, steerers, image_seeds(len(text), settings.seed))
        images = policy.decode(found.latents).float().cpu()
        towards = f" towards {reward.name}" if specs else ""
        said += f", steered by {settings.steer}{towards} ({trace.calls:g} network calls an image)"
    else:
        images = torch.cat([batch.float().cpu() for batch in draw_images(policy, text, settings.seed)])
    columns = settings.images if 1 < settings.images <= 8 else 0  # a row a prompt, where that fits
    sheet = pictures.to_image(images[0]) if alone and len(images) == 1 else pictures.grid(images, text, columns=columns)
    files = [] if alone else [out / f"{i:03}-{_slug(each)}.png" for i, each in enumerate(text)]
    for file, pixels in zip(files, images, strict=False):
        pictures.save(pictures.to_image(pixels), file)
    files.append(pictures.save(sheet, out if alone else out / "grid.png"))
    print(f"{len(images)} images with {said}: {files[-1]}")
    return files


def _unasked(images: Tensor, prompts: Sequence[str]) -> list[float]:
    raise AssertionError("a steerer that follows no reward asked for one")


def _steered_by(settings: SampleSettings, steerers: Sequence[Any]) -> Sequence[RewardSpec]:
    """The rewards, none where nobody asks for them: captions may then be what the model's own reward cannot read."""
    if not steerers or not (settings.reward or any(each.rewarded for each in steerers)):
        return []
    return catalog.check_rewards(
        given(settings.reward or catalog.own_rewards(settings.model), "reward", settings.model)
    )


def run_eval(settings: EvalSettings) -> dict[str, Any]:
    """Scores a model, and with an adapter compares it with its base at equal seeds; returns what ``out`` holds."""
    settings.check()
    rewards = given(settings.reward or catalog.own_rewards(settings.model), "reward", settings.model)
    name = given(settings.prompts or catalog.own_prompts(settings.model, held_out=True), "prompts", settings.model)
    specs, prompts = catalog.check_rewards(rewards), catalog.read_prompt_set(name)
    if settings.out:
        check_writable(Path(settings.out))
    model, policy = load_policy(settings)
    reward = build_rewards(specs, settings.model, model, prompts, policy.device, settings.reward_cache)
    rows = first_images(prompts, settings.images)
    with as_bad_input(ValueError):
        with model.reference() if settings.adapter else nullcontext():
            base = evaluate(policy, reward, rows, settings.seed)
        tuned = evaluate(policy, reward, rows, settings.seed) if settings.adapter else None
    found = _facts(settings, model, policy, name, base, tuned)
    print(_table(base, tuned, reward.name))
    if settings.out:
        file = Path(settings.out).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1).replace("NaN", "null"), encoding="utf-8")
        print(f"written to {file}")
    return found


def load_policy(settings: PickSettings) -> tuple[Trainable, Policy]:
    """The model with its adapter, and the policy of evaluation."""
    catalog.check_model(settings.model)
    adapter = None if settings.adapter is None else adapter_folder(settings.adapter)
    device = check_device(settings)
    model = load(settings.model, settings, device)
    if adapter is not None:
        with as_bad_input(ValueError, OSError):
            model = with_adapter(model, adapter)
    steps = model.steps if settings.inference_steps is None else settings.inference_steps
    if note := step_note(model, steps):
        print(note)
    return model, deterministic(model, steps, settings.guidance_scale, settings.batch_size)


def step_note(model: Trainable, steps: int) -> str:
    """What is to be said of a student that is drawn with in other moves than it was made for; empty for none."""
    if model.hops != "ode" or steps == model.steps:
        return ""
    return (
        f"note: inference_steps is {steps}, but this student was made for {model.steps} moves; others are worse unless "
        f"it was taught them (mlcm: --stage 2): leave inference_steps out, or distil with --student-steps {steps}"
    )


def with_adapter(model: Trainable, adapter: Path) -> Trainable:
    """The model with what was trained, drawn with as that was made for. Raises ValueError or OSError."""
    if (adapter / model.part).is_dir():
        model.train_full()
    model.load_adapter(adapter)
    told = catalog.told(adapter)
    if "hops" not in told or told["hops"] == model.hops:
        return model
    scale = float(told["guidance_scale"]) if told.get("told") else None
    return model.few_step(told["hops"], int(told["steps"]), scale)


def _guidance(settings: PickSettings, model: Trainable) -> float:
    return model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:48] or "image"


def _facts(
    settings: EvalSettings,
    model: Trainable,
    policy: Policy,
    prompts: str,
    base: Evaluation,
    tuned: Evaluation | None,
) -> dict[str, Any]:
    """What is known, as plain values: summaries by reward, and every score."""
    rewards: dict[str, Any] = {}
    for name, values, after in _pairs(base, tuned):
        rewards[name] = {"base": asdict(interval(values)), "scores": {"base": values.tolist()}}
        if after is not None:
            rewards[name] |= {"tuned": asdict(interval(after)), "gain": asdict(paired_gain(values, after))}
            rewards[name]["scores"]["tuned"] = after.tolist()
    return {
        "model": settings.model,
        "adapter": settings.adapter,
        "prompts": prompts,
        "images": settings.images,
        "seed": settings.seed,
        "inference_steps": policy.steps,
        "guidance_scale": _guidance(settings, model),
        "rewards": rewards,
        "text": list(base.text),
    }


def _pairs(base: Evaluation, tuned: Evaluation | None) -> Sequence[tuple[str, Tensor, Tensor | None]]:
    """(name, scores, scores with the adapter) of each reward, and of their sum where there are several."""
    found = [(name, values, None if tuned is None else tuned.parts[name]) for name, values in base.parts.items()]
    if len(found) > 1:
        found.append(("weighted sum", base.total, None if tuned is None else tuned.total))
    return found


def _table(base: Evaluation, tuned: Evaluation | None, name: str) -> str:
    """Means with 95 % intervals, a line a reward."""
    lines = []
    for reward, values, after in _pairs(base, tuned):
        found = interval(values)
        line = f"{reward:<24} {found.mean:.4g} ({found.low:.4g} to {found.high:.4g})"
        if after is not None:
            other = interval(after)
            line += f"  with the adapter {other.mean:.4g} ({other.low:.4g} to {other.high:.4g}); "
            line += in_words(paired_gain(values, after))
        elif found.count < len(values):
            line += f", {len(values) - found.count} of {len(values)} without a score"
        lines.append(line)
    return "\n".join(lines)
