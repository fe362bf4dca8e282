"""Asserts the correctness of all of it, in the order of the files: values and gradients against independent
oracles, properties over random sizes, the scripts as subprocesses, downloads that break off.

    python test_all.py                    # everything; prints the slowest ten
    python test_all.py -x -q -k encoder   # any pytest option works
    python test_all.py --mutants          # plants bugs and sees them caught; --mutants losses.py: in one file
    python test_all.py --mutants losses.py --random 40 --seed 1   # bugs drawn at random; lists survivors
"""

import argparse
import ast
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import html.parser
import http.server
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU in the machine changes nothing: hidden before torch looks

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.multiprocessing
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import attention
import classify_imdb as imdb
import encoder
import export
import losses
import train_ddp
import train_fsdp
import transformer

ROOT = Path(__file__).resolve().parent

# -----------------------------------------------------------------------------
# What the tests share


DEADLINE = int(os.environ.get("TEST_SECONDS", 300))


@pytest.fixture(autouse=True)
def deadline():
    """A test that takes longer than DEADLINE fails, and its traceback says where it waited.

    The alarm isn't cleared afterwards, so that it also ends a shared preparation of the next test.
    """

    def end(*_):
        raise TimeoutError(f"no end after {DEADLINE} s (TEST_SECONDS sets this limit)")

    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, end)
        signal.alarm(DEADLINE)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Every test starts from the same random state; one thread, since two crawl where a core is busy."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference, relative to max(1, largest reference value); NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if actual.numel():
        difference = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert difference <= tolerance, f"{what}: {difference:.3e} > {tolerance:.0e}"


def run_script(
    name: str, *arguments: str, cwd: Path, folder: Path = ROOT, timeout: float = 240, **environment
):
    """`python FOLDER/name arguments` in cwd; no data set is known there but what the arguments give."""
    env = {k: v for k, v in os.environ.items() if k not in ("IMDB_DATA", "MULTI30K_DATA")}
    env |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")} | environment
    command = [sys.executable, str(folder / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def check_one_line_error(result, *words: str) -> None:
    """What DESIGN calls a clear error: exit code 2, one line on stderr with these words, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def last_json(result) -> dict:
    """The report that a script prints as its last line."""
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return json.loads(result.stdout.strip().splitlines()[-1])


# -----------------------------------------------------------------------------
# attention.py

ATTENTION_WAYS = [
    attention.attention_loop,
    lambda *inputs: attention.scaled_dot_product_attention(*inputs)[0],
    lambda *inputs: attention.blockwise_attention(*inputs, block_size=3),
    attention.fused_attention,
]
ATTENTION_EVERY_WAY = pytest.mark.parametrize(
    "way",
    ATTENTION_WAYS,
    ids=["loop", "scaled_dot_product_attention", "blockwise_attention", "fused_attention"],
)
ATTENTION_FUSED_OR_NOT = pytest.mark.parametrize("fused", [False, True])


class AttentionCall(nn.Module):
    """Causal attention of a fixed kind: tracing and export take tensors alone."""

    def __init__(self, fused: bool, cross: bool):
        super().__init__()
        kv_dim = 10 if cross else None
        self.attention = attention.MultiHeadAttention(12, 3, kv_dim=kv_dim, fused=fused)

    def forward(self, query: Tensor, context: Tensor | None = None, mask: Tensor | None = None):
        return self.attention(query, context, mask, causal=True)


class TestAttention:
    # ---- the four ways against torch

    @ATTENTION_EVERY_WAY
    def test_all_ways_agree_with_torch(self, way):
        """Values and gradients, over random sizes, masks, strides and dtypes."""
        draw = random.Random(1)
        for case in range(300):
            batch = draw.choice([(), (4,), (2, 1, 2), (draw.randint(1, 3), draw.randint(1, 3))])
            tq, tk = draw.randint(1, 8), draw.randint(1, 9)
            tk = draw.choice([tq, tk, tk])  # the fused form takes torch's own triangle where Tq = Tk
            d, dv = draw.choice([1, 3, 4, 8]), draw.choice([1, 4, 5, 8])
            dtype, tolerance = draw.choice([(torch.float64, 1e-10), (torch.float32, 2e-5)])
            sizes = (d, tq), (d, tk), (dv, tk)
            inputs = [torch.randn(*batch, *size, dtype=dtype).mT for size in sizes]
            if draw.random() < 0.5:
                inputs = [x.contiguous() for x in inputs]
            inputs = [x.requires_grad_() for x in inputs]

            mask = None
            causal = draw.random() < 0.5
            allowed = torch.ones(*batch, tq, tk).tril(tk - tq if causal else tk).bool()
            if draw.random() < 0.9:  # of any shape that broadcasts
                shape = [draw.choice([1, n]) for n in allowed.shape]
                mask = torch.rand(shape[draw.randint(0, len(shape)) :]) < 0.67
                allowed &= mask
            exact = [x.detach().double().requires_grad_() for x in inputs]
            expected = F.scaled_dot_product_attention(*exact, attn_mask=allowed)
            towards = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, exact, towards)

            what = f"case {case}: {causal=} {mask=} {batch=} {tq=} {tk=} {d=} {dv=}"
            output = way(*inputs, mask, causal)
            assert output.dtype == dtype and not output[~allowed.any(dim=-1)].any(), what
            check_close(output.double(), expected, tolerance, what)
            gradients = torch.autograd.grad(output, inputs, towards.to(dtype))
            for got, want in zip(gradients, wanted, strict=True):
                check_close(got.double(), want, tolerance, what)

    @ATTENTION_EVERY_WAY
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_nothing_to_attend_to(self, way):
        """No keys, no queries, rows that a mask empties: 0, and finite gradients."""
        q, k, v = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5)
        assert torch.equal(way(q, k, v), torch.zeros(2, 3, 5))
        assert way(q[:, :0], q, q).shape == (2, 0, 4)
        inputs = [torch.randn(2, 3, 4).requires_grad_() for _ in range(3)]
        output = way(*inputs, torch.zeros(3, 3, dtype=torch.bool), False)
        assert torch.equal(output, torch.zeros(2, 3, 4))
        with torch.autograd.detect_anomaly():  # no NaN on the way, either
            gradients = torch.autograd.grad(output.sum(), inputs)
        assert not any(gradient.any() for gradient in gradients)

    @ATTENTION_EVERY_WAY
    def test_large_logits_stay_finite(self, way):
        q = torch.tensor([[1e4], [-1e4]], requires_grad=True)
        k = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
        v = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
        output = way(q, k, v)  # D = 1: the logits are q k
        assert output.tolist() == [[1.0], [2.0]]  # each query sees its best key alone
        gradients = torch.autograd.grad(output.sum(), (q, k, v))
        assert all(gradient.isfinite().all() for gradient in gradients)
        only_the_worst = torch.tensor([[False, True, False], [True, False, False]])
        assert way(q, k, v, only_the_worst).tolist() == [[2.0], [1.0]]
        assert way(q[:1], -k[:2] - 5, v[:2]).tolist() == [[2.0]]  # all scores are far below 0

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, way, dtype):
        inputs = [torch.randn(1, 2, 9, 64).to(dtype) for _ in range(3)]
        mask = torch.rand(9, 9) < 0.5
        exact = F.scaled_dot_product_attention(*(x.double() for x in inputs), mask)
        check_close(way(*inputs, mask, False).double(), exact, 2e-2)
        q = 30 * inputs[0]
        assert (q @ q.mT).isinf().any() or dtype == torch.bfloat16  # unless q is scaled first
        large = [x.detach().requires_grad_() for x in (q, q, inputs[2])]
        output = way(*large, mask, False)
        assert output.dtype == dtype and output.isfinite().all()
        gradients = torch.autograd.grad(output.float().sum(), large)
        assert all(gradient.isfinite().all() for gradient in gradients)

    @ATTENTION_EVERY_WAY
    def test_all_ways_follow_their_input(self, way):
        """Not the default device or dtype, wherever they make a tensor."""
        q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
        for causal in (False, True):
            expected = way(q, k, k, None, causal)
            torch.set_default_dtype(torch.float64)
            try:
                with torch.device("meta"):
                    output = way(q, k, k, None, causal)
            finally:
                torch.set_default_dtype(torch.float32)
            check_close(output, expected, 1e-6)

    def test_second_derivatives(self):
        """Right where there are some, refused by the blockwise form."""
        module = attention.MultiHeadAttention(6, 2, fused=False).double()
        x = torch.randn(1, 3, 6, dtype=torch.float64).requires_grad_()
        for part in (0, 1):  # output, weights
            call = lambda x, part=part: module.forward_with_weights(x, causal=True)[part]  # noqa: E731
            assert torch.autograd.gradcheck(call, x)
            assert torch.autograd.gradgradcheck(call, x)
        output = attention.blockwise_attention(x, x, x)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(output.sum(), x, create_graph=True)

    # ---- blockwise

    @pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory below /proc")
    def test_blockwise_memory(self, tmp_path):
        """T = 4096, forward and backward: under 32 MB; written out it takes 150."""
        code = """
import torch, attention
def peak(way, T):  # not ru_maxrss: that begins with the parent's
    q, k, v = (torch.randn(1, 1, T, 64, requires_grad=True) for _ in range(3))
    attention.WAYS[way](q, k, v).sum().backward()
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10
before = peak("blockwise", 200)  # loads the libraries, starts the autograd thread
print(peak("blockwise", 4096) - before, peak("written out", 4096) - before)
"""
        command = [sys.executable, "-c", code]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        found = subprocess.check_output(command, cwd=tmp_path, env=environment, timeout=240)
        blockwise, written_out = map(float, found.split())
        assert blockwise < 32 and written_out > 150, (blockwise, written_out)

    def test_blockwise_takes_any_block_size(self):
        q, k = torch.randn(5, 4), torch.randn(7, 4)
        expected = attention.attention_loop(q, k, k, causal=True)
        for block_size in (1, 2, 5, 7, 100):
            output = attention.blockwise_attention(q, k, k, None, True, block_size)
            check_close(output, expected, 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_blockwise_sums_in_float32(self, dtype):
        """As of the same numbers in float32, to the last bit; under autocast, too."""
        inputs = [torch.randn(t, 8).to(dtype).requires_grad_() for t in (300, 400, 400)]
        wide = [x.detach().float().requires_grad_() for x in inputs]
        expected = attention.blockwise_attention(*wide, block_size=7)
        wanted = torch.autograd.grad(expected.sum(), wide)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention.blockwise_attention(*inputs, block_size=7)
            gradients = torch.autograd.grad(output.sum(), inputs)
        for got, want in zip((output, *gradients), (expected, *wanted), strict=True):
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))

    # ---- masks

    def test_causal_mask(self):
        x, o = True, False
        assert attention.causal_mask(3).tolist() == [[x, o, o], [x, x, o], [x, x, x]]
        assert attention.causal_mask(2, 4).tolist() == [[x, x, x, o], [x, x, x, x]]
        assert attention.causal_mask(3, 2).tolist() == [[o, o], [x, o], [x, x]]
        assert attention.causal_mask(2).dtype == torch.bool

    def test_padding_mask(self):
        x, o = True, False
        padding = attention.padding_mask([0, 2, 3])
        assert padding.tolist() == [[[[o, o, o]]], [[[x, x, o]]], [[[x, x, x]]]]
        assert attention.padding_mask([1], max_len=3).tolist() == [[[[x, o, o]]]]
        assert attention.padding_mask(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 1, 0)
        for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"):
            lengths = np.array([0, 2, 3], dtype=kind)
            for given in (lengths, torch.from_numpy(lengths)):
                assert torch.equal(attention.padding_mask(given), padding), kind

    # ---- MultiHeadAttention

    def test_multi_head_attention_agrees_with_torch(self):
        """Values, weights, gradients of inputs and parameters; with kv_dim, without bias."""
        draw = random.Random(2)
        for case in range(300):
            heads, b, tq, tk = (draw.randint(1, n) for n in (3, 3, 6, 7))
            c = heads * draw.choice([1, 4, 5])
            cross, bias = draw.random() < 0.5, draw.random() < 0.5
            kv_dim = draw.choice([None, 6, 7]) if cross else None
            dtype, tolerance = draw.choice([(torch.float64, 1e-10), (torch.float32, 2e-5)])
            sizes = {"bias": bias, "kdim": kv_dim, "vdim": kv_dim, "dtype": dtype}
            theirs = nn.MultiheadAttention(c, heads, batch_first=True, **sizes)
            for parameter in theirs.parameters():
                if parameter.dim() == 1:  # biases of 0 would hide a mix-up
                    nn.init.normal_(parameter)
            ours = attention.MultiHeadAttention.from_torch(theirs)
            ours.fused = draw.random() < 0.5

            inputs = [torch.randn(b, tq, c, dtype=dtype, requires_grad=True)]
            if cross:
                inputs.append(torch.randn(b, tk, kv_dim or c, dtype=dtype, requires_grad=True))
            source = inputs[-1]
            tk = source.size(1)
            causal = draw.random() < 0.4 and tk >= tq
            future = ~attention.causal_mask(tq, tk) if causal else None
            hidden = torch.rand(b, tk) < draw.choice([0, 0.3])
            hidden[:, 0] = False  # torch gives NaN where nothing may be attended to
            mask = ~hidden[:, None, None, :] if hidden.any() else None

            call = {"attn_mask": future, "average_attn_weights": False}
            expected, expected_weights = theirs(inputs[0], source, source, hidden, **call)
            arguments = {"mask": mask, "causal": causal}
            output, weights = ours.forward_with_weights(*inputs, **arguments)
            what = f"case {case}: {heads=} {c=} {tq=} {tk=} {cross=} {causal=} {bias=} {kv_dim=}"
            check_close(output, expected, tolerance, what)
            check_close(weights, expected_weights, tolerance, what)
            assert torch.equal(output, ours(*inputs, **arguments)), what

            towards = torch.randn_like(output)
            gradients = torch.autograd.grad(output, [*inputs, *ours.parameters()], towards)
            wanted = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], towards)
            for parameter, gradient in zip(theirs.parameters(), wanted[len(inputs) :], strict=True):
                parameter.data = gradient
            named = attention.MultiHeadAttention.from_torch(theirs)  # so that they have our names
            wanted = [*wanted[: len(inputs)], *named.parameters()]
            for got, want in zip(gradients, wanted, strict=True):
                check_close(got, want.detach(), tolerance, what)

    def test_from_torch_keeps_everything(self):
        source = nn.MultiheadAttention(12, 3, dropout=0.3, dtype=torch.float64).eval()
        source.in_proj_weight.requires_grad_(False)
        source.out_proj.bias.requires_grad_(False)
        with torch.no_grad():  # grad mode has no say in it
            ours = attention.MultiHeadAttention.from_torch(source)
        assert not ours.training and ours.dropout == 0.3 and ours.n_heads == 3
        assert attention.MultiHeadAttention.from_torch(source.train()).training
        frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
        assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.bias"}
        assert {p.dtype for p in ours.parameters()} == {torch.float64}
        for p in source.parameters():
            nn.init.constant_(p, 7)
        assert not any((q == 7).any() for q in ours.parameters()), "copies"

    def test_multi_head_attention_starts_as_glorot_says(self):
        module = attention.MultiHeadAttention(24, 4, kv_dim=10)
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            limit = math.sqrt(6 / (24 + projection.in_features))
            assert 0.9 * limit < projection.weight.abs().max() <= limit
            assert not projection.bias.any()

    @ATTENTION_FUSED_OR_NOT
    def test_padding_and_empty_rows(self, fused):
        module = attention.MultiHeadAttention(12, 3, fused=fused).double()
        nn.init.normal_(module.out_proj.bias)
        x = torch.randn(3, 6, 12, dtype=torch.float64).requires_grad_()
        mask = attention.padding_mask([4, 0, 6])
        output, weights = module.forward_with_weights(x, mask=mask)
        check_close(output[1], module.out_proj.bias.expand(6, 12), 0.0, "a query without keys")
        assert (weights[1] == 0).all()
        output.sum().backward()
        assert all(tensor.grad.isfinite().all() for tensor in (x, *module.parameters()))
        altered = x.detach().clone()
        altered[0, 4:] = 1e3
        check_close(module(altered, mask=mask)[0, :4], output[0, :4], 0.0, "what is padded")
        longer = F.pad(x.detach()[:1], (0, 0, 0, 5))
        longer = module(longer, mask=attention.padding_mask([4], 11))
        check_close(longer[0, :4], output[0, :4], 1e-12, "more padding")
        check_close(module(x[:1, :4])[0], output[0, :4], 1e-12, "alone, without padding")

    @ATTENTION_FUSED_OR_NOT
    def test_causality(self, fused):
        """A later token moves no earlier output; it moves its own and the later ones."""
        module = attention.MultiHeadAttention(12, 3, fused=fused)
        x = torch.randn(3, 6, 12)
        altered = x + (torch.arange(6) == 4)[:, None]
        difference = module(altered, causal=True) - module(x, causal=True)
        moved = difference.abs().amax(dim=(0, 2))
        assert (moved[:4] == 0).all() and (moved[4:] > 1e-6).all()

    @ATTENTION_FUSED_OR_NOT
    @pytest.mark.parametrize("causal", [False, True])
    def test_dropout_only_in_training(self, fused, causal):
        module = attention.MultiHeadAttention(8, 2, dropout=0.5, fused=fused)
        plain = attention.MultiHeadAttention(8, 2)
        plain.load_state_dict(module.state_dict())
        x = torch.randn(2, 7, 8)
        expected, expected_weights = plain.forward_with_weights(x, causal=causal)
        check_close(module.eval()(x, causal=causal), expected, 1e-6)
        module.train()
        torch.manual_seed(1)
        first, weights = module.forward_with_weights(x, causal=causal)
        torch.manual_seed(1)
        assert torch.equal(first, module(x, causal=causal))
        assert not torch.equal(first, module(x, causal=causal))
        check_close(weights, expected_weights, 1e-6, "weights are those before dropout")
        mean = sum(module(x, causal=causal) for _ in range(2000)) / 2000
        assert (mean - expected).abs().max() < 0.15, "unbiased: what is kept is scaled up"

    @ATTENTION_FUSED_OR_NOT
    def test_forward_cached_equals_one_shot(self, fused):
        """Values and gradients, in pieces of any size, after left padding."""
        module = attention.MultiHeadAttention(12, 3, fused=fused).double()
        x = torch.randn(2, 9, 12, dtype=torch.float64).requires_grad_()
        mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
        mask[0, ..., :2] = False
        expected = module(x, mask=mask, causal=True)
        (wanted,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        for pieces in ([1] * 9, [4, 1, 3, 1], [9]):
            cache = attention.KVCache()
            outputs = []
            seen = 0
            for piece in x.split(pieces, dim=1):
                seen += piece.size(1)
                outputs.append(module.forward_cached(piece, cache, mask[..., :seen]))
            assert cache.k.shape == cache.v.shape == (2, 3, 9, 4)
            output = torch.cat(outputs, dim=1)
            check_close(output, expected, 1e-12, str(pieces))
            check_close(torch.autograd.grad(output.sum(), x)[0], wanted, 1e-12, str(pieces))

    def test_forward_cached_survives_what_it_refuses(self):
        """A wrong mask or batch leaves the tokens that were there."""
        module = attention.MultiHeadAttention(12, 3)
        cache, x = attention.KVCache(), torch.randn(2, 4, 12)
        module.forward_cached(x[:, :3], cache)
        for query, mask in ((x, torch.ones(4)), (x, torch.ones(2).bool()), (x[:1], None)):
            with pytest.raises((ValueError, RuntimeError)):
                module.forward_cached(query[:, 3:], cache, mask)
            assert cache.k.shape == cache.v.shape == (2, 3, 3, 4)
        check_close(module.forward_cached(x[:, 3:], cache), module(x, causal=True)[:, 3:], 1e-6)

    # ---- refusals: what would be silently wrong

    def test_refused(self):
        mha, theirs = attention.MultiHeadAttention, nn.MultiheadAttention
        x, row = torch.randn(2, 5, 8), torch.randn(5, 8)
        for words, function, *arguments in (
            ("lengths.*max_len=4.*5", attention.padding_mask, [2, 5], 4),
            ("lengths.*-1", attention.padding_mask, [-1, 2]),
            ("lengths.*float32", attention.padding_mask, [1.5]),
            ("lengths.*1, 1", attention.padding_mask, [[1]]),
            ("lengths.*bool", attention.padding_mask, [True, False]),
            ("block_size.*0", attention.blockwise_attention, x, x, x, None, False, 0),
            ("n_heads.*4.*10", mha, 10, 4),
            ("n_heads.*0", mha, 8, 0),
            ("n_heads.*-2", mha, 8, -2),
            ("5, 8", mha(8, 1), row),  # with one head it would run
            ("5, 8", mha(8, 1), x, row),
            ("mask.*float", mha(8, 2), x, None, torch.ones(5)),
            ("vdim", mha.from_torch, theirs(12, 3, kdim=4, vdim=6)),
            ("bias_kv", mha.from_torch, theirs(8, 2, add_bias_kv=True)),
            ("zero", mha.from_torch, theirs(8, 2, add_zero_attn=True)),
        ):
            with pytest.raises(ValueError, match=words):
                function(*arguments)

    @ATTENTION_EVERY_WAY
    def test_all_ways_refuse_what_does_not_fit(self, way):
        """Masks that would enlarge the output, or hold numbers; more values than keys."""
        q, k, v = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4), torch.randn(2, 1, 9, 4)
        for shape in ((7, 5), (5, 6), (2, 7), (1, 2, 1, 5, 7), (2, 3, 5, 7)):
            with pytest.raises((RuntimeError, IndexError)):
                way(q, k, k, torch.ones(shape, dtype=torch.bool))
        for dtype in (torch.float32, torch.int64):
            with pytest.raises(ValueError, match="mask.*boolean"):
                way(q, k, k, torch.ones(5, 7, dtype=dtype))
        for values in (v, v[:, :, :6]):
            with pytest.raises((RuntimeError, IndexError)):
                way(q, k, values, torch.ones(5, 7, dtype=torch.bool))

    # ---- it leaves Python

    @pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
    @pytest.mark.parametrize("how", ["trace", "script", "export"])
    def test_multi_head_attention_leaves_python(self, how):
        """The same outputs, at sizes that were not there then."""

        def example(b: int, tq: int, tk: int) -> dict[str, Tensor]:
            given = {"query": torch.randn(b, tq, 12)}
            if cross:
                given["context"] = torch.randn(b, tk, 10)
            if masked:
                given["mask"] = torch.rand(b, 1, 1, tk if cross else tq) < 0.7
            return given

        for fused, cross, masked in itertools.product([True, False], repeat=3):
            module = AttentionCall(fused, cross)
            given = example(2, 5, 5 if how == "trace" else 7)  # a trace mustn't rely on Tq = Tk
            if how == "trace":
                converted = torch.jit.trace(module, example_kwarg_inputs=given)
            elif how == "script":
                converted = torch.jit.script(module)
            else:
                free = {"query": (0, 1), "context": (0, 1), "mask": (0, 3)}
                free = {name: dict.fromkeys(free[name], torch.export.Dim.AUTO) for name in given}
                converted = torch.export.export(module, (), given, dynamic_shapes=free).module()
            for sizes in ((2, 5, 7), (3, 4, 9), (1, 8, 6), (2, 6, 6)):
                given = example(*sizes)
                check_close(converted(**given), module(**given), 1e-6, f"{fused=} {masked=} {sizes}")

    @pytest.mark.filterwarnings("ignore")
    def test_fused_attention_traced_fits_other_lengths(self):
        q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 7, 8)
        attend = lambda q, k: attention.fused_attention(q, k, k, causal=True)  # noqa: E731
        traced = torch.jit.trace(attend, (q, q))
        for queries in (q, q[:, :, :2]):
            check_close(traced(queries, k), attend(queries, k), 1e-6)

    # ---- pictures

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 6, 6), (1, 1, 1), (1, 1, 700, 600)])
    def test_plot_attention(self, shape, tmp_path):
        """Any tokens and sizes."""
        tokens = ["a", "$\\frac$", "<b>", "two\nlines", "word" * 9, "$"] * 200
        weights = torch.rand(shape).softmax(dim=-1)
        queries, keys = tokens[: shape[-2]], tokens[: shape[-1]]
        path = attention.plot_attention(weights, queries, keys, tmp_path / "a.png")
        assert path.read_bytes().startswith(b"\x89PNG") and os.listdir(tmp_path) == ["a.png"]

    def test_pictures_refuse_what_is_no_weights(self, tmp_path):
        for words, weights in (
            ("1, 2, 3", torch.rand(1, 2, 3)),
            ("1, 3, 2", torch.rand(1, 3, 2)),
            ("2, 2", torch.rand(2, 2)),
            ("1.02", torch.full((1, 2, 2), 1.02)),
            ("-0.5", torch.full((1, 2, 2), -0.5)),
            ("nan", torch.full((1, 2, 2), math.nan)),
        ):
            for draw in (attention.plot_attention, attention.attention_html):
                with pytest.raises(ValueError, match=f"(?s)weights.*{words}"):
                    draw(weights, "ab", "ab", tmp_path / "x")
        assert not list(tmp_path.iterdir())

    def test_attention_html(self, tmp_path):
        """Self-contained; no token gets out of its place; 0 alone is masked."""
        queries = ["<script>alert(1)</script>", "</script>", 'quo"te', "ünï\u2028", "DATA"]
        keys = ["<!--", "&amp;", "x"]
        weights = torch.rand(2, 3, 5, 3).softmax(dim=-1)
        weights[0, 0, 0] = torch.tensor([1.005, 1e-7, 0.0])  # as bfloat16 may round them
        page = attention.attention_html(weights, queries, keys, tmp_path / "a.html").read_text("utf-8")
        assert not re.findall(r"https?:|src=|url\(|import ", page)
        assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
        data = json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page, re.S)[1])
        assert data["queries"] == queries and data["keys"] == keys
        stored = torch.tensor(data["weights"])
        assert stored[0, 0, 0].tolist() == [10_000, 1, 0]
        check_close(stored / 10_000, weights.clamp(max=1), 1e-4)

    # ---- the demo

    def test_induction_batch(self):
        """The answer is the word that followed the asked one, at its place."""
        seen = attention.N_SEEN
        batch = [tensor.tolist() for tensor in attention.induction_batch(300)]
        for row, places, answers in zip(*batch, strict=True):
            first, asked = row[:seen], row[seen:]
            assert len(set(first)) == seen and sorted(asked) == sorted(first[:-1])
            assert places == [first.index(word) + 1 for word in asked]
            assert answers == [first[place] for place in places]

    def test_demo_alone_in_an_empty_folder(self, tmp_path):
        shutil.copy(ROOT / "attention.py", tmp_path)
        environment = {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
        arguments = "attention.py", "--max-len", "1024", "--seed", "3"
        result = run_script(*arguments, cwd=tmp_path, folder=tmp_path, **environment)
        headline = last_json(result)
        assert result.stderr == "" and len(result.stdout.strip().splitlines()[-1]) < 300
        assert headline["weight_on_answer"] >= 0.9 and headline["exact_match"] >= 0.99
        report = json_of(tmp_path / headline["report"])
        assert max(report["largest_difference"].values()) < 1e-12
        kept = {(row["T"], row["way"]): row["MB"] for row in report["scaling"]}
        grows = {way: kept[1024, way] / kept[512, way] for way in attention.WAYS}
        assert grows["written out"] > 3 and grows["blockwise"] < 2.1 and grows["fused"] < 2.1
        names = sorted(os.listdir(tmp_path / "out/attention"))
        assert names == ["heads.html", "heads.png", "report.json"]


# -----------------------------------------------------------------------------
# encoder.py

ENCODER_POOLS = ["mean", "max", "mean+max", "first"]


def encoder_small(**given) -> encoder.EncoderConfig:
    sizes = {"max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
    return encoder.EncoderConfig(30, **(sizes | given))


def encoder_classifier(**given) -> encoder.EncoderClassifier:
    return encoder.EncoderClassifier(encoder_small(**given)).eval()


def encoder_config(rng: random.Random) -> encoder.EncoderConfig:
    """A small random config; dropout is 0, so that training mode can be compared."""
    n_heads = rng.choice([1, 2, 3, 4])
    return encoder.EncoderConfig(
        vocab_size=rng.randint(5, 50),
        max_len=rng.randint(12, 40),
        d_model=n_heads * rng.randint(1, 6),
        n_heads=n_heads,
        n_layers=rng.randint(1, 3),
        d_ff=rng.randint(1, 40),
        dropout=0.0,
        norm_first=rng.random() < 0.5,
        activation=rng.choice(["relu", "gelu"]),
        n_classes=rng.randint(1, 5),
        pad_id=rng.choice([0, 3]),
        pool=rng.choice(ENCODER_POOLS),
    )


def encoder_tokens(rng: random.Random, config: encoder.EncoderConfig) -> Tensor:
    """(4, T) ids with padding after lengths from 1 to T."""
    T = rng.randint(2, config.max_len)
    tokens = torch.randint(0, config.vocab_size - 1, (4, T))
    tokens += tokens >= config.pad_id  # any id but pad_id
    for row in tokens:
        row[rng.randint(1, T) :] = config.pad_id
    return tokens


def encoder_torch_layer(config: encoder.EncoderConfig, **given) -> nn.TransformerEncoderLayer:
    """torch's layer with random parameters: a zero bias would hide a forgotten one."""
    choices = {"dropout": 0.0, "activation": config.activation, "norm_first": config.norm_first}
    sizes = config.d_model, config.n_heads, config.d_ff
    layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, **(choices | given))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


class TestEncoder:
    # ---- oracles

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_encoder_layer_equals_torch(self, dtype, tolerance):
        """Values, gradients of the input and of every parameter, with padding."""
        for seed in range(30):
            rng = random.Random(seed)
            config = encoder_config(rng)
            eps = rng.choice([1e-5, 1e-2])
            theirs = encoder_torch_layer(config, dtype=dtype, layer_norm_eps=eps)
            ours = encoder.EncoderLayer.from_torch(theirs)
            x = torch.randn(3, rng.randint(1, 9), config.d_model, dtype=dtype, requires_grad=True)
            mask = torch.rand(x.shape[:2]) < 0.7
            mask[:, 0] = True
            output = ours(x, mask[:, None, None, :])
            expected = theirs(x, src_key_padding_mask=~mask)
            check_close(output, expected, tolerance, "output")
            towards = torch.randn_like(x)
            gradients = torch.autograd.grad(output, [x, *ours.parameters()], towards)
            wanted = torch.autograd.grad(expected, [x, *theirs.parameters()], towards)
            for parameter, gradient in zip(theirs.parameters(), wanted[1:], strict=True):
                parameter.data = gradient
            named = encoder.EncoderLayer.from_torch(theirs)  # so that they have our names
            for got, want in zip(gradients, [wanted[0], *named.parameters()], strict=True):
                check_close(got, want.detach(), tolerance, "gradient")

    def test_encoder_stack_equals_torch(self):
        """embedding * sqrt(C) + positions, the layers; a final norm in pre-norm, none in post-norm."""
        for seed in range(20):
            rng = random.Random(seed)
            config = encoder_config(rng)
            ours = encoder.Encoder(config).double()
            theirs = [encoder_torch_layer(config).double() for _ in range(config.n_layers)]
            ours.layers = nn.ModuleList(map(encoder.EncoderLayer.from_torch, theirs))
            tokens = encoder_tokens(rng, config)
            mask = tokens != config.pad_id
            positions = encoder.sinusoidal_positional_encoding(tokens.size(1), config.d_model)
            x = ours.embedding.weight[tokens] * math.sqrt(config.d_model) + positions
            for layer in theirs:
                x = layer(x, src_key_padding_mask=~mask)
            if config.norm_first:
                nn.init.normal_(ours.final_norm.weight)
                nn.init.normal_(ours.final_norm.bias)
                x = F.layer_norm(x, x.shape[-1:], ours.final_norm.weight, ours.final_norm.bias)
            check_close(ours(tokens)[mask], x[mask], 1e-10)

    def test_self_attention_equals_attention_py(self):
        """Values, weights and gradients; a row without keys, too."""
        short = encoder.SelfAttention(12, 3).double()
        long = attention.MultiHeadAttention(12, 3).double()
        packed = zip(short.qkv_proj.weight.chunk(3), short.qkv_proj.bias.chunk(3), strict=True)
        for module, (weight, bias) in zip((long.q_proj, long.k_proj, long.v_proj), packed, strict=True):
            module.load_state_dict({"weight": weight, "bias": bias})
        long.out_proj.load_state_dict(short.out_proj.state_dict())
        x = torch.randn(5, 7, 12, dtype=torch.float64, requires_grad=True)
        padding = attention.padding_mask([7, 4, 1, 0, 6])  # (5, 1, 1, 7)
        for mask in (None, padding, torch.rand(7, 7) < 0.5, torch.rand(5, 3, 7, 7) < 0.5):
            expected, weights = long.forward_with_weights(x, mask=mask)
            output = short(x, mask)
            check_close(output, expected, 1e-12)
            check_close(short.weights(x, mask), weights, 1e-12)
            gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (output, expected)]
            check_close(*gradients, 1e-12)

    def test_sinusoidal_positional_encoding_equals_the_formula(self):
        for d_model in (1, 2, 5, 8, 17):
            table = encoder.sinusoidal_positional_encoding(30, d_model)
            assert table.shape == (30, d_model) and table.dtype == torch.float32
            for t, i in itertools.product(range(30), range(d_model)):
                angle = t / 10000 ** (2 * (i // 2) / d_model)
                assert abs(table[t, i].item() - (math.cos if i % 2 else math.sin)(angle)) < 1e-7
        far = encoder.sinusoidal_positional_encoding(100_001, 4)[100_000]
        assert abs(far[0].item() - math.sin(100_000)) < 1e-7  # float32 angles are 4e-3 off here

    @pytest.mark.parametrize("pool", ENCODER_POOLS)
    def test_pool_tokens_equals_its_loops(self, pool):
        x = torch.randn(5, 7, 4, dtype=torch.float64) - 3  # below 0: padding's 0 would show in a max
        mask = torch.rand(5, 7) < 0.6
        mask[0] = False
        mask[1] = True
        seen = x.masked_fill(~mask[:, :, None], math.nan)  # what stands at padding counts for nothing
        for row, result in enumerate(encoder.pool_tokens(seen, mask, pool)):
            real = x[row, mask[row]] if mask[row].any() else torch.zeros(1, 4).double()
            largest = torch.stack([real[:, i].max() for i in range(4)])
            expected = {
                "mean": sum(real) / len(real),
                "max": largest,
                "mean+max": torch.cat((sum(real) / len(real), largest)),
                "first": x[row, 0] * mask[row, 0],
            }
            check_close(result, expected[pool], 1e-12, pool)
        assert torch.autograd.gradcheck(encoder.pool_tokens, (x.requires_grad_(), mask, pool))

    # ---- properties

    def test_forward_with_weights_are_those_of_forward(self):
        for seed in range(6):
            rng = random.Random(seed)
            config = encoder_config(rng)
            model = encoder.Encoder(config)
            tokens = encoder_tokens(rng, config)
            used = []
            for layer in model.layers:
                layer.self_attention.register_forward_hook(lambda m, xs, _, w=used: w.append(m.weights(*xs)))
            expected = model(tokens)
            output, weights = model.forward_with_weights(tokens)
            assert torch.equal(output, expected)
            assert torch.equal(weights, torch.stack(used[: config.n_layers]))  # (L, B, H, T, T)

    def test_from_torch_keeps_what_the_layer_has(self):
        """Activation, dropout, mode, dtypes, and what is frozen."""
        x = torch.randn(2, 3, 16)
        for activation in (nn.ReLU(), nn.GELU(), F.relu, F.gelu):
            layer = encoder_torch_layer(encoder_small(), activation=activation, dropout=0.25).eval()
            layer.linear1.requires_grad_(False)
            ours = encoder.EncoderLayer.from_torch(layer)
            check_close(ours(x), layer(x), 1e-5)
            frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
            assert frozen == {"ffn.0.weight", "ffn.0.bias"}
            assert ours.dropout.p == 0.25 and not ours.training
        layer.bfloat16().train().norm1.float()
        ours = encoder.EncoderLayer.from_torch(layer)
        assert ours.training and ours.self_attention_norm.weight.dtype == torch.float32
        assert ours.ffn_norm.weight.dtype == ours.self_attention.qkv_proj.bias.dtype == torch.bfloat16
        ours.ffn[0].weight.data.zero_()
        assert layer.linear1.weight.any(), "copies: the original stays as it is"

    def test_encoder_padding_and_batch_invariance(self):
        """More padding, other rows, other ids under the mask change nothing."""
        for seed in range(30):
            rng = random.Random(seed)
            config = encoder_config(rng)
            model = encoder.EncoderClassifier(config).double().eval()
            tokens = encoder_tokens(rng, config)
            logits = model(tokens)
            assert logits.shape == (4, config.n_classes)
            for row, length in enumerate((tokens != config.pad_id).sum(1).tolist()):
                alone = model(tokens[row : row + 1, :length])
                check_close(alone, logits[row : row + 1], 1e-12, "alone, unpadded")
            longer = F.pad(tokens, (0, config.max_len - tokens.size(1)), value=config.pad_id)
            check_close(model(longer), logits, 1e-12, "more padding")
            mask = torch.rand(tokens.shape) < 0.7  # holes in the middle, too
            noise = torch.where(mask, tokens, torch.randint(0, config.vocab_size, tokens.shape))
            check_close(model(noise, mask), model(tokens, mask), 1e-12, "whatever stands under the mask")

    @pytest.mark.parametrize("pool", ENCODER_POOLS)
    def test_pool_tokens_of_padding_alone_is_0(self, pool):
        """So the logits are the head's bias; and gradients are finite."""
        model = encoder_classifier(pool=pool)
        logits = model(torch.tensor([[0, 0, 0], [5, 6, 0]]))
        assert torch.equal(logits[0], model.head.bias)
        logits.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder_dropout_in_training_alone(self, norm_first):
        """On embeddings, each sub-layer's output (the residual stays) and the pooled vector."""
        model = encoder_classifier(dropout=1 - 1e-9, norm_first=norm_first)
        tokens = torch.randint(1, 20, (3, 6))
        nothing = model.head.bias.expand(3, -1)
        assert torch.equal(model(tokens), model(tokens))
        assert (model(tokens) - nothing).abs().max() > 0.01
        model.dropout.train()
        check_close(model(tokens), nothing, 1e-6)
        model.train()
        assert not model.encoder.embed(tokens)[0].any()
        layer, x = model.encoder.layers[0], torch.randn(2, 5, 16)
        expected = x if norm_first else layer.ffn_norm(layer.self_attention_norm(x))
        check_close(layer(x), expected, 1e-6)

    def test_encoder_sees_order_by_its_positions_alone(self):
        model = encoder_classifier()
        tokens = torch.randperm(29)[None, :10] + 1
        shuffled = tokens[:, torch.randperm(10)]
        assert (model(tokens) - model(shuffled)).abs().max() > 1e-3
        model.encoder.positions.zero_()
        check_close(model(tokens), model(shuffled), 1e-5)

    def test_encoder_starts_with_words_as_large_as_positions(self):
        embed = encoder.Encoder(encoder.EncoderConfig(500)).eval().embed
        words = embed(torch.arange(500)[:, None])[0] - embed(torch.zeros(500, 1).long())[0]
        assert 1.2 < words.std() < 1.6  # sqrt(2): a difference of two

    def test_encoder_config_defaults(self):
        """Weights without their config are another model's once a default changes."""
        defaults = 9, 512, 128, 4, 2, 512, 0.1, True, "gelu", 2, 0, "mean"
        assert dataclasses.astuple(encoder.EncoderConfig(9)) == defaults

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_encoder_from_the_meta_device(self, assign, dtype):
        """All is right once weights are loaded, positions too, whatever the default dtype is."""
        tokens = torch.randint(1, 20, (3, 6))
        torch.set_default_dtype(dtype)
        try:
            source = encoder_classifier()
            with torch.device("meta"):
                model = encoder_classifier()
        finally:
            torch.set_default_dtype(torch.float32)
        if not assign:
            model.to_empty(device="cpu")  # leaves old memory there
            for tensor in (*model.parameters(), *model.buffers()):
                nn.init.constant_(tensor, math.nan)
        model.load_state_dict(source.state_dict(), assign=assign)
        logits = model(tokens)
        assert torch.equal(logits, source(tokens))
        assert logits.dtype == dtype and logits.isfinite().all()

    def test_self_attention_weights_in_float16(self):
        model = encoder.SelfAttention(64, 1).half()
        nn.init.zeros_(model.qkv_proj.bias)
        model.qkv_proj.weight.data = torch.eye(64).repeat(3, 1).half() * 8
        weights = model.weights(torch.full((1, 3, 64), 8.0).half())
        check_close(weights.float(), torch.full((1, 1, 3, 3), 1 / 3), 1e-3)  # q k' = 262,144 overflows

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("norm_first, pool", [(True, "mean+max"), (False, "first"), (True, "max")])
    def test_encoder_leaves_python_at_other_sizes(self, norm_first, pool):
        model = encoder_classifier(norm_first=norm_first, pool=pool)
        example, other = torch.randint(1, 30, (3, 9)), torch.randint(1, 30, (5, 12))
        other[1, 4:] = 0
        other[2] = 0
        free = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=12)}}
        for made in (
            torch.jit.script(model),
            torch.jit.trace(model, (example,)),
            torch.export.export(model, (example,), dynamic_shapes=free).module(),
            torch.compile(model, fullgraph=True, backend="eager"),
        ):
            check_close(made(other), model(other), 1e-6)

    # ---- refusals

    def test_encoder_config_and_from_torch_refuse(self):
        theirs = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16)
        ours = encoder.EncoderLayer.from_torch
        for words, make in (
            ("n_heads.*d_model=9.*2", lambda: encoder_small(d_model=9)),
            ("n_heads.*0", lambda: encoder_small(n_heads=0)),
            ("activation.*tanh", lambda: encoder_small(activation="tanh")),
            ("pool.*cls", lambda: encoder_small(pool="cls")),
            ("batch_first", lambda: ours(theirs())),
            ("bias", lambda: ours(theirs(batch_first=True, bias=False))),
            ("activation", lambda: ours(theirs(batch_first=True, activation=F.silu))),
            ("activation", lambda: ours(theirs(activation=nn.GELU(approximate="tanh")))),
        ):
            with pytest.raises(ValueError, match=words):
                make()

    def test_encoder_refuses_masks_and_lengths(self):
        model, tokens = encoder_classifier(), torch.ones(2, 13, dtype=torch.long)
        with pytest.raises(ValueError, match="max_len=12.*13"):
            model(tokens)
        tokens = tokens[:, :12]  # max_len itself fits
        check_close(model(tokens.int()), model(tokens), 0)
        for shape in ((2, 1), (1, 12), (2, 12, 12)):  # would broadcast
            with pytest.raises(ValueError, match="mask must be"):
                model(tokens, torch.ones(shape, dtype=torch.bool))
        for dtype in (torch.float32, torch.long, torch.uint8):  # would be added to the scores
            with pytest.raises(ValueError, match="mask must be boolean"):
                model.encoder.forward_with_weights(tokens, torch.ones(2, 12, dtype=dtype))

    # ---- demo

    def test_generate_reviews_are_twins(self):
        reviews = encoder.generate_reviews(4000, seed=5)
        assert reviews == encoder.generate_reviews(4000, seed=5) != encoder.generate_reviews(4000, seed=6)
        assert len({text for text, _ in reviews}) == 4000, "so no sentence is in two splits"
        for (positive, one), (negative, zero) in zip(reviews[::2], reviews[1::2], strict=True):
            assert (one, zero) == (1, 0) and sorted(positive.split()) == sorted(negative.split())

    def test_main_that_diverges_ends_in_a_sentence(self, tmp_path):
        with pytest.raises(SystemExit, match="--lr"):
            encoder.main(encoder.Settings(lr=1e30, out=str(tmp_path)))
        assert not list(tmp_path.iterdir())

    def test_encoder_demo_alone_in_an_empty_folder(self, tmp_path):
        """On a terminal that knows ASCII only."""
        shutil.copy(ROOT / "encoder.py", tmp_path)
        result = run_script("encoder.py", cwd=tmp_path, folder=tmp_path, PYTHONIOENCODING="ascii")
        summary = last_json(result)
        assert summary["encoder"] >= 0.99 and len(result.stdout.splitlines()[-1]) < 300
        for name in ("bag of words", "encoder without positions"):
            assert abs(summary[name] - 0.5) < 0.02
        report = json_of(tmp_path / summary["report"])
        assert {row["model"]: row["accuracy"] for row in report["rows"]}.items() <= summary.items()
        assert (tmp_path / "out/encoder/head.png").read_bytes()[:4] == b"\x89PNG"


