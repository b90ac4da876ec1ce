"""Prompt files, what is said of broken ones, and batches that depend on (seed, number) alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch

from tropism.data.prompts import PromptSet, batches, read_prompts

FRUIT = PromptSet(["apple", "pear", "plum", "fig", "date"], {"colour": ["red", "green", "blue", "purple", "brown"]})


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- files ---


def test_text_files_have_a_prompt_a_line(tmp_path):
    path = written(tmp_path, "prompts.txt", "\n a red circle \r\n\n\t\nein blauer Würfel, größer\n")
    prompts = read_prompts(path)
    assert list(prompts.text) == ["a red circle", "ein blauer Würfel, größer"] and prompts.columns == {}
    assert len(read_prompts(str(path))) == 2


def test_json_lines_have_columns(tmp_path):
    rows = [{"prompt": "a cat", "tag": "x", "n": 1}, {"n": 2, "prompt": "a dog", "tag": None}]
    prompts = read_prompts(written(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, rows))))
    assert list(prompts.text) == ["a cat", "a dog"]
    assert prompts.columns == {"n": [1, 2], "tag": ["x", None]}


def test_what_editors_add_is_not_part_of_a_prompt(tmp_path):
    """A byte order mark; and line separators of Unicode inside a JSON string are not the end of a line."""
    assert list(read_prompts(written(tmp_path, "p.txt", b"\xef\xbb\xbfa cat\n")).text) == ["a cat"]
    path = written(tmp_path, "p.jsonl", "\ufeff" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert list(read_prompts(path).text) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("missing.txt", None, "there is no prompt file .*missing.txt; give a .txt"),
        ("p.txt", " \n\n", "has no prompts; write one a line"),
        ("p.jsonl", "", "has no prompts"),
        ("p.txt", b"caf\xe9", "is not UTF-8 text .*; save it as UTF-8"),
        ("p.jsonl", '\n{"prompt": "a"}\n\n{"prompt": }', r"line 4 of .*p.jsonl is not JSON"),
        ("p.jsonl", '["a"]', "line 1 of .* has no prompt; wanted an object such as"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2 of .* has no prompt"),
        ("p.jsonl", '{"prompt": 3}', "line 1 of .* has no prompt"),
        ("p.jsonl", '{"prompt": " "}', "line 1 of .* has no prompt"),
        (
            "p.jsonl",
            '{"prompt": "a", "x": 1}\n\n{"prompt": "b", "y": 2}',
            r"line 3 of .* has the columns \['y'\], line 1 has \['x'\]; give every prompt the same",
        ),
        ("p.jsonl", '{"prompt": "a", "images": 1}', "has a column 'images', which rewards receive already; rename it"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, name, text, says):
    path = tmp_path / name if text is None else written(tmp_path, name, text)
    with pytest.raises(ValueError, match=says) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_not_a_prompt_file(tmp_path):
    with pytest.raises(ValueError, match="there is no prompt file"):
        read_prompts(tmp_path)


# --- batches ---


def first(count, *args, **kwargs):
    return list(itertools.islice(batches(*args, **kwargs), count))


def test_a_batch_has_whole_groups_with_their_columns():
    (batch,) = first(1, FRUIT, 3, 4, seed=0)
    assert len(batch.text) == 12 and batch.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.group.dtype == torch.int64
    for row in range(0, 12, 4):
        assert len(set(batch.text[row : row + 4])) == 1
    assert batch.columns["colour"] == [
        dict(zip(FRUIT.text, FRUIT.columns["colour"], strict=True))[t] for t in batch.text
    ]


def test_a_batch_depends_on_seed_and_number_alone():
    """Whether it is reached from the start, by resuming, or after another stream has been read."""
    whole = first(12, FRUIT, 3, 2, seed=7)
    for start in (1, 5, 11):
        for late, early in zip(first(12 - start, FRUIT, 3, 2, seed=7, first=start), whole[start:], strict=True):
            assert late.text == early.text and torch.equal(late.group, early.group) and late.columns == early.columns
        first(9, FRUIT, 2, 2, seed=start)
    torch.manual_seed(1)
    assert [batch.text for batch in first(12, FRUIT, 3, 2, seed=7)] == [batch.text for batch in whole]
    assert [batch.text for batch in first(12, FRUIT, 3, 2, seed=8)] != [batch.text for batch in whole]


def test_group_ids_never_come_back():
    groups = torch.cat([batch.group for batch in first(6, FRUIT, 3, 2, seed=0)])
    assert sorted(groups.tolist()) == sorted([*range(18)] * 2)


@pytest.mark.parametrize("per_step", [1, 2, 3, 5, 7])
def test_every_prompt_comes_once_a_pass_in_a_fresh_order(per_step):
    stream = [text for batch in first(5 * 6, FRUIT, per_step, 1, seed=3) for text in batch.text]
    passes = [tuple(stream[start : start + 5]) for start in range(0, 30 * per_step, 5)]
    assert all(sorted(each) == sorted(FRUIT.text) for each in passes) and len(set(passes)) > 3


def test_a_batch_may_be_larger_than_the_set():
    (batch,) = first(1, FRUIT, 10, 2, seed=0)
    assert set(Counter(batch.text).values()) == {4} and len(set(batch.group.tolist())) == 10


@pytest.mark.parametrize(
    ("prompts", "sizes", "says"),
    [(FRUIT, (0, 1), "at least 1; got 0 and 1"), (FRUIT, (1, 0), "got 1 and 0"), (PromptSet([]), (1, 1), "no prompts")],
)
def test_sizes_that_make_no_sense_are_refused(prompts, sizes, says):
    with pytest.raises(ValueError, match=says):
        next(batches(prompts, *sizes, seed=0))


def test_a_column_has_a_value_for_every_prompt():
    with pytest.raises(ValueError, match="column 'colour' has 1 values for 2 prompts"):
        PromptSet(["a", "b"], {"colour": ["red"]})
