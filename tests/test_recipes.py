"""Every recipe is read and checked as ``tropism train METHOD --config FILE`` reads it, and every method has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from small_run import CLIPS, OWN_NETWORK, TOKENS, WITH_MEAN

from tropism import catalog
from tropism.cli import _train_settings
from tropism.plan import make_plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def method_of(file: Path) -> str:
    """As its first line says."""
    words = file.read_text(encoding="utf-8").split("\n")[0].split()
    assert words[:2] == ["#", "tropism"] and words[4:] == ["--config", f"recipes/{file.name}"]
    assert words[2] == ("distill" if words[3] in catalog.distilling() else "train")
    return words[3]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_can_begin(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = _train_settings(method_of(file), ["--config", str(file)], "train")
    assert found is not None
    plan = make_plan(*found)
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert plan.settings.steps == given["steps"]


def test_every_method_has_a_recipe() -> None:
    wanted = set(catalog.method_names()) - OWN_NETWORK | WITH_MEAN | CLIPS | TOKENS
    assert {method_of(file) for file in RECIPES} == wanted
