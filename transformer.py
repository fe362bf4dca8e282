"""The Transformer of "Attention Is All You Need", decoded with a KV cache, searched with a beam.

Two CPU cores, bf16, torch 2.13.0: 18 s; all of 1,000 numbers that it never saw come out right.
Multi30k German to English, 5 M parameters, 30 minutes: 40.5 BLEU greedy, 41.6 with beam 5.

    python transformer.py  # numbers in words, English to German: no data
    python transformer.py --translate "forty-two thousand"  # by that model; - reads stdin
    python transformer.py --preset multi30k  # German to English, BLEU on test_2016_flickr
    python transformer.py --preset multi30k --translate "ein hund rennt über die wiese"

The same command, started again, goes on where it stopped. Model, loss, search come first.

Vaswani et al. 2017, arXiv:1706.03762.
Wu et al. 2016, arXiv:1609.08144 (length penalty).
Xiong et al. 2020, arXiv:2002.04745 (pre-norm).
"""

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import urllib.request
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# The model. B batch, T length (Ts source, Tt target), C = d_model, H heads, D = C // H


@dataclass
class TransformerConfig:
    """The defaults are the paper's base model (table 3): 63,082,496 parameters."""

    vocab_size: int = 37_000  # of both languages
    max_len: int = 512  # longer input is an error
    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 6  # in the encoder, and in the decoder
    d_ff: int = 2048
    dropout: float = 0.1  # of sub-layers' outputs and of embeddings
    norm_first: bool = False  # the paper's post-norm; True: pre-norm, which needs less warm-up
    tied: bool = True  # both embeddings and the output projection share one matrix
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self):
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide d_model={self.d_model}")
        special = {self.pad_id, self.bos_id, self.eos_id}
        if len(special) < 3 or min(special) < 0 or max(special) >= self.vocab_size:
            raise ValueError(f"pad_id, bos_id, eos_id must differ, below vocab_size: {special}")


