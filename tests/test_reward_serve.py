"""``tropism reward serve``: what it refuses to begin, and a server that runs without most of what tropism needs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file
from small_run import said, small_place, train_words

from tropism.config import BadInput
from tropism.reward_commands import read_token
from tropism.reward_settings import RewardServeSettings
from tropism.rewards import RewardError
from tropism.rewards.remote import Remote

ABSENT = "accelerate cv2 diffusers httpx2 huggingface_hub matplotlib peft tokenizers transformers".split()
ALONE = f"""\
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
from tropism.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """The line that a server says once it listens; afterwards it has ended by Ctrl-C, without an error."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-c", ALONE, "reward", "serve", *words, "--port", "0"]
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0


def test_a_server_in_an_environment_of_its_own(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the packages that heavy rewards pin in other versions; scores and training are those of home."""
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    Path("own.py").write_text("class Bright:\n    def __call__(self, images):\n        return images.mean((1, 2, 3))\n")
    Path("token").write_text("  secret-1\n")
    with serving(tmp_path, "./own.py:Bright", "--token-file", "token") as line:
        assert line.startswith("reward Bright (version ") and "a token is wanted" in line
        url = line.rpartition("remote:")[2]
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        reward = Remote(url, "secret-1", images=2)
        assert (reward.name, reward.served) == ("remote", "Bright")
        assert torch.equal(reward(images, [""] * 5), images.mean((1, 2, 3)))
        with pytest.raises(RewardError, match="401"):
            Remote(url, "secret-2")
        times = [httpx2.get(f"{url}/health", trust_env=False).elapsed.total_seconds() for _ in range(9)]
        assert min(times) < 0.03, "replies do not wait for acknowledgements, which takes 0.04 s"
        monkeypatch.setenv("TROPISM_REWARD_TOKEN", "secret-1")
        adapters = []
        for out, name in (("away", f"remote:{url}"), ("home", "./own.py:Bright")):
            done = said(train_words(reward=name, out=out, sample_batch="1", steps="1", eval_images="2"), capsys)
            assert done.code == 0, done
            adapters.append(load_file(Path(out) / "adapter" / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(adapters[0][key], value) for key, value in adapters[1].items())
    assert "eval_remote" in (Path("away") / "metrics.jsonl").read_text()


SERVE = ["reward", "serve"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "reward is not given; wanted one"),
        (["contrast", "brightness"], "reward is contrast brightness; wanted one"),
        (["contrast=2"], "wanted it without a weight"),
        (["contrast", "--host", "0.0.0.0"], "host is 0.0.0.0 and there is no token"),
        (["contrast", "--host", "::"], "host is :: and there is no token"),
        (["contrast", "--host", "example.org"], "host is example.org and there is no token"),
        (["contrast", "--port", "70000"], "port is 70000; wanted 0 to 65535"),
        (["contrast", "--parallel", "0"], "parallel is 0; wanted at least 1"),
        (["contrast", "--max-images", "0"], "max_images is 0; wanted at least 1"),
        (["contrast", "--token-file", "no-such"], "token_file is no-such: "),
        (["contrast", "--token-file", "empty"], "the token in empty is empty"),
        (["nothing"], "there is no reward 'nothing'"),
        (["./missing.py:f"], "there is no such file"),
    ],
)
def test_what_is_refused(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TROPISM_REWARD_TOKEN", raising=False)
    Path("empty").write_text("\n")
    done = said([*SERVE, *words], capsys)
    assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1, done


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = said([*SERVE, "contrast", "--port", str(taken.getsockname()[1])], capsys)
    assert done.code == 2 and "which cannot be used (Address already in use)" in done.err


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = said([*SERVE, "contrast"], capsys)
    assert done.code == 2 and "pip install 'tropism[serve]'" in done.err


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert read_token(None, {}) is None
    assert read_token(None, {"TROPISM_REWARD_TOKEN": "abc"}) == "abc"
    file.write_text("from-file\n")
    assert read_token(str(file), {"TROPISM_REWARD_TOKEN": "abc"}) == "from-file"
    for wrong in ("", "two words", "naïve", "a\x00b"):
        file.write_text(wrong)
        with pytest.raises(BadInput, match="wanted letters, digits and signs"):
            read_token(str(file), {})
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        RewardServeSettings(["x"], host=host).check_reach(None)
    RewardServeSettings(["x"], host="0.0.0.0").check_reach("secret")
