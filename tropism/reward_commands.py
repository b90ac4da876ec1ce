"""What ``tropism reward test`` and ``tropism reward serve`` do, given settings that have been read.

``serve`` runs in an environment without diffusers, transformers, accelerate or OpenCV: nothing here imports them, but
for what a reward of the package needs itself, and the samples of ``test``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tropism import catalog
from tropism.config import BadInput, RunFailed
from tropism.plan import as_bad_input, check_device
from tropism.reward_settings import RewardServeSettings, RewardTestSettings
from tropism.rewards import RewardError
from tropism.rewards.trial import table, try_out
from tropism.rewards.wire import TOKEN, TOKEN_WANTED, Limits, is_token

if TYPE_CHECKING:
    from tropism.base import Reward
    from tropism.catalog import RewardSpec


def run_test(settings: RewardTestSettings) -> None:
    """Prints a table for each reward. Raises RunFailed when a row of one says fail."""
    settings.check()
    specs = catalog.check_rewards(settings.reward)
    prompts = None if settings.prompts is None else catalog.read_prompt_set(settings.prompts)
    device = check_device(settings)
    images, text = catalog.sample_pictures(settings.images, settings.size, settings.seed)
    columns: Mapping[str, Any] = {}
    if prompts is not None:
        batch = prompts.batch([row % len(prompts) for row in range(len(images))], 1)
        text, columns = list(batch.text), batch.columns
    failed = []
    for spec in specs:
        reward = _built(spec, settings.model, device)
        rows = try_out(reward, images.to(device), text, columns)
        failed += [f"{row.check} of {spec.text}" for row in rows if row.verdict == "fail"]
        print(f"{spec.text} on {len(images)} pictures, {device}:\n{table(rows)}\n")
    if failed:
        raise RunFailed(f"{len(failed)} checks failed: {', '.join(failed)}; the table says what to do")


def _built(spec: RewardSpec, model: str, device: torch.device) -> Reward:
    with as_bad_input(RewardError, OSError, ImportError):
        return catalog.build_reward(spec, model, device)


def run_serve(settings: RewardServeSettings) -> None:
    """Listens until it is stopped."""
    settings.check()
    token = read_token(settings.token_file, os.environ)
    settings.check_reach(token)
    try:
        import uvicorn

        from tropism.rewards.serving import Desk, make_app
    except ImportError as error:
        raise BadInput(f"serving needs FastAPI and uvicorn ({error}); pip install 'tropism[serve]'") from error
    (spec,) = catalog.check_rewards(settings.reward)
    door = _door(settings.host, settings.port)
    device = check_device(settings)
    reward = _built(spec, settings.model, device)
    version = catalog.reward_version(spec, reward, settings.model)
    limits = Limits(settings.max_megabytes * 2**20, settings.max_images, settings.max_pixels)
    desk = Desk(reward, version, limits=limits, device=device, parallel=settings.parallel)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{door.getsockname()[1]}"
    lock = "a token is wanted" if token else "no token is wanted"
    print(f"reward {reward.name} (version {version}) on {device}, {lock}; call it remote:{url}", flush=True)
    server = uvicorn.Server(uvicorn.Config(make_app(desk, token), log_level="warning", access_log=False))
    with suppress(KeyboardInterrupt), door:
        server.run(sockets=[door])


def read_token(file: str | None, environment: Mapping[str, str]) -> str | None:
    """The token, from the file or the environment; None where there is neither. Raises BadInput for no token."""
    where, found = f"the token in {file}", environment.get(TOKEN)
    if file is None:
        where = TOKEN
    else:
        with as_bad_input(OSError, UnicodeDecodeError, prefix=f"token_file is {file}: "):
            found = Path(file).expanduser().read_text(encoding="utf-8")
    if found is None:
        return None
    token = found.strip()
    if not is_token(token):
        raise BadInput(f"{where} is empty, or has spaces or other characters; {TOKEN_WANTED}")
    return token


def _door(host: str, port: int) -> socket.socket:
    """A socket that is listening: from here on callers wait instead of being turned away. Raises BadInput."""
    try:
        door = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Callers inherit it. Without, each reply waits 40 ms for an acknowledgement: asyncio sets it only on sockets
        # that were made with the protocol's number, which create_server does not give.
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return door
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]
        raise BadInput(f"host is {host} and port {port}, which cannot be used ({why})") from error