def sinusoidal_positional_encoding(max_len: int, d_model: int) -> Tensor:
    """Positions as waves (section 3.5): feature 2i is sin(t / 10000^(2i / C)), 2i + 1 its cosine.
    Returns (max_len, C) float32; an odd C has one sine more than cosines."""
    t = torch.arange(max_len, dtype=torch.float64)[:, None]  # (T, 1)
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)  # (ceil(C/2),)
    encoding = torch.empty(max_len, d_model, dtype=torch.float64)
    encoding[:, 0::2] = torch.sin(t * frequency)
    encoding[:, 1::2] = torch.cos(t * frequency)[:, : d_model // 2]
    return encoding.float()


def causal_mask(q_len: int, k_len: int | None = None, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk), True = may be attended to. The last query sees every key."""
    k_len = q_len if k_len is None else k_len
    return torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v (eq. 1). q (..., Tq, D), k, v (..., Tk, D), mask (..., Tq, Tk).
    Returns the output and the weights (..., Tq, Tk), both 0 where a query may attend to nothing.
    It holds all scores: fast on sentences; for long texts take F.scaled_dot_product_attention."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (..., Tq, Tk); scaled first: float16
    lowest = torch.finfo(scores.dtype).min  # -inf alone in a row would give NaN
    weights = scores.masked_fill(~mask, lowest).softmax(-1).masked_fill(~mask, 0.0)
    return weights @ v, weights


class MultiHeadAttention(nn.Module):
    """Attention in n_heads subspaces (section 3.2.2); no dropout on the weights, as in the paper.
    Keys and values are given split into heads, so that a cache can hold them."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (B, Tk, C) -> keys and values (B, H, Tk, D) each."""
        return self.split_heads(self.k_proj(context)), self.split_heads(self.v_proj(context))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """x (B, Tq, C), k, v (B, H, Tk, D), mask broadcasts to (B, H, Tq, Tk) -> (B, Tq, C)."""
        q = self.split_heads(self.q_proj(x))  # (B, H, Tq, D)
        y, _ = attention(q, k, v, mask)  # (B, H, Tq, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention, then the feed-forward network (section 3.1, left half of figure 1).
    Post-norm, the paper's, normalises the sum of x and a sub-layer's output. Pre-norm normalises
    what the sub-layer sees and leaves x alone, so that gradients reach every layer undamped."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, inner = config.d_model, config.d_ff
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.self_attention = MultiHeadAttention(width, config.n_heads)
        self.self_attention_norm = nn.LayerNorm(width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, Ts, C), mask broadcasts to (B, H, Ts, Ts). Returns (B, Ts, C)."""
        h = self.self_attention_norm(x) if self.norm_first else x
        k, v = self.self_attention.keys_values(h)
        x = x + self.dropout(self.self_attention(h, k, v, mask))
        x = x if self.norm_first else self.self_attention_norm(x)
        h = self.ffn_norm(x) if self.norm_first else x
        x = x + self.dropout(self.ffn(h))
        return x if self.norm_first else self.ffn_norm(x)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output, feed-forward (right half)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, inner = config.d_model, config.d_ff
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.self_attention = MultiHeadAttention(width, config.n_heads)
        self.cross_attention = MultiHeadAttention(width, config.n_heads)
        self.self_attention_norm = nn.LayerNorm(width)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor, past: tuple | None = None
    ) -> tuple[Tensor, tuple]:
        """x (B, Tt, C): new positions. Masks broadcast to (B, H, Tt, past + Tt) and (B, H, Tt, Ts).
        past: keys and values of what came before, if anything did. Returns (B, Tt, C) and the next
        past; changes nothing that it is given, so that checkpointing may run it twice."""
        h = self.self_attention_norm(x) if self.norm_first else x
        k, v = self.self_attention.keys_values(h)  # (B, H, Tt, D)
        if past is None:
            memory_k, memory_v = self.cross_attention.keys_values(memory)  # (B, H, Ts, D)
        else:
            past_k, past_v, memory_k, memory_v = past  # the memory is projected only once
            k = torch.cat((past_k, k), dim=2)  # (B, H, past + Tt, D)
            v = torch.cat((past_v, v), dim=2)
        x = x + self.dropout(self.self_attention(h, k, v, mask))
        x = x if self.norm_first else self.self_attention_norm(x)
        h = self.cross_attention_norm(x) if self.norm_first else x
        x = x + self.dropout(self.cross_attention(h, memory_k, memory_v, memory_mask))
        x = x if self.norm_first else self.cross_attention_norm(x)
        h = self.ffn_norm(x) if self.norm_first else x
        x = x + self.dropout(self.ffn(h))
        x = x if self.norm_first else self.ffn_norm(x)
        return x, (k, v, memory_k, memory_v)


class Transformer(nn.Module):
    """Encoder and decoder. Tokens are (B, T) int32 or int64, with pad_id on the right."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width = config.d_model
        self.src_embedding = nn.Embedding(config.vocab_size, width)
        self.tgt_embedding = nn.Embedding(config.vocab_size, width)
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        # Pre-norm leaves the residual stream unnormalised: normalise it once at the end.
        self.encoder_norm = nn.LayerNorm(width) if config.norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(width) if config.norm_first else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        # In the state dict: a model made on the device "meta" has them once it is loaded.
        self.register_buffer("positions", sinusoidal_positional_encoding(config.max_len, width))
        for layer in (*self.encoder, *self.decoder):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for matrix in (self.src_embedding, self.tgt_embedding, self.output):
            # Embeddings get as large as the positions (embed multiplies by sqrt(C)).
            nn.init.normal_(matrix.weight, std=width**-0.5)
        if config.tied:
            self.tgt_embedding.weight = self.src_embedding.weight
            self.output.weight = self.src_embedding.weight

    def embed(self, embedding: nn.Embedding, tokens: Tensor, start: int = 0) -> Tensor:
        """tokens (B, T) at positions start .. start + T - 1 -> (B, T, C)."""
        end = start + tokens.shape[1]
        if end > self.config.max_len:
            raise ValueError(f"{end} tokens are more than max_len={self.config.max_len}")
        x = embedding(tokens) * math.sqrt(self.config.d_model)  # (B, T, C)
        return self.dropout(x + self.positions[start:end])

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, Ts) -> memory (B, Ts, C) and its mask (B, 1, 1, Ts), False at padding."""
        x = self.embed(self.src_embedding, src)  # (B, Ts, C)
        memory_mask = (src != self.config.pad_id)[:, None, None, :]  # (B, 1, 1, Ts)
        for layer in self.encoder:
            x = layer(x, memory_mask)
        return self.encoder_norm(x), memory_mask

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor, cache: dict | None = None) -> Tensor:
        """Logits (B, Tt, V) of the token after each of tgt's (B, Tt), which begins with bos_id.
        With a cache, a dict, empty at first and filled here, tgt holds the new tokens alone.
        Padding of tgt needs no mask: no real token looks to its right."""
        expected = (tgt.shape[0], 1, 1, memory.shape[1])
        if memory_mask.dtype != torch.bool or memory_mask.shape != expected:
            raise ValueError(f"memory_mask must be boolean {expected}")
        start = cache["length"] if cache else 0
        pasts = cache["layers"] if cache else [None] * len(self.decoder)
        x = self.embed(self.tgt_embedding, tgt, start)  # (B, Tt, C)
        length = start + tgt.shape[1]
        mask = causal_mask(tgt.shape[1], length, tgt.device)  # (Tt, length)
        keys_values = []
        for layer, past in zip(self.decoder, pasts, strict=True):
            x, present = layer(x, mask, memory, memory_mask, past)
            keys_values.append(present)
        if cache is not None:
            cache.update(length=length, layers=keys_values)
        return self.output(self.decoder_norm(x))  # (B, Tt, V)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """src (B, Ts), tgt (B, Tt) from bos_id on -> logits (B, Tt, V)."""
        return self.decode(tgt, *self.encode(src))


# -----------------------------------------------------------------------------
# Loss and learning rate


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and float16 have too few digits for a softmax over a vocabulary."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def label_smoothed_loss(logits: Tensor, targets: Tensor, pad_id: int, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy against 1 - smoothing on the target, smoothing spread over V (section 5.4).
    logits (B, T, V), targets (B, T) int64. The mean over real tokens, in float32 at least; logits at
    padding count for nothing."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    real = targets != pad_id  # (B, T); NaN at padding mustn't even meet a gradient of 0
    logits = at_least_float32(logits[real])  # (N, V)
    return F.cross_entropy(logits, targets[real], label_smoothing=smoothing)


def noam_lr(step: int, d_model: int, warmup: int) -> float:
    """The paper's learning rate (eq. 3), from step 1: up in a line, then down with 1 / sqrt(step).
    Adam's first steps rest on few gradients but are as long as any other, which post-norm layers
    don't survive. A wider layer sums more moving weights, hence 1 / sqrt(d_model)."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


