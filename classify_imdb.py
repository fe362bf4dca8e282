"""Sentiment of movie reviews: encoder.py's Transformer trained from scratch on IMDB, and used.

91.22 ± 0.07% of IMDB's test reviews right (3 seeds; 92 s on two cores of an AMD EPYC, torch 2.13.0); with
the unlabelled reviews 92.30 ± 0.13% after ten minutes on one of these cores. A linear model: 91.87%.
Words do most of it: without attention it is still 90.9%, without the odds of n-grams 88.2%.

    python classify_imdb.py                                  # finds or downloads IMDB, trains, tests, reports
    python classify_imdb.py --predict "A film to remember."  # by the trained model; or a file, or - for stdin
    python classify_imdb.py --predict "A waste." --explain   # and the words that carried the answer
    python classify_imdb.py --data aclImdb_v1.tar.gz         # or the unpacked folder
    python classify_imdb.py --data my.csv --out out/my       # your own texts, see read_own
    python classify_imdb.py --preset plain --out out/plain   # tokens alone, no odds
    python classify_imdb.py --preset best --out out/best     # learns from the unlabelled reviews too
    python classify_imdb.py --target 0.85 --out out/target   # as fast as possible to 85%
    python classify_imdb.py --baseline                       # the linear model to compare with
    torchrun --nproc_per_node=2 classify_imdb.py             # DDP, with train_ddp.py's pieces

The same command goes on where it was stopped. Data: Maas et al., "Learning Word Vectors for Sentiment
Analysis", ACL 2011. Tokenizer: byte-level BPE (Sennrich et al., arXiv:1508.07909) of the training reviews.
Shapes: B batch, T tokens, P places (every fourth token), C width, K = 2 classes, N texts.
"""

import argparse
import base64
import csv
import gzip
import hashlib
import html
import http.client
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention
import export
import train_ddp as ddp
from encoder import EncoderClassifier, EncoderConfig, generate_reviews, pool_tokens
from losses import parameter_groups


@dataclass
class Settings:
    data: str = os.environ.get("IMDB_DATA", "")  # IMDB or your own texts; empty: cache or download
    preset: Literal["plain", "fast", "best"] = "fast"  # plain: tokens alone; best: unlabelled reviews too
    out: str = "out/classify_imdb"  # model, checkpoint, report and page go here
    seed: int = 0  # same seed, same machine, same threads: same weights
    predict: str = ""  # classify a text, or the lines of a file that exists or (for -) of stdin
    explain: bool = False  # with --predict: also the words that carried the answer
    baseline: bool = False  # train and test the linear model instead
    shuffle_labels: bool = False  # honesty check: the test must give 50%
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda where there is one, else cpu
    vocab_size: int = 16000  # ids: padding, mask, then byte-level BPE
    max_len: int = 512  # tokens a text; of a longer one its two ends: opinions stand there
    d_model: int = 128  # width; 64 lost a point on dev
    n_heads: int = 4  # heads of 32 dimensions
    n_layers: int = 2  # on a quarter of the places, see ReviewClassifier
    d_ff: int = 512  # inner width of the feed-forward net, 4 x d_model
    dropout: float = 0.1  # of embeddings, sub-layers and the pooled vector
    odds: bool = True  # also give each token the odds of its n-grams, see NgramOdds
    mask_words: float = 0.2  # fraction of the training tokens hidden: less overfitting
    unlabelled: bool = False  # learn the linear model's opinion of the unlabelled reviews too
    target: float = 0.0  # stop once dev is safely past this accuracy, e.g. 0.85; 0: never
    epochs: int = 2  # passes over the training texts
    min_steps: int = 300  # at least so many; few texts are passed over more often
    batch_size: int = 32  # texts a step, of similar length
    lr: float = 1e-3  # AdamW's peak learning rate, then a cosine to 0
    warmup: int = 100  # steps of a linear rise, until it meets the cosine
    clip: float = 1.0  # largest norm of the gradient; 0: none
    save_every: float = 30.0  # seconds between checkpoints; 0: one after each step
    export: bool = True  # afterwards compare export.py's formats; --no-export: ONNX alone
    keep_exports: bool = False  # compare every format, and leave the files in OUT/export


PRESETS = {
    "plain": Settings(preset="plain", odds=False),
    "fast": Settings(),
    "best": Settings(preset="best", unlabelled=True, max_len=1024),
}
MAY_CHANGE = "data out predict explain baseline device export keep_exports save_every".split()

# -----------------------------------------------------------------------------
# Data: IMDB's reviews, and a dev split that doesn't flatter

PER_FOLDER = {"train/pos": 12_500, "train/neg": 12_500, "test/pos": 12_500, "test/neg": 12_500}
UNLABELLED = {"train/unsup": 50_000}


class Review(NamedTuple):
    number: int  # its place among those of its label; in IMDB neighbours are often about the same film
    label: int  # class 0 or 1; -1: unlabelled
    text: str


@dataclass
class Corpus:
    name: str  # "imdb", "own" or "demo"
    labels: list[str]  # the names of class 0 and class 1
    train: list[Review]  # with dev in it: split_dev
    test: list[Review]
    unlabelled: list[Review] = field(default_factory=list)


def read_imdb(path: Path, unlabelled: bool = False) -> Corpus:
    """The reviews by folder and number. ValueError unless all are there.
    Nothing is unpacked, so no path in a tarball can escape."""
    sizes = PER_FOLDER | (UNLABELLED if unlabelled else {})
    found: dict[str, dict[int, str]] = {folder: {} for folder in sizes}
    for name, read in imdb_files(path):
        match = re.fullmatch(r"(?:.*/)?((?:train|test)/(?:pos|neg|unsup))/(\d+)_\d+\.txt", name)
        if match and match[1] in found:
            found[match[1]][int(match[2])] = read().decode(errors="replace")
    parts = {"train": [], "test": [], "unlabelled": []}
    for folder, texts in found.items():
        if len(texts) != sizes[folder]:
            raise ValueError(f"--data {path}: {len(texts)} of {sizes[folder]} NUMBER_STARS.txt in {folder}")
        split, kind = folder.split("/")
        label = {"pos": 1, "neg": 0, "unsup": -1}[kind]
        part = parts["unlabelled" if label < 0 else split]
        part += [Review(i, label, texts[number]) for i, number in enumerate(sorted(texts))]
    return Corpus("imdb", ["negative", "positive"], **parts)


