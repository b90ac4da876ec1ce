"""The language of the melodies world: what a melody is, how it is written, read back, sampled and altered.

A prompt is loudness, instrument, and a word a beat: a note, ``rest``, or ``hold``, in which the note before goes on,
such as "loud organ C4 E4 hold rest G4". ``parse(prompt(melody)) == melody`` for every melody, and the other way round
for every prompt with single spaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held_out", "any"]

INSTRUMENTS: tuple[str, ...] = ("sine", "organ", "plucked")
LOUDNESS: tuple[str, ...] = ("soft", "loud")
NAMES: tuple[str, ...] = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
PITCHES: tuple[str, ...] = tuple(f"{name}{octave}" for octave in (4, 5) for name in NAMES)
REST, HOLD = "rest", "hold"
VOICES = len(PITCHES) * len(INSTRUMENTS) * len(LOUDNESS) + 1
BEATS = (4, 8)  # of a melody, at least and at most
LONGEST = 3  # beats of a note
HELD_OUT_SHARE = 0.15
CHANGES: tuple[str, ...] = ("pitch", "rhythm", "instrument", "loudness")


def _require(value: object, allowed: Sequence[object], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; wanted one of {', '.join(str(each) for each in allowed)}")


@dataclass(frozen=True, slots=True)
class Melody:
    """``words`` are one a beat. Raises ValueError for what cannot be heard as it is written."""

    words: tuple[str, ...]
    instrument: str = "sine"
    loudness: str = "loud"

    def __post_init__(self) -> None:
        _require(self.instrument, INSTRUMENTS, "the instrument")
        _require(self.loudness, LOUDNESS, "the loudness")
        for word in self.words:
            _require(word, (*PITCHES, REST, HOLD), "a word of the melody")
        if not BEATS[0] <= len(self.words) <= BEATS[1]:
            raise ValueError(f"the melody has {len(self.words)} beats; wanted {BEATS[0]} to {BEATS[1]}")
        if self.words[-1] == REST:
            raise ValueError("the melody ends in a rest, which cannot be heard; leave it out")
        for place, word in enumerate(self.words):
            if word == HOLD and (place == 0 or self.words[place - 1] == REST):
                raise ValueError(f"beat {place + 1} is a hold after no note; wanted a note or a rest there")
        if any(note.beats > LONGEST for note in self.notes):
            raise ValueError(f"a note is held for more than {LONGEST} beats; write it again, or a rest")

    @property
    def notes(self) -> tuple[Note, ...]:
        """What sounds, in order."""
        found: list[Note] = []
        for beat, word in enumerate(self.words):
            if word == HOLD:
                found[-1] = replace(found[-1], beats=found[-1].beats + 1)
            elif word != REST:
                found.append(Note(PITCHES.index(word), beat, 1))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Note:
    """``pitch`` in semitones above C4; from ``beat``, for so many ``beats``."""

    pitch: int
    beat: int
    beats: int


def prompt(melody: Melody) -> str:
    """As it is written."""
    return " ".join((melody.loudness, melody.instrument, *melody.words))


def parse(text: str) -> Melody:
    """Raises ValueError, in one sentence, for what is no melody."""
    loudness, instrument, *words = [*text.split(), "", ""] if len(text.split()) < 2 else text.split()
    try:
        return Melody(tuple(word for word in words if word), instrument, loudness)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no melody: {error}; a melody is written as 'loud organ C4 E4 hold rest G4'"
        ) from None


class Score(NamedTuple):
    """What a prompt says of each of F frames; ``voices`` count (pitch, instrument, loudness), the last is silence."""

    voices: NDArray[np.int64]  # (F,)
    begins: NDArray[np.bool_]  # (F,) the first frame of a note
    ends: NDArray[np.bool_]  # (F,) the last frame of a note
    mask: NDArray[np.bool_]  # (F,) False after the melody


def score(text: str, frames: int) -> Score:
    """Of a prompt, with so many frames a beat; the empty prompt is silent, and says nothing of its length."""
    length = frames * BEATS[1]
    voices, begins, ends = np.full(length, VOICES - 1), np.zeros(length, bool), np.zeros(length, bool)
    if not text:
        return Score(voices, begins, ends, np.ones(length, bool))
    melody = parse(text)
    kind = INSTRUMENTS.index(melody.instrument) * len(LOUDNESS) + LOUDNESS.index(melody.loudness)
    for note in melody.notes:
        start, end = note.beat * frames, (note.beat + note.beats) * frames
        voices[start:end] = note.pitch * len(INSTRUMENTS) * len(LOUDNESS) + kind
        begins[start] = ends[end - 1] = True
    return Score(voices, begins, ends, np.arange(length) < len(melody.words) * frames)


def split_of(melody: Melody) -> Split:
    """By a hash of its tune alone, intervals and rhythm: a held-out tune is in no key and on no instrument trained."""
    first = melody.notes[0].pitch
    tune = [str(PITCHES.index(word) - first) if word in PITCHES else word for word in melody.words]
    share = int.from_bytes(hashlib.sha256(" ".join(tune).encode()).digest()[:8], "big") / 2**64
    return "held_out" if share < HELD_OUT_SHARE else "train"


def _tune(rng: np.random.Generator) -> tuple[str, ...]:
    """Words of a melody: steps of at most a fifth, a fifth of the beats held, an eighth of them rests."""
    beats, pitch = int(rng.integers(BEATS[0], BEATS[1] + 1)), int(rng.integers(len(PITCHES)))
    words: list[str] = []
    for beat in range(beats):
        chance, last = rng.random(), beat == beats - 1
        sounding = bool(words) and words[-1] != REST
        if chance < 0.2 and sounding and words[-(LONGEST - 1) :] != [HOLD] * (LONGEST - 1):
            words.append(HOLD)
        elif 0.2 <= chance < 0.325 and not last:
            words.append(REST)
        else:
            low, high = max(0, pitch - 7), min(len(PITCHES), pitch + 8)
            pitch = int(rng.integers(low, high))
            words.append(PITCHES[pitch])
    return tuple(words)


def sample_melody(rng: np.random.Generator, split: Split = "any") -> Melody:
    """A melody of that split."""
    _require(split, ("train", "held_out", "any"), "split")
    while True:
        melody = Melody(_tune(rng), INSTRUMENTS[rng.integers(3)], LOUDNESS[rng.integers(2)])
        if split in ("any", split_of(melody)):
            return melody


def prompts(count: int, seed: int, split: Split = "train") -> list[str]:
    """``count`` prompts; the first of more are the same."""
    rng = np.random.default_rng(seed)
    return [prompt(sample_melody(rng, split)) for _ in range(count)]


def alter(melody: Melody, rng: np.random.Generator, change: str | None = None) -> Melody:
    """A melody that differs in one of ``CHANGES``: a note by up to three semitones, one beat's rhythm, the instrument
    or the loudness."""
    change = CHANGES[rng.integers(len(CHANGES))] if change is None else change
    _require(change, CHANGES, "change")
    if change == "loudness":
        return replace(melody, loudness=LOUDNESS[1 - LOUDNESS.index(melody.loudness)])
    if change == "instrument":
        step = 1 + int(rng.integers(2))
        return replace(melody, instrument=INSTRUMENTS[(INSTRUMENTS.index(melody.instrument) + step) % 3])
    while True:
        try:
            other = replace(melody, words=_reworded(melody.words, change, rng))
        except ValueError:
            continue
        if other != melody:
            return other


def _reworded(words: tuple[str, ...], change: str, rng: np.random.Generator) -> tuple[str, ...]:
    """One word is another; it may be no melody."""
    place, other = int(rng.integers(len(words))), list(words)
    if change == "pitch":
        if words[place] in PITCHES:
            moved = PITCHES.index(words[place]) + int(rng.integers(-3, 4))
            other[place] = PITCHES[min(max(moved, 0), len(PITCHES) - 1)]
        return tuple(other)
    instead = (REST, HOLD) if words[place] in PITCHES else (REST, HOLD, PITCHES[rng.integers(len(PITCHES))])
    other[place] = instead[rng.integers(len(instead))]
    return tuple(other)