# -----------------------------------------------------------------------------
# Search: from a model of the next token to a sentence


@contextmanager
def evaluating(model: nn.Module):
    """Inside: no dropout, no gradients. Then all modes as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def greedy_decode(model: Transformer, src: Tensor, max_len: int) -> Tensor:
    """The likeliest token at each step, until EOS or until there are max_len of them.
    src (B, Ts) -> (B, T): BOS left out, EOS kept, then pad_id. A row without EOS was cut off."""
    with evaluating(model):
        memory, memory_mask = model.encode(src)
        tokens = torch.full((len(src), 1), model.config.bos_id, device=src.device)  # (B, 1)
        finished = torch.zeros(len(src), dtype=torch.bool, device=src.device)  # (B,)
        cache: dict = {}
        while tokens.shape[1] <= max_len and not finished.all():
            logits = model.decode(tokens[:, -1:], memory, memory_mask, cache)  # (B, 1, V)
            best = logits[:, 0].argmax(-1).masked_fill(finished, model.config.pad_id)  # (B,)
            tokens = torch.cat((tokens, best[:, None]), dim=1)  # (B, T + 1)
            finished |= best == model.config.eos_id
    return tokens[:, 1:]


def beam_search(
    model: Transformer, src: Tensor, max_len: int, beam_size: int = 4, length_penalty: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Keeps the beam_size likeliest beginnings of each sentence instead of one.
    One with its EOS is frozen: it stays while its log-probability is among the best. In the end,
    log-probabilities, which only fall with length, are divided by ((5 + n) / 6) ** length_penalty,
    n the tokens with EOS (Wu et al., eq. 14). src (B, Ts) -> tokens (B, T), scores (B,)."""
    batch, vocab, device = len(src), model.config.vocab_size, src.device
    with evaluating(model):
        memory, memory_mask = (x.repeat_interleave(beam_size, 0) for x in model.encode(src))
        tokens = torch.full((len(memory), 1), model.config.bos_id, device=device)  # (B*K, 1)
        finished = torch.zeros(batch, beam_size, dtype=torch.bool, device=device)  # (B, K)
        lengths = torch.zeros(batch, beam_size, dtype=torch.long, device=device)  # (B, K)
        first_rows = torch.arange(batch, device=device)[:, None] * beam_size  # (B, 1)
        log_probs = at_least_float32(memory.new_full((batch, beam_size), -torch.inf))  # (B, K)
        log_probs[:, 0] = 0.0  # K equal beginnings would stay equal
        only_pad = log_probs.new_full((vocab,), -torch.inf)
        only_pad[model.config.pad_id] = 0.0  # what follows a finished hypothesis, at no cost
        cache: dict = {}
        while tokens.shape[1] <= max_len and not finished.all():
            logits = model.decode(tokens[:, -1:], memory, memory_mask, cache)  # (B*K, 1, V)
            following = at_least_float32(logits).log_softmax(-1).view(batch, beam_size, vocab)
            following = torch.where(finished[..., None], only_pad, following)  # (B, K, V)
            candidates = (log_probs[..., None] + following).flatten(1)  # (B, K*V)
            log_probs, choice = candidates.topk(beam_size)  # (B, K)
            parent, token = choice // vocab, choice % vocab  # (B, K)
            rows = (first_rows + parent).flatten()  # (B*K,) whom each continues
            tokens = torch.cat((tokens[rows], token.view(-1, 1)), dim=1)  # (B*K, T + 1)
            # Cross-attention keys are identical within a beam: no reordering.
            cache["layers"] = [(k[rows], v[rows], *of_memory) for k, v, *of_memory in cache["layers"]]
            was_finished = finished.gather(1, parent)
            lengths = lengths.gather(1, parent) + ~was_finished
            finished = was_finished | (token == model.config.eos_id)
        divisor = ((5 + lengths.to(log_probs)) / 6) ** length_penalty  # in log_probs' precision
        scores, best = (log_probs / divisor).max(dim=1)  # (B,) each
        chosen = first_rows[:, 0] + best  # (B,)
    longest = int(lengths.flatten()[chosen].max()) if batch else 0
    return tokens[chosen, 1 : 1 + longest], scores