def split_dev(corpus: Corpus) -> tuple[list[Review], list[Review]]:
    """(train, dev): dev is a tenth of each class, five blocks of consecutive numbers.

    Neighbours are often about the same film. A random tenth would share its films with the training set
    and reward learning their names; the test has others. Of your own texts it is a random tenth.
    """
    if corpus.name == "own":
        return hold_out(corpus.train, seed=1)
    fifth = len(corpus.train) // 2 // 5  # of a class
    numbers = set()
    for block in range(5):  # a tenth of each fifth, from its middle
        first = block * fifth + fifth * 2 // 5
        numbers.update(range(first, first + fifth // 10))
    dev = [r for r in corpus.train if r.number in numbers]
    return [r for r in corpus.train if r.number not in numbers], dev


# -----------------------------------------------------------------------------
# Tokens: byte-level BPE, and batches of similar length

PAD = 0
MASK = 1
SPECIAL = 2  # ids 0 and 1; BPE's own ids follow
FOLDS = 5  # of the training texts, see NgramOdds
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"  # a token stays in one


def clean(text: str) -> str:
    """The text in lower case; <br /> and each run of white space become one blank."""
    return " ".join(text.replace("<br />", " ").lower().split())


class Tokenizer:
    """Byte-level BPE: any text has an encoding. ranks: the tokens' bytes, in id order."""

    def __init__(self, ranks: list[bytes]):
        import tiktoken

        self.ranks = ranks
        self.vocab_size = SPECIAL + len(ranks)
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        self.bpe = tiktoken.Encoding("reviews", pat_str=WORDS, mergeable_ranks=mergeable, special_tokens={})

    @staticmethod
    def train(reviews: list[Review], vocab_size: int) -> "Tokenizer":
        import rustbpe

        trainer = rustbpe.Tokenizer()
        texts = (clean(r.text) for r in reviews)
        trainer.train_from_iterator(texts, vocab_size - SPECIAL, pattern=WORDS)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return Tokenizer([bytes(token) for token, _ in by_rank])

    def encode(self, texts: list[str], max_len: int) -> list[Tensor]:
        """ids (T,) of each text, T <= max_len; of a longer text its two ends."""
        head = max_len // 2
        encoded = []
        for ids in self.bpe.encode_ordinary_batch([clean(text) for text in texts]):
            if len(ids) > max_len:
                ids = ids[:head] + ids[head - max_len :]
            encoded.append(torch.tensor(ids, dtype=torch.long) + SPECIAL)
        return encoded


def pad(ids: list[Tensor]) -> Tensor:
    """Encoded texts as one (B, T), T the longest of them and at least 1."""
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return tokens if tokens.size(1) else torch.full((len(ids), 1), PAD)


class Examples(NamedTuple):
    ids: list[Tensor]  # (T,) of each text
    targets: list[float]  # P(class 1) to learn: the label, or the teacher's opinion
    folds: list[int]  # blocks of review numbers, see NgramOdds: other folds, other films

    def batch(self, rows: list[int], device="cpu") -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, T), targets (B,), folds (B,) of these rows."""
        tokens = pad([self.ids[i] for i in rows]).to(device)
        targets = torch.tensor([float(self.targets[i]) for i in rows], device=device)
        return tokens, targets, torch.tensor([self.folds[i] for i in rows], device=device)


def encode(tokenizer: Tokenizer, reviews: list[Review], targets: list[float], max_len: int) -> Examples:
    """Also each text's fold: a fifth of every class, or a fold would tell the class."""
    ends = {r.label: r.number + 1 for r in reviews}  # numbers ascend: the last one stays
    folds = [r.number * FOLDS // ends[r.label] for r in reviews]
    return Examples(tokenizer.encode([r.text for r in reviews], max_len), targets, folds)


def batches(lengths: list[int], s: Settings, step: int, steps: int) -> Iterator[list[int]]:
    """The rows of each step from this one on: a function of the seed, wherever a run goes on.
    An epoch has each once, in batches of similar length (little padding) in random order."""
    size = s.batch_size
    per_epoch = math.ceil(len(lengths) / size)
    while step < steps:
        rng = random.Random(s.seed * 1_000_003 + step // per_epoch)
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), 50 * size):  # sorted within 50 batches
            group = sorted(order[start : start + 50 * size], key=lambda i: lengths[i])
            epoch += [group[i : i + size] for i in range(0, len(group), size)]
        rng.shuffle(epoch)
        for rows in epoch[step % per_epoch :][: steps - step]:
            yield rows
            step += 1


# -----------------------------------------------------------------------------
# The model: encoder.py's Transformer behind a front of its own

STRIDE = 4  # a place of the Transformer stands for 4 tokens
WINDOW = 5  # and sees 5
BUCKETS = 2_097_143  # a prime; singles, pairs and triples are hashed into the same buckets
FACTORS = (1_000_003, 15_485_863, 179_424_673)  # primes; sums stay far below 2**63


def ngram_ids(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> buckets (B, T, 3) of the single, pair and triple of tokens that end at each token;
    0 where one of them is padding, hidden, or before the start."""
    tokens = tokens.long()  # 32 bits would overflow
    code = torch.zeros_like(tokens)
    real = torch.ones_like(tokens, dtype=torch.bool)
    buckets = []
    for n, factor in enumerate(FACTORS):
        before = F.pad(tokens, (n, 0))[:, : tokens.size(1)]  # (B, T) the token n before
        code = code + before * factor
        real = real & (before >= SPECIAL)
        buckets.append((code % BUCKETS + 1) * real)
    return torch.stack(buckets, dim=-1)


class NgramOdds(nn.Module):
    """How strongly a word, pair or triple of tokens speaks for class 1: out-of-fold target encoding.

    A pair like "not bad" is rare. The Transformer would have to learn each from a few reviews, and learns
    those reviews by heart instead. Counting is better at that: ln((n1 + 1) / (n0 + 1)), where n0 and n1 are
    how many texts of each class hold the n-gram (naive Bayes; Wang and Manning 2012).

    The trap: a training text's own label is in those counts, and would give itself away. So the texts are
    split into folds (of other films), and a training text gets odds counted in the other folds alone.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(BUCKETS + 1, 1))
        without = torch.zeros(FOLDS * (BUCKETS + 1), 1)  # FOLDS tables, one below the other
        self.register_buffer("without_fold", without, persistent=False)  # for training only

    def fit(self, examples: Examples) -> None:
        """Count. A text without a label counts on the side that its teacher takes it for."""
        counts = torch.zeros(FOLDS, 2, BUCKETS + 1)
        for ids, target, fold in zip(examples.ids, examples.targets, examples.folds, strict=True):
            buckets = ngram_ids(ids[None]).unique()  # a text counts once
            counts[fold, int(target > 0.5), buckets] += 1
        counts[:, :, 0] = 0  # which stands for no n-gram
        everywhere = counts.sum(0)  # (2, BUCKETS + 1)
        elsewhere = everywhere - counts  # in all folds but this one
        self.table[:, 0] = ((everywhere[1] + 1) / (everywhere[0] + 1)).log()
        self.without_fold[:, 0] = ((elsewhere[:, 1] + 1) / (elsewhere[:, 0] + 1)).log().flatten()

    def forward(self, tokens: Tensor, fold: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, 3). fold (B,): each text's own fold, whose counts are left out."""
        ids = ngram_ids(tokens)
        if fold is None:
            return F.embedding(ids, self.table).squeeze(-1)
        return F.embedding(ids + fold[:, None, None] * (BUCKETS + 1), self.without_fold).squeeze(-1)


class ReviewClassifier(EncoderClassifier):
    """Embedding of a token + embedding of its n-grams' odds; a convolution that leaves every fourth place (at
    a quarter of the length a layer costs a quarter and less); then encoder.py's layers, pooling and head."""

    def __init__(self, config: EncoderConfig, odds: bool = True):
        super().__init__(replace(config, max_len=config.max_len // STRIDE + 2))  # places
        self.config = config
        C = config.d_model
        self.odds = NgramOdds() if odds else None
        if odds:
            self.from_odds = nn.Linear(len(FACTORS), C, bias=False)
            nn.init.normal_(self.from_odds.weight)  # as large as the embedding
        # nn.Conv1d, as one product of a window: the int8 ONNX model is 1.6 times as fast.
        self.shorten = nn.Linear(C * WINDOW, C)
        self.encoder.embedding.padding_idx = PAD  # its zeros get no gradient
        with torch.no_grad():
            self.encoder.embedding.weight[PAD] = 0.0
            mean = torch.eye(C).repeat_interleave(WINDOW, 1) / WINDOW  # (C, C * 5)
            self.shorten.weight += mean  # it starts as that mean, with some noise

    def embed(self, tokens: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The places' vectors (B, P, C) and mask (B, P). fold: see NgramOdds."""
        tokens = F.pad(tokens, (WINDOW // 2, STRIDE))  # each window that sees a token is a place
        x = self.encoder.embedding(tokens) * self.encoder.scale  # (B, T + 6, C)
        if self.odds is not None:
            x = x + self.from_odds(self.odds(tokens, fold))
        windows = self.encoder.dropout(x).unfold(1, WINDOW, STRIDE)  # (B, P, C, 5)
        mask = (tokens != PAD).unfold(1, WINDOW, STRIDE).any(-1)  # (B, P)
        return self.shorten(windows.flatten(2)) + self.encoder.positions[: windows.size(1)], mask

    def forward(self, tokens: Tensor, fold: Tensor | None = None) -> Tensor:
        """tokens (B, T) integers, T <= max_len -> logits (B, 2)."""
        x, mask = self.embed(tokens, fold)
        for layer in self.encoder.layers:
            x = layer(x, mask[:, None, None, :])
        x = pool_tokens(self.encoder.final_norm(x), mask, self.pool)
        return self.head(self.dropout(x))


def make_model(s: Settings, vocab_size: int) -> ReviewClassifier:
    """Its weights are a function of the seed. ValueError for sizes that don't fit."""
    torch.manual_seed(s.seed)
    names = ("max_len", "d_model", "n_heads", "n_layers", "d_ff", "dropout")
    sizes = {name: getattr(s, name) for name in names}
    return ReviewClassifier(EncoderConfig(vocab_size, pad_id=PAD, pool="mean+max", **sizes), s.odds)


# -----------------------------------------------------------------------------
# Train


@dataclass
class Run:
    """How far a run has come. With weights and optimizer it is a checkpoint."""

    settings: dict  # what must be the same in all parts of a run
    ranks: list[bytes] = field(default_factory=list)  # the tokenizer's
    teacher: dict[str, list[float]] = field(default_factory=dict)  # the linear model's P(class 1)
    step: int = 0
    seconds: float = 0.0  # of training
    total_seconds: float = 0.0  # of all, up to the last checkpoint
    begun: float = 0.0  # by perf_counter, as if it had never stopped
    right: int = 0  # training texts answered right since the last look at dev
    seen: int = 0
    history: list[dict] = field(default_factory=list)  # a row a look at dev
    reached: bool = False  # the target is


def train(model: nn.Module, examples: Examples, dev: Examples, run: Run, kept: dict, s: Settings, p) -> None:
    """From step run.step to the last; run, weights and optimizer are saved in OUT every so often.

    All randomness of a step is a function of seed, step and rank: a run that goes on needs no
    generator's state to end with the same weights. After a signal it saves and raises ddp.Stop.
    """
    from tqdm import tqdm

    lengths = [len(x) for x in examples.ids]
    steps = max(s.min_steps, s.epochs * math.ceil(len(lengths) / s.batch_size))
    looks = 16 * s.epochs if s.target else 4  # at dev, evenly spread
    look_at = {round(steps * part / looks) for part in range(1, looks + 1)}
    groups = parameter_groups(model.parameters(), weight_decay=0.01)  # of matrices alone
    optimizer = torch.optim.AdamW(groups, lr=s.lr, fused=True)
    if run.step:
        ddp.load_optimizer(optimizer, kept.get("optimizer"), p)
    parallel = ddp.wrap(model, p)
    parallel.forward_sync_buffers = False  # for DDP: all ranks have the odds, send none
    signals = ddp.Signals(p)
    saved = time.monotonic()
    bar = tqdm(initial=run.step, total=steps, unit="step", disable=None if p.rank == 0 else True)
    for rows in batches(lengths, s, run.step, 0 if run.reached else steps):
        start = time.perf_counter()
        model.train()
        torch.manual_seed(s.seed * 1_000_003 + run.step + 2**40 * p.rank)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min((run.step + 1) / s.warmup, ddp.warmup_cosine(run.step, 0, steps))
        mine = rows[p.rank :: p.world]
        optimizer.zero_grad()
        loss, right = hidden_loss(parallel, *examples.batch(mine or rows[:1], p.device), s)
        if not mine:  # fewer texts than ranks: its loss counts 0
            loss, right = 0 * loss, 0
        ddp.share_of_mean(loss, len(rows), p.world).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        # All ranks stop, and save, at the same step: one sum tells them.
        due = p.rank == 0 and time.monotonic() - saved > s.save_every
        loss, right, stop, due = ddp.sum_over_ranks([loss.item(), right, signals.received(), due], p)
        ddp.check_finite("loss", loss, run.step)
        ddp.check_finite("gradient's norm", norm.item(), run.step)
        optimizer.step()
        run.step += 1
        run.right += round(right)
        run.seen += len(rows)
        run.seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{loss / len(rows):.3f}", refresh=False)
        bar.update()
        if run.step in look_at:
            scores = log_odds(model.eval(), dev.ids, p)
            labels = torch.tensor(dev.targets, dtype=torch.float64)
            row = {
                "step": run.step,
                "seconds": round(run.seconds, 1),
                "train_accuracy": round(run.right / run.seen, 4),  # since the last look
                "dev_accuracy": accuracy(scores, labels),
                "dev_loss": round(F.binary_cross_entropy_with_logits(scores, labels).item(), 4),
            }
            run.history.append(row)
            run.right = run.seen = 0
            error = math.sqrt(s.target * (1 - s.target) / len(dev.ids))  # standard error
            run.reached = s.target > 0 and row["dev_accuracy"] > s.target + error
            if p.rank == 0:
                bar.clear()
                print("   ".join(f"{name.replace('_', ' ')} {x}" for name, x in row.items()), flush=True)
        last = run.step == steps or run.reached
        if last or stop or due:
            run.total_seconds = time.perf_counter() - run.begun
            state = {"run": vars(run), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            keep = 1 if last else 2
            path = ddp.on_rank_0(partial(ddp.save_checkpoint, Path(s.out), run.step, state, keep), p)
            saved = time.monotonic()
        if stop and not last:
            number = signals.noted[0] if signals.noted else signal.SIGTERM  # of this rank, or of another
            done = f"interrupted: step {run.step} of {steps} is saved in {path}; the same command goes on"
            raise ddp.Stop(done, 128 + number, shared=True)
        if last:
            break
    bar.close()
    signals.restore()


def hidden_loss(model, tokens: Tensor, targets: Tensor, folds: Tensor, s: Settings) -> tuple[Tensor, int]:
    """(the loss () summed over a batch with hidden words, how many answers are right)."""
    hidden = (torch.rand(tokens.shape) < s.mask_words).to(tokens.device) & (tokens != PAD)
    logits = model(tokens.masked_fill(hidden, MASK), folds)  # (B, K)
    loss = F.cross_entropy(logits, torch.stack((1 - targets, targets), -1), reduction="sum")
    return loss, (logits.argmax(-1) == (targets > 0.5)).sum().item()


@torch.no_grad()
def log_odds(model: Callable, ids: list[Tensor], p: ddp.Processes) -> Tensor:
    """Log-odds of class 1, (N,) float64, on every rank: each text is computed on one rank, once.
    model: a module in eval mode, or an ONNX file's function."""
    scores = torch.zeros(len(ids), dtype=torch.float64)
    by_length = torch.tensor([len(x) for x in ids]).argsort()  # batches with little padding
    for rows in by_length.split(64)[p.rank :: p.world]:
        logits = model(pad([ids[i] for i in rows]).to(p.device)).cpu().double()  # (B, K)
        scores[rows] = logits[:, 1] - logits[:, 0]
    return torch.tensor(ddp.sum_over_ranks(scores.tolist(), p), dtype=torch.float64)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Fraction of scores (N,) whose sign is that of the labels (N,): > 0 means class 1."""
    return round(((scores > 0) == labels.bool()).double().mean().item(), 5)


# -----------------------------------------------------------------------------
# Classify and test


def classify(s: Settings, p: ddp.Processes, kept: dict) -> None:
    """The whole job, or what is left of it. Rank 0 alone reads, tests and exports; all ranks train.
    kept: rank 0's lock on OUT and its checkpoint's tensors."""
    corpus, run = ddp.on_rank_0(lambda: open_run(s, kept), p)
    if run is None:  # it is finished
        return
    train_set, dev_set = split_dev(corpus)
    tokenizer = Tokenizer(run.ranks)
    examples = encode(tokenizer, train_set, learned_labels(train_set, s), s.max_len)
    if s.unlabelled:
        more = encode(tokenizer, corpus.unlabelled, run.teacher["unlabelled"], s.max_len)
        examples = Examples(*(a + b for a, b in zip(examples, more, strict=True)))
    dev = encode(tokenizer, dev_set, [r.label for r in dev_set], s.max_len)
    model = make_model(s, tokenizer.vocab_size)
    if s.odds:
        model.odds.fit(examples)
    if run.step and p.rank == 0:
        model.load_state_dict(kept["model"])  # DDP sends it to the others
    kept["training"] = True
    train(model.to(p.device), examples, dev, run, kept, s, p)
    ddp.on_rank_0(lambda: finish(model, tokenizer, corpus, examples, dev, run, s, p), p)


def finish(model, tokenizer, corpus: Corpus, examples: Examples, dev: Examples, run: Run, s, p) -> None:
    """For rank 0: test, pictures, export, page, report (last: with it the run is finished)."""
    out = Path(s.out)
    test = encode(tokenizer, corpus.test, [r.label for r in corpus.test], s.max_len)
    labels = torch.tensor(test.targets)
    scores = log_odds(model.eval(), test.ids, replace(p, world=1))  # (N,) rank 0 does all
    report = {
        "dataset": corpus.name,
        "test_accuracy": accuracy(scores, labels),
        "dev_accuracy": run.history[-1]["dev_accuracy"],
        "calibration_error": plot_results(run.history, scores, labels, out / "results.png"),
        "train_seconds": round(run.seconds, 1),
        "n_parameters": sum(weight.numel() for weight in model.parameters()),
        "n_counted": model.odds.table.numel() if s.odds else 0,
        "preset": s.preset,
        "seed": s.seed,
        "processes": p.world,
        "history": run.history,
        "settings": run.settings,
    } | hardware(p.device)
    if run.teacher:  # the linear model's answers, and what both say together
        linear = torch.tensor(run.teacher["test"]).logit(1e-6)
        report["linear_test_accuracy"] = accuracy(linear, labels)
        report["with_linear_test_accuracy"] = accuracy(scores + linear, labels)
    if s.target:  # seconds: from the start to the last step
        report["target"] = {"reached": run.reached, "seconds": round(run.total_seconds, 1)}
    report |= export_models(model.cpu(), tokenizer, corpus, examples, dev, test, s)
    report["total_seconds"] = round(time.perf_counter() - run.begun, 1)
    write_page(report, scores, model, tokenizer, corpus, out)
    ddp.write_atomically(out / "report.json", json.dumps(report, indent=1).encode())
    print_end(report, out)


def print_end(report: dict, out: Path) -> None:
    """How good it is, where the page is, what to do next, and a short JSON line."""
    good, seconds = report["test_accuracy"], report["total_seconds"]
    print(f"\n{good:.2%} of the test texts right ({report['dataset']}), after {seconds:.0f} s in all")
    print(f"the page: open {out / 'index.html'}")
    print(f'next: python classify_imdb.py --out {out} --predict "A film to remember."')
    keys = ("dataset", "test_accuracy", "dev_accuracy", "train_seconds", "total_seconds")
    print(json.dumps({key: report[key] for key in keys} | {"report": str(out / "report.json")}), flush=True)


# -----------------------------------------------------------------------------
# Extras: going on, more data, page, export, prediction, the linear model, command line


def open_run(s: Settings, kept: dict) -> tuple[Corpus, Run | None]:
    """For rank 0: the texts, and the run in OUT or a new one with its tokenizer and teacher.
    None for a finished run; ValueError if OUT holds another one."""
    start = time.perf_counter()
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(s)
    settings = {name: value for name, value in asdict(s).items() if name not in MAY_CHANGE}
    settings |= {"dataset": corpus.name, "labels": corpus.labels}
    texts = "".join(f"{r.label}{r.text}\0" for r in corpus.train + corpus.test + corpus.unlabelled)
    settings["texts"] = hashlib.sha256(texts.encode()).hexdigest()
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        made = report["exported"] >= s.export and report.get("exports_kept", False) >= s.keep_exports
        if report["settings"] == settings and made:
            print(f"this run is finished; another one needs another --out than {out}")
            print_end(report, out)
            return corpus, None
    kept["lock"] = ddp.lock_out(out)
    kept.update(ddp.load_checkpoint(out) or {"run": {"settings": settings}})
    there = kept.get("run", {}).get("settings", {})  # another script's state may be without
    if wrong := ddp.differences(there, settings):
        raise ValueError(f"--out {out} holds another run ({wrong}); give another --out")
    run = Run(**kept["run"])
    run.begun = start - run.total_seconds
    train_set, dev_set = split_dev(corpus)
    kind = "drawn at random" if corpus.name == "own" else "blocks of neighbours"
    print(f"{len(train_set):,} to learn from, {len(dev_set):,} dev ({kind}), {len(corpus.test):,} test")
    print(f"going on at step {run.step}" if run.ranks else "preparing", flush=True)
    if not run.ranks:
        run.ranks = Tokenizer.train(train_set, s.vocab_size).ranks
        if s.unlabelled:
            linear, _ = linear_model(train_set, learned_labels(train_set, s))
            run.teacher = {"unlabelled": linear(corpus.unlabelled), "test": linear(corpus.test)}
        ddp.save_checkpoint(out, 0, {"run": vars(run)})
    return corpus, run


# ---- more data: the download, your own texts, generated ones

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SIZE = 84_125_825
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
BANNER = f"""{"!" * 100}
!!  IMDB WAS NOT FOUND AND COULD NOT BE DOWNLOADED. What follows is NOT about IMDB, but about reviews
!!  that a grammar makes. Where there is a network, fetch {IMDB_URL}, and give it as --data"""


def load_corpus(s: Settings) -> Corpus:
    """Those of --data; without it IMDB from the cache, by download, or generated texts."""
    try:
        path = Path(s.data) if s.data else find_imdb()
    except OSError as error:
        print(f"{BANNER}\n!!  {error}", flush=True)
        pairs = enumerate(generate_reviews(12_000, s.seed))
        reviews = [Review(i // 2, label, text) for i, (text, label) in pairs]
        unlabelled = [Review(i, -1, review.text) for i, review in enumerate(reviews[10_000:])]
        return Corpus("demo", ["negative", "positive"], reviews[:8000], reviews[8000:10_000], unlabelled)
    if not path.exists():
        raise ValueError(f"--data {path} does not exist")
    # IMDB, whole or not: any file but .csv; a folder in or around aclImdb, or as large as IMDB.
    sizes = {folder: len(list((path / folder).glob("*"))) for folder in PER_FOLDER}
    named = "aclImdb" in path.resolve().parts or (path / "aclImdb").is_dir()
    if path.suffix.lower() == ".csv" or not (named or sizes == PER_FOLDER or path.is_file()):
        if s.unlabelled:
            raise ValueError(f"--data {path} has no unlabelled texts: leave out --preset best")
        return read_own(path)
    return read_imdb(path, s.unlabelled)


def learned_labels(reviews: list[Review], s: Settings) -> list[int]:
    """The labels; in another order with --shuffle-labels."""
    labels = [r.label for r in reviews]
    return random.Random(s.seed).sample(labels, len(labels)) if s.shuffle_labels else labels


def find_imdb() -> Path:
    """The tarball in the cache, downloaded if it isn't there. Raises OSError.
    What arrived before a break stays in a .part; the next attempt, now or later, gets the rest."""
    from tqdm import tqdm

    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "imdb", "aclImdb_v1.tar.gz")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with ddp.lock_out(path.parent, patience=3600.0):  # of two first runs one downloads
        if path.exists():  # it came meanwhile
            return path
        part = path.with_name(path.name + ".part")
        part.touch()
        have = -1
        while have < part.stat().st_size < IMDB_SIZE:  # an attempt that brings nothing is the last one
            have = part.stat().st_size
            problem = "the connection broke off"
            request = urllib.request.Request(IMDB_URL, headers={"Range": f"bytes={have}-"} if have else {})
            try:
                with urllib.request.urlopen(request, timeout=20) as response:
                    with open(part, "ab" if response.status == 206 else "wb") as file:  # 206: the rest alone
                        with tqdm.wrapattr(file, "write", IMDB_SIZE, initial=file.tell()) as rest:
                            shutil.copyfileobj(response, rest)
            except (OSError, http.client.HTTPException) as error:  # no network, no file, broken off
                problem = error
        have = part.stat().st_size
        if have < IMDB_SIZE:
            raise OSError(f"{IMDB_URL}: {problem} after {have:,} of {IMDB_SIZE:,} bytes")
        if hashlib.md5(part.read_bytes()).hexdigest() != IMDB_MD5:
            part.unlink()
            raise OSError(f"{IMDB_URL}: what arrived had another md5 and was thrown away")
        os.replace(part, path)
    return path


def imdb_files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, reader) of each file; path: a tarball, aclImdb, or the folder that holds it."""
    if path.is_dir():
        root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
        yield from ((file.as_posix(), file.read_bytes) for file in root.rglob("*.txt"))
        return
    try:
        data = gzip.decompress(path.read_bytes())  # tarfile alone skips a damaged tail
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                yield member.name, tar.extractfile(member).read
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"--data {path} is damaged, or no .tar.gz or .csv ({error})") from None


def read_own(path: Path) -> Corpus:
    """Your own texts with two labels of any names, at least 10 texts of each to learn from.

    path: a CSV file with columns text and label, of which a random tenth becomes the test; or a folder
    with train.csv and test.csv, or with train/LABEL/*.txt and test/LABEL/*.txt. ValueError otherwise.
    """
    if path.is_file():
        parts = {"train": read_rows(path)}
    else:
        ending = ".csv" if (path / "train.csv").exists() else ""
        parts = {part: read_rows(path / (part + ending)) for part in ("train", "test")}
    names = sorted({label for rows in parts.values() for label, _ in rows})
    if len(names) != 2 or "" in names:
        raise ValueError(f"--data {path} has the labels {names[:9]} ('': too few or many fields), not two")
    reviews = {"train": [], "test": []}
    for part, rows in parts.items():
        for label, name in enumerate(names):
            texts = [text for its_label, text in rows if its_label == name]
            if part == "train" and len(texts) < 10:
                raise ValueError(f"--data {path} has {len(texts)} texts {name} in train; needed are 10")
            reviews[part] += [Review(i, label, text) for i, text in enumerate(texts)]
    if path.is_file():
        reviews["train"], reviews["test"] = hold_out(reviews["train"], seed=0)
    if not reviews["test"]:
        raise ValueError(f"--data {path} has no texts to test on")
    return Corpus("own", names, **reviews)


def read_rows(path: Path) -> list[tuple[str, str]]:
    """(label, text) of each row of a CSV file, or of each LABEL/*.txt of a folder."""
    if path.is_dir():
        return [(file.parent.name, read_utf8(file)) for file in sorted(path.glob("*/[!.]*.txt"))]
    csv.field_size_limit(2**31 - 1)  # texts may be long
    rows = csv.DictReader(io.StringIO(read_utf8(path), newline=""), restval="", strict=True)
    try:
        return [("" if None in row else row["label"], row["text"]) for row in rows]  # None: too many
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path} has no column {error}, but {', '.join(rows.fieldnames)}") from None


def read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def hold_out(reviews: list[Review], seed: int) -> tuple[list[Review], list[Review]]:
    """(the rest, a tenth of each class drawn at random)."""
    drawn = random.Random(seed).sample(reviews, len(reviews))
    held = set(sorted(drawn, key=lambda r: r.label)[5::10])
    return [r for r in reviews if r not in held], [r for r in reviews if r in held]


# ---- pictures and the page: one file to open, and to send to a colleague


def plot_results(history: list[dict], scores: Tensor, labels: Tensor, path: Path) -> float:
    """Learning curves and calibration as a PNG: of texts with P(class 1) about x, a fraction x should
    be of class 1. Returns the expected error of that over ten bins."""
    from matplotlib.figure import Figure
    from sklearn.calibration import calibration_curve

    p = scores.sigmoid()
    happened, said = calibration_curve(labels, p, n_bins=10)
    bins = (10 * p).long().clamp(max=9)
    error = bins.bincount(p - labels).abs().sum().item() / len(p)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves, calibration = figure.subplots(1, 2)
    seconds = [row["seconds"] for row in history]
    for key, label in (("train_accuracy", "training, words hidden"), ("dev_accuracy", "dev")):
        curves.plot(seconds, [100 * row[key] for row in history], "o-", label=label)
    curves.set(title="Learning curves", xlabel="training time (s)", ylabel="accuracy (%)")
    calibration.plot((0, 1), (0, 1), "--", color="grey", label="perfect")
    calibration.plot(said, happened, "o-", label=f"model, error {error:.3f}")
    calibration.set(title="Calibration", xlabel="predicted P(class 1)", ylabel="fraction of class 1")
    for axes in (curves, calibration):
        axes.legend()
    figure.savefig(path, dpi=110)
    return round(error, 4)


STYLE = """<style>body { max-width: 60rem; margin: 2rem auto; font-family: sans-serif }
td { border-bottom: 1px solid #ddd } img, iframe { width: 100% } iframe { height: 38rem }</style>"""


def write_page(report: dict, scores: Tensor, model, tokenizer, corpus: Corpus, out: Path) -> None:
    """OUT/index.html: answer, table, pictures, mistakes, attention; no other file, no network."""
    title = f"{report['test_accuracy']:.1%} of {len(corpus.test):,} test texts right ({corpus.name})"
    facts = {name.replace("_", " "): x for name, x in report.items() if not isinstance(x, list | dict)}
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
        f"{STYLE}<h1>{title}</h1>",
        html_table([("class 0, class 1", ", ".join(corpus.labels)), *facts.items()]),
    ]
    for name in ("results.png", "export.png"):
        data = base64.b64encode((out / name).read_bytes()).decode()
        parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>')
    parts.append("<h2>The most confident mistakes</h2>")
    labels = torch.tensor([r.label for r in corpus.test])
    right = torch.where(labels == 1, scores, -scores).sigmoid()  # (N,) P(right label)
    rows = []
    for i in right.argsort()[: min(20, (right < 0.5).sum())].tolist():
        name = corpus.labels[labels[i]]
        rows.append((name, f"given {right[i]:.1%}", clean(corpus.test[i].text)[:600]))
    parts.append(html_table(rows))
    if model.encoder.layers:
        parts.append("<h2>Where the heads look</h2><p>A place stands for four tokens. Point at one.</p>")
        text = min((r.text for r in corpus.test), key=lambda text: abs(len(text) - 400))
        weights, words = attention_of(model, tokenizer, text)
        path = attention.attention_html(weights, words, words, out / "attention.html")
        page = html.escape(path.read_text(encoding="utf-8"))
        parts.append(f'<iframe title="attention" srcdoc="{page}"></iframe>')
    (out / "index.html").write_text("\n".join(parts), encoding="utf-8")


def html_table(rows: Iterable[Iterable]) -> str:
    """Escaped, a cell for each value."""
    lines = ["".join(f"<td>{html.escape(str(x))}</td>" for x in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


@torch.no_grad()
def attention_of(model: nn.Module, tokenizer: Tokenizer, text: str) -> tuple[Tensor, list[str]]:
    """The weights (L, H, P, P) of a text, and the words at each place."""
    (ids,) = tokenizer.encode([text], model.config.max_len)
    x, mask = model.embed(pad([ids]))  # (1, P, C), (1, P)
    weights = []
    for layer in model.encoder.layers:
        x, w = layer.forward_with_weights(x, mask[:, None, None, :])
        weights.append(w[0])  # (H, P, P)
    first = STRIDE - WINDOW // 2  # a place's own tokens: the first has two, the others four
    parts = [ids[:first], *ids[first:].split(STRIDE)]
    words = [tokenizer.bpe.decode((part - SPECIAL).tolist()) for part in parts if len(part)]
    return torch.stack(weights), words or ["(nothing)"]


# ---- export: this model in export.py's formats; --predict uses one of them

ALONE = ddp.Processes(rank=0, world=1, device=torch.device("cpu"))
TUNING = 400  # steps at most that the pruned copy is fine-tuned for


def in_batches(examples: Examples, every: int = 1) -> list[tuple[tuple, Tensor]]:
    """As export.py takes them: ((tokens (B, T),), labels (B,)), by length; one text of every so many."""
    rows = sorted(range(0, len(examples.ids), every), key=lambda i: len(examples.ids[i]))
    parts = [examples.batch(rows[i : i + 50]) for i in range(0, len(rows), 50)]
    return [((tokens,), targets.round().long()) for tokens, targets, _ in parts]


def pruned_copy(model: ReviewClassifier, sample: list, examples: Examples, s: Settings) -> ReviewClassifier:
    """A copy with a quarter of the heads and an eighth of the neurons; sample tells which. Fine-tuning mends
    it: its targets lie half-way between the labels and what the whole model says (distillation: Hinton et
    al., arXiv:1503.02531). With a layer less it would be faster, and disagree with the model more often."""
    pruned = export.prune_heads(model, export.head_importance(model, sample), keep=max(1, s.n_heads // 4))
    pruned = export.prune_neurons(pruned, export.neuron_importance(pruned, sample), keep=max(1, s.d_ff // 8))
    lengths = [len(x) for x in examples.ids]
    steps = min(TUNING, math.ceil(len(lengths) / s.batch_size))
    optimizer = torch.optim.AdamW(pruned.parameters())
    torch.manual_seed(s.seed)
    pruned.train()
    for step, rows in enumerate(batches(lengths, s, 0, steps)):
        tokens, targets, folds = examples.batch(rows)
        with torch.no_grad():
            said = model(tokens, folds).softmax(-1)[:, 1]  # (B,)
        loss, _ = hidden_loss(pruned, tokens, (targets + said) / 2, folds, s)
        optimizer.param_groups[0]["lr"] = s.lr / 2 * (1 - step / steps)
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        nn.utils.clip_grad_norm_(pruned.parameters(), s.clip or math.inf)
        optimizer.step()
    return pruned.eval()


def export_models(model, tokenizer, corpus: Corpus, examples: Examples, dev: Examples, test, s) -> dict:
    """export.py's table for the model and its pruned copy, measured on dev. The fastest ONNX file that gives
    the model's answer on 95% of dev is kept as OUT/model.onnx; the test has no say in it."""
    out = Path(s.out)
    models = {"original": model.eval()}
    sample = in_batches(examples, every=max(1, len(examples.ids) // 1000))  # of both classes
    if s.export and s.n_layers and len(dev.ids) >= 200:  # fewer couldn't tell what pruning costs
        models["pruned"] = pruned_copy(model, sample, examples, s)
    if s.odds:
        for each in models.values():  # training is over
            each.odds.without_fold = each.odds.without_fold[:0].clone()
    T = min(256, s.max_len)
    example = (torch.randint(SPECIAL, tokenizer.vocab_size, (32, T)),)
    cases = {f"32 x {T}": [example], f"1 x {T}": [(example[0][:1],)]}
    about = {"labels": corpus.labels, "max_len": s.max_len, "pattern": WORDS}
    about["tokens"] = [token.decode("latin-1") for token in tokenizer.ranks]  # a letter for each byte
    calibration = [{"tokens": tokens} for (tokens,), _ in sample[::4]]
    some = ("ONNX", "ONNX int8, dynamic, embeddings") if s.export else ("ONNX",)
    rest = {"metadata": about, "seconds": 0.3, "only": () if s.keep_exports else some}
    with tempfile.TemporaryDirectory() as folder:
        folder = out / "export" if s.keep_exports else Path(folder)
        report = export.export_all(models, example, in_batches(dev), cases, calibration, folder, **rest)
        rows = report["models"]
        onnx = [row for row in rows if row["file"].endswith(".onnx") and row["agreement"] >= 0.95]
        if not onnx:
            raise ValueError(f"no ONNX file could be made: {report['refused']}")
        best = min(onnx, key=lambda row: row["p50_ms"])
        ddp.write_atomically(out / "model.onnx", (folder / best["file"]).read_bytes())
    for row in rows:
        row["file"] = row["file"] if s.keep_exports else "model.onnx" if row is best else None
    report["recommended"] = best["name"]
    export.print_table(report)
    export.plot_rows(report, out / "export.png")
    scores = log_odds(export.load_artefact(out / "model.onnx"), test.ids, ALONE)
    right = accuracy(scores, torch.tensor(test.targets))
    print(f"--predict uses {best['name']}: {right:.2%} of the test texts right")
    report |= {"deployed_test_accuracy": right, "exported": s.export, "exports_kept": s.keep_exports}
    return report


def predict(s: Settings) -> None:
    """An answer for each text or line, as it comes: plain on a terminal, else as JSON. Skips blank lines."""
    path = Path(s.out, "model.onnx")
    if not path.exists():
        raise ValueError(f"--predict: there is no {path} yet; train a model first")
    run = export.load_artefact(path)  # ValueError if it is damaged
    names, max_len, tokens = (json.loads(run.metadata[key]) for key in ("labels", "max_len", "tokens"))
    tokenizer = Tokenizer([token.encode("latin-1") for token in tokens])
    lines = [s.predict]
    if s.predict == "-" or os.path.exists(s.predict):  # a file
        lines = open(0 if s.predict == "-" else s.predict, encoding="utf-8-sig")  # 0: stdin
    for text in (line.rstrip("\r\n") for line in lines if line.strip()):
        (ids,) = tokenizer.encode([text], max_len)
        score = log_odds(run, [ids], ALONE)
        p = score.sigmoid().item()
        sure, label = max((1 - p, names[0]), (p, names[1]))
        words = explain(ids, score, tokenizer, run) if s.explain else []
        if sys.stdout.isatty():
            print(f"{label} {sure:.1%}, P({names[1]}) = {p:.4f}: {text[:200]}")
            for word, change in words:
                print(f"  {change:+.2f} {word}")
        else:
            both = {names[0]: round(1 - p, 6), names[1]: round(p, 6)}
            answer = {"label": label, "probability": both[label], "text": text, "probabilities": both}
            print(json.dumps(answer | ({"explain": words} if s.explain else {})), flush=True)


def explain(ids: Tensor, score: Tensor, tokenizer: Tokenizer, run: Callable) -> list[list]:
    """The ten words that matter most: [word, how far the log-odds of class 1 fall without it].
    Words that say the same twice hide each other. (A sure answer's probability would hardly move.)"""
    pieces = [tokenizer.bpe.decode_single_token_bytes(i - SPECIAL) for i in ids.tolist()]
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece.startswith(b" ")]
    spans = list(zip(starts, [*starts[1:], len(pieces)], strict=True)) if pieces else []
    hidden = [torch.cat((ids[:a], torch.full((b - a,), MASK), ids[b:])) for a, b in spans]
    changes = (score - log_odds(run, hidden, ALONE)).tolist() if hidden else []
    words = [b"".join(pieces[a:b]).decode(errors="replace").strip() for a, b in spans]
    found = [[word, round(change, 3)] for word, change in zip(words, changes, strict=True)]
    return sorted(found, key=lambda pair: -abs(pair[1]))[:10]


# ---- the linear model (to beat, or a teacher), and the command line


def linear_model(reviews: list[Review], labels: list[int]) -> tuple[Callable, int]:
    """Logistic regression on 1- to 4-grams, weighted by naive Bayes (Wang and Manning 2012).
    Returns (a function of reviews to P(class 1) of each, its number of parameters)."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    words = r"\w+|[^\w\s]"
    counts = CountVectorizer(ngram_range=(1, 4), min_df=2, binary=True, token_pattern=words)
    has = counts.fit_transform([clean(r.text) for r in reviews])  # (N, n-grams) 0 or 1
    y = np.array(labels)
    negative = 1 + np.asarray(has[y == 0].sum(0)).ravel()  # reviews with it
    positive = 1 + np.asarray(has[y == 1].sum(0)).ravel()
    weights = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
    # A review's features are scaled to length 1: a long one isn't surer because it is long.
    model = LogisticRegression(C=30, max_iter=300).fit(normalize(has.multiply(weights).tocsr()), y)

    def predict_probabilities(reviews: list[Review]) -> list[float]:
        has = counts.transform([clean(r.text) for r in reviews])
        return model.predict_proba(normalize(has.multiply(weights).tocsr()))[:, 1].tolist()

    return predict_probabilities, model.coef_.size + 1


def baseline(s: Settings) -> None:
    """Train and test the linear model; OUT/baseline.json and the last line say how good it is."""
    Path(s.out).mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(s)
    train_set, dev_set = split_dev(corpus)
    start = time.perf_counter()
    linear, n_parameters = linear_model(train_set, learned_labels(train_set, s))
    report = {"dataset": corpus.name, "train_seconds": round(time.perf_counter() - start, 1)}
    for name, part in (("dev", dev_set), ("test", corpus.test)):
        scores = torch.tensor(linear(part)) - 0.5
        report[f"{name}_accuracy"] = accuracy(scores, torch.tensor([r.label for r in part]))
    report["n_parameters"] = n_parameters
    path = Path(s.out, "baseline.json")
    path.write_text(json.dumps(report | hardware(ALONE.device), indent=1))
    print(json.dumps(report | {"report": str(path)}))


def hardware(device: torch.device) -> dict:
    """Stands beside the times. gemm_gflops: an fp32 matmul of 1024^3."""
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    a = torch.randn(1024, 1024, device=device)
    seconds = Timer("a @ a", globals={"a": a}, num_threads=threads).blocked_autorange().median
    return {
        "device": device.type,
        "cpu": torch.cpu.get_capabilities().get("cpu_name"),
        "threads": threads,
        "torch": torch.__version__,
        "gemm_gflops": round(2 * 1024**3 / seconds / 1e9, 1),
    }


def parse(arguments: list[str]) -> Settings:
    """The preset's settings, but for what the command line says. ValueError for impossible ones."""
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="fast")
    preset = first.parse_known_args(arguments)[0].preset
    s = tyro.cli(Settings, args=arguments, default=PRESETS.get(preset), description=__doc__)
    least = {"vocab_size": SPECIAL + 256, "max_len": 1, "epochs": 1, "batch_size": 1, "warmup": 1}
    for name, x in vars(s).items():
        below = 1 if name in ("dropout", "mask_words", "target") else 2**32  # 0.85, not 85
        if isinstance(x, int | float) and not least.get(name, 0) <= x < below:
            raise ValueError(f"{name} must be in [{least.get(name, 0)}, {below}), got {x}")
    if not s.predict and (s.explain or any(x.startswith("--predict") for x in arguments)):
        raise ValueError("--predict needs a text, a file, or - for stdin; --explain needs --predict")
    make_model(s, vocab_size=SPECIAL + 256)  # refuses sizes that don't fit
    return s


def main(arguments: list[str]) -> int:
    """Exit code: 0 done, 1 failed, 2 wrong input, 128 + n ended by signal n."""
    p = None
    kept = {}
    try:
        s = parse(arguments)
        if s.predict:
            predict(s)
        elif s.baseline:
            baseline(s)
        else:
            p = ddp.start_processes(s.device)
            classify(s, p, kept)
        return 0
    except KeyboardInterrupt:  # outside of training, which saves first
        print("interrupted" + "; the same command goes on" * (p is not None), file=sys.stderr)
        return 130
    except Exception as error:
        return ddp.explain(error, p, "training" in kept)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    warnings.simplefilter("ignore")  # the exporters' warnings and log lines
    logging.disable(logging.WARNING)
    ddp.exit_now(main(sys.argv[1:]))
