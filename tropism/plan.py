"""From settings to a run that can begin: all is checked before anything loads, then all is loaded and tried once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tropism import catalog
from tropism.catalog import RewardSpec
from tropism.config import BadInput, DeviceSettings, PlaceSettings, TrainSettings, one_line, require, suggest
from tropism.data.prompts import PromptSet
from tropism.distillation import Before
from tropism.evaluate import deterministic, first_images
from tropism.health import Watched
from tropism.log import check_trackers
from tropism.processes import ALONE, Processes, join
from tropism.resume import check_same, find_run
from tropism.rewards import Elsewhere, RewardError, ScoredReward, Weighted, check_scores
from tropism.sharding import shard
from tropism.watching import PROMPTS, REPEATS, TAKEN, Evaluator

if TYPE_CHECKING:
    from tropism.base import Prompts, Reward
    from tropism.ema import Ema
    from tropism.models.trainable import Trainable

T = TypeVar("T")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """A checked run. ``settings`` say which rewards and prompts are used even where the user left that open."""

    method: str
    settings: TrainSettings
    method_settings: Any
    rewards: Sequence[RewardSpec]
    held_out: Sequence[RewardSpec]  # evaluated, never trained on
    prompts: PromptSet
    eval_prompts: PromptSet
    device: torch.device
    reward_device: torch.device
    trackers: Sequence[str]
    out: Path
    resume: Path | None = None  # the checkpoint to go on from
    processes: Processes = ALONE


@dataclass(frozen=True)
class Bench:
    """What a run works with, loaded."""

    model: Trainable
    reward: Weighted  # trained on
    method: Any
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    watched: Watched  # the reward as the method has it
    processes: Processes
    evaluator: Evaluator  # knows the held-out rewards as well
    best_by: str  # entry of the evaluation's metrics that says which is best
    build: Callable[..., Any]  # (method's settings, reward, generator) -> another method on the same model


# Checks; nothing is loaded.


def make_plan(method: str, settings: TrainSettings, method_settings: Any) -> Plan:
    """Raises BadInput for whatever can be known to be wrong before anything is loaded."""
    settings.check()
    with as_bad_input(ValueError):
        method_settings.check()
    if hasattr(method_settings, "prepare") and settings.full:
        raise BadInput(f"full is given, and {method} says itself which weights are trained; leave it out")
    rewards = given(settings.reward or catalog.own_rewards(settings.model), "reward", settings.model)
    prompts = given(settings.prompts or catalog.own_prompts(settings.model, held_out=False), "prompts", settings.model)
    held_out = settings.eval_prompts or catalog.own_prompts(settings.model, held_out=True) or prompts
    specs = catalog.check_rewards(rewards)
    held = catalog.check_held_out(settings.eval_reward, rewards, settings.model)
    best_by = check_best_by(settings.best_by, specs, held)
    catalog.check_model(settings.model)
    trackers = check_trackers(settings.report_to)
    check_launch(settings, method_settings, int(os.environ.get("WORLD_SIZE", "1")))
    device = check_device(settings)
    processes = join(cpu=device.type == "cpu")
    settings = replace(settings, reward=list(rewards), prompts=prompts, eval_prompts=held_out, best_by=best_by)
    settings = replace(settings, eval_reward=[spec.text for spec in held])
    out, checkpoint = _places(method, settings, method_settings)
    return Plan(
        method=method,
        settings=settings,
        method_settings=method_settings,
        rewards=specs,
        held_out=held,
        prompts=catalog.read_prompt_set(prompts),
        eval_prompts=catalog.read_prompt_set(held_out, "eval_prompts"),
        device=device,
        reward_device=usable(settings.reward_device, "reward_device") if settings.reward_device else device,
        trackers=trackers,
        out=out,
        resume=checkpoint,
        processes=processes,
    )


def check_launch(settings: TrainSettings, method_settings: Any, count: int) -> None:
    """Raises BadInput for what ``count`` processes cannot do, or not yet."""
    if count == 1:
        require(not settings.shard, "shard", settings.shard, "several processes; start them with a launcher")
        return
    images = method_settings.prompts_per_step * method_settings.images_per_prompt
    for name, value in {"prompts_per_step x images_per_prompt": images, "eval_images": settings.eval_images}.items():
        require(value >= count, name, value, f"at least {count}: an image for each process")
        require(
            not settings.shard or value % count == 0, name, value, f"a multiple of {count} with shard: equal shares"
        )
    if settings.shard and settings.full:
        raise BadInput("shard splits frozen weights and full trains all of them; leave one out")
    if settings.on_trouble == "rollback":
        raise BadInput(f"on_trouble is rollback, which one process can do, not {count}; wanted stop or warn")
    if settings.device and ":" in settings.device:
        raise BadInput(f"device is {settings.device}; wanted cpu or cuda: each of {count} processes has its own")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise BadInput(f"the launcher asks for {name}; wanted plain data parallelism, and shard to split weights")


def check_best_by(name: str | None, trained: Sequence[RewardSpec], held_out: Sequence[RewardSpec]) -> str:
    """The reward that says which evaluation is best; those of weight 0 are held out as well. Raises BadInput."""
    if taken := TAKEN & {spec.name for spec in (*trained, *held_out)}:
        raise BadInput(f"a reward is called {min(taken)}, as an entry of the metrics is; wanted another name")
    watched = [spec.name for spec in held_out] + [spec.name for spec in trained if not spec.weight]
    known = ["reward", *watched, *(spec.name for spec in trained if spec.weight)]
    if name is not None and name not in known:
        raise BadInput(f"best_by is {name}, which is not evaluated; {suggest(name, known)}")
    return name or (watched or known)[0]


def _places(method: str, settings: TrainSettings, method_settings: Any) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint to go on from). Raises BadInput."""
    if settings.resume is None:
        return check_out(settings.out, f"{method}-{Path(settings.model).name.replace(':', '-')}"), None
    run, checkpoint = find_run(settings.resume, method)
    if settings.out is not None and Path(settings.out).expanduser().resolve() != run.resolve():
        raise BadInput(f"out is {settings.out}, but a run goes on in its own folder, {run}; leave out out")
    check_same(run, method, settings, method_settings)
    check_writable(run)
    return run, checkpoint


