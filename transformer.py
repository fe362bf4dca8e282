"""The Transformer of "Attention Is All You Need": trained, decoded with a KV cache, searched with a beam.

On two CPU cores (bf16, torch 2.13.0): 18 s; all of 1,000 numbers that training never saw come out right.
Multi30k German to English, 5 M parameters, 30 minutes: 40.5 BLEU greedy, 41.6 with beam 5 (test_2016_flickr).

    python transformer.py                                   # numbers in words, English to German: no data
    python transformer.py --translate "forty-two thousand"  # by the model that this left; - reads stdin
    python transformer.py --preset multi30k                 # German to English, BLEU on test_2016_flickr
    python transformer.py --preset multi30k --translate "ein hund rennt über die wiese"

The same command, started again, goes on where it stopped. The model, its loss and its search come first
and need torch alone; settings, data, training, evaluation and the command line follow and can be cut off.

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762 (model, schedule, smoothing, averaging).
Wu et al., "Google's Neural Machine Translation System", arXiv:1609.08144, eq. 14 (length penalty).
Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745 (pre-norm).
"""

import argparse
import gzip
import hashlib
import http.client
import importlib
import io
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# -----------------------------------------------------------------------------
# The model


@dataclass
class TransformerConfig:
    """What shapes a Transformer. The defaults are the paper's base model (table 3): 63,082,496 parameters."""

    vocab_size: int = 37_000  # one vocabulary for both languages
    max_len: int = 512  # positions that exist; longer input is an error
    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 6  # in the encoder, and as many in the decoder
    d_ff: int = 2048
    dropout: float = 0.1  # on each sublayer's output and on the embeddings, as in the paper
    norm_first: bool = False  # False: the paper's post-norm; True: pre-norm, which needs less of a warm-up
    tied: bool = True  # source embedding, target embedding and output projection share one matrix
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        for name in ("vocab_size", "max_len", "d_model", "n_heads", "n_layers", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} and {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        special = {self.pad_id, self.bos_id, self.eos_id}
        if len(special) < 3 or min(special) < 0 or max(special) >= self.vocab_size:
            raise ValueError(f"pad_id, bos_id, eos_id must differ, below {self.vocab_size}, got {special}")


def sinusoidal_positions(max_len: int, d_model: int) -> Tensor:
    """Position vectors (section 3.5), (max_len, d_model): sines in even features, cosines in odd ones."""
    wavelengths = 10_000 ** (torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (ceil(C/2),)
    angles = torch.arange(max_len, dtype=torch.float64)[:, None] / wavelengths  # (max_len, ceil(C/2))
    positions = torch.empty(max_len, d_model)
    positions[:, 0::2] = angles.sin()
    positions[:, 1::2] = angles.cos()[:, : d_model // 2]  # an odd d_model has one cosine less
    return positions


def causal_mask(q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk), True = may be attended to. Aligned bottom-right: the last query sees every key."""
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v (eq. 1). q (..., Tq, D), k, v (..., Tk, D), mask broadcasts (..., Tq, Tk).

    Returns the output (..., Tq, D) and the weights (..., Tq, Tk), both 0 where a query may attend to nothing.
    Written out: for sentences of 16 tokens, on a CPU with AMX, this was as fast as
    F.scaled_dot_product_attention in float32, and 8 times faster than its backward in bf16 (torch 2.13). For
    long texts use that one: this holds all Tq x Tk scores.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., Tq, Tk)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: no NaN where all is masked
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """Attention in n_heads subspaces (section 3.2.2). No dropout on the weights: the paper has none.

    Keys and values come as arguments, split into heads, so that a cache can hold them: see keys_values.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, Tk, C) -> keys and values (B, H, Tk, D) each."""
        return self.heads(self.k_proj(context)), self.heads(self.v_proj(context))

    def forward_with_weights(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, Tq, C), mask broadcasts to (B, H, Tq, Tk), True = may be attended to.

        Returns (B, Tq, C) and the weights (B, H, Tq, Tk). A query that may see nothing gets out_proj's bias.
        """
        y, weights = attention(self.heads(self.q_proj(x)), k, v, mask)  # (B, H, Tq, D), (B, H, Tq, Tk)
        return self.out_proj(y.transpose(1, 2).flatten(2)), weights

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.forward_with_weights(x, k, v, mask)[0]  # (B, Tq, C)


class Sublayers(nn.Module):
    """What encoder and decoder layers share: the feed-forward network and the residual connection."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, config.d_model)
        )

    def residual(self, x: Tensor, norm: nn.LayerNorm, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, T, C), same shape back. Post-norm normalises the sum, as in the paper. Pre-norm normalises
        what the sublayer sees and leaves x itself alone, so that gradients reach every layer undamped."""
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))


class EncoderLayer(Sublayers):
    """Self-attention, then the feed-forward network (section 3.1, left half of figure 1)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.self_attention = MultiHeadAttention(config.d_model, config.n_heads)
        self.norm1, self.norm2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, Ts, C), mask broadcasts to (B, H, Ts, Ts). Returns (B, Ts, C)."""

        def attend(h: Tensor) -> Tensor:
            return self.self_attention(h, *self.self_attention.keys_values(h), mask)

        x = self.residual(x, self.norm1, attend)
        return self.residual(x, self.norm2, self.feed_forward)


