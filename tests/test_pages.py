"""Reports and comparisons: whole, self-contained, right about what they say, and unmoved by whatever a run contains."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import said, small_place, train_words

from tropism import pictures
from tropism.config import BadInput
from tropism.pages.charts import Series, chart
from tropism.pages.compare_page import different, labels, notes
from tropism.pages.facts import SHEET, read_run
from tropism.pages.run_page import write_report
from tropism.pages.verdict import judge

SECTIONS = ("verdict", "rewards", "curves", "frontier", "statistics", "pictures", "timings", "settings")
HOSTILE = '<script>alert("x")</script> & ünïcödé 猫 {{ 7 * 7 }}'


def row(step: int, gain: float | None = None, held: float = 0.0, **more: Any) -> dict[str, Any]:
    """An evaluation; gains have intervals of 0.05 to either side."""
    found: dict[str, Any] = {
        "step": step,
        "seconds": step * 2.0,
        "eval_seconds": 1.0,
        "eval_diversity": 0.2,
        "eval_kl": 3.0 * step,
    }
    found |= {"eval_reward": 1.0 + (gain or 0), "eval_reward_low": 0.9, "eval_reward_high": 1.9}
    found |= {
        "eval_sharp": 1.0 + (gain or 0),
        "eval_scenes": 0.8 + held,
        "eval_colour_entropy": 2.0,
        "eval_brightness": 0.5,
    }
    if step == 0:
        return found | {"eval_sharp_weight": 1.0, "eval_scenes_weight": 0.0} | more
    found |= {"images": 8 * step, "images_per_second": 4.0, "reward_mean": 1.0, "best_step": 0.0}
    for key, value in (("eval_", gain), ("eval_sharp_", gain), ("eval_scenes_", held)):
        for name, shift in (("gain", 0.0), ("gain_low", -0.05), ("gain_high", 0.05)):
            found[key + name] = None if value is None else value + shift
        found |= {f"{key}win_rate": 0.75, f"{key}win_rate_low": 0.6, f"{key}win_rate_high": 0.9}
    return found | {"eval_brightness_shift": 0.1} | more


def a_run(folder: Path, rows: list[Any], prompts: list[str] | None = None, **settings: Any) -> Path:
    """A folder as runs leave it."""
    folder.mkdir(parents=True)
    config = {
        "method": "ddpo", "model": "scenes", "reward": ["sharp"], "eval_images": 64, "steps": 100, "best_by": "scenes",
        "eval_prompts": "scenes-held-out", "learning_rate": 3e-4, **settings,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    for each in rows if prompts else ():
        name = f"step-{each['step']:06}.png"
        pictures.keep_strip(folder / "strips", name, torch.rand(3, 3, 8, 8), prompts or [])
    return folder


def page_of(run: Path) -> str:
    text = write_report(run).read_text(encoding="utf-8")
    assert_alone(text)
    for name in SECTIONS:
        assert text.count(f'id="{name}"') == 1, name
    return text


class Seen(HTMLParser):
    """The tags and addresses of a page, read as a browser does."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.addresses = set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"):
                self.addresses.append(value or "")