def given(value: T | None, name: str, model: str) -> T:
    """The value. Raises BadInput where there is none."""
    if not value:
        raise BadInput(f"{name} is not given, and the model {model} has none of its own; give --{name}")
    return value


def check_device(settings: PlaceSettings) -> torch.device:
    """The device to use; also sets the number of threads. Raises BadInput for one that is not there."""
    device = usable(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"), "device")
    if device.type == "cpu" and getattr(settings, "mixed_precision", "no") == "fp16":
        raise BadInput("mixed_precision is fp16; wanted no or bf16 on a processor: fp16 is for GPUs")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return device


def usable(name: str, field: str) -> torch.device:
    """The device of that name. Raises BadInput for one that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"{field} is {name}, which torch cannot use here; wanted cpu, or a GPU such as cuda") from error
    return device


def check_out(out: str | None, usual: str) -> Path:
    """A folder to be made: the one named, or runs/<usual>-<number>. Raises BadInput where files would be mixed."""
    folder = Path(out).expanduser() if out else next_folder(Path("runs"), usual)
    if folder.is_dir() and any(folder.iterdir()):
        what = "a run" if (folder / "metrics.jsonl").exists() else "files"
        raise BadInput(f"out is {folder}, which holds {what} already; wanted a new or empty folder")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out is {folder}, which is a file; wanted a new or empty folder")
    check_writable(folder)
    return folder


def check_writable(path: Path) -> None:
    """Raises BadInput unless something can be written at, or above, a path; nothing is left behind."""
    home = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    if any(place.is_file() for place in path.absolute().parents):
        raise BadInput(f"out is {path}, which lies below a file; wanted a place in a folder")
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise BadInput(f"out is {path}, but {home} cannot be written to ({error.strerror})") from error


def next_folder(parent: Path, usual: str) -> Path:
    """parent/usual-1, or the next number that is not taken."""
    number = 1
    while (parent / f"{usual}-{number}").exists():
        number += 1
    return parent / f"{usual}-{number}"


@contextmanager
def as_bad_input(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Inside, these exceptions become BadInput, their first line the sentence."""
    try:
        yield
    except BadInput:
        raise
    except kinds as error:
        raise BadInput(prefix + one_line(error)) from error


def adapter_folder(name: str, setting: str = "adapter") -> Path:
    """The folder with the weights: of a run, the one inside. Raises BadInput, which names the setting."""
    folder = Path(name).expanduser()
    folder = folder.parent if folder.is_file() else folder
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not folder.is_dir():
        raise BadInput(f"{setting} is {name}, but there is no such folder; wanted a run, its adapter, or a checkpoint")
    if (folder / "model_index.json").is_file():
        raise BadInput(f"{setting} is {name}, which is a whole pipeline; give it as model")
    return folder


# Loading, and one try.


def load(name: str, settings: DeviceSettings, device: torch.device) -> Trainable:
    """The model of that name. Raises BadInput when it cannot be loaded."""
    with as_bad_input(ValueError, OSError, ImportError):
        model = catalog.load_model(name, DTYPES[settings.mixed_precision], device, settings.image_size)
        if settings.vae_slicing:
            model.enable_vae_slicing()
        return model


def set_up(plan: Plan) -> Bench:
    """Loads the model and the rewards, and tries the rewards and one move of the chain. Raises BadInput."""
    settings = plan.settings
    model = load(settings.model, settings, plan.device)
    with as_bad_input(ValueError, OSError):
        if hasattr(plan.method_settings, "prepare"):
            plan.method_settings.prepare(model)
        elif settings.full:
            model.train_full()
        else:
            generator = torch.Generator().manual_seed(settings.seed)
            model.add_lora(settings.lora_rank, settings.lora_alpha, settings.lora_targets, generator=generator)
        if settings.start_from is not None:
            model.load_adapter(adapter_folder(settings.start_from, "start_from"))
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if settings.shard:
            shard(model.bare_network(), model.parameters(), plan.processes)
        if settings.drop_text_encoders:
            model.drop_text_encoders([*plan.prompts.text, *plan.eval_prompts.text])
    specs = [*plan.rewards, *plan.held_out]
    judged = build_rewards(specs, settings.model, model, plan.prompts, plan.reward_device, settings.reward_cache)
    names = {spec.name: each.name for spec, (each, _) in zip(specs, judged.rewards, strict=True)}
    reward = Weighted(judged.rewards[: len(plan.rewards)], name=judged.name)
    watched = Watched(reward)

    def build(own: Any, reward: Reward, generator: torch.Generator) -> Any:
        return own.build(model, reward, generator, **_pictures(plan, model))

    with as_bad_input(ValueError, TypeError):
        method = build(plan.method_settings, watched, torch.Generator().manual_seed(settings.seed + 1))
    with as_bad_input(ValueError, TypeError, prefix=f"{plan.method} does not suit the model {settings.model}: "):
        _try_one_move(method, plan.prompts.text[0])
    for name in ("policy", "teacher"):
        if hasattr(method, name):
            setattr(method, name, getattr(method, name).with_(processes=plan.processes))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.method_settings.learning_rate, weight_decay=plan.method_settings.weight_decay
    )
    best_by = names.get(str(settings.best_by), str(settings.best_by))
    ema, evaluator = _ema(model, settings.ema), _evaluator(plan, model, method, judged)
    trained = method.policy.model if distils(plan.method_settings) else model
    best_by = f"eval_{best_by}"
    return Bench(trained, reward, method, optimizer, ema, watched, plan.processes, evaluator, best_by, build)


