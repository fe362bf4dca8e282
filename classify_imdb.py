"""Sentiment of movie reviews: encoder.py's Transformer trained from scratch on IMDB, and used.

On 2 cores of a Xeon (torch 2.13.0): 91.17 ± 0.18% of IMDB's test reviews right after 124 s (3 seeds);
with the unlabelled reviews 92.21 ± 0.14% after 13 to 21 minutes on one core. A linear model: 91.87%.

    python classify_imdb.py                                  # finds or downloads IMDB, trains, tests, reports
    python classify_imdb.py --data aclImdb_v1.tar.gz         # or the unpacked folder
    python classify_imdb.py --predict "A film to remember."  # by the trained model; or a file, or - for stdin
    python classify_imdb.py --predict "A waste." --explain   # and the words that carried the answer
    python classify_imdb.py --preset best --out out/best     # learns from the unlabelled reviews too
    python classify_imdb.py --target 0.85 --out out/target   # as fast as possible to 85%
    python classify_imdb.py --baseline                       # the linear model to compare with
    torchrun --nproc_per_node=2 classify_imdb.py             # DDP, with train_ddp.py's pieces

The same command goes on where it was stopped. Data: Maas et al., "Learning Word Vectors for Sentiment
Analysis", ACL 2011. Tokenizer: byte-level BPE (Sennrich et al., arXiv:1508.07909) of the training reviews.
Shapes: B batch, T tokens, P places (every fourth token), K = 2 classes (0 negative, 1 positive), N reviews.
"""

import argparse
import base64
import codecs
import contextlib
import copy
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import attention
import export
from encoder import EncoderClassifier, EncoderConfig, generate_reviews, pool_tokens
from losses import parameter_groups
from train_ddp import (
    Interrupted,
    Lost,
    Processes,
    Signals,
    differences,
    exit_now,
    load_checkpoint,
    on_rank_0,
    save_checkpoint,
    share_of_mean,
    start_processes,
    sum_over_ranks,
    waiting,
    wrap,
    write_atomically,
)

# -----------------------------------------------------------------------------
# Settings

PRESETS = {  # what differs from the defaults below; flags go before both
    "fast": {},
    "best": {"unlabelled": True, "max_len": 1024},
}


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    data: str = setting(os.environ.get("IMDB_DATA", ""), "IMDB, tarball or folder; empty: cache, or download")
    preset: str = setting("fast", "fast: labelled reviews alone; best: the 50,000 unlabelled ones too")
    out: str = setting("out/classify_imdb", "model, checkpoint, report and pictures go here")
    seed: int = setting(0, "same seed, same machine, same threads: same weights")
    predict: str | None = setting(None, "classify a text, a file's or (for -) stdin's lines; no training")
    explain: bool = setting(False, "with --predict: also the words that carried the answer")
    baseline: bool = setting(False, "train and test the linear model instead")
    shuffle_labels: bool = setting(False, "honesty check: learn shuffled labels; the test must give 50%")
    device: str = setting("auto", "auto (cuda, then cpu), cuda, cpu or mps")
    amp: str = setting("off", "bf16 autocast: off, auto (where the CPU or GPU has it) or bf16")
    vocab_size: int = setting(16000, "ids: padding, mask, then byte-level BPE")
    max_len: int = setting(512, "tokens a review, of a longer one its two ends: opinions stand there")
    d_model: int = setting(128, "width; 64 lost a point on dev")
    n_heads: int = setting(4, "heads of 32 dimensions")
    n_layers: int = setting(2, "on a quarter of the places, see ReviewClassifier")
    d_ff: int = setting(512, "inner width of the feed-forward net, 4 x d_model")
    dropout: float = setting(0.1, "of embeddings, sub-layers and the pooled vector")
    pool: str = setting("mean+max", "mean, max, mean+max or first")
    mask_words: float = setting(
        0.2, "share of the training tokens hidden behind the mask id: less overfitting"
    )
    unlabelled: bool = setting(False, "learn the linear model's opinion of the 50,000 unlabelled reviews too")
    export: bool = setting(True, "afterwards compare export.py's formats on it; --no-export: don't")
    target: float = setting(0.0, "stop as soon as dev is safely past this accuracy, e.g. 0.85; 0: never")
    epochs: int = setting(2, "passes over the training reviews")
    batch_size: int = setting(32, "reviews a step, of similar length")
    lr: float = setting(1e-3, "AdamW's peak learning rate, then a cosine to 0")
    warmup: int = setting(100, "steps from 0 to the peak")
    weight_decay: float = setting(0.01, "on matrices; none on norms and biases")
    clip: float = setting(1.0, "largest norm of the gradient")
    save_every: float = setting(30.0, "seconds between checkpoints; 0: one after each step")


FREE = set("data out predict explain baseline device export save_every".split())  # may change in a run
ALONE = Processes(rank=0, world=1, device=torch.device("cpu"))
TIMEOUT = 3600.0  # seconds that the other ranks wait while rank 0 prepares, tests and exports

# -----------------------------------------------------------------------------
# IMDB: find, download, read, check, split

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SIZE, IMDB_MD5 = 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"
IMDB_FINGERPRINT = "c0558bb3f7a59d911d7feb3a63a5b6fe521df6f27bffaf8ae32b05f75e6a877b"
PER_FOLDER = {"train/pos": 12_500, "train/neg": 12_500, "test/pos": 12_500, "test/neg": 12_500}
UNLABELLED = {"train/unsup": 50_000}


LABELS = ("negative", "positive")


class Review(NamedTuple):
    number: int  # within its folder; neighbours are often about the same film
    label: int  # 1 = positive, 0 = negative; of the unlabelled -1
    text: str


def find_imdb(data: str) -> Path:
    """The path given, else the tarball in the cache, downloaded if it isn't there. Raises OSError."""
    if data:
        return Path(data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imdb" / "aclImdb_v1.tar.gz"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{cache}.lock", "w") as lock:
            with contextlib.suppress(ImportError):
                import fcntl  # not on Windows

                fcntl.flock(lock, fcntl.LOCK_EX)  # of two first runs one waits, and finds the file
            if not cache.exists():
                download(IMDB_URL, cache, IMDB_SIZE, IMDB_MD5)
    return cache