# -----------------------------------------------------------------------------
# transformer.py


def transformer_tiny(norm_first=True, **changes):
    """A small model with large random weights, in biases and norms too: everything matters."""
    sizes = {"vocab_size": 11, "max_len": 24, "d_model": 12, "n_heads": 3, "n_layers": 2}
    sizes |= {"d_ff": 20, "dropout": 0.0, "tied": False, "norm_first": norm_first} | changes
    model = transformer.Transformer(transformer.TransformerConfig(**sizes))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.4)
    return model.double()


def transformer_sentences(n=6, longest=9):
    """Rows of random tokens with EOS, padded on the right; the first is the longest."""
    lengths = [longest, *torch.randint(2, longest + 1, (n - 1,)).tolist()]
    rows = [F.pad(torch.randint(3, 11, (length - 1,)), (0, 1), value=2) for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


TRANSFORMER_NAMES = {  # torch's: ours
    "coder.layers": "coder", "coder.norm": "coder_norm", "linear1": "ffn.0", "linear2": "ffn.2",
    "self_attn": "self_attention", "multihead_attn": "cross_attention",
    "norm1": "self_attention_norm", "norm3": "ffn_norm",
}  # fmt: skip


def transformer_by_torch(model, src, tgt):
    """Logits by nn.Transformer, as a function of the model's parameters."""
    c = model.config
    sizes = (c.d_model, c.n_heads, c.n_layers, c.n_layers, c.d_ff, 0.0)
    theirs = nn.Transformer(*sizes, batch_first=True, norm_first=c.norm_first)
    if not c.norm_first:
        theirs.encoder.norm = theirs.decoder.norm = None
    weights = {}
    for name, _ in theirs.named_parameters():
        ours = name.replace("norm2", "ffn_norm" if "encoder" in name else "cross_attention_norm")
        for their, our in TRANSFORMER_NAMES.items():
            ours = ours.replace(their, our)
        parts = [ours.replace("in_proj_", f"{x}_proj.") for x in "qkv"]  # torch joins three
        parts = parts if "in_proj_" in ours else [ours]
        weights[name] = torch.cat([model.get_parameter(part) for part in parts])
    embedded, positions = [], transformer.sinusoidal_positional_encoding(24, c.d_model)
    for embedding, tokens in ((model.src_embedding, src), (model.tgt_embedding, tgt)):
        embedded.append(embedding(tokens) * c.d_model**0.5 + positions[: tokens.size(1)])
    masks = {"src_key_padding_mask": src == 0, "memory_key_padding_mask": src == 0}
    masks["tgt_mask"] = torch.ones(tgt.size(1), tgt.size(1)).triu(1).bool()
    hidden = torch.func.functional_call(theirs, weights, tuple(embedded), masks)
    return F.linear(hidden, model.output.weight)


@torch.no_grad()
def transformer_by_lists(model, src, max_len, beam_size, length_penalty):
    """Beam search of one row after the other, without cache. Frozen hypotheses compete by
    log-probability, only the end divides. Tokens (B, T), scores (B,)."""
    found = []
    for row in src:
        beams = [([1], 0.0)]
        for _ in range(max_len):
            candidates = []
            for tokens, log_prob in beams:
                if tokens[-1] == 2:
                    candidates.append((tokens, log_prob))
                    continue
                logits = model(row[None, row != 0], torch.tensor([tokens]))[0, -1]
                following = enumerate(logits.log_softmax(-1).tolist())
                candidates += [([*tokens, i], log_prob + x) for i, x in following]
            beams = sorted(candidates, key=lambda beam: -beam[1])[:beam_size]
        divided = [x / ((4 + len(tokens)) / 6) ** length_penalty for tokens, x in beams]
        best = divided.index(max(divided))
        found.append((torch.tensor(beams[best][0][1:]), divided[best]))
    rows, scores = zip(*found, strict=True)
    rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return rows, torch.tensor(scores, dtype=torch.float64)


TRANSFORMER_SMALL = {
    "epochs": 3, "d_model": 16, "d_ff": 16, "n_layers": 1, "dropout": 0.2, "save_every": 3,
    "vocab_size": 400, "batch_tokens": 400, "amp": "off", "device": "cpu",
}  # fmt: skip

TRANSFORMER_KILLED = """
import os, signal, sys, torch, transformer
corpus, name, n = transformer.number_corpus, sys.argv[1], int(sys.argv[2])
transformer.number_corpus = lambda seed: corpus(seed, 300, 20, 10)
owner = os if name == "replace" else torch.nn.utils
original, calls = getattr(owner, name), iter(range(1, n))

def killed(*args, **kwargs):  # by kill -9, at the n-th call
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, killed)
transformer.main(transformer.parse(sys.argv[3:]))
"""


def transformer_run(out, corpus=None, **changes):
    """The script's work in this process. Returns the report and the weights that it left."""
    corpus = corpus or transformer.number_corpus(0, 300, 20, 10)
    s = transformer.Settings(**(TRANSFORMER_SMALL | {"out": str(out)} | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "number_corpus", lambda seed: corpus)
        transformer.main(s)
    return json_of(out / "report.json"), transformer.load(out / "model.pt")["model"]


def transformer_stop(out, **changes):
    """A stopped run's exit status. (An exception that is kept would keep the lock.)"""
    try:
        transformer_run(out, **changes)
    except SystemExit as stop:
        return stop.code
    raise AssertionError("it ran to its end")


def transformer_equal(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


def transformer_saved(out):
    """The model and the tokenizer that a run left."""
    saved = transformer.load(out / "model.pt")
    model = transformer.Transformer(transformer.TransformerConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model, transformer.Tokenizer(saved["vocabulary"])


def transformer_pairs():
    """40 pairs of ids, below 400."""
    pairs = transformer.number_corpus(1, 40, 2, 2).train
    tokenizer = transformer.Tokenizer.train([text for pair in pairs for text in pair], 400)
    return [[tokenizer.encode(text, 32) for text in pair] for pair in pairs]


def transformer_multi30k(folder, **changes):
    """Files in Multi30k's layout, 12 lines each; changes: other texts."""
    folder.mkdir()
    lines = {"de": "ein mann mit 7 $$ am\x0btag {}\r\n", "en": "a man with 7 $$ a day {}\r\n"}
    for part, (language, line) in itertools.product(transformer.MULTI30K, lines.items()):
        text = "\ufeff" + "".join(line.format(i % 4) for i in range(12))
        text = changes.get(f"{part}_{language}", text)
        if text is not None:
            (folder / f"{part}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return str(folder)


@pytest.fixture(scope="module")
def transformer_half_trained(tmp_path_factory):
    """A model after two short epochs: unsure, so that greedy, beam and penalties differ."""
    torch.set_num_threads(1)  # the test's fixtures come later
    out, corpus = tmp_path_factory.mktemp("half"), transformer.number_corpus(3, 2500, 20, 40)
    changes = {"d_model": 32, "d_ff": 64, "dropout": 0.0, "epochs": 2, "average": 1, "seed": 1}
    changes |= {"vocab_size": 450, "batch_tokens": 512, "warmup": 60, "lr_scale": 1.0}
    report, _ = transformer_run(out, corpus, **changes)
    assert report["history"][1]["dev_loss"] < report["history"][0]["dev_loss"]
    model, tokenizer = transformer_saved(out)
    return model.double(), tokenizer, corpus


@pytest.fixture(scope="module")
def transformer_undisturbed(tmp_path_factory):
    """A small run without interruption: its folder, report and weights."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed")
    return out, *transformer_run(out)


@pytest.fixture(scope="module")
def transformer_demo(tmp_path_factory):
    """The default run, alone in a folder, on a terminal that knows ASCII alone."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copy(ROOT / "transformer.py", folder)
    return folder, run_script("transformer.py", cwd=folder, folder=folder, PYTHONIOENCODING="ascii")


class TestTransformer:
    # ---- the model

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("d_model, n_heads", [(12, 3), (15, 5), (16, 1)])
    def test_transformer_equals_torch(self, norm_first, d_model, n_heads):
        """Values, and the gradient of every parameter."""
        model = transformer_tiny(norm_first, d_model=d_model, n_heads=n_heads)
        src = transformer_sentences()
        tgt = F.pad(transformer_sentences(longest=7), (1, 0), value=1)
        real = (tgt != 0)[..., None]
        logits, expected = model(src, tgt) * real, transformer_by_torch(model, src, tgt) * real
        check_close(logits, expected, 1e-10)
        names, parameters = zip(*model.named_parameters(), strict=True)
        upstream = torch.randn_like(logits)
        ours, theirs = (torch.autograd.grad(x, parameters, upstream) for x in (logits, expected))
        for name, actual, other in zip(names, ours, theirs, strict=True):
            check_close(actual, other, 1e-9, name)

    def test_transformer_parameter_counts(self):
        for changes, expected in (
            ({}, 63_082_496),
            ({"d_model": 1024, "n_heads": 16, "d_ff": 4096}, 214_245_376),
            ({"tied": False}, 63_082_496 + 2 * 37_000 * 512),
            ({"norm_first": True}, 63_082_496 + 2 * 2 * 512),  # the two final norms
        ):
            with torch.device("meta"):
                model = transformer.Transformer(transformer.TransformerConfig(**changes))
            assert sum(p.numel() for p in model.parameters()) == expected

    def test_transformer_tying_and_initial_scale(self):
        for tied in (True, False):
            config = transformer.TransformerConfig(300, 9, 64, 4, 1, 64, tied=tied)
            model = transformer.Transformer(config)
            matrices = [model.src_embedding.weight, model.tgt_embedding.weight, model.output.weight]
            assert len({id(m) for m in matrices}) == (1 if tied else 3)
            for matrix in matrices:
                assert matrix.std().item() == pytest.approx(1 / 8, rel=0.05)  # 1 / sqrt(d_model)
            for layer in (model.encoder[0], model.decoder[0]):
                linear = layer.self_attention.q_proj
                assert linear.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01)
                assert linear.bias.abs().max() == 0

    def test_sinusoidal_positional_encoding_is_the_formula(self):
        table = transformer.sinusoidal_positional_encoding(50, 7)
        for position, i in itertools.product((0, 1, 49), range(7)):
            angle = position / 10_000 ** (2 * (i // 2) / 7)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[position, i].item() == pytest.approx(expected, abs=1e-6)
        assert table.dtype == torch.float32 and table.shape == (50, 7)

    def test_transformer_made_on_meta_is_right_once_it_is_loaded(self):
        model, src = transformer_tiny().float(), transformer_sentences()
        with torch.device("meta"):
            other = transformer.Transformer(model.config)
        other.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert torch.equal(other(src, src), model(src, src))

    def test_attention_equals_torch_and_is_0_where_nothing_is_seen(self):
        q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64).requires_grad_().unbind()
        mask = torch.rand(2, 5, 5) < 0.5
        mask[0, 2] = False
        output, weights = transformer.attention(q, k, v, mask)
        assert (output[0, 2] == 0).all() and (weights[~mask] == 0).all()
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        check_close(output, expected, 1e-12)
        low = (60 * q, -60 * q, v)  # what is seen scores below any fill
        expected = F.scaled_dot_product_attention(*low, attn_mask=mask)
        check_close(transformer.attention(*low, mask)[0], expected, 1e-12)
        big = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
        assert transformer.attention(big, big, big, mask.new_ones(4, 4))[0].isfinite().all()
        model = transformer_tiny()
        loss = model(torch.zeros(2, 4).long(), torch.ones(2, 3).long()).sum()  # only padding
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)

    def test_transformer_no_look_ahead(self):
        model, src = transformer_tiny(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 8))
        changed = tgt.clone()
        changed[:, 4] = 3 + (tgt[:, 4] - 2) % 8
        before, after = model(src, tgt), model(src, changed)
        assert torch.equal(before[:, :4], after[:, :4])
        assert (before[:, 4:] != after[:, 4:]).any(-1).all()  # and every later one does see it

    def test_transformer_padding_changes_nothing(self):
        """Nor do the other sentences of the batch."""
        model, src = transformer_tiny(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 5))
        together = model(F.pad(src, (0, 5)), F.pad(tgt, (0, 3)))[:, :5]
        for i in range(6):
            alone = model(src[i : i + 1, src[i] != 0], tgt[i : i + 1])
            check_close(alone[0], together[i], 1e-12)

    def test_decode_cache_gives_the_same_logits(self):
        """It projects the memory only once: NaN there in later calls changes nothing."""
        model, src = transformer_tiny(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 10))
        memory, mask = model.encode(src)
        expected, cache, pieces = model.decode(tgt, memory, mask), {}, []
        for piece in tgt.split((1, 3, 1, 4, 1), dim=1):
            pieces.append(model.decode(piece, memory, mask, cache))
            memory = memory * math.nan
            with pytest.raises(ValueError, match="max_len=24"):  # what is refused leaves it as it was
                model.decode(torch.ones(6, 24).long(), memory, mask, cache)
        check_close(torch.cat(pieces, dim=1), expected, 1e-12)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_decoder_layer_under_activation_checkpointing(self, reentrant):
        """Every gradient as without, the encoder's too."""
        model, src = transformer_tiny(), transformer_sentences()
        parameters = dict(model.named_parameters())
        expected = torch.autograd.grad(model(src, src).sin().sum(), [*parameters.values()])
        for layer in (*model.encoder, *model.decoder):
            checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward)
            layer.forward = functools.partial(checkpoint, use_reentrant=reentrant)
        model(src, src).sin().sum().backward()
        for (name, p), grad in zip(parameters.items(), expected, strict=True):
            check_close(p.grad, grad, 1e-12, name)

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_drops_at_every_sublayer(self, norm_first):
        """At 1, pre-norm layers return their input, post-norm ones its norms."""
        model = transformer_tiny(norm_first, dropout=1.0)
        x, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 1, 1, 5).bool()
        for layer in (*model.encoder, *model.decoder):
            decodes = hasattr(layer, "cross_attention")
            y = layer(x, mask, x, mask)[0] if decodes else layer(x, mask)
            norms = [module for module in layer.children() if isinstance(module, nn.LayerNorm)]
            assert len(norms) == 2 + decodes
            expected = x if norm_first else functools.reduce(lambda y, norm: norm(y), norms, x)
            check_close(y, expected, 1e-12)
        assert (model.encode(transformer_sentences())[0].std(0) < 1e-9).all()

    def test_label_smoothed_loss_is_the_formula(self):
        logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(1, 11, (3, 5))
        targets[0, 3:] = targets[1, 1:] = 0
        real = targets != 0
        log_p = logits.log_softmax(-1)
        rows = -0.8 * log_p.gather(-1, targets[..., None])[..., 0] - 0.2 * log_p.mean(-1)
        expected = rows[real].mean()
        poisoned = logits.detach().masked_fill(~real[..., None], math.nan).requires_grad_()
        loss = transformer.label_smoothed_loss(poisoned, targets, pad_id=0, smoothing=0.2)
        check_close(loss, expected, 1e-12)
        expected_grad = torch.autograd.grad(expected, logits)[0]
        check_close(torch.autograd.grad(loss, poisoned)[0], expected_grad, 1e-12)
        half = logits.bfloat16()
        low = transformer.label_smoothed_loss(half, targets, 0)
        check_close(low, transformer.label_smoothed_loss(half.float(), targets, 0, 0.1), 1e-6)

    def test_noam_lr_rises_in_a_line_and_falls_with_the_root(self):
        peak = (512 * 4000) ** -0.5
        for step, expected in ((1, peak / 4000), (3000, peak * 3 / 4), (4000, peak), (16_000, peak / 2)):
            assert transformer.noam_lr(step, 512, 4000) == pytest.approx(expected)

    # ---- search

    @pytest.mark.parametrize("beam_size, penalty", [(1, 0.0), (2, 0.0), (4, 0.6), (5, 1.5)])
    def test_greedy_decode_and_beam_search_equal_lists(self, transformer_half_trained, beam_size, penalty):
        """In batches, with a model that trains, whose modes stay as they are."""
        model, tokenizer, corpus = transformer_half_trained
        src = transformer.pad([tokenizer.encode(source, 32) for source, _ in corpus.test[:12]], model)
        cases, lengths, cut_off = [(model, src)], set(), 0
        for norm_first in (False, True):
            cases.append((transformer_tiny(norm_first, dropout=0.5), transformer_sentences(n=12)))
        for model, src in cases:
            model.encoder.eval()
            modes = [module.training for module in model.modules()]
            tokens, scores = transformer.beam_search(model, src, 7, beam_size, penalty)
            greedy = transformer.greedy_decode(model, src, 7)
            assert modes == [module.training for module in model.modules()]
            expected = transformer_by_lists(model.eval(), src, 7, beam_size, penalty)
            assert torch.equal(tokens, expected[0]) and tokens.dtype == torch.int64
            check_close(scores, expected[1], 1e-10)
            assert beam_size > 1 or torch.equal(greedy, tokens)
            lengths |= set((tokens != 0).sum(1).tolist())
            cut_off += (tokens[:, -1] > 2).sum()
        assert len(lengths) > 4 and cut_off > 0  # both kinds were there

    @pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
    def test_beam_search_of_full_width_equals_brute_force(self, penalty):
        """4^4 lists leave nothing out."""
        for _ in range(2):
            model = transformer_tiny(vocab_size=4, n_layers=1)
            src = torch.tensor([[3, 3, 2], [3, 2, 0]])
            tokens, scores = transformer.beam_search(model, src, 4, 4**4, penalty)
            expected = transformer_by_lists(model, src, 4, 4**4, penalty)
            assert torch.equal(tokens, expected[0])
            check_close(scores, expected[1], 1e-10)

    def test_beam_search_of_no_sentence_and_of_a_bf16_model(self):
        model, none = transformer_tiny().bfloat16().eval(), torch.zeros(0, 4).long()
        tokens, scores = transformer.beam_search(model, none, 5)
        assert transformer.greedy_decode(model, none, 5).shape == tokens.shape == (0, 0)
        assert scores.shape == (0,)
        src = transformer_sentences()
        scores = transformer.beam_search(model, src, 1, 2, 0.0)[1]  # in float32
        logits = model(src, torch.ones(6, 1).long())[:, 0].detach()
        check_close(scores, logits.float().log_softmax(-1).amax(-1), 1e-6)

    def test_translate_loses_no_text_and_sees_no_reference(self, transformer_half_trained, capsys):
        model, tokenizer, corpus = transformer_half_trained
        sources = [source for source, _ in corpus.test]
        texts = ["", *map(transformer.english_number, range(70)), *sources, "  "]
        first, *rows, last = transformer.translate(model, tokenizer, texts, 4, 1.0)
        assert first == last == {"text": "", "log_prob": 0.0, "n_tokens": 0, "finished": True}
        for text, row in zip(texts[1:-1], rows, strict=True):
            src = transformer.pad([tokenizer.encode(text, 32)], model)
            found, score = transformer.beam_search(model, src, 32, 4, 1.0)
            n, log_prob = found.shape[1], row.pop("log_prob")  # undivided
            assert log_prob / ((5 + n) / 6) == pytest.approx(score.item())
            assert row["finished"] == (found[0, -1] == 2) and row["n_tokens"] == n
            assert row["text"] == tokenizer.decode(found[0].tolist())
        tables = []
        for target in ("eins", "tausend und"):
            poisoned = corpus._replace(test=[(source, target) for source in sources[:9]])
            report = transformer.evaluate(model, tokenizer, poisoned, transformer.Settings())
            tables.append([row | {"exact_match": 0} for row in report["searches"].values()])
        assert tables[0] == tables[1] and "9 of 9 aren't" in capsys.readouterr().out
        greedy, beam = (transformer.translate(model, tokenizer, sources[:9], k, 0.0) for k in (1, 4))
        for key in ("log_prob", "n_tokens", "finished"):
            mean = statistics.fmean(row[key] for row in greedy)
            assert report["searches"]["greedy"][key] == pytest.approx(mean)
        gains = [b["log_prob"] - g["log_prob"] for b, g in zip(beam, greedy, strict=True)]
        assert report["search_gains"] == sum(gain > 1e-3 for gain in gains)
        assert report["search_errors"] == sum(gain < -1e-3 for gain in gains)

    # ---- bad input

    def test_transformer_refuses(self):
        bad = (("n_heads", 5), ("vocab_size", 2), ("eos_id", 1), ("pad_id", -1), ("bos_id", 37_000))
        for name, value in bad:
            with pytest.raises(ValueError, match=name):
                transformer.TransformerConfig(**{name: value})
        model, src, tgt = transformer_tiny(), torch.ones(2, 4).long(), torch.ones(2, 3).long()
        assert model(src.repeat(1, 6).int(), tgt.int()).shape == (2, 3, 11)  # exactly max_len
        for inputs, words in (
            ((src[0], tgt), "tokens"),
            ((src.float(), tgt), "tokens"),
            ((src, tgt[0]), "tokens|batch"),
            ((src, tgt[:1]), "batch"),
            ((src.repeat(1, 7), tgt), "max_len"),
        ):
            with pytest.raises(ValueError, match=words):
                model(*inputs)
        memory, mask = model.encode(src)
        for wrong in (mask[:, 0, 0], mask[:, :, :, :-1], mask.long(), mask[:1]):
            with pytest.raises(ValueError, match="memory_mask"):
                model.decode(src, memory, wrong)
        for smoothing in (1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match="smoothing"):
                transformer.label_smoothed_loss(torch.randn(2, 3, 11), tgt, 0, smoothing)

    # ---- data

    def test_numbers_in_words(self):
        for n, english, german in (
            (30, "thirty", "dreißig"),
            (101, "one hundred and one", "einhundert eins"),
            (742, "seven hundred and forty-two", "siebenhundert zwei und vierzig"),
            (1_001, "one thousand and one", "ein tausend eins"),
            (1_100, "one thousand one hundred", "ein tausend einhundert"),
            (41_000, "forty-one thousand", "ein und vierzig tausend"),
        ):
            assert transformer.english_number(n) == english
            assert transformer.german_number(n) == german

    def test_number_corpus_parts_share_nothing(self):
        corpus = transformer.number_corpus(0)
        parts = corpus[1:]
        assert [len(part) for part in parts] == [8_000, 500, 1_000]
        for side in (0, 1):
            assert len({pair[side] for part in parts for pair in part}) == 9_500
        short = [statistics.fmean(len(pair[0].split()) < 5 for pair in part) for part in parts]
        assert min(short) > 0.05 and max(short) - min(short) < 0.05  # each part has short ones

    def test_tokenizer_keeps_every_text(self):
        tokenizer = transformer.Tokenizer.train(["ONE", "two one"] * 9, 262)
        assert tokenizer.encode("ONE one", 9) == [261, 261, 2] and tokenizer.vocab_size == 262
        assert transformer.Tokenizer.train(["one"], 259).vocab_size == 259
        for text in ("forty-two thousand", "Größe, 東京 🦊!", "  a  b ", "", "\x00\x7f"):
            ids = tokenizer.encode(text, 99)
            assert ids[-1] == 2 and all(3 <= i < 262 for i in ids[:-1])
            assert tokenizer.decode([1, *ids, 0, 0]) == text.strip().lower()
        assert len(tokenizer.encode("abc", 5)) == 5
        with pytest.raises(ValueError, match="max_len=4: 'abc'"):
            tokenizer.encode("abc", 4)

    def test_token_batches_are_full_and_hold_each_sentence_once(self):
        rng = random.Random(0)
        lengths = [rng.randint(1, 30) for _ in range(500)] + [1000]
        batches, other = (transformer.token_batches(lengths, 120, seed) for seed in ("0 0", "0 1"))
        assert sorted(i for batch in batches for i in batch) == list(range(501))
        sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        assert [size for size in sizes if size > 120] == [1000]
        assert sum(sizes) < 1.06 * sum(lengths) and len(batches) < sum(lengths) / 120 * 1.3
        first = [lengths[batch[0]] for batch in batches]
        assert first != sorted(first)  # in no order
        assert {frozenset(batch) for batch in other} != {frozenset(batch) for batch in batches}
        assert len(other) == len(batches)  # train counts on it
        assert [len(batch) for batch in transformer.token_batches([10] * 24, 120, "")] == [12, 12]

    def test_lines_of_ends_lines_as_people_do(self):
        text = "one\u2028two\r\nthree\x0b\x85four \rfive\n\nsix"
        for encoding in ("utf-8", "utf-8-sig"):
            lines = transformer.lines_of(text.encode(encoding))
            assert lines == ["one\u2028two", "three\x0b\x85four", "five", "", "six"]
        assert transformer.lines_of(b"") == [] and transformer.lines_of(b"a\n") == ["a"]

    def test_multi30k_corpus_refuses_damaged_files(self, tmp_path, monkeypatch):
        folder = transformer_multi30k(tmp_path / "good")  # with byte-order marks and CR LF
        corpus = transformer.multi30k_corpus(folder)
        assert corpus.name == "own" and [len(part) for part in corpus[1:]] == [12] * 3
        assert corpus.train[7] == ("ein mann mit 7 $$ am\x0btag 3", "a man with 7 $$ a day 3")
        german, english = zip(*corpus.train, strict=True)
        sha256 = hashlib.sha256("\n".join(german + english).encode()).hexdigest()
        known = dict.fromkeys(transformer.MULTI30K, (12, sha256))
        monkeypatch.setattr(transformer, "MULTI30K", known)
        assert transformer.multi30k_corpus(folder) == corpus._replace(name="multi30k")
        for i, (changes, words) in enumerate((
            ({"val_en": None}, "val.en"),
            ({"train_en": "a dog\n" * 11}, "train: 12 German lines, 11 English"),
            ({"train_de": "", "train_en": ""}, "train: 0 German"),
            ({"test_2016_flickr_de": "ein hund\n" * 12}, "flickr.* altered"),
        )):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                transformer.multi30k_corpus(transformer_multi30k(tmp_path / str(i), **changes))
        for part in known:
            monkeypatch.setattr(transformer, "MULTI30K", known | {part: (13, sha256)})
            assert transformer.multi30k_corpus(folder).name == "own"
        path = Path(folder, "train.de.gz")
        whole = path.read_bytes()
        latin1 = gzip.compress("ein mann auf der straße\n".encode("latin1") * 12)
        for damaged in (whole[:-20], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], b"junk", latin1):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="train.de.gz"):
                transformer.multi30k_corpus(folder)

    @pytest.mark.skipif("MULTI30K_DATA" not in os.environ, reason="MULTI30K_DATA is not set")
    def test_multi30k_corpus_of_the_official_files(self):
        corpus = transformer.multi30k_corpus(os.environ["MULTI30K_DATA"])
        assert corpus.name == "multi30k" and len(corpus.test) == 1_000

    def test_read_lines_downloads_once(self, tmp_path, monkeypatch):
        there, cache = tmp_path / "train.de.gz", tmp_path / "new/cache"
        monkeypatch.setattr(transformer, "MULTI30K_URL", f"{tmp_path.as_uri()}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        good = gzip.compress(b"ein mann auf der wiese\n" * 3)
        for wrong in (None, b"<html>", good[:-10], b"", gzip.compress(b"")):
            if wrong is not None:
                there.write_bytes(wrong)
            with pytest.raises(ValueError, match="train.de.gz.*--data"):
                transformer.read_lines("train.de", "")
        there.write_bytes(good)
        for _ in range(2):  # the second time, from the cache
            assert transformer.read_lines("train.de", "") == ["ein mann auf der wiese"] * 3
            there.unlink(missing_ok=True)
        monkeypatch.setattr(transformer, "MULTI30K", {"train": (4, "0")})  # of the cache, all is known
        (cache / "multi30k/train.en.gz").write_bytes(good)
        with pytest.raises(ValueError, match="train.* altered"):
            transformer.multi30k_corpus("")

    # ---- files

    def test_save_and_load_refuse(self, tmp_path, monkeypatch):
        path, weight = tmp_path / "x.pt", torch.arange(1000.0)
        content = {"model": {"weight": weight}, "vocabulary": [b"a", b"\xff"]}
        transformer.save(path, content)
        loaded = transformer.load(path)
        assert torch.equal(loaded["model"]["weight"], weight)
        assert loaded["vocabulary"] == content["vocabulary"]
        whole = path.read_bytes()
        place = whole.index(weight[500:510].numpy().tobytes())
        for damaged in (whole[:-100], whole[:place] + b"\x01" + whole[place + 1 :], b"", b"junk" * 50):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="x.pt"):
                transformer.load(path)

        class Code:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "was run"),))

        transformer.save(path, {"model": {}, "code": Code()})
        with pytest.raises(pickle.UnpicklingError):
            transformer.load(path)
        path.write_bytes(whole)
        with pytest.raises(FloatingPointError):
            transformer.save(path, {"model": {"weight": weight / 0, "fine": weight}})
        monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)  # a full disk
        with pytest.raises(ZeroDivisionError):
            transformer.save(path, content)
        assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

    # ---- training

    def test_batch_loss_is_the_mean_over_all_target_tokens(self):
        model, pairs = transformer_tiny(vocab_size=400, max_len=32), transformer_pairs()
        rows, options = [], {"label_smoothing": 0.1, "reduction": "none"}
        for source, target in pairs:
            logits = model(torch.tensor([source]), torch.tensor([[1, *target[:-1]]]))[0]
            rows.append(F.cross_entropy(logits, torch.tensor(target), **options))
        together = transformer.batch_loss(model, pairs, 0.1, bf16=False)
        check_close(together, torch.cat(rows).mean(), 1e-10)
        low = transformer.batch_loss(model.float(), pairs, 0.1, bf16=True)
        assert low.dtype == torch.float32 and 1e-6 < abs(low - together) < 0.1

    def test_use_bf16_where_it_is_native(self):
        chosen = [transformer.use_bf16(amp, torch.device("cpu")) for amp in ("auto", "bf16", "off")]
        assert chosen == [torch.cpu.get_capabilities().get("avx512_bf16", False), True, False]

    def test_train_steps_written_out(self, tmp_path):
        """AdamW at Noam's rate on clipped gradients, decay of matrices alone, every pair once an epoch;
        the final weights are the mean over the last epochs' ends."""
        pairs = transformer_pairs()
        s = transformer.Settings(amp="off", epochs=4, average=2, batch_tokens=100, clip=0.1, seed=5)
        s.d_model, s.warmup, s.lr_scale, s.weight_decay, s.out = 12, 7, 3.0, 0.2, str(tmp_path)
        # float64: in float32 Adam makes steps of rounding errors
        model = transformer_tiny(vocab_size=400, max_len=32, dropout=0.2)
        expected = copy.deepcopy(model)
        state = {"step": 0, "seconds": 0.0, "history": [], "average": {}}
        transformer.train(s, model, pairs, pairs[:9], state)

        names = dict(expected.named_parameters())
        vectors = [p for name, p in names.items() if "norm" in name or name.endswith("bias")]
        optimizer = torch.optim.AdamW(vectors, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
        matrices = [p for name, p in names.items() if "norm" not in name and name.endswith("weight")]
        optimizer.add_param_group({"params": matrices, "weight_decay": 0.2})
        lengths = [max(map(len, pair)) for pair in pairs]
        step, ends, dev_losses = 0, [], []
        for epoch in range(4):
            for batch in transformer.token_batches(lengths, 100, f"5 {epoch}"):
                torch.manual_seed(5 * 1_000_003 + step)  # dropout
                step += 1
                optimizer.zero_grad()
                transformer.batch_loss(expected, [pairs[i] for i in batch], 0.1, False).backward()
                assert nn.utils.clip_grad_norm_(expected.parameters(), 0.1) > 0.1
                for group in optimizer.param_groups:
                    group["lr"] = 3.0 * transformer.noam_lr(step, 12, 7)
                optimizer.step()
            ends.append({name: p.detach().clone() for name, p in names.items()})
            with transformer.evaluating(expected):
                dev_losses.append(transformer.batch_loss(expected, pairs[:9], 0.0, False).item())
        assert state["step"] == step > 12
        assert [row["epoch"] for row in state["history"]] == [1, 2, 3, 4]
        assert [row["dev_loss"] for row in state["history"]] == pytest.approx(dev_losses, abs=1e-6)
        for name, p in model.named_parameters():
            check_close(p, (ends[2][name] + ends[3][name]) / 2, 1e-6, name)

    def test_main_goes_on_bit_for_bit_after_kill_9(self, transformer_undisturbed, tmp_path):
        """And after a gradient that isn't finite. In the 5th step, 2 after a checkpoint; there again;
        while another checkpoint is saved."""
        batch_loss, factors = transformer.batch_loss, iter([1.0] * 4 + [math.inf])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "batch_loss", lambda *given: batch_loss(*given) * next(factors))
            stop = transformer_stop(tmp_path)
        assert "step 5" in stop and "--lr-scale" in stop
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in TRANSFORMER_SMALL.items()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for place, reached in ((["clip_grad_norm_", "2"], 3), (["replace", "2"], 6)):
            command = [sys.executable, "-c", TRANSFORMER_KILLED, *place, "--out", str(tmp_path), *flags]
            killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
            assert killed.returncode == -signal.SIGKILL, (killed.returncode, killed.stderr)
            assert transformer.load(tmp_path / "checkpoint.pt")["step"] == reached
        assert not (tmp_path / "model.pt").exists()
        report, weights = transformer_run(tmp_path)
        _, expected, expected_weights = transformer_undisturbed
        assert expected["steps"] > 12 and transformer_equal(expected_weights, weights)
        for key in ("steps", "history", "searches"):
            assert report[key] == expected[key]

    @pytest.mark.parametrize("lr_scale, save_every", [(1e38, 1), (math.nan, 3), (1e35, 3)])
    def test_main_saves_nothing_that_is_not_finite(self, tmp_path, lr_scale, save_every):
        """One step, after which a weight or the loss isn't."""
        changes = {"batch_tokens": 10**6, "epochs": 1, "lr_scale": lr_scale, "save_every": save_every}
        assert "--lr-scale" in transformer_stop(tmp_path, **changes)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]

    def test_main_of_a_finished_run_evaluates_again(self, transformer_undisturbed, tmp_path, capsys):
        """Without its lock; not with settings that may not change, nor on other sentences."""
        _, expected, expected_weights = transformer_undisturbed
        out = shutil.copytree(transformer_undisturbed[0], tmp_path / "copy")
        lock = transformer.lock_out(out)
        report, weights = transformer_run(out, save_every=50, beam_size=2)
        assert list(report["searches"])[1] == "beam 2, penalty 0"
        assert report["history"] == expected["history"] and transformer_equal(expected_weights, weights)
        corpus = transformer.number_corpus(0, 300, 20, 10)
        for changes, words in (
            ({"lr_scale": 0.7}, "lr_scale=0.4, not 0.7"),
            ({"corpus": corpus._replace(train=corpus.train[1:])}, "sentences"),
        ):
            assert transformer_stop(out, **changes) == 2
            assert words in capsys.readouterr().err
        lock.close()

    def test_main_ends_in_a_sentence_where_there_is_advice(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        lock = transformer.lock_out(tmp_path)
        monkeypatch.setattr(transformer.lock_out, "__defaults__", (0.2,))
        for changes, words in (
            ({"out": tmp_path}, "in use"),
            ({"out": tmp_path / "file/below"}, "file"),
            ({"seed": 2**43}, "--seed"),
            ({"seed": -1}, "--seed"),
            ({"translate": "one", "out": tmp_path / "none"}, "model.pt"),
            ({"max_len": 3}, "max_len=3"),
            ({"d_model": 18}, "n_heads"),
        ):
            code = transformer_stop(**({"out": tmp_path / "new"} | changes))
            lines = capsys.readouterr().err.splitlines()
            assert code == 2 and len(lines) == 1 and words in lines[0], lines
        lock.close()

        errors = [KeyboardInterrupt(), OSError("full")]

        def fail(*_):
            raise errors.pop(0)

        monkeypatch.setattr(transformer, "train", fail)
        for words in ("130", "full"):
            assert words in str(transformer_stop(tmp_path / words))
        monkeypatch.setattr(transformer, "train", lambda *_: 1 / 0)  # of the code: a traceback
        with pytest.raises(ZeroDivisionError):
            transformer_run(tmp_path)

    def test_prepare_trains_on_no_test_sentence(self, tmp_path, monkeypatch):
        corpus = transformer.Corpus("numbers", [("one", "eins")] * 4, [("two", "zwei")], [("six", "sechs")])
        monkeypatch.setattr(transformer, "number_corpus", lambda seed: corpus)
        _, tokenizer, train, dev, _, lock = transformer.prepare(transformer.Settings(out=str(tmp_path)))
        assert [tokenizer.decode(side) for side in (*train[3], *dev[0])] == ["one", "eins", "two", "zwei"]
        lock.close()

    # ---- the command line and the demo

    def test_parse_lets_a_flag_override_its_preset(self):
        assert transformer.parse([]) == transformer.Settings()
        for preset in (["--preset", "multi30k"], ["--preset=multi30k"]):
            s = transformer.parse([*preset, "--epochs", "3", "--no-tied", "--length-penalty", "-1"])
            assert (s.epochs, s.dropout, s.tied, s.length_penalty, s.translate) == (3, 0.3, False, -1.0, None)
            assert s.out != transformer.Settings().out
        assert transformer.parse(["--translate", ""]).translate == ""

    def test_main_of_a_corpus_of_ones_own(self, tmp_path, capsys, monkeypatch):
        """From files to BLEU and --translate, on sentences that can be learned by heart. Their
        $ signs are no formulas in the picture, their vertical tab ends no line."""
        monkeypatch.setenv("MULTI30K_DATA", transformer_multi30k(tmp_path / "data"))
        s = transformer.parse(["--preset", "multi30k", "--out", str(tmp_path / "out")])
        changes = {"epochs": 30, "d_model": 32, "d_ff": 32, "n_layers": 1, "dropout": 0.0, "vocab_size": 400}
        s = dataclasses.replace(s, **changes, warmup=40, amp="off", device="cpu")
        transformer.main(s)
        report = json_of(tmp_path / "out/report.json")
        assert report["dataset"] == "own" and report["measure"] == "bleu"
        assert "case:lc" in report["signature"] and report["beam"] > 50
        stdin = io.BytesIO("\ufeffEIN MANN mit\u2028dem\r\n\nein mann".encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        capsys.readouterr()
        transformer.main(dataclasses.replace(s, translate="-"))
        rows = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
        assert [row["source"] for row in rows] == ["EIN MANN mit\u2028dem", "", "ein mann"]
        assert rows[0]["text"].startswith("a man") and rows[1]["text"] == ""

    def test_demo_gets_every_number_right(self, transformer_demo):
        folder, result = transformer_demo
        summary, out = last_json(result), folder / "out" / "transformer"
        report = json_of(folder / summary["report"])
        assert len(result.stdout.strip().splitlines()[-1]) < 300
        assert report["dataset"] == "numbers" and min(summary["beam"], summary["greedy"]) >= 0.99
        assert (out / "alignment.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob("*.part"))
        greedy, beam, _ = report["searches"].values()
        assert beam["log_prob"] >= greedy["log_prob"] - 1e-4 and greedy["finished"] > 0.99

    def test_demo_swaps_tens_and_units(self, transformer_demo):
        """In its cross-attention, "zwei und vierzig" looks at "two" before it looks at "forty"."""
        model, tokenizer = transformer_saved(transformer_demo[0] / "out/transformer")
        right = []
        for n in range(517_022, 517_100):
            source = tokenizer.encode(transformer.english_number(n), 32)
            target = tokenizer.encode(transformer.german_number(n), 32)
            src, tgt = torch.tensor([source]), torch.tensor([[1, *target[:-1]]])
            weights = transformer.cross_attention_weights(model, src, tgt)
            assert weights.shape == (1, 4, len(target), len(source))
            check_close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-5)
            looked_at = weights[0].mean(0).argmax(-1)  # (Tt,)
            if n % 10 > 1:
                right.append(looked_at[-4] > looked_at[-2])  # ... units und tens EOS
        assert sum(right) / len(right) > 0.9

    def test_demo_translates(self, transformer_demo):
        text = "Three hundred and forty-two thousand"
        row = last_json(run_script("transformer.py", "--translate", text, cwd=transformer_demo[0]))
        assert row["text"] == "dreihundert zwei und vierzig tausend" and row["finished"] is True
        assert row["source"] == text and row["n_tokens"] == 6 and -3 < row["log_prob"] < 0


# -----------------------------------------------------------------------------
# losses.py: a table of losses, oracles and kinds of inputs drives most of the class


def losses_smoothed(z, y, smoothing=0.1, **options):
    return F.cross_entropy(z, y, label_smoothing=smoothing, **options)


def losses_focal(z, y, gamma=2.0, alpha=None, reduction="mean"):
    kept = y != -100
    y = y.clamp(min=0)
    p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
    rows = -((1 - p) ** gamma) * p.log() * kept
    rows = rows if alpha is None else rows * alpha[y]
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]


def losses_binary_focal(z, y, gamma=2.0, alpha=0.25, reduction="mean"):
    """A sigmoid of z is a softmax over 0 and z."""
    weights = None if alpha is None else torch.tensor([1 - alpha, alpha], dtype=z.dtype)
    return losses_focal(torch.stack((0 * z, z), 1), y.long(), gamma, weights, reduction)


def losses_ordinal(z, y):
    rows = []
    for p, target in zip(z.softmax(1), y.tolist(), strict=True):
        sides = [p[: k + 1] if target <= k else p[k + 1 :] for k in range(len(p) - 1)]
        if target >= 0:
            rows.append(-torch.stack([side.sum().log() for side in sides]).mean())
    return torch.stack(rows).mean()


def losses_contrastive(a, b, same, margin=1.0):
    d = (a - b).square().sum(1).sqrt()
    return torch.where(same == 1, d**2, (margin - d).clamp(min=0) ** 2).mean() / 2


def losses_info_nce(query, keys, temperature=0.07):
    scores = F.cosine_similarity(query[:, None], keys, dim=-1) / temperature
    return (scores.exp().sum(1).log() - scores.diag()).mean()


def losses_supcon(z, y, temperature=0.1):
    """Khosla et al., eq. 2, as loops over anchors and positives."""
    scores, rows = (F.cosine_similarity(z[:, None], z, dim=-1) / temperature).exp(), []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        shares = [scores[i, j] / scores[i, others].sum() for j in others if y[j] == y[i]]
        if shares:
            rows.append(-torch.stack(shares).log().mean())
    return torch.stack(rows).mean()


def losses_nt_xent(z1, z2, temperature=0.5):
    return losses_supcon(torch.cat((z1, z2)), torch.arange(len(z1)).repeat(2), temperature)


def losses_hinge(near, far, margin):
    gaps = near - far
    return (F.softplus(gaps) if margin == "soft" else F.relu(gaps + margin)).mean()


def losses_triplet(anchor, positive, negative, margin=1.0):
    return losses_hinge((anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1), margin)


def losses_mined(z, y, margin=0.2, mining="hard"):
    """Loops: what the docstring says of each mining."""
    d, pairs = (z[:, None] - z).norm(dim=-1), []
    for a in range(len(z)):
        near = [d[a, p] for p in range(len(z)) if p != a and y[p] == y[a]]
        far = [d[a, n] for n in range(len(z)) if y[n] != y[a]]
        if mining == "hard" and near and far:
            pairs.append((max(near), min(far)))
        for x in near if mining == "semihard" else []:
            pairs += [(x, min(n for n in far if n > x))] if max(far) > x else []
        if mining == "all":
            pairs += itertools.product(near, far)
    return losses_hinge(*(torch.stack(side) for side in zip(*pairs, strict=True)), margin)


def losses_sample(kind: str, n: int) -> tuple[list, list]:
    """Inputs, and targets."""
    y = torch.randint(5 if kind == "logits" else 3, (n,))
    if kind == "logits":
        y[::4] = -100
        return [3 * torch.randn(n, 5).double()], [y]
    if kind == "labels":
        y[:4] = torch.tensor([0, 0, 1, 99])  # a triplet, and a class of one sample
        return [torch.randn(n, 3).double()], [y]
    inputs, bits = list(torch.randn(3, n, 4).double()), [torch.arange(n) % 2]
    kinds = {"bits": ([inputs[0][:, 0]], bits), "same": (inputs[:2], bits)}
    return (kinds | {"two": (inputs[:2], []), "three": (inputs, [])})[kind]


LOSSES_WEIGHT = torch.tensor([0.2, 1.0, 0.5, 2.0, 0.7], dtype=torch.float64)


def losses_table():
    """name: (loss, its oracle, kind of inputs)"""
    supcon, triplet = losses.supervised_contrastive_loss, losses.triplet_loss
    table = {}
    for name, kind, loss, oracle, options in (
        ("smoothing", "logits", losses.label_smoothing_cross_entropy, losses_smoothed, {}),
        ("focal", "logits", losses.focal_loss, losses_focal, {}),
        ("alpha", "logits", losses.focal_loss, losses_focal, {"alpha": LOSSES_WEIGHT}),
        ("ordinal", "logits", losses.ordinal_loss, losses_ordinal, {}),
        ("binary_focal", "bits", losses.binary_focal_loss, losses_binary_focal, {}),
        ("contrastive", "same", losses.contrastive_loss, losses_contrastive, {}),
        ("far", "same", losses.contrastive_loss, losses_contrastive, {"margin": 3.0}),
        ("info_nce", "two", losses.info_nce_loss, losses_info_nce, {}),
        ("nt_xent", "two", losses.nt_xent_loss, losses_nt_xent, {}),
        ("supcon", "labels", supcon, losses_supcon, {}),
        ("supcon_warm", "labels", supcon, losses_supcon, {"temperature": 0.2}),
        ("triplet", "three", triplet, losses_triplet, {}),
        ("soft", "three", triplet, losses_triplet, {"margin": "soft"}),
    ):
        pair = (functools.partial(f, **options) for f in (loss, oracle))
        table[name] = (*pair, kind)
    for mining in ("hard", "semihard", "all"):
        for options in ({}, {"margin": 0.0}, {"margin": 1.5}, {"margin": "soft"}):
            pair = (losses.batch_hard_triplet_loss, losses_mined)
            pair = (functools.partial(f, mining=mining, **options) for f in pair)
            table[f"{mining}_{options.get('margin')}"] = (*pair, "labels")
    return table


LOSSES = losses_table()
LOSSES_ON_LOGITS = [name for name, row in LOSSES.items() if row[2] == "logits"]
LOSSES_ON_LABELS = [name for name, row in LOSSES.items() if row[2] == "labels"]


def losses_results(loss, inputs: list, targets: list) -> list[Tensor]:
    """Value, and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, *targets)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def losses_check(loss, oracle, inputs: list, targets: list) -> None:
    results = (losses_results(f, inputs, targets) for f in (loss, oracle))
    for actual, expected in zip(*results, strict=True):
        check_close(actual, expected, 1e-10)


def losses_refuse(name: str, given, loss, *arguments, **options) -> None:
    """With a ValueError that tells both."""
    with pytest.raises(ValueError) as error:
        loss(*arguments, **options)
    assert name in str(error.value) and str(given) in str(error.value), error.value


def losses_gather_inputs():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    return model, torch.randn(2, 8, 5, dtype=torch.float64)


def losses_gather_worker(rank: int, folder: str) -> None:
    """One of two processes with half of the batch: writes what it found."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    model, batch = losses_gather_inputs()
    z1, z2 = (losses.gather_batch(model(x[4 * rank :][:4])) for x in batch)
    loss = losses.nt_xent_loss(z1, z2)
    loss.backward()
    a, weight = torch.ones(2, 3, requires_grad=True), torch.arange(12.0).view(4, 3)
    (losses.gather_batch(a) * weight * (rank + 1)).sum().backward()  # each has its own loss
    labels = losses.gather_batch(torch.tensor([rank, 7, -rank]))
    losses_refuse("x", "2 to 3", losses.gather_batch, torch.ones(2 + rank, 3))
    gradients = [p.grad for p in model.parameters()]
    torch.save([loss.detach(), labels, a.grad, gradients], f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends the long way (TORCH: T1)


class TestLosses:
    # Oracles

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_equals_its_oracle(self, name):
        """Values, gradients, gradcheck, and new tensors on its inputs' device."""
        loss, oracle, kind = LOSSES[name]
        for n in (6, 9, 12):
            inputs, targets = losses_sample(kind, n)
            losses_check(loss, oracle, inputs, targets)
        leaves = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: loss(*x, *targets), leaves, atol=1e-7)
        with torch.device("meta"):
            assert loss(*inputs, *targets).device.type == "cpu"

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
    def test_label_smoothing_cross_entropy_equals_torch(self, smoothing, weighted, reduction):
        for shape, k in (((17,), 5), ((3, 4), 2), ((2, 3, 2), 7), ((4,), 1)):
            for ignore_index in (-1, 0) if k > 1 else (-1,):  # a class, too: a pad id
                logits = 3 * torch.randn(shape[0], k, *shape[1:]).double()
                y = torch.randint(k, shape)
                y.view(-1)[0] = k - 1
                y.view(-1)[1::4] = ignore_index
                weight = torch.rand(k).double() if weighted else None
                options = {"smoothing": smoothing, "ignore_index": ignore_index, "weight": weight}
                pair = (losses.label_smoothing_cross_entropy, losses_smoothed)
                pair = (functools.partial(f, **options, reduction=reduction) for f in pair)
                losses_check(*pair, [logits], [y])

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_focal_losses_equal_their_formulas(self, reduction):
        def check(loss, oracle, inputs, y, gamma, alpha):
            options = {"gamma": gamma, "alpha": alpha, "reduction": reduction}
            pair = (functools.partial(f, **options) for f in (loss, oracle))
            losses_check(*pair, inputs, [y])

        inputs, (y,) = losses_sample("logits", 17)
        for gamma, alpha in itertools.product((0.0, 0.5, 1.0, 3.5), (None, LOSSES_WEIGHT)):
            check(losses.focal_loss, losses_focal, inputs, y, gamma, alpha)
        z, bits = torch.randn(6, 4).double(), torch.randint(2, (6, 4))
        for gamma, alpha in ((2.0, 0.25), (0.5, 0.9), (1.0, None), (0.0, 0.0), (2.0, 1.0)):
            for dtype in (torch.int64, torch.bool, torch.float64, torch.uint16):
                y = bits.to(dtype)
                check(losses.binary_focal_loss, losses_binary_focal, [z], y, gamma, alpha)

    # Properties

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_permutation_of_rows(self, name):
        """Duplicates tie for the hardest: their gradients are shared."""
        loss, _, kind = LOSSES[name]
        inputs, targets = losses_sample(kind, 12)
        for x in inputs:
            x[8] = x[1]
        if kind == "labels":
            targets[0][8:10] = torch.tensor([0, 1])
            inputs[0][9] = inputs[0][0]
        order = torch.randperm(12)
        value, *gradients = losses_results(loss, inputs, targets)
        permuted = losses_results(loss, [x[order] for x in inputs], [y[order] for y in targets])
        expected = [value, *(gradient[order] for gradient in gradients)]
        for actual, other in zip(permuted, expected, strict=True):
            check_close(actual, other, 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_in_half_precision(self, name, dtype):
        """Computed, and returned, in float32, under autocast too."""
        loss, _, kind = LOSSES[name]
        inputs, targets = losses_sample(kind, 8)
        inputs = [(100 * x).to(dtype) for x in inputs]
        value, *gradients = losses_results(loss, inputs, targets)
        expected = loss(*(x.float() for x in inputs), *targets)
        check_close(value, expected, 1e-6)
        for gradient in gradients:
            assert gradient.dtype == dtype and gradient.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_close(loss(*(x.float() for x in inputs), *targets), expected, 1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_at_extremes(self, name):
        """Rows of 1e4, 1e-20 and 0, and equal rows, in float32 as in float64."""
        loss, _, kind = LOSSES[name]
        inputs, targets = losses_sample(kind, 12)
        for x in inputs:
            x[:3] = 1e4 * x[:3].sign()
            x[3:6] *= 1e-20
            x[6:10] = 0.0
        for dtype in (torch.float64, torch.float32):
            results = losses_results(loss, [x.to(dtype) for x in inputs], targets)
            assert all(result.isfinite().all() and result.dtype == dtype for result in results)
            if "semihard" not in name:  # there rounding decides which triplets exist
                check_close(results[0].double(), loss(*inputs, *targets), 1e-6)

    @pytest.mark.parametrize("name", LOSSES_ON_LOGITS)
    def test_loss_ignored_rows_change_nothing(self, name):
        loss = LOSSES[name][0]
        logits, y = 3 * torch.randn(17, 5).double(), torch.arange(17) % 5
        value, gradient = losses_results(loss, [logits], [y])
        ignored = F.pad(y, (0, 2), value=-100)
        for junk in (0.0, 1e4, math.inf, math.nan):
            more = F.pad(logits, (0, 0, 0, 2), value=junk)
            value_more, gradient_more = losses_results(loss, [more], [ignored])
            assert torch.equal(value_more, value)
            assert torch.equal(gradient_more, F.pad(gradient, (0, 0, 0, 2)))
        rows = loss(more, ignored, reduction="none")
        assert rows.shape == (19,) and (rows[-2:] == 0).all()
        check_close(loss(more, ignored, reduction="sum"), rows.sum(), 1e-12)
        for other in (-1, 3, 99):  # the caller's choice, a class's id too
            marked = y.masked_fill(y == 3, other)
            expected = loss(logits[y != 3], y[y != 3])
            check_close(loss(logits, marked, ignore_index=other), expected, 1e-12)
        volume = loss(logits[:16].view(2, 8, 5).mT, y[:16].view(2, 8), reduction="none")
        check_close(volume, rows[:16].view(2, 8), 1e-12)
        for dtype in (torch.uint8, torch.uint16, torch.int32):
            assert torch.equal(loss(logits, y.to(dtype)), value)

    @pytest.mark.parametrize("name", LOSSES_ON_LOGITS)
    def test_loss_over_no_rows_and_of_certainty_is_0(self, name):
        """And of rows of weight 0. Certain: all logits but the target's are -inf."""
        loss = LOSSES[name][0]
        certain = torch.where(torch.eye(2, 5).bool(), 1.0, -math.inf)
        cases = [(certain, torch.arange(2))]
        for n in (0, 4):
            cases.append((torch.full((n, 5), math.nan), torch.full((n,), -100)))
        if name == "smoothing":
            weight = torch.tensor([0.0, 1, 1, 1, 1])
            loss = functools.partial(loss, smoothing=0.0, weight=weight)
            cases.append((torch.randn(4, 5), torch.zeros(4).long()))
        for (logits, y), reduction in itertools.product(cases, ("mean", "sum")):
            reduced = functools.partial(loss, reduction=reduction)
            value, gradient = losses_results(reduced, [logits], [y])
            assert value == 0 and (gradient == 0).all()

    @pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    def test_focal_losses_at_p_1_have_finite_gradients(self, gamma):
        """p rounds to 1 from a logit gap of 37 (float64), 17 (float32)."""
        softmax = functools.partial(losses.focal_loss, gamma=gamma)
        sigmoid = functools.partial(losses.binary_focal_loss, gamma=gamma)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            z, y = torch.zeros(12, 2, dtype=dtype), torch.arange(12) % 2
            z[:, 0] = torch.tensor([0, 5, 17, 40, 1e3, 1e4]).repeat_interleave(2)
            for loss, x in ((softmax, z), (sigmoid, z[:, 0])):
                assert all(result.isfinite().all() for result in losses_results(loss, [x], [y]))
        z, y = torch.tensor([[30.0, 0.0]]).double(), torch.tensor([0])
        expected = math.exp(-30 * gamma) * F.cross_entropy(z, y)
        assert softmax(z, y) / expected == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("name", LOSSES_ON_LABELS)
    def test_batch_without_pairs_or_triplets_is_0(self, name):
        loss, z, zeros = LOSSES[name][0], torch.randn(4, 3), torch.zeros(4).long()
        cases = [(z, torch.arange(4))]
        if "supcon" not in name:  # where every anchor has positives
            cases.append((z, zeros))
        if "semihard" in name:  # among ties no negative is farther
            cases.append((0 * z, torch.arange(4) % 2))
        for inputs, y in cases:
            value, gradient = losses_results(loss, [inputs], [y])
            assert value == 0 and (gradient == 0).all()
        assert loss(z, torch.tensor([0, 0, 1, 1]).to(torch.uint16)).isfinite()

    def test_batch_hard_triplet_loss_of_near_duplicates(self):
        """Beyond 25 rows cdist goes by matrix products, which lose such distances."""
        z, y = 100 + 1e-4 * torch.randn(60, 8), torch.arange(60) % 3
        for mining in ("hard", "semihard", "all"):
            loss = functools.partial(losses.batch_hard_triplet_loss, margin=0.0, mining=mining)
            assert loss(z, y).item() == pytest.approx(loss(z.double(), y).item(), rel=1e-3, abs=1e-9)

    def test_has_collapsed_where_the_loss_is_the_margin(self):
        point, y = torch.randn(1, 5).expand(8, 5), torch.arange(8) % 2
        assert losses.has_collapsed(point) and losses.has_collapsed(torch.zeros(2, 2).bfloat16())
        for mining, margin in itertools.product(("hard", "all"), (0.2, "soft")):
            loss = losses.batch_hard_triplet_loss(point, y, margin, mining).item()
            assert loss == pytest.approx(0.6931472 if margin == "soft" else 0.2, abs=1e-6)
        spread = torch.randn(8, 5)
        spread = spread / torch.pdist(spread).mean()
        for threshold, given in ((0.01, ()), (0.5, (0.5,))):
            assert losses.has_collapsed(0.9 * threshold * spread, *given)
            assert not losses.has_collapsed(1.1 * threshold * spread, *given)

    def test_ordinal_loss_far_mistakes_cost_more(self):
        wrong, zeros = 5.0 * torch.eye(5).double(), torch.zeros(5).long()
        costs = losses.ordinal_loss(wrong, zeros, reduction="none")
        _, gradient = losses_results(losses.ordinal_loss, [wrong], [zeros])
        assert (costs.diff() > 0.5).all() and (gradient[:, 0].diff() < 0).all()
        for k in (2, 5, 50):  # at the start it costs about the same whatever K
            assert 0.5 < losses.ordinal_loss(torch.zeros(k, k), torch.arange(k)) < 0.7
        # a proper score: under a truth q the least expected cost is at q
        q = torch.tensor([0.1, 0.5, 0.15, 0.25]).double()
        z = q.log().requires_grad_()
        expected = q @ losses.ordinal_loss(z.expand(4, 4), torch.arange(4), reduction="none")
        assert torch.autograd.grad(expected, z)[0].abs().max() < 1e-12

    def test_check_loss_refutes(self):
        """Each planted bug fails its claims, and no other; the loss itself passes all."""
        y = torch.arange(5).repeat(4)
        best = 50.0 * F.one_hot(y, 5)
        loss = functools.partial(losses.ordinal_loss, targets=y)
        start = loss(0 * best)
        for bug, expected in (
            (loss, []),
            (lambda z: loss(z) - 5, ["negative", "0 at best", "scale"]),
            (lambda z: 8 * loss(z) + 0.007, ["0 at best"]),
            (lambda z: 8 * loss(z) + 0.002, []),
            (lambda z: losses.ordinal_loss(z, 4 - y), ["0 at best", "downhill"]),
            (lambda z: loss(z) * loss(z).detach(), ["gradcheck"]),
            (lambda z: 2 * loss(z).detach() - loss(z), ["small step", "downhill", "gradcheck"]),
            (lambda z: 1e4 * loss(z), ["scale"]),
            (lambda z: 10.5 / start * loss(z), ["scale"]),
            (lambda z: 0.15 / start * loss(z), []),
            (lambda z: 0.08 / start * loss(z), ["scale"]),
            (lambda z: losses_ordinal(z, y), ["float64", "float32", "float16", "bfloat16"]),
        ):
            holds = losses.check_loss(bug, 0 * best, best)
            failed = [claim for claim, held in holds.items() if not held]
            words = zip(failed, expected, strict=True)
            assert all(word in claim for claim, word in words), failed
        cross_entropy = functools.partial(F.cross_entropy, target=y)
        limits = {"same": (loss, loss, best / 30), "other": (loss, cross_entropy, best / 30)}
        holds = losses.check_loss(loss, 0 * best, best, limits)
        assert [claim for claim in holds if not holds[claim]] == ["limit: other"]
        assert "limit: same" in holds and all(type(held) is bool for held in holds.values())

    def test_check_loss_takes_embedding_losses(self):
        y = torch.arange(12) % 3
        best = F.one_hot(y, 3).double()
        loss = functools.partial(losses.batch_hard_triplet_loss, labels=y, margin=0.2)
        assert all(losses.check_loss(loss, torch.randn(12, 3), best).values())
        collapsed = losses.check_loss(loss, torch.randn(12, 3), 0 * best)
        assert not collapsed["lower bound: about 0 at best"]

    # Refusals

    def test_losses_refuse_what_would_be_silently_wrong(self):
        z, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
        bits, one, nan, inf = y.clamp(max=1), z[:1], math.nan, math.inf
        smoothing, mined = losses.label_smoothing_cross_entropy, losses.batch_hard_triplet_loss
        focal, binary = losses.focal_loss, losses.binary_focal_loss
        contrastive, triplet = losses.contrastive_loss, losses.triplet_loss
        supcon, refuse = losses.supervised_contrastive_loss, losses_refuse
        for loss in (smoothing, focal, losses.ordinal_loss):
            for bad in (3, -1):
                refuse("targets", bad, loss, z, torch.tensor([0, 1, 2, 0, 1, bad]))
            refuse("targets", (5,), loss, z, y[:5])
            for dtype in (torch.float32, torch.bool, torch.complex64):
                refuse("targets", dtype, loss, z, y.to(dtype))
            refuse("reduction", "avg", loss, z, y, reduction="avg")
        for bad in (-0.1, 1.0, nan):
            refuse("smoothing", bad, smoothing, z, y, bad)
        for bad in ([1, 1], [[1], [1], [1]], 0.5, [1, -1, 1], [1, inf, 1]):
            refuse("weight", 3, smoothing, z, y, weight=bad)
            refuse("alpha", 3, focal, z, y, alpha=bad)
        refuse("logits", 1, losses.ordinal_loss, z[:, :1], y * 0)
        for bad in (-1.0, nan, inf, "hard"):
            refuse("gamma", bad, focal, z, y, bad)
            refuse("gamma", bad, binary, z[:, 0], bits, bad)
            refuse("margin", bad, contrastive, z, z, bits, bad)
            refuse("margin", bad, triplet, z, z, z, bad)
            refuse("margin", bad, mined, z, y, bad)
            refuse("alpha", bad, losses.GradNorm, 2, bad)
        for bad in (-0.1, 1.1, nan):
            refuse("alpha", bad, binary, z[:, 0], bits, 2.0, bad)
            refuse("beta", bad, losses.class_balanced_weights, [1, 1], bad)
        refuse("targets", 2, binary, z[:, 0], y)
        refuse("targets", 0.5, binary, z[:, 0], bits * 0.5)
        refuse("targets", (6,), binary, z[:, :1], bits)
        for bad in (0.0, -1.0, nan, inf):
            refuse("temperature", bad, losses.info_nce_loss, z, z, bad)
        for pair in ((one, one), (z, z[:5]), (z[0], z[0])):
            refuse("z1, z2", tuple(pair[1].shape), losses.nt_xent_loss, *pair)
            refuse("query, keys", tuple(pair[1].shape), losses.info_nce_loss, *pair)
        for loss in (supcon, mined):
            refuse("labels", (1,), loss, z, y[:1])
            refuse("labels", torch.float32, loss, z, y.float())
            refuse("z", (1, 6, 3), loss, z[None], y)
            refuse("z", (1, 3), loss, one, y[:1])
        assert contrastive(one, one, bits[:1]) == 0.5 and triplet(one, one, one) == 1
        refuse("negative", (1, 3), triplet, z, z, one)
        refuse("anchor", (0, 3), triplet, z[:0], z[:0], z[:0])
        refuse("x1", (0, 3), contrastive, z[:0], z[:0], bits[:0])
        refuse("same", 2, contrastive, z, z, y)
        refuse("same", (6, 1), contrastive, z, z, bits[:, None])
        refuse("mining", "easy", mined, z, y, mining="easy")
        refuse("z", (1, 3), losses.has_collapsed, one)
        w = torch.ones(3, requires_grad=True)
        for bad in ([3, 0], [], [[2, 2]], 3):
            refuse("counts", bad, losses.class_balanced_weights, torch.tensor(bad))
        for n in (3, 1):
            refuse("losses", (n,), losses.UncertaintyWeighting(2), w[:n])
            refuse("losses", (n,), losses.GradNorm(2), w[:n], w)
        refuse("losses", 0, losses.GradNorm(3), w * 0, w)
        refuse("name", "lion", losses.make_optimizers, "lion", [w], [], 0.1, 0.1)
        refuse("n_seeds", 1, losses.main, losses.Settings(n_seeds=1))

    # Weighting

    def test_class_balanced_weights_by_hand(self):
        counts = torch.tensor([1000, 50, 1]).double()
        for beta in (0.0, 0.9, 0.999, 1 - 1e-9, 1.0):
            effective = [sum(beta**j for j in range(int(n))) for n in counts]
            shares = 1 / torch.tensor(effective, dtype=torch.float64)
            expected = 3 * shares / shares.sum()
            check_close(losses.class_balanced_weights(counts, beta), expected, 1e-10)
        for given in ([1000, 50, 1], counts.to(torch.uint16)):
            check_close(losses.class_balanced_weights(given, 1.0), expected.float(), 1e-6)
        assert losses.class_balanced_weights(torch.tensor([7, 7]), 0.5).tolist() == [1, 1]

    def test_uncertainty_weighting_reaches_the_analytic_optimum(self):
        """At s_i = log L_i the gradient is 0, and every task pulls with weight 1 / (2 L_i)."""
        weighting = losses.UncertaintyWeighting(2).double()
        tasks = torch.tensor([1.25, 125.0], dtype=torch.float64, requires_grad=True)
        assert weighting(tasks) == 126.25 / 2  # s = 0: half the sum
        weighting.log_variances.data = tasks.detach().log()
        total = weighting(tasks)
        of_s, of_tasks = torch.autograd.grad(total, (weighting.log_variances, tasks))
        assert total.item() == pytest.approx((1 + math.log(1.25) + 1 + math.log(125)) / 2)
        check_close(of_s, torch.zeros(2).double(), 1e-12)
        check_close(of_tasks, 0.5 / tasks.detach(), 1e-12)

    def test_gradnorm_by_hand(self):
        """Linear tasks with gradient norms 3 and 4: d w_i / d s_j = w_i (delta_ij - w_j / 2)."""
        gradnorm = losses.GradNorm(2).double()
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        tasks = torch.stack((3 * w[0], 4 * w[1]))
        half_way = torch.stack((3 * w[0] - 1.5, 4 * w[1]))

        def check(tasks, of_weights, total, alpha=1.5):
            gradnorm.alpha = alpha
            value = gradnorm(tasks, w)
            of_w, of_s = torch.autograd.grad(value, (w, gradnorm.log_weights), retain_graph=True)
            assert value.item() == pytest.approx(total)
            expected = gradnorm.weights() * torch.tensor([3, 4])
            assert of_w.tolist() == pytest.approx(expected.tolist())
            assert of_s.tolist() == pytest.approx([of_weights, -of_weights])

        assert gradnorm.alpha == 1.5
        check(tasks, -3.5, 7.0)  # G = 3, 4, targets 3.5: signs -, +: -1.5 - 2
        check(half_way, 3.5, 5.5)  # r = 2/3, 4/3: targets 1.9, 5.4: signs +, -
        check(half_way, -3.5, 5.5, alpha=0.0)  # progress plays no part
        gradnorm.log_weights.data = torch.tensor([3.0, 1.0]).double().log()  # weights 1.5, 0.5
        check(half_way, 2.625, 4.25, alpha=1.0)  # G = 4.5, 2, targets 2.2, 4.3: 1.125 + 1.5
        with torch.no_grad():  # a validation's losses: the weighted sum alone
            assert gradnorm(torch.tensor([2.0, 3.0]).double(), w).item() == pytest.approx(4.5)

    def test_gradnorm_of_losses_that_reached_0_and_of_several_weights(self):
        for n in (1, 2):
            gradnorm, w = losses.GradNorm(n), torch.ones(n, requires_grad=True)
            gradnorm(2 * w, w)
            for later in (torch.zeros(n), -torch.ones(n), torch.tensor([0.0, 1.0][:n])):
                total = gradnorm(later * w, w)
                gradient = torch.autograd.grad(total, gradnorm.log_weights)[0]
                assert total == later.sum() and gradient.isfinite().all(), later
            copied = losses.GradNorm(n)
            copied.load_state_dict(gradnorm.state_dict())
            copied(3 * w, w)
            assert torch.equal(copied.first_losses, torch.full((n,), 2.0))
        a, b = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        tasks = torch.cat((3 * a + 4 * b, 10 * a))  # norms 5 and 10, of a alone 3 and 10
        for shared in ([a, b], iter([b, a])):
            gradnorm = losses.GradNorm(2).double()
            total = gradnorm(tasks, shared)
            gradient = torch.autograd.grad(total, gradnorm.log_weights, retain_graph=True)[0]
            assert gradient.tolist() == pytest.approx([-7.5, 7.5])  # -5 / 2 - 10 / 2

    def test_gather_batch_nt_xent_on_two_processes_is_one(self, tmp_path):
        torch.multiprocessing.spawn(losses_gather_worker, args=(str(tmp_path),), nprocs=2)
        model, batch = losses_gather_inputs()
        expected = losses.nt_xent_loss(*(losses.gather_batch(model(x)) for x in batch))
        expected.backward()
        ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
        for rank, (loss, labels, summed, _) in enumerate(ranks):
            check_close(loss, expected.detach(), 1e-12)
            assert labels.tolist() == [0, 7, 0, 1, 7, -1]
            assert torch.equal(summed, 3 * torch.arange(12.0).view(2, 2, 3)[rank])  # 1 + 2
        for p, *gradients in zip(model.parameters(), ranks[0][3], ranks[1][3], strict=True):
            check_close(sum(gradients) / 2, p.grad, 1e-12)

    # Optimization strategies

    def test_parameter_groups_decay_matrices_alone(self):
        layers = (nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(2, 3, 2))
        model = nn.Sequential(*layers)
        model[1].weight.requires_grad_(False)
        decayed, free = losses.parameter_groups(model.parameters(), 0.1)
        assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
        assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (3, 2, 2)]
        assert [len(p) for p in free["params"]] == [4, 4, 4, 3]

    @pytest.mark.parametrize("name", ["adamw", "muon", "adam", "sgd"])
    def test_make_optimizers_decay(self, name):
        """Gradient 0: AdamW, Muon shrink by lr * decay; Adam, SGD step along decay * w."""
        shapes = ((3, 3), (2, 3), (3,))
        hidden, head, bias = (nn.Parameter(torch.full(shape, 2.0)) for shape in shapes)
        optimizers = losses.make_optimizers(name, iter([hidden]), iter([head, bias]), 0.1, 0.1)
        for p in (hidden, head, bias):
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
        expected = 1.9 if name == "adam" else 1.98
        for p, left in ((hidden, expected), (head, expected), (bias, 2.0)):
            check_close(p.detach(), torch.full_like(p, left), 1e-4)
        kinds = [type(optimizer).__name__ for optimizer in optimizers]
        first = optimizers[0].param_groups[0]
        if name == "muon":
            assert kinds == ["Muon", "AdamW"] and len(first["params"]) == 1
            assert first["adjust_lr_fn"] == "match_rms_adamw"
        else:
            assert [kind.lower() for kind in kinds] == [name]
            assert first.get("momentum", 0.9) == 0.9

    def test_warmup_cosine_by_hand(self):
        factors = [losses.warmup_cosine(step, 2, 5) for step in range(7)]
        assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.25, 0, 0])
        assert [losses.warmup_cosine(step, 9, 2) for step in range(3)] == [0.5, 1.0, 0.0]

    # The demo

    def test_calibration_error_and_best_temperature_by_hand(self):
        p = torch.tensor([[0.95, 0.05], [0.91, 0.09], [0.4, 0.6], [0.62, 0.38], [1.0, 0.0]])
        y = torch.tensor([0, 1, 1, 1, 0])
        # of 15 bins: 0.95 and 1.0 share the last, 0.6 and 0.62 another
        expected = 0.4 * 0.11 + 0.4 * (1 - 0.975) + 0.2 * 0.91
        assert losses.calibration_error(p, y) == pytest.approx(expected, abs=1e-6)
        truth = torch.randn(20_000, 4)
        drawn = truth.softmax(1).multinomial(1)[:, 0]
        assert losses.best_temperature(3 * truth, drawn) == pytest.approx(3, rel=0.1)

    def test_digits_parts_share_no_image(self):
        sets = losses.digits(losses.Settings(n_seeds=3), 957, 240)
        for data in sets:
            assert [len(data[part][1]) for part in ("train", "dev", "test")] == [957, 240, 600]
            assert len(torch.cat([x for x, _ in data.values()]).unique(dim=0)) == 1797
            assert torch.equal(data["test"][0], sets[0]["test"][0])  # one for all seeds
        assert not torch.equal(sets[0]["train"][1], sets[1]["train"][1])

    def test_judge_by_hand(self):
        """A constant difference of noisy rows is found, noise is not."""
        values = {"base": [0.5, 0.9, 0.1, 0.7, 0.3], "up": [0.61, 1.0, 0.2, 0.79, 0.4]}
        values["noise"] = [0.6, 0.8, 0.2, 0.6, 0.4]
        rows = {name: {"values": {"accuracy": row, "NLL": row}} for name, row in values.items()}
        sentence = losses.judge(rows)
        assert "up" in sentence and "noise" not in sentence and "difference" not in rows["base"]
        mean, error, verdict = rows["up"]["difference"]["accuracy"]
        assert mean == pytest.approx(0.1) and verdict == "better"
        assert error == pytest.approx(statistics.stdev([0.11, 0.1, 0.1, 0.09, 0.1]) / 5**0.5)
        assert rows["up"]["difference"]["NLL"][2] == "worse"

    def test_tune_takes_the_rate_that_is_best_on_dev(self):
        """On average, not for seed 1. The test counts for nothing; an edge is told."""
        s = losses.Settings(n_seeds=2)
        dev = {0.1: (0.0, 0.2), 0.2: (1.0, 0.3), 0.3: (0.2, 0.9)}

        def evaluate(lr, k, part):
            score = dev[lr][k] if part == "dev" else 10 * lr
            return {"score": score, "other": -dev[lr][k]}

        for rates in ((0.1, 0.2, 0.3), (0.2, 0.3), (0.1, 0.2)):
            models, row = losses.tune(lambda lr, k: lr, evaluate, "score", s, rates)
            assert models == [0.2, 0.2] and row["rate"] == 0.2
            assert row["at_edge"] == (len(rates) == 2)
            assert row["values"]["score"] == [2.0, 2.0] and row["dev"][0.2]["score"] == 0.65

    @pytest.mark.parametrize("name", ["smoothing", "imbalance", "embeddings", "tasks", "optimizers"])
    def test_demo_learning_rate_comes_from_dev_alone(self, name, monkeypatch):
        """Nonsense as test labels changes the values alone."""
        digits, s = losses.digits, losses.Settings(n_seeds=2, steps=4)
        demo = getattr(losses, f"demo_{name}")
        honest = demo(s)
        found = {str(row["dev"]) for row in honest.values()}
        assert name != "optimizers" or len(found) == 8  # schedules do something

        def with_nonsense(*arguments):
            return [d | {"test": (d["test"][0], (d["test"][1] + 1) % 10)} for d in digits(*arguments)]

        monkeypatch.setattr(losses, "digits", with_nonsense)
        for name, row in demo(s).items():
            assert row["rate"] == honest[name]["rate"] and row["dev"] == honest[name]["dev"]
            assert row["values"] != honest[name]["values"]

    def test_demo_script(self, tmp_path):
        flags = "--steps 2 --n-seeds 2 --out here".split()
        result = run_script("losses.py", *flags, cwd=tmp_path, PYTHONIOENCODING="ascii")
        summary = last_json(result)
        assert len(result.stdout.strip().splitlines()[-1]) < 300
        report = json_of(tmp_path / summary["report"])
        assert list(report["tables"]) == ["smoothing", "imbalance", "embeddings", "tasks", "optimizers"]
        assert all(report["checklist"].values()) and len(report["checklist"]) == 11
        edges = 0
        for title, rows in report["tables"].items():
            assert report["conclusions"][title] in result.stdout
            for name, row in rows.items():
                assert name in result.stdout
                assert all(math.isfinite(sum(values)) for values in row["values"].values())
                edges += row["at_edge"]
        assert summary["rates_on_an_edge"] == edges and report["settings"]["n_seeds"] == 2
        assert (tmp_path / "here" / "losses.png").read_bytes()[:4] == b"\x89PNG"