def _pictures(plan: Plan, model: Trainable) -> dict[str, Any]:
    """What a method that learns from pictures, or from pairs of them, is given besides; the first are tried. Raises
    ValueError where there are none, and for those that do not fit the model."""
    sources = {"pictures": catalog.pictures, "pairs": catalog.pairs}
    name, settings = str(plan.settings.prompts), plan.method_settings
    wanted = [each for each in sources if getattr(settings, f"needs_{each}", False)]
    found = {each: sources[each](name, plan.prompts) for each in wanted}
    for source in found.values():
        shown = source(plan.prompts.batch([0], 1), torch.Generator().manual_seed(0))
        model.latents(shown.reshape(-1, *shown.shape[-3:]))
    return found


def distils(method_settings: Any) -> bool:
    """Whether the method makes a model for few steps; then what it began with is the teacher."""
    return bool(getattr(method_settings, "distils", False))


def _evaluator(plan: Plan, model: Trainable, method: Any, judged: Weighted) -> Evaluator:
    settings, rows = plan.settings, plan.eval_prompts
    policy = deterministic(model, model.steps, None, plan.method_settings.sample_batch)
    before = policy = policy.with_(processes=plan.processes)
    if distils(plan.method_settings):
        policy, before = method.policy, policy.with_(model=Before(model))
    few = first_images(rows, PROMPTS, REPEATS)
    return Evaluator(policy, judged, first_images(rows, settings.eval_images), few, settings.eval_seed, before)


