"""One training run, from a checked plan to a folder: evaluation, steps, checkpoints, pictures, and what goes wrong.

The folder is made when the first evaluation has passed, and removed again when not even one step could be finished.
After that whatever was good is kept: the metrics, the checkpoints, and the adapter as it is.
"""

from __future__ import annotations

import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors import SafetensorError

from tropism import card, pictures
from tropism.best import Best, EnoughSeen
from tropism.checkpoint import load_checkpoint, save_checkpoint, tidy
from tropism.config import BadInput, RunFailed, one_line, save_config
from tropism.data.prompts import batches
from tropism.ema import Ema
from tropism.health import HealthCheck, Unhealthy
from tropism.log import Lines, Progress, reason, start_trackers
from tropism.pages.run_page import write_report
from tropism.plan import Bench, Plan, as_bad_input, set_up
from tropism.processes import leave
from tropism.report import Outcome, compared, ends_of
from tropism.resume import BEST, checkpoints, fingerprint
from tropism.rewards import RewardError
from tropism.stopping import stop_when_asked
from tropism.train import NonFinite, NothingToLearn, Step, train
from tropism.watching import Sight, metrics_row

FLAT_STEPS = 3  # steps in a row without anything to learn from, after which a run stops
SHOWN = 16  # images of a sample grid
ROLLBACKS = 3  # of one run, after which it stops


class Interrupted(RunFailed):
    """The user stopped the run."""


def execute(plan: Plan) -> Outcome:
    """The whole run. Raises BadInput before there is a folder, RunFailed afterwards."""
    settings, method = plan.settings, plan.method_settings
    print(f"{plan.method} on {settings.model}, reward {' '.join(settings.reward)}; loading")
    bench = set_up(plan)
    trained = sum(parameter.numel() for parameter in bench.model.parameters())
    print(
        f"{settings.steps} steps of {method.prompts_per_step} prompts x {method.images_per_prompt} images, "
        f"{trained:,} trained parameters on {plan.device}; evaluating {settings.eval_images} images before the start"
    )
    run = Run(plan, bench)
    try:
        run.begin()
        with stop_when_asked(run.progress.say) as run.stop_asked:
            run.learn()
        return run.finish()
    except BadInput:
        raise
    except Interrupted as error:
        raise Interrupted(run.abort(str(error), error)) from error
    except KeyboardInterrupt as error:
        raise Interrupted(run.abort("stopped by the keyboard", error)) from error
    except (RunFailed, RuntimeError, ValueError, TypeError, OSError, SafetensorError) as error:
        raise RunFailed(run.abort(reason(error, plan.out), error)) from error
    except Exception as error:
        print(run.abort("this is a mistake in tropism or in what it calls", error))
        raise
    finally:
        run.progress.close()
        leave()


