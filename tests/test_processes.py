"""1, 2 and 4 processes with the same global batch make the same update; every process ends with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distillers import DISTILLED
from methods import ROWS, Off, Row
from small_run import refused, said, small_place, train_words
from test_resume import metrics, weights
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.models.pipelines import wrap_pipeline
from tropism.models.toy import PROMPTS
from tropism.processes import ALONE, Processes
from tropism.sharding import shard
from tropism.train import Step, train

COUNTS = (2, 4)


class Table:
    """Where the processes of a test, which are threads, add up what they have."""

    def __init__(self, count: int) -> None:
        self.barrier, self.values = threading.Barrier(count, timeout=60), dict[int, Tensor]()


@dataclasses.dataclass(frozen=True)
class Thread(Processes):
    """A process that is a thread: the exchange goes through ``table``, everything else is as it is."""

    table: Any = None

    def summed(self, value: Tensor) -> Tensor:
        self.table.values[self.index] = value.detach().clone()
        self.table.barrier.wait()
        total = sum((self.table.values[index] for index in range(1, self.count)), self.table.values[0])
        self.table.barrier.wait()
        return total


def together(count: int, work: Any) -> list[Any]:
    """What ``work``(processes) returns in each of ``count`` processes."""
    if count == 1:
        return [work(ALONE)]
    table = Table(count)

    def one(index: int) -> Any:
        try:
            return work(Thread(index, count, table=table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def prompts(missing: bool) -> Any:
    """Batches of five prompts: neither these nor their images can be dealt out evenly."""
    columns = {"missing": [number == 3 for number in range(len(PROMPTS))]} if missing else {}
    return batches(PromptSet(PROMPTS, columns), 5, 3, 0)


def trained(row: Row, processes: Processes, missing: bool) -> tuple[Tensor, list[Step]]:
    """(the update of two steps, in float64, what was said of them)."""
    model = row.toy(double=True)
    small = row.with_(minibatch=7, sample_batch=4, images_per_prompt=3, prompts_per_step=5)
    method = small.build(model, Off(), torch.Generator().manual_seed(1))
    for name in {"policy", "teacher"} & vars(method).keys():
        setattr(method, name, getattr(method, name).with_(processes=processes))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer, said = torch.optim.SGD(model.parameters(), lr=1e-3), list[Step]()
    train(method, prompts(missing), optimizer, steps=2, max_norm=0.5, hooks=[said.append], processes=processes)
    pairs = zip(model.parameters(), before, strict=True)
    return torch.cat([(end.detach() - start).flatten() for end, start in pairs]), said


@pytest.mark.parametrize("row", [*ROWS, *DISTILLED], ids=lambda row: row.name)
def test_the_same_update_however_many_processes(row: Row) -> None:
    missing = row.name in ("ddpo", "alignprop", "raft")
    ((alone, steps),) = together(1, lambda processes: trained(row, processes, missing))
    assert alone.norm() > 0
    for count in COUNTS:
        (update, said), *others = together(count, lambda processes: trained(row, processes, missing))
        for other, heard in others:
            assert torch.equal(update, other) and [step.metrics for step in heard] == [step.metrics for step in said]
        assert (update - alone).norm() <= 1e-9 * alone.norm()  # float64: 4e-14 measured
        for mine, single in zip(said, steps, strict=True):
            assert mine.images == single.images == 15 and {"loss", "grad_norm"} < mine.metrics.keys()
            assert mine.metrics.keys() == single.metrics.keys()
            for name in {"reward_mean", "loss", "grad_norm", "updates"} & single.metrics.keys():
                # the loss is a difference of large float32 numbers
                assert mine.metrics[name] == pytest.approx(single.metrics[name], rel=1e-5, abs=1e-7), name


def test_alone_nothing_is_exchanged() -> None:
    rows = torch.arange(5)
    assert ALONE.share(rows) is rows and ALONE.first
    assert ALONE.joined(rows, rows, 5) is rows and ALONE.summed(rows) is rows
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.every({"a": 1}) == [{"a": 1}]


def test_every_row_is_somebodys() -> None:
    rows = torch.tensor([7, 3, 9, 1, 5])
    shares = [Processes(index, 3).share(rows).tolist() for index in range(3)]
    assert shares == [[7, 1], [3, 5], [9]]
    assert Processes(2, 4).share(torch.arange(2)).tolist() == []


def test_what_is_exchanged() -> None:
    def work(processes: Processes) -> tuple[Any, ...]:
        mine = processes.share(torch.arange(5))
        values = torch.tensor([1.0, math.nan, 3.0, 4.0, 5.0])
        flags = torch.tensor([[True, False]] * 5)
        return (
            processes.joined(values[mine], mine, 5),
            processes.joined(flags[mine], mine, 5),
            processes.any(processes.index == 1),
            processes.any(False),
            processes.every({"name": "é" * processes.index, "value": 0.1}),
        )

    for values, flags, some, none, heard in together(3, work):
        assert values.nan_to_num(2.0).tolist() == [1, 2, 3, 4, 5]
        assert flags.dtype == torch.bool and flags.tolist() == [[True, False]] * 5
        assert some and not none
        assert heard == [{"name": "é" * index, "value": 0.1} for index in range(3)]


# --- the command, as two processes ---


def started(words: list[str], index: int, port: int) -> subprocess.Popen[str]:
    """One of two processes, as a launcher starts them."""
    here = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | here | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "tropism", *words], env=environment, text=True, stdout=pipe, stderr=pipe
    )


def free_port() -> int:
    """Below those that the kernel hands out: the processes bind it seconds later, while other tests connect a lot."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as door, contextlib.suppress(OSError):
            door.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def pair(words: list[str]) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [started(words, index, port) for index in range(2)]


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


