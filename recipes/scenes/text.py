"""Tokenizer and text encoders of the scenes pipelines: CLIP's own classes, over the forty words of the captions.

The vocabulary holds every lower-case letter too, so that any English text has tokens (and means nothing to the model).
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from tropism.worlds.scenes.grammar import words

LENGTH = 20  # the longest caption has 14 words; a start and an end mark
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the captions is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list(string.ascii_lowercase + string.digits + ",.-")
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words()), *letters], trainer)
    state = json.loads(bpe.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in state["merges"]]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [token for token in state["vocab"] if token not in tokens] + [START, END]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            unk_token=END,
            bos_token=START,
            eos_token=END,
            pad_token=END,
            model_max_length=LENGTH,
        )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, LENGTH) int64, padded as Stable Diffusion pads."""
    batch = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int = 128) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        max_position_embeddings=LENGTH,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
