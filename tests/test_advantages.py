"""Advantages against numpy written out, with missing scores and groups that all agree."""

import json
import math
from collections import deque

import numpy as np
import pytest
import torch

from tropism.advantages import PerPromptStats, by_batch, by_group

NAN = math.nan


def test_by_batch_is_the_population_z_score():
    reward = torch.tensor([1.0, 2.0, 4.0, 9.0])
    values = reward.double().numpy()
    wanted = (values - values.mean()) / (values.std() + 1e-6)
    np.testing.assert_allclose(by_batch(reward).numpy(), wanted, rtol=1e-6)
    assert by_batch(reward).dtype == torch.float32 and by_batch(reward.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("scale", ["group", "global", "none"])
def test_by_group_by_hand(scale):
    reward, group = torch.tensor([1.0, 10.0, 3.0, 40.0, 8.0, 10.0]), torch.tensor([7, 2, 7, 2, 7, 2])
    values = reward.double().numpy()
    spread = {"group": (values[::2].std(), values[1::2].std()), "global": (values.std(),) * 2, "none": (1 - 1e-4,) * 2}[
        scale
    ]
    wanted = np.empty(6)
    for first, std in zip((0, 1), spread, strict=True):
        wanted[first::2] = (values[first::2] - values[first::2].mean()) / (std + 1e-4)
    np.testing.assert_allclose(by_group(reward, group, scale).numpy(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", ["group", "global", "none"])
def test_a_missing_score_changes_nobody_elses_advantage(scale):
    reward, group = torch.tensor([1.0, NAN, 3.0, 40.0, 8.0, 10.0, NAN]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    kept = ~reward.isnan()
    got = by_group(reward, group, scale)
    assert torch.equal(got[kept], by_group(reward[kept], group[kept], scale))
    assert got[~kept].tolist() == [0.0, 0.0] and (got[kept] != 0).all()
    assert torch.equal(by_batch(reward)[kept], by_batch(reward[kept])) and (by_batch(reward)[~kept] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [[0.1] * 3, [0.3], [NAN, NAN], [NAN, 0.7]])
def test_no_spread_gives_exactly_zero(reward, dtype):
    reward = torch.tensor(reward, dtype=dtype)  # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in float64
    group = torch.zeros(len(reward), dtype=torch.long)
    wanted = [0.0] * len(reward)
    assert by_batch(reward).tolist() == wanted
    assert PerPromptStats(4, 1).update(["p"] * len(reward), reward).tolist() == wanted
    for scale in ("group", "global", "none"):
        assert by_group(reward, group, scale).tolist() == wanted
        # and next to a group that has some
        both = torch.cat([reward, torch.tensor([1.0, 2.0])])
        got = by_group(both, torch.cat([group, torch.tensor([1, 1])]), scale)
        assert got[:-2].tolist() == wanted and got[-2] < 0 < got[-1]


def reference_tracker(batches, buffer, min_count):
    """The definition, in numpy: push first, then the prompt's own statistics or the batch's."""
    history, answers = {}, []
    for prompts, rewards in batches:
        valid = ~np.isnan(rewards)
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not np.isnan(reward):
                history.setdefault(prompt, deque(maxlen=buffer)).append(reward)
        answer = np.zeros(len(rewards))
        for row in np.flatnonzero(valid):
            own = np.array(history[prompts[row]])
            among = own if len(own) >= min_count else rewards[valid]
            answer[row] = (rewards[row] - among.mean()) / (among.std() + 1e-6)
        answers.append(answer)
    return answers


def batches(count, rows, missing):
    random = np.random.default_rng(0)
    for _ in range(count):
        prompts = [f"p{i}" for i in random.integers(0, 3, rows)]
        rewards = random.normal(size=rows).astype(np.float32).astype(np.float64)
        rewards[random.random(rows) < missing] = np.nan
        yield prompts, rewards


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_tracker_is_ddpos(missing):
    data = list(batches(12, 10, missing))
    tracker = PerPromptStats(buffer=16, min_count=8)
    for (prompts, rewards), wanted in zip(data, reference_tracker(data, 16, 8), strict=True):
        got = tracker.update(prompts, torch.tensor(rewards, dtype=torch.float32))
        np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-6, atol=1e-6)


def test_a_tracker_resumes_bit_for_bit_through_json():
    data = [(prompts, torch.tensor(rewards, dtype=torch.float32)) for prompts, rewards in batches(8, 10, 0.1)]
    whole, first, second = (PerPromptStats(16, 8) for _ in range(3))
    for prompts, rewards in data[:5]:
        whole.update(prompts, rewards), first.update(prompts, rewards)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for prompts, rewards in data[5:]:
        assert torch.equal(whole.update(prompts, rewards), second.update(prompts, rewards))
    with pytest.raises(ValueError, match="match them"):
        PerPromptStats(32, 8).load_state_dict(first.state_dict())


def test_advantages_have_no_graph_and_leave_rewards_alone():
    reward = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    for advantage in (by_batch(reward), by_group(reward, torch.zeros(3)), PerPromptStats().update(["a"] * 3, reward)):
        assert not advantage.requires_grad
    assert reward[1].isnan()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="finite, or NaN"):
        by_batch(torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="finite, or NaN"):
        by_batch(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"group \(2,\) and reward \(3,\)"):
        by_group(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="unknown scale"):
        by_group(torch.zeros(3), torch.zeros(3), "batch")
    with pytest.raises(ValueError, match="2 prompts and 3 rewards"):
        PerPromptStats().update(["a", "b"], torch.zeros(3))
    with pytest.raises(ValueError, match="min_count <= buffer"):
        PerPromptStats(buffer=8, min_count=16)
