"""``tropism compare-steering`` and ``tropism steerers``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tropism import catalog, flags, pictures
from tropism.commands import load_policy
from tropism.config import BadInput
from tropism.evaluate import first_images
from tropism.export import new_folder
from tropism.few_step_command import plain_values
from tropism.plan import adapter_folder, as_bad_input, build_rewards, check_out, given
from tropism.rewards import Weighted
from tropism.steering_report import Entry, Way, chart, rows, sheet, steering_report, table
from tropism.steering_settings import CompareSteeringSettings, SteerersSettings, made_steerers

PLAIN = "plain"


def run_compare_steering(settings: CompareSteeringSettings, steering: Mapping[str, Any] | None = None) -> list[Entry]:
    """Prints the table and writes the folder; ``steering`` are values of the steerers' settings. Raises BadInput before
    anything is written."""
    settings.check()
    steered = {way: made_steerers(way, steering or {}) for way in settings.steer}
    rewards = given(settings.reward or catalog.own_rewards(settings.model), "reward", settings.model)
    name = given(settings.prompts or catalog.own_prompts(settings.model, held_out=True), "prompts", settings.model)
    specs = catalog.check_rewards(rewards)
    held = catalog.check_held_out(settings.eval_reward, rewards, settings.model)
    prompts, tuned = catalog.read_prompt_set(name), _tuned(settings)
    out = check_out(settings.out, "compare-steering")
    model, policy = load_policy(settings)
    judges = build_rewards([*specs, *held], settings.model, model, prompts, policy.device)
    reward = Weighted(judges.rewards[: len(specs)], name=judges.name)
    ways = {PLAIN: Way(policy), **{way: Way(policy, steerers) for way, steerers in steered.items()}}
    ways |= {label: Way(load_policy(each)[1]) for label, each in tuned.items()}
    with as_bad_input(ValueError, TypeError):
        entries = steering_report(ways, reward, judges, first_images(prompts, settings.images), settings.seed)
    print(table(entries))
    said = {"model": settings.model, "prompts": name, "images": settings.images, "reward": reward.name}
    said |= {"seed": settings.seed, "inference_steps": policy.steps}
    said |= {"steerers": {way: [vars(each) for each in steerers] for way, steerers in steered.items()}}
    said |= {"device": str(policy.device), "threads": torch.get_num_threads()}
    with new_folder(out) as folder:
        write(folder, entries, said, settings.shown)
    print(f"written to {out}: report.json, report.csv, chart.png, pictures.png")
    return entries


def _tuned(settings: CompareSteeringSettings) -> dict[str, Any]:
    """Settings of the policy of every fine-tuned run, by its name. Raises BadInput."""
    from dataclasses import replace

    found = {}
    for each in settings.tuned:
        adapter_folder(each, "tuned")
        found[Path(each).expanduser().resolve().name] = replace(settings, adapter=each)
    if len(found) < len(settings.tuned) or set(found) & {PLAIN, *settings.steer}:
        raise BadInput(f"tuned is {' '.join(settings.tuned)}; wanted folders with different names, none that of a way")
    return found


def write(folder: Path, entries: Sequence[Entry], said: Mapping[str, Any], shown: int = 3) -> None:
    """report.json (with every score and the traces), report.csv, chart.png and pictures.png."""
    plain = rows(entries)
    told = []
    for row, each in zip(plain, entries, strict=True):
        scores = {name: values.tolist() for name, values in each.evaluation.parts.items()}
        told.append({**row, "scores": scores, "steps": [dict(step) for step in each.trace.steps]})
    text = {**said, "rows": told, "text": list(entries[0].evaluation.text)}
    (folder / "report.json").write_text(json.dumps(plain_values(text), indent=1, allow_nan=False), encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    pictures.save(chart(entries, next(iter(entries[0].rewards))), folder / "chart.png")
    pictures.save(sheet(entries, shown), folder / "pictures.png")


def run_steerers(settings: SteerersSettings) -> list[str]:
    """Prints every steerer, or those named, with their settings; returns the lines. Raises BadInput."""
    names = catalog.steerer_names()
    lines = []
    for name in settings.steer or names:
        (kind,) = catalog.steerer_settings(name)
        lines.append(f"{name.replace('_', '-')}: {names[name.replace('_', '-')]}")
        for each in flags.settings_of(kind, ""):
            lines.append(f"  {each.flag:<24} {flags.shown(each.default):<10} {each.doc}")
        lines.append("")
    print("\n".join(lines))
    return lines
