"""``tropism doctor``: what can be known of a run in a minute, before hours are spent on it.

A run is set up as ``train`` would, a small batch of it goes through one update, and what training rests on is measured.
Nothing is written outside a temporary folder. A row that fails says what to do about it.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tropism.base import Prompts
from tropism.config import BadInput, RunFailed, TrainSettings, one_line
from tropism.data.prompts import batches
from tropism.evaluate import draw_images, first_images
from tropism.health import Watched, blank, check_finite_pictures
from tropism.log import clock
from tropism.memory import MIB, free_mib, memory_plan, resident_bytes
from tropism.plan import Bench, Plan, make_plan, set_up
from tropism.policy import reward_statistics
from tropism.rewards.trial import Row, Verdict
from tropism.train import NothingToLearn, Step, train

GROUPS, ROWS = 4, 4  # prompts of the small batch, and images of each
PICTURE_BYTES = 2**20  # of one evaluation, about
TIGHT = 0.9  # of the memory there is
LONG = 600.0  # seconds after which a run should save itself now and then


def run_doctor(method: str, settings: TrainSettings, method_settings: Any) -> list[Row]:
    """Prints the table. Raises RunFailed when a row fails."""
    rows = []
    for row in examine(method, settings, method_settings):
        rows.append(row)
        print(in_lines(row), flush=True)
    failed = [row.check for row in rows if row.verdict == "fail"]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(rows)} checks failed: {', '.join(failed)}")
    print(f"\nNothing is wrong with this run, as far as {len(rows)} checks can tell.")
    return rows


def in_lines(row: Row) -> str:
    """A row of the table, its remedy below it."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    head = f"{row.verdict:<5} {row.check:<12} "
    lines = textwrap.wrap(row.measured, width - len(head)) or [""]
    lines += textwrap.wrap(row.remedy, width - len(head), initial_indent="-> ", subsequent_indent="   ")
    return "\n".join((head if number == 0 else " " * len(head)) + line for number, line in enumerate(lines))


def examine(method: str, settings: TrainSettings, method_settings: Any) -> Iterator[Row]:
    """Every row, as it is found; ends early where nothing more can be looked at."""
    try:
        if settings.resume is not None:
            raise BadInput(f"resume is {settings.resume}; the doctor looks at runs that have not begun: leave it out")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput("the doctor was started as several processes; start it without a launcher")
        plan = make_plan(method, settings, method_settings)
        yield Row("settings", f"{plan.method} on {plan.settings.model}, reward {' '.join(plan.settings.reward)}")
        yield from (geometry(plan), prompts(plan))
        bench = set_up(plan)
    except BadInput as error:
        yield Row("set-up", one_line(error), "fail")
        return
    exam = Exam(plan, bench)
    for name, check in CHECKS.items():
        try:
            yield check(exam)
        except NothingToLearn as error:
            yield Row(name, one_line(error), "fail", "the reward must tell images of one prompt apart")
        except (RuntimeError, ValueError, TypeError, OSError, SafetensorError) as error:
            yield Row(name, one_line(error), "fail")


# Before anything is loaded.


def geometry(plan: Plan) -> Row:
    """What a step is."""
    own, steps = plan.method_settings, plan.settings.steps
    images = own.prompts_per_step * own.images_per_prompt
    said = (
        f"{own.prompts_per_step} prompts x {own.images_per_prompt} images = {images} images a step, each of "
        f"{own.inference_steps} moves, drawn {min(own.sample_batch, images)} at once; {own.minibatch} rows a backward "
        f"pass; {steps:,} steps = {steps * images:,} images"
    )
    return Row("geometry", said)


def prompts(plan: Plan) -> Row:
    """Whether evaluation is held out, and whether a batch has different prompts."""
    trained, tested = set(plan.prompts.text), list(plan.eval_prompts.text)
    both = sum(text in trained for text in tested)
    said = f"{len(trained)} different to train on, {len(set(tested))} to evaluate on, {both} of these in both"
    if both and len(trained) > 1:
        return Row("prompts", said, "warn", "give eval_prompts that are not trained on, to see what is learnt by heart")
    return Row("prompts", said)


# With everything loaded.