# -----------------------------------------------------------------------------
# train_ddp.py and train_fsdp.py

# A process that has imported torch once; each rank is a fork of it: a start costs 0.1 s, not 3. Ranks are
# processes of their own, with the variables that torchrun sets, and end as a script does.
LAUNCHER = """
import gc, importlib, json, os, signal, sys, time, traceback
_, root, name, prepare = sys.argv
sys.path.insert(0, root)
import matplotlib.backends.backend_agg, matplotlib.pyplot, safetensors.torch, tqdm, tyro
import torch, torch._dynamo, torch.distributed.checkpoint._fsspec_filesystem, torch.utils.serialization
from pathlib import Path
script = globals()[name] = importlib.import_module(name)
RANK = 0
matplotlib.pyplot.Figure.savefig = lambda *_, **__: None
def run():
    script.exit_now(script.main(tyro.cli(script.Settings)))
exec(prepare)
gc.collect()
gc.freeze()  # a rank's collections don't walk through torch, nor copy its pages
for line in sys.stdin:
    job, pids = json.loads(line), []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in case of nohup
    for RANK in job["ranks"]:
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['log']}.{RANK}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            os.environ.update(job["env"])
            if job["world"] > 1:
                os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(job["world"]))
            sys.argv = [job["module"] + ".py", *job["arguments"][RANK]]
            script = globals()[job["module"]]
            try:
                exec(job["code"])
            except SystemExit as error:
                script.exit_now(error.code)
            except BaseException:
                traceback.print_exc()
                script.exit_now(77)
            script.exit_now(0)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    if sys.stdin.readline():
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until(condition, seconds: float, what) -> None:
    """what: said if the condition isn't met in time; a function is called for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what() if callable(what) else what}"
        time.sleep(0.005)


