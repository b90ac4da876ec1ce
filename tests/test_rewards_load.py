"""Eight clients, 2,000 pictures, a server that is killed twice: every picture gets its own score."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "reward_load.py"


def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module; its servers find the package."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    found = importlib.util.spec_from_file_location("reward_load", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "reward_load", module)
    found.loader.exec_module(module)
    return module


def test_no_score_is_lost_or_another_pictures_when_the_server_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = script(monkeypatch).load(images=2000, clients=8, kills=2)
    assert (result.images, result.kills, result.lost, result.wrong) == (2000, 2, 0, 0)
    assert result.broken >= 2, "the kills came while clients were asking"