@dataclass
class Exam:
    """A run that is set up, and what its checks share."""

    plan: Plan
    bench: Bench
    seconds_per_image: float = math.nan

    @cached_property
    def batch(self) -> Prompts:
        """A few prompts of the first step, with a few images each."""
        own = self.plan.method_settings
        each = min(own.images_per_prompt, ROWS)
        groups = min(own.prompts_per_step, GROUPS * ROWS // each)
        return next(batches(self.plan.prompts, groups, each, self.plan.settings.seed))

    @cached_property
    def pictures(self) -> Tensor:
        """Two images (2, 3, H, W) of the model before training, a student's teacher, as an evaluation draws them."""
        policy, text = self.bench.evaluator.before, first_images(self.plan.eval_prompts, 2).text
        with self.bench.model.reference():
            return torch.cat([images.float() for images in draw_images(policy, text, self.plan.settings.eval_seed)])

    @torch.no_grad()
    def answer(self, reference: bool = False) -> Tensor:
        """What the model, or the model before training, answers to noise halfway, both halves."""
        model, generator = self.bench.model, torch.Generator().manual_seed(0)
        x = torch.randn(2, *model.latent_shape, generator=generator).to(self.plan.device)
        t = torch.full((2,), float(model.grid(model.steps)[model.steps // 2]), device=self.plan.device)
        cond = model.encode([self.plan.prompts.text[0]] * 2)
        with model.reference() if reference else nullcontext():
            return torch.cat(list(model.denoiser(x, t, cond)))  # at pure noise a flow's eps is x itself


def check_pictures(exam: Exam) -> Row:
    """Finite, and neither black nor of one colour."""
    check_finite_pictures(exam.pictures)
    size = "x".join(map(str, exam.pictures.shape[-2:]))
    said = f"{size} pixels, values from {float(exam.pictures.min()):.2f} to {float(exam.pictures.max()):.2f}"
    empty = int(blank(exam.pictures).sum())
    if empty:
        remedy = "draw some with tropism sample; another precision, or another decoder, may help"
        return Row("pictures", f"{said}; {empty} of 2 are black or of one colour", "fail", remedy)
    return Row("pictures", said)


def check_reward(exam: Exam) -> Row:
    """Two pictures of the model: a score for each, the same again, and not the same for both."""
    pair = first_images(exam.plan.eval_prompts, 2)
    columns = {name: list(values) for name, values in pair.columns.items()}
    started = time.perf_counter()
    scores, again = (exam.bench.reward(exam.pictures, pair.text, **columns) for _ in range(2))
    each = (time.perf_counter() - started) / 4
    said = f"{', '.join(f'{score:.4g}' for score in scores.tolist())} on two pictures; {1e3 * each:.1f} ms an image"
    if bool(scores.isnan().all()):
        return Row("reward", f"{said}: no score", "fail", "see why with tropism reward test")
    if not torch.equal(scores.nan_to_num(), again.nan_to_num()):
        return Row("reward", f"{said}, and others when asked again", "warn", "it is random, so gains are less certain")
    if bool(scores[0] == scores[1]):
        return Row("reward", f"{said}: the same", "warn", "tropism reward test says whether it tells pictures apart")
    return Row("reward", said)


def check_reference(exam: Exam) -> Row:
    """A model that has learnt nothing is its own reference, bit by bit."""
    apart = float((exam.answer() - exam.answer(reference=True)).abs().max())
    if exam.plan.settings.start_from is not None and apart:
        return Row("reference", f"the answer differs by {apart:.1e}: it starts from {exam.plan.settings.start_from}")
    said = f"KL to the model before training: {'0' if apart == 0 else f'not 0, answers differ by {apart:.1e}'}"
    return Row("reference", said, "ok" if apart == 0 else "fail", "" if apart == 0 else "load the base model anew")


def check_advantages(exam: Exam) -> Row:
    """Of one small rollout: rewards differ, and advantages sum to 0 in each group where that is promised."""
    method = exam.bench.method
    if not hasattr(method, "rollout"):
        return Row("advantages", "this method has none")
    rollout = method.rollout(exam.batch)
    facts = reward_statistics(rollout.reward, rollout.group)
    mean, std, flat = (facts[name] for name in ("reward_mean", "reward_std", "zero_std_ratio"))
    said = f"rewards {mean:.3g} ± {std:.2g}, {flat:.0%} of groups flat"
    if facts["reward_missing"]:
        said += f", {facts['reward_missing']:.0f} of {len(rollout.reward)} without a score"
    if not exam.plan.method_settings.group_relative:
        return Row("advantages", f"{said}; by each prompt's own statistics")
    groups = rollout.group.to(rollout.advantage.device)
    sums = torch.stack([rollout.advantage[groups == name].sum() for name in set(groups.tolist())])
    worst = float(sums.abs().max())
    verdict: Verdict = "ok" if worst < 1e-4 * len(groups) else "fail"
    return Row("advantages", f"{said}; sums of groups at most {worst:.1e}", verdict)


def check_update(exam: Exam) -> Row:
    """An update: the ratio is 1 before it, the gradient is finite, the policy moves and the reference does not.

    A second one is timed: the first call of a network costs more than all others.
    """
    bench, found = exam.bench, list[Step]()
    own = {name: 1 for name in ("updates", "inner_epochs") if hasattr(exam.plan.method_settings, name)}
    generator = torch.Generator().manual_seed(exam.plan.settings.seed + 2)
    method = bench.build(replace(exam.plan.method_settings, **own), Watched(bench.reward), generator)
    before, reference = exam.answer(), exam.answer(reference=True)
    norm = exam.plan.method_settings.max_grad_norm
    train(method, [exam.batch], bench.optimizer, steps=1, max_norm=norm, hooks=[found.append])
    with suppress(NothingToLearn):
        train(method, [exam.batch], bench.optimizer, steps=1, max_norm=norm, hooks=[found.append])
    metrics, warm = found[0].metrics, found[-1]
    exam.seconds_per_image = warm.seconds / warm.images
    moved = float((exam.answer() - before).abs().max())
    said = f"gradient {metrics['grad_norm']:.2g}, the answer moved by {moved:.1e}"
    if "ratio_max" in metrics:
        said = f"ratio 1 {metrics['ratio_max'] - 1:+.0e} before it, {said}"
    if not torch.equal(reference, exam.answer(reference=True)):
        return Row("update", f"{said}; the reference moved as well", "fail", "the base model must stay as it is")
    if not moved:
        return Row("update", f"{said}: nothing was learnt", "fail", "raise learning_rate; check lora_targets")
    return Row("update", said)


def check_saving(exam: Exam) -> Row:
    """What is saved is what was trained, bit by bit, and there is room for it."""
    model = exam.bench.model
    before = exam.answer()
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(Path(folder) / "adapter")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_adapter(Path(folder) / "adapter")
    if not torch.equal(before, exam.answer()):
        return Row("saving", "what was loaded answers otherwise than what was saved", "fail")
    settings = exam.plan.settings
    evaluations = 2 + (settings.steps // settings.eval_every if settings.eval_every else 0)
    need = size * (1 + (settings.save_total_limit + 2) * (5 if settings.ema else 3)) + evaluations * PICTURE_BYTES
    home = next(place for place in (exam.plan.out.absolute(), *exam.plan.out.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(home).free
    mib = [f"{count / 2**20:,.0f}" for count in (need, free)]
    said = f"an adapter of {size / 2**20:.1f} MiB; the run needs about {mib[0]} MiB of {mib[1]} free"
    if need > free:
        return Row("saving", said, "fail", "make room, give another out, or raise save_every and eval_every")
    return Row("saving", said)


def check_memory(exam: Exam) -> Row:
    """What will be resident, phase by phase, against what the device has."""
    plan, bench = exam.plan, exam.bench

    def score(images: Tensor) -> Tensor:
        batch = first_images(plan.eval_prompts, len(images))
        return bench.reward(images, batch.text, **batch.columns)

    *phases, peak = memory_plan(bench.model, plan.settings, plan.method_settings, plan.device, score)
    has = free_mib(plan.device) + resident_bytes(plan.device) / MIB
    parts = ", ".join(f"{row.phase} {row.mib:,.0f}" for row in phases)
    said = f"{peak.mib:,.0f} of {has:,.0f} MiB at most ({parts})"
    if peak.mib > TIGHT * has:
        return Row("memory", said, "fail" if peak.mib > has else "warn", peak.note)
    return Row("memory", said)


def check_time(exam: Exam) -> Row:
    """How long the run will take, about."""
    settings, own = exam.plan.settings, exam.plan.method_settings
    images = settings.steps * own.prompts_per_step * own.images_per_prompt
    seconds = images * exam.seconds_per_image
    said = f"up to about {clock(seconds)} for {images:,} images, without evaluations"
    if seconds > LONG and not settings.save_every:
        return Row("time", f"{said}; save_every is 0", "warn", "give save_every, so that it can go on when it stops")
    return Row("time", said)


CHECKS: dict[str, Callable[[Exam], Row]] = {
    "pictures": check_pictures,
    "reward": check_reward,
    "reference": check_reference,
    "advantages": check_advantages,
    "update": check_update,
    "saving": check_saving,
    "memory": check_memory,
    "time": check_time,
}
