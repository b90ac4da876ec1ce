"""Which phrase of a prompt each token belongs to: what DiffExp's random weights are drawn for (2502.14070).

A phrase is a run of words between punctuation and function words: "a red circle above a blue star, on a black
background" has three. Start, end, padding and the words between phrases belong to none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETWEEN = frozenset(
    "above and at behind below beside between beyond but by for from in inside into left near next of on onto or "
    "outside over right through to toward towards under while with without".split()
)


def phrase_spans(prompt: str) -> list[tuple[int, int]]:
    """Character spans [start, stop) of the phrases, in order."""
    spans: list[tuple[int, int]] = []
    open_span = False
    for word in re.finditer(r"[\w'-]+|[^\w\s]", prompt.lower()):
        if word.group() in BETWEEN or not re.match(r"\w", word.group()):
            open_span = False
        elif open_span:
            spans[-1] = (spans[-1][0], word.end())
        else:
            spans.append((word.start(), word.end()))
            open_span = True
    return spans


def word_places(tokenizer: Any, prompts: Sequence[str], word: str, length: int) -> Tensor:
    """(B, length) bool: the first token of each prompt that is ``word``. Raises ValueError for a word of several
    tokens, and for a prompt without it."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens of this model; wanted a word that is one")
    rows = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids
    found = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        if ids[0] not in tokens:
            raise ValueError(f"the prompt {prompt!r} does not have the word {word!r}; write it, as the actor's own did")
        found[row, tokens.index(ids[0])] = True
    return found


def token_phrases(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """(B, length) int64: the phrase of each token, -1 for none. Raises ValueError for a tokenizer without offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the prompt; load the fast tokenizer to "
            "weigh phrases"
        )
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
    )
    rows = torch.full((len(prompts), length), -1)
    for row, (prompt, offsets) in enumerate(zip(prompts, batch["offset_mapping"], strict=True)):
        spans = phrase_spans(prompt)
        for column, (start, stop) in enumerate(offsets):
            inside = [place for place, (low, high) in enumerate(spans) if stop > start and low <= start < high]
            rows[row, column] = inside[0] if inside else -1
    return rows