class Launcher:
    """Runs a script on any number of ranks, one run at a time. prepare: code that runs once."""

    def __init__(self, folder: Path, module: str, prepare: str = ""):
        (folder / "launcher.py").write_text(LAUNCHER)
        self.folder, self.module, self.pids, self.ranks = folder, module, [], []
        self.running = False
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        options = {"env": env | {"OMP_NUM_THREADS": "1"}, "cwd": folder, "text": True}
        options |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, str(folder / "launcher.py"), str(ROOT), module, prepare]
        self.process = subprocess.Popen(command, **options)

    def start(self, world: int, *arguments: str, of_rank=None, code="run()", **environment) -> None:
        """of_rank: more arguments for a rank; None: this rank never starts. code: what each rank runs."""
        of_rank = of_rank or {}
        if self.running:  # a test before failed half-way: its ranks would be waited for
            self.wait(0)
        self.running = True
        self.ranks = [rank for rank in range(world) if of_rank.get(rank, []) is not None]
        for log in self.folder.glob("log.*"):
            log.unlink()
        job = {"module": self.module, "world": world, "ranks": self.ranks, "code": code}
        job["log"] = str(self.folder / "log")
        job["arguments"] = [[*arguments, *(of_rank.get(rank) or [])] for rank in range(world)]
        job["env"] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | environment
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())

    def out(self, rank: int, name: str = "out") -> str:
        log = Path(f"{self.folder}/log.{rank}.{name}")
        return log.read_text(errors="replace") if log.exists() else ""

    def kill(self, ranks, number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 240) -> list[subprocess.CompletedProcess]:
        """What each rank printed; ranks that don't end within seconds are killed."""
        late = threading.Timer(seconds, self.kill, [range(len(self.pids))])
        late.start()
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        late.cancel()
        self.running = False
        outputs = [(self.out(rank), self.out(rank, "err")) for rank in self.ranks]
        return [subprocess.CompletedProcess([], c, *o) for c, o in zip(codes, outputs, strict=True)]

    def attempt(self, world: int, *arguments, **options) -> list[subprocess.CompletedProcess]:
        self.start(world, *arguments, **options)
        return self.wait()

    def run(self, world: int, *arguments, **options) -> list[subprocess.CompletedProcess]:
        results = self.attempt(world, *arguments, **options)
        assert all(r.returncode == 0 for r in results), results
        return results

    def wait_until(self, condition) -> None:
        wait_until(condition, 120, lambda: (self.out(0), self.out(0, "err")))

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


# 150 rows to learn, so that an epoch ends within a run, and 3 to look at: fewer than ranks. code = WHOLE
# takes all, as a user's run does.
PREPARE = """
import functools, train_fsdp
def few_rows(load):
    return functools.cache(lambda n: [(x[-k:], y[-k:]) for k, (x, y) in zip((150, 3), load(n))])
for script in (train_ddp, train_fsdp):
    script.whole_manual = script.load_manual
    script.load_manual = few_rows(script.load_manual)
    script.load_manual(21)
generate = train_ddp.generate
train_ddp.generate = lambda model, prompt, _, device: generate(model, prompt, 30, device)
"""
WHOLE = "script.load_manual = script.whole_manual; run()"
# Rows of the parameters divide neither by 4 nor all by 2, batches neither: every slice and part is uneven.
TINY = "--steps 20 --batch-size 13 --max-len 21 --d-model 18 --n-heads 2 --n-layers 2 --warmup 3".split()
TINY += "--lr 3e-3 --eval-every 10 --save-every 0 --timeout 40".split()
KILLS = int(os.environ.get("KILLS", 3))  # KILLS=20 KILL_SEED=7: a longer search, and which
KILL_SEED = int(os.environ.get("KILL_SEED", time.time()))
CPU = torch.device("cpu")
SCRIPTS = [train_ddp, train_fsdp]


class Trainer(Launcher):
    """Of both scripts; use says which is meant."""

    def use(self, module: str) -> "Trainer":
        self.module, self.script = module, sys.modules[module]
        self.exact = "--exact" * (module == "train_fsdp")
        return self

    def start(self, world: int, out: Path, arguments: str = "", **options) -> None:
        super().start(world, *TINY, *arguments.split(), "--out", str(out), **options)

    def settings(self, arguments: str = ""):
        return tyro.cli(self.script.Settings, args=[*TINY, *arguments.split()])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("train"), "train_ddp", PREPARE)
    yield trainer
    trainer.end()


@pytest.fixture(params=["train_ddp", "train_fsdp"])
def trainer(request, both):
    return both.use(request.param)


@pytest.fixture
def fsdp(both):
    return both.use("train_fsdp")


def saved(out: Path) -> list[Path]:
    """Checkpoints of either script, oldest first."""
    return sorted(p for p in out.glob("step_*") if not p.name.endswith((".part", ".damaged")))


def newest_step(out: Path) -> int:
    return max((int(path.name[5:13]) for path in saved(out)), default=0)


def saved_state(out: Path) -> dict:
    """The numbers of the newest checkpoint, whichever script's."""
    newest = saved(out)[-1]
    return json_of(newest / "manifest.json") if newest.is_dir() else torch.load(newest, weights_only=True)


def final_weights(out: Path) -> Tensor:
    state = torch.load(out / "final.pt", weights_only=True)
    return torch.cat([value.flatten() for value in state.values()])


def distance_of_weights(a: Path, b: Path | Tensor) -> float:
    """Norm of the difference of all weights, relative to the norm."""
    a, b = final_weights(a), b if isinstance(b, Tensor) else final_weights(b)
    assert a.dtype == b.dtype
    return ((a - b).norm() / b.norm()).item()


@functools.cache
def manual(module) -> list[tuple[Tensor, Tensor]]:
    return module.load_manual(21)


def few_rows(module) -> list[tuple[Tensor, Tensor]]:
    return [(x[-k:], y[-k:]) for k, (x, y) in zip((150, 3), manual(module), strict=True)]


def rows_of_steps(last: int, n: int, s) -> Tensor:
    """(last, batch_size): an endless row of shuffles, cut into batches."""
    seeds = [s.seed * 1_000_003 + epoch for epoch in range(last * s.batch_size // n + 1)]
    rows = torch.cat([torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in seeds])
    return rows[: last * s.batch_size].view(-1, s.batch_size)


def loss_of(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())  # of real tokens


def by_hand(module, s, n_steps: int = 0) -> tuple[Tensor, list[float]]:
    """The same training as a plain loop over whole batches: the weights, and the steps' losses with the
    held-out loss at the end. n_steps: only the first ones, of all rows."""
    (inputs, targets), dev = manual(module) if n_steps else few_rows(module)
    torch.manual_seed(s.seed)
    model = module.GPT(s.d_model, s.n_heads, s.n_layers, s.max_len).to(getattr(torch, s.dtype))
    if module is train_fsdp:
        module.initialise(model, s.seed)
    groups = [{"params": [p], "weight_decay": 0.1 * (p.ndim - 1)} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses, warmup = [], min(s.warmup, s.steps)
    for step, rows in enumerate(rows_of_steps(n_steps or s.steps, len(inputs), s)):
        factor = (step + 1) / warmup
        if factor > 1:
            factor = (1 + math.cos(math.pi * (step - warmup) / (s.steps - warmup))) / 2
        loss = loss_of(model, (inputs[rows], targets[rows]))
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * factor
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([value.detach().flatten() for value in model.state_dict().values()])
    return weights, [*losses, loss_of(model, dev).item()]


def torchrun(script, out: Path, arguments: str, node: str, **environment) -> subprocess.Popen:
    """As a user starts it; what it prints goes to agent_....log in out's folder."""
    if sys.platform != "linux":
        pytest.skip("torchrun's workers are found below /proc")
    command = [sys.executable, "-m", "torch.distributed.run", *node.split(), str(script)]
    command += [*TINY, *arguments.split(), "--out", str(out)]
    log = open(out.parent / f"agent_{time.monotonic()}.log", "w")  # closed with the process
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, cwd=out.parent, env=env, stdout=log, stderr=log)


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def kill_with_children(agent: subprocess.Popen) -> None:
    """As if its machine had lost power: torchrun and its workers, which live in a session of their own."""
    for pid in (*children(agent), agent.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


class TestTraining:
    @pytest.mark.parametrize("module", SCRIPTS)
    def test_gpt_equals_torch_layers(self, module):
        """Values and gradients of the whole model against nn.TransformerEncoder, in float64."""
        model = module.GPT(d_model=24, n_heads=3, n_layers=2, max_len=20).double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        oracle = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False).double()
        names = {"qkv_proj.": "self_attn.in_proj_", "out_proj.": "self_attn.out_proj."}
        names |= {"self_attention_norm.": "norm1.", "ffn_norm.": "norm2."}
        names |= {"ffn.0.": "linear1.", "ffn.2.": "linear2.", "blocks.": "layers."}
        own = dict(model.named_parameters())
        table, position = own.pop("embedding.weight"), own.pop("position.weight")
        for ours, theirs in names.items():
            own = {name.replace(ours, theirs): p for name, p in own.items()}
        oracle.load_state_dict(own)
        tokens = torch.randint(256, (4, 17))
        mask = nn.Transformer.generate_square_subsequent_mask(17, dtype=torch.float64)
        x = (table[tokens] + position[:17]).detach()
        expected = oracle(x, mask=mask, is_causal=True) @ table.detach().T
        logits = model(tokens)
        check_close(logits, expected, 1e-10, "logits")
        logits.square().sum().backward()
        expected.square().sum().backward()
        for name, p in oracle.named_parameters():
            check_close(own[name].grad, p.grad, 1e-10, name)

    def test_initialise_depends_on_seed_and_name_alone(self):
        """GPT-2's start weights in both; train_fsdp.py's don't depend on the model around them."""

        def start(n_layers: int, seed: int, dtype=torch.float32) -> dict[str, Tensor]:
            model = train_fsdp.GPT(64, 4, n_layers, 128).to(dtype)
            train_fsdp.initialise(model, seed)
            return dict(model.named_parameters())

        ddp = dict(train_ddp.GPT(64, 4, 8, 128).named_parameters())
        b, deeper, other, double = start(8, 0), start(9, 0), start(8, 1), start(8, 0, torch.float64)
        for name, p in start(8, 0).items():
            assert torch.equal(p, b[name])
            check_close(double[name], p.double(), 1e-9, name)
            deep = name.endswith(("out_proj.weight", "ffn.2.weight"))
            for drawn in (p, ddp[name]):
                if p.ndim == 2:
                    std = 0.005 if deep else 0.02
                    assert abs(drawn.std() / std - 1) < 0.1 and abs(drawn.mean()) < std / 20, name
                else:
                    assert (drawn == (0 if name.endswith("bias") else 1)).all(), name
            if p.ndim == 2:
                assert not torch.equal(p, other[name]), name
                check_close(deeper[name] * (3 / 8**0.5 if deep else 1), p, 1e-6, name)
        assert not torch.equal(b["blocks.0.qkv_proj.weight"], b["blocks.1.qkv_proj.weight"])

    def test_load_manual_has_every_byte_as_a_target_once(self):
        from pydoc_data.topics import topics

        texts = sorted(set(topics.values()))
        train, dev = manual(train_ddp)
        others = itertools.chain(*manual(train_fsdp))
        assert all(torch.equal(*pair) for pair in zip([*train, *dev], others, strict=True))
        learnt = [t for i, t in enumerate(texts) if i % 10 != 9]
        for (inputs, targets), expected in ((dev, texts[9::10]), (train, learnt)):
            real = targets != -100
            assert inputs.shape == targets.shape == (len(inputs), 21) and inputs.min() >= 0
            assert bytes(targets[real].tolist()) == "".join(expected).encode()
            later = real[:, 1:]
            assert torch.equal(inputs[:, 1:][later], targets[:, :-1][later]), "inputs lag by one"
            assert (later <= real[:, :-1]).all() and real[:, 0].all(), "the end alone is filled up"
            starts = torch.tensor([0, *(len(text.encode()) for text in expected[:-1])]).cumsum(0)
            assert (inputs[real][starts] == 10).all(), "a text starts from a line's end"

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_micro_batches_give_each_row_to_one_rank_once(self, module):
        """Cut from an endless row of shuffles, with the number of tokens in the whole batch."""
        for n, batch_size in ((40, 11), (7, 7), (6, 20)):
            targets = torch.arange(n).repeat_interleave(3).view(n, 3)
            targets[::7, 1:] = -100
            text = (torch.arange(n)[:, None].expand(n, 3), targets)
            s = module.Settings(batch_size=batch_size, accumulate=2, seed=5)
            ranks = [module.micro_batches(text, 6, s, module.Processes(r, 3, CPU)) for r in range(3)]
            steps = rows_of_steps(12, n, s)[6:]
            assert n < 40 or len(steps.unique(dim=0)) == 6
            for expected in steps:
                parts = [next(rank) for rank in ranks for _ in range(2)]
                assert all(len(x) for x, _, _ in parts)
                rows = torch.cat([x[:, 0] for x, _, _ in parts])
                assert torch.equal(rows.sort().values, expected.sort().values)
                assert {n for _, _, n in parts} == {(targets[expected] != -100).sum().item()}
                assert all(torch.equal(targets[x[:, 0]], y) for x, y, _ in parts)

    def test_train_same_weights_however_the_batch_is_split(self, trainer, tmp_path):
        """13 sequences of unequal length on 1 to 4 processes, clipped or not, in float64; by hand."""
        runs = {"1": "0.4 --accumulate 4", "1 free": f"0 --warmup 50 {trainer.exact}"}
        runs |= {"2": "0.4 --accumulate 2", "3": f"0.4 {trainer.exact}", "4": "0.4"}
        if trainer.exact:  # train_fsdp.py
            runs["2"] += " --recompute"
            runs["4"] += " --replicate 2 --accumulate 2"
        for name, more in runs.items():
            out, arguments = tmp_path / name, f"--steps 14 --dtype float64 --seed 3 --clip {more}"
            trainer.run(int(name[0]), out, arguments)
            expected, losses = by_hand(trainer.script, trainer.settings(arguments))
            assert distance_of_weights(out, expected) <= 1e-12, name
            report = json_of(out / "report.json")
            assert report["processes"] == int(name[0])
            found = [*report["losses"], report["dev_loss"]]
            assert found == pytest.approx(losses, rel=1e-12), name
            assert len(report["log"]) == 2, "two looks at the held-out text"

    def test_train_two_processes_are_bitwise_one_with_two_micro_batches(self, trainer, tmp_path):
        """With dropout too: its masks belong to a part of the batch; the held-out loss is without."""
        arguments = f"--dropout 0.2 --clip 0.3 {trainer.exact}"
        trainer.run(1, tmp_path / "1x2", f"{arguments} --accumulate 2")
        trainer.run(1, tmp_path / "1", arguments)
        trainer.run(2, tmp_path / "2", arguments + " --recompute" * (trainer.exact != ""))
        assert distance_of_weights(tmp_path / "1x2", tmp_path / "2") == 0
        assert distance_of_weights(tmp_path / "1", tmp_path / "2") > 1e-3, "other parts, other masks"
        model = train_ddp.GPT(18, 2, 2, 21)
        model.load_state_dict(torch.load(tmp_path / "2/final.pt", weights_only=True))
        loss = loss_of(model, few_rows(train_ddp)[1]).item()
        assert json_of(tmp_path / "2/report.json")["dev_loss"] == pytest.approx(loss, rel=1e-5)

    def test_train_float32_and_mixed_precision(self, trainer, tmp_path):
        """bf16 and scaled fp16 stay near float32; a loss that wasn't unscaled before clipping wouldn't."""
        trainer.run(1, tmp_path / "off", "--clip 0.3")
        for amp in ("bf16", "fp16"):
            trainer.run(2, tmp_path / amp, f"--clip 0.3 --amp {amp}")
            assert 5e-5 < distance_of_weights(tmp_path / amp, tmp_path / "off") < 0.02
            assert final_weights(tmp_path / amp).dtype == torch.float32

    def test_train_gradients_travel_with_the_last_micro_batch_alone(self, trainer, tmp_path):
        """Of three a step. Until then DDP's ranks differ, and FSDP's slices have none."""
        code = """
seen, forward, seeds, seed = [], script.GPT.forward, [], torch.manual_seed
def noted(self, tokens):
    gradients = [p.grad for p in self.blocks.parameters() if p.grad is not None]
    seen.append(sum(g.abs().sum().item() for g in gradients))
    return forward(self, tokens)
script.GPT.forward = noted
torch.manual_seed = lambda number: seeds.append(number) or seed(number)
script.main(tyro.cli(script.Settings))
print(json.dumps([seen[:12], [n for n in seeds if n > 2**32]]))  # not generate's seed, nor the model's
"""
        arguments = f"--steps 4 --accumulate 3 --seed {2**32 - 1}"
        results = trainer.run(2, tmp_path, arguments, code=code)
        (first, seeds), (second, more) = (json.loads(r.stdout.splitlines()[-1]) for r in results)
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            assert one == other == 0 if i % 3 == 0 or trainer.exact else one != other
        seeds += more
        assert len(set(seeds)) == 4 * 3 * 2, "dropout of its own in each part of each step"
        assert {n // 4_096 // 1_000_003 for n in seeds} == {2**32 - 1}, "and no other seed's"

    def test_compile_saves_a_plain_state_dict(self, trainer, tmp_path):
        """torch's "eager" backend stands for the compiler; going on without --compile gives the same."""
        code = """
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: print("compiled") or compile(self, backend="eager")
run()
"""
        arguments, out = "--steps 4 --save-every 2 --n-layers 1", tmp_path / "compiled"
        trainer.run(1, tmp_path / "plain", arguments)
        assert "compiled" in trainer.run(2, out, f"{arguments} --compile", code=code)[0].stdout
        assert distance_of_weights(out, tmp_path / "plain") < 1e-5
        state = torch.load(out / "final.pt", weights_only=True)
        assert state.keys() == train_ddp.GPT(18, 2, 1, 21).state_dict().keys()
        (out / "final.pt").unlink()
        saved(out)[-1].rename(tmp_path / "removed")
        assert "from_step=2" in trainer.run(1, out, arguments)[0].stdout
        assert distance_of_weights(out, tmp_path / "plain") < 1e-5

    @pytest.fixture(scope="class")
    @staticmethod
    def sharded(both, tmp_path_factory) -> Path:
        """A run's folder, of two ranks; who changes something copies it."""
        out = tmp_path_factory.mktemp("sharded")
        both.use("train_fsdp").run(2, out, "--save-every 10")
        return out

    def test_shard_each_rank_holds_its_slices_and_no_more(self, sharded, fsdp, tmp_path):
        """1/N of weights, gradients and moments, of a replica with HSDP, as the report counts them."""
        fsdp.run(4, tmp_path, "--steps 2 --replicate 2")
        model = train_ddp.GPT(18, 2, 2, 21)
        n_all = sum(p.numel() for p in model.parameters())
        for out, world in ((sharded, 2), (tmp_path, 4)):
            report = json_of(out / "report.json")
            assert report["n_parameters"] == n_all
            counts = {"all": n_all}
            for rank in range(world):
                chunks = [p.chunk(2) for p in model.parameters()]
                counts[f"rank {rank}"] = sum(c[rank % 2].numel() for c in chunks)
                assert counts[f"rank {rank}"] <= n_all / 2 * 1.05
            names = {"weights": 4, "gradients": 4, "moments": 8}
            held = {who: {name: k * n for name, k in names.items()} for who, n in counts.items()}
            assert report["held"] == held

    def test_shard_gathers_one_block_at_a_time(self, fsdp, tmp_path):
        """While a block computes it is whole, and the others are in slices; the whole model is never made."""
        code = """
from torch.distributed.tensor import DTensor, Shard
largest, randn = [], torch.randn
torch.randn = lambda *a, **k: largest.append(randn(*a, **k)) or largest[-1]
p = script.start_processes("cpu", 30)
s = script.Settings(d_model=16, n_heads=2, n_layers=3, max_len=8, dropout=0.5)
model, reference = script.sharded_model(s, p), script.GPT(16, 2, 3, 8)
assert max(w.numel() for w in largest) == 256 * 16
n = sum(w.numel() for w in model.parameters())
local = sum(w.to_local().untyped_storage().nbytes() for w in model.parameters()) / 4
assert local <= n * 0.52 and not any(w.is_meta for w in model.parameters()), (local, n)
script.initialise(reference, 0)
for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
    assert torch.equal(a.full_tensor(), b) and a.placements == (Shard(0),), name
seen = []
def whole(*_):
    seen.append([not isinstance(b.qkv_proj.weight, DTensor) for b in model.blocks])
for block in model.blocks:
    block.ffn_norm.register_forward_hook(whole)
model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
assert seen == [[True, False, False], [False, True, False], [False, False, True]], seen
assert all(isinstance(w, DTensor) and isinstance(w.grad, DTensor) for w in model.parameters())

s.amp, dtypes = "bf16", set()
model = script.sharded_model(s, p)
model.blocks[1].ffn_norm.register_forward_hook(lambda m, *_: dtypes.add(m.weight.dtype))
tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(p.rank))
model(tokens).sum().backward()
grads = [w.grad.to_local() for w in model.parameters()]
assert dtypes == {torch.bfloat16} and {g.dtype for g in grads} == {torch.float32}
assert any((g != g.bfloat16()).any() for g in grads), "averaged in float32"

for recompute in (False, True):
    s.recompute, calls = recompute, []
    model = script.sharded_model(s, p)
    model.blocks[1].ffn_norm.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
    assert len(calls) == 1 + recompute, "once in forward, once more in backward"
"""
        for result in fsdp.run(2, tmp_path, code=code):
            assert result.stderr == ""

    def test_save_checkpoint_keeps_the_last_and_leaves_no_parts(self, tmp_path):
        for attempt in range(6):  # of one step: the names' order is that of their sha256
            train_ddp.save_checkpoint(tmp_path, 1, {"attempt": attempt})
            assert train_ddp.load_checkpoint(tmp_path) == {"attempt": attempt}
        others = ("step_1.pt", "step_00000009.pt", "step_00000009.ab.pt", "step_best.pt")
        for other in others:
            (tmp_path / other).write_text("not ours")
        for step in (5, 50, 500, 5000):
            weights = torch.arange(1000.0) + step
            path = train_ddp.save_checkpoint(tmp_path, step, {"step": step, "w": weights}, keep=2)
        ours = {p.name for p in tmp_path.iterdir()} - set(others)
        assert {name[:13] for name in ours} == {"step_00000500", "step_00005000"}
        assert len(os.listdir(tmp_path)) == 2 + len(others)
        loaded = train_ddp.load_checkpoint(tmp_path)
        assert path.exists() and loaded["step"] == 5000 and torch.equal(loaded["w"], weights)
        assert train_ddp.load_checkpoint(tmp_path / "nothing") is None

    @pytest.mark.filterwarnings("ignore")
    def test_load_checkpoint_and_tensors_run_no_code(self, tmp_path):
        """Neither of a checkpoint, nor from .metadata, nor from an entry that it calls an object's."""
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (tmp_path / "ran",))})()
        data = pickle.dumps({"step": evil}, protocol=2)
        (tmp_path / f"step_00000001.{hashlib.sha256(data).hexdigest()}.pt").write_bytes(data)
        with contextlib.suppress(Exception):
            train_ddp.load_checkpoint(tmp_path)
        assert not (tmp_path / "ran").exists()
        tensors = {"a": torch.zeros(3)}
        for what in (tensors, {"a": evil}):
            train_fsdp.dcp.save(what, checkpoint_id=tmp_path / "c")
            if what is tensors:
                (tmp_path / "c/.metadata").write_bytes(pickle.dumps(evil))
            (tmp_path / "ran").unlink(missing_ok=True)
            with pytest.raises(OSError):
                train_fsdp.load_tensors(tmp_path / "c", tensors)
            assert not (tmp_path / "ran").exists()
        for name in (b"load", b"os.system"):
            with pytest.raises(pickle.UnpicklingError):
                file = io.BytesIO(b"\x80\x04ctorch\n" + name + b"\n.")
                train_fsdp.MetadataUnpickler(file).load()

    def test_write_atomically_two_writers(self, tmp_path):
        """Readers see one writer's bytes or the other's, and nothing is left behind."""
        path, texts = tmp_path / "file", [letter * 200_000 for letter in (b"a", b"b")]

        def write_and_read(text: bytes) -> bytes:
            train_ddp.write_atomically(path, text)
            return path.read_bytes()

        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(write_and_read, texts * 100)) == set(texts)
        assert list(tmp_path.iterdir()) == [path]

    def test_load_optimizer_after_a_change_of_device(self):
        """An unfused AdamW's state goes into a fused one, and back; at first it may be empty, as in fp16."""
        weights, alone = [], train_ddp.Processes(0, 1, CPU)
        for kinds in itertools.product((False, True), repeat=2):
            torch.manual_seed(0)
            model, state = nn.Linear(3, 2), None
            for fused in kinds:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
                state = state or optimizer.state_dict()
                train_ddp.load_optimizer(optimizer, state, alone)
                assert state["state"] or not any(map(torch.any, optimizer.state[model.bias].values()))
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
                for _ in range(3):
                    optimizer.zero_grad()
                    scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
                    scaler.step(optimizer)
                    scaler.update()
                state = optimizer.state_dict()
            assert state["param_groups"][0]["fused"] is fused and state["state"][0]["step"] == 6
            weights.append(model.weight.detach())
            check_close(weights[-1], weights[0], 1e-6, str(kinds))

    @pytest.mark.filterwarnings("ignore")  # "torch.distributed is disabled": so it is meant
    def test_load_tensors_on_any_number_of_ranks(self, sharded, fsdp, tmp_path):
        """Saved on 2, loaded on 1, 2, 4, 2 x 2 and by one without a group: weights, moments, step counts."""
        path, model = saved(sharded)[-1], train_fsdp.GPT(18, 2, 2, 21)
        tensors = train_fsdp.state_tensors(model, train_fsdp.make_optimizer(model, fsdp.settings()))
        train_fsdp.load_tensors(path, tensors)
        code = f"""
p, s = script.start_processes("cpu", 30), tyro.cli(script.Settings)
model = script.sharded_model(s, p)
tensors = script.state_tensors(model, script.make_optimizer(model, s))
script.load_tensors(Path({str(path)!r}), tensors, p)
whole = {{name: getattr(t, "full_tensor", t.clone)() for name, t in tensors.items()}}
torch.save(whole, s.out + f"/{{p.rank}}.pt")
"""
        for world, more in ((2, ""), (1, ""), (4, ""), (4, "--replicate 2")):
            fsdp.run(world, tmp_path, more, code=code)
            for rank in range(world):
                found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
                assert found.keys() == tensors.keys()
                assert all(torch.equal(found[name], value) for name, value in tensors.items())
        assert all(value == 20 for name, value in tensors.items() if name.endswith(".step"))
        final = torch.load(sharded / "final.pt", weights_only=True)
        table = safetensors.torch.load_file(sharded / "final.safetensors")
        assert final.keys() == table.keys() == model.state_dict().keys()
        for name, value in final.items():
            assert torch.equal(value, tensors[f"model.{name}"]) and torch.equal(value, table[name])

    def test_newest_checkpoint_is_an_undamaged_one(self, sharded, tmp_path, capsys):
        """Whatever the damage: it is said once, and the one before is taken, as long as there is one."""
        files = {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert set(json_of(saved(sharded)[-1] / "manifest.json")["files"]) == files, "a sum for each"
        assert set(os.listdir(saved(sharded)[-1])) == files | {"manifest.json"}
        damages = [("missing", "__1_0.distcp"), ("truncated", "__1_0.distcp")]
        damages += [("altered", "__0_0.distcp"), ("altered", ".metadata")]
        damages += [("altered", "manifest.json"), ("missing", "manifest.json")]
        for damage, name in damages:
            out = tmp_path / damage / name
            shutil.copytree(sharded, out)
            newest, before = reversed(saved(out))
            data = bytearray((newest / name).read_bytes())
            data[len(data) // 2] ^= 4 * (damage == "altered")
            (newest / name).write_bytes(data[:-1] if damage == "truncated" else data)
            if damage == "missing":
                (newest / name).unlink()
            for said in (f"{newest} is damaged ({name} missing or altered)\n", ""):
                path, manifest = train_fsdp.newest_checkpoint(out)
                assert path == before and manifest["step"] == 10
                assert capsys.readouterr().err == said
            (before / ".metadata").write_bytes(b"")
            assert train_fsdp.newest_checkpoint(out) == (None, None)
            capsys.readouterr()
        part = shutil.copytree(saved(sharded)[0], tmp_path / "step_00000005.part")
        assert train_fsdp.publish(part, {}, 3).exists()
        part = shutil.copytree(saved(sharded)[0], part)
        (part / "__1_0.distcp").unlink()
        with pytest.raises(OSError, match="__1_0.distcp"):  # on another machine's disk
            train_fsdp.publish(part, {}, 3)

    def test_main_refuses_in_one_line(self, trainer, tmp_path):
        """One of two says it (both, where they haven't met); also where ranks were given other things."""
        (tmp_path / "file").write_text("not a folder")
        refused = {"lr": "--lr nan", "file": "", "amp bf16 needs": "--amp bf16 --dtype float64"}
        if trainer.module == "train_ddp":
            refused |= {"data_parallel": "--data-parallel --amp bf16"}
            refused |= {"compiled": "--data-parallel --compile"}
        else:
            refused |= {"replicate": "--replicate 3", "exact": "--exact --amp bf16"}
        for words, more in (refused | {"needs a GPU": "--device cuda"}).items():
            results = trainer.attempt(2, tmp_path / ("out" if more else "file"), more)
            check_one_line_error(results[0], words)
            assert results[1].returncode == 2 and (words not in refused or results[1].stderr == "")
        assert not (tmp_path / "out").exists()
        other = "load = script.load_manual\n"
        other += "script.load_manual = lambda n: [(x[RANK:], y[RANK:]) for x, y in load(n)]\n"
        for words, more, code in (("save_every", ["--save-every", "7"], ""), ("text", [], other)):
            options = {"of_rank": {1: more}, "code": code + "run()"}
            results = trainer.attempt(2, tmp_path / "out", **options)
            check_one_line_error(results[1], "rank 1", words)
            assert results[0].returncode in (1, 2) and not (tmp_path / "out/final.pt").exists()

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_check_settings_takes_the_least_of_each_and_no_less(self, module):
        ones = "steps batch_size accumulate d_model n_heads n_layers eval_every keep timeout".split()
        zeros = "lr warmup clip seed save_every dropout".split()
        alone, two = (module.Processes(0, world, CPU) for world in (1, 2))
        for name, least in (dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0)).items():
            module.check_settings(module.Settings(**{name: least}), alone)
            with pytest.raises(ValueError, match=name):
                module.check_settings(module.Settings(**{name: least - 1}), alone)
        module.check_settings(module.Settings(batch_size=6, accumulate=3, seed=2**32 - 1), two)
        for wrong in ({"batch_size": 5, "accumulate": 3}, {"seed": 2**32}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                module.check_settings(module.Settings(**wrong), two)

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_start_processes_names_what_the_environment_lacks(self, module, monkeypatch):
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, lacking in zip(names, [*list(names)[1:], "MASTER_PORT"], strict=True):
            monkeypatch.setenv(name, names[name])  # one by one
            with pytest.raises((KeyError, ValueError), match=lacking):
                module.start_processes("cpu", 5.0)
        names = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "MASTER_PORT": "1"}
        for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
            module.start_processes("cpu", 5.0)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")  # goes on to look for the others
        with pytest.raises(torch.distributed.DistError):
            module.start_processes("cpu", 0.5)

    def test_start_processes_meet_again_after_a_restart(self, trainer, tmp_path):
        """In the store that torchrun keeps, where the addresses of those that have ended still stand."""
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
        code = """
time.sleep(0.3 * RANK)
p = script.start_processes("cpu", 8)
print(script.sum_over_ranks([1.0], p))
"""
        for attempt in "01234":
            environment["TORCHELASTIC_RESTART_COUNT"] = attempt
            for result in trainer.run(3, tmp_path, code=code, **environment):
                assert result.stdout == "[3.0]\n"

    def test_main_refuses_the_out_of_another_run(self, trainer, tmp_path):
        """Other settings, another version's checkpoint, the other script's run; what may change may."""
        out, own = tmp_path / "a", trainer.module
        (other,) = {"train_ddp", "train_fsdp"} - {own}

        def check_refused(module: str, arguments: str, *words: str) -> None:
            results = trainer.use(module).attempt(2, out, arguments)
            check_one_line_error(results[0], *words)
            assert results[1].returncode == 2 and results[1].stderr == ""

        trainer.run(2, out, "--steps 4")
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        may = "--save-every 3 --timeout 39 --keep 1 --eval-every 7 --compile"
        may += " --replicate 2 --recompute" * (own == "train_fsdp")
        assert "this run is finished" in trainer.run(2, out, f"--steps 4 {may}")[0].stdout
        check_refused(own, "--steps 4 --lr 0.01", "lr 0.003", "--out")
        check_refused(other, "--steps 4", f"{other}.py here")
        assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        (out / "report.json").unlink()
        check_refused(other, "--steps 4", f"{own}.py")
        check_refused(own, "--steps 5", "steps 4", "--out")
        if own == "train_ddp":
            out = tmp_path / "old"
            out.mkdir()
            train_ddp.save_checkpoint(out, 10, {"step": 10, "model": {}})
            check_refused(own, "", "another --out")

    def test_main_goes_on_where_it_was_on_other_processes(self, trainer, tmp_path):
        """The undisturbed run's weights, on 2 bitwise. A damaged newest checkpoint is passed over."""
        arguments, whole = "--dtype float64 --save-every 8", tmp_path / "whole"
        trainer.run(2, whole, arguments)
        runs = {"1": "", "2": "", "4": ""}
        if trainer.exact:
            runs = {"1": "--recompute", "2": "", "4": "--replicate 2"}
        for name, more in runs.items():
            out = tmp_path / name
            shutil.copytree(whole, out)
            (out / "report.json").unlink()
            damaged = saved(out)[-1]
            damaged = damaged / "__0_0.distcp" if damaged.is_dir() else damaged
            data = bytearray(damaged.read_bytes())
            data[-2000] ^= 16
            damaged.write_bytes(data)
            result = trainer.run(int(name), out, f"{arguments} {more}")[0]
            assert "is damaged" in result.stderr and "from_step=16" in result.stdout
            assert len(list(out.glob("*.damaged"))) == 1, "so that it isn't reported again"
            distance = distance_of_weights(out, whole)
            assert distance <= (0 if name == "2" else 1e-12), (name, distance)
            one, other = (json_of(o / "report.json")["losses"] for o in (out, whole))
            assert one == pytest.approx(other, rel=1e-12)

    def test_main_finished_means_that_all_is_there(self, trainer, tmp_path):
        """What is missing or damaged is made again; what is finished needs no lock, nor to write."""
        out = tmp_path / "out"
        first = last_json(trainer.run(1, out, "--steps 4")[0])
        report, weights = json_of(out / "report.json"), final_weights(out)
        assert first["report"] == str(out / "report.json") and len(json.dumps(first)) < 300
        assert first["loss"] == report["losses"][-1] == report["loss"] and len(set(report["losses"])) == 4
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert rows == report["log"] and rows[-1]["dev_loss"] == report["dev_loss"] == first["dev_loss"]
        targets = few_rows(train_ddp)[0][1]
        learnt = targets[rows_of_steps(4, len(targets), trainer.settings())]
        assert report["tokens"] == (learnt != -100).sum() and rows[-1]["gradient_norm"] > 0
        assert report["tokens_per_second"] == round(report["tokens"] / report["train_seconds"])
        (out / "final.pt").unlink()
        trainer.run(1, out, "--steps 4")
        assert torch.equal(final_weights(out), weights)
        (out / "report.json").write_text((out / "report.json").read_text()[:-9])
        trainer.run(1, out, "--steps 4")
        assert json_of(out / "report.json")["losses"] == report["losses"]
        lock = train_ddp.lock_out(out)
        out.chmod(0o500)
        (again,) = trainer.run(1, out, "--steps 4")
        out.chmod(0o700)
        assert "this run is finished" in again.stdout and last_json(again) == first
        lock.close()

    def test_train_a_step_that_diverges_ends_the_run(self, trainer, tmp_path):
        """An inf gradient is never applied nor saved: the run goes on from before; fp16 skips that step."""
        code = """
cross_entropy, steps = torch.nn.functional.cross_entropy, [0]
def explode(logits, *rest, **options):
    loss = cross_entropy(logits, *rest, **options)
    steps[0] += torch.is_grad_enabled()
    if steps[0] != 9 or RANK == 1:
        return loss
    if "LOSS" in os.environ:
        return loss + float("inf")
    return loss + (0 * logits.sum()).clamp(min=0).sqrt()  # the value stays, the gradient doesn't
script.F.cross_entropy = explode
run()
"""

        def check_ends(world: int, out: Path, arguments: str, *words: str, **options) -> None:
            results = trainer.attempt(world, out, arguments, **options)
            assert [r.returncode for r in results] == [1] * world, results
            assert len(results[0].stderr.splitlines()) == 1 and results[-1].stderr in ("", results[0].stderr)
            assert all(word in results[0].stderr for word in words) and not (out / "final.pt").exists()

        out, fp16 = tmp_path / "0", tmp_path / "fp16"
        check_ends(2, out, "--save-every 2 --clip 0", "norm", "step 8", code=code)
        assert saved_state(out)["step"] == 8
        assert "from_step=8" in trainer.run(2, out, "--save-every 2 --clip 0")[0].stdout
        assert final_weights(out).isfinite().all()
        check_ends(2, tmp_path / "loss", "", "loss is inf at step 8", code=code, LOSS="1")
        trainer.run(2, fp16, "--amp fp16", code=code)
        assert final_weights(fp16).isfinite().all()
        assert saved_state(fp16)["scaler"]["_growth_tracker"] == 11
        check_ends(1, tmp_path / "last", "--steps 1 --warmup 0 --lr 1e30 --clip 0", "--lr")
        assert not saved(tmp_path / "last")

    def test_explain_leaves_a_user_s_error_its_traceback(self, trainer, tmp_path):
        """The rank that has it shows it; the others end too. Alone there is nobody to lose."""
        alone = "def fails(*_): raise RuntimeError('gloo/transport/tcp')\nscript.train = fails"
        shape = "script.Block.forward = lambda self, x: x[..., :-1]"
        loss = "if RANK == 1: script.F.cross_entropy = lambda *_, **k: torch.zeros(2) @ torch.zeros(3)"
        for code, world, guilty in ((alone, 1, [0]), (shape, 2, [0, 1]), (loss, 2, [1])):
            results = trainer.attempt(world, tmp_path, "--timeout 20", code=code + "\nrun()")
            for rank, result in enumerate(results):
                assert result.returncode == 1, results
                assert ("\nRuntimeError" in result.stderr) == (rank in guilty), results
                assert (f"rank {rank} can't reach" in result.stderr) == (rank not in guilty), results

    def test_explain_a_lost_process(self, trainer, tmp_path):
        """One that is killed, one that halts, one that never comes."""
        for number, timeout in ((signal.SIGKILL, 60), (signal.SIGSTOP, 3)):
            code = f"""
check = script.check_finite
def ends(what, value, step):
    if step == 5 and RANK == 1:  # while the others go on to the next gradients
        os.kill(os.getpid(), {int(number)})
    check(what, value, step)
script.check_finite = ends
run()
"""
            trainer.start(3, tmp_path, f"--steps 5000 --eval-every 3 --timeout {timeout}", code=code)
            trainer.wait_until(lambda: all("can't reach" in trainer.out(rank, "err") for rank in (0, 2)))
            trainer.kill([1])  # in case it is only halted
            results = trainer.wait()
            assert [r.returncode for r in results] == [1, -signal.SIGKILL, 1], results
            assert not any("Traceback" in r.stderr for r in results)
        trainer.start(2, tmp_path / "b", "--timeout 2", of_rank={1: None})
        (result,) = trainer.wait(60)
        assert result.returncode == 1 and "rank 0 can't reach the other processes" in result.stderr

    def test_on_rank_0_may_take_longer_than_the_timeout(self, trainer, tmp_path):
        """A slow disk kills no job: neither while rank 0 saves nor while another one writes its slices."""
        code = """
replace = os.replace
def slow(source, target):
    time.sleep(3 * target.name.startswith(("step", "manifest")))
    return replace(source, target)
os.replace = slow
if RANK == 1 and hasattr(script, "dcp"):
    save = script.dcp.save
    script.dcp.save = lambda *a, **k: time.sleep(3) or save(*a, **k)
run()
"""
        results = trainer.run(2, tmp_path, "--steps 4 --timeout 2", code=code)
        assert last_json(results[0])["loss"] > 0

    def test_save_checkpoint_on_a_full_disk_ends_the_run(self, trainer, tmp_path):
        """A rank may write no file above 10 kB: the older checkpoint stays, nothing half written does."""
        code = """
import resource
save = script.save_checkpoint
def limited(folder, step, *rest):
    if step == 20 and RANK == (script is train_fsdp):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return save(folder, step, *rest)
script.save_checkpoint = limited
run()
"""
        results = trainer.attempt(2, tmp_path, "--save-every 10", code=code)
        assert [r.returncode for r in results] == [1, 1], results
        assert len(results[0].stderr.splitlines()) == 1 and results[1].stderr == "", results
        assert trainer.module == "train_ddp" or "rank 1" in results[0].stderr
        assert [path.name[:13] for path in saved(tmp_path)] == ["step_00000010"]
        assert not list(tmp_path.glob("*.part"))
        (tmp_path / "tmpx.part").mkdir()  # of a process killed earlier
        assert "from_step=10" in trainer.run(2, tmp_path, "--save-every 10")[0].stdout
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("world", [1, 2])
    def test_save_checkpoint_survives_kill_9_at_random_moments(self, trainer, world, tmp_path):
        """Of one process or of all, in a step or in a save (each step saves): bitwise the same end."""
        arguments = "--steps 24 --keep 2 --dropout 0.1 --save-every"
        trainer.run(world, tmp_path / "whole", f"{arguments} 0")
        out, rng, kills = tmp_path / "killed", random.Random(KILL_SEED), 0
        print(f"KILL_SEED={KILL_SEED}")
        in_a_save = """
replace, left = os.replace, [SAVES]
def die(*arguments):
    left[0] -= 1
    return replace(*arguments) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
run()
"""
        for attempt in itertools.count():
            code = in_a_save.replace("SAVES", str(rng.randint(2, 9))) if attempt % 2 else "run()"
            before = newest_step(out)
            trainer.start(world, out, f"{arguments} 1", code=code)
            if attempt % 2 == 0:
                trainer.wait_until(lambda before=before: newest_step(out) != before)
                time.sleep(rng.random() * 0.1)
                with contextlib.suppress(ProcessLookupError):
                    trainer.kill(range(world) if attempt % 4 else [world - 1])
            results = trainer.wait()
            kills += any(r.returncode == -signal.SIGKILL for r in results)
            if kills == KILLS:
                break
            if (out / "report.json").exists():
                shutil.rmtree(out)
        assert "from_step=" in trainer.run(world, out, f"{arguments} 1")[0].stdout
        assert distance_of_weights(out, tmp_path / "whole") == 0
        assert not list(out.glob("*.part")) and len(saved(out)) == 2

    @pytest.mark.parametrize("world", [1, 2])
    def test_signals_stop_all_ranks_at_one_step(self, trainer, world, tmp_path):
        """Saved, with the scaler; the same command goes on to the same end."""
        arguments, whole, out = "--steps 40 --amp fp16 --dropout 0.1", tmp_path / "a", tmp_path / "b"
        trainer.run(world, whole, arguments)
        trainer.start(world, out, arguments)
        trainer.wait_until(lambda: (out / "log.jsonl").exists())
        trainer.kill([world - 1], signal.SIGTERM)
        results = trainer.wait()
        assert [r.returncode for r in results] == [128 + signal.SIGTERM] * world, results
        assert len(saved(out)) == 1 and not (out / "final.pt").exists()
        assert "the same command goes on" in results[0].stderr
        assert all(r.stderr == "" for r in results[1:]), "one line an event"
        state = saved_state(out)
        assert 10 <= state["step"] < 40 and state["scaler"]["_growth_tracker"] > 0
        result = trainer.run(world, out, arguments)[0]
        assert f"from_step={state['step']}" in result.stdout
        assert distance_of_weights(out, whole) == 0
        assert saved_state(out)["scaler"] == saved_state(whole)["scaler"]

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_signals_are_noted_and_given_back(self, module):
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
        signals = module.Signals(module.Processes(0, 2, CPU))
        assert not signals.received()
        for number in numbers * 2:
            signal.raise_signal(number)
        assert signals.received() and signals.noted == numbers * 2
        signals.restore()
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_DFL}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        alone = module.Signals(module.Processes(0, 1, CPU))
        signal.raise_signal(signal.SIGHUP)
        assert not alone.received()
        signal.raise_signal(signal.SIGTERM)  # a second one would end it at once:
        assert alone.received() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        alone.restore()
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    def test_signals_orphans_leave(self, trainer, tmp_path):
        """Their torchrun, here a process between, is killed after a checkpoint; the same command goes on."""
        code = """
check = script.check_finite
def kills(what, value, step):
    if step == 5 and what == "loss":  # once
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.5)
    check(what, value, step)
script.check_finite = kills
if os.fork():
    signal.pause()
run()
"""
        trainer.attempt(1, tmp_path, "--save-every 5", code=code, TORCHELASTIC_RUN_ID="1")
        trainer.wait_until(lambda: trainer.out(0, "err") or (tmp_path / "final.pt").exists())
        assert "lost the torchrun" in trainer.out(0, "err")
        assert "from_step=5" in trainer.run(1, tmp_path, "--save-every 5")[0].stdout

    def test_lock_out_one_run_at_a_time(self, trainer, tmp_path):
        """A second start on the same OUT waits a while, then says so; the first one's work stays."""
        lock = trainer.script.lock_out(tmp_path)
        code = "lock = script.lock_out\nscript.lock_out = lambda out: lock(out, patience=0.5)\nrun()"
        results = trainer.attempt(2, tmp_path, "--steps 4", code=code)
        check_one_line_error(results[0], "is in use by another run")
        assert results[1].returncode == 2 and results[1].stderr == ""
        trainer.start(1, tmp_path, "--steps 4")
        time.sleep(1)
        lock.close()
        assert trainer.wait()[0].returncode == 0, "it has waited"

    def test_main_under_torchrun_survives_a_killed_worker(self, trainer, tmp_path):
        """Alone in an empty folder, with a short warm-up; no orphan is left."""
        script = shutil.copy(ROOT / f"{trainer.module}.py", tmp_path)
        arguments = "--steps 100 --save-every 5 --eval-every 50 --warmup 200"
        trainer.run(2, tmp_path / "whole", arguments, code=WHOLE)
        out, node = tmp_path / "out", f"--nproc_per_node=2 --master_port={free_port()} --max-restarts=3"
        agent = torchrun(script, out, arguments, node)
        wait_until(lambda: newest_step(out), 60, "a checkpoint")
        os.kill(children(agent)[1], signal.SIGKILL)
        code, log = agent.wait(120), next(tmp_path.glob("agent*")).read_text()
        assert code == 0 and log.count("processes=2") == 2 and log.count("from_step=0") == 1, log
        assert log.count("can't reach the other processes") <= 1, "the second attempt met at once"
        assert distance_of_weights(out, tmp_path / "whole") == 0

    def test_main_elastic_on_one_node_and_on_two(self, both, tmp_path):
        """The node that doesn't host the rendezvous comes and is killed; the loss curve stays."""
        arguments = "--dtype float64 --steps 100000 --save-every 5 --eval-every 9999"
        node = "--nnodes=1:2 --nproc_per_node=1 --max-restarts=9 --rdzv_backend=c10d --rdzv_id=test"
        node += f" --rdzv_endpoint=127.0.0.1:{free_port()} --rdzv_conf=keep_alive_interval=1,"
        node += "keep_alive_max_attempt=3,last_call_timeout=1"
        script, out, agents = tmp_path / "slow.py", tmp_path / "elastic", []
        script.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_ddp, tyro
