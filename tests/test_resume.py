"""Going on with a run: bit for bit the run that was never stopped, and a sentence for what cannot go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_run import FLOW, HOPS, OWN_NETWORK, said, small_place, train_words

from tropism import catalog
from tropism.resume import with_its_config
from tropism.sums import seal

DISTIL = {"student_steps": "2", "inference_steps": "4", "lr_schedule": "constant"}  # which does not ask how long
METHODS = sorted(set(catalog.method_names()) - OWN_NETWORK)
STOPPING = """
import os, signal
calls = 0

def stopping(images):
    global calls
    calls += 1
    if calls == 6:  # after two tries with noise, an evaluation, step 1 and its evaluation: in step 2
        os.kill(os.getpid(), signal.SIGTERM)
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def weights(run: Path) -> dict[str, bytes]:
    """Every parameter of the adapter, bit by bit."""
    files = sorted((run / "adapter").rglob("*.safetensors"))
    assert files
    return {name: value.numpy().tobytes() for file in files for name, value in load_file(file).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def same_either_way(capsys: pytest.CaptureFixture[str], method: str, **changes: Any) -> None:
    """Four steps at once, and two and two."""
    for out, steps in (("whole", "4"), ("parts", "2")):
        result = said(train_words(method, out=out, steps=steps, **changes), capsys)
        assert result.code == 0, result
    assert weights(Path("parts")) != weights(Path("whole"))
    result = said(["train", method, "--resume", "parts", "--steps", "4"], capsys)
    assert result.code == 0, result
    assert "going on after step 2 of 4" in result.out
    assert weights(Path("parts")) == weights(Path("whole"))
    assert metrics(Path("parts")) == metrics(Path("whole"))
    assert (Path("parts") / "curve.png").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_two_and_two_steps_are_four(
    method: str, tiny_sd: Path, tiny_sd3: Path, tiny_lcm: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    model = tiny_sd3 if method in FLOW else tiny_lcm if method in HOPS else tiny_sd
    monkeypatch.chdir(small_place(model, tmp_path))
    same_either_way(capsys, method, **(DISTIL if method in catalog.distilling() else {}))


@pytest.mark.parametrize(
    "changes",
    [{"ema": "0.5"}, {"full": ""}, {"min_count": "3", "buffer": "4"}, {"explore_guidance": "1.0", "updates": "2"}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_else_is_remembered(changes: dict[str, str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same_either_way(capsys, "ddpo", **changes)


def test_stopped_when_asked_and_gone_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("stopping.py").write_text(STOPPING)
    Path("plain.py").write_text(STOPPING.replace("os.kill(os.getpid(), signal.SIGTERM)", "pass"))
    handler = signal.getsignal(signal.SIGTERM)
    result = said(train_words(reward="./stopping.py:stopping", out="stopped", steps="3", save_every="0"), capsys)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert result.code == 130
    assert "stopping after this step" in result.out
    assert "stopped when asked to, after 2 of 3 steps" in result.err
    assert "go on with tropism train ddpo --resume stopped" in result.err
    assert said(train_words(reward="./plain.py:stopping", out="whole", steps="3"), capsys).code == 0
    assert said(["train", "ddpo", "--resume", "stopped/checkpoints/step-000002"], capsys).code == 0
    assert weights(Path("stopped")) == weights(Path("whole"))
    assert not (Path("stopped") / "error.txt").exists()


def test_latest_is_the_run_that_was_saved_last(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        assert said(train_words(out=f"runs/{name}", steps="1"), capsys).code == 0
    later = Path("runs/one/checkpoints/step-000001/state.json")
    os.utime(later, (time.time() + 10, time.time() + 10))
    assert said(["train", "ddpo", "--resume=latest", "--steps", "2"], capsys).code == 0
    assert [len(metrics(Path("runs") / name)) for name in ("one", "two")] == [3, 2]


def test_what_cannot_go_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train_words(out="run", steps="1"), capsys).code == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    def refused(words: list[str], sentence: str) -> None:
        result = said(["train", *words], capsys)
        assert result.code == 2, result
        assert sentence in result.err and result.err.count("\n") == 1
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before

    go_on = ["ddpo", "--resume", "run", "--steps", "2"]
    refused(["ddpo", "--resume", "nowhere"], "resume is nowhere, which has no config.yaml")
    refused(["ddpo", "--resume", "latest"], "no run of ddpo in runs has a checkpoint")
    refused(["raft", "--resume", "run"], "a run of ddpo; start it with tropism train ddpo")
    refused(go_on[:3], "steps is 1; wanted more than the 1 that run has made")
    refused([*go_on, "--learning-rate", "1e-2"], "learning_rate is 0.01, but 0.001 in run; leave it out")
    refused([*go_on, "--out", "other"], "out is other, but a run goes on in its own folder, run")
    refused(["ddpo", "--resume", "run/checkpoints/step-000007"], "which has no checkpoint")
    assert with_its_config(["--resume=run"], "ddpo") == ["--config", "run/config.yaml", "--resume=run"]
    for words in (["--resume", "run", "--config=x.yaml"], ["--config", "x.yaml", "--resume=run"]):
        assert with_its_config(words, "ddpo") == words
    state = Path("run/checkpoints/step-000001/state.json")
    whole = state.read_text()
    for broken, sentence in ((whole[:40], "is not whole"), (whole.replace("statistics", "x"), "remembers ['x']")):
        state.write_text(broken)
        seal(state.parent)
        before |= {path: path.read_bytes() for path in state.parent.iterdir()}
        refused(go_on, sentence)
    state.write_text(whole)
    before[state] = whole.encode()
    refused(go_on, "step-000001 is not whole: state.json is not what was written")
    seal(state.parent)
    before |= {path: path.read_bytes() for path in state.parent.iterdir()}
    Path("prompts.txt").write_text("a red fox\n")
    refused(go_on, "the prompts (prompts.txt) are not those that run was trained on")


KILLS, KILLED = int(os.environ.get("KILLS", "4")), os.environ.get("KILLED", "ddpo")


def test_killed_at_any_moment(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """kill -9, again and again, and in the end the same weights. The moments are drawn anew each time.

    KILLS=20 KILLED=raft pytest -k killed: more of them, with another method.
    """
    monkeypatch.chdir(small_place(tiny_sd3 if KILLED in FLOW else tiny_sd, tmp_path))
    words = train_words(KILLED, steps=str(20 * KILLS), eval_every="4")
    assert said([*words, "--out", "whole"], capsys).code == 0
    code = "import sys; from tropism.cli import main; sys.exit(main(sys.argv[1:]))"

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)

    run, killed = Path("killed"), 0
    arguments = [*words, "--out", "killed"]
    while True:
        with start(arguments) as process:
            assert process.stdout is not None
            seen = next((line for line in process.stdout if line.startswith("step ")), None)
            if killed < KILLS and seen is not None:
                time.sleep(random.uniform(0.0, 0.25))
                process.kill()
                killed += process.wait() == -signal.SIGKILL
            process.stdout.read()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        arguments = ["train", KILLED, "--resume", "killed"]
    assert killed == KILLS
    assert weights(run) == weights(Path("whole")) and not list(run.rglob(".saving-*"))
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(20 * KILLS + 1)) and rows == metrics(Path("whole"))
