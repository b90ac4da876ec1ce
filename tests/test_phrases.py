"""Phrases of a prompt and of its tokens."""

from __future__ import annotations

import pytest

from tropism.models.phrases import phrase_spans, token_phrases


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red circle above a blue star on a black background", ["a red circle", "a blue star", "a black background"]),
        ("A photo of a cat, sitting; by the sea.", ["A photo", "a cat", "sitting", "the sea"]),
        ("left of right", []),
        ("", []),
    ],
)
def test_spans_are_the_runs_between_function_words(prompt: str, phrases: list[str]) -> None:
    assert [prompt[low:high] for low, high in phrase_spans(prompt)] == phrases


class Words:
    """A tokenizer of words: start mark, words, end mark, padding."""

    is_fast = True

    def __call__(self, prompts: list[str], max_length: int, **kwargs: object) -> dict[str, list[list[tuple[int, int]]]]:
        rows = []
        for prompt in prompts:
            row, place = [(0, 0)], 0
            for word in prompt.split():
                start = prompt.index(word, place)
                place = start + len(word)
                row.append((start, place))
            rows.append((row + [(0, 0)] * max_length)[:max_length])
        return {"offset_mapping": rows}


def test_tokens_carry_the_number_of_their_phrase() -> None:
    found = token_phrases(Words(), ["a red circle above a star", "star"], 9)
    assert found.tolist() == [[-1, 0, 0, 0, -1, 1, 1, -1, -1], [-1, 0, -1, -1, -1, -1, -1, -1, -1]]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="fast tokenizer"):
        token_phrases(slow, ["a"], 4)