class DecoderLayer(Sublayers):
    """Causal self-attention, attention to the encoder's output, feed-forward (right half of figure 1)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.self_attention = MultiHeadAttention(config.d_model, config.n_heads)
        self.cross_attention = MultiHeadAttention(config.d_model, config.n_heads)
        self.norm1, self.norm2 = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.norm3 = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor, cache: dict) -> Tensor:
        """x (B, Tt, C): the new positions alone. mask broadcasts to (B, H, Tt, past + Tt), memory_mask to
        (B, H, Tt, Ts). cache holds this layer's keys and values, of the past and of the memory, and is
        extended in place; an empty one means that there is no past. Returns (B, Tt, C)."""

        def attend(h: Tensor) -> Tensor:
            k, v = self.self_attention.keys_values(h)  # (B, H, Tt, D)
            if "self" in cache:
                past_k, past_v = cache["self"]
                k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)  # (B, H, past + Tt, D)
            cache["self"] = k, v
            return self.self_attention(h, k, v, mask)

        def attend_to_memory(h: Tensor) -> Tensor:
            if "memory" not in cache:  # the same at every step: projected once
                cache["memory"] = self.cross_attention.keys_values(memory)  # (B, H, Ts, D)
            return self.cross_attention(h, *cache["memory"], memory_mask)

        x = self.residual(x, self.norm1, attend)
        x = self.residual(x, self.norm2, attend_to_memory)
        return self.residual(x, self.norm3, self.feed_forward)


class Transformer(nn.Module):
    """Encoder and decoder over one vocabulary. Tokens are (B, T) int32 or int64, with pad_id on the right.

    Raises ValueError for tokens of another shape or dtype, and for a sequence longer than max_len.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config, width = config, config.d_model
        self.src_embedding = nn.Embedding(config.vocab_size, width)
        self.tgt_embedding = nn.Embedding(config.vocab_size, width)
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        # What runs up through pre-norm layers has never been normalised: once, at the end. Post-norm's has.
        self.encoder_norm = nn.LayerNorm(width) if config.norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(width) if config.norm_first else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("positions", sinusoidal_positions(config.max_len, width), persistent=False)
        self.reset_parameters()
        if config.tied:
            self.tgt_embedding.weight = self.output.weight = self.src_embedding.weight

    def reset_parameters(self) -> None:
        for layer in (*self.encoder, *self.decoder):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for matrix in (self.src_embedding, self.tgt_embedding, self.output):
            # times sqrt(C) in embed: as large as the position vectors; as the output matrix: logits of size 1
            nn.init.normal_(matrix.weight, std=self.config.d_model**-0.5)

    def embed(self, embedding: nn.Embedding, tokens: Tensor, start: int = 0) -> Tensor:
        """tokens (B, T) at positions start .. start + T - 1 -> (B, T, C)."""
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens must be (B, T) int32 or int64, not {tokens.dtype} {[*tokens.shape]}")
        end = start + tokens.shape[1]
        if end > self.config.max_len:
            raise ValueError(f"a sequence of {end} tokens is longer than max_len={self.config.max_len}")
        return self.dropout(embedding(tokens) * math.sqrt(self.config.d_model) + self.positions[start:end])

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, Ts) -> memory (B, Ts, C) and its mask (B, 1, 1, Ts), False at padding."""
        x = self.embed(self.src_embedding, src)  # (B, Ts, C)
        mask = (src != self.config.pad_id)[:, None, None, :]  # (B, 1, 1, Ts)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor, cache: dict | None = None) -> Tensor:
        """Logits (B, Tt, V) of the token after each of tgt's (B, Tt); tgt begins with bos_id.

        With a cache, tgt holds the new tokens alone. A cache is a dict, empty before the first call, which
        decode extends; it belongs to one memory. memory (B, Ts, C), memory_mask (B, 1, 1, Ts): what encode
        returns. Padding of tgt needs no mask: no real token looks right.
        """
        cache = {} if cache is None else cache  # one path: without a past, a cache that is thrown away
        past = cache[0]["self"][0].shape[2] if cache else 0
        x = self.embed(self.tgt_embedding, tgt, start=past)  # (B, Tt, C)
        batch = memory.shape[0]  # len() would fix the size of an exported model
        if tgt.shape[0] != batch:
            raise ValueError(f"src and tgt must be batches of one size, got {batch} and {tgt.shape[0]}")
        if memory_mask.dtype != torch.bool or memory_mask.shape != (batch, 1, 1, memory.shape[1]):
            raise ValueError(f"memory_mask must be bool (B, 1, 1, Ts), got {[*memory_mask.shape]}")
        mask = causal_mask(tgt.shape[1], past + tgt.shape[1], tgt.device)  # (Tt, past + Tt)
        for i, layer in enumerate(self.decoder):
            x = layer(x, mask, memory, memory_mask, cache.setdefault(i, {}))
        return self.output(self.decoder_norm(x))  # (B, Tt, V)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """src (B, Ts), tgt (B, Tt) from bos_id on -> logits (B, Tt, V), at t from tgt[:, :t + 1] alone."""
        return self.decode(tgt, *self.encode(src))


# -----------------------------------------------------------------------------
# Loss and learning rate


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and float16 have too few digits for a softmax over a vocabulary."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def label_smoothed_loss(logits: Tensor, targets: Tensor, pad_id: int, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy against a target of 1 - smoothing, with smoothing spread evenly over V (section 5.4).

    logits (B, T, V), targets (B, T) integers. Returns the mean over real tokens: padding counts for nothing.
    NaN where there is no real token. Raises ValueError for another shape of targets, a target outside
    0 .. V - 1, smoothing outside [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be {list(logits.shape[:-1])}, got {list(targets.shape)}")
    wrong = (targets < 0) | (targets >= logits.size(-1))
    if wrong.any():
        raise ValueError(f"targets must lie in 0 .. {logits.size(-1) - 1}, got {targets[wrong][0].item()}")
    logits = at_least_float32(logits.flatten(0, 1))  # (B*T, V)
    targets = targets.flatten().long()  # (B*T,)
    return F.cross_entropy(logits, targets, ignore_index=pad_id, label_smoothing=smoothing)


def noam_lr(step: int, d_model: int, warmup: int) -> float:
    """The paper's learning rate (eq. 3): up in a line for warmup steps, then down with 1 / sqrt(step).

    What it's for: Adam's first steps rest on few gradients and are as long as any other, which post-norm
    layers don't survive; and a wider layer sums more weights that move at once, hence 1 / sqrt(d_model).
    Steps count from 1. Raises ValueError for a step or a warmup below 1.
    """
    if step < 1 or warmup < 1:
        raise ValueError(f"step and warmup count from 1, got {step} and {warmup}")
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


# -----------------------------------------------------------------------------
# Search: from a model of the next token to a sentence


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every submodule's own mode is put back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_search(model: Transformer, max_len: int, beam_size: int) -> None:
    """Raises ValueError for a max_len that the model has no positions for, and for an empty beam."""
    if not 1 <= max_len <= model.config.max_len:
        raise ValueError(f"max_len must be in 1 .. {model.config.max_len}, the model's, got {max_len}")
    if beam_size < 1:
        raise ValueError(f"beam_size must be at least 1, got {beam_size}")


def greedy_decode(model: Transformer, src: Tensor, max_len: int, use_cache: bool = True) -> Tensor:
    """The likeliest token at each step, until EOS or until there are max_len of them.

    src (B, Ts) -> (B, T), T <= max_len: BOS left out, EOS kept, then pad_id. A row without EOS was cut off.
    use_cache=False computes every position anew at each step: the loop to check the cache against.
    """
    check_search(model, max_len, beam_size=1)
    with evaluating(model):
        memory, memory_mask = model.encode(src)
        tokens = torch.full((len(src), 1), model.config.bos_id, device=src.device)  # (B, 1)
        finished = torch.zeros(len(src), dtype=torch.bool, device=src.device)  # (B,)
        cache: dict = {}
        while tokens.shape[1] <= max_len and not finished.all():
            if use_cache:
                logits = model.decode(tokens[:, -1:], memory, memory_mask, cache)  # (B, 1, V)
            else:
                logits = model.decode(tokens, memory, memory_mask)  # (B, T, V)
            best = logits[:, -1].argmax(-1).masked_fill(finished, model.config.pad_id)  # (B,)
            tokens = torch.cat((tokens, best[:, None]), dim=1)  # (B, T + 1)
            finished |= best == model.config.eos_id
    return tokens[:, 1:]


def beam_search(
    model: Transformer, src: Tensor, max_len: int, beam_size: int = 4, length_penalty: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Keeps the beam_size likeliest beginnings of each sentence instead of one.

    A hypothesis that has its EOS is frozen: it keeps its log-probability, and its place while that is among
    the best. At the end each log-probability is divided by ((5 + n) / 6) ** length_penalty, n its tokens
    with EOS (Wu et al., eq. 14): log-probabilities only fall with length, and this makes up for it. One cut
    off at max_len is a hypothesis too. The likeliest sentence is lost if its beginning falls out of the beam.
    src (B, Ts) -> tokens (B, T) as greedy_decode returns them, and their divided log-probabilities (B,).
    """
    check_search(model, max_len, beam_size)
    batch, vocab, device = len(src), model.config.vocab_size, src.device
    with evaluating(model):
        memory, memory_mask = (x.repeat_interleave(beam_size, dim=0) for x in model.encode(src))  # (B*K, ...)
        tokens = torch.full((batch * beam_size, 1), model.config.bos_id, device=device)  # (B*K, 1)
        finished = torch.zeros(batch, beam_size, dtype=torch.bool, device=device)  # (B, K)
        lengths = torch.zeros(batch, beam_size, dtype=torch.long, device=device)  # (B, K)
        first_rows = torch.arange(batch, device=device)[:, None] * beam_size  # (B, 1) of a sentence's K rows
        log_probs = at_least_float32(memory.new_full((batch, beam_size), -torch.inf))  # (B, K)
        log_probs[:, 0] = 0.0  # K equal beginnings would stay equal: all but one start with probability 0
        only_pad = log_probs.new_full((vocab,), -torch.inf)
        only_pad[model.config.pad_id] = 0.0  # what follows a finished hypothesis, at no cost
        cache: dict = {}
        while tokens.shape[1] <= max_len and not finished.all():
            logits = model.decode(tokens[:, -1:], memory, memory_mask, cache)  # (B*K, 1, V)
            following = at_least_float32(logits).log_softmax(-1).view(batch, beam_size, vocab)
            following = torch.where(finished[..., None], only_pad, following)  # (B, K, V)
            log_probs, choice = (log_probs[..., None] + following).flatten(1).topk(beam_size)  # (B, K)
            parent, token = choice // vocab, choice % vocab  # (B, K) each
            rows = (first_rows + parent).flatten()  # (B*K,) the row that each survivor continues
            tokens = torch.cat((tokens[rows], token.view(-1, 1)), dim=1)  # (B*K, T + 1)
            for layer in cache.values():  # of the memory nothing moves: it is the same for a sentence's rows
                layer["self"] = tuple(x[rows] for x in layer["self"])
            was_finished = finished.gather(1, parent)
            lengths = lengths.gather(1, parent) + ~was_finished
            finished = was_finished | (token == model.config.eos_id)
        divisor = ((5 + lengths.to(log_probs)) / 6) ** length_penalty  # in log_probs' precision
        scores, best = (log_probs / divisor).max(dim=1)  # (B,) each
        chosen = first_rows[:, 0] + best  # (B,)
    longest = int(lengths.flatten()[chosen].max()) if batch else 0
    return tokens[chosen, 1 : 1 + longest], scores


