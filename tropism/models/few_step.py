"""How plain diffusers is told that a model is made for few steps: its scheduler, as lines of Python."""

from __future__ import annotations

import inspect
from typing import Any


def scheduler_lines(scheduler: Any) -> tuple[list[str], list[str]]:
    """(imports, assignments to ``pipe``) that give a pipeline a scheduler like this one."""
    name = type(scheduler).__name__
    usual = inspect.signature(type(scheduler).__init__).parameters
    config = {key: scheduler.config[key] for key in usual if key in scheduler.config}
    told = ", ".join(f"{key}={value!r}" for key, value in config.items() if value != usual[key].default)
    return [f"from diffusers import {name}"], [f"pipe.scheduler = {name}({told})"]