def assert_alone(text: str) -> None:
    """Nothing is fetched: no address but those that hold their data, no script, no import."""
    seen = Seen()
    seen.feed(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def words(text: str) -> str:
    """What is read."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a tiny model, one with a prompt that would break a page."""
    folder = small_place(tiny_sd, tmp_path_factory.mktemp("pages"))
    (folder / "prompts.txt").write_text(f"{HOSTILE}\na red fox\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from tropism.cli import main

        assert main(train_words(eval_reward=["contrast", "saturation"], out="runs/one", steps="2")) == 0
        assert main(train_words(eval_reward="contrast", out="runs/two", steps="1", seed="3", learning_rate="2e-3")) == 0
    return folder


def test_a_run_writes_its_own_report(finished: Path) -> None:
    file = finished / "runs/one/report.html"
    text = file.read_text(encoding="utf-8")
    assert text == page_of(finished / "runs/one")
    assert "<script>" not in text and html.escape("<script>alert(") in text
    said_ = words(text)
    assert HOSTILE in said_
    for part in (
        "held out: contrast", "KL to the untrained model", "reward against KL", "colour entropy, ", "grid energy, ",
        "step 0", "brightness trained on, weight 1", "saturation held out", "step 2", "learning_rate 0.001",
    ):  # fmt: skip
        assert part in said_, part
    assert text.count("data:image/png;base64,") == 3
    assert file.stat().st_size < 200_000
    assert not list(file.parent.glob(".saving-*"))


def test_settings_other_than_the_defaults_come_first(finished: Path) -> None:
    settings = read_run(finished / "runs/two").settings
    changed = [name for name, _, other in settings if other]
    assert changed == [name for name, _, _ in settings[: len(changed)]]
    assert {"seed", "learning_rate", "eval_reward", "steps"} <= set(changed)
    assert not {"weight_decay", "eval_seed", "patience"} & set(changed)


def test_the_command_writes_it_again(
    finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(finished)
    result = said(["report", "runs/one", "--out", str(tmp_path / "new" / "page.html")], capsys)
    assert result.code == 0, result
    verdict = judge(read_run("runs/one"))
    assert result.out.splitlines()[0] == verdict.line
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == Path("runs/one/report.html").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report"], "report wants the folder of a run"),
        (["report", "nowhere"], "nowhere is no run: it lacks config.yaml or metrics.jsonl"),
        (["report", "runs/one", "--out", "page.txt"], "out is page.txt; wanted an .html file"),
        (["report", "runs/one", "--out", "prompts.txt/page.html"], "cannot be written"),
        (["report", "runs/one", "runs/two"], "run is 'runs/one runs/two'; wanted"),
        (["compare", "runs/one"], "compare wants the folders of two runs or more"),
        (["compare", "runs/one", "nowhere"], "nowhere is no run"),
    ],
)
def test_wrong_words_are_one_sentence(
    arguments: list[str], sentence: str, finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    before = sorted(Path().rglob("*"))
    result = said(arguments, capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


# Verdicts.


def test_a_hacked_run_is_flagged_from_the_step_where_the_rewards_part(tmp_path: Path) -> None:
    rows = [row(0), row(10, 0.2, 0.0), row(20, 0.4, -0.1), row(30, 0.6, -0.3)]
    verdict = judge(read_run(a_run(tmp_path / "run", rows)))
    assert verdict.tone == "warn"
    assert verdict.line.startswith(
        "Better by the reward that it was trained on (+0.6, +0.55 to +0.65); worse by the held-out"
    )
    (warning,) = verdict.warnings
    assert "held-out scenes fell (-0.3, -0.35 to -0.25), since step 20" in warning


@pytest.mark.parametrize(
    ("last", "tone", "warnings"),
    [
        (row(10, 0.2, 0.1), "good", []),
        (row(10, 0.01, -0.01), "unsure", []),
        (row(10, -0.2, 0.1), "bad", []),
        (row(10, 0.01, -0.3), "unsure", []),  # the trained reward did not rise, so that it was not hacked
        (row(10, 0.2, 0.1, eval_diversity=0.15), "good", []),
        (row(10, 0.2, 0.1, eval_diversity=0.13), "warn", ["Diversity within a prompt fell by 35%, from 0.2 to 0.13."]),
        (row(10, 0.2, 0.1, eval_colour_entropy=1.0), "warn", ["Colour entropy fell by 50%, from 2 to 1."]),
        (row(10, 0.2, 0.1, eval_brightness_shift=1.0), "good", []),
        (row(10, 0.2, 0.1, eval_brightness_shift=-1.2, eval_brightness=0.2), "warn",
         ["Brightness moved by -1.2 standard deviations, from 0.5 to 0.2."]),
        (row(10, 0.2, 0.1, eval_sharp_shift=9.0), "good", []),  # a statistic that is a reward is meant to move
        (row(10, None, 0.1), "unsure", []),
    ],
)  # fmt: skip
def test_rules(last: dict[str, Any], tone: str, warnings: list[str], tmp_path: Path) -> None:
    verdict = judge(read_run(a_run(tmp_path / "run", [row(0), last])))
    assert (verdict.tone, verdict.warnings) == (tone, warnings)


# Whatever a run contains.


def test_runs_without_evaluations_rows_or_pictures_have_a_page(tmp_path: Path) -> None:
    nothing = page_of(a_run(tmp_path / "nothing", []))
    assert "the model was evaluated not once" in nothing and "There is nothing to draw yet." in nothing
    steps = page_of(a_run(tmp_path / "steps", [{"step": 1, "reward_mean": 0.5, "seconds": 1.0}]))
    assert "There was no evaluation." in steps and "No pictures are kept." in steps
    one = a_run(tmp_path / "one", [row(0)], ["a fox"] * 3)
    assert "evaluated only before training" in page_of(one)
    (one / "strips/step-000000.png").unlink()
    (one / "strips/prompts.json").write_text("{")
    assert "No pictures are kept." in page_of(one)
    (one / "error.txt").write_text("Traceback\nRuntimeError: <b>gone</b>\n")
    assert "The run ended early: RuntimeError: &lt;b&gt;gone" in page_of(one)


def test_missing_numbers_leave_gaps(tmp_path: Path) -> None:
    holes = {name: None for name in row(10, 0.1) if name not in ("step", "eval_reward")} | {
        "step": 20,
        "eval_reward": None,
    }
    text = page_of(a_run(tmp_path / "run", [row(0), row(10, 0.1), holes, row(30, 0.3)]))
    assert "nan" not in text.lower().replace("finance", "") and "None" not in text
    assert page_of(a_run(tmp_path / "last", [row(0), row(10, 0.1), holes]))
    odd = row(10, 0.1, eval_kl="much", eval_reward=True, best_step=None, method=7, model=[1])
    assert page_of(a_run(tmp_path / "odd", [row(0), odd], method="of another time", model=None))


def test_a_hostile_run_is_only_text(tmp_path: Path) -> None:
    rows = [
        json.loads(json.dumps(each).replace("scenes", HOSTILE.replace('"', "'")))
        for each in (row(0), row(10, 0.2, -0.3))
    ]
    text = page_of(a_run(tmp_path / "<b>run", rows, [HOSTILE] * 3, model=HOSTILE, extra=[HOSTILE]))
    assert "<b>" not in text and words(text).count("猫") >= 8


@pytest.mark.parametrize(
    "line", ["{", "[1]", '"text"', '{"seconds": 1}', '{"step": "ten"}', '{"step": NaN}', "", "\x00"]
)
def test_malformed_metrics_are_one_sentence(line: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [row(0), line, row(10, 0.1)])
    with pytest.raises(BadInput, match=r"line 2 of .*metrics.jsonl is no row of metrics; wanted"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", [row(0), row(10, 0.1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "eval_re')
    assert [each["step"] for each in read_run(run).rows] == [0, 10]


def test_a_contact_sheet_is_bounded(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path / "run", [row(step, 0.1) for step in range(0, 300, 10)], ["a"] * 3))
    steps = [step for step, _ in run.strips]
    assert len(steps) == SHEET and steps[0] == 0 and steps[-1] == 290 and steps == sorted(set(steps))
    wide = pictures.strip(torch.rand(9, 3, 300, 200))
    assert wide.size == (6 * 64, 96)


def test_timings_add_up(tmp_path: Path) -> None:
    rows = [
        row(0),
        {"step": 1, "images": 8, "images_per_second": 4.0, "seconds": 2.5},
        row(2, 0.1, seconds=5.0, images=16),
    ]
    named = dict(read_run(a_run(tmp_path / "run", rows)).timings)
    assert list(named.values()) == [4.0, 1.0, 1.0, 6.0]  # two steps of two seconds, an evaluation, the rest, all


def test_charts_have_every_point_inside() -> None:
    drawn = chart(
        "x", [Series("a", [0, 5, 10], [-1.0, 0.0, 3.0], ([-2.0, -1, 2], [0.0, 1, 4])), Series("b", [5], [9.0])]
    )
    assert drawn is not None and drawn.zero is not None
    for line in drawn.lines:
        for x, y, _ in line.points:
            assert drawn.left <= x <= drawn.right and drawn.top <= y <= drawn.bottom
    assert [x for x, _, _ in drawn.lines[0].points] == [drawn.left, (drawn.left + drawn.right) / 2, drawn.right]
    assert len(drawn.lines[0].area.split()) == 6 and drawn.lines[0].points[2][2] == "step 10: 3"
    flat = chart("x", [Series("a", [1], [0.0])])
    assert flat is not None and flat.yticks and flat.xticks
    assert chart("x", [Series("a", [], [])]) is None
    steady = chart("x", [Series("a", [0, 1], [1.0, 1.01])], least=0.25)
    assert steady is not None
    (_, low, _), (_, high, _) = steady.lines[0].points
    assert (low - high) / (steady.bottom - steady.top) == pytest.approx(0.01 / (0.25 * 1.01), rel=0.02)


# Several runs.


def test_two_runs_side_by_side(finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(finished)
    file = tmp_path / "both.html"
    result = said(["compare", "runs/one", "runs/two", "--out", str(file)], capsys)
    assert result.code == 0, result
    text = file.read_text(encoding="utf-8")
    assert_alone(text)
    header, *lines = result.out.splitlines()
    assert header.split() == ["run", "one", "two"]
    table = {line.split("  ")[0]: line for line in lines}
    assert re.search(r"images +8 +4", table["images"])
    assert {"gain", "held-out contrast gain", "KL (nats)", "time", "warnings"} <= set(table)
    assert table["held-out saturation gain"].endswith("–")  # of the first run only
    assert any("the rewards or their weights differ" in line for line in lines)
    runs = [read_run(f"runs/{name}") for name in ("one", "two")]
    assert {name: values for name, values in different(runs) if name not in ("eval_reward", "best_by")} == {
        "steps": ["2", "1"], "seed": ["0", "3"], "learning_rate": ["0.001", "0.002"],
    }  # fmt: skip
    for name, values in different(runs):
        assert all(value in words(text) for value in (name, *values))
    assert text.count("data:image/png;base64,") == 3  # the base once, and each at its end


def test_three_runs_and_the_same_twice(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, held in (("a", -0.3), ("b", 0.1)):
        a_run(tmp_path / name, [row(0), row(10, 0.2, held)], ["x"] * 3)
    a_run(tmp_path / "c", [row(0)], eval_seed=4)
    result = said(["compare", "a", "b", "c"], capsys)
    assert result.code == 0, result
    assert_alone(Path("compare.html").read_text(encoding="utf-8"))
    assert re.search(r"^warnings +1 +0 +0$", result.out, re.MULTILINE)
    assert "note: eval_seed differs (none, none, 4), so that the runs were not judged alike" in result.out
    twice = [read_run("a"), read_run("a")]
    assert labels(twice) == ["a (1)", "a (2)"] and not different(twice) and not notes(twice)
    assert said(["compare", "a", "a", "--out", "twice.html"], capsys).code == 0
    assert "None." in Path("twice.html").read_text(encoding="utf-8")