# -----------------------------------------------------------------------------
# What follows trains and measures it: settings, data, training, evaluation, command line


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    """Every field is a flag. The defaults are those of --preset numbers."""

    preset: str = setting("numbers", "numbers (generated, English to German) or multi30k (German to English)")
    data: str = setting("", "multi30k: folder of its files; else MULTI30K_DATA, else they are downloaded")
    translate: str = setting(None, "translate this with the saved model, no training; - reads stdin's lines")
    out: str = setting("out/transformer", "checkpoint, model, picture and report.json go here")
    seed: int = setting(0, "same seed and threads, same weights")
    device: str = setting("auto", "auto (cuda, then cpu), cuda, cpu or mps")
    amp: str = setting("auto", "bf16 or off; auto is bf16 where the hardware multiplies it natively")
    vocab_size: int = setting(600, "at most: 3 special tokens, 256 bytes, merges learned in training")
    max_len: int = setting(32, "tokens of a sentence with EOS; a longer one is an error")
    d_model: int = setting(64, "width")
    n_heads: int = setting(4, "heads of d_model / n_heads features")
    n_layers: int = setting(2, "layers in the encoder, and as many in the decoder")
    d_ff: int = setting(256, "inner width of the feed-forward networks")
    dropout: float = setting(0.0, "generated numbers have no noise to fit")
    norm_first: bool = setting(True, "pre-norm: a short warm-up is enough")
    tied: bool = setting(True, "one matrix for both embeddings and the output")
    epochs: int = setting(5, "passes over the training set")
    batch_tokens: int = setting(1024, "most tokens of a batch, on its longer side, padding included")
    warmup: int = setting(100, "steps of rising learning rate")
    lr_scale: float = setting(0.4, "times noam_lr")
    smoothing: float = setting(0.1, "label smoothing (section 5.4)")
    weight_decay: float = setting(0.01, "of matrices")
    clip: float = setting(1.0, "longer gradients are scaled down to this norm")
    average: int = setting(2, "final weights: mean over the ends of this many last epochs (section 6.1)")
    save_every: int = setting(100, "steps between checkpoints")
    beam_size: int = setting(4, "hypotheses that beam search keeps")
    length_penalty: float = setting(0.6, "exponent of Wu et al., eq. 14: 0 none, more favours long sentences")