class Run:
    """The state of a run between its steps."""

    def __init__(self, plan: Plan, bench: Bench) -> None:
        self.plan, self.bench, self.settings, self.out = plan, bench, plan.settings, plan.out
        self.method = bench.method if bench.ema is None else Averaged(bench.method, bench.ema)
        self.evaluator, self.best = bench.evaluator, Best(bench.best_by)
        self.lines, self.rows = Lines(self.out / "metrics.jsonl"), list[dict[str, Any]]()
        self.progress = Progress(self.settings.steps)
        self.at = self.finished = self.flat = self.images = self.rollbacks = 0  # at: the last step done or skipped
        self.health = HealthCheck(plan.settings)
        self.started = time.perf_counter()
        self.stop_asked: Callable[[], bool] = lambda: False
        self.first = plan.processes.first  # the process that writes
        self._accelerator: Accelerator | None = None
        self._new_folders: list[Path] = []

    def begin(self) -> None:
        """The first evaluation, then the folder. Raises BadInput, without a folder, when a reward fails there."""
        kept = None if self.plan.resume is None else self._load(self.plan.resume)
        with as_bad_input(RewardError, Unhealthy), nullcontext() if kept is None else self.bench.model.reference():
            self.before = self.after = self.evaluator.look(moved=False)
        self.best.value = metrics_row(self.before, None)[self.best.by]
        self.started = time.perf_counter()
        if self.first:
            self._make_folder(kept is None)
        if kept is not None:
            self._go_on(kept)
            return
        self._record({"step": 0, **self._eval_row()})
        self._report()
        if self.settings.on_trouble == "rollback":
            self._checkpoint()

    def _make_folder(self, new: bool) -> None:
        if new:
            self._new_folders = [path for path in (self.out, *self.out.parents) if not path.exists()]
            self.out.mkdir(parents=True, exist_ok=True)
        save_config(self.out / "config.yaml", self.plan.method, self.settings, self.plan.method_settings)
        if self.plan.trackers:
            self._accelerator = Accelerator(
                cpu=self.plan.device.type == "cpu",
                log_with=list(self.plan.trackers),
                project_config=ProjectConfiguration(project_dir=str(self.out), logging_dir=str(self.out / "trackers")),
            )
            start_trackers(self._accelerator, asdict(self.settings) | asdict(self.plan.method_settings))

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        """Everything back as it was; what the checkpoint says of its run. Raises BadInput."""
        bench = self.bench
        with as_bad_input(ValueError, OSError):
            kept = load_checkpoint(checkpoint, bench.model, bench.optimizer, bench.method, bench.ema)
        if kept["prompts"] != fingerprint(self.plan.prompts):
            raise BadInput(f"the prompts ({self.settings.prompts}) are not those that {self.out} was trained on")
        if kept["step"] >= self.settings.steps:
            raise BadInput(
                f"steps is {self.settings.steps}; wanted more than the {kept['step']} that {self.out} has made"
            )
        return kept

    def _go_on(self, kept: Mapping[str, Any]) -> None:
        """What was counted and written up to the checkpoint, by a run that has ended."""
        self._restore(kept)
        self.finished = self.progress.first = self.at
        self.rollbacks = int(kept["rollbacks"])
        self.started -= float(kept["seconds"])
        if self.first:
            (self.out / "error.txt").unlink(missing_ok=True)
            tidy(self.out / "checkpoints", self.at)
        self.progress.say(f"going on after step {self.at} of {self.settings.steps}")

    def _restore(self, kept: Mapping[str, Any]) -> None:
        """What was counted and written up to the checkpoint."""
        self.at, self.images, self.flat = (int(kept[name]) for name in ("step", "images", "flat"))
        self.health.flat, self.best = int(kept["flat_groups"]), Best.from_state(kept["best"])
        self.rows = self.lines.keep(self.at) if self.first else []

    def learn(self) -> None:
        """Trains to the end, or until evaluations have not become better for too long."""
        try:
            self._learn()
        except EnoughSeen as enough:
            self.progress.say(str(enough))

    def _learn(self) -> None:
        """Goes on after a step without anything to learn from."""
        policy, settings = self.plan.method_settings, self.settings
        while self.at < settings.steps:
            prompts = batches(
                self.plan.prompts, policy.prompts_per_step, policy.images_per_prompt, settings.seed, self.at
            )
            try:
                train(
                    self.method,
                    prompts,
                    self.bench.optimizer,
                    steps=settings.steps,
                    first=self.at,
                    max_norm=policy.max_grad_norm,
                    hooks=[self._on_step],
                    processes=self.bench.processes,
                    rate=policy.rate,
                )
            except NothingToLearn as error:
                self._skip(error)
            except (NonFinite, Unhealthy) as error:
                self._roll_back(error)

    def _roll_back(self, error: Exception) -> None:
        """To the last checkpoint, with half the learning rate. Raises ``error`` where that is not wanted."""
        saved, optimizer = checkpoints(self.out / "checkpoints"), self.bench.optimizer
        policy = self.plan.method_settings
        if self.settings.on_trouble != "rollback" or not saved:
            raise error
        if self.rollbacks == ROLLBACKS:
            raise RunFailed(f"{one_line(error)}; {ROLLBACKS} times it went back and learnt more slowly") from error
        optimizer.zero_grad(set_to_none=True)
        kept = self._load(saved[-1])
        self.rollbacks += 1
        for group in optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"]) * 0.5 ** (self.rollbacks - kept["rollbacks"])
            group["lr"] = group["initial_lr"] * policy.rate(self.at + 1, self.settings.steps)
        self._restore(kept)
        rate = float(optimizer.param_groups[0]["lr"])
        self.progress.say(f"{one_line(error)}: going back to step {self.at}, with a learning rate of {rate:g}")
        self._record({"step": self.at, "rollbacks": float(self.rollbacks), "learning_rate": rate})

    def _on_step(self, step: Step) -> None:
        self.at, self.finished, self.images = step.step, self.finished + 1, self.images + step.images
        speed = step.images / max(step.seconds, 1e-9)
        metrics = {"images": self.images, "images_per_second": speed, **step.metrics, **self._watched()}
        std, rows = step.metrics.get("reward_std", math.nan), min(step.images, self.plan.method_settings.minibatch)
        self._check_flat(std == 0 and rows > 1, f"step {step.step}: every image got the same reward")
        self._after(metrics)
        self.progress.step(step.step, step.metrics, speed)

    def _watched(self) -> dict[str, float]:
        """What the processes saw of the step's pictures; their shares are equal, but for one row."""
        seen = self.bench.processes.every(self.bench.watched.taken())
        return {name: sum(each[name] for each in seen) / len(seen) for name in seen[0]}

    def _skip(self, error: NothingToLearn) -> None:
        self.at += 1
        self.bench.optimizer.zero_grad(set_to_none=True)
        self._check_flat(True, one_line(error))
        self._after({"skipped": 1.0})

    def _check_flat(self, flat: bool, said: str) -> None:
        """A warning the first time; RunFailed when it is no accident."""
        self.flat = self.flat + 1 if flat else 0
        if self.flat:
            self.progress.say(f"warning: {said}")
        if self.flat == FLAT_STEPS:
            raise RunFailed(
                f"reward '{self.bench.reward.name}' has told no image from another for {FLAT_STEPS} steps in a row, so "
                "there is nothing to learn from: it is at its limit, or does not see what differs"
            )

    def _after(self, metrics: Mapping[str, float]) -> None:
        """Evaluates where that is due, writes the step down, saves where that is due."""
        row = {"step": self.at, "seconds": round(time.perf_counter() - self.started, 3), **metrics}
        every, last, better = self.settings.eval_every, self.at == self.settings.steps, False
        evaluating = last or bool(every and self.at % every == 0)
        try:
            if evaluating:
                self.after = self._evaluate()
                row |= self._eval_row()
                better = self.best.see(self.at, row[self.best.by])
                row["best_step"] = float(self.best.step)
        finally:
            self._record(row)
        self._check_health(row)
        stopping, saves = self.bench.processes.any(self.stop_asked()) and not last, self.settings.save_every
        if better and saves:
            self._checkpoint(BEST)
        if stopping or (saves and (last or self.at % saves == 0)):
            self._checkpoint()
        if stopping:
            raise Interrupted("stopped when asked to")
        if evaluating and not last:
            self._report()
            self.best.check(self.settings.patience, self.at)

    def _check_health(self, row: Mapping[str, float]) -> None:
        """Before a checkpoint, so that the last one is always of a run that was well."""
        try:
            self.health.check(row)
        except Unhealthy as error:
            if self.settings.on_trouble != "warn":
                raise
            self.progress.say(f"warning: {one_line(error)}")

    def _checkpoint(self, name: str = "") -> None:
        if not self.first:
            return
        bench, seconds = self.bench, time.perf_counter() - self.started
        said: dict[str, Any] = {"images": self.images, "flat": self.flat, "seconds": seconds}
        said |= {"flat_groups": self.health.flat, "rollbacks": self.rollbacks, "best": self.best.state_dict()}
        said["prompts"] = fingerprint(self.plan.prompts)
        folder, parts = self.out / "checkpoints", (bench.model, bench.optimizer, bench.method, bench.ema)
        save_checkpoint(folder, self.at, *parts, said, name, self.settings.save_total_limit)

    def _record(self, row: dict[str, Any]) -> None:
        if not self.first:
            return
        self.lines.append(row)
        self.rows.append(row)
        if self._accelerator is not None:
            self._accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        if "eval_reward" in row:
            seen, step = self.after.evaluation, f"step-{self.at:06}.png"
            notes = [f"reward {pictures.number(value)}" for value in seen.total[:SHOWN].tolist()]
            title = f"step {self.at}: mean reward {row['eval_reward']:.3f}"
            sheet = pictures.grid(seen.images[:SHOWN], seen.text[:SHOWN], notes, title)
            pictures.save(sheet, self.out / "samples" / step)
            pictures.keep_strip(self.out / "strips", step, seen.images, seen.text)

    def _evaluate(self) -> Sight:
        with self._averaged():
            return self.evaluator.look()

    def _eval_row(self) -> dict[str, float]:
        row = metrics_row(self.before, self.after if self.at else None)
        self.progress.evaluated = row["eval_reward"]
        return row

    def _averaged(self) -> Any:
        return nullcontext() if self.bench.ema is None else self.bench.ema.swapped()

    def finish(self) -> Outcome:
        """Saves the adapter, the pictures and the model card."""
        seconds = time.perf_counter() - self.started
        ends = ends_of(self.evaluator.before, self.evaluator.policy)
        outcome = Outcome(self.out, self.before.evaluation, self.after.evaluation, seconds, self.images, self.at, ends)
        if not self.first:
            return outcome
        self._save_adapter()
        self._save_curve()
        sheet = compared(outcome, self.bench.reward.name, f"{self.plan.method}, {self.at} steps")
        pictures.save(sheet, self.out / "before_after.png")
        (self.out / "README.md").write_text(card.render(self.plan, self.bench.model, outcome), encoding="utf-8")
        self._report()
        if self._accelerator is not None:
            self._accelerator.end_training()
        return outcome

    def _save_adapter(self) -> Path:
        with self._averaged():
            return self.bench.model.save_adapter(self.out / "adapter")

    def _save_curve(self) -> None:
        figure = pictures.curve(self.rows, f"{self.plan.method} on {self.settings.model}", self.bench.reward.name)
        pictures.save(figure, self.out / "curve.png")

    def _report(self) -> None:
        """The page is never a reason to stop."""
        if not self.first:
            return
        with suppress(BadInput, OSError):
            write_report(self.out)

    def abort(self, why: str, error: BaseException) -> str:
        """Saves what can be saved, or removes the folder of a run that finished no step; returns the whole sentence."""
        if not self.first:
            return f"process {self.plan.processes.index}: {why}"
        if not self.finished:
            self._remove_folder()
            return f"{why}; no step had finished, so nothing is kept"
        with suppress(OSError):
            trace = "".join(traceback.format_exception(error))
            (self.out / "error.txt").write_text(trace, encoding="utf-8")
        with suppress(OSError, SafetensorError):
            if all(bool(torch.isfinite(parameter).all()) for parameter in self.bench.model.parameters()):
                self._save_adapter()
            self._save_curve()
        self._report()
        places = (*checkpoints(self.out / "checkpoints")[-1:], self.out / "adapter")
        kept = [path for path in places if any(path.rglob("*.safetensors"))]
        saved = f"; the weights are in {' and '.join(map(str, kept))}" if kept else "; no weights could be saved"
        if checkpoints(self.out / "checkpoints"):
            saved += f"; go on with tropism train {self.plan.method} --resume {self.out}"
        return f"{why}, after {self.at} of {self.settings.steps} steps{saved}; the metrics are in {self.lines.file}"

    def _remove_folder(self) -> None:
        for path in self._new_folders:
            with suppress(OSError):
                shutil.rmtree(path) if path == self.out else path.rmdir()


class Averaged:
    """A method whose every update also moves an average of the weights."""

    def __init__(self, method: Any, ema: Ema) -> None:
        self.experience, self.loss, self._method, self._ema = method.experience, method.loss, method, ema

    def after_step(self) -> None:
        """The method's own, then the average."""
        self._method.after_step()
        self._ema.update()
