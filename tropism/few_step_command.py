"""``tropism few-steps``: the report of ``few_step_report`` as a table, files, a chart and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropism import catalog, pictures
from tropism.commands import step_note, with_adapter
from tropism.config import BadInput
from tropism.evaluate import deterministic, first_images
from tropism.export import new_folder
from tropism.few_step_report import Point, few_step_report, rows, table
from tropism.few_step_settings import FewStepsSettings
from tropism.plan import adapter_folder, as_bad_input, build_rewards, check_device, check_out, given, load

if TYPE_CHECKING:
    from tropism.models.trainable import Trainable
    from tropism.policy import Policy

TEACHER = "teacher"


def run_few_steps(settings: FewStepsSettings) -> list[Point]:
    """Prints the table and writes the folder. Raises BadInput before anything is written, RunFailed afterwards."""
    settings.check()
    settings = replace(settings, counts=sorted(settings.counts))
    rewards = given(settings.reward or catalog.own_rewards(settings.model), "reward", settings.model)
    name = given(settings.prompts or catalog.own_prompts(settings.model, held_out=True), "prompts", settings.model)
    specs, prompts = catalog.check_rewards(rewards), catalog.read_prompt_set(name)
    catalog.check_model(settings.model)
    students = {label: _weights(folder) for label, folder in labels(settings.adapter).items()}
    out, device = check_out(settings.out, "few-steps"), check_device(settings)
    policies = _policies(settings, students, device)
    teacher: Any = policies[TEACHER].model
    reward = build_rewards(specs, settings.model, teacher, prompts, device, settings.reward_cache)
    with as_bad_input(ValueError):
        points = few_step_report(
            policies, reward, first_images(prompts, settings.images), settings.counts, settings.seed, settings.rounds
        )
    print(table(points, reward.name))
    said = {"model": settings.model, "adapters": settings.adapter, "prompts": name, "images": settings.images}
    said |= {"reward": reward.name, "seed": settings.seed, "batch_size": settings.batch_size}
    said |= {"device": str(device), "threads": torch.get_num_threads()}
    with new_folder(out) as folder:
        write(folder, points, said, settings.shown)
    print(f"written to {out}: report.json, report.csv, chart.png, pictures.png")
    return points


def labels(adapters: Sequence[str]) -> dict[str, str]:
    """Each student by its folder's name; by its whole path where names are the same. Raises BadInput for one twice."""
    if len(set(adapters)) < len(adapters):
        raise BadInput(f"adapter is {' '.join(adapters)}; wanted each student once")
    if TEACHER in adapters:
        raise BadInput(f"adapter is {TEACHER}, as the model is called here; wanted another name for that folder")
    names = [Path(each).expanduser().resolve().name for each in adapters]
    pairs = zip(names, adapters, strict=True)
    return {name if names.count(name) == 1 and name != TEACHER else each: each for name, each in pairs}


def _weights(student: str) -> Path:
    """The folder of an adapter, or of a whole pipeline. Raises BadInput."""
    folder = Path(student).expanduser()
    return folder if (folder / "model_index.json").is_file() else adapter_folder(student)


def _policies(settings: FewStepsSettings, students: dict[str, Path], device: torch.device) -> dict[str, Policy]:
    """The teacher's and every student's, each with a network of its own. Raises BadInput."""
    teacher = load(settings.model, settings, device)
    found = {TEACHER: deterministic(teacher, teacher.steps, settings.guidance_scale, settings.batch_size)}
    for label, folder in students.items():
        model = _student(settings, folder, device)
        if model.latent_shape != teacher.latent_shape:
            raise BadInput(
                f"adapter {folder} draws latents {model.latent_shape} and {settings.model} {teacher.latent_shape}; "
                "wanted a student of this model"
            )
        for note in filter(None, (step_note(model, count) for count in settings.counts)):
            print(f"{note} ({label})")
        found[label] = deterministic(model, model.steps, None, settings.batch_size)
    return found


def _student(settings: FewStepsSettings, folder: Path, device: torch.device) -> Trainable:
    if (folder / "model_index.json").is_file():
        return load(str(folder), settings, device)
    with as_bad_input(ValueError, OSError):
        return with_adapter(load(settings.model, settings, device), folder)


def write(folder: Path, points: Sequence[Point], said: dict[str, Any], shown: int = 2) -> None:
    """report.json (with every score), report.csv, chart.png and pictures.png; ``said`` is what was asked for."""
    plain = rows(points)
    found = [{**row, "scores": point.evaluation.total.tolist()} for row, point in zip(plain, points, strict=True)]
    text = plain_values({**said, "rows": found, "text": list(points[0].evaluation.text)})
    (folder / "report.json").write_text(json.dumps(text, indent=1, allow_nan=False), encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plain[0]))
        writer.writeheader()
        writer.writerows(plain)
    pictures.save(chart(points, str(said["reward"])), folder / "chart.png")
    pictures.save(sheet(points, shown), folder / "pictures.png")


def plain_values(value: Any) -> Any:
    """The same with None for every number that is missing, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: plain_values(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def chart(points: Sequence[Point], reward: str) -> Any:
    """A matplotlib figure: the reward against network calls, a line a model."""
    lines = []
    for name in dict.fromkeys(point.name for point in points):
        own = [point for point in points if point.name == name]
        means, low, high = zip(*((p.reward.mean, p.reward.low, p.reward.high) for p in own), strict=True)
        lines.append(pictures.Measured(name, [p.calls for p in own], means, low, high, [str(p.moves) for p in own]))
    return pictures.against_cost(lines, "quality against cost; numbers are moves", "network calls an image", reward)


def sheet(points: Sequence[Point], shown: int) -> Any:
    """A row a model, for each of the first prompts in turn, and a column a count."""
    columns = len({point.moves for point in points})
    count = min(shown, len(points[0].evaluation.text))
    cells = [(point.evaluation, place, point) for place in range(count) for point in points]
    return pictures.grid(
        torch.stack([seen.images[place] for seen, place, _ in cells]),
        [f"{point.name}, {point.moves}: {seen.text[place]}" for seen, place, point in cells],
        [f"reward {pictures.number(float(seen.total[place]))}" for seen, place, _ in cells],
        "the same prompts from the same noise; columns are moves",
        columns,
    )