# -----------------------------------------------------------------------------
# Settings and data


@dataclass
class Settings:
    preset: Literal["numbers", "multi30k"] = "numbers"  # generated numbers or German to English
    data: str = ""  # multi30k's folder; else MULTI30K_DATA, else a download
    translate: str | None = None  # this, by the saved model; - reads stdin's lines
    out: str = "out/transformer"  # checkpoint, model, picture, report.json
    seed: int = 0  # same seed and threads, same weights
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda or cpu
    amp: Literal["auto", "bf16", "off"] = "auto"  # auto: bf16 where the hardware has it
    vocab_size: int = 600  # at most: 3 special, 256 bytes, merges
    max_len: int = 32  # tokens of a sentence, with EOS
    d_model: int = 64  # width
    n_heads: int = 4  # divides d_model
    n_layers: int = 2  # in the encoder, and in the decoder
    d_ff: int = 256  # inner width of the feed-forward nets
    dropout: float = 0.0  # numbers have no noise to fit
    norm_first: bool = True  # pre-norm: a short warm-up is enough
    tied: bool = True  # one matrix for both embeddings and the output
    epochs: int = 5  # passes over the data
    batch_tokens: int = 1024  # of the longer side, padded, at most
    warmup: int = 100  # steps of rising learning rate
    lr_scale: float = 0.4  # times noam_lr
    smoothing: float = 0.1  # label smoothing (section 5.4)
    weight_decay: float = 0.01  # of matrices
    clip: float = 1.0  # gradients' largest norm; 0: none
    average: int = 2  # final weights: mean of the last epochs' ends (section 6.1)
    save_every: int = 100  # steps between checkpoints; 0: epochs alone
    beam_size: int = 4  # hypotheses kept
    length_penalty: float = 0.6  # exponent of Wu et al., eq. 14; 0: none


PRESETS = {
    "numbers": Settings(),
    "multi30k": Settings(  # chosen on the dev set, for half an hour
        preset="multi30k", out="out/transformer_multi30k", vocab_size=4000, max_len=100,
        d_model=256, n_layers=3, d_ff=512, dropout=0.3, epochs=25, batch_tokens=2048,
        warmup=600, lr_scale=0.7, average=8, beam_size=5,
    ),
}  # fmt: skip
MAY_CHANGE = "data translate out device save_every beam_size length_penalty".split()


def parse(arguments: list[str]) -> Settings:
    """The preset's settings, but for what the command line says."""
    import tyro  # the command line from Settings: the comments are the help

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="numbers")
    preset = first.parse_known_args(arguments)[0].preset
    return tyro.cli(Settings, args=arguments, default=PRESETS.get(preset), description=__doc__)