@pytest.mark.parametrize("pipeline", [tiny.sd_pipeline, tiny.sd3_pipeline])
def test_a_split_network_answers_and_learns_as_a_whole_one(pipeline: Any, tmp_path: Path) -> None:
    """On a mesh of one process, which splits nothing but runs every exchange."""
    model = wrap_pipeline(pipeline(), guidance_scale=2.0, steps=3, onednn=False)
    model.add_lora(4, generator=torch.Generator().manual_seed(0))
    x, tau, cond = tiny.noise(2), torch.tensor([400, 900]), model.encode(tiny.PROMPTS)

    def learnt() -> tuple[Tensor, list[Tensor]]:
        answer = model.net(x, tau, cond)
        return answer.detach(), list(torch.autograd.grad(answer.square().sum(), model.parameters()))

    before, small = learnt(), torch.nn.Linear(2, 2)
    place: dict[str, Any] = {"init_method": f"file://{tmp_path / 'place'}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **place)
    try:
        shard(model.bare_network(), model.parameters(), Processes(0, 1))
        after = learnt()
        with pytest.raises(ValueError, match="all of them are trained"):
            shard(small, list(small.parameters()), Processes(0, 1))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(before[0], after[0])
    for mine, other in zip(before[1], after[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_two_processes_train_one_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(steps="2", prompts_per_step="3", images_per_prompt="3", group_relative="", eval_images="5")
    assert said([*words, "--out", "alone"], capsys).code == 0
    for process, printed in zip(pair([*words, "--out", "both"]), (True, False), strict=True):
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert ("done in" in out) is printed
    alone, both = metrics(Path("alone")), metrics(Path("both"))
    assert [row["step"] for row in both] == [0, 1, 2]
    for mine, single in zip(both, alone, strict=True):
        assert mine.keys() == single.keys()
        for name in {"reward_mean", "grad_norm", "eval_reward", "eval_kl", "images"} & single.keys():
            assert mine[name] == pytest.approx(single[name], rel=1e-3), name
    assert (Path("both") / "report.html").is_file() and not list(Path("both").rglob(".saving-*"))

    words = ["train", "ddpo", "--resume", "both", "--steps", "3"]
    assert [process.wait(timeout=120) for process in pair(words)] == [0, 0]
    assert [row["step"] for row in metrics(Path("both"))] == [0, 1, 2, 3]


def test_the_frozen_network_is_split(place: Path) -> None:
    """The weights that are trained are those of a run without, up to the rounding of another kernel."""
    words = train_words(steps="2", prompts_per_step="2", images_per_prompt="4", group_relative="", eval_images="4")
    for name, more in {"whole": [], "split": ["--shard"]}.items():
        for process in pair([*words, "--out", name, *more]):
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
    whole, split = metrics(Path("whole")), metrics(Path("split"))
    for mine, single in zip(split, whole, strict=True):
        for name in {"reward_mean", "grad_norm", "eval_reward", "eval_kl", "images"} & single.keys():
            assert mine[name] == pytest.approx(single[name], rel=1e-3), name
    assert weights(Path("split")).keys() == weights(Path("whole")).keys()


def test_a_killed_process_ends_the_run_with_a_message(place: Path) -> None:
    first, second = pair(train_words(steps="100000", eval_every="0", save_every="1", out="run"))
    assert first.stdout is not None and first.stderr is not None
    assert any(line.startswith("step 2/") for line in first.stdout)
    second.kill()
    _, error = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 1
    assert "another process of this run has ended, and says why itself, after" in error
    assert "go on with tropism train ddpo --resume run" in error and "Traceback" not in error


def test_what_several_processes_cannot_do(place: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    sentence = refused(train_words(), capsys)
    assert "prompts_per_step x images_per_prompt is 4; wanted at least 8: an image for each process" in sentence
    wide = {"images_per_prompt": "8", "eval_images": "8"}
    assert "on_trouble is rollback" in refused(train_words(on_trouble="rollback", **wide), capsys)
    assert "device is cuda:1; wanted cpu or cuda" in refused(train_words(device="cuda:1", **wide), capsys)
    assert "started as several processes" in said(["doctor", *train_words()[1:]], capsys).out
    sentence = refused(train_words(shard="", images_per_prompt="8", eval_images="9"), capsys)
    assert "eval_images is 9; wanted a multiple of 8 with shard" in sentence
    assert "leave one out" in refused(train_words(shard="", full="", **wide), capsys)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "the launcher asks for FSDP; wanted plain data parallelism" in refused(train_words(**wide), capsys)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "shard is True; wanted several processes" in refused(train_words(shard=""), capsys)