wait = train_ddp.warmup_cosine
train_ddp.warmup_cosine = lambda *arguments: time.sleep(0.05) or wait(*arguments)
train_ddp.exit_now(train_ddp.main(tyro.cli(train_ddp.Settings)))
""")

        def starts(processes: int) -> int:
            logs = [log.read_text() for log in tmp_path.glob("agent*")]
            return sum(log.count(f"processes={processes} ") for log in logs)

        store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        try:
            for processes, n_starts in ((1, 1), (2, 1), (1, 2)):
                if n_starts == 1:
                    agents.append(torchrun(script, out, arguments, node, **store))
                else:
                    kill_with_children(agents[1])
                wait_until(lambda n=n_starts, p=processes: starts(p) == n, 60, f"{processes} node(s)")
                reached = newest_step(out) + 5
                wait_until(lambda r=reached: newest_step(out) > r, 60, "steps")
        finally:
            for agent in agents:
                kill_with_children(agent)
        curve = train_ddp.load_checkpoint(out)["losses"]
        s = both.use("train_ddp").settings(arguments)
        _, undisturbed = by_hand(train_ddp, s, len(curve))
        assert curve == pytest.approx(undisturbed[:-1], rel=1e-5)


# -----------------------------------------------------------------------------
# export.py

EXPORT_FORMATS = {
    "trace": lambda model, x, folder: export.export_torchscript(model, x, folder / "trace.ts"),
    "script": lambda model, x, folder: export.export_torchscript(model, x, folder / "script.ts", "script"),
    "program": lambda model, x, folder: export.export_program(model, x, folder / "program.pt2"),
    "onnx": lambda model, x, folder: export.export_onnx(model, x, folder / "model.onnx"),
}
EXPORT_EVERY_WAY = pytest.mark.parametrize(
    "name",
    EXPORT_FORMATS,
    ids=["export_torchscript", "export_torchscript_script", "export_program", "export_onnx"],
)


def exported(name: str, model: nn.Module, example, folder: Path):
    return export.load_artefact(EXPORT_FORMATS[name](model, example, folder))


def export_tokens(b: int, t: int) -> Tensor:
    """Ids below 50 with a tail of padding, and (in a batch) a row of nothing but padding."""
    tokens = torch.randint(1, 50, (b, t))
    tokens[:, max(1, t - t // 4) :] = 0
    tokens[1:2] = 0
    return tokens


@torch.no_grad()
def check_export(run, model: nn.Module, tolerance: float = 1e-5) -> None:
    """Equal to the model on sizes that the exporter hasn't seen; 224 is max_len."""
    model = copy.deepcopy(model).eval()
    for b, t in ((1, 1), (1, 199), (7, 5), (33, 64), (2, 224)):
        tokens = export_tokens(b, t)
        check_close(run(tokens), model(tokens), tolerance, f"{b} x {t}")


def export_graph(path: Path) -> tuple[collections.Counter, dict[str, np.ndarray]]:
    """Kinds of operators and name -> weights of an ONNX file."""
    import onnx

    graph = onnx.load(path).graph
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    return collections.Counter(node.op_type for node in graph.node), weights


def int8_matrices(path: Path) -> dict[str, np.ndarray]:
    weights = export_graph(path)[1]
    return {n: w.astype(int) for n, w in weights.items() if w.dtype == np.int8 and w.ndim == 2}


def export_gated(model: nn.Module, gates: dict[str, Tensor]) -> nn.Module:
    """A copy in which the inputs of these Linears are multiplied by gates (features,)."""
    model = copy.deepcopy(model)
    for name, gate in gates.items():
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda _module, inputs, gate=gate: (inputs[0] * gate,))
    return model


def export_derivative(model: nn.Module, linear: str, n: int, examples: list) -> Tensor:
    """|dloss/dgate| for a gate of 1 on each head, mean over examples."""
    expected = torch.zeros(n)
    for x, label in examples:
        with torch.enable_grad():
            gate = torch.ones(n, requires_grad=True)
            spread = gate.repeat_interleave(model.get_submodule(linear).in_features // n)
            loss = F.cross_entropy(export_gated(model.eval(), {linear: spread})(x[None]), label[None])
        expected += torch.autograd.grad(loss, gate)[0].abs() / len(examples)
    return expected


class ExportModule(nn.Module):
    """A function with parameters of its own, as a module."""

    def __init__(self, function, **modules: nn.Module):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(modules)

    def forward(self, x: Tensor, y: Tensor | None = None):
        return self.function(self.parts, x) if y is None else self.function(self.parts, x, y)


def export_torch_module(name: str) -> nn.Module:
    """torch's own modules as people use them, of tokens (B, T)."""
    parts = {"embedding": nn.Embedding(50, 16), "head": nn.Linear(16, 2)}
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    parts["inner"] = {
        "bag": nn.EmbeddingBag(50, 16),
        "lstm": nn.LSTM(16, 16, batch_first=True),
        "attention": nn.MultiheadAttention(16, 2, batch_first=True),
    }.get(name) or nn.TransformerEncoder(layer, 2, enable_nested_tensor="nested" in name)

    def forward(m: nn.ModuleDict, tokens: Tensor) -> Tensor:
        if name == "bag":
            return m.head(m.inner(tokens))
        x = m.embedding(tokens)
        if name == "lstm":
            return m.head(m.inner(x)[0][:, -1])
        padding = (tokens == 0) & (torch.arange(tokens.size(1)) > 0)  # all of a row would be NaN in torch
        if name == "attention":
            x = m.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        else:
            x = m.inner(x, src_key_padding_mask=padding)
        if "all places" not in name:
            x = x.masked_fill(padding[:, :, None], 0.0)
        return m.head(x.mean(1))

    return ExportModule(forward, **parts)


class ExportAttention(nn.Module):
    """Has the convention's parts, and does something else between them."""

    def __init__(self, change: str = ""):
        super().__init__()
        self.change = change
        self.n_heads = 2
        self.qkv_proj = nn.Linear(8, 24, bias=False)
        self.out_proj = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        x = x * 1.5 if self.change == "scaled" else x
        mask = None if self.change == "mask ignored" else mask
        y = export.SelfAttention(self.qkv_proj, self.out_proj, 2)(x, mask)
        return (y, y) if self.change == "tuple" else y


# Reads nothing but the demo's artefacts: python -I has no PYTHONPATH.
EXPORT_FRESH = """
import json, sys
import numpy as np, onnxruntime, torch
folder, sentences = sys.argv[1], sys.argv[2:]
def session(name):
    return onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
metadata = session("original.int8").get_modelmeta().custom_metadata_map
words, labels = json.loads(metadata["words"]), json.loads(metadata["labels"])
ids = [[words.index(word) for word in sentence.split()] for sentence in sentences]
length = max(map(len, ids))
tokens = np.array([row + [0] * (length - len(row)) for row in ids] + [[0] * length])
names = "original", "original.int8", "original.e8", "original.static", "pruned.int8"
answers = {name: session(name).run(None, {"tokens": tokens})[0] for name in names}
tokens = torch.from_numpy(tokens)
with torch.no_grad():
    answers["trace"] = torch.jit.load(f"{folder}/original.trace.ts")(tokens).numpy()
    answers["script"] = torch.jit.load(f"{folder}/original.script.ts")(tokens).numpy()
    answers["program"] = torch.export.load(f"{folder}/original.pt2").module()(tokens).numpy()
print(json.dumps({name: [y.tolist(), [labels[i] for i in y.argmax(1)]] for name, y in answers.items()}))
"""


class TestExport:
    PLACES = {"encoder": "encoder.layers", "own": "layers"}
    BOTH = pytest.mark.parametrize("which", PLACES)

    @pytest.fixture(scope="class")
    def models(self) -> dict[str, nn.Module]:
        """encoder.py's classifier and the demo's own, with random weights and dropout left on."""
        torch.manual_seed(1)
        sizes = {"d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 32}
        config = encoder.EncoderConfig(50, 224, pool="mean+max", **sizes)
        own = export.Classifier(50, max_len=224, **sizes)
        return {"encoder": encoder.EncoderClassifier(config), "own": own}

    @pytest.fixture(scope="class")
    def onnx_file(self, models, tmp_path_factory) -> Path:
        """encoder.py's classifier as ONNX."""
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        metadata = {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}
        example = torch.randint(0, 50, (2, 9))
        return export.export_onnx(models["encoder"], example, path, metadata=metadata)

    # ---- formats

    @EXPORT_EVERY_WAY
    @BOTH
    def test_exports_equal_the_model_at_other_sizes(self, models, which, name, tmp_path):
        model = models[which].train()
        before = torch.get_rng_state()
        path = EXPORT_FORMATS[name](model, torch.randint(0, 50, (3, 20)), tmp_path)
        check_export(export.load_artefact(path), model)
        assert all(module.training for module in model.modules())
        torch.manual_seed(0)
        assert torch.equal(before, torch.get_rng_state())
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
    def test_attention_for_onnx_is_torchs(self, dtype, tolerance):
        """Masks are booleans or added; a query that may attend to nothing gets 0."""
        q, k, v = (torch.randn(3, 4, t, 8).to(dtype) for t in (5, 7, 7))
        keys = torch.arange(3)[:, None, None, None] > torch.arange(7)  # (B, 1, 1, Tk), the first row empty
        rows = (torch.rand(5, 7) < 0.5) & (torch.arange(5) > 0)[:, None]
        added = torch.where(rows, torch.arange(7) / 3, -math.inf).to(dtype)
        ours, theirs = export.attention_for_onnx, F.scaled_dot_product_attention
        for mask in (None, keys, rows, added):
            for scale in (None, 0.7, -0.7):
                y = ours(q, k, v, mask, scale=scale)
                check_close(y, theirs(q, k, v, mask, scale=scale), tolerance)
        shared = q, k[:, :2], v[:, :2, :, :3]
        for rest in ((None, 0.0, True), (rows,)):
            y = ours(*shared, *rest, enable_gqa=True)
            check_close(y, theirs(*shared, *rest, enable_gqa=True), tolerance)

    def test_export_onnx_attention_has_torchs_masks(self, tmp_path):
        """In onnxruntime too, where a row may attend to nothing."""
        attend = F.scaled_dot_product_attention
        model = ExportModule(lambda _, x, mask: attend(x, x, x, mask[:, None, :]))
        run = exported("onnx", model, (torch.randn(3, 4, 8), torch.rand(3, 4) < 0.5), tmp_path)
        for b, t in ((1, 1), (2, 7), (5, 3)):
            x, mask = torch.randn(b, t, 8), torch.arange(b)[:, None] > torch.arange(t)
            check_close(run(x, mask), model(x, mask), 1e-6, f"{b} x {t}")

    TORCHS = [  # what the formats make of torch's own modules
        ("attention", "onnx", "right"),
        ("attention", "program", "right"),
        ("encoder", "onnx", "right"),
        ("encoder", "trace", "right"),
        ("encoder nested", "program", "right"),
        ("encoder nested", "trace", "refused"),
        ("encoder nested, all places", "program", "refused"),
        ("lstm", "trace", "right"),
        ("lstm", "program", "refused"),
        ("bag", "onnx", "right"),
        ("bag", "program", "refused"),
    ]

    @pytest.mark.parametrize("module,name,verdict", TORCHS)
    def test_exports_of_torchs_modules_are_right_or_refused(self, module, name, verdict, tmp_path):
        model = export_torch_module(module)
        if verdict == "right":
            check_export(exported(name, model, export_tokens(3, 9), tmp_path), model)
        else:
            with pytest.raises(ValueError, match="ExportModule"):
                EXPORT_FORMATS[name](model, export_tokens(3, 9), tmp_path)
            assert not list(tmp_path.iterdir())

    def test_export_onnx_is_one_file_that_says_what_it_is(self, onnx_file):
        import onnx
        import onnxruntime

        assert [p.name for p in onnx_file.parent.iterdir()] == ["model.onnx"]
        session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
        (tokens,), (output,) = session.get_inputs(), session.get_outputs()
        assert (tokens.name, tokens.shape) == ("tokens", ["batch", "length"])
        assert (output.name, output.shape) == ("output", ["batch", 2])
        read = session.get_modelmeta().custom_metadata_map
        read = {name: json.loads(value) for name, value in read.items()}
        assert read == {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}
        onnx.checker.check_model(onnx.load(onnx_file), full_check=True)
        assert str(ROOT).encode() not in onnx_file.read_bytes()  # no paths of this machine

    def test_exports_take_two_lengths(self, tmp_path):
        model = transformer_tiny(n_layers=1).float()
        example = torch.randint(3, 11, (3, 5)), torch.randint(3, 11, (3, 5))
        run = exported("onnx", model, example, tmp_path)
        for batch, source, target in ((1, 1, 1), (2, 7, 3), (4, 3, 9)):
            src = torch.randint(3, 11, (batch, source))
            tgt = torch.randint(3, 11, (batch, target))
            src[0, source // 2 + 1 :] = 0
            check_close(run(src, tgt), model(src, tgt).detach(), 1e-5)

    def test_exports_take_dynamic_shapes(self, tmp_path):
        model = ExportModule(lambda m, x, y: m.linear(x) * y[:, None], linear=nn.Linear(6, 4))
        batch = torch.export.Dim("n", min=2, max=9)
        shapes = {"x": {0: batch}, "y": {0: batch}}
        example, other = (torch.randn(3, 6), torch.randn(3)), (torch.randn(9, 6), torch.randn(9))
        for write, suffix in ((export.export_onnx, "onnx"), (export.export_program, "pt2")):
            run = export.load_artefact(write(model, example, tmp_path / f"a.{suffix}", shapes))
            check_close(run(*other), model(*other), 1e-6)
        with pytest.raises(Exception, match="9"):
            run(torch.ones(10, 6), torch.ones(10))

    def test_free_sizes_are_the_batch_and_lengths(self):
        ids = torch.zeros(3, 5, dtype=torch.long)
        images = torch.zeros(3, 2, 2, dtype=torch.long)
        assert export.free_sizes((torch.tensor(1.0), ids)) == ({}, {0: "batch", 1: "length_1"})
        for other, free in (
            (ids[:, :4] > 0, {0: "batch", 1: "length_1"}),
            (torch.zeros(3), {0: "batch"}),
            (torch.zeros(7), {}),
            (torch.zeros(1, 5), {}),
            (torch.zeros(3, 6), {0: "batch"}),
            (images, {0: "batch"}),
            (torch.zeros(3, 5, 6), {0: "batch", 1: "length_1"}),
        ):
            assert export.free_sizes((ids, other)) == ({0: "batch", 1: "length"}, free), other.shape

    @pytest.mark.parametrize("name", ["trace", "onnx"])
    def test_exports_take_what_users_have(self, name, tmp_path):
        """Outputs of -inf, large ones, several; a row beside a batch, a scalar."""
        several = ExportModule(lambda m, x, y: (x + y, x > 0), unused=nn.Linear(1, 1))
        x, row = torch.randn(4, 3), torch.tensor([[0.0, -math.inf, 0.0]])
        for inputs in ((x.clone().requires_grad_(), row), [x, torch.tensor(2.0)]):
            total, positive = exported(name, several, inputs, tmp_path)(torch.ones(7, 3), inputs[1])
            assert torch.equal(total, 1 + inputs[1].expand(7, 3)) and positive.all()
        large = nn.Linear(512, 300)
        nn.init.normal_(large.weight, 0, 1e7)
        x = torch.randn(5, 512)
        check_close(exported(name, large, x[:2], tmp_path)(x), large(x).detach(), 1e-5)

    def test_a_trace_freezes_a_branch(self, tmp_path):
        x = torch.tensor([[3.0, -1.0]])
        assert export.Gate()(x).tolist() == [[6.0, -2.0]]
        assert exported("trace", export.Gate(), x, tmp_path)(-x).tolist() == [[-6.0, 2.0]]
        assert exported("script", export.Gate(), x, tmp_path)(-x).tolist() == [[3.0, -1.0]]
        for name in ("program", "onnx"):
            with pytest.raises(ValueError, match="torch.export can't capture Gate"):
                EXPORT_FORMATS[name](export.Gate(), torch.ones(2, 2), tmp_path)

    # ---- refusals

    @EXPORT_EVERY_WAY
    def test_exports_refuse_by_name_and_write_nothing(self, name, tmp_path):
        """What isn't a tensor, changes with each call, or was frozen at a size of the example."""
        path = EXPORT_FORMATS[name](nn.Linear(3, 3), torch.zeros(2, 3), tmp_path)
        path.write_bytes(b"an earlier artefact")
        for function in (
            lambda _, x: x if float(x.sum()) > 0 else "no tensor",
            lambda _, x: x + torch.rand(4),
            lambda _, x: sum(x[:, i] for i in range(x.size(1))),
            lambda _, x: x.reshape(3, 4) if len(x) == 3 else x[:, :1] * 5,
        ):
            with pytest.raises(ValueError, match="ExportModule") as raised:
                EXPORT_FORMATS[name](ExportModule(function), torch.zeros(3, 4).long(), tmp_path)
            assert "\n" not in str(raised.value)
            assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"an earlier artefact"

    def test_exports_refuse_bad_arguments(self, tmp_path):
        linear, x = nn.Linear(3, 1), torch.zeros(2, 3)
        path, missing = tmp_path / "m", tmp_path / "nowhere.onnx"
        for words, function, *arguments in (
            ("method.*trace.*script.*compile", export.export_torchscript, linear, x, path, "compile"),
            ("must be tensors.*'Tensor', 'int'", export.export_program, linear, (x, 3), path),
            ("Linear refuses.*shapes", export.export_program, linear, x[:, :2], path),
            ("can't capture Linear.*specialized", export.export_onnx, linear, x[:1], path),
            ("nowhere", export.quantize_dynamic, missing, path),
            ("onnx, .pt2 or .ts, got model.pth", export.load_artefact, "model.pth"),
        ):
            with pytest.raises(ValueError, match=words):
                function(*arguments)
        with pytest.raises(TypeError, match="JSON"):
            export.export_onnx(linear, x, path, metadata={"labels": {1, 2}})
        with pytest.raises(FileNotFoundError):
            export.load_artefact(missing)
        for write in (export.export_torchscript, export.export_program, export.export_onnx):
            with pytest.raises(OSError, match="nowhere"):
                write(linear, x, tmp_path / "nowhere/m")
        assert not list(tmp_path.iterdir())

    def test_load_artefact_refuses_what_is_damaged(self, tmp_path):
        for suffix in (".onnx", ".pt2", ".ts"):
            for content in (b"", b"no model", b"PK\x03\x04 and no more"):
                path = tmp_path / f"a{suffix}"
                path.write_bytes(content)
                with pytest.raises(ValueError, match=f"a{suffix} is damaged"):
                    export.load_artefact(path)

    def test_load_artefact_changes_nothing_in_the_process(self, models, onnx_file, tmp_path):
        """From four threads at once, beside an export: modes, stderr and logging stay."""
        model, example = models["encoder"].train(), torch.randint(0, 50, (3, 20))
        paths = [EXPORT_FORMATS[name](model, example, tmp_path) for name in ("trace", "program")]
        root = logging.getLogger()

        def state() -> tuple:
            logs = root.manager.disable, root.level, root.handlers[:]
            return sys.stderr, sys.stdout, *logs, warnings.filters[:], torch.get_num_threads()

        before = state()
        with ThreadPoolExecutor(5) as pool:
            writing = pool.submit(export.export_torchscript, model, example, tmp_path / "b.ts")
            loaded = list(pool.map(export.load_artefact, [*paths, onnx_file] * 4))
            while not writing.done():
                assert all(module.training for module in model.modules())
        assert state() == before
        expected = copy.deepcopy(model).eval()(example).detach()
        for run in loaded:
            check_close(run(example).detach(), expected, 1e-5)
        with pytest.raises(ValueError):
            loaded[2](example, example)

    def test_onnxruntime_writes_nothing_at_home(self, onnx_file, tmp_path):
        code = f"import export, torch; export.load_artefact({str(onnx_file)!r})(torch.ones(2, 3).long())"
        env = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        env.pop("ORT_DISABLE_TELEMETRY", None)
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=120)
        assert not list(tmp_path.iterdir())

    # ---- int8

    def test_int8_product_is_off_by_the_rounding(self):
        x, weight = torch.randn(50, 64), torch.randn(20, 64)
        weight[0] *= 100
        exact = x.double() @ weight.double().T
        errors = {}
        for bits, per_channel in ((8, True), (7, True), (8, False)):
            y = export.int8_product(x, weight, bits, per_channel)
            errors[bits, per_channel] = (y - exact)[:, 1:].norm() / exact[:, 1:].norm()
        assert errors[8, True] < 0.015 and errors[8, True] < errors[7, True] < 0.03
        assert errors[8, False] > 10 * errors[8, True]  # small rows drown beside a large one
        integers = torch.randint(-127, 128, (9, 30)).float()
        integers[:, 0] = 127  # so that the unit of every row is 1
        check_close(export.int8_product(integers, integers), integers @ integers.T, 1e-6)

    @pytest.mark.parametrize("bits", [7, 8])
    def test_quantize_dynamic_rounds_as_by_hand(self, models, onnx_file, bits, tmp_path):
        """A scale a column, 7 bits unless asked; attention and metadata stay."""
        wide = {} if bits == 7 else {"reduce_range": False}
        path = export.quantize_dynamic(onnx_file, tmp_path / "m.onnx", **wide)
        kinds, weights = export_graph(path)
        matrices = int8_matrices(path)
        linears = [m for m in models["encoder"].modules() if isinstance(m, nn.Linear)]
        unmatched = [m.weight.detach().T.numpy() for m in linears]
        assert sorted(w.shape for w in matrices.values()) == sorted(w.shape for w in unmatched)
        for name, w in matrices.items():
            scale = weights[name.removesuffix("_quantized") + "_scale"]
            assert scale.shape == (w.shape[1],), name
            errors = [np.abs(w * scale - m).max() for m in unmatched if m.shape == w.shape]
            assert min(errors) <= 0.51 * scale.max(), name  # half a unit
            assert 2 * 255 * np.abs(w).max() <= 32767 or bits == 8, "saturates without VNNI"
        assert max(np.abs(w).max() for w in matrices.values()) > 2 ** (bits - 1) - 3
        assert kinds["MatMul"] >= 4 and kinds["MatMulInteger"]  # attention stays
        run = export.load_artefact(path)
        assert json.loads(run.metadata["note"]) == "gut, süß"
        check_export(run, models["encoder"], tolerance=0.05)

    def test_quantize_dynamic_shrinks_embeddings(self, tmp_path):
        model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 2))
        fp32 = export.export_onnx(model, torch.zeros(2, 3, dtype=torch.long), tmp_path / "m.onnx")
        tokens = torch.arange(5000).view(1, -1)
        for embeddings, n_bytes in ((False, 4), (True, 1)):
            path = export.quantize_dynamic(fp32, tmp_path / "q.onnx", embeddings=embeddings)
            check_close(export.load_artefact(path)(tokens), model(tokens).detach(), 0.05)
            assert n_bytes < path.stat().st_size / (5000 * 64) < n_bytes + 0.1

    def test_quantize_static_learns_its_ranges(self, tmp_path):
        """The range of an activation is the calibration's: what lies beyond it is clipped."""
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
        fp32 = export.export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx")
        calibration = ({"input": torch.rand(size, 4) * 2 - 1} for size in (2, 5, 1, 50))
        path = export.quantize_static(fp32, tmp_path / "s.onnx", calibration)
        inside, beyond = torch.rand(50, 4) * 1.6 - 0.8, torch.full((1, 4), 40.0)
        run = export.load_artefact(path)
        check_close(run(inside), model(inside).detach(), 0.05)
        assert (run(beyond) - model(beyond)).abs().max() > 1  # dynamic quantization follows:
        dynamic = export.load_artefact(export.quantize_dynamic(fp32, tmp_path / "d.onnx"))
        check_close(dynamic(beyond), model(beyond).detach(), 0.05)
        kinds, weights = export_graph(path)
        assert kinds["QuantizeLinear"] and not kinds["DynamicQuantizeLinear"]
        points = {w.dtype.name for n, w in weights.items() if n.endswith("zero_point") and w.size == 1}
        assert points == {"uint8"}  # activations
        wide = export.quantize_static(fp32, tmp_path / "w.onnx", [{"input": inside}], reduce_range=False)
        for file, largest in ((path, (62, 63, 64)), (wide, (127,))):
            assert max(np.abs(w).max() for w in int8_matrices(file).values()) in largest

    def test_quantize_static_leaves_attention_alone(self, models, onnx_file, tmp_path):
        feeds = [{"tokens": export_tokens(*size)} for size in ((1, 1), (7, 5), (33, 64), (2, 224)) * 2]
        path = export.quantize_static(onnx_file, tmp_path / "s.onnx", feeds)
        check_export(export.load_artefact(path), models["encoder"], tolerance=0.15)
        linears = sum(isinstance(m, nn.Linear) for m in models["encoder"].modules())
        assert len(int8_matrices(path)) == linears

    def test_quantization_refuses(self, onnx_file, tmp_path):
        ids = torch.ones(2, 5, dtype=torch.long)
        for calibration in ([], [{"ids": ids}], [{"tokens": ids.float()}]):
            with pytest.raises(ValueError, match="can't quantize .*model.onnx"):
                export.quantize_static(onnx_file, tmp_path / "m.onnx", calibration)
        (tmp_path / "garbage").write_bytes(b"no graph at all" * 9)
        with pytest.raises(ValueError, match="can't quantize .*garbage"):
            export.quantize_dynamic(tmp_path / "garbage", tmp_path / "m.onnx")
        assert [p.name for p in tmp_path.iterdir()] == ["garbage"]

    def test_to_bfloat16_follows_the_cpu(self, monkeypatch):
        model = nn.Linear(2, 2)
        for name, has in (("avx2", False), ("avx512_bf16", True), ("amx_bf16", True), ("bf16", True)):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
            assert export.has_bf16() == has, name
            with contextlib.nullcontext() if has else pytest.raises(ValueError, match="no bf16"):
                assert export.to_bfloat16(model).weight.dtype == torch.bfloat16
            assert model.weight.dtype == torch.float32

    # ---- pruning

    def test_prune_unstructured_zeroes_the_smallest(self):
        """Of Linear and Conv weights, ranked over all layers; in a copy."""
        model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 20), nn.Conv1d(20, 5, 1))
        nn.init.normal_(model[2].weight, std=3.0)
        model[1].requires_grad_(False)
        old = torch.cat([model[i].weight.flatten() for i in (1, 2)]).clone()
        for amount in (0, 0.25, 0.5, 1):
            pruned = export.prune_unstructured(model, amount)
            weights = torch.cat([pruned[i].weight.flatten() for i in (1, 2)])
            threshold = old.abs().sort().values[: round(amount * 300)].max() if amount else 0
            assert torch.equal(weights, old * (old.abs() > threshold)), amount
            assert pruned.state_dict().keys() == model.state_dict().keys()
            assert torch.equal(pruned[0].weight, model[0].weight)
            assert not pruned[1].weight.requires_grad and pruned[2].weight.requires_grad
        assert torch.equal(torch.cat([model[i].weight.flatten() for i in (1, 2)]), old)
        for amount in (-0.1, 1.5):
            with pytest.raises(ValueError, match=f"amount must be in 0 .. 1, got {amount}"):
                export.prune_unstructured(model, amount)
        with pytest.raises(ValueError, match="GELU has no Linear or Conv"):
            export.prune_unstructured(nn.GELU(), 0.5)

    @BOTH
    @pytest.mark.parametrize("prune", ["prune_heads", "prune_neurons"])
    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_pruned_models_equal_masked_ones(self, models, which, prune, keep):
        model = models[which].eval()
        module, writer, reader, width, n = "ffn", "0", "2", 1, 32
        if prune == "prune_heads":
            module, writer, reader, width, n = "self_attention", "qkv_proj", "out_proj", 8, 3
        scores = {f"{self.PLACES[which]}.{i}.{module}": torch.rand(n) for i in range(2)}
        smaller = getattr(export, prune)(model, scores, keep)
        gates = {}
        for name, score in scores.items():
            gate = (score >= score.sort().values[-keep]).float()
            gates[f"{name}.{reader}"] = gate.repeat_interleave(width)
        tokens = export_tokens(5, 40)
        masked = export_gated(model, gates)(tokens)
        check_close(smaller(tokens), masked, 1e-6)
        assert keep == n or (masked - model(tokens)).abs().max() > 1e-4  # the masks do something
        for name in scores:
            last = smaller.get_submodule(f"{name}.{reader}")
            assert last.weight.shape == (24, width * keep) == (last.out_features, last.in_features)
            first = smaller.get_submodule(f"{name}.{writer}")
            rows = width * keep * (3 if prune == "prune_heads" else 1)
            assert first.weight.shape == (rows, 24) == (first.out_features, first.in_features)
            assert model.get_submodule(f"{name}.{reader}").in_features == width * n, "left whole"
        for start in (model, smaller):
            again = export.load_pruned(start, smaller.state_dict())
            assert torch.equal(again(tokens), smaller(tokens)) and not again.training

    @BOTH
    def test_head_importance_is_the_derivative_by_a_gate(self, models, which):
        model = models[which].train()
        batches = [((export_tokens(b, t),), torch.randint(0, 2, (b,))) for b, t in ((4, 9), (3, 6))]
        found = export.head_importance(model, iter(batches))
        assert all(module.training and not module._forward_pre_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        examples = [pair for (x,), y in batches for pair in zip(x, y, strict=True)]
        for i in range(2):
            name = f"{self.PLACES[which]}.{i}.self_attention"
            check_close(found[name], export_derivative(model, f"{name}.out_proj", 3, examples), 1e-6)
        squared = export.head_importance(model, batches, lambda y, t: (y**2).sum())
        assert not torch.allclose(squared[name], found[name])

    @torch.no_grad()
    @pytest.mark.parametrize("frozen", [False, True])
    def test_neuron_importance_of_a_net_that_is_called_twice(self, frozen):
        """Both calls count (ALBERT); frozen weights, and a caller's no_grad, change nothing."""

        def net() -> nn.Sequential:
            return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 6))

        parts = {"net": net(), "unused": net(), "head": nn.Linear(6, 2)}
        model = ExportModule(lambda m, x: m.head(m.net(x + m.net(x))), **parts)
        model.requires_grad_(not frozen)
        x, y = torch.randn(10, 6), torch.randint(2, (10,))
        found = export.neuron_importance(model, list(zip(x.split(5), y.split(5), strict=True)))
        expected = export_derivative(model, "parts.net.3", 8, list(zip(x, y, strict=True)))
        check_close(found["parts.net"], expected, 1e-6)
        assert not found["parts.unused"].any()
        pruned = export.prune_neurons(model, found, keep=3)
        assert pruned.parts.net[0].out_features == 3 and pruned(x).shape == (10, 2)
        assert all(p.requires_grad == (not frozen) for p in pruned.parameters())  # frozen stays frozen

    def test_pruning_refuses_what_it_does_not_know(self, models):
        model = models["own"]
        heads = {f"layers.{i}.self_attention": torch.ones(3) for i in range(2)}
        neurons = {f"layers.{i}.ffn": torch.ones(32) for i in range(2)}
        for prune, scores, n in ((export.prune_heads, heads, 3), (export.prune_neurons, neurons, 32)):
            for keep in (0, n + 1):
                with pytest.raises(ValueError, match=rf"layers.0.*1 .. {n}.*{keep}"):
                    prune(model, scores, keep)
            for wrong in ({}, {name: torch.ones(5) for name in scores}):
                with pytest.raises(ValueError, match=f"of {n} scores, got 2, [05]$"):
                    prune(model, wrong, 2)
        for importance in (export.head_importance, export.neuron_importance):
            with pytest.raises(ValueError, match="GELU"):
                importance(nn.GELU(), [])
        with pytest.raises(ValueError, match="batches must hold at least one"):
            export.head_importance(model, [])

    def test_load_pruned_refuses_other_state_dicts(self, models):
        model = models["own"]
        state = model.state_dict()
        wide = state | {"layers.1.ffn.0.weight": torch.ones(99, 24)}
        less = {name: p for name, p in state.items() if "out_proj" not in name}
        for wrong in (wide, less, {}):
            with pytest.raises(ValueError, match="no state dict of a pruned Classifier"):
                export.load_pruned(model, wrong)

    def test_prune_heads_takes_plain_attention_alone(self):
        scores = {"0": torch.ones(2)}
        for change in ("scaled", "mask ignored", "tuple"):
            with pytest.raises(ValueError, match="ExportAttention is not plain softmax attention"):
                export.prune_heads(nn.Sequential(ExportAttention(change)), scores, 1)
        plain = ExportAttention()
        with pytest.raises(ValueError, match="stands in two places"):
            export.prune_heads(nn.Sequential(plain, plain), scores, 1)
        (smaller,) = export.prune_heads(nn.Sequential(plain), scores, 1)
        assert [p.requires_grad for p in smaller.parameters()] == [True, False, False]
        assert smaller.training and smaller.qkv_proj.bias is None

    def test_feed_forwards_are_linear_elementwise_linear(self):
        """A Softmax mixes neurons, a Dropout alone has none."""
        first, last = nn.Linear(4, 6), nn.Linear(6, 4)
        for n, *net in (
            (1, first, nn.ReLU(), last),
            (1, first, nn.GELU(), nn.Dropout(), last),
            (0, first, nn.Softmax(-1), last),
            (0, first, nn.ReLU(), nn.Dropout()),
            (0, nn.Dropout(), nn.ReLU(), last),
            (0, first, nn.LayerNorm(6), last),
            (0, first, last),
        ):
            assert len(export.feed_forwards(nn.Sequential(*net))) == n, net
        net = nn.Sequential(first, nn.ReLU(), last)
        smaller = export.prune_neurons(net, {"": torch.arange(6.0)}, 2)
        x = torch.randn(5, 4)
        assert torch.equal(export.load_pruned(net, smaller.state_dict())(x), smaller(x))

    # ---- the evidence

    def test_benchmark_alternates_and_counts(self, monkeypatch):
        """A clock that the models advance; the first call of a turn isn't counted."""
        now, calls = [0.0], []
        monkeypatch.setattr(export.time, "perf_counter", lambda: now[0])

        def model(name: str, later: float):
            def run(x: Tensor) -> None:
                calls.append(name)
                mine = calls.count(name)
                now[0] += 9.0 if mine <= 3 or mine % 3 == 1 else later * len(x)
                assert not torch.is_grad_enabled()

            return run

        runners = {"a": model("a", 0.001), "b": model("b", 0.004), "c": model("c", 0.002)}
        mix = [(torch.zeros(1, 4),), (torch.zeros(3, 4),)]
        results = export.benchmark(runners, {"mix": mix}, seconds=0.0)
        rounds = [tuple(calls[i : i + 9 : 3]) for i in range(0, len(calls), 9)]
        assert len(rounds) == 6  # one of warm-up, five that count
        assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
        assert results["a"]["mix"] == {"p50_ms": 2.0, "p90_ms": 3.0, "throughput": 1000.0}
        assert results["b"]["mix"]["throughput"] == 250.0 and results["c"]["mix"]["p50_ms"] == 4.0
        calls.clear()
        export.benchmark(runners, {"x": mix[:1]}, seconds=1000.0)
        assert len(calls) > 300  # as long as it may

    def test_export_all_recommends_by_agreement_and_says_what_is_refused(self, tmp_path):
        """The fastest that agrees, whatever the labels are."""
        x = torch.randn(64, 64)
        slow = nn.Sequential(nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 2), nn.Dropout(0.5))
        nn.init.constant_(slow[2].bias[:1], 5.0)  # its answer is mostly 0
        fast = nn.Sequential(export.Gate(), nn.Linear(64, 2))
        nn.init.zeros_(fast[1].weight)
        nn.init.constant_(fast[1].bias[1:], 5.0)  # its answer is always 1
        labels = torch.ones(64, dtype=torch.long)  # which would make it the most accurate
        cases = {"first": [(x,)], "other": [(x[:1],)]}
        models = {"it": slow, "fast": fast}
        out = tmp_path / "a/b"
        report = export.export_all(models, x, [((x,), labels)], cases, [], out, seconds=0.01)
        rows = {row["name"]: row for row in report["models"]}
        refused = report["refused"]
        assert {"fast, torch.export", "fast, ONNX int8, dynamic"} <= set(refused)
        assert "capture Sequential" in refused["fast, ONNX"]
        assert "ONNX int8, static" in refused  # without calibration
        for row in rows.values():
            assert row["size_bytes"] == (out / row["file"]).stat().st_size
            assert (row["batch"], row["seq_len"]) == (64, 64) and set(row["latency"]) == set(cases)
            assert row["p50_ms"] == row["latency"]["first"]["p50_ms"]
        agreeing = [row for row in rows.values() if row["agreement"] >= 0.99]
        assert report["recommended"] == min(agreeing, key=lambda row: row["p50_ms"])["name"]
        disagreeing = rows["fast, TorchScript, trace"]
        assert disagreeing["accuracy"] == 1 > rows["eager"]["accuracy"]
        assert disagreeing not in agreeing and rows["ONNX"] in agreeing
        assert slow.training and report["case"] == "first"
        assert report["threads"] == torch.get_num_threads()

    # ---- the demo

    @pytest.fixture(scope="class")
    def demo(self, tmp_path_factory):
        """A run of the demo in an empty folder, without a compiler and without a network."""
        folder = tmp_path_factory.mktemp("export")
        nowhere = "http://127.0.0.1:9"
        without = {"PATH": str(folder), "http_proxy": nowhere, "https_proxy": nowhere}
        arguments = "--seconds", "0.002", "--out", "run"
        result = run_script("export.py", *arguments, cwd=folder, timeout=600, **without)
        return folder / "run", result

    def test_demo_reports_all_formats(self, demo):
        out, result = demo
        summary, report = last_json(result), json_of(out / "report.json")
        assert result.stderr == "" and len(result.stdout.splitlines()[-1]) < 300
        assert summary["recommended"] == report["recommended"]
        rows = {row["name"]: row for row in report["models"]}
        formats = export.formats(nn.Identity(), None, None, "")
        expected = {"eager", *formats, *(f"pruned, {name}" for name in formats)}
        assert set(rows) | set(report["refused"]) == expected
        assert set(report["refused"]) == {n for n in expected if "bf16" in n and not export.has_bf16()}
        for name, row in rows.items():
            assert (row["batch"], row["seq_len"]) == (32, 256) and row["accuracy"] > 0.9
            if "pruned" not in name:
                exact = "int8" not in name and "bf16" not in name
                assert row["max_abs_diff"] <= (1e-4 if exact else 1)
                assert row["agreement"] >= (1 if exact else 0.99)
                assert row["accuracy"] >= rows["eager"]["accuracy"] - 0.003
        sizes = {name: row["size_bytes"] for name, row in rows.items()}
        assert max(sizes["pruned, ONNX"], sizes["ONNX int8, dynamic"]) < 0.6 * sizes["ONNX"]
        assert report["test_accuracy"] == summary["test_accuracy"] > 0.9
        assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
        assert not [p.name for p in out.iterdir() if p.name.endswith((".part", ".data"))]
        found = list(report["control_flow"].values())
        assert found == ["wrong, silently", "right", "refused"]  # trace, script, torch.export
        whole, most = report["zeros"]["0% zeros"], report["zeros"]["90% zeros"]
        assert whole["accuracy"] == rows["eager"]["accuracy"] > most["accuracy"]

    def test_demo_artefacts_answer_in_a_fresh_process(self, demo, tmp_path):
        """With the words from the metadata; a row of padding alone, too."""
        sentences = {
            "the plot was superb": "positive",
            "the plot was not superb": "negative",
            "the script was dull but the music was not awful": "positive",
            "the music was gripping but the cast was lifeless": "negative",
        }
        command = [sys.executable, "-I", "-W", "ignore", "-c", EXPORT_FRESH, str(demo[0]), *sentences]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        answers = last_json(result)
        weights = torch.load(demo[0] / "weights.pt", weights_only=True)
        model = export.Classifier(len(export.WORDS)).eval()
        model.load_state_dict(weights)
        reference = torch.tensor(answers["trace"][0])
        check_close(reference[-1], model(torch.zeros(1, 3, dtype=torch.long))[0].detach(), 1e-5)
        assert len(answers) == 8
        for name, (logits, labels) in answers.items():
            assert labels[:-1] == list(sentences.values()), name
            if "pruned" not in name:
                tolerance = 0.3 if "." in name else 1e-5
                check_close(torch.tensor(logits), reference, tolerance, name)