def download(url: str, path: Path, size: int, md5: str) -> None:
    """Fetch url to path, which exists once it is complete and right. Raises OSError.

    What arrived before a break stays in PATH.part; the next attempt, now or in a later run, gets the rest.
    An attempt that brings nothing is the last one. A file with another md5 is thrown away.
    """
    from tqdm import tqdm

    part = path.with_name(path.name + ".part")
    with tqdm(total=size, unit="B", unit_scale=True, desc="downloading IMDB", mininterval=1, delay=1) as bar:
        while (have := part.stat().st_size if part.exists() else 0) < size:
            bar.update(have - bar.n)
            try:
                fetch_rest(url, part, have, bar)
                problem = "the connection broke off"
            except urllib.error.HTTPError as error:
                raise OSError(f"{url}: the server answers {error.code} {error.reason}") from None
            except (OSError, http.client.HTTPException) as error:  # no network, no such host, broken off
                problem = str(getattr(error, "reason", error))
            if not part.exists() or part.stat().st_size <= have:
                raise OSError(f"{url}: {problem} after {have:,} of {size:,} bytes")
    with open(part, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            part.unlink()
            raise OSError(f"{url}: what arrived has another md5 than the published file; it was thrown away")
    os.replace(part, path)


def fetch_rest(url: str, part: Path, have: int, bar) -> None:
    """Append the bytes from have on to part; a server that can't continue sends all, and part begins anew."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=20) as response:
        with open(part, "ab" if response.status == 206 else "wb") as file:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def read_imdb(path: Path, unlabelled: bool = False) -> dict[str, list[Review]]:
    """The reviews of "train", "test" and, where asked for, "unlabelled", sorted by folder and number, from
    the tarball or the unpacked folder.

    Nothing is unpacked, so no path in a tarball can escape. ValueError unless all of them are there.
    """
    if not path.exists():
        raise ValueError(f"data: {path} does not exist; give aclImdb_v1.tar.gz or the folder aclImdb")
    expected = PER_FOLDER | (UNLABELLED if unlabelled else {})
    found: dict[str, dict[int, str]] = {folder: {} for folder in expected}
    for name, data in files_in_folder(path, expected) if path.is_dir() else files_in_tarball(path):
        match = re.fullmatch(r"(?:.*/)?((?:train|test)/(?:pos|neg|unsup))/(\d+)_\d+\.txt", name)
        if match and match[1] in found:
            found[match[1]][int(match[2])] = data.decode("utf-8", errors="replace")
    reviews: dict[str, list[Review]] = {"train": [], "test": []} | ({"unlabelled": []} if unlabelled else {})
    for folder, texts in found.items():
        if len(texts) != expected[folder]:
            raise ValueError(f"data: {path} has {len(texts):,} reviews in {folder}, not {expected[folder]:,}")
        split, kind = folder.split("/")
        label = {"pos": 1, "neg": 0, "unsup": -1}[kind]
        rows = [Review(number, label, text) for number, text in sorted(texts.items())]
        reviews["unlabelled" if label < 0 else split] += rows
    return reviews


def files_in_folder(path: Path, folders: Iterable[str]):
    """(name, bytes) of each file in the folders; path is aclImdb or the folder that holds it."""
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    for folder in folders:
        if not (root / folder).is_dir():
            raise ValueError(f"data: {path} has no folder {folder}; needed are {', '.join(folders)}")
        for file in (root / folder).iterdir():
            yield f"{folder}/{file.name}", file.read_bytes()


def files_in_tarball(path: Path):
    """(name, bytes) of its files.

    The gzip stream is read to its end, where the checksum stands: tarfile stops before that, and skips a
    damaged tail without a word.
    """
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name, tar.extractfile(member).read()
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data: {path} is truncated, altered, or no .tar.gz ({error})") from None


def dev_numbers(per_class: int) -> set[int]:
    """Review numbers of the dev split: five blocks of consecutive ones, a tenth of all in each class.

    Neighbours are often about the same film, so a random tenth shares its films with the training set and
    flatters by a point or more; the test set has other films.
    """
    period, length = per_class // 5, per_class // 50
    return {number for number in range(per_class) if 0 <= number % period - period * 2 // 5 < length}


def split_dev(reviews: list[Review]) -> tuple[list[Review], list[Review]]:
    """(train, dev): see dev_numbers."""
    numbers = dev_numbers(len(reviews) // 2)
    return [r for r in reviews if r.number not in numbers], [r for r in reviews if r.number in numbers]


def clean(text: str) -> str:
    """The text in lower case, each white space or line break of the data set (<br />) a single blank."""
    return " ".join(text.replace("<br />", " ").lower().split())


def shared_texts(one: list[Review], other: list[Review]) -> int:
    """How many reviews of other have the words of one in one, whatever the case and punctuation."""

    def words(review: Review) -> str:
        return " ".join(re.findall(r"\w+", clean(review.text)))

    known = {words(review) for review in one}
    return sum(words(review) in known for review in other)


def demo_reviews(seed: int) -> dict[str, list[Review]]:
    """encoder.py's generated reviews in IMDB's place: 8,000 to train (dev included), 2,000 to test, 2,000
    unlabelled."""
    reviews = [Review(i // 2, label, text) for i, (text, label) in enumerate(generate_reviews(12_000, seed))]
    unlabelled = [review._replace(label=-1, number=i) for i, review in enumerate(reviews[10_000:])]
    return {"train": reviews[:8000], "test": reviews[8000:10_000], "unlabelled": unlabelled}


def need(*modules: str) -> None:
    """Raises ValueError that names the libraries that this Python lacks."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join({"sklearn": "scikit-learn"}.get(name, name) for name in missing)
        raise ValueError(f"classify_imdb.py needs {names}: pip install {names}")


# -----------------------------------------------------------------------------
# Tokenizer

PAD, MASK, SPECIAL = 0, 1, 2  # ids 0 and 1; BPE's own ids follow
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"  # no token crosses these pieces


class Tokenizer:
    """Byte-level BPE, so that any text has an encoding. ranks: the tokens' bytes, in id order."""

    def __init__(self, ranks: list[bytes]):
        import tiktoken

        self.ranks, self.vocab_size = ranks, SPECIAL + len(ranks)
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        self.bpe = tiktoken.Encoding("reviews", pat_str=WORDS, mergeable_ranks=mergeable, special_tokens={})

    @staticmethod
    def train(texts: list[str], vocab_size: int) -> "Tokenizer":
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - SPECIAL, pattern=WORDS)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return Tokenizer([bytes(token) for token, _ in by_rank])

    def encode(self, texts: list[str], max_len: int) -> list[Tensor]:
        """ids (T,) of each text, T <= max_len: of a longer text its first and last max_len / 2 tokens."""
        texts, head = [clean(text) for text in texts], max_len // 2
        encoded = self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        short = (ids if len(ids) <= max_len else ids[:head] + ids[head - max_len :] for ids in encoded)
        return [torch.tensor(ids, dtype=torch.long) + SPECIAL for ids in short]


def pad(ids: list[Tensor]) -> Tensor:
    """Encoded texts as one (B, T), T the longest of them and at least 1."""
    tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    return tokens if tokens.size(1) else torch.full((len(ids), 1), PAD)