PRESETS = {
    "numbers": {},  # the defaults above
    "multi30k": {"out": "out/transformer_multi30k"}  # chosen on the dev set, for half an hour on two cores
    | {"vocab_size": 4000, "max_len": 100, "d_model": 256, "n_layers": 3, "d_ff": 512, "dropout": 0.3}
    | {"epochs": 25, "batch_tokens": 2048, "warmup": 600, "lr_scale": 0.7, "average": 8, "beam_size": 5},
}
MAY_CHANGE = "data translate out device save_every beam_size length_penalty".split()  # between two starts


class Tokenizer:
    """Byte-level BPE in lower case. Every text has tokens; bytes that training never saw have untrained ones.

    A text gets a space in front, so that its first word has the token that it has elsewhere.
    """

    pattern = r" ?\w+| ?[^\w\s]+|\s+"  # merges stay within these
    pad_id, bos_id, eos_id, n_special = 0, 1, 2, 3

    def __init__(self, vocabulary: list[bytes]):
        import tiktoken

        self.vocabulary = vocabulary
        ranks = {token: rank for rank, token in enumerate(vocabulary)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        import rustbpe

        n_merged = vocab_size - cls.n_special
        if n_merged < 256:
            raise ValueError(f"vocab_size must be at least {256 + cls.n_special}, got {vocab_size}")
        trained = rustbpe.Tokenizer()
        trained.train_from_iterator(map(cls.normalise, texts), n_merged, pattern=cls.pattern)
        by_rank = sorted(trained.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in by_rank])

    @staticmethod
    def normalise(text: str) -> str:
        return " " + text.strip().lower()

    @property
    def vocab_size(self) -> int:
        return self.n_special + len(self.vocabulary)

    def encode(self, text: str, max_len: int) -> list[int]:
        """Token ids with EOS. Raises ValueError where there are more than max_len."""
        ids = [i + self.n_special for i in self.bpe.encode_ordinary(self.normalise(text))] + [self.eos_id]
        if len(ids) > max_len:
            raise ValueError(f"{len(ids)} tokens with EOS are more than max_len={max_len}: {text[:60]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of what isn't special; bytes that are no UTF-8 become U+FFFD."""
        return self.bpe.decode([i - self.n_special for i in ids if i >= self.n_special]).strip()


# -----------------------------------------------------------------------------
# Data: numbers in words, generated

EN = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
EN += "fifteen sixteen seventeen eighteen nineteen".split()
EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DE = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn".split()
DE += "fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english_number(n: int) -> str:
    """342000 -> "three hundred and forty-two thousand", for 0 <= n < 1,000,000."""
    if n < 20:
        return EN[n]
    if n < 100:
        return EN_TENS[n // 10] + (f"-{EN[n % 10]}" if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    head, rest = f"{english_number(n // unit)} {name}", n % unit
    return head if not rest else f"{head}{' and ' if rest < 100 else ' '}{english_number(rest)}"


def german_number(n: int, one: str = "eins") -> str:
    """342000 -> "dreihundert zwei und vierzig tausend": units before tens. one: "ein" where more follows."""
    if n < 20:
        return one if n == 1 else DE[n]
    if n < 100:
        return (f"{german_number(n % 10, 'ein')} und " if n % 10 else "") + DE_TENS[n // 10]
    unit, name = (1000, " tausend") if n >= 1000 else (100, "hundert")
    head, rest = german_number(n // unit, "ein") + name, n % unit
    return head if not rest else f"{head} {german_number(rest, one)}"


@dataclass
class Corpus:
    """Pairs of texts (source, target)."""

    name: str
    train: list[tuple[str, str]]
    dev: list[tuple[str, str]]
    test: list[tuple[str, str]]


def number_corpus(seed: int, n_train: int = 8_000, n_dev: int = 500, n_test: int = 1000) -> Corpus:
    """Different numbers in each part; short and round ones are frequent, as they are in life."""
    rng = random.Random(seed)

    def three_digits() -> int:
        return rng.randrange(10 ** rng.randint(0, 3)) * 10 ** rng.randint(0, 2) % 1000

    drawn: dict[int, None] = {}  # a set that keeps its order
    while len(drawn) < n_train + n_dev + n_test:
        drawn[1000 * three_digits() + three_digits()] = None
    numbers = list(drawn)
    rng.shuffle(numbers)  # the frequent ones came first
    pairs = [(english_number(n), german_number(n)) for n in numbers]
    return Corpus("numbers", pairs[:n_train], pairs[n_train : n_train + n_dev], pairs[n_train + n_dev :])


# -----------------------------------------------------------------------------
# Data: Multi30k (Elliott et al. 2016)

MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K = {  # file -> lines, bytes and sha256 of the text in it
    "train.de": (29000, 2110398, "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
    "train.en": (29000, 1801238, "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
    "val.de": (1014, 75981, "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
    "val.en": (1014, 63297, "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
    "test_2016_flickr.de": (1000, 70649, "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
    "test_2016_flickr.en": (1000, 62076, "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
}
FREQUENT_WORDS = {"de": "der die das ein eine einem und".split(), "en": "the a an of and with on".split()}


def download(url: str) -> bytes:
    """Raises ValueError where there is no network or answer, or where it breaks off."""
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:  # the latter where it breaks off
        raise ValueError(f"can't download {url} ({error}); --data takes a folder that holds it") from None


def read_multi30k(name: str, folder: str) -> tuple[bytes, bool]:
    """The text of one file, and whether it is the official one: from folder, else from cache or network.

    Raises ValueError where it is missing, damaged or altered. (In a folder of one's own, a file with another
    number of lines than the official one is taken for another corpus.)
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "multi30k")
    path = Path(folder or cache, f"{name}.gz")
    if folder and not path.exists():
        path = path.with_suffix("")  # unpacked
        if not path.exists():
            raise ValueError(f"{folder} has neither {name}.gz nor {name}; it needs {', '.join(MULTI30K)}")
    source = path if path.exists() else f"{MULTI30K_URL}{name}.gz"
    packed = path.read_bytes() if source == path else download(source)
    try:
        text = gzip.decompress(packed) if path.suffix == ".gz" else packed
        text.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is damaged: {error}") from None
    n_lines, n_bytes, sha256 = MULTI30K[name]
    official = hashlib.sha256(text).hexdigest() == sha256
    found = text.removesuffix(b"\n").count(b"\n") + 1  # also where the last line is cut
    if not official and (found == n_lines or not folder):
        expected = f"{n_lines} and {n_bytes}, sha256 {sha256[:12]}…"
        raise ValueError(f"{source} was altered: {found} lines, {len(text)} bytes, expected {expected}")
    if source != path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, packed)
    return text, official


def check_lines(name: str, lines: list[str], language: str, other: str) -> None:
    """Raises ValueError for a file that has an empty line or looks like the other language."""
    if "" in lines:
        raise ValueError(f"{name}: line {lines.index('') + 1} is empty")
    words = " ".join(lines).lower().split()
    own, others = (sum(word in FREQUENT_WORDS[code] for word in words) for code in (language, other))
    if own < others:
        raise ValueError(f"{name} isn't in its language: common words: {own} {language}, {others} {other}")


def multi30k_corpus(folder: str) -> Corpus:
    """German to English. Another corpus in files of these names is called "own" in the report.

    Raises ValueError for files that are missing, damaged, altered, unequally long or in the wrong language.
    """
    parts, all_official = [], True
    for part in ("train", "val", "test_2016_flickr"):
        sides = []
        for language, other in (("de", "en"), ("en", "de")):
            text, official = read_multi30k(f"{part}.{language}", folder)
            all_official &= official
            sides.append([line.strip() for line in text.decode("utf-8").removesuffix("\n").split("\n")])
            check_lines(f"{part}.{language}", sides[-1], language, other)
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{part}: {len(sides[0])} lines in German, {len(sides[1])} in English")
        parts.append(list(zip(*sides, strict=True)))
    return Corpus("multi30k" if all_official else "own", *parts)


# -----------------------------------------------------------------------------
# Batches and files


def token_batches(lengths: list[int], batch_tokens: int, seed: str) -> list[list[int]]:
    """Indices of sentences of similar length, as many as fit: number x longest <= batch_tokens, one at least.

    Every index occurs once. Which equally long sentences meet and in what order depends on the seed.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda i: lengths[i])  # stable: equals stay shuffled
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches


def pad(rows: list[list[int]], pad_id: int, device: str) -> Tensor:
    """(B, T) ids, T the longest row's length, pad_id on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save(path: Path, content: dict) -> None:
    """content: tensors, numbers, strings, bytes, lists and dicts alone, so that load can read it safely."""
    buffer = io.BytesIO()  # a full disk is then an OSError of write_atomically
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, kind: str) -> dict:
    """What save wrote; runs no code from the file. Raises ValueError where it is damaged or another thing."""
    data = path.read_bytes()
    try:
        if altered := zipfile.ZipFile(io.BytesIO(data)).testzip():  # checks the checksums: torch.load doesn't
            raise ValueError(f"{altered} was altered")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch have many, some without a message
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or isn't a {kind}: {reason}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} isn't a {kind}")
    return content


# -----------------------------------------------------------------------------
# Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: matrices decay; biases and norms don't. A tied matrix comes once."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def precision(s: Settings) -> str:
    """bf16 only where the hardware multiplies it: elsewhere it is several times slower than float32."""
    device = torch.device(s.device).type  # "cuda:1" is cuda
    if device == "cpu":
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    else:
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if s.amp == "bf16" or (s.amp == "auto" and native) else "float32"


class Training:
    """All that a step depends on: a run that goes on from a checkpoint gives the same weights, bit for bit.

    Batches are a function of (seed, epoch), dropout of (seed, step): there is no generator's state to save.
    """

    def __init__(self, s: Settings, tokenizer: Tokenizer, train: list, dev: list):
        """train and dev: pairs of token ids (source, target), both with EOS."""
        self.s, self.tokenizer, self.train, self.dev = s, tokenizer, train, dev
        self.corpus = zlib.crc32(repr((train, dev)).encode())
        torch.manual_seed(s.seed)
        self.model = Transformer(model_config(s, tokenizer.vocab_size)).to(s.device)
        groups = parameter_groups(self.model, s.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
        self.progress = {"epoch": 0, "batch": 0, "step": 0, "loss": 0.0, "tokens": 0, "seconds": 0.0}
        self.history: list[dict] = []  # a row per epoch
        self.average: dict[str, Tensor] = {}  # mean of the weights at the ends of the last epochs

    def save(self) -> None:
        content = {"kind": "checkpoint", "settings": asdict(self.s), "vocabulary": self.tokenizer.vocabulary}
        content |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        content |= {"progress": self.progress, "history": self.history, "average": self.average}
        content["corpus"] = self.corpus
        save(Path(self.s.out, "checkpoint.pt"), content)

    def restore(self, checkpoint: dict) -> None:
        if checkpoint.get("corpus") != self.corpus:
            raise ValueError(f"{self.s.out} holds a run on other sentences: another one needs another --out")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.progress, self.history = checkpoint["progress"], checkpoint["history"]
        self.average = {name: mean.to(self.s.device) for name, mean in checkpoint["average"].items()}

    def loss(self, pairs: list, smoothing: float) -> tuple[Tensor, int]:
        """Mean loss over the pairs' real target tokens, and their number."""
        src = pad([src for src, _ in pairs], self.tokenizer.pad_id, self.s.device)  # (B, Ts)
        targets = pad([tgt for _, tgt in pairs], self.tokenizer.pad_id, self.s.device)  # (B, Tt) with EOS
        bos = torch.full_like(targets[:, :1], self.tokenizer.bos_id)
        tgt = torch.cat((bos, targets[:, :-1]), dim=1)  # (B, Tt) each token is predicted from those before it
        with torch.autocast(src.device.type, torch.bfloat16, enabled=precision(self.s) == "bf16"):
            logits = self.model(src, tgt)  # (B, Tt, V)
        loss = label_smoothed_loss(logits, targets, self.tokenizer.pad_id, smoothing)
        return loss, sum(len(tgt) for _, tgt in pairs)

    def step(self, pairs: list) -> None:
        progress, s = self.progress, self.s
        torch.manual_seed(s.seed * 1_000_003 + progress["step"])  # dropout's
        progress["step"] += 1
        progress["batch"] += 1
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr_scale * noam_lr(progress["step"], s.d_model, s.warmup)
        loss, n_tokens = self.loss(pairs, s.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        progress["loss"] += loss.item() * n_tokens
        progress["tokens"] += n_tokens

    def dev_loss(self) -> float:
        """Cross-entropy a token, without smoothing."""
        total = count = 0
        with evaluating(self.model):
            for batch in token_batches([len(tgt) for _, tgt in self.dev], self.s.batch_tokens, "dev"):
                loss, n_tokens = self.loss([self.dev[i] for i in batch], smoothing=0.0)
                total, count = total + loss.item() * n_tokens, count + n_tokens
        return total / count

    def end_epoch(self) -> None:
        """Takes the weights into the average, shows the losses, and moves progress to the next epoch."""
        progress, s = self.progress, self.s
        n_averaged = progress["epoch"] + 1 - max(0, s.epochs - s.average)  # this one included
        if n_averaged > 0:
            for name, weight in self.model.state_dict().items():
                mean = self.average.get(name, torch.zeros_like(weight))
                self.average[name] = mean + (weight - mean) / n_averaged
        epoch, dev_loss = progress["epoch"] + 1, self.dev_loss()
        train_loss = progress["loss"] / progress["tokens"]
        if not math.isfinite(train_loss):
            raise ValueError(
                f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr-scale and another --out"
            )
        losses = f"train loss {train_loss:.4f} (smoothed), dev loss {dev_loss:.4f}"
        print(f"epoch {epoch}/{s.epochs}: {losses}, {progress['seconds']:.0f} s", flush=True)
        self.history.append({"epoch": epoch, "train_loss": train_loss, "dev_loss": dev_loss})
        progress |= {"epoch": epoch, "batch": 0, "loss": 0.0, "tokens": 0}

    def run(self) -> None:
        """To the end of the last epoch from wherever progress says; leaves the averaged weights in place."""
        from tqdm import tqdm

        progress, s = self.progress, self.s
        lengths = [max(len(src), len(tgt)) for src, tgt in self.train]
        terminal, shown = sys.stderr.isatty(), time.perf_counter()
        while progress["epoch"] < s.epochs:
            batches = token_batches(lengths, s.batch_tokens, f"{s.seed} {progress['epoch']}")
            bar = tqdm(total=len(batches), initial=progress["batch"], leave=False, disable=not terminal)
            while progress["batch"] < len(batches):
                start = time.perf_counter()
                self.step([self.train[i] for i in batches[progress["batch"]]])
                progress["seconds"] += time.perf_counter() - start
                bar.update()
                if progress["step"] % s.save_every == 0:
                    self.save()
                if not terminal and start - shown > 30:
                    shown = start
                    place = f"epoch {progress['epoch'] + 1}: batch {progress['batch']} of {len(batches)}"
                    print(place, file=sys.stderr)
            bar.close()
            self.end_epoch()
            self.save()
        self.model.load_state_dict(self.average)


# -----------------------------------------------------------------------------
# Evaluation


@dataclass
class Translation:
    """What a search found, and what the model thinks of it."""

    text: str = ""
    log_prob: float = 0.0  # of all tokens, undivided
    n_tokens: int = 0  # with EOS
    finished: bool = True  # False: cut off at max_len


def sequence_log_probs(model: Transformer, src: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the model thinks of outputs, whoever found them: src (B, Ts), tokens (B, T) as from greedy_decode.

    Returns, (B,) each, their log-probability up to EOS, number of tokens with EOS, whether they have one.
    """
    with evaluating(model):
        bos = torch.full_like(tokens[:, :1], model.config.bos_id)
        logits = model(src, torch.cat((bos, tokens[:, :-1]), dim=1))  # (B, T, V)
        log_probs = at_least_float32(logits).log_softmax(-1).gather(2, tokens[..., None])[..., 0]  # (B, T)
        is_eos = tokens == model.config.eos_id
        real = is_eos.cumsum(1) - is_eos.long() == 0  # (B, T) no EOS before this token
        return (log_probs * real).sum(1), real.sum(1), is_eos.any(1)


def translate(model: Transformer, tokenizer: Tokenizer, texts: list[str], search) -> list[Translation]:
    """search: src (B, Ts) -> tokens (B, T). In batches of similar length; an empty text stays empty.

    Raises ValueError for a text longer than the model's max_len, before any work.
    """
    rows = [tokenizer.encode(text, model.config.max_len) for text in texts]
    results = [Translation() for _ in texts]
    by_length = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(rows[i]))
    for start in range(0, len(by_length), 64):
        batch = by_length[start : start + 64]
        src = pad([rows[i] for i in batch], tokenizer.pad_id, model.positions.device)
        tokens = search(src)
        columns = [column.tolist() for column in (tokens, *sequence_log_probs(model, src, tokens))]
        for i, ids, log_prob, n_tokens, finished in zip(batch, *columns, strict=True):
            results[i] = Translation(tokenizer.decode(ids[:n_tokens]), log_prob, n_tokens, finished)
    return results


def beam_of(model: Transformer, max_len: int, beam_size: int, length_penalty: float) -> Callable:
    """beam_search with its settings filled in, without the scores."""
    return lambda src: beam_search(model, src, max_len, beam_size, length_penalty)[0]


def quality(corpus: Corpus, translations: list[Translation]) -> tuple[str, float, str]:
    """Measure, value, and how it was taken: the share that is exactly right, or BLEU of lower-cased text."""
    found, references = [t.text for t in translations], [target for _, target in corpus.test]
    if corpus.name == "numbers":
        return "exact_match", sum(map(str.__eq__, found, references)) / len(references), "whole strings"
    import sacrebleu

    bleu = sacrebleu.BLEU(lowercase=True)
    return "bleu", bleu.corpus_score(found, [references]).score, str(bleu.get_signature())


def evaluate(model: Transformer, tokenizer: Tokenizer, corpus: Corpus, s: Settings) -> dict:
    """Greedy and beam search over the test set: a table, samples, and what the report says of it."""
    texts = [source for source, _ in corpus.test]
    searches = {"greedy": lambda src: greedy_decode(model, src, s.max_len)}
    chosen, unpenalised = (f"beam {s.beam_size}, penalty {penalty:g}" for penalty in (s.length_penalty, 0))
    for penalty in sorted({0.0, s.length_penalty, 2.0}):
        searches[f"beam {s.beam_size}, penalty {penalty:g}"] = beam_of(model, s.max_len, s.beam_size, penalty)
    found = {name: translate(model, tokenizer, texts, search) for name, search in searches.items()}
    table = {}
    for name, rows in found.items():
        measure, value, signature = quality(corpus, rows)
        means = {key: statistics.fmean(getattr(t, key) for t in rows) for key in ("log_prob", "n_tokens")}
        table[name] = {measure: value} | means | {"cut_off": sum(not t.finished for t in rows)}
    print(f"\ntest set, {len(texts)} sentences; {measure}: {signature}")
    print(f"{'search':22}{measure:>12}{'mean log-prob':>15}{'mean tokens':>13}{'cut off':>9}")
    for name, row in table.items():
        value, log_prob, n_tokens, cut_off = row.values()
        print(f"{name:22}{value:12.4g}{log_prob:15.4f}{n_tokens:13.2f}{cut_off:9}")
    gains = [b.log_prob - g.log_prob for b, g in zip(found[unpenalised], found["greedy"], strict=True)]
    better, worse = sum(gain > 1e-3 for gain in gains), sum(gain < -1e-3 for gain in gains)  # beyond rounding
    print(f"without penalty, the beam's sentence is likelier than greedy's {better} times,")
    print(f"less likely (a search error) {worse} times")
    show_samples(corpus, found[chosen])
    report = {"measure": measure, "signature": signature, "searches": table}
    report |= {"greedy": table["greedy"][measure], "beam": table[chosen][measure]}
    return report | {"search_gains": better, "search_errors": worse}


def show_samples(corpus: Corpus, translations: list[Translation]) -> None:
    """Prints the first five translations of the test set; of the numbers, the first five mistakes."""
    rows = [(source, target, t.text) for (source, target), t in zip(corpus.test, translations, strict=True)]
    if corpus.name == "numbers":
        rows = [row for row in rows if row[1] != row[2]]
        print(f"{len(rows)} mistakes" + (", the first five:" if len(rows) > 5 else ""))
    for row in rows[:5]:
        print("  source    {}\n  reference {}\n  found     {}\n".format(*row))


def cross_attention_weights(model: Transformer, src: Tensor, tgt: Tensor) -> Tensor:
    """Where each target position looks: (L, B, H, Tt, Ts). src (B, Ts), tgt (B, Tt) from BOS on."""
    weights: list[Tensor] = []

    def keep(module: MultiHeadAttention, inputs: tuple) -> None:
        weights.append(module.forward_with_weights(*inputs)[1])

    hooks = [layer.cross_attention.register_forward_pre_hook(keep) for layer in model.decoder]
    try:
        with evaluating(model):
            model(src, tgt)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)


def plot_alignment(model: Transformer, tokenizer: Tokenizer, text: str, path: Path) -> None:
    """Picture of a translation: what was looked at (columns) when each token was found (rows)."""
    from matplotlib.figure import Figure

    ids = tokenizer.encode(text, model.config.max_len)
    src = pad([ids], tokenizer.pad_id, model.positions.device)  # (1, Ts)
    found = greedy_decode(model, src, model.config.max_len)  # (1, Tt)
    tgt = torch.cat((torch.full_like(found[:, :1], tokenizer.bos_id), found[:, :-1]), dim=1)
    weights = cross_attention_weights(model, src, tgt)[-1, 0].mean(0)  # (Tt, Ts)
    columns, rows = ([tokenizer.decode([i]) or "EOS" for i in ids[0].tolist()] for ids in (src, found))
    fig = Figure(figsize=(2.5 + 0.4 * len(columns), 1.5 + 0.35 * len(rows)), layout="constrained")
    axes, png = fig.subplots(), io.BytesIO()
    image = axes.imshow(weights.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="source token", ylabel="token found", title="cross-attention, last layer, mean of heads")
    fig.colorbar(image, label="weight")
    fig.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())


def cache_speedup(s: Settings) -> float:
    """How many times faster the cache decodes 64 tokens of 32 sentences: median of alternating runs."""
    config = model_config(s, s.vocab_size)
    config.max_len = 64
    model = Transformer(config).to(s.device)
    src = torch.randint(3, config.vocab_size, (32, 16), device=s.device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for use_cache in (True, False) * 3:
        start = time.perf_counter()
        greedy_decode(model, src, 64, use_cache)
        seconds[use_cache].append(time.perf_counter() - start)
    return statistics.median(seconds[False]) / statistics.median(seconds[True])


# -----------------------------------------------------------------------------
# Command line


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    """The preset's settings, but for what the command line says. ValueError for what no run can have."""
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=list(PRESETS), default="numbers")
    defaults = PRESETS[preset.parse_known_args(argv)[0].preset]
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    for f in fields(Settings):
        default = defaults.get(f.name, f.default)
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        choices = {"preset": list(PRESETS), "amp": ["auto", "bf16", "off"]}.get(f.name)
        kind |= {"choices": choices} if choices else {}
        reason = f"{f.metadata['help']} (default: {default})"
        parser.add_argument("--" + f.name.replace("_", "-"), default=default, help=reason, **kind)
    s = Settings(**vars(parser.parse_args(argv)))
    for name in "epochs batch_tokens warmup average save_every beam_size lr_scale clip".split():
        if not getattr(s, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(s, name)}")
    if not math.isfinite(s.length_penalty):
        raise ValueError(f"--length-penalty must be a finite number, got {s.length_penalty}")
    if not 0 <= s.smoothing < 1:
        raise ValueError(f"--smoothing must be in [0, 1), got {s.smoothing}")
    if s.data and s.preset != "multi30k":
        raise ValueError("--data belongs to --preset multi30k: the numbers are generated")
    s.length_penalty += 0.0  # -0.0 is 0
    s.device = s.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=s.device).item()  # meta has no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {s.device} can't be used: {str(error).splitlines()[0]}") from None
    return s


def model_config(s: Settings, vocab_size: int) -> TransformerConfig:
    """What of the settings shapes the model; the special ids' defaults are the tokenizer's."""
    names = ("max_len", "d_model", "n_heads", "n_layers", "d_ff", "dropout", "norm_first", "tied")
    return TransformerConfig(vocab_size, **{name: getattr(s, name) for name in names})


def prepare(s: Settings) -> tuple[Corpus, Training]:
    """The data, and a training at its beginning or where out's checkpoint stands."""
    if s.preset == "multi30k":
        corpus = multi30k_corpus(s.data or os.environ.get("MULTI30K_DATA", ""))
    else:
        corpus = number_corpus(s.seed)
    path = Path(s.out, "checkpoint.pt")
    checkpoint = load(path, "checkpoint") if path.exists() else None
    if checkpoint:
        for name, value in asdict(s).items():
            before = checkpoint["settings"].get(name)
            if name not in MAY_CHANGE and before != value:
                raise ValueError(f"{path} has {name}={before}, not {value}: another run needs another --out")
        tokenizer = Tokenizer(checkpoint["vocabulary"])
    else:
        tokenizer = Tokenizer.train([text for pair in corpus.train for text in pair], s.vocab_size)
    train, dev = (
        [tuple(tokenizer.encode(text, s.max_len) for text in pair) for pair in pairs]
        for pairs in (corpus.train, corpus.dev)
    )
    training = Training(s, tokenizer, train, dev)
    if checkpoint:
        training.restore(checkpoint)
        state = "training was finished" if training.progress["epoch"] == s.epochs else "going on"
        print(f"{path}: {state} after step {training.progress['step']}")
    return corpus, training


def cost(training: Training) -> dict:
    """Seconds, the machine they were measured on, and the share of its float32 peak that training reached
    (mfu; in bf16 that may be above 1)."""
    a, gemm = torch.rand(1024, 1024, device=training.s.device), []
    for _ in range(7):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        gemm.append(time.perf_counter() - start)
    gflops = 2 * 1024**3 / statistics.median(gemm) / 1e9
    model, s = training.model, training.s
    n_encoder = sum(p.numel() for p in model.encoder.parameters())
    n_decoder = sum(p.numel() for p in model.decoder.parameters()) + model.output.weight.numel()
    n_src, n_tgt = (s.epochs * sum(len(pair[side]) for pair in training.train) for side in (0, 1))
    flops = 6 * (n_encoder * n_src + n_decoder * n_tgt)  # a parameter and token: 2 forward, 4 backward
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    seconds, steps = training.progress["seconds"], training.progress["step"]
    report = {"train_seconds": round(seconds, 1), "mfu": round(flops / seconds / gflops / 1e9, 3)}
    report |= {"steps": steps, "device": s.device, "precision": precision(s), "torch": torch.__version__}
    return report | {"cpu": cpu, "threads": torch.get_num_threads(), "gemm_gflops": round(gflops, 1)}


def train_and_evaluate(s: Settings) -> dict:
    """Trains, writes model.pt and alignment.png into s.out, returns the report."""
    start = time.perf_counter()
    for name in ("matplotlib", "sacrebleu")[: 1 + (s.preset == "multi30k")]:
        importlib.import_module(name)  # needed at the end: one that is missing is known at once
    corpus, training = prepare(s)
    model, tokenizer = training.model, training.tokenizer
    n_parameters = sum(p.numel() for p in model.parameters())
    n_pairs = ", ".join(f"{len(getattr(corpus, part))} {part}" for part in ("train", "dev", "test"))
    print(f"{corpus.name}: {n_pairs} pairs; vocabulary {tokenizer.vocab_size}; {n_parameters:,} parameters")
    training.run()
    content = {"kind": "model", "settings": asdict(s), "config": asdict(model.config)}
    save(Path(s.out, "model.pt"), content | {"vocabulary": tokenizer.vocabulary, "model": model.state_dict()})
    report = {"preset": s.preset, "dataset": corpus.name} | evaluate(model, tokenizer, corpus, s)
    short = [source for source, _ in corpus.test if len(source.split()) <= 14]  # fits into a picture
    sample = max(short or [corpus.test[0][0]], key=len)
    plot_alignment(model, tokenizer, sample, Path(s.out, "alignment.png"))
    speedup = cache_speedup(s)
    print(f"with the cache, 64 tokens of 32 sentences are decoded {speedup:.1f} x faster")
    report |= {"n_parameters": n_parameters, "cache_speedup": round(speedup, 1)} | cost(training)
    report |= {"seconds": round(time.perf_counter() - start, 1), "history": training.history}
    return report | {"settings": asdict(s)}


def translate_command(s: Settings) -> None:
    """Prints one JSON object a line: source, and what Translation holds."""
    path = Path(s.out, "model.pt")
    if not path.exists():
        raise ValueError(f"{path} doesn't exist: train first, with the same command without --translate")
    saved = load(path, "model")
    model = Transformer(TransformerConfig(**saved["config"])).to(s.device)
    model.load_state_dict(saved["model"])
    texts = sys.stdin.read().splitlines() if s.translate == "-" else [s.translate]
    search = beam_of(model, model.config.max_len, s.beam_size, s.length_penalty)
    translations = translate(model, Tokenizer(saved["vocabulary"]), texts, search)
    for text, translation in zip(texts, translations, strict=True):
        print(json.dumps({"source": text} | asdict(translation), ensure_ascii=False))


def main() -> None:
    s = settings_from_command_line()
    if s.translate is not None:
        return translate_command(s)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=s.out).close()  # a place that can't be written is known before the work
    print(" ".join(f"{k}={v}" for k, v in asdict(s).items()), f"precision={precision(s)}")
    print(f"torch={torch.__version__} threads={torch.get_num_threads()}")
    report = train_and_evaluate(s)
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        print(f"{Path(__file__).name}: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:  # what a user can mend: one line, no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