# -----------------------------------------------------------------------------
# classify_imdb.py

IMDB_SMALL = "--d-model 16 --n-heads 2 --d-ff 16 --n-layers 1 --vocab-size 400 --max-len 64 --epochs 1"
IMDB_SMALL = [*IMDB_SMALL.split(), "--min-steps", "0", "--no-export"]

# For the launcher: a run on few demo reviews without export and page. {here} makes something different.
IMDB_FEW = """
script.exit_now = script.ddp.exit_now
import os, sys
script.hardware = lambda device: {"gemm_gflops": 1.0}

def no_network():
    raise OSError("no network")

script.find_imdb = no_network
whole = script.load_corpus(script.Settings(data=""))
few = script.Corpus("demo", whole.labels, whole.train[:300], whole.test[:300], whole.unlabelled[:300])
script.load_corpus = lambda s: few
script.BUCKETS = 10_007  # a small table of odds: every step is saved
export_models, script.export_models = script.export_models, lambda *_: {"exported": True}
script.write_page = lambda *_: None

def die(*_, **__):
    os.kill(os.getpid(), 9)

def again(*_, **__):
    raise AssertionError("done again")

def late(step, warmup, steps, rate=script.ddp.warmup_cosine):
    return die() if step == 12 else rate(step, warmup, steps)

{here}
script.exit_now(script.main(sys.argv[1:]))
"""


class BreakingServer(http.server.BaseHTTPRequestHandler):
    """Serves self.data; the class attributes say how it fails."""

    data, sent_at_most, ranges, status = b"", None, True, 200
    asked: list = []  # the Range headers

    def do_GET(self):  # noqa: N802
        self.asked.append(self.headers.get("Range"))
        if self.status != 200:
            return self.send_error(self.status)
        start = int(self.headers["Range"][6:-1]) if self.ranges and self.headers.get("Range") else 0
        body = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.sent_at_most])

    def log_message(self, *_):
        pass