def batches(lengths: list[int], batch_size: int, seed: int) -> list[list[int]]:
    """All indices once, in batches of similar length, in random order: little padding, and still a shuffle.

    Rows are shuffled, cut into groups of 50 batches, and sorted by length within a group only.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    out = []
    for start in range(0, len(order), 50 * batch_size):
        group = sorted(order[start : start + 50 * batch_size], key=lambda i: lengths[i])
        out += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    rng.shuffle(out)
    return out


# -----------------------------------------------------------------------------
# The model: encoder.py's Transformer behind a front of its own
#
# A word pair like "not bad" is rare: the Transformer would have to learn each from a few reviews, and learns
# those reviews by heart instead. Counting is better at that. So each token is also given how much more often
# the word, pair and triple that end with it stand in positive reviews than in negative ones (naive Bayes;
# Wang and Manning 2012), and the Transformer learns what to make of it. The trap: a review's own label is in
# those counts. While training they come from the other folds of the reviews, those about other films.
# Unlabelled reviews count as what their teacher takes them for: many more n-grams are then known.

STRIDE, WINDOW = 4, 5  # a place of the Transformer stands for 4 tokens, and sees 5
FOLDS = 5
BUCKETS = 2_097_143  # a prime; words, pairs and triples share them, as their hashes fall
FACTORS = (1_000_003, 15_485_863, 179_424_673)  # primes; a sum of three products stays far below 2**63


def ngram_ids(tokens: Tensor) -> Tensor:
    """tokens (B, T) -> buckets (B, T, 3) of the single, pair and triple of tokens that end at each token;
    0 where one of them is padding, hidden, or before the start."""
    tokens = tokens.long()  # 32 bits would overflow
    real, code, buckets = tokens >= 0, torch.zeros_like(tokens), []
    for n, factor in enumerate(FACTORS):
        before = F.pad(tokens, (n, 0))[:, : tokens.size(1)]  # (B, T) the token n before
        code, real = code + before * factor, real & (before >= SPECIAL)
        buckets.append((code % BUCKETS + 1) * real)
    return torch.stack(buckets, dim=-1)


def ngram_odds(ids: list[Tensor], labels: list[int], folds: list[int]) -> Tensor:
    """ln((positive + 1) / (negative + 1)) of each bucket, (FOLDS + 1, BUCKETS + 1): how many reviews of each
    class have it. Row f counts all folds but f, the last row all. Bucket 0 stays 0."""
    gap = torch.zeros(len(FACTORS) - 1, dtype=torch.long)  # so that no n-gram reaches over two reviews
    review = torch.repeat_interleave(torch.tensor([len(x) + len(gap) for x in ids]))  # (tokens,)
    buckets = ngram_ids(torch.cat([torch.cat((x, gap)) for x in ids])[None])[0]  # (tokens, 3)
    pairs = (review[:, None] * (BUCKETS + 1) + buckets)[buckets > 0].unique()  # each once a review
    review, bucket = pairs // (BUCKETS + 1), pairs % (BUCKETS + 1)
    cell = 2 * torch.tensor(folds)[review] + torch.tensor(labels)[review]
    counts = torch.bincount(cell * (BUCKETS + 1) + bucket, minlength=2 * FOLDS * (BUCKETS + 1))
    counts = counts.view(FOLDS, 2, -1)
    counts = counts.sum(0) - torch.cat((counts, torch.zeros_like(counts[:1])))  # (FOLDS + 1, 2, BUCKETS + 1)
    negative, positive = (counts.float() + 1).unbind(1)
    return (positive / negative).log()


class ReviewClassifier(EncoderClassifier):
    """Embedding of a token + embedding of its n-grams' odds; a convolution that leaves every fourth place;
    then encoder.py's layers, pooling and head. tokens (B, T) to logits (B, 2).

    At a quarter of the length a layer costs a quarter and less. A place is padding where it sees only that.
    """

    def __init__(self, config: EncoderConfig):
        places = config.max_len // STRIDE + 2  # rounded up, and one that embed may add
        super().__init__(replace(config, max_len=places))
        self.config, C = config, config.d_model
        self.from_odds = nn.Linear(len(FACTORS), C, bias=False)
        nn.init.normal_(self.from_odds.weight)  # as large as the embedding, so that odds count from the start
        self.shorten = nn.Conv1d(C, C, kernel_size=WINDOW, stride=STRIDE, padding=WINDOW // 2)
        self.register_buffer("odds", torch.zeros(BUCKETS + 1, 1))
        self.register_buffer("fold_odds", torch.zeros(FOLDS * (BUCKETS + 1), 1), persistent=False)

    def set_odds(self, odds: Tensor) -> None:
        """What ngram_odds returns."""
        self.odds.copy_(odds[-1][:, None])
        self.fold_odds.copy_(odds[:-1].reshape(-1, 1))

    def n_places(self, tokens: Tensor) -> int:
        """How many places P = (T + 7) // 4 tokens (B, T) make. Raises ValueError for what are no tokens."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.size(1) > self.config.max_len:
            wanted = f"tokens must be integers (B, T <= {self.config.max_len})"
            raise ValueError(f"{wanted}, got {tokens.dtype} {list(tokens.shape)}")
        return (tokens.size(1) + 2 * STRIDE - 1) // STRIDE

    def embed(self, tokens: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The places' vectors (B, P, C) and mask (B, P), see n_places. fold (B,): each review's own fold,
        whose labels its odds leave out; None: they leave out none."""
        P = self.n_places(tokens)
        tokens = F.pad(tokens, (0, STRIDE))  # one more place: torch.export takes a size of 1 as fixed
        buckets, real = ngram_ids(tokens), tokens != PAD  # (B, T, 3), (B, T)
        if fold is None:
            odds = F.embedding(buckets, self.odds).squeeze(-1)  # (B, T, 3)
        else:
            odds = F.embedding(buckets + fold[:, None, None] * (BUCKETS + 1), self.fold_odds).squeeze(-1)
        x = self.encoder.embedding(tokens) * self.encoder.scale + self.from_odds(odds)  # (B, T, C)
        x = (self.encoder.dropout(x) * real[:, :, None]).transpose(1, 2)  # (B, C, T)
        x = self.shorten(x) + F.avg_pool1d(x, WINDOW, STRIDE, WINDOW // 2)  # (B, C, P)
        mask = F.avg_pool1d(real[:, None].to(x.dtype), WINDOW, STRIDE, WINDOW // 2)[:, 0] > 0  # (B, P)
        return x.transpose(1, 2) + self.encoder.positions[:P], mask

    def forward(self, tokens: Tensor, fold: Tensor | None = None) -> Tensor:
        """tokens (B, T) integers, T <= max_len -> logits (B, 2). fold: see embed. Raises ValueError."""
        x, mask = self.embed(tokens, fold)
        for layer in self.encoder.layers:
            x = layer(x, mask[:, None, None, :])
        return self.head(self.dropout(pool_tokens(self.encoder.final_norm(x), mask, self.pool)))


# -----------------------------------------------------------------------------
# Training and testing

EVALUATIONS = 4  # on the dev split, evenly spread over a run


def train(model: nn.Module, data: dict, s: Settings, run: dict, p: Processes) -> None:
    """Train from step run["step"] to the last; run, weights and optimizer are saved in OUT every so often.

    data: {"train": (ids, targets, folds), "dev": (ids, labels)}; a target is P(positive). All randomness of a
    step is a function of seed, step and rank, so a run that goes on needs no generator's state to end with
    the very same weights. After Ctrl-C or SIGTERM it saves and raises Interrupted.
    """
    lengths = [len(x) for x in data["train"][0]]
    steps = run["steps"] = s.epochs * math.ceil(len(lengths) / s.batch_size)
    evaluations = 16 * s.epochs if s.target else EVALUATIONS
    evaluate_at = {round(steps * part / evaluations) for part in range(1, evaluations + 1)}
    parallel, optimizer, signals = wrap(model, p), make_optimizer(model, s), Signals(p)
    if p.world > 1:
        parallel.forward_sync_buffers = False  # the odds are constants
    if run["step"]:
        optimizer.load_state_dict(run["optimizer"])
    progress, saved = Progress(run["step"], steps, p), time.monotonic()
    for rows in upcoming(lengths, s, run["step"]):
        if run["reached"]:
            break
        start = time.perf_counter()
        model.train()
        torch.manual_seed(s.seed * 1_000_003 + run["step"] + 2**40 * p.rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run["step"], steps, s)
        optimizer.zero_grad()
        with waiting(f"the gradients of step {run['step']}", p):
            loss, right = share_of_batch(parallel, rows, data["train"], run["bf16"], s, p)
            share_of_mean(loss, len(rows), p.world).backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        # Also what all ranks must do at the same step goes into this sum: save (rank 0's clock says), stop.
        due = float(p.rank == 0 and time.monotonic() - saved > s.save_every)
        loss, right, due, came = sum_over_ranks([loss.item(), right, due, signals.received()], p)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {run['step']}: try a smaller --lr")
        run["step"] += 1
        run["right"] += right
        run["seen"] += len(rows)
        run["seconds"] += time.perf_counter() - start
        progress.show(run["step"], loss / len(rows))
        if run["step"] in evaluate_at:
            progress.say(record_dev(model, data["dev"], run, p))
            run["reached"] = bool(s.target) and safely_past(s.target, run["history"][-1], data["dev"])
        stopped = came > 0
        if run["step"] == steps or run["reached"] or stopped or due:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            path = on_rank_0(partial(save_run, run, state, s), p)
            saved = time.monotonic()
        if stopped:
            progress.bar.close()
            message = f"step {run['step']} of {steps} is saved in {path}"
            raise Interrupted(signals.noted[0] if signals.noted else signal.SIGTERM, message)
    progress.bar.close()
    signals.restore()
    for number in signals.noted[:1]:  # it came after the last step's sum
        signal.raise_signal(number)


def share_of_batch(model, rows: list[int], data: tuple, bf16: bool, s: Settings, p: Processes) -> tuple:
    """(sum of the losses () of this rank's rows of a batch, how many of them are right)."""
    ids, targets, folds = data
    mine = rows[p.rank :: p.world]
    counts, mine = len(mine) > 0, mine or rows[:1]  # without a row a rank takes part with one that counts 0
    tokens = pad([ids[i] for i in mine]).to(p.device)  # (B, T)
    hidden = (torch.rand(tokens.shape) < s.mask_words).to(p.device) & (tokens != PAD)
    target = torch.tensor([float(targets[i]) for i in mine], device=p.device)  # (B,)
    fold = torch.tensor([folds[i] for i in mine], device=p.device)  # (B,)
    with torch.autocast(p.device.type, torch.bfloat16, enabled=bf16):
        logits = model(tokens.masked_fill(hidden, MASK), fold).float()  # (B, K)
    loss = F.cross_entropy(logits, torch.stack((1 - target, target), -1), reduction="sum")
    return counts * loss, counts * (logits.argmax(-1) == (target > 0.5)).sum().item()


def save_run(run: dict, state: dict, s: Settings) -> Path:
    """A checkpoint of run and state in OUT; see train_ddp.save_checkpoint."""
    run["total_seconds"] = time.perf_counter() - run["start"]
    return save_checkpoint(Path(s.out), run["step"], run | state, keep=2)


def upcoming(lengths: list[int], s: Settings, step: int) -> Iterable[list[int]]:
    """The rows of each step, from this one to the last."""
    per_epoch = math.ceil(len(lengths) / s.batch_size)
    for epoch in range(step // per_epoch, s.epochs):
        order = batches(lengths, s.batch_size, seed=s.seed * 1_000_003 + epoch)
        yield from order[max(0, step - epoch * per_epoch) :]


def make_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """AdamW; weight decay pulls matrices to 0, but not norms and biases, which have no reason to be small."""
    return torch.optim.AdamW(parameter_groups(model.parameters(), s.weight_decay), lr=s.lr, fused=True)


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """The smaller of a linear warm-up to lr and half a cosine from lr to 0; steps count from 0."""
    return s.lr * min((step + 1) / s.warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def probabilities(model: nn.Module, ids: list[Tensor], p: Processes, bf16: bool = False) -> Tensor:
    """P(positive) of encoded texts, (N,) in their order, on every rank; in batches of similar length, each
    text on one rank, once (DistributedSampler repeats some)."""
    model.eval()
    out = torch.zeros(len(ids), dtype=torch.float64)
    for rows in torch.tensor([len(x) for x in ids]).argsort().split(64)[p.rank :: p.world]:
        with torch.autocast(p.device.type, torch.bfloat16, enabled=bf16):
            logits = model(pad([ids[i] for i in rows]).to(p.device)).float()  # (B, K)
        out[rows] = logits.softmax(-1)[:, 1].cpu().double()
    return torch.tensor(sum_over_ranks(out.tolist(), p))


def record_dev(model: nn.Module, dev: tuple, run: dict, p: Processes) -> str:
    """Add dev accuracy, and training accuracy since the last time, to the history; returns them as text."""
    positive, labels = probabilities(model, dev[0], p, run["bf16"]), torch.tensor(dev[1])
    row = {"step": run["step"], "seconds": round(run["seconds"], 1)}
    row["train_accuracy"] = round(run["right"] / run["seen"], 4)
    row["dev_accuracy"] = accuracy(positive, labels)
    row["dev_loss"] = round(F.binary_cross_entropy(positive, labels.float()).item(), 4)
    run["history"].append(row)
    run["right"] = run["seen"] = 0
    return "   ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items())


def safely_past(target: float, row: dict, dev: tuple) -> bool:
    """Whether dev's accuracy is above the target by more than its own standard error."""
    return row["dev_accuracy"] - target > math.sqrt(target * (1 - target) / len(dev[0]))


def accuracy(p: Tensor, labels: Tensor) -> float:
    """Share of p = P(positive) (N,) on the side of 0.5 that labels (N,) say."""
    return round(((p > 0.5) == labels.bool()).double().mean().item(), 5)


class Progress:
    """Of rank 0: a bar with rate and time left on a terminal, else a line every 15 seconds (on stderr)."""

    def __init__(self, step: int, steps: int, p: Processes):
        from tqdm import tqdm

        self.steps, self.first, self.start, self.said = steps, step, time.monotonic(), time.monotonic()
        self.silent, disable = p.rank > 0, None if p.rank == 0 else True  # None: not without a terminal
        self.bar = tqdm(initial=step, total=steps, unit="step", disable=disable)

    def show(self, step: int, loss: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and not self.silent and now - self.said > 15:
            left = (now - self.start) / (step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}, loss {loss:.3f}, {left:.0f} s left", file=sys.stderr)
            self.said = now

    def say(self, line: str) -> None:
        if not self.silent:
            self.bar.clear()
            print(line, flush=True)


# -----------------------------------------------------------------------------
# The job: data, tokenizer, training, test, report


def classify(s: Settings, p: Processes) -> dict:
    """The whole job, or what is left of it; returns the report, which is also in OUT/report.json.

    Rank 0 alone reads, makes the tokenizer, tests and exports; all ranks encode and train.
    """
    start = time.perf_counter()
    s = on_rank_0(lambda: s, p)  # its settings are those of all
    finished, dataset, reviews, run = on_rank_0(partial(begin, s), p)
    if finished:
        return finished
    run["start"] = start - run["total_seconds"]  # as if the earlier parts of this run had just gone before
    run["bf16"] = choose_bf16(s.amp, p.device)
    machine = hardware(p) | {"dtype": "bf16 autocast" if run["bf16"] else "float32"}
    train_set, dev_set = split_dev(reviews["train"])
    if p.rank == 0:
        chosen = asdict(s) | {"dataset": dataset} | machine
        print(" ".join(f"{name}={value}" for name, value in chosen.items() if value not in (None, "")))
        print(
            f"{len(train_set):,} reviews to learn from, {len(dev_set):,} dev, {len(reviews['test']):,} test"
        )
        print(f"going on at step {run['step']}" if run["step"] else "preparing", flush=True)

    run |= on_rank_0(partial(prepared, train_set, reviews, run, s), p)
    prepare, tokenizer = time.perf_counter(), Tokenizer(run["ranks"])
    data = encoded(tokenizer, train_set, dev_set, reviews, run, s)
    model = model_of(run, data, s)
    prepare = run["prepare"] + time.perf_counter() - prepare
    train(model.to(p.device), data, s, run, p)

    report = {"dataset": dataset} | results(model, data, run, s, machine["gemm_gflops"])
    report["prepare_seconds"] = round(prepare, 1)  # tokenizer, encoding, counting, the linear model's labels
    report |= machine | {"history": run["history"], "settings": run["settings"]}
    return on_rank_0(partial(finish, report, model, tokenizer, data, reviews, run, s, replace(p, world=1)), p)


def begin(s: Settings) -> tuple:
    """For rank 0: (the report if the run is finished, dataset, reviews, run)."""
    need("tiktoken", "rustbpe", "matplotlib", "tqdm", *["sklearn"] * s.unlabelled)
    need(*["onnx", "onnxruntime", "onnxscript"] * s.export)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # a place that can't be written is known before the work
    dataset, reviews = load_reviews(s)
    run = earlier_run(s, dataset, reviews)
    if (out / "report.json").exists():
        try:
            report = dict(json.loads((out / "report.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            report = {}  # damaged: it is written anew
        if report.get("settings") == run["settings"] and ("models" in report or not s.export):
            print(f"this run is finished; another one needs another --out than {out}")
            return report, dataset, {}, {}
    return None, dataset, reviews, run


def prepared(train_set: list[Review], reviews: dict, run: dict, s: Settings) -> dict:
    """For rank 0: tokenizer and, for --unlabelled, the linear model's opinions; kept in OUT once done."""
    if run["ranks"]:
        return {}
    start = time.perf_counter()
    made = {"ranks": Tokenizer.train([clean(r.text) for r in train_set], s.vocab_size).ranks}
    if s.unlabelled:
        linear = LinearModel(train_set, shuffled_labels(train_set, s))
        made["linear"] = {name: linear([r.text for r in reviews[name]]) for name in ("unlabelled", "test")}
    made["prepare"] = time.perf_counter() - start
    save_run(run, made, s)
    return made


def model_of(run: dict, data: dict, s: Settings) -> ReviewClassifier:
    """A model that knows the odds of the reviews' n-grams; new, or the one that was being trained."""
    ids, targets, folds = data["train"]
    model = make_model(s, SPECIAL + len(run["ranks"]))
    model.set_odds(ngram_odds(ids, [int(target > 0.5) for target in targets], folds))
    if run["step"]:
        load_weights(model, run["model"], s.out)
    return model


def finish(report: dict, model, tokenizer, data: dict, reviews: dict, run: dict, s: Settings, p) -> dict:
    """For rank 0, after the last step: test, export, pictures, page, report.

    The report is written last: with it the run is finished.
    """
    out = Path(s.out)
    report |= stage(out / "test.json", run, lambda: test(model, tokenizer, reviews["test"], run, out, p))
    report["test_texts_also_in_train"] = shared_texts(reviews["train"], reviews["test"])
    if s.target:
        seconds = round(report["prepare_seconds"] + run["seconds"], 1)
        report["target"] = {"accuracy": s.target, "reached": run["reached"], "seconds": seconds}
    plot_curves(run["history"], out / "curves.png")
    if s.export:
        make = partial(export_models, model.cpu(), tokenizer, data, reviews["test"], s, out)
        exported = stage(out / "export.json", run, make)
        report |= {name: exported[name] for name in ("models", "refused", "recommended", "deployed")}
        report["export_threads"] = exported["threads"]
    report["total_seconds"] = round(time.perf_counter() - run["start"], 1)
    write_page(report, model.cpu(), tokenizer, reviews["test"], out)
    write_atomically(out / "report.json", json.dumps(report, indent=1).encode())
    return report


def results(model: ReviewClassifier, data: dict, run: dict, s: Settings, gemm_gflops: float) -> dict:
    """What is known of the run before the test."""
    # fewer epochs than asked for where a target ended it
    epochs = s.epochs * run["step"] / run["steps"]
    flops = epochs * training_flops(model.config, [len(x) for x in data["train"][0]])
    return {
        "dev_accuracy": run["history"][-1]["dev_accuracy"],
        "train_seconds": round(run["seconds"], 1),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "preset": s.preset,
        "seed": s.seed,
        "mfu": round(flops / run["seconds"] / (gemm_gflops * 1e9), 3),
    }


def stage(path: Path, run: dict, make: Callable[[], dict]) -> dict:
    """What make() returns, kept in path: a run that goes on after it doesn't do it again."""
    of, start = [run["settings"], run["history"]], time.perf_counter()
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == of:
                run["start"] -= kept["seconds"]
                return kept["result"]
        except (ValueError, KeyError, TypeError):
            pass  # damaged: it is made anew
    result = make()
    kept = {"of": of, "seconds": time.perf_counter() - start, "result": result}
    write_atomically(path, json.dumps(kept).encode())
    return result


def hardware(p: Processes) -> dict:
    """gemm_gflops: of all processes' devices together, measured by all at once (fp32 1024^3, median of 7)."""
    a, times = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(p.device), []
    for _ in range(7):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    gflops = sum_over_ranks([2 * 1024**3 / sorted(times)[3] / 1e9], p)[0]
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():  # Linux, where platform knows the architecture alone
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    machine = {"processes": p.world, "device": p.device.type, "cpu": cpu, "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return machine | {"gemm_gflops": round(gflops, 1)} | versions


def shuffled_labels(reviews: list[Review], s: Settings) -> list[int]:
    """The labels; in another order where s.shuffle_labels."""
    labels = [r.label for r in reviews]
    if s.shuffle_labels:
        random.Random(s.seed).shuffle(labels)
    return labels


def encoded(tokenizer, train_set, dev_set, reviews: dict, run: dict, s: Settings) -> dict[str, tuple]:
    """{"train": (ids, P(positive), folds), "dev": (ids, labels)}: labelled reviews, then the unlabelled ones
    with their teacher's opinion. Folds are blocks of review numbers: other folds, other films."""
    ids, folds = [], []
    for part in (train_set, reviews["unlabelled"] if s.unlabelled else []):
        ids += tokenizer.encode([r.text for r in part], s.max_len)
        end = max((r.number for r in part), default=0) + 1
        folds += [r.number * FOLDS // end for r in part]
    dev_ids = tokenizer.encode([r.text for r in dev_set], s.max_len)
    targets = shuffled_labels(train_set, s) + run["linear"].get("unlabelled", [])
    return {"train": (ids, targets, folds), "dev": (dev_ids, [r.label for r in dev_set])}


def load_reviews(s: Settings) -> tuple[str, dict[str, list[Review]]]:
    """("imdb", its reviews), or ("demo", generated ones) after a banner if none are given nor to be had."""
    try:
        path = find_imdb(s.data)
    except OSError as error:
        print("!" * 100)
        print("!!  IMDB WAS NOT FOUND AND COULD NOT BE DOWNLOADED. What follows is NOT about IMDB: it runs")
        print("!!  on short reviews generated by a grammar, to show that all of it works here.")
        print(f"!!  Why: {error}")
        print(f"!!  What to do: fetch {IMDB_URL}")
        print("!!  where there is a network, then: python classify_imdb.py --data aclImdb_v1.tar.gz")
        print("!" * 100, flush=True)
        return "demo", demo_reviews(s.seed)
    reviews = read_imdb(path, s.unlabelled)
    if fingerprint({split: reviews[split] for split in ("train", "test")}) != IMDB_FINGERPRINT:
        print("note: these are not exactly the published texts; results don't compare with those of others")
    return "imdb", reviews


def fingerprint(reviews: dict[str, list[Review]]) -> str:
    """sha256 of all labels and texts in order."""
    digest = hashlib.sha256()
    for rows in reviews.values():
        for review in rows:
            digest.update(f"{review.label}{review.text}\0".encode())
    return digest.hexdigest()


def earlier_run(s: Settings, dataset: str, reviews: dict[str, list[Review]]) -> dict:
    """The state of the run in OUT, or a new one. Raises ValueError where it isn't the run asked for."""
    wanted = {name: value for name, value in asdict(s).items() if name not in FREE}
    wanted |= {"dataset": dataset, "texts": fingerprint(reviews)}
    new = {"settings": wanted, "ranks": [], "linear": {}, "reached": False}
    new |= {"prepare": 0.0, "step": 0, "steps": 0, "seconds": 0.0, "total_seconds": 0.0}
    new |= {"right": 0, "seen": 0, "history": []}
    run = load_checkpoint(Path(s.out))
    if run is None:
        return new
    there = run.get("settings", {})  # another script's state may be without
    if (there.get("dataset"), dataset) == ("demo", "imdb"):
        print(f"the run in {s.out} was on demo data; starting anew on IMDB")
        for old in Path(s.out).glob("step_*.pt"):
            old.unlink()
        return new
    if there != wanted:
        wrong = differences(there, wanted)
        raise ValueError(f"{s.out} holds another run ({wrong}); give another --out, or delete it")
    return run


def choose_bf16(amp: str, device: torch.device) -> bool:
    """Whether to train in bf16; "auto": where the hardware has it, others emulate it slowly."""
    if amp == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return device.type == "cpu" and export.has_bf16()
    return amp == "bf16"


def make_model(s: Settings, vocab_size: int) -> ReviewClassifier:
    """A new model; its weights are a function of the seed."""
    torch.manual_seed(s.seed)
    shared = {f.name for f in fields(EncoderConfig)} & {f.name for f in fields(Settings)}
    given = {name: getattr(s, name) for name in shared} | {"vocab_size": vocab_size}
    return ReviewClassifier(EncoderConfig(**given, pad_id=PAD))


def training_flops(config: EncoderConfig, lengths: list[int]) -> float:
    """Floating-point operations of one epoch: the matrix products of convolution and layers on real places,
    and twice as many backward. Padding, softmax, norms and look-ups are left out."""
    places = [math.ceil(n / STRIDE) for n in lengths]
    weights = config.n_layers * (4 * config.d_model**2 + 2 * config.d_model * config.d_ff)
    weights += WINDOW * config.d_model**2  # the convolution's
    pairs = config.n_layers * sum(n * n for n in places)
    return 3.0 * (2 * weights * sum(places) + 4 * config.d_model * pairs)


def test(model, tokenizer, reviews: list[Review], run: dict, out: Path, processes) -> dict:
    """Accuracy on the test set, by which nothing is chosen; writes model, mistakes and pictures."""
    settings = run["settings"]
    ids = tokenizer.encode([r.text for r in reviews], model.config.max_len)
    p = probabilities(model, ids, processes)  # (N,)
    labels = torch.tensor([r.label for r in reviews])
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    state = {"settings": settings, "config": asdict(model.config), "ranks": tokenizer.ranks, "model": weights}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for name in ("model.onnx", "model.onnx.sha256"):  # of another run: --predict would take it
        (out / name).unlink(missing_ok=True)
    write_atomically(out / "model.pt", buffer.getvalue())
    right_p = torch.where(labels == 1, p, 1 - p)  # (N,) the probability of the right answer
    mistakes, n_wrong = [], ((p > 0.5) != (labels == 1)).sum()
    for i in right_p.argsort()[: min(n_wrong, 20)].tolist():
        mistake = {"label": LABELS[reviews[i].label], "probability": round(right_p[i].item(), 4)}
        mistakes.append(mistake | {"text": reviews[i].text})
    write_atomically(out / "mistakes.json", json.dumps(mistakes, indent=1).encode())
    print(f"\ntest accuracy {accuracy(p, labels):.2%} on {len(reviews):,} reviews ({settings['dataset']})")
    print(f"the most confident of {n_wrong:,} mistakes ({len(mistakes)} are in {out / 'mistakes.json'}):")
    for mistake in mistakes[:5]:
        end = clean(mistake["text"])[-90:].encode("ascii", "replace").decode()  # for any terminal
        print(f"  {mistake['label']} (given {mistake['probability']:.1%}): ... {end}")
    plot_confusion(p > 0.5, labels == 1, out / "confusion.png")
    error = plot_calibration(p, labels, out / "calibration.png")
    result = {"test_accuracy": accuracy(p, labels), "calibration_error": round(error, 4)}
    if run["linear"]:  # the teacher's opinion, and what both say together
        linear = torch.tensor(run["linear"]["test"])
        result["linear_test_accuracy"] = accuracy(linear, labels)
        both = (p.logit(1e-6) + linear.logit(1e-6)).sigmoid()
        result["with_linear_test_accuracy"] = accuracy(both, labels)
    return result


def plot_curves(history: list[dict], path: Path) -> None:
    """Accuracy (%) on train and dev over training time (s)."""
    with picture(path, "Learning curves", "training time (s)", "accuracy (%)", width=6.0) as axes:
        seconds = [row["seconds"] for row in history]
        for name, label in (("train", "training, words hidden"), ("dev", "dev, other films")):
            axes.plot(seconds, [100 * row[f"{name}_accuracy"] for row in history], "o-", label=label)
        axes.grid(alpha=0.3)
        axes.legend()


def plot_calibration(p: Tensor, labels: Tensor, path: Path) -> float:
    """Of the reviews given a probability of about x, a share of x should be positive. Returns the expected
    calibration error over ten bins."""
    bins, points, error = (10 * p).long().clamp(max=9), [], 0.0
    for b in bins.unique().tolist():
        said, happened = p[bins == b].mean().item(), labels[bins == b].double().mean().item()
        points.append((said, happened))
        error += (bins == b).double().mean().item() * abs(said - happened)
    with picture(path, "Calibration", "predicted P(positive)", "share of positive reviews") as axes:
        axes.plot((0, 1), (0, 1), "--", color="grey", label="perfect")
        axes.plot(*zip(*points, strict=True), "o-", label=f"model, error {error:.3f}")
        axes.grid(alpha=0.3)
        axes.legend()
    return error


def plot_confusion(predicted: Tensor, actual: Tensor, path: Path) -> None:
    """Counts and shares of the 2 x 2 outcomes; predicted, actual (N,) boolean, True = positive."""
    counts = torch.bincount(2 * actual.long() + predicted.long(), minlength=4).view(2, 2)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    with picture(path, "Test set: reviews by label", "predicted", "actual") as axes:
        image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
        for a, b in itertools.product((0, 1), repeat=2):
            color = "white" if share[a, b] > 0.5 else "black"
            axes.text(b, a, f"{counts[a, b]:,}\n{share[a, b]:.1%}", ha="center", va="center", color=color)
        axes.set(xticks=(0, 1), yticks=(0, 1), xticklabels=LABELS, yticklabels=LABELS)
        axes.figure.colorbar(image, label="share of the row")


@contextlib.contextmanager
def picture(path: Path, title: str, xlabel: str, ylabel: str, width: float = 4.2):
    """Axes to draw on; then they are a PNG at path."""
    from matplotlib.figure import Figure

    figure, png = Figure(figsize=(width, 3.6), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    yield axes
    figure.savefig(png, format="png", dpi=110)
    write_atomically(path, png.getvalue())


# -----------------------------------------------------------------------------
# Export: this model in every format of export.py, and the one that --predict uses

COMPARED = 5000  # test reviews on which all formats are compared; the one chosen is tested on all


def in_batches(ids: list[Tensor], labels: list, size: int = 50) -> list[tuple[tuple, Tensor]]:
    """As export.py takes them: ((tokens (B, T),), labels (B,)), by length."""
    order = torch.tensor([len(x) for x in ids]).argsort().split(size)
    return [((pad([ids[i] for i in rows]),), torch.tensor(labels)[rows].round().long()) for rows in order]


class FusedClassifier(ReviewClassifier):
    """A trained model's function in fewer steps, for use alone: what is linear before the layers is one
    matrix for words, and a small one for odds.

    With the embedding E, U of from_odds and W of the convolution and its mean, W (scale E + U odds) is
    (scale W) E + (W U) odds. The 15 odds of a window go through W U, and no longer into vectors of width C.
    """

    @torch.no_grad()
    def __init__(self, model: ReviewClassifier):
        super().__init__(model.config)
        self.encoder, self.head, self.odds = copy.deepcopy((model.encoder, model.head, model.odds))
        self.encoder.embedding.weight[PAD] = 0.0  # instead of a mask
        C = model.config.d_model
        W = model.shorten.weight + torch.eye(C)[:, :, None] / WINDOW  # (C, C, 5): out, in, token
        self.from_words = nn.Linear(WINDOW * C, C)
        self.from_odds = nn.Linear(WINDOW * len(FACTORS), C, bias=False)
        self.from_words.weight.copy_(W.transpose(1, 2).flatten(1) * self.encoder.scale)
        self.from_words.bias.copy_(model.shorten.bias)
        self.from_odds.weight.copy_((W.transpose(1, 2) @ model.from_odds.weight).flatten(1))
        del self.shorten, self.fold_odds
        self.eval()

    def embed(self, tokens: Tensor, fold: None = None) -> tuple[Tensor, Tensor]:
        """As ReviewClassifier.embed, of tokens in windows; there are no folds any more."""
        P = self.n_places(tokens)
        tokens = F.pad(tokens, (WINDOW // 2, P * STRIDE + 1 - WINDOW // 2 - tokens.size(1)))  # (B, 4P + 1)
        odds = F.embedding(windows(ngram_ids(tokens), P), self.odds)  # (B, P, 5, 3, 1)
        tokens = windows(tokens, P)  # (B, P, 5)
        x = self.from_words(self.encoder.embedding(tokens).flatten(2)) + self.from_odds(odds.flatten(2))
        return x + self.encoder.positions[:P], (tokens != PAD).any(-1)  # (B, P, C), (B, P)


def windows(x: Tensor, P: int) -> Tensor:
    """x (B, 4P + 1, ...) to (B, P, 5, ...): each four and the first of the next, as WINDOW is STRIDE + 1."""
    fours = x[:, :-1].unflatten(1, (P, STRIDE))  # (B, P, 4, ...)
    return torch.cat((fours, x[:, STRIDE::STRIDE].unsqueeze(2)), dim=2)


def pruned_copy(model: ReviewClassifier, sample: list, data: dict, s: Settings) -> ReviewClassifier:
    """A copy with the lower half of the layers (the upper ones do least: Sajjad et al., arXiv:2004.03844), a
    quarter of their heads and of their neurons, fine-tuned, fused. sample: batches to judge heads by."""
    copied = copy.deepcopy(model)
    copied.encoder.layers = copied.encoder.layers[: max(1, s.n_layers // 2)]
    heads = export.head_importance(copied, sample)
    fewer = export.prune_heads(copied, heads, keep=max(1, s.n_heads // 4))
    neurons = export.neuron_importance(fewer, sample)
    fewer = export.prune_neurons(fewer, neurons, keep=max(1, s.d_ff // 4))
    return FusedClassifier(fine_tuned(fewer, model, data, s))


def export_models(model: ReviewClassifier, tokenizer, data: dict, test_set: list[Review], s, out) -> dict:
    """export.py's table for the model and its pruned copy; writes OUT/export/* and OUT/model.onnx, the
    smallest ONNX file that agrees with the original on 99.5% of the reviews compared (else the one that
    agrees most). Returns {"models": rows, ...}."""
    every = max(1, len(data["train"][0]) // 1000)  # they stand in order: the first thousand are one class
    sample = in_batches(*(x[::every] for x in data["train"][:2]))
    pruned = pruned_copy(model.eval(), sample, data, s)
    model.fold_odds = model.fold_odds[:0].clone()  # the last training, fine-tuning, is done
    draw = random.Random(0)
    compared = draw.sample(test_set, min(COMPARED, len(test_set)))
    test_ids = tokenizer.encode([r.text for r in compared], s.max_len)
    evaluation = in_batches(test_ids, [r.label for r in compared])
    T = min(256, s.max_len)
    cases = {f"{b} x {T}": [(torch.randint(SPECIAL, tokenizer.vocab_size, (b, T)),)] for b in (1, 8, 32)}
    cases["1 x real"] = [(x[None],) for x in test_ids[:20] if len(x)]
    calibration = [{"tokens": tokens} for (tokens,), _ in sample[::4]]
    metadata = {"labels": LABELS, "max_len": s.max_len, "ranks": packed(tokenizer.ranks)}
    models, example = {"original": model, "pruned": pruned}, cases[f"8 x {T}"][0]
    report = export.export_all(
        models, example, evaluation, cases, calibration, out / "export", metadata, seconds=0.3
    )
    export.print_table(report)
    export.plot_rows(report, out / "export.png")
    onnx = [row for row in report["models"] if row["file"].endswith(".onnx")]
    if not onnx:
        raise ValueError(f"no ONNX file could be made: {report['refused']}")
    enough = min(0.995, max(row["agreement"] for row in onnx))  # not accuracy: no choice by test labels
    best = min((row for row in onnx if row["agreement"] >= enough), key=lambda row: row["size_bytes"])
    data = (out / "export" / best["file"]).read_bytes()
    digest = f"{hashlib.sha256(data).hexdigest()}  model.onnx\n"  # as sha256sum -c reads it
    write_atomically(out / "model.onnx.sha256", digest.encode())
    write_atomically(out / "model.onnx", data)
    ids = tokenizer.encode([r.text for r in test_set], s.max_len)
    p, labels = onnx_probabilities(out / "model.onnx", ids), torch.tensor([r.label for r in test_set])
    report["deployed"] = {"name": best["name"], "test_accuracy": accuracy(p, labels)}
    report["deployed"]["size_bytes"] = best["size_bytes"]
    print(f"--predict uses {best['name']}: {accuracy(p, labels):.2%} on all {len(p):,} test reviews")
    return report


def packed(ranks: list[bytes]) -> str:
    """A tokenizer's ranks as text, compressed."""
    text = json.dumps([token.decode("latin-1") for token in ranks])  # a letter for each byte
    return base64.b64encode(zlib.compress(text.encode())).decode()


def unpacked(ranks: str) -> list[bytes]:
    """The ranks of packed()."""
    return [token.encode("latin-1") for token in json.loads(zlib.decompress(base64.b64decode(ranks)))]


def fine_tuned(pruned: nn.Module, model: ReviewClassifier, data: dict, s: Settings) -> nn.Module:
    """Up to 700 steps at a falling learning rate: what pruning broke, a little training mends. Targets lie
    half-way between the labels and what the whole model says (distillation, arXiv:1503.02531)."""
    ids, targets, folds = data["train"]
    halfway = torch.tensor(targets).float()  # (N,)
    order = batches([len(x) for x in ids], s.batch_size, seed=s.seed)[:700]  # each review once at most
    optimizer = torch.optim.AdamW(pruned.parameters())
    torch.manual_seed(s.seed)
    pruned.train()
    for step, rows in enumerate(order):
        with torch.no_grad():
            said = model(pad([ids[i] for i in rows]), torch.tensor([folds[i] for i in rows]))  # (B, K)
        halfway[rows] = (halfway[rows] + said.softmax(-1)[:, 1]) / 2
        loss, _ = share_of_batch(pruned, rows, (ids, halfway, folds), False, s, ALONE)
        optimizer.param_groups[0]["lr"] = s.lr / 2 * (1 - step / len(order))
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        nn.utils.clip_grad_norm_(pruned.parameters(), s.clip)
        optimizer.step()
    return pruned.eval()


def onnx_probabilities(path: Path, ids: list[Tensor]) -> Tensor:
    """probabilities() by onnxruntime."""
    run, out = export.onnx_runner(path, threads=torch.get_num_threads()), torch.empty(len(ids))
    for rows in torch.tensor([len(x) for x in ids]).argsort().split(64):
        out[rows] = run(pad([ids[i] for i in rows])).softmax(-1)[:, 1]
    return out


# -----------------------------------------------------------------------------
# The page: one file to open, and to send to a colleague

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
iframe { width: 100%; height: 38rem; border: 1px solid #ddd }
b.positive { color: #06703a }
b.negative { color: #a3231d }
"""


def write_page(report: dict, model: ReviewClassifier, tokenizer, test_set: list[Review], out: Path) -> None:
    """OUT/index.html: results, pictures, table, mistakes, attention; no other file, no network."""
    facts = "test_accuracy dev_accuracy calibration_error train_seconds total_seconds n_parameters".split()
    facts += "linear_test_accuracy with_linear_test_accuracy cpu threads gemm_gflops torch dtype seed".split()
    rows = [(name.replace("_", " "), report[name]) for name in facts if name in report]
    parts = [f"<h1>Sentiment of movie reviews: {report['dataset']}</h1>", html_table(("", ""), rows)]
    for name in ("curves", "confusion", "calibration", "export"):
        if (out / f"{name}.png").exists():
            picture = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{picture}">')
    if "models" in report:
        head = "model", "accuracy", "kB", "p50 ms, 1 text", "p50 ms, 32 texts"
        cases = list(report["models"][0]["latency"])
        rows = []
        for row in report["models"]:
            times = [row["latency"][case]["p50_ms"] for case in (cases[0], cases[2])]
            rows.append((row["name"], f"{row['accuracy']:.2%}", f"{row['size_bytes'] / 1000:,.0f}", *times))
        parts += [f"<h2>Formats, {report['export_threads']} thread(s)</h2>", html_table(head, rows)]
    parts.append("<h2>The most confident mistakes</h2>")
    for m in json.loads((out / "mistakes.json").read_text(encoding="utf-8"))[:10]:
        label, text = m["label"], html.escape(clean(m["text"])[:600])
        parts.append(f"<p><b class={label}>{label}</b>, given {m['probability']:.1%}: {text}</p>")
    parts.append("<h2>Where the heads look</h2><p>A place stands for four tokens. Point at one.</p>")
    for label, name in enumerate(LABELS):
        review = min((r for r in test_set if r.label == label), key=lambda r: abs(len(r.text) - 400))
        page = attention_page(model, tokenizer, review.text, out / f"attention_{name}")
        parts.append(f'<p>{name}</p><iframe srcdoc="{html.escape(page, quote=True)}"></iframe>')
    head = f"<!doctype html><meta charset=utf-8><title>IMDB</title><style>{STYLE}</style>"
    write_atomically(out / "index.html", (head + "\n".join(parts)).encode())


def html_table(head: Iterable, rows: Iterable[Iterable]) -> str:
    """Escaped, a cell for each value."""
    lines = ["".join(f"<th>{html.escape(str(x))}</th>" for x in head)]
    lines += ["".join(f"<td>{html.escape(str(x))}</td>" for x in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


@torch.no_grad()
def attention_page(model: ReviewClassifier, tokenizer, text: str, path: Path) -> str:
    """attention.py's viewer for one text; it is also in PATH.html, and a picture of the same in PATH.png."""
    (ids,) = tokenizer.encode([text], model.config.max_len)
    tokens = pad([ids])
    x, mask = model.eval().embed(tokens)  # (1, P, C), (1, P)
    weights = []
    for layer in model.encoder.layers:
        x, w = layer.forward_with_weights(x, mask[:, None, None, :])
        weights.append(w[0])  # (H, P, P)
    parts = [ids[: STRIDE - WINDOW // 2], *ids[STRIDE - WINDOW // 2 :].split(STRIDE)]  # a place's own tokens
    words = [tokenizer.bpe.decode((part - SPECIAL).tolist()) for part in parts if len(part)]
    words, n = words or ["(nothing)"], max(1, len(words))
    weights = torch.stack(weights)[..., :n, :n]  # (L, H, n, n) without the place that embed adds
    attention.plot_attention(weights, words, words, path.with_suffix(".png"))
    attention.attention_html(weights, words, words, path.with_suffix(".html"))
    return path.with_suffix(".html").read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# Prediction, and the linear model to compare with


def predict(s: Settings, p: Processes) -> None:
    """A line of JSON for each text: label, its probability, the text, with --explain the words that count."""
    need("tiktoken")
    is_file = os.path.exists(s.predict)  # a pipe too; False also for what is no possible file name
    if is_file or s.predict == "-":
        data = Path(s.predict).read_bytes() if is_file else sys.stdin.buffer.read()
        data = data.removeprefix(codecs.BOM_UTF8)
        # Lines of bytes end at \n, \r alone; lines of str also at what IMDB's reviews have inside (\x85).
        texts = [line.decode("utf-8", errors="replace") for line in data.splitlines()]
    else:
        texts = [s.predict]
    if not any(text.strip() for text in texts):
        raise ValueError("predict: there is no text to classify")
    tokenizer, max_len, positive = predictor(Path(s.out), p)
    ids = tokenizer.encode(texts, max_len)
    for text, x, probability in zip(texts, ids, positive(ids).tolist(), strict=True):
        sure = round(max(probability, 1 - probability), 4)
        answer = {"label": LABELS[probability > 0.5], "probability": sure, "text": text}
        if s.explain:
            answer["explain"] = explained(x, probability, tokenizer, positive)
        print(json.dumps(answer))


AGAIN = "delete it and the *.json beside it, and run the training command again"


def load(path: Path) -> dict:
    """OUT/model.pt; no code in it is run. Raises ValueError for anything else, one altered byte too."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load itself doesn't look at the checksums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damage can surface as anything
        state = None
    if not isinstance(state, dict) or not {"settings", "config", "ranks", "model"} <= state.keys():
        raise ValueError(f"{path} is damaged or no model of this script; {AGAIN}")
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor], place) -> None:
    """Into the model. ValueError where they are another model's, as after a new version of this file."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()
        raise ValueError(f"{place} holds another model's weights ({what}); {AGAIN}") from error


def predictor(out: Path, p: Processes) -> tuple[Tokenizer, int, Callable[[list[Tensor]], Tensor]]:
    """(tokenizer, max_len, function of encoded texts to P(positive)): by OUT/model.onnx, all that it needs is
    in it, or where there is none (--no-export) by PyTorch from OUT/model.pt."""
    if (out / "model.onnx").exists():
        need("onnxruntime")
        import onnxruntime

        try:
            data, digest = (out / "model.onnx").read_bytes(), out / "model.onnx.sha256"
            if digest.exists() and digest.read_text().split()[0] != hashlib.sha256(data).hexdigest():
                raise ValueError("sha256")  # onnxruntime takes altered weights without a word
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            found = session.get_modelmeta().custom_metadata_map
            ranks, max_len = unpacked(json.loads(found["ranks"])), json.loads(found["max_len"])
        except Exception as error:  # of onnxruntime's own types, or what damage does to the metadata
            raise ValueError(f"{out / 'model.onnx'} is damaged; {AGAIN}") from error
        return Tokenizer(ranks), max_len, partial(onnx_probabilities, out / "model.onnx")
    path = out / "model.pt"
    if not path.exists():
        raise ValueError(f"predict: there is no {path} yet; train a model first: python classify_imdb.py")
    state = load(path)
    model = ReviewClassifier(EncoderConfig(**state["config"]))
    load_weights(model, state["model"], path)
    positive = partial(probabilities, model.to(p.device), p=p)
    return Tokenizer(state["ranks"]), model.config.max_len, positive


def explained(ids: Tensor, p: float, tokenizer: Tokenizer, positive: Callable) -> list[list]:
    """The ten words that matter most, [word, how much P(positive) falls without it], strongest first.

    Each word in turn is hidden as in training: an honest question to the model, though words that say the
    same twice hide each other. A mark of punctuation is a word, what follows an apostrophe is not.
    """
    pieces = [tokenizer.bpe.decode_single_token_bytes(i - SPECIAL) for i in ids.tolist()]
    text, ends = b"".join(pieces), list(itertools.accumulate(map(len, pieces)))
    starts = [0] + [i for i, end in enumerate(ends[:-1], 1) if not goes_on(text, end)] + [len(pieces)]
    spans = list(itertools.pairwise(starts)) if pieces else []  # first token and end of each word
    hidden = [torch.cat((ids[:a], torch.full((b - a,), MASK), ids[b:])) for a, b in spans]
    effects = []
    for (a, b), without in zip(spans, positive(hidden).tolist() if hidden else [], strict=True):
        word = b"".join(pieces[a:b]).decode("utf-8", errors="replace").strip()
        if word:
            effects.append([word, round(p - without, 4) + 0.0])  # + 0.0: no -0.0
    return sorted(effects, key=lambda pair: -abs(pair[1]))[:10]


def goes_on(text: bytes, place: int) -> bool:
    """Whether a word of the text, in UTF-8, goes on over this place."""
    if 0x80 <= text[place] < 0xC0:  # within the bytes of one character
        return True
    before = text[max(0, place - 4) : place].decode(errors="replace")
    after = text[place : place + 8].decode(errors="replace")
    after = after[1:] if after[0] == "'" else after  # of "don't"
    return before[-1].isalnum() and after[:1].isalnum()


class LinearModel:
    """Logistic regression on n-grams of up to four words, weighted by naive Bayes (Wang and Manning 2012).

    What a Transformer has to beat, and for --unlabelled its teacher. Called with texts, returns P(positive).
    A review's weights are scaled to length 1: a long one isn't surer because it is long.
    """

    def __init__(self, reviews: list[Review], labels: list[int]):
        need("sklearn")
        import numpy as np
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression

        words = r"\w+|[^\w\s]"
        self.counts = CountVectorizer(ngram_range=(1, 4), min_df=2, binary=True, token_pattern=words)
        x, y = self.counts.fit_transform([clean(r.text) for r in reviews]), np.array(labels)  # (N, n-grams)
        positive, negative = (1 + np.asarray(x[y == label].sum(0)).ravel() for label in (1, 0))
        self.weights = np.log(positive / positive.sum()) - np.log(negative / negative.sum())
        self.model = LogisticRegression(C=30, max_iter=300).fit(self.weighted(x), y)

    def weighted(self, x):
        """Which n-grams a review has (N, n-grams) -> their weights; each row of length 1."""
        from sklearn.preprocessing import normalize

        return normalize(x.multiply(self.weights).tocsr())

    def __call__(self, texts: list[str]) -> list[float]:
        x = self.counts.transform([clean(text) for text in texts])
        return self.model.predict_proba(self.weighted(x))[:, 1].tolist()


def baseline(s: Settings) -> dict:
    """The linear model trained and tested; returns a report."""
    need("sklearn", "tqdm")
    start = time.perf_counter()
    Path(s.out).mkdir(parents=True, exist_ok=True)
    dataset, reviews = load_reviews(s)
    train_set, dev_set = split_dev(reviews["train"])
    fit_start = time.perf_counter()
    model = LinearModel(train_set, shuffled_labels(train_set, s))
    seconds = time.perf_counter() - fit_start
    report = {"model": "naive-Bayes-weighted 1-4-grams + logistic regression", "dataset": dataset}
    for name, part in (("dev", dev_set), ("test", reviews["test"])):
        p = torch.tensor(model([r.text for r in part]))
        report[f"{name}_accuracy"] = accuracy(p, torch.tensor([r.label for r in part]))
    report |= {"train_seconds": round(seconds, 1), "total_seconds": round(time.perf_counter() - start, 1)}
    report |= {"n_parameters": model.model.coef_.size + 1}
    report |= hardware(ALONE)
    write_atomically(Path(s.out, "baseline.json"), json.dumps(report, indent=1).encode())
    return report


# -----------------------------------------------------------------------------


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Settings):
        reason = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        kind = {"type": str if f.name == "predict" else f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=reason, **kind)
    preset = parser.parse_args(argv).preset
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset}")
    parser.set_defaults(**PRESETS[preset])
    s = Settings(**vars(parser.parse_args(argv)))
    least = {"weight_decay": 0, "save_every": 0, "max_len": STRIDE, "vocab_size": SPECIAL + 256}
    for name in ("epochs", "batch_size", "lr", "warmup", "clip"):
        if not getattr(s, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(s, name)}")
    for name, value in least.items():  # of vocab_size: all bytes
        if not getattr(s, name) >= value:
            raise ValueError(f"{name} must be at least {value}, got {getattr(s, name)}")
    for name in ("target", "mask_words"):
        if not 0 <= getattr(s, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(s, name)}")
    if not 0 <= s.seed < 2**32:
        raise ValueError(f"seed must be in 0 .. 2**32 - 1, got {s.seed}")
    if s.explain and s.predict is None:
        raise ValueError("explain: needs --predict TEXT")
    if s.amp not in ("auto", "bf16", "off"):
        raise ValueError(f"amp must be auto, bf16 or off, got {s.amp}")
    make_model(s, vocab_size=SPECIAL + 256)  # wrong sizes are known before the work
    return s


def run_job(argv: list[str] | None = None) -> None:
    """What the command line asks for, on this rank."""
    s = settings_from_command_line(argv)
    p = start_processes(s.device, TIMEOUT)
    if s.predict is not None:
        on_rank_0(partial(predict, s, replace(p, world=1)), p)
        return
    report = on_rank_0(partial(baseline, s), p) if s.baseline else classify(s, p)
    if p.rank == 0:
        print(json.dumps(report))


def main() -> int:
    """Exit code: 0 done, 1 another process is gone, 2 wrong input, 128 + n ended by signal n."""
    alone = False
    try:
        run_job()
        return 0
    except (ValueError, OSError, ImportError) as error:  # what a user can mend: one line, no traceback
        code, message = 2, str(error)
        if isinstance(error, ImportError):
            message = f"the package {error.name} is missing: pip install {error.name}"
        alone = not isinstance(error, ValueError) and not hasattr(error, "shared")
    except Interrupted as error:
        number, saved = error.args
        code, message = 128 + number, f"interrupted: {saved}; the same command goes on from there"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on from what is saved so far"
    except Lost as error:
        code, message = 1, str(error)
    # What is wrong on all that have met, rank 0 says.
    if code == 1 or alone or not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_now(main())