Corpus = namedtuple("Corpus", "name train dev test")  # parts: lists of pairs (source, target)

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
    """342000 -> "dreihundert zwei und vierzig tausend". one: "ein" where more follows."""
    if n < 20:
        return one if n == 1 else DE[n]
    if n < 100:
        return (f"{german_number(n % 10, 'ein')} und " if n % 10 else "") + DE_TENS[n // 10]
    unit, name = (1000, " tausend") if n >= 1000 else (100, "hundert")
    head, rest = german_number(n // unit, "ein") + name, n % unit
    return head if not rest else f"{head} {german_number(rest, one)}"


def number_corpus(seed: int, n_train=8_000, n_dev=500, n_test=1000) -> Corpus:
    """Different numbers in each part; short and round ones are frequent."""
    rng = random.Random(seed)

    def three_digits() -> int:
        return rng.randrange(10 ** rng.randint(0, 3)) * 10 ** rng.randint(0, 2) % 1000

    drawn: dict[int, None] = {}  # a set that keeps its order
    while len(drawn) < n_train + n_dev + n_test:
        drawn[1000 * three_digits() + three_digits()] = None
    numbers = list(drawn)
    rng.shuffle(numbers)  # the frequent ones came first
    pairs = [(english_number(n), german_number(n)) for n in numbers]
    return Corpus("numbers", pairs[:n_train], pairs[n_train:-n_test], pairs[-n_test:])


MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K = {  # part -> its pairs, and the sha256 of its lines
    "train": (29_000, "2a11c13fdd390c91cf8ba72d9cd8f5a25bf092847ac8e1899fde800730821786"),
    "val": (1_014, "77c529181a1814389ce81f78f63437c30327f9b63b2a4feaa6a6c75af9f39593"),
    "test_2016_flickr": (1_000, "15f7cae7aee6b235df5b479558fb6aa8b48cbe99048702956a5f34a4e5217515"),
}


def lines_of(data: bytes) -> list[str]:
    """Lines of UTF-8 text: they end with LF, CR LF or CR (str.splitlines also cuts at U+2028)."""
    return [line.strip() for line in io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")]


def read_lines(name: str, folder: str) -> list[str]:
    """The lines of one file; without a folder, of one that is downloaded once, to a cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(folder or f"{cache}/multi30k", f"{name}.gz")
    try:
        if not folder and not path.exists():
            print(f"downloading {MULTI30K_URL}{path.name}", file=sys.stderr)
            data = urllib.request.urlopen(MULTI30K_URL + path.name, timeout=30).read()
            lines_of(gzip.decompress(data))[0]  # raises if broken or empty
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        return lines_of(gzip.decompress(path.read_bytes()))
    except Exception as error:  # network, files, gzip and UTF-8 have their own
        raise ValueError(f"can't read {path}: {error}; --data takes its folder") from None


def multi30k_corpus(folder: str) -> Corpus:
    """German to English. A corpus with other numbers of lines is one's own, called "own"."""
    corpus, parts = "multi30k", []
    for part, (n_pairs, sha256) in MULTI30K.items():
        german = read_lines(f"{part}.de", folder)
        english = read_lines(f"{part}.en", folder)
        if len(german) != len(english) or not german:
            raise ValueError(f"{part}: {len(german)} German lines, {len(english)} English ones")
        if folder and len(german) != n_pairs:
            corpus = "own"
        elif hashlib.sha256("\n".join(german + english).encode()).hexdigest() != sha256:
            raise ValueError(f"{part}.de or {part}.en was altered, or is your own: drop a line")
        parts.append(list(zip(german, english, strict=True)))
    return Corpus(corpus, *parts)


class Tokenizer:
    """Byte-level BPE in lower case; a space in front: a first word is as any other."""

    pattern = r" ?\w+| ?[^\w\s]+|\s+"  # merges stay within these
    n_special = 3  # ids of padding, BOS and EOS come first

    def __init__(self, vocabulary: list[bytes]):
        import tiktoken

        self.vocabulary = vocabulary
        self.vocab_size = self.n_special + len(vocabulary)
        ranks = {token: rank for rank, token in enumerate(vocabulary)}
        self.bpe = tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        import rustbpe

        trained = rustbpe.Tokenizer()
        texts = (f" {text.strip().lower()}" for text in texts)  # as encode has them
        trained.train_from_iterator(texts, vocab_size - cls.n_special, pattern=cls.pattern)
        by_rank = sorted(trained.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in by_rank])

    def encode(self, text: str, max_len: int) -> list[int]:
        ids = self.bpe.encode_ordinary(f" {text.strip().lower()}")
        ids = [i + self.n_special for i in ids] + [TransformerConfig.eos_id]
        if len(ids) > max_len:
            raise ValueError(f"{len(ids)} tokens with EOS, max_len={max_len}: {text[:60]!r}")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode([i - self.n_special for i in ids if i >= self.n_special]).strip()


# -----------------------------------------------------------------------------
# Files and training


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, even if we are killed mid-write."""
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".part") as folder:
        temporary = Path(folder, path.name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def save(path: Path, content: dict) -> None:
    """content["model"] is a state dict. The file ends with a sha256; torch.load doesn't mind.
    Raises FloatingPointError for weights that aren't finite: the last good file stays."""
    if not all(weight.isfinite().all() for weight in content["model"].values()):
        raise FloatingPointError("weights are no longer finite")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    write_atomically(path, data + hashlib.sha256(data).digest())


def load(path: Path) -> dict:
    """Content that save wrote; runs no code from the file. Raises ValueError for other files."""
    data = path.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ValueError(f"{path} is damaged, or was not written by this script")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def lock_out(out: Path, patience: float = 10.0):
    """Hold out while this process lives: keep what is returned. ValueError if another run has it."""
    file = open(out / "lock", "w")
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has none: no lock
        return file
    for _ in range(round(patience * 10)):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in out.glob("tmp*.part"):  # of a process that was killed while it wrote
                shutil.rmtree(left)
            return file
        time.sleep(0.1)
    raise ValueError(f"--out {out} is in use by another run")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def use_bf16(amp: str, device: torch.device) -> bool:
    """By default where the hardware multiplies bf16: elsewhere it is far slower than float32."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cpu":
        return torch.cpu.get_capabilities().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def token_batches(lengths: list[int], batch_tokens: int, seed: str) -> list[list[int]]:
    """Indices of sentences of similar length: number x longest <= batch_tokens, but one at least.
    The seed decides which equally long ones meet, and the order."""
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


def pad(rows: list[list[int]], model: Transformer) -> Tensor:
    """(B, T) ids on the model's device, with pad_id on the right."""
    rows = [torch.tensor(row) for row in rows]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.config.pad_id)
    return padded.to(model.positions.device)


def batch_loss(model: Transformer, pairs: list, smoothing: float, bf16: bool) -> Tensor:
    """Mean loss a target token; pairs of ids (source, target), both with EOS."""
    src = pad([source for source, _ in pairs], model)  # (B, Ts)
    targets = pad([target for _, target in pairs], model)  # (B, Tt)
    tgt = F.pad(targets[:, :-1], (1, 0), value=model.config.bos_id)  # each target's predecessor
    with torch.autocast(src.device.type, torch.bfloat16, enabled=bf16):
        logits = model(src, tgt)  # (B, Tt, V)
    return label_smoothed_loss(logits, targets, model.config.pad_id, smoothing)


def dev_loss(model: Transformer, dev: list, batch_tokens: int, bf16: bool) -> float:
    """Cross-entropy a token, without smoothing."""
    lengths = [len(target) for _, target in dev]
    loss_sum = 0.0
    with evaluating(model):
        for batch in token_batches(lengths, batch_tokens, "dev"):
            loss = batch_loss(model, [dev[i] for i in batch], 0.0, bf16)
            loss_sum += loss.item() * sum(lengths[i] for i in batch)
    return loss_sum / sum(lengths)


def train(s: Settings, model: Transformer, pairs: list, dev: list, state: dict) -> None:
    """Trains model to the end from state on, a checkpoint or an empty one; keeps it up to date.
    Batches depend on (seed, epoch), dropout on (seed, step): killed, it goes on bit for bit.
    Raises FloatingPointError where loss, gradient or weights aren't finite."""
    device = model.positions.device
    bf16 = use_bf16(s.amp, device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and norms don't decay
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    average = {name: mean.to(device) for name, mean in state["average"].items()}
    lengths = [max(len(source), len(target)) for source, target in pairs]
    n_batches = len(token_batches(lengths, s.batch_tokens, ""))  # the same in each epoch
    first_step = state["step"]
    for step in range(first_step, s.epochs * n_batches):
        start = time.perf_counter()
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            batches = token_batches(lengths, s.batch_tokens, f"{s.seed} {epoch}")
        torch.manual_seed(s.seed * 1_000_003 + step)  # dropout's
        lr = s.lr_scale * noam_lr(step + 1, s.d_model, s.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(model, [pairs[j] for j in batches[i]], s.smoothing, bf16)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        if not norm.isfinite():  # the step would spoil all weights
            raise FloatingPointError(f"step {step + 1}: loss {loss.item()}, gradient's norm {norm}")
        optimizer.step()
        state["seconds"] += time.perf_counter() - start
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {state['seconds']:.0f} s", flush=True)
        if i == n_batches - 1:  # the end of an epoch
            n_averaged = epoch + 1 - max(0, s.epochs - s.average)  # epochs, with this one
            if n_averaged > 0:
                for name, weight in model.state_dict().items():
                    mean = average.get(name, torch.zeros_like(weight))
                    average[name] = mean + (weight - mean) / n_averaged
            held_out = dev_loss(model, dev, s.batch_tokens, bf16)
            print(f"epoch {epoch + 1} of {s.epochs}: dev loss {held_out:.4f}", flush=True)
            if not math.isfinite(held_out):
                raise FloatingPointError(f"the dev loss is {held_out}")
            state["history"].append({"epoch": epoch + 1, "loss": loss.item(), "dev_loss": held_out})
        if i == n_batches - 1 or s.save_every and (step + 1) % s.save_every == 0:
            state |= {"step": step + 1, "average": average}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(Path(s.out, "checkpoint.pt"), state)
    model.load_state_dict(average or model.state_dict())  # --average 0: the last weights


# -----------------------------------------------------------------------------
# Evaluation


def translate(
    model: Transformer, tokenizer: Tokenizer, texts: list[str], beam_size: int, penalty: float
) -> list[dict]:
    """A row a text: text, log_prob (undivided), n_tokens with EOS, finished (False: cut off).
    An empty text stays empty. Raises ValueError for one that is longer than max_len."""
    config = model.config
    ids = [tokenizer.encode(text, config.max_len) for text in texts]
    rows = [{"text": "", "log_prob": 0.0, "n_tokens": 0, "finished": True} for _ in texts]
    order = [i for i, text in enumerate(texts) if text.strip()]
    order.sort(key=lambda i: len(ids[i]))  # similar lengths together
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        src = pad([ids[i] for i in batch], model)  # (B, Ts)
        tokens, scores = beam_search(model, src, config.max_len, beam_size, penalty)
        for i, found, score in zip(batch, tokens.tolist(), scores.tolist(), strict=True):
            finished = config.eos_id in found
            n = found.index(config.eos_id) + 1 if finished else len(found)
            log_prob = score * ((5 + n) / 6) ** penalty
            rows[i] = {"text": tokenizer.decode(found[:n]), "log_prob": log_prob}
            rows[i] |= {"n_tokens": n, "finished": finished}
    return rows


def evaluate(model: Transformer, tokenizer: Tokenizer, corpus: Corpus, s: Settings) -> dict:
    """Greedy and beam search on the test set: prints a table and samples."""
    sources, references = zip(*corpus.test, strict=True)
    plain = f"beam {s.beam_size}, penalty 0"
    best = f"beam {s.beam_size}, penalty {s.length_penalty:g}"
    beams = {plain: (s.beam_size, 0.0), best: (s.beam_size, s.length_penalty)}
    measure = "exact_match" if corpus.name == "numbers" else "bleu"
    print(f"\n{'search':22}{measure:>12}{'log-prob':>10}{'tokens':>8}{'finished':>10}  (means)")
    found, table = {}, {}
    for name, search in ({"greedy": (1, 0.0)} | beams).items():
        rows = found[name] = translate(model, tokenizer, sources, *search)
        texts = [row["text"] for row in rows]
        if measure == "bleu":
            import sacrebleu

            bleu = sacrebleu.BLEU(lowercase=True)
            value = bleu.corpus_score(texts, [references]).score
            signature = str(bleu.get_signature())
        else:
            right = [text == target for text, target in zip(texts, references, strict=True)]
            value, signature = sum(right) / len(right), "whole strings"
        table[name] = {measure: value}
        for key in ("log_prob", "n_tokens", "finished"):
            table[name][key] = sum(row[key] for row in rows) / len(rows)
        print("{:22}{:12.4g}{:10.4f}{:8.2f}{:10.4g}".format(name, *table[name].values()))
    both = zip(found[plain], found["greedy"], strict=True)
    gains = [beam["log_prob"] - greedy["log_prob"] for beam, greedy in both]
    better = sum(gain > 1e-3 for gain in gains)  # beyond rounding
    worse = sum(gain < -1e-3 for gain in gains)
    print(f"{plain}: likelier than greedy {better} times, less likely (errors) {worse} times")
    triples = zip(sources, references, texts, strict=True)  # best's texts
    mistakes = [triple for triple in triples if triple[1] != triple[2]]
    print(f"{len(mistakes)} of {len(texts)} aren't the reference")
    for triple in mistakes[:5]:
        print("  source    {}\n  reference {}\n  found     {}\n".format(*triple))
    report = {"measure": measure, "signature": signature, "searches": table}
    report |= {"greedy": table["greedy"][measure], "beam": table[best][measure]}
    return report | {"search_gains": better, "search_errors": worse}


def cross_attention_weights(model: Transformer, src: Tensor, tgt: Tensor) -> Tensor:
    """Where the last layer looks: (B, H, Tt, Ts). src (B, Ts), tgt (B, Tt) from BOS on."""
    layer = model.decoder[-1].cross_attention
    given = []
    with layer.register_forward_pre_hook(lambda _, inputs: given.extend(inputs)), evaluating(model):
        model(src, tgt)
        x, k, v, mask = given
        return attention(layer.split_heads(layer.q_proj(x)), k, v, mask)[1]


def plot_alignment(model: Transformer, tokenizer: Tokenizer, text: str, path: Path) -> None:
    """Where the model looked (columns) when it found each token (rows)."""
    from matplotlib.figure import Figure

    src = pad([tokenizer.encode(text, model.config.max_len)], model)  # (1, Ts)
    found = greedy_decode(model, src, model.config.max_len)  # (1, Tt)
    tgt = F.pad(found[:, :-1], (1, 0), value=model.config.bos_id)
    weights = cross_attention_weights(model, src, tgt)[0].mean(0)  # (Tt, Ts)
    columns = [tokenizer.decode([i]) or "EOS" for i in src[0].tolist()]
    rows = [tokenizer.decode([i]) or "EOS" for i in found[0].tolist()]
    figure = Figure((2.5 + 0.4 * len(columns), 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)  # $ is a dollar
    axes.set(xlabel="source", ylabel="found", title="cross-attention, last layer, mean of heads")
    figure.savefig(path, dpi=110)


def translate_command(s: Settings) -> None:
    """Prints a JSON object a line: the source and its row of translate."""
    saved = load(Path(s.out, "model.pt"))  # FileNotFoundError: train first
    model = Transformer(TransformerConfig(**saved["config"])).to(pick_device(s.device))
    model.load_state_dict(saved["model"])
    tokenizer = Tokenizer(saved["vocabulary"])
    texts = lines_of(sys.stdin.buffer.read()) if s.translate == "-" else [s.translate]
    rows = translate(model, tokenizer, texts, s.beam_size, s.length_penalty)
    for text, row in zip(texts, rows, strict=True):
        print(json.dumps({"source": text} | row, ensure_ascii=False))


def check_settings(s: Settings) -> None:
    """ValueError for a number out of range."""
    least = {"vocab_size": 259, "seed": 0, "average": 0, "save_every": 0}
    for name, value in asdict(s).items():
        low = least.get(name, 0 if type(value) is float else 1)
        below = {"seed": 2**43, "dropout": 1, "smoothing": 1}.get(name, math.inf)
        if type(value) in (int, float) and not low <= value < below:
            raise ValueError(f"{name} must be in [{low}, {below}), got {value}")


def prepare(s: Settings) -> tuple:
    """Corpus, tokenizer, ids of train and dev pairs, state to train from, the lock on s.out."""
    path = Path(s.out, "checkpoint.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    state = load(path) if path.exists() else {}
    if len(state.get("history", [])) < s.epochs:  # a finished run needs no lock
        lock = lock_out(path.parent)
        state = load(path) if path.exists() else {}  # another run may have gone on meanwhile
    if s.preset == "multi30k":
        corpus = multi30k_corpus(s.data or os.environ.get("MULTI30K_DATA", ""))
    else:
        corpus = number_corpus(s.seed)
    sentences = hashlib.sha256(repr(corpus[1:3]).encode()).hexdigest()
    settings = asdict(s) | {"sentences": sentences}
    for name, before in state.get("settings", {}).items():
        now = settings[name]
        if name not in MAY_CHANGE and before != now:
            raise ValueError(f"{path} has {name}={before}, not {now}: take another --out")
    if state:
        tokenizer = Tokenizer(state["vocabulary"])
    else:
        texts = [text for pair in corpus.train for text in pair]
        tokenizer = Tokenizer.train(texts, s.vocab_size)
        state = {"step": 0, "seconds": 0.0, "history": [], "average": {}}
    state |= {"settings": settings, "vocabulary": tokenizer.vocabulary}
    train_ids = [[tokenizer.encode(text, s.max_len) for text in pair] for pair in corpus.train]
    dev_ids = [[tokenizer.encode(text, s.max_len) for text in pair] for pair in corpus.dev]
    return corpus, tokenizer, train_ids, dev_ids, state, lock


def main(s: Settings) -> None:
    start = time.perf_counter()
    out = Path(s.out)
    try:  # until the first step, what a user can mend is told in one line
        check_settings(s)
        if s.translate is not None:
            return translate_command(s)
        corpus, tokenizer, train_ids, dev_ids, state, lock = prepare(s)  # hold the lock's name
        names = "max_len d_model n_heads n_layers d_ff dropout norm_first tied".split()
        config = TransformerConfig(tokenizer.vocab_size, **{name: getattr(s, name) for name in names})
        torch.manual_seed(s.seed)
        model = Transformer(config).to(pick_device(s.device))
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    report = {"dataset": corpus.name, "n_parameters": sum(p.numel() for p in model.parameters())}
    report["precision"] = "bf16" if use_bf16(s.amp, model.positions.device) else "float32"
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    report["cpu"] = torch.cpu.get_capabilities().get("cpu_name")
    print(*(f"{name}={value}" for name, value in (asdict(s) | report).items()))
    print(f"{len(train_ids)} train, {len(dev_ids)} dev pairs, from step {state['step']} on")
    try:
        train(s, model, train_ids, dev_ids, state)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (FloatingPointError, OSError) as error:  # OSError: a full disk
        sys.exit(f"{error}; the last checkpoint is good. Smaller --lr-scale? Another --out?")
    weights = {"model": model.state_dict(), "config": asdict(config)}
    save(out / "model.pt", weights | {"vocabulary": tokenizer.vocabulary})
    report |= {"steps": state["step"], "train_seconds": round(state["seconds"], 1)}
    report |= evaluate(model, tokenizer, corpus, s)
    plot_alignment(model, tokenizer, corpus.test[0][0], out / "alignment.png")
    report |= {"seconds": round(time.perf_counter() - start, 1), "history": state["history"]}
    report["settings"] = asdict(s)
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    summary = {key: report[key] for key in ("measure", "greedy", "beam", "train_seconds")}
    print(json.dumps(summary | {"report": str(out / "report.json")}))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # printing never ends a run
    main(parse(sys.argv[1:]))