class TestClassifyImdb:
    @pytest.fixture(autouse=True)
    def small_table(self, monkeypatch):
        """A table of odds of two million rows takes a tenth of a second each time."""
        monkeypatch.setattr(imdb, "BUCKETS", 10_007)

    @staticmethod
    def corpus(n: int = 200, seed: int = 5) -> imdb.Corpus:
        pairs = enumerate(encoder.generate_reviews(3 * n, seed))
        reviews = [imdb.Review(i // 2, label, text) for i, (text, label) in pairs]
        unlabelled = [imdb.Review(i, -1, review.text) for i, review in enumerate(reviews[2 * n :])]
        return imdb.Corpus("demo", ["negative", "positive"], reviews[:n], reviews[n : 2 * n], unlabelled)

    @staticmethod
    def model(**settings) -> imdb.ReviewClassifier:
        sizes = {"d_model": 16, "n_heads": 2, "d_ff": 24, "max_len": 64, **settings}
        model = imdb.make_model(imdb.Settings(**sizes), 300).eval()
        if model.odds is not None:
            model.odds.table[1:] = torch.randn(imdb.BUCKETS, 1)
            model.odds.without_fold.copy_(torch.randn_like(model.odds.without_fold))
            model.odds.without_fold[:: imdb.BUCKETS + 1] = 0.0
        return model

    def training(self, out: Path, **settings):
        """(model, examples, dev, run, settings) of a training on 200 demo reviews."""
        sizes = {"d_model": 8, "d_ff": 8, "n_heads": 1, "n_layers": 1, "max_len": 16, "vocab_size": 300}
        rest = {"batch_size": 10, "epochs": 1, "min_steps": 0, "out": str(out)}
        s = imdb.Settings(**{**sizes, **rest, **settings})
        corpus = self.corpus()
        tokenizer = imdb.Tokenizer.train(corpus.train, s.vocab_size)
        parts = []
        for reviews in (corpus.train, corpus.test[:50]):
            parts.append(imdb.encode(tokenizer, reviews, [r.label for r in reviews], s.max_len))
        model = imdb.make_model(s, tokenizer.vocab_size)
        model.odds.fit(parts[0])
        return model, *parts, imdb.Run({}, tokenizer.ranks), s

    @staticmethod
    def imdb_files(per_folder: int) -> dict[str, str]:
        """Texts in IMDB's layout: {"train/pos/0_7.txt": text}."""
        names = [f"{f}/{i}_{7 if 'pos' in f else 2}.txt" for f in imdb.PER_FOLDER for i in range(per_folder)]
        return {name: f"{name}, a film<br />Über alles." for name in names}

    @staticmethod
    def tarball(path: Path, files: dict[str, str], prefix: str = "aclImdb/") -> Path:
        with tarfile.open(path, "w:gz") as tar:
            folder = tarfile.TarInfo(prefix + "train/pos")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, text in files.items():
                member = tarfile.TarInfo(prefix + name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
        return path

    @staticmethod
    def folder(path: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
        return path

    @staticmethod
    def table(path: Path, rows: list[tuple], columns=("text", "label")) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        return path

    @staticmethod
    def own_rows(n: int) -> list[tuple[str, str]]:
        """Reviews as people store them: quotes, commas, line breaks, emoji, nothing at all."""
        odd = ['"{}"', "{},\nhe said", "\U0001f600 {}", "", "  {}\r\n", "<script>{}</script> $x_1$"]
        reviews = encoder.generate_reviews(n, 7)
        return [(odd[i % len(odd)].format(t), ("bad", "good & fine")[y]) for i, (t, y) in enumerate(reviews)]

    # ---- oracles

    def test_ngram_ids_equal_a_loop(self):
        """By place: the bucket of the single, pair, triple that end there; 0 where one isn't a word."""
        for T in (1, 2, 3, 40):
            tokens = torch.randint(0, 30, (4, T))  # with padding (0) and hidden words (1) among them
            buckets = imdb.ngram_ids(tokens)
            assert buckets.shape == (4, T, 3)
            for b, t, n in itertools.product(range(4), range(T), (1, 2, 3)):
                gram = tokens[b, t - n + 1 : t + 1].tolist() if t >= n - 1 else []
                hashed = sum(x * f for x, f in zip(reversed(gram), imdb.FACTORS)) % imdb.BUCKETS + 1  # noqa: B905
                assert buckets[b, t, n - 1] == (hashed if gram and min(gram) >= 2 else 0)
        short = torch.randint(9000, 16_000, (2, 9), dtype=torch.int32)  # 32 bits would overflow
        assert torch.equal(imdb.ngram_ids(short), imdb.ngram_ids(short.long()))
        largest = torch.full((1, 3), 2**20)  # an id beyond any vocabulary here: no overflow
        assert imdb.ngram_ids(largest)[0, 2, 2] == sum(imdb.FACTORS) * 2**20 % imdb.BUCKETS + 1

    def test_odds_equal_counting_and_never_see_a_text_s_own_label(self):
        rng = random.Random(0)
        ids = [torch.randint(2, 12, (rng.randint(0, 12),)) for _ in range(40)]
        ids[0] = torch.tensor([imdb.BUCKETS])  # falls into bucket 1, the first
        targets = [rng.choice((0, 1, 0.4, 0.7)) for _ in ids]  # a teacher's opinion counts on its side
        folds = [rng.randrange(imdb.FOLDS) for _ in ids]
        odds = imdb.NgramOdds()
        odds.fit(imdb.Examples(ids, targets, folds))
        tables = [*odds.without_fold.view(imdb.FOLDS, -1), odds.table[:, 0]]
        for left_out, table in enumerate(tables):
            counts = collections.defaultdict(lambda: [1, 1])
            for x, target, fold in zip(ids, targets, folds, strict=True):
                for bucket in set(imdb.ngram_ids(x[None]).flatten().tolist()) - {0}:
                    counts[bucket][target > 0.5] += fold != left_out
            expected = torch.zeros(imdb.BUCKETS + 1)
            for bucket, (negative, positive) in counts.items():
                expected[bucket] = math.log(positive / negative)
            check_close(table, expected, 1e-6)
        reviews = [imdb.Review(n, label, "a") for label, N in ((0, 1000), (1, 50)) for n in range(N)]
        folds_of = imdb.encode(imdb.Tokenizer([b"a"]), reviews, [0.0] * 1050, 8).folds
        for label, fold in itertools.product((0, 1), range(imdb.FOLDS)):  # of each class a fifth
            found = [r.label for r, f in zip(reviews, folds_of, strict=True) if f == fold].count(label)
            assert found == (200, 10)[label]
        turned = [1 - t if fold == 2 else t for t, fold in zip(targets, folds, strict=True)]
        others = imdb.NgramOdds()
        others.fit(imdb.Examples(ids, turned, folds))
        x = ids[folds.index(2)][None]
        assert torch.equal(others(x, torch.tensor([2])), odds(x, torch.tensor([2])))
        assert not torch.equal(others(x), odds(x)) and not torch.equal(odds(x), odds(x, torch.tensor([2])))
        assert list(odds.state_dict()) == ["table"]

    @pytest.mark.parametrize("n", [21, 22, 23, 24])
    def test_model_is_its_parts_written_out(self, n):
        """Embedding * sqrt(C) + odds, 0 beyond the text; a product of five tokens at every fourth place."""
        model, tokens = self.model(n_layers=2), torch.randint(2, 300, (2, n))
        fold = torch.tensor([1, 3])
        rows = imdb.ngram_ids(tokens) + fold[:, None, None] * (imdb.BUCKETS + 1)
        tables = [model.odds.table[imdb.ngram_ids(tokens), 0], model.odds.without_fold[rows, 0]]
        for given, table in zip((None, fold), tables, strict=True):
            x = model.encoder.embedding(tokens) * 4 + table @ model.from_odds.weight.T
            x = torch.cat((torch.zeros(2, 2, 16), x, torch.zeros(2, 5, 16)), 1)
            starts = range(0, n + 2, 4)  # while one of five tokens is there
            y = torch.stack([model.shorten(x[:, i : i + 5].mT.flatten(1)) for i in starts], 1)
            y = y + encoder.sinusoidal_positional_encoding(64, 16)[: len(starts)]
            for layer in model.encoder.layers:
                y = layer(y, torch.ones(2, 1, 1, len(starts), dtype=torch.bool))
            y = model.encoder.final_norm(y)
            check_close(model(tokens, given), model.head(torch.cat((y.mean(1), y.amax(1)), 1)), 1e-5)

    def test_make_model_begins_as_the_mean_of_five_tokens_and_noise(self):
        a, b, c = (self.model(seed=n, d_model=128) for n in (0, 1, 0))
        assert torch.equal(a.head.weight, c.head.weight) and not torch.equal(a.head.weight, b.head.weight)
        assert 0.8 < a.from_odds.weight.std() < 1.2  # odds count from the start
        noise = a.shorten.weight.unflatten(1, (128, 5)) - torch.eye(128)[:, :, None] / 5
        assert noise.abs().max() <= 640**-0.5 + 1e-6 and noise.std() > 0.5 * 640**-0.5
        assert not hasattr(self.model(odds=False), "from_odds")

    def test_linear_model_weighs_by_naive_bayes(self):
        """Where the penalised loss is least, the weights are C times what the errors pull at."""
        reviews = [r._replace(text=f"The<br />{r.text}") for r in self.corpus(200, 1).train]
        labels = [r.label for r in reviews]
        linear, n_parameters = imdb.linear_model(reviews, labels)
        grams = []
        for review in reviews:
            words = re.findall(r"\w+|[^\w\s]", imdb.clean(review.text))
            spans = [(i, n) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)]
            grams.append({" ".join(words[i : i + n]) for i, n in spans})
        counts = collections.Counter(gram for held in grams for gram in held)
        names = sorted(gram for gram, n in counts.items() if n >= 2)
        x = np.array([[name in held for name in names] for held in grams]) * 1.0
        y = np.array(labels)
        assert n_parameters == len(names) + 1
        n0, n1 = (1 + x[y == label].sum(0) for label in (0, 1))
        x *= np.log(n1 / n1.sum()) - np.log(n0 / n0.sum())
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        p = np.array(linear(reviews))
        logits = x @ (30 * x.T @ (y - p))  # up to the intercept
        gaps = logits - np.log(p / (1 - p))
        assert np.abs(gaps - gaps.mean()).max() < 1 and ((p > 0.5) == y).mean() > 0.8

    def test_train_is_its_loop(self, tmp_path):
        """Rate, hidden words, folds, clipping, decay and randomness of each step, written out."""
        sizes = {"warmup": 7, "clip": 0.2, "weight_decay": 0.3, "epochs": 2, "seed": 3}
        model, examples, dev, run, s = self.training(tmp_path, **sizes)
        opinions = [0.6 * y + 0.3 for y in examples.targets]  # a teacher's
        examples = examples._replace(targets=opinions)
        other = copy.deepcopy(model)
        imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        matrices, vectors = ([p for p in other.parameters() if (p.ndim > 1) == big] for big in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        right = []
        for step, rows in enumerate(imdb.batches([len(x) for x in examples.ids], s, 0, 40)):
            torch.manual_seed(3 * 1_000_003 + step)
            tokens = imdb.pad([examples.ids[i] for i in rows])
            hidden = (torch.rand(tokens.shape) < 0.2) & (tokens > 0)
            logits = other.train()(tokens.masked_fill(hidden, 1), torch.tensor(examples.folds)[rows])
            y = torch.tensor(opinions)[rows]
            right += (logits.argmax(1) == y.round()).tolist()
            optimizer.zero_grad()
            log_p = logits.log_softmax(1)
            (-(1 - y) * log_p[:, 0] - y * log_p[:, 1]).mean().backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.2)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min((step + 1) / 7, 0.5 + 0.5 * math.cos(math.pi * step / 40))
            optimizer.step()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            check_close(one.detach(), two.detach(), 1e-6)
        assert not model.encoder.embedding.weight[imdb.PAD].any()  # padding stays nothing
        assert [row["step"] for row in run.history] == [10, 20, 30, 40] and run.step == 40
        shares = [statistics.fmean(right[i : i + 100]) for i in range(0, 400, 100)]
        assert [row["train_accuracy"] for row in run.history] == pytest.approx(shares, abs=1e-4)
        scores = imdb.log_odds(model.eval(), dev.ids, imdb.ALONE)  # dev is looked at without dropout
        loss = F.binary_cross_entropy_with_logits(scores, torch.tensor(dev.targets).double())
        assert run.history[-1]["dev_loss"] == round(loss.item(), 4) and run.seconds > 0
        saved = train_ddp.load_checkpoint(tmp_path)
        assert saved["run"]["step"] == 40 and torch.equal(saved["model"]["head.weight"], model.head.weight)

    def test_pruned_copy_is_its_loop(self, tmp_path):
        """The lower half of the layers, a quarter of heads and neurons; taught half by the whole model."""
        sizes = {"d_model": 16, "n_heads": 8, "n_layers": 5, "d_ff": 24, "clip": 0.05, "lr": 3e-3}
        model, examples, *_, s = self.training(tmp_path, **sizes)
        model.eval()
        model.head.bias.data += torch.tensor([0.0, 2.0])
        before = copy.deepcopy(model.state_dict())
        sample = imdb.in_batches(examples, every=2)
        assert sum(len(labels) for _, labels in sample) == 100
        other = copy.deepcopy(model)
        other.encoder.layers = other.encoder.layers[:2]
        other = export.prune_heads(other, export.head_importance(other, sample), keep=2)
        other = export.prune_neurons(other, export.neuron_importance(other, sample), keep=6).train()
        pruned = imdb.pruned_copy(model, sample, examples, s)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
        torch.manual_seed(s.seed)
        for step, rows in enumerate(imdb.batches([len(x) for x in examples.ids], s, 0, 20)):
            tokens, targets, folds = examples.batch(rows)
            halfway = 0.5 * targets + 0.5 * model(tokens, folds).softmax(-1)[:, 1].detach()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 1.5e-3 * (1 - step / 20)
            (imdb.hidden_loss(other, tokens, halfway, folds, s)[0] / 10).backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.05)
            optimizer.step()
        tokens = torch.randint(2, 300, (3, 16))
        check_close(pruned(tokens).detach(), other.eval()(tokens).detach(), 1e-5)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_plot_results_calibration_error_by_hand(self, tmp_path):
        p, y = torch.tensor([0.15] * 4 + [0.85, 0.95, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1, 0])
        # bins: 4 of 7 say 0.15, 0.25 is right; 1 says 0.85, right; 2 say 0.975, half of them right
        expected = (4 * 0.10 + 0.15 + 2 * 0.475) / 7
        history = [{"seconds": 1.0, "train_accuracy": 0.5, "dev_accuracy": 0.25}]
        error = imdb.plot_results(history, p.double().logit(), y, tmp_path / "c.png")
        assert error == pytest.approx(expected, abs=1e-4) and (tmp_path / "c.png").stat().st_size > 1000

    # ---- properties

    def test_tokenizer_encodes_any_text(self):
        reviews = [r._replace(text=r.text.upper() + "<br />") for r in self.corpus().train]
        tokenizer = imdb.Tokenizer.train(reviews, 400)
        assert tokenizer.ranks == imdb.Tokenizer.train(reviews, 400).ranks
        assert 300 < tokenizer.vocab_size <= 400
        merged = b"".join(token for token in tokenizer.ranks if len(token) > 1)
        assert merged and merged == merged.lower() and b"<" not in merged  # it learns clean texts
        odd = ["", "a", "Ünï <br />çødé \U0001f600 \x00\x7f 12345", reviews[0].text, "don't it's"]
        for raw, ids in zip(odd, tokenizer.encode(odd, 1000), strict=True):
            assert ids.dtype == torch.long and (not len(ids) or 2 <= ids.min() <= ids.max() < 400)
            assert tokenizer.bpe.decode([i - 2 for i in ids.tolist()]) == imdb.clean(raw)
        assert imdb.clean("A film.<br /><br />Über\t alles\n") == "a film. über alles"
        long = " ".join(r.text for r in reviews[:20])
        (whole,) = tokenizer.encode([long], 10_000)
        for max_len in (1, 2, 7, 64, len(whole) - 1, len(whole), len(whole) + 1):
            (short,) = tokenizer.encode([long], max_len)
            head = max_len // 2 if max_len < len(whole) else len(whole)
            tail = min(max_len, len(whole)) - head
            assert torch.equal(short, torch.cat((whole[:head], whole[len(whole) - tail :])))
        one, two = whole[0].item(), whole[1].item()
        assert imdb.pad([whole[:2], whole[:0], whole[:1]]).tolist() == [[one, two], [0, 0], [one, 0]]
        assert imdb.pad([whole[:0]]).tolist() == [[0]]

    def test_batches_hold_each_text_once_an_epoch_and_little_padding(self):
        """In another order each epoch and seed; from any step on as if there had been no break."""
        rng = random.Random(0)
        for n in (1, 31, 32, 33, 5000):
            lengths = [min(256, int(rng.expovariate(1 / 200)) + 1) for _ in range(n)]
            s, per_epoch = imdb.Settings(seed=1), -(-n // 32)
            whole = list(imdb.batches(lengths, s, 0, 2 * per_epoch + 1))
            first, second = whole[:per_epoch], whole[per_epoch:-1]
            for epoch in (first, second):
                assert sorted(i for rows in epoch for i in rows) == list(range(n))
            assert len(whole) == 2 * per_epoch + 1 and all(0 < len(rows) <= 32 for rows in whole)
            for step in (0, 1, per_epoch, len(whole) - 1, len(whole)):
                assert list(imdb.batches(lengths, s, step, len(whole))) == whole[step:]
        assert sum(len(rows) * max(lengths[i] for i in rows) for rows in first) < 1.1 * sum(lengths)
        longest = [max(lengths[i] for i in rows) for rows in first[:50]]
        assert longest != sorted(longest)  # not the short ones first
        other = list(imdb.batches(lengths, imdb.Settings(seed=2), 0, per_epoch))
        for one, two in itertools.combinations((first, second, other), 2):
            assert len({tuple(sorted(rows)) for rows in one} & {tuple(sorted(rows)) for rows in two}) < 3

    def test_dev_split_is_blocks_of_neighbours(self):
        """A tenth of each class; neighbours are in two splits at the blocks' ten edges and nowhere else."""
        for per_class in (12_500, 4000, 50):
            reviews = [imdb.Review(number, label, "") for label in (1, 0) for number in range(per_class)]
            train, dev = imdb.split_dev(imdb.Corpus("imdb", ["a", "b"], reviews, []))
            assert sorted(train + dev) == sorted(reviews) and len(dev) == 2 * per_class // 10
            for label in (0, 1):
                numbers = {r.number for r in dev if r.label == label}
                edges = [n for n in range(per_class - 1) if (n in numbers) != (n + 1 in numbers)]
                assert len(numbers) == per_class // 10 and len(edges) == 10
                assert max(edges) - min(edges) > per_class // 2  # drawn from several places
        assert sorted({r.number for r in dev}) == [4, 14, 24, 34, 44]
        own = imdb.Corpus("own", ["a", "b"], [imdb.Review(i, i % 3 == 0, "") for i in range(60)], [])
        train, dev = imdb.split_dev(own)
        assert sorted(train + dev) == sorted(own.train) and sum(r.label for r in dev) == 2 and len(dev) == 6

    @torch.no_grad()
    def test_model_padding_and_batch_invariance(self):
        """A text's answer is its own, whatever stands beside it; each of its tokens counts."""
        model = self.model()
        for n, T in itertools.product((1, 2, 3, 4, 5, 17, 62), (0, 1, 2, 64)):
            tokens = torch.randint(2, 300, (3, n))
            padded = torch.zeros(4, max(n + T if T < 64 else 64, n), dtype=torch.long)[:, :64]
            padded[:3, :n] = tokens
            check_close(model(padded)[:3], model(tokens), 1e-5)
            assert torch.equal(model(padded)[3], model.head.bias)  # a row of padding alone
        for T in range(1, 14):
            tokens = torch.full((1, T), 7)
            others = tokens.repeat(T, 1) + torch.eye(T, dtype=torch.long)  # each with one other token
            assert (model(others) != model(tokens)).any(1).all(), T
        for max_len in (4, 5, 63, 64, 65):
            assert self.model(max_len=max_len)(torch.full((1, max_len), 7)).shape == (1, 2)
        ids = [torch.randint(2, 300, (random.Random(i).randint(0, 50),)) for i in range(150)]
        scores = imdb.log_odds(model, ids, imdb.ALONE)  # in the order given
        for i in (0, 1, 70, 149):
            logits = model(imdb.pad([ids[i]])).double()[0]
            check_close(scores[i], logits[1] - logits[0], 1e-5)
        assert imdb.accuracy(torch.tensor([2.0, -1.0, -2.0, 0.1]), torch.tensor([1, 0, 1, 0])) == 0.5

    def test_explain_speaks_in_log_odds(self):
        """A model that counts one word: hiding it moves the answer by as much as it counts, however sure."""
        tokenizer = imdb.Tokenizer.train(self.corpus().train, 400)
        text = "a superb film, naïve хорошо don't and superb"
        (ids,) = tokenizer.encode([text], 99)
        film = tokenizer.encode(["a film"], 99)[0][-1]

        def run(tokens: torch.Tensor) -> torch.Tensor:
            there = (tokens == film).any(1).float()
            return torch.stack((torch.zeros(len(tokens)), 9 + 5 * there), 1)

        answer = imdb.explain(ids, torch.tensor([14.0]), tokenizer, run)
        assert answer[0] == ["film,", 5.0] and all(effect == 0 for _, effect in answer[1:])
        assert sorted(word for word, _ in answer) == sorted(text.split())
        assert imdb.explain(ids[:0], torch.tensor([0.0]), tokenizer, run) == []
        (ids,) = tokenizer.encode(["a b c d e f g h i j k l"], 99)
        assert len(imdb.explain(ids, torch.tensor([1.0]), tokenizer, run)) == 10

    def test_worst_mistakes_come_first(self):
        corpus = self.corpus(40)
        labels = torch.tensor([r.label for r in corpus.test])
        scores = torch.linspace(-4, 4, 40)[torch.randperm(40)]
        found = imdb.worst_mistakes(scores, corpus)
        right = torch.where(labels == 1, scores, -scores).sigmoid().sort().values
        n_wrong = min(20, (right < 0.5).sum().item())
        assert [m["probability"] for m in found] == pytest.approx(right[:n_wrong].tolist(), abs=1e-4)
        by_text = {r.text: r.label for r in corpus.test}
        assert all(m["label"] == corpus.labels[by_text[m["text"]]] for m in found)

    # ---- data

    def test_read_imdb_takes_tarball_and_folder_alike(self, tmp_path, monkeypatch):
        """Nothing is unpacked: members whose paths lead elsewhere are no reviews."""
        monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 12))
        monkeypatch.setattr(imdb, "UNLABELLED", {"train/unsup": 12})
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        files = self.imdb_files(12)
        odd = {"README": "", "train/pos/._0_7.txt": "", "train/pos/../../../evil.txt": "out"}
        more = {f"train/unsup/{i}_0.txt": f"unsup {i}" for i in range(12)}
        tarball = self.tarball(tmp_path / "a.tar.gz", files | odd | more)
        found = imdb.read_imdb(tarball)
        outer = self.folder(tmp_path / "there" / "aclImdb", files | more).parent
        assert found == imdb.read_imdb(outer) == imdb.read_imdb(outer / "aclImdb")
        assert found == imdb.read_imdb(self.tarball(tmp_path / "b.tar.gz", files, prefix="./aclImdb/"))
        assert (found.name, found.labels, found.unlabelled) == ("imdb", ["negative", "positive"], [])
        for split in ("train", "test"):
            reviews = getattr(found, split)
            assert [(r.number, r.label) for r in reviews] == [(i, y) for y in (1, 0) for i in range(12)]
            for r in reviews:
                assert r.text.startswith(f"{split}/{'pos' if r.label else 'neg'}/{r.number}_")
        unlabelled = [imdb.Review(i, -1, f"unsup {i}") for i in range(12)]
        expected = dataclasses.replace(found, unlabelled=unlabelled)
        assert imdb.read_imdb(tarball, unlabelled=True) == expected == imdb.read_imdb(outer, unlabelled=True)
        with pytest.raises(ValueError, match="0 of 12 texts in train/unsup"):
            imdb.read_imdb(tmp_path / "b.tar.gz", unlabelled=True)
        assert not list(tmp_path.rglob("evil*"))
        gaps = {name.replace("/0_", "/99999_"): text for name, text in files.items()}
        gapped = imdb.read_imdb(self.folder(tmp_path / "gaps", gaps))
        assert [r.number for r in gapped.test[:12]] == list(range(12))

    def test_load_corpus_takes_no_part_of_imdb_for_the_whole(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 12))
        files = self.imdb_files(12)
        long = " ".join(f"{random.Random(i).random()}" for i in range(5000))  # most bytes lie inside a text
        whole = self.tarball(tmp_path / "whole.tar.gz", files | {"train/unsup/0_0.txt": long})
        fewer = {name: text for name, text in files.items() if not name.startswith("test/neg")}
        less = {name: text for name, text in files.items() if name != "train/neg/11_2.txt"}
        self.folder(tmp_path / "part/aclImdb", fewer)
        self.folder(tmp_path / "less/aclImdb", less)
        self.tarball(tmp_path / "part.tar.gz", fewer)
        self.tarball(tmp_path / "more.tar.gz", files | {"test/pos/30_7.txt": "one more"})
        (tmp_path / "text").write_text("no tarball")
        (tmp_path / "plain.gz").write_bytes(gzip.compress(b"no tar in it" * 100))
        refused = [
            ("nowhere", "does not exist"), ("text", "truncated, altered"), ("plain.gz", "truncated, altered"),
            ("part/aclImdb", "0 of 12 texts in test/neg"), ("part", "0 of 12 texts in test/neg"),
            ("part/aclImdb/train", "0 of 12"), ("part.tar.gz", "0 of 12 texts in test/neg"),
            ("less/aclImdb", "11 of 12 texts in train/neg"), ("more.tar.gz", "13 of 12 texts in test/pos"),
        ]  # fmt: skip
        data = whole.read_bytes()
        header = 10 + len("whole.tar") + 1  # gzip's own: time and file name, no text
        broken = [data[:cut] for cut in (3, len(data) // 2, len(data) - 9, len(data) - 1)]
        for place in random.Random(0).sample(range(header, len(data)), 20):
            broken.append(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        for i, content in enumerate(broken):
            (tmp_path / f"broken{i}").write_bytes(content)
            refused.append((f"broken{i}", "truncated, altered"))
        for name, words in refused:
            with pytest.raises(ValueError, match=f"--data .*{words}"):
                imdb.load_corpus(imdb.Settings(data=str(tmp_path / name)))
        folder = self.folder(tmp_path / "renamed", files)  # as large as IMDB: it is IMDB
        for path in (whole, folder):
            assert imdb.load_corpus(imdb.Settings(data=str(path))).name == "imdb"
            assert "not exactly the published" in capsys.readouterr().out
        corpus = imdb.read_imdb(whole)
        monkeypatch.setattr(imdb, "IMDB_FINGERPRINT", imdb.fingerprint(corpus))
        assert imdb.load_corpus(imdb.Settings(data=str(whole))) == corpus and not capsys.readouterr().out

    def test_read_own_takes_tables_and_folders(self, tmp_path):
        rows = self.own_rows(100)
        corpus = imdb.load_corpus(imdb.Settings(data=str(self.table(tmp_path / "my.csv", rows))))
        assert (corpus.name, corpus.labels) == ("own", ["bad", "good & fine"])
        assert len(corpus.train) == 90 and len(corpus.test) == 10 and sum(r.label for r in corpus.test) == 5
        found = [(r.text, corpus.labels[r.label]) for r in corpus.train + corpus.test]
        assert sorted(found) == sorted(rows) and not set(corpus.train) & set(corpus.test)
        for part in ("train", "test"):
            other = [(label, part, text) for text, label in rows]
            self.table(tmp_path / f"two/{part}.csv", other, ("label", "x", "text"))
        two = imdb.read_own(tmp_path / "two")
        by_label = sorted(rows, key=lambda row: row[1])
        assert two.train == two.test and [(r.text, two.labels[r.label]) for r in two.train] == by_label
        assert [r.number for r in two.train] == 2 * list(range(50))  # of its label
        texts = {f"{part}/{label}/{i}.txt": f"{part} {i} {label}" for part, n in (("train", 30), ("test", 5))
                 for label in ("no", "yes") for i in range(n)}  # fmt: skip
        folder = self.folder(tmp_path / "own", texts | {"train/no/.hidden.txt": "", "train/readme.txt": ""})
        (folder / "train/yes/0.txt").write_bytes(b"\xef\xbb\xbfmark")
        own = imdb.read_own(folder)
        assert own.labels == ["no", "yes"] and (len(own.train), len(own.test)) == (60, 10)
        assert own.train[30].text == "mark" and {r.text.split()[-1] for r in own.test if r.label} == {"yes"}

    def test_read_own_refuses(self, tmp_path):
        many = "text,label\n" + "a,x\na,y\n" * 10
        for i, (files, words) in enumerate([
            ({"train.csv": many + "c,z\n", "test.csv": many}, "'x', 'y', 'z'.*two"),
            ({"train.csv": "text,label\na,x\n", "test.csv": "text,label\na,x\n"}, r"labels \['x'\]"),
            ({"train.csv": "text,label\n" + "a,x\n" * 9 + "a,y\n" * 10, "test.csv": many}, "9 texts x"),
            ({"train.csv": "review,label\na,x\n", "test.csv": many}, "train.csv has no column 'text'"),
            ({"train.csv": "text,label\na,x\nb\n", "test.csv": many}, "labels"),
            ({"train.csv": 'text,label\n"a,x\n', "test.csv": many}, "train.csv: line"),
            ({"train.csv": many}, "test.csv"),
            ({"train.csv": many, "test.csv": "text,label\n"}, "no texts to test"),
            ({"train/x/0.txt": "a", "train/y/0.txt": "b"}, "1 texts x"),
            ({"a.txt": "a"}, r"labels \[\]"),
        ]):  # fmt: skip
            with pytest.raises((ValueError, OSError), match=words):
                imdb.read_own(self.folder(tmp_path / str(i), files))
        for encoding in ("latin-1", "utf-16"):
            (tmp_path / "a.csv").write_bytes("naïve".encode(encoding))
            with pytest.raises(ValueError, match="a.csv is not UTF-8"):
                imdb.read_own(tmp_path / "a.csv")
        self.table(tmp_path / "a.csv", self.own_rows(60))
        with pytest.raises(ValueError, match="no unlabelled"):
            imdb.load_corpus(imdb.Settings(data=str(tmp_path / "a.csv"), unlabelled=True))

    @staticmethod
    def serve(data: bytes, **given):
        """Starts a server on 127.0.0.1, which ends with the tests; returns (url, the handler class)."""
        handler = type("Handler", (BreakingServer,), {"data": data, "asked": [], **given})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/file", handler

    def test_download_goes_on_from_what_arrived(self, tmp_path, monkeypatch):
        data = random.Random(0).randbytes(1_000_000)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(imdb, "IMDB_SIZE", len(data))
        monkeypatch.setattr(imdb, "IMDB_MD5", hashlib.md5(data).hexdigest())
        got, part = tmp_path / "imdb/aclImdb_v1.tar.gz", tmp_path / "imdb/aclImdb_v1.tar.gz.part"
        got.parent.mkdir()
        for before, given, asked in [
            (b"", {}, [None]),
            (b"", {"sent_at_most": 300_000}, [None, *(f"bytes={n}00000-" for n in (3, 6, 9))]),  # breaks off
            (data[:400_000], {}, ["bytes=400000-"]),  # left by a run that was killed
            (data[:400_000], {"ranges": False}, ["bytes=400000-"]),  # sends all of it again
        ]:
            part.write_bytes(before)
            url, server = self.serve(data, **given)
            monkeypatch.setattr(imdb, "IMDB_URL", url)
            assert imdb.find_imdb() == got
            assert got.read_bytes() == data and server.asked == asked and not part.exists()
            assert imdb.find_imdb() == got and server.asked == asked  # the second time it is there
            got.unlink()
        altered = data[:123_456] + bytes([data[123_456] ^ 1]) + data[123_457:]
        never_further = self.serve(data, sent_at_most=100_000, ranges=False)[0]
        for url, words in [
            (self.serve(altered)[0], "md5"),
            (self.serve(data + b"more")[0], "md5"),  # wrong bytes are no start for the next attempt
            (self.serve(data, status=404)[0], "404"),
            ("http://127.0.0.1:9/file", "refused"),
            (never_further, "100,000 of 1,000,000"),
        ]:
            monkeypatch.setattr(imdb, "IMDB_URL", url)
            with pytest.raises(OSError, match=f"{url}.*{words}"):
                imdb.find_imdb()
            assert not got.exists() and part.exists() == (words != "md5")
        assert part.read_bytes() == data[:100_000]

    # ---- command line and the run in OUT

    def test_parse_flags_override_their_preset(self):
        assert imdb.parse([]) == imdb.Settings() and imdb.Settings().preset == "fast"
        best = imdb.parse("--preset best --epochs 1 --no-export".split())
        assert (best.epochs, best.unlabelled, best.max_len, best.export) == (1, True, 1024, False)
        assert not imdb.parse(["--preset=plain"]).odds and imdb.parse(["--preset=plain"]).max_len == 512
        assert not imdb.parse("--preset best --no-unlabelled".split()).unlabelled
        assert imdb.parse(["--vocab-size", "258"]).vocab_size == 258  # the least

    def test_main_refuses_what_makes_no_sense(self, capsys, monkeypatch):
        """In one line that names the flag; what tyro refuses has a box of its own."""
        monkeypatch.setattr(imdb, "classify", None)
        for arguments in ("--lr nan", "--seed 4294967296", "--epochs 0", "--lr 0", "--batch-size -1",
                          "--mask-words 1", "--vocab-size 257", "--n-heads 3", "--target 1", "--explain",
                          "--warmup 0", "--clip 0", "--max-len 3", "--weight-decay -1", "--save-every nan",
                          "--dropout 1", "--min-steps -1", "--predict "):  # fmt: skip
            assert imdb.main(arguments.split(" ")) == 2, arguments
            (line,) = capsys.readouterr().err.splitlines()
            assert arguments.split()[0].lstrip("-").replace("-", "_") in line
        for arguments in ("--widht 3", "--preset slow"):
            with pytest.raises(SystemExit, match="2"):
                imdb.parse(arguments.split())

    def test_open_run_knows_its_own(self, tmp_path, monkeypatch):
        """Settings that are bound to a run, its texts, other programs' files, finished runs."""
        corpus = self.corpus(20)
        monkeypatch.setattr(imdb, "load_corpus", lambda s: corpus)
        lock_out = functools.partial(train_ddp.lock_out, patience=0.1)
        monkeypatch.setattr(train_ddp, "lock_out", lambda out: None)
        s = imdb.Settings(out=str(tmp_path))
        _, run = imdb.open_run(s, {})
        run.step = 5
        train_ddp.save_checkpoint(tmp_path, 5, {"run": vars(run), "model": {}})
        (tmp_path / "tmp1.part").mkdir()
        may_change = "data predict explain baseline device export keep_exports save_every".split()
        for name, value in dataclasses.asdict(s).items():
            other = f"{value}x" if isinstance(value, str) else 1 - value
            changed = dataclasses.replace(s, **{name: other})
            if name in may_change:
                assert imdb.open_run(changed, {})[1].step == 5
            elif name != "out":
                with pytest.raises(ValueError, match=f"another run.*{name}"):
                    imdb.open_run(changed, {})
        assert not (tmp_path / "tmp1.part").exists()
        monkeypatch.setattr(imdb, "print_end", print)
        for content, finished in [
            ({"settings": run.settings, "exported": False}, [False, True]),  # not all of a run with exports
            ({"settings": run.settings, "exported": True}, [True, True]),
            ({"settings": {}, "exported": True}, [False, False]),
            ([], [False, False]),
        ]:
            (tmp_path / "report.json").write_text(json.dumps(content))
            runs = [imdb.open_run(dataclasses.replace(s, export=export), {})[1] for export in (True, False)]
            assert [run is None for run in runs] == finished, content
            kept = dataclasses.replace(s, keep_exports=True)
            assert imdb.open_run(kept, {})[1] is not None  # exports weren't kept
        (tmp_path / "report.json").write_text("no json")
        monkeypatch.setattr(train_ddp, "lock_out", lock_out)
        kept = {}
        assert imdb.open_run(s, kept)[1].step == 5 and kept["model"] == {}
        with pytest.raises(ValueError, match="in use"):
            imdb.open_run(s, {})
        kept["lock"].close()
        for part, change in itertools.product(("train", "test", "unlabelled"), ({"text": "x"}, {"label": 7})):
            rows = getattr(corpus, part)
            right, rows[3] = rows[3], rows[3]._replace(**change)
            with pytest.raises(ValueError, match="texts"):
                imdb.open_run(s, {})
            rows[3] = right
        train_ddp.save_checkpoint(tmp_path, 9, {"weights": 1})  # another program's
        with pytest.raises(ValueError, match="another run"):
            imdb.open_run(s, {})

    def test_train_stops_at_its_target(self, tmp_path):
        """Not before dev is past it by more than its standard error; what is reached isn't trained again."""
        model, examples, dev, run, s = self.training(tmp_path, target=0.55, epochs=8, lr=1e-2, warmup=1)
        imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        limit = 0.55 + (0.55 * 0.45 / 50) ** 0.5
        accuracies = [row["dev_accuracy"] for row in run.history]
        assert run.reached and run.step < 160 and accuracies[-1] > limit >= max(accuracies[:-1])
        assert run.history[0]["step"] == round(160 / (16 * 8))
        saved = train_ddp.load_checkpoint(tmp_path)
        again = imdb.Run(**saved["run"])
        imdb.train(model, examples, dev, again, saved, s, imdb.ALONE)
        assert again.step == run.step == saved["run"]["step"]

    def test_train_saves_nothing_that_is_not_finite(self, tmp_path):
        """One infinite gradient, as of a bad batch: the last checkpoint stays finite."""
        model, examples, dev, run, s = self.training(tmp_path, save_every=0.0)
        handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
        calls = itertools.count()
        model.head.weight.register_hook(lambda g: g * (math.inf if next(calls) == 5 else 1))
        with pytest.raises(train_ddp.Stop, match="gradient.*step 5.*--lr"):
            imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        saved = train_ddp.load_checkpoint(tmp_path)
        assert saved["run"]["step"] == 5 and all(x.isfinite().all() for x in saved["model"].values())

    def test_page_shows_any_text_as_text(self, tmp_path):
        model, *_, run, _ = self.training(tmp_path)
        texts = ['<script>alert(1)</script> "a" & b', "<b>dull</b>"]
        reviews = [imdb.Review(0, i, text) for i, text in enumerate(texts)]
        mistakes = [{"label": "<i>", "probability": 0.1, "text": text} for text in texts]
        report = {"dataset": "own", "test_accuracy": 0.5, "mistakes": mistakes}
        corpus = imdb.Corpus("own", ["<i>", "&"], [], reviews)
        imdb.write_page(report, model.eval(), imdb.Tokenizer(run.ranks), corpus, tmp_path)
        tags = []
        parser = html.parser.HTMLParser()
        parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
        parser.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
        frames = [attributes["srcdoc"] for tag, attributes in tags if tag == "iframe"]
        assert frames == [(tmp_path / f"attention_{i}.html").read_text(encoding="utf-8") for i in (0, 1)]
        assert not {"script", "b", "i"} & {tag for tag, _ in tags} and ("h1", {}) in tags
        for n in range(12):  # one word a place, and the last one there
            text = "abcdefghijkl"[:n]
            weights, words = imdb.attention_of(model, imdb.Tokenizer([bytes([i]) for i in range(256)]), text)
            assert weights.shape == (1, 1, len(words), len(words)) and "".join(words) == (text or "(nothing)")

    # ---- runs

    @pytest.fixture(scope="class")
    @classmethod
    def own_run(cls, tmp_path_factory):
        """A run on rows of one's own, as a user starts it, with all that it does by default."""
        folder = tmp_path_factory.mktemp("own")
        cls.table(folder / "my.csv", cls.own_rows(2300))  # enough for a pruned copy
        sizes = "--d-model 32 --n-heads 4 --d-ff 32 --vocab-size 500 --max-len 80 --min-steps 120 --lr 5e-3"
        arguments = ["--data", "my.csv", "--out", "out/classify_imdb", *sizes.split()]
        return folder, run_script("classify_imdb.py", *arguments, cwd=folder, PYTHONIOENCODING="ascii")

    def test_own_texts_work_whole(self, own_run):
        folder, result = own_run
        out = folder / "out/classify_imdb"
        summary, report = last_json(result), json_of(out / "report.json")
        assert len(result.stdout.splitlines()[-1]) < 300 and "random" in result.stdout
        assert summary["report"] == "out/classify_imdb/report.json" and "index.html" in result.stdout
        assert all(summary[name] == report[name] for name in summary if name != "report")
        names = "train_seconds total_seconds n_parameters n_counted preset seed cpu threads gemm_gflops torch"
        assert all(report[name] is not None for name in names.split())
        assert report["dataset"] == "own" and report["settings"]["labels"] == ["bad", "good & fine"]
        assert report["n_counted"] == 2_097_144 and report["test_accuracy"] >= 0.6
        assert 0 < report["train_seconds"] < report["total_seconds"] and report["history"][-1]["step"] == 120
        rows = {row["name"]: row for row in report["models"]}
        assert {"eager", "ONNX", "pruned, ONNX", "pruned, ONNX int8, dynamic, embeddings"} <= set(rows)
        best = rows[report["recommended"]]
        near = [r for r in rows.values() if r["agreement"] >= 0.95 and r is not rows["eager"]]
        assert best in near and best["p50_ms"] == min(row["p50_ms"] for row in near)
        assert [row["name"] for row in rows.values() if row["file"]] == [best["name"]]
        assert best["size_bytes"] == (out / "model.onnx").stat().st_size
        assert rows["ONNX"]["max_abs_diff"] <= 1e-5
        assert len(list(out.glob("step_*.pt"))) == 1 and not (out / "export").exists()
        assert sum(path.stat().st_size for path in out.rglob("*")) < 60e6
        page = (out / "index.html").read_text(encoding="utf-8")
        assert page.index("<h1>") < page.index("<table>") and page.count("data:image/png;base64") == 2
        assert not re.search(r"(src|href)=.?(http|//|/)", page) and "good &amp; fine" in page

    def test_predict_answers_line_by_line(self, own_run, tmp_path, capsys, monkeypatch):
        out = own_run[0] / "out/classify_imdb"
        monkeypatch.chdir(tmp_path)
        long = "the plot was clever , " * 2000  # far over the length that a file name may have
        text = "they call it dull"
        (tmp_path / "texts.txt").write_text(text + "\n\n  \na dull\x85film\u2028x\n", encoding="utf-8-sig")

        def predict(*what: str) -> list[dict]:
            assert imdb.main(["--out", str(out), "--predict", *what]) == 0
            return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        (answer,) = predict(text)
        assert set(answer) == {"label", "probability", "text", "probabilities"}
        p = answer["probabilities"]
        assert list(p) == ["bad", "good & fine"] and sum(p.values()) == pytest.approx(1)
        assert answer["label"] == max(p, key=p.get) and answer["probability"] == max(p.values())
        assert [a["text"] for a in predict("texts.txt")] == [text, "a dull\x85film\u2028x"]
        assert predict("texts.txt")[0] == answer and predict(long)[0]["text"] == long
        (explained,) = predict(text, "--explain")
        effects = [abs(effect) for _, effect in explained["explain"]]
        assert len(effects) == 4 and effects == sorted(effects, reverse=True) and effects[0] > 0
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        imdb.main(["--out", str(out), "--predict", text, "--explain"])
        first, *words = capsys.readouterr().out.splitlines()
        assert first.startswith(answer["label"]) and "P(good & fine)" in first and len(words) == 4

    def test_predict_streams(self, own_run):
        """A line is answered before the next one comes; onnxruntime and tiktoken alone, as README has them,
        give the same answer in a folder without the project's files."""
        folder, _ = own_run
        command = [sys.executable, str(ROOT / "classify_imdb.py"), "--predict", "-"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        answers = []
        with subprocess.Popen(command, cwd=folder, **pipes) as process:
            clock = threading.Timer(60, process.kill)
            clock.start()
            for text in ("one", "A film to remember."):
                process.stdin.write(text + "\n")
                process.stdin.flush()
                answers.append(json.loads(process.stdout.readline()))
                assert answers[-1]["text"] == text
            process.stdin.close()
            assert process.wait(60) == 0
            clock.cancel()
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (snippet,) = (
            part for part in re.findall("```python\n(.+?)```", readme, re.S) if "onnxruntime" in part
        )
        pipes = {"capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run([sys.executable, "-I", "-c", snippet], cwd=folder, **pipes)
        assert result.returncode == 0, result.stderr
        numbers = [float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", result.stdout)]
        assert numbers == pytest.approx(list(answers[-1]["probabilities"].values()), abs=1e-3)

    def test_predict_refuses(self, own_run, tmp_path, capsys):
        whole = (own_run[0] / "out/classify_imdb/model.onnx").read_bytes()
        (tmp_path / "blank.txt").write_text("\n  \n")
        (tmp_path / "utf16.txt").write_bytes("praise".encode("utf-16"))
        (tmp_path / "bad").mkdir()
        for content, what, words in [
            (None, "a text", "no .*model.onnx yet.*train"),
            (b"no model", "a text", "model.onnx is damaged"),
            (whole[:5000], "a text", "model.onnx is damaged"),
            (whole, str(tmp_path / "blank.txt"), "no text"),
            (whole, "  ", "no text"),
            (whole, str(tmp_path / "utf16.txt"), "utf-8"),
            (whole, str(tmp_path), "directory"),
        ]:
            if content:
                (tmp_path / "bad/model.onnx").write_bytes(content)
            assert imdb.main(["--out", str(tmp_path / "bad"), "--predict", what]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.search(words, line), line

    @pytest.fixture(scope="class")
    @classmethod
    def ranks(cls, tmp_path_factory):
        launcher = Launcher(tmp_path_factory.mktemp("imdb_ranks"), "classify_imdb")
        yield launcher
        launcher.end()

    @staticmethod
    def code(here: str = "") -> str:
        return IMDB_FEW.replace("{here}", here)

    def test_demo_runs_without_network(self, ranks, tmp_path):
        """It says so, and learns twins, which can't be told by single words."""
        here = "few = script.Corpus('demo', whole.labels, whole.train[:3000], whole.test[:500])"
        here += "; script.export_models = export_models"
        sizes = "--d-model 32 --d-ff 32 --lr 5e-3 --min-steps 200".split()
        (result,) = ranks.run(1, *IMDB_SMALL, *sizes, "--out", str(tmp_path), code=self.code(here))
        report = last_json(result)
        assert "IMDB WAS NOT FOUND" in result.stdout and imdb.IMDB_URL in result.stdout
        assert report["dataset"] == "demo" and report["test_accuracy"] > 0.8
        assert [row["name"] for row in json_of(tmp_path / "report.json")["models"]] == ["eager", "ONNX"]

    def test_killed_anywhere_ends_in_the_same_weights(self, ranks, tmp_path):
        """kill -9 in each stage, then the same command; what was finished isn't done again."""
        arguments = [*IMDB_SMALL, "--unlabelled", "--save-every", "0"]
        (whole,) = ranks.run(1, *arguments, "--out", str(tmp_path / "whole"), code=self.code())
        out = tmp_path / "killed"
        stages = [  # where it is killed; the step of what is left
            ("Tokenizer.train", None), ("linear_model", None), ("encode", 0), ("ddp.warmup_cosine", 12),
            ("look_at_dev", 13), ("ddp.write_atomically", 13), ("plot_results", 18), ("print_end", 18),
        ]  # fmt: skip
        for place, wanted in stages:
            here = f"script.{place} = {'late' if 'cosine' in place else 'die'}"
            (killed,) = ranks.attempt(1, *arguments, "--out", str(out), code=self.code(here))
            assert killed.returncode == -signal.SIGKILL, (place, killed)
            left = train_ddp.load_checkpoint(out)
            assert (left and left["run"]["step"]) == wanted, place
        one, other = (train_ddp.load_checkpoint(folder) for folder in (tmp_path / "whole", out))
        assert one["model"].keys() == other["model"].keys()
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        for row, same in zip(one["run"]["history"], other["run"]["history"], strict=True):
            assert row | {"seconds": 0} == same | {"seconds": 0}
        here = "script.linear_model = script.Tokenizer.train = script.train = again"
        (done,) = ranks.run(1, *arguments, "--out", str(out), code=self.code(here))
        first, second = json_of(tmp_path / "whole/report.json"), json_of(out / "report.json")
        for name in ("test_accuracy", "with_linear_test_accuracy", "linear_test_accuracy", "dev_accuracy"):
            assert first[name] == second[name]
        assert "finished" in done.stdout
        assert last_json(done)["test_accuracy"] == last_json(whole)["test_accuracy"]
        assert DEADLINE > second["total_seconds"] > other["run"]["total_seconds"] > 0

    def test_learns_the_same_on_any_number_of_processes(self, ranks, tmp_path):
        """Also where one is lost on the way, which ends the others, and another number goes on. Without
        dropout and hidden words; batches of 71, the last one of 2: fewer than there are ranks."""
        rest = "--dropout 0 --mask-words 0 --batch-size 71 --lr 1e-4 --unlabelled --save-every 0"
        arguments = [*IMDB_SMALL, *rest.split(), "--clip", "100"]  # none is clipped to the same size
        for world in (1, 2):
            results = ranks.run(world, *arguments, "--out", str(tmp_path / str(world)), code=self.code())
            assert not any("step" in result.stdout for result in results[1:])  # rank 0 alone speaks
        arguments += ["--out", str(tmp_path / "3")]
        code = self.code("if os.environ['RANK'] == '1': script.ddp.warmup_cosine = late")
        first, second = ranks.attempt(2, *arguments, code=code.replace("step == 12", "step == 5"))
        assert second.returncode == -signal.SIGKILL and first.returncode == 1, (first, second)
        assert "Traceback" not in first.stderr
        assert "going on at step 5" in ranks.run(3, *arguments, code=self.code())[0].stdout
        one, *others = (train_ddp.load_checkpoint(tmp_path / name) for name in "123")
        for other in others:
            for name, value in one["model"].items():
                check_close(other["model"][name], value, 2e-5)
            for i, moments in one["optimizer"]["state"].items():  # an average of the last gradients
                check_close(other["optimizer"]["state"][i]["exp_avg"], moments["exp_avg"], 1e-5)
            for mine, row in zip(other["run"]["history"], one["run"]["history"], strict=True):
                assert mine["dev_loss"] == pytest.approx(row["dev_loss"], abs=2e-4)
                assert mine["train_accuracy"] == row["train_accuracy"]
        assert json_of(tmp_path / "3/report.json")["processes"] == 3

    @pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
    def test_a_signal_stops_all_ranks_at_one_saved_step(self, ranks, tmp_path, world, number):
        arguments = [*IMDB_SMALL, "--epochs", "500", "--save-every", "0", "--out", str(tmp_path)]
        ranks.start(world, *arguments, code=self.code())
        ranks.wait_until(lambda: len(list(tmp_path.glob("step_0000000[5-9]*"))) > 0)
        ranks.kill([world - 1], number)
        results = ranks.wait()
        assert [result.returncode for result in results] == [128 + number] * world, results
        step = train_ddp.load_checkpoint(tmp_path)["run"]["step"]
        assert f"step {step} of 4500 is saved" in results[0].stderr and "Traceback" not in results[0].stderr

    def test_shuffled_labels_teach_nothing(self, ranks, tmp_path):
        """The honesty check, with a teacher that learns shuffled labels, too: 1,000 texts, 4 sigma."""
        parts = "whole.train[:1000], whole.test[:1000], whole.unlabelled"
        here = f"few = script.Corpus('demo', whole.labels, {parts})"
        arguments = [*IMDB_SMALL, "--shuffle-labels", "--unlabelled", "--lr", "5e-3", "--out", str(tmp_path)]
        ranks.run(1, *arguments, code=self.code(here))
        report = json_of(tmp_path / "report.json")
        for name in ("test_accuracy", "linear_test_accuracy"):
            assert abs(report[name] - 0.5) <= 0.065

    def test_classify_gives_unlabelled_texts_their_teacher_s_opinion(self, tmp_path, monkeypatch):
        """As targets, and in the odds on the side that it takes them for; folds are blocks of neighbours."""
        corpus, given, labels = self.corpus(), [], []
        opinions = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()

        def linear_model(_, y):
            labels.append(y)
            return lambda reviews: opinions if reviews is corpus.unlabelled else [0.5] * len(reviews), 0

        monkeypatch.setattr(imdb, "load_corpus", lambda s: corpus)
        monkeypatch.setattr(imdb, "train", lambda model, *rest: given.append((model, *rest)))
        monkeypatch.setattr(imdb, "finish", lambda *_: None)
        monkeypatch.setattr(imdb, "linear_model", linear_model)
        arguments = [*IMDB_SMALL, "--unlabelled", "--shuffle-labels", "--out", str(tmp_path)]
        assert imdb.main(arguments) == 0
        ((model, examples, dev, run, *_),) = given
        train_set, dev_set = imdb.split_dev(corpus)
        shuffled = imdb.learned_labels(train_set, imdb.Settings(shuffle_labels=True))
        true = [r.label for r in train_set]
        assert labels == [shuffled] and shuffled != true and sorted(shuffled) == sorted(true)
        assert examples.targets == shuffled + opinions and dev.targets == [r.label for r in dev_set]
        assert len(examples.ids) == len(examples.folds) == 380 and run.teacher["test"] == [0.5] * 200
        for part, folds in ((train_set, examples.folds[:180]), (corpus.unlabelled, examples.folds[180:])):
            by_number = [fold for _, fold in sorted(zip([r.number for r in part], folds, strict=True))]
            assert by_number == sorted(folds) and set(folds) == set(range(imdb.FOLDS))
        odds = imdb.NgramOdds()
        odds.fit(examples)
        assert torch.equal(model.odds.table, odds.table)

    def test_the_linear_model_s_logit_counts_as_much_as_the_model_s_own(self, tmp_path, monkeypatch):
        model, examples, dev, run, s = self.training(tmp_path)
        corpus = self.corpus(300)
        linear = torch.rand(300, generator=torch.Generator().manual_seed(1))
        run.teacher = {"test": linear.tolist()}
        run.history = [{"seconds": 1.0, "train_accuracy": 0.5, "dev_accuracy": 0.25}]
        with torch.no_grad():
            model.head.weight.mul_(5)  # an untrained model is never sure
        monkeypatch.setattr(imdb, "export_models", lambda *_: {"exported": True})
        imdb.finish(model, imdb.Tokenizer(run.ranks), corpus, examples, dev, run, s, imdb.ALONE)
        report = json_of(tmp_path / "report.json")
        ids = imdb.Tokenizer(run.ranks).encode([r.text for r in corpus.test], 16)
        own = imdb.log_odds(model, ids, imdb.ALONE)
        labels = torch.tensor([r.label for r in corpus.test]).bool()
        answers = (own > 0, linear > 0.5, own + linear.logit() > 0)
        expected = [(answer == labels).double().mean().item() for answer in answers]
        names = ("test_accuracy", "linear_test_accuracy", "with_linear_test_accuracy")
        assert [report[name] for name in names] == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == 3 and report["dev_accuracy"] == 0.25 and report["n_parameters"] > 1000

    def test_baseline_is_trained_and_tested(self, tmp_path, monkeypatch, capsys):
        corpus = self.corpus(300)
        turned = [review._replace(label=1 - review.label) for review in corpus.test]
        monkeypatch.setattr(imdb, "load_corpus", lambda s: corpus)
        monkeypatch.setattr(imdb, "split_dev", lambda corpus: (corpus.train, turned))
        assert imdb.main(["--baseline", "--out", str(tmp_path / "a/b")]) == 0
        report = json_of(tmp_path / "a/b/baseline.json")
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert summary["test_accuracy"] == report["test_accuracy"] > 0.7 and report["gemm_gflops"] > 0
        assert report["dev_accuracy"] == pytest.approx(1 - report["test_accuracy"])

    @pytest.mark.skipif(not os.environ.get("IMDB_DATA"), reason="IMDB_DATA is not set: IMDB isn't tested")
    def test_real_data_are_the_published_texts(self):
        assert (imdb.IMDB_SIZE, imdb.IMDB_MD5) == (84_125_825, "7c2ac02c03563afcf9b574c7e56c153a")
        assert set(imdb.PER_FOLDER.values()) == {12_500} and imdb.UNLABELLED == {"train/unsup": 50_000}
        corpus = imdb.read_imdb(Path(os.environ["IMDB_DATA"]))
        assert imdb.fingerprint(corpus) == imdb.IMDB_FINGERPRINT
        for reviews, size in ((corpus.train, 33_132_823), (corpus.test, 32_350_685)):
            assert len(reviews) == 25_000 and sum(r.label for r in reviews) == 12_500
            assert sum(len(r.text.encode()) for r in reviews) == size
        train, dev = imdb.split_dev(corpus)
        assert (len(train), len(dev)) == (22_500, 2_500)
        log = json_of(ROOT / "assets/imdb.json")
        assert log["fast"][0]["settings"]["texts"] == imdb.IMDB_FINGERPRINT


# -----------------------------------------------------------------------------
# assets/quiz.md: numbers that no other test computes


class TestQuiz:
    def test_quiz_scores_spread_with_the_root_of_the_width(self):
        q, k = torch.randn(2, 100_000, 64, dtype=torch.float64)
        scores = (q * k).sum(-1)
        assert scores.std().item() == pytest.approx(8, rel=0.02)
        many = scores[:1000].view(10, 100)
        slope = [(w * (1 - w)).mean() for w in (many.softmax(-1), (many / 8).softmax(-1))]
        assert slope[0] < slope[1] / 2  # nearly one-hot: nearly no gradient

    def test_quiz_sizes(self):
        def size(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        q = torch.empty(8, 8192, 64, device="meta")
        assert attention.scaled_dot_product_attention(q, q, q)[1].nbytes == 2 * 2**30
        for n_heads in (8, 16):
            assert size(attention.MultiHeadAttention(512, n_heads)) == 1_050_624
        layer = encoder.EncoderLayer(encoder.EncoderConfig(vocab_size=1, d_model=128, d_ff=512))
        assert size(layer) == 198_272
        assert size(layer.self_attention) == 66_048 and size(layer.ffn) == 131_712
        with torch.device("meta"):
            for tied, n in ((True, 63_082_496), (False, 100_970_496)):
                config = transformer.TransformerConfig(tied=tied)
                assert size(transformer.Transformer(config)) == n
        weight = nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.AdamW([weight])
        weight.sum().backward()
        optimizer.step()
        moments = [v for v in optimizer.state[weight].values() if v.numel() > 1]
        assert sum(t.nbytes for t in (weight, weight.grad, *moments)) == 16 * 1000

    def test_quiz_wavelengths(self):
        longest = 2 * math.pi * 10_000 ** (126 / 128)
        assert round(longest) == 54_410
        encoding = encoder.sinusoidal_positional_encoding(54_411, 128).double()
        check_close(encoding[54_410, -2:], encoding[0, -2:], 1e-3)
        assert (encoding[300:54_000, -1] < 1).all(), "no earlier return"

    def test_quiz_noam_peak(self):
        rates = [transformer.noam_lr(step, 512, 4000) for step in range(1, 8000)]
        assert rates.index(max(rates)) + 1 == 4000 and round(max(rates), 6) == 0.000699

    def test_quiz_smoothing_floor(self):
        target = torch.tensor([[0.925, 0.025, 0.025, 0.025]], dtype=torch.float64)
        label = torch.tensor([0])
        floor = losses.label_smoothing_cross_entropy(target.log(), label, 0.1).item()
        assert round(floor, 3) == 0.349
        for _ in range(100):
            z = torch.randn(1, 4, dtype=torch.float64) * 5
            assert losses.label_smoothing_cross_entropy(z, label, 0.1).item() >= floor

    def test_quiz_decay_within_adam_spares_large_gradients(self):
        left = {}
        for name in ("adam", "adamw"):
            weights = nn.Parameter(torch.ones(2, 1))
            (optimizer,) = losses.make_optimizers(name, [weights], [], lr=0.001, weight_decay=0.1)
            for step in range(400):
                weights.grad = torch.tensor([[0.01], [10.0]]) * (-1) ** step
                optimizer.step()
            left[name] = weights.flatten().tolist()
        assert left["adam"][0] < 0.9 < 0.99 < left["adam"][1]
        assert left["adamw"][0] == pytest.approx(left["adamw"][1], abs=1e-3)

    def test_quiz_zeros_are_multiplied_too(self):
        from torch.utils.flop_counter import FlopCounterMode

        model, x = export.Classifier(30).eval(), torch.randint(1, 30, (2, 16))
        heads = {name: torch.rand(4) for name in export.attentions(model)}
        neurons = {name: torch.rand(256) for name in export.feed_forwards(model)}
        halved = export.prune_neurons(export.prune_heads(model, heads, keep=2), neurons, keep=128)
        counts = []
        for candidate in (model, export.prune_unstructured(model, 0.5), halved):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                candidate(x)
            counts.append(counter.get_total_flops())
        assert counts[1] == counts[0] and counts[2] == pytest.approx(counts[0] / 2, rel=0.01)

    def test_quiz_focal_weights(self):
        for p, weight in ((0.9, 0.01), (0.1, 0.81)):
            logits = torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
            target = torch.tensor([0])
            ratio = losses.focal_loss(logits, target, gamma=2.0) / F.cross_entropy(logits, target)
            assert ratio.item() == pytest.approx(weight)

    def test_quiz_scalar_alpha(self):
        """It scales all gradients, which Adam undoes."""
        logits, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 0])
        weights = []
        for alpha in (None, torch.full((3,), 0.25).double()):
            weight = nn.Parameter(logits.clone())
            losses.focal_loss(weight, targets, alpha=alpha, reduction="sum").backward()
            torch.optim.Adam([weight], eps=0.0).step()
            weights.append(weight)
        check_close(weights[1].grad, 0.25 * weights[0].grad, 1e-12)
        check_close(weights[0].detach(), weights[1].detach(), 1e-12)

    def test_quiz_collapsed_nt_xent(self):
        z = torch.ones(256, 16, dtype=torch.float64)
        assert losses.nt_xent_loss(z, z.clone()).item() == pytest.approx(math.log(511))


# -----------------------------------------------------------------------------
# All files: pieces that stand in two of them are the same, importing does nothing

ALL_FILES = [attention, encoder, transformer, losses, train_ddp, train_fsdp, export, imdb]


def having(name: str) -> list:
    """The files that define this name themselves."""
    return [m for m in ALL_FILES if getattr(getattr(m, name, None), "__module__", "") == m.__name__]


def name_of(module) -> str:
    return module.__name__


LOCK_HOLDER = """
import importlib, sys, pathlib, time
sys.path.insert(0, sys.argv[1])
lock = importlib.import_module(sys.argv[2]).lock_out(pathlib.Path(sys.argv[3]))
print("held", flush=True)
time.sleep(100)
"""


class TestAllFiles:
    def test_positions_and_masks_are_the_same_in_all_files(self):
        for length, width in ((1, 1), (7, 5), (33, 16)):
            first, *others = having("sinusoidal_positional_encoding")
            expected = first.sinusoidal_positional_encoding(length, width)
            for other in others:
                check_close(other.sinusoidal_positional_encoding(length, width), expected, 1e-7)
        for q, k in ((1, 1), (3, 3), (2, 5), (5, 2)):
            for module in having("causal_mask"):
                assert torch.equal(module.causal_mask(q, k), torch.ones(q, k).tril(k - q).bool())

    @pytest.mark.parametrize("module", having("warmup_cosine"), ids=name_of)
    def test_warmup_cosine(self, module):
        factors = [module.warmup_cosine(step, 3, 7) for step in range(9)]
        falling = [0.5 + 0.5 * math.cos(math.pi * part / 4) for part in range(4)]
        assert factors == pytest.approx([1 / 3, 2 / 3, 1, *falling, 0, 0][:9], abs=1e-12)
        assert [module.warmup_cosine(step, 10, 2) for step in range(4)] == [0.5, 1, 0, 0]  # cut to the run
        assert module.warmup_cosine(0, 0, 1) == 1 and module.warmup_cosine(10, 10, 10) == 0

    @pytest.mark.parametrize("module", having("write_atomically"), ids=name_of)
    def test_write_atomically(self, module, tmp_path, monkeypatch):
        """Who has opened the old file reads it to its end; a full disk leaves it as it is."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with open(path, "rb") as reader:
            module.write_atomically(path, b"new")
            assert reader.read() == b"old" and path.read_bytes() == b"new"
        umask = os.umask(0o022)
        os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may read it, as any file

        def full(_):
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            module.write_atomically(path, b"newer")
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl, so no lock")
    @pytest.mark.parametrize("module", having("lock_out"), ids=name_of)
    def test_lock_out(self, module, tmp_path):
        """Held by another process, it is refused; it dies with that process."""
        command = [sys.executable, "-c", LOCK_HOLDER, str(ROOT), module.__name__, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match="in use"):
                module.lock_out(tmp_path, patience=0.2)
            holder.kill()
        assert module.lock_out(tmp_path, patience=5)

    def test_importing_does_nothing(self, tmp_path):
        """No output, no file, no thread or seed set."""
        names = [module.__name__ for module in ALL_FILES]
        code = "import os, torch; threads, state = torch.get_num_threads(), torch.get_rng_state()\n"
        code += f"import {', '.join(names)}\n"
        code += "assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)\n"
        code += "assert os.listdir() == []"
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def test_models_make_their_tensors_where_their_input_is(self):
        """On the device "meta", where a tensor of the CPU is an error, as on a GPU."""
        small = {"max_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
        config = transformer.TransformerConfig(30, **small)
        many = attention.MultiHeadAttention(16, 2)
        with torch.device("meta"):
            x, context = torch.empty(2, 5, 16), torch.empty(2, 7, 16)
            ids, fold = torch.ones(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        calls = [(many, x), (many, x, context, None, True), (transformer.Transformer(config), ids, ids)]
        calls.append((imdb.make_model(imdb.Settings(**small), 300), ids, fold))
        calls += [(script.GPT(16, 2, 1, 8), ids) for script in (train_ddp, train_fsdp)]
        for pool in ENCODER_POOLS:
            calls.append((encoder_classifier(pool=pool), ids))
        for model, *inputs in calls:
            assert model.to("meta")(*inputs).device == ids.device

    @pytest.mark.parametrize("module", ALL_FILES, ids=name_of)
    def test_help_lists_every_setting(self, module, tmp_path):
        """On a terminal that knows ASCII alone, too."""
        environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "100"}
        result = run_script(f"{module.__name__}.py", "--help", cwd=tmp_path, **environment)
        assert result.returncode == 0, result.stderr
        for field in dataclasses.fields(module.Settings):
            assert f"--{field.name.replace('_', '-')}" in result.stdout, field.name
        assert not list(tmp_path.iterdir())

    def test_requirements_are_pinned(self):
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        lines = [line.split("#")[0].strip() for line in lines]
        lines = [line for line in lines if line]
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines) and "torch==2.13.0" in lines


# -----------------------------------------------------------------------------
# README.md


def readme_parts() -> dict[str, str]:
    """README.md by heading; what stands before the first one is called "top"."""
    parts = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(["top", *parts[1::2]], parts[::2], strict=True))


def numbers_in(log) -> set[float]:
    """All numbers of a log, and what README derives from them.

    In a list of runs: mean and standard deviation. In an export table: how many times as fast.
    """
    if isinstance(log, int | float):
        return {abs(float(log))}
    if not isinstance(log, dict | list):
        return set()
    parts = log.values() if isinstance(log, dict) else log
    found = set().union(*map(numbers_in, parts))
    if isinstance(log, dict):
        times = [row["latency"] for row in log.get("models", ())]
        return found | {times[0][c]["p50_ms"] / row[c]["p50_ms"] for row in times for c in times[0]}
    runs = log if log and all(isinstance(run, dict) for run in log) else [{"": x} for x in log]
    for name in set.intersection(*map(set, runs)) if runs else ():
        values = [run[name] for run in runs]
        if len(values) > 1 and all(type(x) in (int, float) for x in values):
            found |= {abs(statistics.mean(values)), statistics.stdev(values)}
    return found


class TestReadme:
    def test_every_number_of_a_table_is_logged(self):
        """In a section that links logs, each cell behind the first, at the precision given there.

        As it is, in percent, thousands, millions, MiB or minutes.
        """
        checked = 0
        for title, part in readme_parts().items():
            links = set(re.findall(r"\]\((assets/\w+\.json)\)", part))
            logged = set().union(*(numbers_in(json_of(ROOT / link)) for link in links))
            scaled = [x * k for x in logged for k in (1, 100, 1e-3, 1e-6, 2**-20, 1 / 60)]
            rows = [line for line in part.splitlines() if line.startswith("|")]
            for row in rows if links else ():
                cells = re.sub(r"`[^`]*`|\([^)]*\)|\]\(.*?\)", " ", row).split("|")[2:]
                for text in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?", " ".join(cells)):
                    digits = text.replace(",", "")
                    if len(digits) < 3:
                        continue  # a batch of 32, five seeds
                    error = 0.5001 * 10 ** -len(digits.partition(".")[2])
                    assert any(abs(x - float(digits)) <= error for x in scaled), (title, row, text)
                    checked += 1
        assert checked >= 60

    def test_headlines_are_the_logged_ones(self):
        top, log = readme_parts()["top"], json_of(ROOT / "assets/imdb.json")
        for runs in (log["ladder"]["rows"]["fast"], log["best"]):
            values = [100 * run["test_accuracy"] for run in runs]
            assert len({run["seed"] for run in runs}) >= 3
            assert f"{statistics.mean(values):.2f}" in top
        assert f"{json_of(ROOT / 'assets/multi30k.json')['beam']:.1f}" in top

    def test_attention_adds_little_on_imdb(self):
        """README and the quiz say so; a model that changes it must change them."""
        log = json_of(ROOT / "assets/imdb.json")
        rows = log["ladder"]["rows"]
        mean = {name: statistics.mean(run["test_accuracy"] for run in runs) for name, runs in rows.items()}
        for without, whole in (("no_attention", "plain"), ("odds_no_attention", "fast")):
            assert [run["seed"] for run in rows[without]] == [run["seed"] for run in rows[whole]] == [0, 1, 2]
            assert 0 < mean[whole] - mean[without] < 0.01

    def test_commands_parse(self, tmp_path, monkeypatch):
        """All of README and of the files' docstrings."""
        import shlex

        from torch.distributed.run import parse_args

        texts = [*readme_parts().values(), *(module.__doc__ for module in ALL_FILES)]
        command = r"(?:python|torchrun) (?:\\\n|[^\n`#|;])*\w+\.py(?:\\\n|[^\n`#|;]|(?<= )#(?!\s))*"
        found = {c.replace("\\\n", " ") for text in texts for c in re.findall(command, text)}
        assert len(found) >= 30
        monkeypatch.chdir(tmp_path)  # nothing is there
        for line in found:
            words = shlex.split(line)
            if words[0] == "torchrun":
                known = parse_args([re.sub(r"\$\{?\w+\}?", "2", word) for word in words[1:]])
                words = ["python", known.training_script, *known.training_script_args]
            assert (ROOT / words[1]).exists(), line
            module = sys.modules.get(words[1].removesuffix(".py"))
            if hasattr(module, "parse"):  # presets come first
                module.parse(words[2:])
            elif module in ALL_FILES:
                tyro.cli(module.Settings, args=words[2:])

    def test_links_lead_somewhere(self):
        """Files exist; anchors are headings, as GitHub writes them."""
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL)
        headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", readme):
            path, _, anchor = "".join(target).partition("#")
            assert path.startswith("https://") or not path or (ROOT / path).exists(), target
            assert not anchor or anchor in anchors, target

    def test_names_to_copy_exist(self):
        """`file.py`: `name`, `name` in the section on copying."""
        part = next(part for title, part in readme_parts().items() if "opy" in title)
        found = re.findall(r"^\| `(\w+)\.py` \| (.+?) \|", part, re.M)
        assert len(found) >= 7
        for file, names in found:
            for name in re.findall(r"`([\w.]+)`", names):
                assert functools.reduce(getattr, name.split("."), sys.modules[file]), (file, name)

    def test_quiz_names_tests_that_exist(self):
        """As functions or as methods of a class, by their last part."""
        text = (ROOT / "assets/quiz.md").read_text(encoding="utf-8")
        questions = re.findall(r"<details>.*?</details>", text, re.S)
        tests = set(re.findall(r"^ *def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
        assert len(questions) >= 48
        for i, question in enumerate(questions, 1):
            assert f"<summary>{i}. " in question
            proofs = re.findall(r"`(test_\w+)`", question)
            assert proofs and tests.issuperset(proofs), (i, proofs)

    def test_planted_bugs_have_their_place(self):
        for file, bugs in MUTANTS.items():
            source = (ROOT / file).read_text(encoding="utf-8")
            for old, new, _ in bugs:
                assert source.count(old) == 1 and new != old, (file, old)


# -----------------------------------------------------------------------------
# Planted bugs: python test_all.py --mutants [FILE]. Each is one replacement in a copy of a file.
# The tests named must fail on it, and pass on the file as it is.

MUTANTS = {  # file -> (what stands there, what would stand there, tests for pytest -k)
    "attention.py": [
        (".tril(k_len - q_len)", ".tril()", "causal_mask or cached_equals"),
        (".tril(k_len - q_len)", ".tril(k_len - q_len - 1)", "causal_mask"),
        ("device=lengths.device) < lengths", "device=lengths.device) <= lengths", "padding_mask"),
        ("scores = (q * q.size(-1) ** -0.5)", "scores = q", "all_ways_agree"),
        (".softmax(dim=-1).masked_fill(hidden, 0.0)", ".softmax(dim=-1)", "nothing_to_attend_to"),
        ("masked_fill(hidden, lowest)", "masked_fill(hidden, -math.inf)", "nothing_to_attend_to"),
        ("dropout_p) @ v, weights", "dropout_p) @ v, F.dropout(weights)", "multi_head_attention_agrees"),
        ("alpha = (m[..., i, :] - m_new).exp()", "alpha = 1.0", "all_ways_agree"),
        ("ds = p * (dp - delta[..., i, :])", "ds = p * dp", "all_ways_agree"),
        ("q.size(-2) != k.size(-2))):", "False)):", "all_ways_agree"),
        ("self.dropout if self.training else 0.0", "self.dropout", "dropout_only_in_training"),
        ("if causal and context is not None:", "if causal and context is None:", "leaves_python and export"),
        ("        cache.k, cache.v = k, v\n", "", "cached_equals"),
        ("x.clone(), packed.requires_grad", "x.clone()", "from_torch_keeps"),
        ("    lengths = lengths.long()", "    # lengths = lengths.long()", "padding_mask"),
    ],
    "encoder.py": [
        ("x + self.dropout(self.self_attention(self", "self.dropout(x + self.self_attention(self", "dropout"),
        ("x = x + self.dropout(self.self_att", "x = self.dropout(self.self_att", "layer_equals"),
        ("        x = self.self_attention_norm(x + self", "        x = (x + self", "layer_equals"),
        ("10_000.0 ** (-torch.arange", "1_000.0 ** (-torch.arange", "sinusoidal_positional_encoding"),
        (".softmax(dim=-1).masked_fill(~mask, 0.0)", ".softmax(dim=-1)", "equals_attention_py"),
        ("tokens) * self.scale + self", "tokens) + self", "stack_equals_torch"),
        ("mask = tokens != self.pad_id", "mask = tokens == self.pad_id", "encoder_stack"),
        ("(config.d_model) if config.norm_first else nn.Identity()", "(config.d_model)", "stack_equals"),
        ("mask.sum(1, keepdim=True).clamp(min=1)", "x.size(1)", "padding_and_batch"),
        ("x.masked_fill(padding, -math.inf).amax(1)", "x.amax(1)", "pool_tokens"),
        ("self.embedding.weight.dtype))", "self.embedding.weight.dtype), persistent=False)", "meta_device"),
    ],
    "transformer.py": [
        (".tril(k_len - q_len)", ".tril()", "cache_gives"),
        ("q.shape[-1] ** -0.5", "1.0", "equals_torch"),
        ("k = torch.cat((past_k, k), dim=2)", "k = torch.cat((k, past_k), dim=2)", "cache_gives"),
        ("self.embed(self.tgt_embedding, tgt, start)", "self.embed(self.tgt_embedding, tgt)", "cache_gives"),
        ("x = x if self.norm_first else self.cross_attention_norm(x)", "x = x + 0", "equals_torch"),
        ("encoding(config.max_len, width))", "encoding(config.max_len, width), persistent=False)", "on_meta"),
        ("real = targets != pad_id", "real = targets == targets", "label_smoothed_loss"),
        ("step * warmup**-1.5", "step * warmup**-0.5", "noam"),
        (".masked_fill(finished, model.config.pad_id)", "", "greedy_decode"),
        ("finished |= best == model.config.eos_id", "finished |= best == 0", "greedy_decode"),
        ("torch.where(finished[..., None], only_pad, following)", "following", "full_width"),
        ("[(k[rows], v[rows], *of_memory)", "[(k, v, *of_memory)", "equal_lists"),
        ("lengths.gather(1, parent) + ~was_finished", "lengths.gather(1, parent) + 1", "equal_lists"),
        ("((5 + lengths.to(log_probs)) / 6)", "(lengths.to(log_probs))", "full_width"),
        ("tgt = F.pad(targets[:, :-1], (1, 0), value=model.config.bos_id)", "tgt = targets", "batch_loss"),
        (
            'io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")',
            "data.decode().splitlines()",
            "lines_of",
        ),
        ("rows, parse_math=False)", "rows)", "ones_own"),
        ('optimizer.load_state_dict(state["optimizer"])', "pass", "kill_9"),
        ("if not norm.isfinite():", "if False:", "kill_9"),
        ("mean + (weight - mean) / n_averaged", "weight.clone()", "written_out"),
    ],
    "losses.py": [
        ("remaining.mean().clamp(min=torch.finfo(remaining.dtype).tiny)", "remaining.mean()", "gradnorm"),
        ("smoothing / log_p.shape[1] * weighted", "smoothing / (log_p.shape[1] - 1) * weighted", "equals"),
        ("divisor = (kept * weights).sum()", "divisor = (kept + 0 * weights + 1).sum()", "ignored_rows"),
        ("rows = rows.masked_fill(~kept[:, None], 0.0)", "pass", "ignored_rows"),
        ("focus = (gamma * log_sum(log_p, ~is_target)).exp()", "focus = gamma * 0 + 1.0", "focal"),
        ("rows = -alpha[y] * focus", "rows = -alpha[0] * focus", "focal"),
        ("(1 - alpha) * (~positive)", "alpha * (~positive)", "focal"),
        ("F.pairwise_distance(x1, x2, eps=0)", "(x1 - x2).square().sum(1).sqrt()", "extremes"),
        (
            "F.pairwise_distance(x1, x2, eps=0)).square()",
            "F.pairwise_distance(x1, x2, eps=0).square())",
            "oracle",
        ),
        ("F.normalize(a, dim=1)", "(a / a.square().sum(1, keepdim=True).sqrt())", "extremes"),
        (
            "similarity(z, z, temperature).masked_fill(itself, -math.inf)  # (2N, 2N)",
            "similarity(z, z, temperature)",
            "oracle",
        ),
        ("(labels[:, None] == labels) & ~itself", "(labels[:, None] == labels)", "oracle"),
        (
            "d.masked_fill(~positive, -math.inf).amax(1)",
            "d.masked_fill(positive, -math.inf).amax(1)",
            "oracle",
        ),
        (
            "torch.expm1(n * math.log(beta)) / (beta - 1)",
            "torch.expm1(math.log(beta)) / (beta - 1)",
            "balanced",
        ),
        ("((-s).exp() * losses + s).sum() / 2", "((-s).exp() * losses + 2 * s).sum() / 2", "uncertainty"),
        ("remaining / remaining.mean()", "remaining.mean() / remaining", "gradnorm"),
        (
            "torch.distributed.nn.functional.all_gather(x)",
            "torch.distributed.nn.functional.all_gather(x.detach())",
            "two_processes",
        ),
        (
            'if p.ndim < 2], "weight_decay": 0.0',
            'if p.ndim < 2], "weight_decay": weight_decay',
            "parameter_groups",
        ),
        ("best = max(rates", "best = min(rates", "tune"),
        ('by_metric(evaluate, models[lr], "dev")', 'by_metric(evaluate, models[lr], "test")', "dev_alone"),
        ("limit = t.ppf(1 - 0.025 / n_tests", "limit = 0 * t.ppf(1 - 0.025 / n_tests", "judge"),
    ],
    "train_ddp.py": [
        ("s.clip or math.inf", "s.clip or 1.0", "same_weights"),
        ("row + [-100] *", "row + [10] *", "same_weights or every_byte"),
        ("manual_seed(s.seed * 1_000_003 + epoch)", "manual_seed(s.seed)", "micro_batches"),
        ("whole[micro * p.world + p.rank ::", "whole[micro ::", "same_weights or micro_batches"),
        ("scaler.unscale_(optimizer)  #", "#", "mixed_precision"),
        ("is_causal=True", "is_causal=False", "torch_layers"),
        ("os.replace(temporary, path)", "path.write_bytes(data)", "write_atomically"),
        (
            "[loss / n_tokens, signals.received()], p)",
            "[loss / n_tokens, 0], p); stopped = signals.received()",
            "signals_stop",
        ),
        ('scaler.load_state_dict(run["scaler"])', "pass", "signals_stop"),
        ('run["step"] = step + 1', 'run["step"] = step + 2', "kill_9"),
        ("fcntl.LOCK_EX | fcntl", "fcntl.LOCK_SH | fcntl", "lock_out"),
        ("p.parent = os.getppid() if", "p.parent = 0 if", "orphans"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env["TORCHELASTIC_RESTART_COUNT"]', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "same_weights"),
        ("grad_sync = micro == s.accumulate - 1", "grad_sync = True", "travel"),
        ("grad_sync = micro == s.accumulate - 1", "grad_sync = micro == 0", "same_weights"),
        ("return loss_sum * (world / n_total)", "return loss_sum / n_total", "same_weights"),
        (
            "(targets[whole] != -100).sum().item()",
            "(targets[whole[p.rank :: p.world]] != -100).sum().item() * p.world",
            "same_weights or micro_batches",
        ),
        ("load_optimizer(optimizer, kept.pop", "(lambda *_: 0)(optimizer, kept.pop", "goes_on or kill_9"),
        ('if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:', "if data:", "goes_on"),
        (
            "for old in finished_checkpoints(folder)[:-keep]:",
            'for old in sorted(folder.glob("step_*.pt"))[:-keep]:',
            "keeps_the_last",
        ),
        ("torch.arange(len(inputs))[p.rank :: p.world]", "torch.arange(len(inputs))", "same_weights"),
        (
            'map_location="cpu", weights_only=True',
            'map_location="cpu", weights_only=False',
            "run_no_code",
        ),
    ],
    "classify_imdb.py": [
        ("(tokens != PAD).unfold(1, WINDOW, STRIDE).any(-1)", "tokens[:, 2:-2:4] != PAD", "written_out"),
        ("tokens = tokens.long()  # 32", "# 32", "ngram_ids"),
        ("range(first, first + fifth // 10)", "range(block, 5 * fifth, 50)", "dev_split"),
        ('"ab" if response.status == 206 else "wb"', '"ab"', "download"),
        ('{"pos": 1, "neg": 0,', '{"pos": 0, "neg": 1,', "read_imdb"),
        ("while stream.read(1 << 20):", "while False:", "no_part_of_imdb"),
        ("ids[:head] + ids[head - max_len :]", "ids[:max_len]", "tokenizer"),
        ("log_odds(model.eval(), dev.ids, p)", "log_odds(model, dev.ids, p)", "train_is_its"),
        ('ddp.load_optimizer(optimizer, kept.get("optimizer"), p)', "pass", "killed_anywhere"),
        ("torch.manual_seed(s.seed * 1_000_003 + run.step + 2**40 * p.rank)", "pass", "killed_anywhere"),
        ("ddp.share_of_mean(loss, len(rows), p.world)", "(loss / len(rows))", "any_number_of"),
        ("loss, right = 0 * loss, 0", "pass", "any_number_of"),
        ("mine = rows[p.rank :: p.world]", "mine = rows", "any_number_of"),
        (".split(64)[p.rank :: p.world]", ".split(64)", "any_number_of"),
        ('ddp.save_checkpoint(out, 0, {"run": vars(run)})', "pass", "killed_anywhere"),
        ("+ step // per_epoch)", "+ step // per_epoch + int(time.time()))", "killed_anywhere"),
        ("elsewhere = everywhere - counts", "elsewhere = everywhere - 0 * counts", "odds_equal"),
        ("(before >= SPECIAL)", "(before >= MASK)", "ngram_ids"),
        ("F.pad(tokens, (WINDOW // 2, STRIDE))", "F.pad(tokens, (WINDOW // 2, 2))", "padding_and_batch"),
        ("repeat_interleave(WINDOW, 1) / WINDOW", "repeat_interleave(WINDOW, 1)", "begins_as"),
        ("self.encoder.embedding.weight[PAD] = 0.0", "pass", "written_out"),
        ("self.encoder.embedding.padding_idx = PAD", "pass", "train_is_its"),
        ("(targets + said) / 2", "said", "pruned_copy"),
        ("pruned.encoder.layers[: max(1, s.n_layers // 2)]", "pruned.encoder.layers[1:]", "pruned_copy"),
        ("ids + fold[:, None, None] *", "ids + 0 * fold[:, None, None] *", "odds_equal"),
        ("accuracy(scores + linear, labels)", "accuracy(scores.exp() + linear, labels)", "logit_counts"),
        ('run.teacher["unlabelled"], s.max_len', 'run.teacher["test"], s.max_len', "teacher_s_opinion"),
        ("> s.target + error", "> s.target - error", "stops_at"),
        ("(score - log_odds(", "(score + log_odds(", "explain"),
        ("positive / positive.sum()", "negative / negative.sum()", "weighs_by"),
        ('ddp.check_finite("gradient\'s norm", norm.item(), run.step)', "pass", "not_finite"),
    ],
    "train_fsdp.py": [
        ("s.clip or math.inf", "s.clip or 1.0", "same_weights"),
        ("row + [-100] *", "row + [10] *", "same_weights or every_byte"),
        ("manual_seed(s.seed * 1_000_003 + epoch)", "manual_seed(s.seed)", "micro_batches"),
        ("whole[micro * p.world + p.rank ::", "whole[micro ::", "same_weights or micro_batches"),
        ("scaler.unscale_(optimizer)  #", "#", "mixed_precision"),
        ("is_causal=True", "is_causal=False", "torch_layers"),
        (
            "[loss / n_tokens, signals.received()], p)",
            "[loss / n_tokens, 0], p); stopped = signals.received()",
            "signals_stop",
        ),
        ('scaler.load_state_dict(run["scaler"])', "pass", "signals_stop"),
        ('run["step"] = step + 1', 'run["step"] = step + 2', "kill_9"),
        ("fcntl.LOCK_EX | fcntl", "fcntl.LOCK_SH | fcntl", "lock_out"),
        ("p.parent = os.getppid() if", "p.parent = 0 if", "orphans"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env["TORCHELASTIC_RESTART_COUNT"]', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "same_weights"),
        ("gradient_sync(micro == s.accumulate - 1)", "gradient_sync(True)", "travel"),
        ("loss * (p.world / n_tokens)", "loss / n_tokens", "same_weights"),
        (
            "model.set_requires_gradient_sync(micro == s.accumulate - 1)",
            "model.set_requires_gradient_sync(micro == 0)",
            "same_weights",
        ),
        ("fused=not s.exact", "fused=True", "two_processes_are_bitwise"),
        (".clamp(max=1.0))", "  )", "same_weights"),
        ("        fully_shard(block, mesh=mesh, mp_policy=policy)\n", "", "one_block_at_a_time"),
        ('(path / "manifest.json") == path.suffix[1:]', '(path / "manifest.json")', "newest_checkpoint"),
        ("if sha256_of(path / name) != sha]", "if not sha256_of(path / name)]", "newest_checkpoint"),
        (
            'raise pickle.UnpicklingError(f".metadata',
            'return super().find_class(module, name)\n        raise pickle.UnpicklingError(f".metadata',
            "run_no_code",
        ),
    ],
    "export.py": [
        ("if sum(m is child for child in places) > 1:", "if False:", "plain_attention"),
        ("runners[name](*batches[0])  # untimed", "pass  # untimed", "benchmark"),
        ("copy.deepcopy(model).eval()\n    with torch.no", "model.eval()\n    with torch.no", "equal_the"),
        ("(model).eval()\n    with torch.no", "(model)\n    with torch.no", "equal_the_model"),
        ("where(attn_mask, 0.0, -torch.inf)", "where(attn_mask, -torch.inf, 0.0)", "attention_for_onnx"),
        ("** -0.5 if scale is None else scale", "** -0.5", "attention_for_onnx"),
        (".softmax(-1) @ value * allowed", ".softmax(-1) @ value", "attention_for_onnx"),
        ('free[1] = f"length_{i}" if i else "length"', "pass", "free_sizes or one_file"),
        ('f"length_{i}" if i else "length"', '"length"', "free_sizes"),
        ("if name not in gates:", "if True:", "called_twice"),
        ('"atol": 1e-3 * max(1.0, largest)', '"atol": 1e3', "refuse_by_name"),
        ("[inputs, *other_sizes(inputs)] if free else [inputs]", "[inputs]", "refuse_by_name"),
        ("embeddings=False, reduce_range=True", "embeddings=False, reduce_range=False", "rounds_as_by_hand"),
        ("Iterable[dict], reduce_range=True", "Iterable[dict], reduce_range=False", "learns_its_ranges"),
        ("with LOADING:", "if True:", "changes_nothing"),
        (".view(3, H, -1)[:, kept]", ".view(3, H, -1)[:, : len(kept)]", "pruned_models"),
        ("scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)", "pruned_models"),
        ("nn.Parameter(weight, linear.weight.requires_grad)", "nn.Parameter(weight)", "called_twice"),
        ("draw.sample(list(runners), len(runners))", "list(runners)", "benchmark"),
        ("while rounds < 6 or", "while rounds < 2 or", "benchmark"),
        ('[row for row in rows if row["agreement"] >= min_agreement]', "rows", "recommends"),
        ('os.environ["ORT_DISABLE_TELEMETRY"] = "1"', "pass", "at_home"),
    ],
}


SECTIONS = {  # file -> the tests that have to notice a bug in it, for pytest -k
    "attention.py": "TestAttention", "encoder.py": "TestEncoder", "transformer.py": "TestTransformer",
    "losses.py": "TestLosses", "train_ddp.py": "TestTraining", "train_fsdp.py": "TestTraining",
    "export.py": "TestExport", "classify_imdb.py": "TestClassifyImdb",
}  # fmt: skip


def plant(file: str, source: str, selection: str, limit: float = 600) -> str:
    """Run the tests selected on a copy of the project in which file holds source.

    Returns "caught" where tests fail (pytest's exit code 1), "SURVIVED" where all pass, else why there is no
    verdict: an error while the tests are collected isn't a caught bug, nor is a run that never ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in (*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "requirements.txt"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "assets", Path(folder, "assets"))
        Path(folder, file).write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "test_all.py", "-x", "-q", "-p", "no:cacheprovider"]
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
        options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, "-k", selection], cwd=folder, **options)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"no end within {limit:g} s"
        with contextlib.suppress(ProcessLookupError):  # what the tests had started goes with them
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {0: "SURVIVED", 1: "caught"}.get(code, f"no verdict: {code}")


def plant_all(bugs: list[tuple[str, str, str, str]], must_be_caught: bool) -> int:
    """bugs: (file, description, source with the bug, tests). Control: without a bug, all these tests pass."""
    for file in sorted({bug[0] for bug in bugs}):
        selection = " or ".join(f"({tests})" for tests in sorted({bug[3] for bug in bugs if bug[0] == file}))
        if (verdict := plant(file, (ROOT / file).read_text(encoding="utf-8"), selection, 1800)) != "SURVIVED":
            print(f"{file}: its tests don't pass without a bug ({verdict}): {selection}")
            return 1
    verdicts = []
    with ThreadPoolExecutor(int(os.environ.get("MUTANT_PROCESSES", 2))) as pool:
        for bug, verdict in zip(bugs, pool.map(lambda bug: plant(bug[0], *bug[2:]), bugs), strict=True):
            print(f"{verdict}  {bug[0]}: {bug[1]} ({bug[3]})", flush=True)
            verdicts.append(verdict)
    print(f"{verdicts.count('caught')} caught of {len(verdicts)}")
    return int(must_be_caught and set(verdicts) != {"caught"})


def named_bugs(files: list[str]) -> list[tuple[str, str, str, str]]:
    bugs = []
    for file in files:
        source = (ROOT / file).read_text(encoding="utf-8")
        for old, new, selection in MUTANTS[file]:
            assert source.count(old) == 1, f"{file}: {old!r} stands there {source.count(old)} times"
            tests = f"({selection}) and ({SECTIONS[file]})"
            bugs.append((file, f"{old!r} -> {new!r}", source.replace(old, new), tests))
    return bugs


SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NOT_DRAWN = re.compile(r"main|demo|plot|print|show|say|compare|Settings")  # functions and classes of the demo


def changed(node: ast.AST) -> ast.AST | None:
    """A copy of node with one operator or constant swapped, or without its not; None where there is none."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        node.value = 2 * node.value + (node.value == 0)
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return ast.Pass()
    else:
        return None
    return node


def random_bugs(file: str, n: int, seed: int) -> list[tuple[str, str, str, str]]:
    """n bugs drawn from the part of file above its demo.

    A comparison, operator, constant or bool is changed; a not, a raise or a call whose result isn't used is
    dropped. Messages, annotations and plots stay as they are.
    """
    source = (ROOT / file).read_text(encoding="utf-8")
    rule = re.search(r"^# -{70,}\n# (?:The )?(?:[Dd]emo|Extras)", source, re.M)
    end = source.count("\n", 0, rule.start()) if rule else math.inf
    found = []

    def visit(node: ast.AST) -> None:
        name = getattr(node, "name", "") or ""
        if getattr(node, "lineno", 0) > end or (isinstance(name, str) and NOT_DRAWN.match(name)):
            return
        if isinstance(node, ast.JoinedStr | ast.arguments):
            return
        if ast.unparse(node).startswith(("print(", "if __")):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            return
        if hasattr(node, "lineno") and changed(node) is not None:
            found.append(node)
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in ("annotation", "returns", "exc"):
                    visit(child)

    visit(ast.parse(source))
    text = source.encode()  # columns are counted in bytes
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    bugs = []
    for node in random.Random(seed).sample(found, min(n, len(found))):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        new = ast.unparse(changed(node))
        new = f"({new})" if isinstance(node, ast.expr) else new  # whatever stands around it
        old = " ".join(text[start:stop].decode().split())
        with_bug = (text[:start] + new.encode() + text[stop:]).decode()
        bugs.append((file, f"line {node.lineno}: {old} -> {new}", with_bug, SECTIONS[file]))
    return bugs


def plant_from_command_line(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Plant bugs; see that the tests notice.")
    parser.add_argument("--mutants", nargs="*", metavar="FILE", help="in these files; without: in all")
    parser.add_argument("--random", type=int, metavar="N", help="N a file, drawn; else the named ones")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(arguments)
    files = options.mutants or list(MUTANTS)
    if options.random is None:
        return plant_all(named_bugs(files), must_be_caught=True)
    print(f"seed {options.seed}")
    bugs = [bug for file in files for bug in random_bugs(file, options.random, options.seed)]
    return plant_all(bugs, must_be_caught=False)


def run_everything() -> int:
    """Two pytest processes share the tests, one a core; halves of about the same length."""
    half = "TestTraining"
    runs = []
    for selection in (half, f"not ({half})"):
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-rs", "--durations=10", "-k", selection]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    for process, name in zip(runs, ("first", "second"), strict=True):
        print(f"the {name} half:", process.communicate()[0], sep="\n", flush=True)
    return max(process.returncode for process in runs)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--mutants" in arguments:
        sys.exit(plant_from_command_line(arguments))
    sys.exit(pytest.main([__file__, "-rs", "--durations=10", *arguments]) if arguments else run_everything())