def build_rewards(
    specs: Sequence[RewardSpec],
    name: str,
    model: Trainable,
    prompts: PromptSet,
    device: torch.device,
    cache: str | None = None,
) -> Weighted:
    """The weighted sum, after each reward has scored two pictures of noise; scores are kept in ``cache``. Raises
    BadInput."""
    with as_bad_input(RewardError, OSError, ImportError):
        rewards = [catalog.build_reward(spec, name, device) for spec in specs]
        with torch.no_grad():
            shape = model.decode(torch.zeros(1, *model.latent_shape, device=model.device)).shape[1:]
        noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        pair = prompts.batch([0, 1 % len(prompts)], 1)
        tried = [try_reward(reward, noise, pair) for reward in rewards]
        if cache is not None:
            tried = [catalog.cached(reward, spec, name, cache) for reward, spec in zip(tried, specs, strict=True)]
        tried = tried if device == model.device else [Elsewhere(reward, device) for reward in tried]
        weighted = [(reward, spec.weight) for reward, spec in zip(tried, specs, strict=True)]
        counted = [each.name if weight == 1 else f"{weight:g} {each.name}" for each, weight in weighted if weight]
        return Weighted(weighted, name=" + ".join(counted))


def try_reward(reward: Reward, noise: torch.Tensor, pair: Prompts) -> Reward:
    """The reward, after it has scored two pictures; of a user's function it is found out whether it has a gradient."""
    values = check_scores(reward(noise, pair.text, **pair.columns), len(noise), f"reward '{reward.name}'")
    if not isinstance(reward, ScoredReward):
        return reward
    if bool(values[0] == values[1]):
        print(
            f"note: reward '{reward.name}' gives two different pictures of noise the same score, {float(values[0]):g}"
        )
    try:
        return reward.probed(noise, pair.text, **pair.columns)
    except RewardError:  # it takes pictures, but not ones that ask for a gradient
        return reward


@torch.no_grad()
def _try_one_move(method: Any, prompt: str) -> None:
    """Kernels say at their first move that a model is not of their kind."""
    policy, generator = getattr(method, "policy", None), torch.Generator().manual_seed(0)
    if policy is not None:
        next(iter(policy.chain(policy.noise(1, generator), policy.model.encode([prompt]), generator)))


def _ema(model: Trainable, decay: float) -> Ema | None:
    from tropism.ema import Ema

    return Ema(model.parameters(), decay) if decay else None
