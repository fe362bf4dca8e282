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
import importlib
import inspect
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


@pytest.fixture
def read_only(monkeypatch):
    """Folders exist, but nothing can be written there."""

    def refuse(dir):
        raise OSError("read-only")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


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

ATTENTION_WAYS = {
    "loop": attention.attention_loop,
    "written out": lambda *a: attention.scaled_dot_product_attention(*a)[0],
    "blockwise": lambda *a: attention.blockwise_attention(*a, block_size=3),
    "fused": attention.fused_attention,
}
ATTENTION_EVERY_WAY = pytest.mark.parametrize("name", ATTENTION_WAYS)
ATTENTION_FUSED_OR_NOT = pytest.mark.parametrize("fused", [False, True])
ATTENTION_DTYPES = pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
ATTENTION_MASKS = "none padding square keys queries heads full one scalar".split()


def attention_mask(kind: str, b: int, h: int, tq: int, tk: int) -> Tensor | None:
    """Every shape that a mask may have; about a third of the pairs may not attend."""
    shapes = {
        "padding": (b, 1, 1, tk), "square": (tq, tk), "keys": (tk,), "queries": (b, 1, tq, 1),
        "heads": (h, tq, tk), "full": (b, h, tq, tk), "one": (1,), "scalar": (),
    }  # fmt: skip
    return None if kind == "none" else torch.rand(shapes[kind]) < 0.67


def attention_allowed(mask: Tensor | None, causal: bool, shape: tuple) -> Tensor:
    """The convention spelled out pair by pair, as an oracle for masks: (B, H, Tq, Tk)."""
    allowed = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape).clone()
    for i, j in itertools.product(range(shape[-2]), range(shape[-1])):
        if causal and j - shape[-1] > i - shape[-2]:  # counted from the end: bottom-right
            allowed[..., i, j] = False
    return allowed


ATTENTION_PEAK = """
import resource, sys, torch, attention
torch.set_num_threads(1)
def peak(T):
    q, k, v = (torch.randn(1, 1, T, 64, requires_grad=True) for _ in range(3))
    attention.WAYS[sys.argv[1]](q, k, v).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
before = peak(200)  # loads the libraries, starts the autograd thread
print(peak(8192) - before)
"""


class AttentionCall(nn.Module):
    """A fixed way to call the module: tracing and export take tensors alone."""

    def __init__(self, causal: bool, fused: bool, cross: bool):
        super().__init__()
        self.attention = attention.MultiHeadAttention(12, 3, kv_dim=10 if cross else None, fused=fused)
        self.causal = causal

    def forward(self, query: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attention(query, context, mask, self.causal)

    @staticmethod
    def example(b: int, tq: int, tk: int, cross: bool, masked: bool) -> dict[str, Tensor]:
        example = {"query": torch.randn(b, tq, 12)}
        if cross:
            example["context"] = torch.randn(b, tk, 10)
        if masked:
            example["mask"] = torch.rand(b, 1, 1, tk if cross else tq) < 0.7
        return example


class TestAttention:
    # ---- the four ways against torch, in all the cases

    @ATTENTION_DTYPES
    def test_all_ways_agree_with_torch(self, dtype, tolerance):
        """Values, gradients and weights, over random sizes, masks and strides."""
        draw = random.Random(1)
        for case in range(220):
            b, h, tq, tk = (draw.randint(1, n) for n in (3, 3, 8, 9))
            d, dv, causal = draw.choice([1, 3, 4, 8]), draw.choice([1, 4, 5, 8]), draw.random() < 0.5
            tk = tq if draw.random() < 0.3 else tk  # where the fused form takes torch's own triangle
            mask = attention_mask(draw.choice(ATTENTION_MASKS), b, h, tq, tk)
            inputs = [torch.randn(b, h, t, n, dtype=dtype) for t, n in ((tq, d), (tk, d), (tk, dv))]
            if draw.random() < 0.5:  # as heads that were split off a projection
                inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
            inputs = [x.requires_grad_() for x in inputs]
            allowed = attention_allowed(mask, causal, (b, h, tq, tk))
            exact = [x.detach().double().requires_grad_() for x in inputs]
            expected = F.scaled_dot_product_attention(*exact, attn_mask=allowed)
            towards = torch.randn_like(expected)
            expected_gradients = torch.autograd.grad(expected, exact, towards)
            empty = ~allowed.any(dim=-1)
            for name, way in ATTENTION_WAYS.items():
                what = f"{name}, case {case}: {causal=} {mask=} {[tuple(x.shape) for x in inputs]}"
                output = way(*inputs, mask, causal)
                assert output.dtype == dtype and (output[empty] == 0).all(), what
                check_close(output.double(), expected, tolerance, what)
                gradients = torch.autograd.grad(output, inputs, towards.to(dtype))
                for got, want in zip(gradients, expected_gradients, strict=True):
                    check_close(got.double(), want, tolerance, what)
            weights = attention.scaled_dot_product_attention(*inputs, mask, causal)[1]
            assert (weights[~allowed] == 0).all()
            check_close(weights.sum(dim=-1).double(), (~empty).double(), 1e-6, "weights add up to 1, or to 0")

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)])
    def test_all_ways_take_any_leading_dimensions(self, name, shape):
        q, k, v = (torch.randn(*shape, t, 4, dtype=torch.float64) for t in (3, 5, 5))
        mask = torch.rand(*shape, 3, 5) < 0.6
        expected = F.scaled_dot_product_attention(q, k, v, mask & torch.ones(3, 5).tril(2).bool())
        check_close(ATTENTION_WAYS[name](q, k, v, mask, True), expected, 1e-12)

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("causal", [False, True])
    def test_all_ways_pass_gradcheck(self, name, causal):
        way = ATTENTION_WAYS[name]
        mask = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4, [True, True, False, True]])
        sizes = ((2, 4, 3), (2, 4, 3), (2, 4, 2))
        inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        assert torch.autograd.gradcheck(lambda *x: way(*x, mask, causal), inputs)
        if name in ("loop", "written out"):
            assert torch.autograd.gradgradcheck(lambda *x: way(*x, mask, causal), inputs)
        if name == "written out":  # the weights are differentiable as well
            weights = lambda *x: attention.scaled_dot_product_attention(*x, mask, causal)[1]  # noqa: E731
            assert torch.autograd.gradcheck(weights, inputs)
        if name == "blockwise":
            with pytest.raises(RuntimeError, match="second derivative"):  # never one that is silently wrong
                torch.autograd.grad(way(*inputs).sum(), inputs, create_graph=True)

    @ATTENTION_EVERY_WAY
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_nothing_to_attend_to(self, name):
        """No keys at all, no queries at all, and rows that a mask empties: 0, and finite gradients."""
        way = ATTENTION_WAYS[name]
        q, k, v = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5)
        assert torch.equal(way(q, k, v), torch.zeros(2, 3, 5))
        assert way(q[:, :0], q, q).shape == (2, 0, 4)
        inputs = [torch.randn(2, 3, 4).requires_grad_() for _ in range(3)]
        output = way(*inputs, torch.zeros(3, 3, dtype=torch.bool), False)
        assert torch.equal(output, torch.zeros(2, 3, 4))
        with torch.autograd.detect_anomaly():  # no NaN on the way, either
            gradients = torch.autograd.grad(output.sum(), inputs)
        assert all(torch.equal(gradient, torch.zeros(2, 3, 4)) for gradient in gradients)

    @ATTENTION_EVERY_WAY
    def test_large_logits_stay_finite(self, name):
        way, q = ATTENTION_WAYS[name], torch.tensor([[1e4], [-1e4]], requires_grad=True)
        k, v = (torch.tensor(x, requires_grad=True)[:, None] for x in ([1.0, -1.0, 0.5], [1.0, 2.0, 4.0]))
        output = way(q, k, v)  # D = 1: the logits are q k
        assert output.tolist() == [[1.0], [2.0]]  # each query sees its best key alone
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (q, k, v)))
        only_the_worst = torch.tensor([[False, True, False], [True, False, False]])
        assert way(q, k, v, only_the_worst).tolist() == [[2.0], [1.0]]  # a masked +1e4 doesn't drown it
        low = way(torch.tensor([[300.0]]), torch.tensor([[-300.0], [-301.0]]), torch.tensor([[1.0], [2.0]]))
        assert low.item() == 1  # scores far below 0

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, name, dtype):
        way, mask = ATTENTION_WAYS[name], torch.rand(9, 9) < 0.5
        q, v = (30 * torch.randn(1, 2, 9, 64)).to(dtype), torch.randn(1, 2, 9, 64).to(dtype)
        inputs = [q.requires_grad_(), q.detach().clone().requires_grad_(), v.requires_grad_()]
        assert (q @ q.mT).isinf().any() or dtype == torch.bfloat16  # scaled afterwards, it would overflow
        output = way(*inputs, mask, False)
        assert output.dtype == dtype and output.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.float().sum(), inputs))
        small = [torch.randn(1, 2, 9, 64).to(dtype) for _ in range(3)]
        exact = F.scaled_dot_product_attention(*(x.double() for x in small), mask)
        check_close(way(*small, mask, False).double(), exact, 2e-2)

    def test_all_ways_make_tensors_where_their_input_is(self):
        """As on a GPU: new tensors would go elsewhere by default. And with another default dtype."""
        q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
        for way, causal in itertools.product(ATTENTION_WAYS.values(), (False, True)):
            with torch.device("meta"):
                outputs = [way(q, k, k, None, causal)]
            torch.set_default_dtype(torch.float64)
            try:
                outputs.append(way(q, k, k, None, causal))
            finally:
                torch.set_default_dtype(torch.float32)
            for output in outputs:
                check_close(output, way(q, k, k, None, causal), 1e-6)

    # ---- blockwise

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
    def test_blockwise_memory(self, tmp_path):
        """T = 8192, forward and backward: under 64 MB above the inputs; written out it takes 500."""
        megabytes = {}
        for name in ("blockwise", "written out"):
            command, where = (
                [sys.executable, "-c", ATTENTION_PEAK, name],
                os.environ | {"PYTHONPATH": str(ROOT)},
            )
            megabytes[name] = float(subprocess.check_output(command, cwd=tmp_path, env=where, timeout=240))
        assert megabytes["blockwise"] < 64 and megabytes["written out"] > 500, megabytes

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_blockwise_sums_in_float32(self, dtype):
        """Sums that half precision can't hold: they would stall (bfloat16 counts to 256), or lose digits."""
        q, k, v = torch.zeros(1, 8), torch.zeros(5000, 8), (torch.arange(5000) >= 2500).float()[:, None]
        assert attention.blockwise_attention(*(x.to(dtype) for x in (q, k, v)), block_size=1).item() == 0.5
        q, k, v = (torch.full((n, 1), x, dtype=dtype) for n, x in ((1, 10.0), (4, 10.0), (4, 0.0)))
        (dv,) = torch.autograd.grad(attention.blockwise_attention(q, k, v.requires_grad_()).sum(), v)
        assert dv.tolist() == [[0.25]] * 4  # log-sum-exp is 101.386
        inputs = torch.ones(1000, 1), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]])
        inputs = [x.to(dtype).requires_grad_() for x in inputs]
        _, dk, dv = torch.autograd.grad(attention.blockwise_attention(*inputs, block_size=1).sum(), inputs)
        assert dv.flatten().tolist() == [500.0, 500.0] and dk.flatten().tolist() == [250.0, -250.0]

    def test_blockwise_is_exact_under_autocast(self):
        inputs = [torch.randn(2, 9, 8).requires_grad_() for _ in range(3)]
        expected = attention.blockwise_attention(*inputs, block_size=4)
        expected_gradients = torch.autograd.grad(expected.sum(), inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = attention.blockwise_attention(*inputs, block_size=4)
            gradients = torch.autograd.grad(output.sum(), inputs)
        for got, want in zip((output, *gradients), (expected, *expected_gradients), strict=True):
            assert torch.equal(got, want)

    # ---- masks

    def test_causal_mask(self):
        x, o = True, False
        assert attention.causal_mask(3).tolist() == [[x, o, o], [x, x, o], [x, x, x]]
        assert attention.causal_mask(2, 4).tolist() == [[x, x, x, o], [x, x, x, x]]
        assert attention.causal_mask(3, 2).tolist() == [[o, o], [x, o], [x, x]]
        assert attention.causal_mask(1, 5).all() and attention.causal_mask(2).dtype == torch.bool

    def test_padding_mask(self):
        x, o = True, False
        padding = attention.padding_mask(torch.tensor([0, 2, 3]))
        assert padding.tolist() == [[[[o, o, o]]], [[[x, x, o]]], [[[x, x, x]]]]
        assert attention.padding_mask([1, 3], max_len=3).tolist() == [[[[x, o, o]]], [[[x, x, x]]]]
        assert attention.padding_mask(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 1, 0)
        for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"):
            lengths = np.array([0, 2, 3], dtype=kind)
            for given in (lengths, torch.from_numpy(lengths)):
                assert torch.equal(attention.padding_mask(given), padding), kind

    # ---- MultiHeadAttention

    @ATTENTION_DTYPES
    def test_multi_head_attention_agrees_with_torch(self, dtype, tolerance):
        """Values, weights, gradients of inputs and parameters, with kv_dim and without bias, too."""
        draw = random.Random(2)
        for case in range(200):
            heads, b, tq, tk = (draw.randint(1, n) for n in (3, 3, 6, 7))
            c, bias, cross = heads * draw.choice([1, 4, 5]), draw.random() < 0.5, draw.random() < 0.5
            kv_dim = draw.choice([None, 6, 7]) if cross else None
            sizes = {"bias": bias, "kdim": kv_dim, "vdim": kv_dim, "batch_first": True, "dtype": dtype}
            theirs = nn.MultiheadAttention(c, heads, **sizes)
            if bias:  # torch starts them at 0, which would hide a mix-up
                nn.init.normal_(theirs.in_proj_bias), nn.init.normal_(theirs.out_proj.bias)
            ours = attention.MultiHeadAttention.from_torch(theirs)
            ours.fused = draw.random() < 0.5
            query = torch.randn(b, tq, c, dtype=dtype, requires_grad=True)
            context = torch.randn(b, tk, kv_dim or c, dtype=dtype, requires_grad=True) if cross else None
            source = query if context is None else context
            tk = source.size(1)
            causal = draw.random() < 0.4 and tk >= tq
            hidden = torch.rand(b, tk) < 0.3 if draw.random() < 0.6 else torch.zeros(b, tk, dtype=torch.bool)
            hidden[:, 0] = False  # torch gives NaN where nothing may be attended to
            future = torch.ones(tq, tk).triu(tk - tq + 1).bool() if causal else None
            expected, expected_weights = theirs(
                query, source, source, hidden, attn_mask=future, average_attn_weights=False
            )
            mask = ~hidden[:, None, None, :] if hidden.any() else None
            output, weights = ours.forward_with_weights(query, context, mask, causal)
            what = f"case {case}: {heads=} {c=} {tq=} {tk=} {cross=} {causal=} {bias=} {kv_dim=}"
            check_close(output, expected, tolerance, what)
            check_close(weights, expected_weights, tolerance, what)
            assert torch.equal(output, ours(query, context, mask, causal)), what

            towards, tensors = torch.randn_like(output), [query] if context is None else [query, context]
            got = torch.autograd.grad(output, [*tensors, *ours.parameters()], towards)
            want = torch.autograd.grad(expected, [*tensors, *theirs.parameters()], towards)
            for one, other in zip(got[: len(tensors)], want[: len(tensors)], strict=True):
                check_close(one, other, tolerance, what)
            got = dict(zip(dict(ours.named_parameters()), got[len(tensors) :], strict=True))
            for name, gradient in zip(dict(theirs.named_parameters()), want[len(tensors) :], strict=True):
                if name.startswith("in_proj_"):
                    packed = [got[f"{x}_proj.{name.removeprefix('in_proj_')}"] for x in "qkv"]
                    check_close(torch.cat(packed), gradient, tolerance, what)
                else:
                    check_close(got[name.replace("_proj_weight", "_proj.weight")], gradient, tolerance, what)

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
        assert torch.equal(ours.k_proj.weight, source.in_proj_weight[12:24])
        for name, p in source.named_parameters():  # a copy
            nn.init.constant_(p, 7)
            assert not any((q == 7).any() for q in ours.parameters()), name

    def test_multi_head_attention_parameters(self):
        module = attention.MultiHeadAttention(24, 4, kv_dim=10)
        for name, width in (("q", 24), ("k", 10), ("v", 10), ("out", 24)):
            projection, limit = module.get_submodule(f"{name}_proj"), math.sqrt(6 / (24 + width))
            assert projection.weight.shape == (24, width) and projection.bias.tolist() == [0] * 24
            assert 0.9 * limit < projection.weight.abs().max() <= limit  # Glorot, uniform
        names = [name for name, _ in attention.MultiHeadAttention(8, 2, bias=False).named_parameters()]
        assert names == [f"{x}_proj.weight" for x in ("q", "k", "v", "out")]

    @ATTENTION_FUSED_OR_NOT
    def test_padding_and_empty_rows(self, fused):
        module = attention.MultiHeadAttention(12, 3, fused=fused).double()
        nn.init.normal_(module.out_proj.bias)
        x = torch.randn(3, 6, 12, dtype=torch.float64).requires_grad_()
        mask = attention.padding_mask(torch.tensor([4, 0, 6]))
        output, weights = module.forward_with_weights(x, mask=mask)
        check_close(output[1], module.out_proj.bias.expand(6, 12), 0.0, "a query without keys: the bias")
        assert (weights[1] == 0).all()
        output.sum().backward()
        assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())
        # What stands in the padding changes nothing, nor do more padding and the other sequences.
        altered = x.detach().clone()
        altered[0, 4:] = 1e3
        check_close(module(altered, mask=mask)[0, :4], output[0, :4], 0.0)
        longer = F.pad(x.detach()[:1], (0, 0, 0, 5)), None, attention.padding_mask(torch.tensor([4]), 11)
        check_close(module(*longer)[0, :4], output[0, :4], 1e-12)
        check_close(module(x[:1, :4])[0], output[0, :4], 1e-12)

    @ATTENTION_FUSED_OR_NOT
    def test_causality(self, fused):
        """A later token moves no earlier output; it moves its own and the later ones."""
        module, x = attention.MultiHeadAttention(12, 3, fused=fused), torch.randn(3, 6, 12)
        altered = x + (torch.arange(6) == 4)[:, None]
        moved = (module(altered, causal=True) - module(x, causal=True)).abs().amax(dim=(0, 2))
        assert (moved[:4] == 0).all() and (moved[4:] > 1e-6).all()

    def test_second_derivatives(self):
        module = attention.MultiHeadAttention(6, 2, fused=False).double()
        x = torch.randn(1, 3, 6, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x: module(x, causal=True), x)

    @ATTENTION_FUSED_OR_NOT
    @pytest.mark.parametrize("causal", [False, True])
    def test_dropout_only_in_training(self, fused, causal):
        module = attention.MultiHeadAttention(8, 2, dropout=0.5, fused=fused)
        plain, x = attention.MultiHeadAttention(8, 2), torch.randn(2, 7, 8)
        plain.load_state_dict(module.state_dict())
        expected, expected_weights = plain.forward_with_weights(x, causal=causal)
        check_close(module.eval()(x, causal=causal), expected, 1e-6)
        module.train()
        torch.manual_seed(1)
        first, weights = module.forward_with_weights(x, causal=causal)
        torch.manual_seed(1)
        assert torch.equal(first, module(x, causal=causal))
        assert not torch.equal(first, module(x, causal=causal))
        check_close(weights, expected_weights, 1e-6, "weights are those before dropout")
        mean = torch.stack([module(x, causal=causal) for _ in range(2000)]).mean(dim=0)
        assert (mean - expected).abs().max() < 0.15  # unbiased: what is kept is scaled up

    @ATTENTION_FUSED_OR_NOT
    def test_cache_equals_one_shot(self, fused):
        module = attention.MultiHeadAttention(12, 3, fused=fused).double()
        x = torch.randn(2, 9, 12, dtype=torch.float64).requires_grad_()
        mask = attention.padding_mask(torch.tensor([9, 9])).clone()
        mask[0, ..., :2] = False  # left padding
        expected = module(x, mask=mask, causal=True)
        expected_gradient = torch.autograd.grad(expected.sum(), x, retain_graph=True)[0]
        for pieces in ([1] * 9, [4, 1, 3, 1], [9]):
            cache, outputs, seen = attention.KVCache(), [], 0
            for piece in x.split(pieces, dim=1):
                seen += piece.size(1)
                outputs.append(module.forward_cached(piece, cache, mask[..., :seen]))
            assert cache.k.shape == cache.v.shape == (2, 3, 9, 4)
            output = torch.cat(outputs, dim=1)
            check_close(output, expected, 1e-12, str(pieces))
            check_close(torch.autograd.grad(output.sum(), x)[0], expected_gradient, 1e-12, str(pieces))
        cache = attention.KVCache()
        module.forward_cached(x[:, :5], cache)
        cache.k, cache.v = cache.k[[1, 1]], cache.v[[1, 1]]  # as a beam search does
        expected = module(x[[1, 1], :6], causal=True)[:, 5:]
        check_close(module.forward_cached(x[[1, 1], 5:6], cache), expected, 1e-12)

    def test_cache_survives_what_is_refused(self):
        """A wrong mask or batch leaves the tokens that were there, so that a caller can try again."""
        module = attention.MultiHeadAttention(12, 3)
        cache, x = attention.KVCache(), torch.randn(2, 4, 12)
        module.forward_cached(x[:, :3], cache)
        for query, mask in [(x, torch.ones(4)), (x, torch.ones(2, dtype=torch.bool)), (x[:1], None)]:
            with pytest.raises((ValueError, RuntimeError)):
                module.forward_cached(query[:, 3:], cache, mask)
            assert cache.k.shape == cache.v.shape == (2, 3, 3, 4)
        check_close(module.forward_cached(x[:, 3:], cache), module(x, causal=True)[:, 3:], 1e-6)

    # ---- refusals: what would be silently wrong

    @pytest.mark.parametrize("call,words", [
        (lambda a: a.padding_mask(torch.tensor([2, 5]), 4), "lengths.*max_len=4.*5"),
        (lambda a: a.padding_mask(torch.tensor([-1, 2])), "lengths.*-1"),
        (lambda a: a.padding_mask(torch.tensor([1.5])), "lengths.*float32"),
        (lambda a: a.padding_mask(torch.tensor([[1]])), "lengths.*1, 1"),
        (lambda a: a.padding_mask(torch.tensor([True, False])), "lengths.*bool"),
        (lambda a: a.blockwise_attention(*torch.randn(3, 5, 4), block_size=0), "block_size.*0"),
        (lambda a: a.blockwise_attention(*torch.randn(3, 5, 4), block_size=-1), "block_size.*-1"),
        (lambda a: a.MultiHeadAttention(10, 4), "n_heads.*4.*10"),
        (lambda a: a.MultiHeadAttention(8, 0), "n_heads.*0"),
        (lambda a: a.MultiHeadAttention(8, -2), "n_heads.*-2"),
        (lambda a: a.MultiHeadAttention(8, 1)(torch.randn(5, 8)), "5, 8"),  # one head: it would run
        (lambda a: a.MultiHeadAttention(8, 1)(torch.randn(2, 5, 8), torch.randn(5, 8)), "5, 8"),
        (lambda a: a.MultiHeadAttention(8, 2)(torch.randn(2, 5, 8), mask=torch.ones(5)), "mask.*float"),
        (lambda a: a.MultiHeadAttention.from_torch(nn.MultiheadAttention(12, 3, kdim=4, vdim=6)), "vdim"),
        (lambda a: a.MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, add_bias_kv=True)), "bias_kv"),
        (lambda a: a.MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, add_zero_attn=True)), "zero"),
    ])  # fmt: skip
    def test_refused(self, call, words):
        with pytest.raises(ValueError, match=words):
            call(attention)

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("shapes", [  # of q, k, v and a mask
        "215 217 217 75", "215 217 217 56", "215 217 217 27", "215 217 217 12157", "215 217 217 2357",
        "215 217 219 57", "215 217 216 57",
    ])  # fmt: skip
    def test_all_ways_refuse_shapes(self, name, shapes):
        """The 4th and 5th mask would enlarge the output; more values than keys would be cut off."""
        *inputs, mask = ([int(n) for n in word] for word in shapes.split())
        inputs = [torch.randn(*size, 4) for size in inputs]
        with pytest.raises((RuntimeError, IndexError)):
            ATTENTION_WAYS[name](*inputs, torch.ones(mask, dtype=torch.bool))

    @ATTENTION_EVERY_WAY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    def test_all_ways_refuse_masks_of_numbers(self, name, dtype):
        with pytest.raises(ValueError, match="mask.*boolean"):
            ATTENTION_WAYS[name](*torch.randn(3, 5, 4), torch.ones(5, 5, dtype=dtype))

    # ---- it leaves Python

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("way", ["trace", "script", "export", "compile"])
    def test_multi_head_attention_leaves_python(self, way):
        """Traced, scripted, exported and compiled: the same outputs, at sizes that were not there then."""
        combinations = list(itertools.product([False, True], repeat=4))
        if way in ("export", "compile"):  # seconds each
            combinations = [(True, True, False, False), (True, True, True, False), (True, False, True, True)]
        for causal, fused, cross, masked in combinations:
            module = AttentionCall(causal, fused, cross)
            tk = 5 if causal and way == "trace" else 7  # a trace must not rely on Tq = Tk
            example = AttentionCall.example(2, 5, tk, cross, masked)
            if way == "trace":
                converted = torch.jit.trace(module, example_kwarg_inputs=example)
            elif way == "script":
                converted = torch.jit.script(module)
            elif way == "export":
                free = {"query": (0, 1), "context": (0, 1), "mask": (0, 3)}
                free = {name: dict.fromkeys(free[name], torch.export.Dim.AUTO) for name in example}
                converted = torch.export.export(module, (), example, dynamic_shapes=free).module()
            else:
                torch._dynamo.reset()
                converted = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
            for sizes in ((2, 5, 7), (3, 4, 9), (1, 8, 6), (2, 6, 6)):
                given = AttentionCall.example(*sizes, cross, masked)
                what = f"{way} {causal=} {fused=} {cross=} {masked=} {sizes}"
                check_close(converted(**given), module(**given), 1e-6, what)

    def test_traced_fused_attention_fits_other_lengths(self):
        q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 7, 8)
        with warnings.catch_warnings(action="ignore"):  # deprecated
            traced = torch.jit.trace(lambda q, k: attention.fused_attention(q, k, k, causal=True), (q, q))
        for a, b in ((q, k), (k, k), (q[:, :, :2], k)):
            check_close(traced(a, b), attention.fused_attention(a, b, b, causal=True), 1e-6)

    # ---- pictures

    @staticmethod
    def weights(*shape: int) -> Tensor:
        weights = torch.rand(shape).softmax(dim=-1)
        weights[..., 1:2] = 0.0  # masked
        return weights

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 6, 6), (1, 1, 1), (1, 2, 1, 300), (1, 1, 700, 600)])
    def test_plot_attention(self, shape, tmp_path, monkeypatch):
        """Any tokens and sizes; a row of maps per layer, masked cells grey, queries down, keys across."""
        from matplotlib.figure import Figure

        tokens = ["a", "$\\frac$", "<b>", "two\nlines", "word" * 9, "$"] * 200
        tokens, weights, figures = tokens[: max(shape[-2:])], self.weights(*shape), []
        keep = lambda figure, path, **how: figures.append(figure) or savefig(figure, path, **how)  # noqa: E731
        savefig = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", keep)
        path = tmp_path / "a.png"
        assert attention.plot_attention(weights, tokens[: shape[-2]], tokens[: shape[-1]], path) == path
        assert path.read_bytes().startswith(b"\x89PNG") and os.listdir(tmp_path) == ["a.png"]
        maps = [axes.images[0] for axes in figures[0].axes if axes.images][: math.prod(shape[:-2])]
        for picture, expected in zip(maps, weights.flatten(0, -3), strict=True):
            np.testing.assert_allclose(picture.get_array().filled(0), expected, rtol=1e-6)
            assert picture.get_clim() == (0, pytest.approx(weights.max().item()))
            assert picture.cmap.get_bad().tolist() == pytest.approx([0.8, 0.8, 0.8, 1.0])
        labels = [x.get_text() for x in figures[0].axes[len(maps) - 1].get_xticklabels()]
        assert len(labels) <= 40 and max(map(len, labels)) <= 12
        if shape == (2, 5, 7):
            assert labels == ["a", "$\\\\frac$", "<b>", "two\\nlines", "wordwordword", "$", "a"]

    @pytest.mark.parametrize("weights,words", [
        (torch.rand(2, 2), "2, 2"), (torch.rand(1, 2, 3), "1, 2, 3"), (torch.rand(1, 3, 2), "1, 3, 2"),
        (torch.rand(1, 1, 1, 2, 2), "1, 1, 1, 2, 2"), (torch.full((1, 2, 2), 1.02), "1.02"),
        (torch.full((1, 2, 2), -0.5), "-0.5"), (torch.full((1, 2, 2), math.nan), "nan"),
    ])  # fmt: skip
    def test_pictures_refuse_what_is_no_weights(self, weights, words, tmp_path):
        for draw in (attention.plot_attention, attention.attention_html):
            with pytest.raises(ValueError, match=f"(?s)weights.*{words}"):
                draw(weights, ["a", "b"], ["a", "b"], tmp_path / "x")
        assert not list(tmp_path.iterdir())

    def test_attention_html(self, tmp_path):
        """Self-contained, no token gets out of its place, weights to 4 digits, 0 alone is shown as masked."""
        queries = ["<script>alert(1)</script>", "</script>", 'quo"te', "ünï\u2028", "DATA"]
        keys = ["<!--", "&amp;", "x"]
        weights = self.weights(2, 3, 5, 3)
        weights[0, 0, 0] = torch.tensor([1.0, 1e-7, 0.0])
        page = attention.attention_html(weights, queries, keys, tmp_path / "a.html").read_text("utf-8")
        assert not re.findall(r"https?:|src=|url\(|import ", page)
        assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
        data = json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page, re.S)[1])
        assert data["queries"] == queries and data["keys"] == keys
        stored = np.array(data["weights"])
        assert np.abs(stored / 10_000 - weights.numpy()).max() <= 1e-4
        assert ((stored == 0) == (weights == 0).numpy()).all() and stored[0, 0, 0].tolist() == [10_000, 1, 0]
        half = torch.tensor([[[1.0078125]]], dtype=torch.bfloat16, requires_grad=True)  # rounded up
        page = attention.attention_html(half, ["a"], ["b"], tmp_path / "b.html").read_text("utf-8")
        assert '"weights":[[[[10000]]]]' in page

    # ---- the demo

    def test_induction_batch(self):
        """The answer is the word that followed the asked one, and it stands where `places` says."""
        tokens, places, answers = attention.induction_batch(300)
        assert set(tokens.flatten().tolist()) == set(range(len(attention.WORDS)))
        seen = attention.N_SEEN
        for row, where, what in zip(tokens.tolist(), places.tolist(), answers.tolist(), strict=True):
            first, asked = row[:seen], row[seen:]
            assert len(set(first)) == seen and sorted(asked) == sorted(first[:-1]) and len(where) == seen - 1
            for word, place, answer in zip(asked, where, what, strict=True):
                assert place == first.index(word) + 1 and answer == first[place]

    def test_demo_alone_in_an_empty_folder(self, tmp_path):
        shutil.copy(ROOT / "attention.py", tmp_path)
        arguments = "--max-len", "1024", "--seed", "3"
        environment = {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
        result = run_script("attention.py", *arguments, cwd=tmp_path, folder=tmp_path, **environment)
        headline = last_json(result)
        assert result.stderr == "" and len(result.stdout.strip().splitlines()[-1]) < 300
        report = json_of(tmp_path / headline["report"])
        assert headline["weight_on_answer"] >= 0.9 and headline["exact_match"] >= 0.99
        assert len(report["largest_difference"]) == 3 and max(report["largest_difference"].values()) < 1e-12
        kept = {(row["T"], row["way"]): row["MB"] for row in report["scaling"]}
        grows = {way: kept[1024, way] / kept[512, way] for way in attention.WAYS}
        assert grows["written out"] > 3 and grows["blockwise"] < 2.1 and grows["fused"] < 2.1
        assert all(report[key] for key in ("settings", "cpu", "threads", "torch", "command", "date"))
        names = sorted(os.listdir(tmp_path / "out/attention"))
        assert names == ["heads.html", "heads.png", "report.json"]

    def test_logged_benchmark(self):
        log = json_of(ROOT / "assets/attention_benchmark.json")
        assert log["shape"] == {"B": 32, "T": 256, "d_model": 256, "n_heads": 8} and log["rounds"] >= 10
        assert log["ratio"]["median"] > 1 and log["ratio"]["quartiles"] == sorted(log["ratio"]["quartiles"])
        assert all(log[key] for key in ("cpu", "threads", "torch", "date", "command"))


# -----------------------------------------------------------------------------
# encoder.py

ENCODER_POOLS = ["mean", "max", "mean+max", "first"]


def encoder_small(**given) -> encoder.EncoderConfig:
    sizes = {"max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
    return encoder.EncoderConfig(30, **(sizes | given))


def encoder_classifier(**given) -> encoder.EncoderClassifier:
    return encoder.EncoderClassifier(encoder_small(**given)).eval()


def encoder_config(rng: random.Random, **given) -> encoder.EncoderConfig:
    """A small random config; dropout is 0, so that training mode can be compared."""
    n_heads = rng.choice([1, 2, 3, 4])
    sizes = {
        "vocab_size": rng.randint(5, 50), "max_len": rng.randint(12, 40), "n_layers": rng.randint(1, 3),
        "n_heads": n_heads, "d_model": n_heads * rng.randint(1, 6), "d_ff": rng.randint(1, 40),
        "n_classes": rng.randint(1, 5), "dropout": 0.0, "norm_first": rng.random() < 0.5,
        "activation": rng.choice(["relu", "gelu"]), "pool": rng.choice(ENCODER_POOLS),
    }  # fmt: skip
    return encoder.EncoderConfig(**(sizes | given))


def encoder_tokens(rng: random.Random, config: encoder.EncoderConfig) -> Tensor:
    """(4, T) ids with padding after lengths from 1 to T."""
    T = rng.randint(2, config.max_len)
    tokens = torch.randint(0, config.vocab_size - 1, (4, T))
    tokens += tokens >= config.pad_id  # any id but pad_id
    for row in tokens:
        row[rng.randint(1, T) :] = config.pad_id
    return tokens


def encoder_torch_layer(config: encoder.EncoderConfig, **given) -> nn.TransformerEncoderLayer:
    """torch's layer; its parameters are random: zero biases and unit norms would hide a forgotten one."""
    choices = {"dropout": 0.0, "activation": config.activation, "norm_first": config.norm_first}
    sizes = config.d_model, config.n_heads, config.d_ff
    layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, **(choices | given))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


class TestEncoder:
    # Oracles

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    def test_encoder_layer_equals_torch(self, norm_first, activation, dtype, tolerance):
        """Values, gradients of the input and of every parameter, with padding; eps is taken over too."""
        for seed in range(10):
            rng = random.Random(seed)
            config = encoder_config(rng, norm_first=norm_first, activation=activation)
            eps = rng.choice([1e-5, 1e-2])
            theirs = encoder_torch_layer(config, dtype=dtype, layer_norm_eps=eps)
            ours = encoder.EncoderLayer.from_torch(theirs)
            x = torch.randn(rng.randint(1, 4), rng.randint(1, 9), config.d_model, dtype=dtype)
            mask = torch.rand(x.shape[:2]) < 0.7
            mask[:, 0] = True
            inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            output = ours(inputs[0], mask[:, None, None, :])
            expected = theirs(inputs[1], src_key_padding_mask=~mask)
            check_close(output, expected, tolerance, "output")
            upstream = torch.randn_like(x)
            (output * upstream).sum().backward()
            (expected * upstream).sum().backward()
            check_close(inputs[0].grad, inputs[1].grad, tolerance, "gradient of x")
            for parameter in theirs.parameters():
                parameter.data = parameter.grad
            wanted = encoder.EncoderLayer.from_torch(theirs)  # so that each gradient has our name
            for name, parameter in ours.named_parameters():
                check_close(parameter.grad, wanted.get_parameter(name), tolerance, f"gradient of {name}")

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder_stack_equals_torch(self, norm_first):
        """embedding * sqrt(C) + positions, the layers; a final norm in pre-norm, none in post-norm."""
        for seed in range(10):
            rng = random.Random(seed)
            config = encoder_config(rng, norm_first=norm_first, pad_id=rng.choice([0, 3]))
            ours = encoder.Encoder(config).double()
            theirs = [encoder_torch_layer(config).double() for _ in range(config.n_layers)]
            ours.layers = nn.ModuleList(map(encoder.EncoderLayer.from_torch, theirs))
            tokens = encoder_tokens(rng, config)
            mask = tokens != config.pad_id
            positions = encoder.sinusoidal_positional_encoding(tokens.size(1), config.d_model)
            x = ours.embedding.weight[tokens] * math.sqrt(config.d_model) + positions
            for layer in theirs:
                x = layer(x, src_key_padding_mask=~mask)
            if norm_first:
                nn.init.normal_(ours.final_norm.weight)
                nn.init.normal_(ours.final_norm.bias)
                x = F.layer_norm(x, x.shape[-1:], ours.final_norm.weight, ours.final_norm.bias)
            check_close(ours(tokens)[mask], x[mask], 1e-10)

    def test_self_attention_equals_attention_py(self):
        """Values, weights and gradients of both files' attention; a row without keys, too."""
        short, long = encoder.SelfAttention(12, 3).double(), attention.MultiHeadAttention(12, 3).double()
        projections = long.q_proj, long.k_proj, long.v_proj
        for module, weight, bias in zip(
            projections, short.qkv_proj.weight.chunk(3), short.qkv_proj.bias.chunk(3), strict=True
        ):
            module.load_state_dict({"weight": weight, "bias": bias})
        long.out_proj.load_state_dict(short.out_proj.state_dict())
        x = torch.randn(5, 7, 12, dtype=torch.float64, requires_grad=True)
        padding = attention.padding_mask(torch.tensor([7, 4, 1, 0, 6]))  # (5, 1, 1, 7)
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
        mask[0], mask[1], mask[2] = False, True, torch.arange(7) == 3
        seen = x.masked_fill(~mask[:, :, None], math.nan)  # what stands at padding counts for nothing
        for row, result in enumerate(encoder.pool_tokens(seen, mask, pool)):
            real = [x[row, t] for t in range(7) if mask[row, t]] or [torch.zeros(4).double()]
            mean, largest = torch.stack(real).mean(0), torch.stack(real).max(0).values
            both, first = torch.cat((mean, largest)), x[row, 0] * mask[row, 0]
            expected = {"mean": mean, "max": largest, "mean+max": both, "first": first}
            check_close(result, expected[pool], 1e-12, pool)
        assert torch.autograd.gradcheck(encoder.pool_tokens, (x.requires_grad_(), mask, pool))

    # Properties

    def test_forward_with_weights_are_those_of_forward(self):
        for seed in range(6):
            rng = random.Random(seed)
            config = encoder_config(rng)
            model, used = encoder.Encoder(config), []
            tokens = encoder_tokens(rng, config)
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
        """More padding, other rows, other ids under the mask: a row's logits stay what they are alone."""
        for seed in range(30):
            rng = random.Random(seed)
            config = encoder_config(rng, pad_id=rng.choice([0, 2]))
            model = encoder.EncoderClassifier(config).double().eval()
            tokens = encoder_tokens(rng, config)
            mask = tokens != config.pad_id
            logits = model(tokens)
            assert logits.shape == (4, config.n_classes)
            for row, length in enumerate(mask.sum(1).tolist()):
                alone = model(tokens[row : row + 1, :length])
                check_close(alone, logits[row : row + 1], 1e-12, "alone, unpadded")
            longer = F.pad(tokens, (0, config.max_len - tokens.size(1)), value=config.pad_id)
            check_close(model(longer), logits, 1e-12, "more padding")
            mask = torch.rand(tokens.shape) < 0.7  # holes in the middle, too
            noise = torch.where(mask, tokens, torch.randint(0, config.vocab_size, tokens.shape))
            check_close(model(noise, mask), model(tokens, mask), 1e-12, "whatever stands under the mask")

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("pool", ENCODER_POOLS)
    def test_pool_tokens_of_padding_alone_is_0(self, pool, norm_first):
        """So the logits are the head's bias; and gradients are finite."""
        model = encoder_classifier(norm_first=norm_first, pool=pool)
        logits = model(torch.tensor([[0, 0, 0], [5, 6, 0]]))
        assert torch.equal(logits[0], model.head.bias)
        assert not torch.equal(logits[1], model.head.bias)
        logits.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder_dropout_in_training_alone(self, norm_first):
        """On embeddings, each sub-layer's output (the residual stays) and the pooled vector."""
        model = encoder_classifier(dropout=1 - 1e-9, norm_first=norm_first)
        tokens, nothing = torch.randint(1, 20, (3, 6)), model.head.bias.expand(3, -1)
        assert torch.equal(model(tokens), model(tokens))
        assert (model(tokens) - nothing).abs().max() > 0.01
        model.dropout.train()
        check_close(model(tokens), nothing, 1e-6)
        model.train()
        assert not model.encoder.embed(tokens)[0].any()
        layer, x = model.encoder.layers[0], torch.randn(2, 5, 16)
        expected = x if norm_first else layer.ffn_norm(layer.self_attention_norm(x))
        check_close(layer(x), expected, 1e-6)
        dropouts = [m.p for m in encoder_classifier(dropout=0.3).modules() if isinstance(m, nn.Dropout)]
        assert dropouts == [0.3] * 3

    def test_encoder_sees_order_by_its_positions_alone(self):
        model = encoder_classifier()
        tokens = torch.randperm(29)[None, :10] + 1
        shuffled = tokens[:, torch.randperm(10)]
        assert (model(tokens) - model(shuffled)).abs().max() > 1e-3
        model.encoder.positions.zero_()
        check_close(model(tokens), model(shuffled), 1e-5)

    def test_encoder_has_the_paper_s_parameters(self):
        sizes = {"d_model": 8, "n_heads": 2, "n_layers": 3, "d_ff": 20, "n_classes": 4, "pool": "mean+max"}
        model = encoder.EncoderClassifier(encoder.EncoderConfig(11, **sizes))
        layer = 4 * 8 * 8 + 4 * 8 + 2 * 8 * 20 + 20 + 8 + 4 * 8
        n_parameters = sum(p.numel() for p in model.parameters())
        assert n_parameters == 11 * 8 + 3 * layer + 2 * 8 + 16 * 4 + 4
        embedded = encoder.Encoder(encoder.EncoderConfig(500)).embed(torch.arange(500)[:, None])[0]
        positions = encoder.sinusoidal_positional_encoding(1, 128)
        assert 0.9 < (embedded - positions).std() < 1.1, "words weigh as much as positions"

    def test_encoder_config_defaults(self):
        """Weights without their config are another model's once a default changes."""
        assert dataclasses.astuple(encoder.EncoderConfig(9)) == (
            9, 512, 128, 4, 2, 512, 0.1, True, "gelu", 2, 0, "mean",
        )  # fmt: skip

    @pytest.mark.parametrize("assign", [False, True])
    def test_encoder_from_the_meta_device(self, assign):
        """All is right once weights are loaded, positions too: to_empty leaves old memory there."""
        source, tokens = encoder_classifier(), torch.randint(1, 20, (3, 6))
        with torch.device("meta"):
            model = encoder_classifier()
        if not assign:
            model.to_empty(device="cpu")
            for tensor in (*model.parameters(), *model.buffers()):
                nn.init.constant_(tensor, math.nan)
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(model(tokens), source(tokens))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_encoder_follows_the_default_dtype(self, dtype):
        torch.set_default_dtype(dtype)
        try:
            logits = encoder_classifier()(torch.randint(1, 20, (3, 6)))
        finally:
            torch.set_default_dtype(torch.float32)
        assert logits.dtype == dtype and logits.isfinite().all()

    def test_self_attention_weights_in_float16(self):
        model = encoder.SelfAttention(64, 1).half()
        nn.init.zeros_(model.qkv_proj.bias)
        model.qkv_proj.weight.data = torch.eye(64).repeat(3, 1).half() * 8
        weights = model.weights(torch.full((1, 3, 64), 8.0).half())
        check_close(weights.float(), torch.full((1, 1, 3, 3), 1 / 3), 1e-3)  # q k' = 262,144 overflows

    @pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; people still deploy with it
    @pytest.mark.parametrize("norm_first, pool", [(True, "mean+max"), (False, "first"), (True, "max")])
    def test_encoder_leaves_python_at_other_sizes(self, norm_first, pool):
        model = encoder_classifier(norm_first=norm_first, pool=pool)
        example, other = torch.randint(1, 30, (3, 9)), torch.randint(1, 30, (5, 12))
        other[1, 4:], other[2] = 0, 0
        dynamic = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=12)}}
        made = {
            "script": torch.jit.script(model),
            "trace": torch.jit.trace(model, (example,)),
            "export": torch.export.export(model, (example,), dynamic_shapes=dynamic).module(),
            "compile": torch.compile(model, fullgraph=True, backend="eager"),
        }
        for name, module in made.items():
            check_close(module(other), model(other), 1e-6, name)

    # Refusals

    @pytest.mark.parametrize(
        "named, given",
        [
            ("n_heads.*d_model=9.*2", {"d_model": 9}), ("n_heads.*0", {"n_heads": 0}),
            ("activation.*tanh", {"activation": "tanh"}), ("pool.*cls", {"pool": "cls"}),
        ],
    )  # fmt: skip
    def test_encoder_config_refuses(self, named, given):
        with pytest.raises(ValueError, match=named):
            encoder_small(**given)

    @pytest.mark.parametrize(
        "given",
        [
            {"batch_first": False}, {"bias": False},
            {"activation": F.silu}, {"activation": nn.GELU(approximate="tanh")},
        ],
    )  # fmt: skip
    def test_from_torch_refuses(self, given):
        theirs = nn.TransformerEncoderLayer(8, 2, 16, **({"batch_first": True} | given))
        with pytest.raises(ValueError, match="from_torch|activation"):
            encoder.EncoderLayer.from_torch(theirs)

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

    # Runs and demo

    def test_train_is_a_function_of_its_seed(self):
        """Twice the same; another seed of the training alone gives other batches, hence other weights."""
        tokens, labels, weights = torch.randint(1, 20, (200, 9)), torch.randint(0, 2, (200,)), []
        for seed in (3, 3, 4):
            torch.manual_seed(0)
            model = encoder_classifier(dropout=0.1)
            encoder.train(model, tokens, labels, encoder.Settings(epochs=1, seed=seed))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    def test_generate_reviews_are_twins(self):
        reviews = encoder.generate_reviews(4000, seed=5)
        assert reviews == encoder.generate_reviews(4000, seed=5) != encoder.generate_reviews(4000, seed=6)
        assert len({text for text, _ in reviews}) == 4000, "so no sentence is in two splits"
        for (positive, one), (negative, zero) in zip(reviews[::2], reviews[1::2], strict=True):
            assert (one, zero) == (1, 0) and sorted(positive.split()) == sorted(negative.split())
            assert "{" not in positive and "  " not in positive + negative

    def test_main_of_an_untrained_encoder_concludes_nothing(self, tmp_path, capsys):
        encoder.main(encoder.Settings(epochs=0, out=str(tmp_path)))
        assert "conclusion: none" in capsys.readouterr().out

    def test_main_that_diverges_ends_in_a_sentence(self, tmp_path, capsys):
        with pytest.raises(SystemExit, match="--lr"):
            encoder.main(encoder.Settings(lr=1e30, out=str(tmp_path)))
        assert "conclusion" not in capsys.readouterr().out and not list(tmp_path.iterdir())

    def test_encoder_demo_alone_in_an_empty_folder(self, tmp_path):
        """The file copied alone, on a terminal that knows ASCII only: table, picture, report."""
        shutil.copy(ROOT / "encoder.py", tmp_path)
        result = run_script("encoder.py", cwd=tmp_path, folder=tmp_path, PYTHONIOENCODING="ascii")
        summary = last_json(result)
        assert summary["encoder"] >= 0.99 and len(result.stdout.splitlines()[-1]) < 300
        for name in ("bag of words", "encoder without positions"):
            assert abs(summary[name] - 0.5) < 0.02
        report = json_of(tmp_path / summary["report"])
        assert {row["model"]: row["accuracy"] for row in report["rows"]}.items() <= summary.items()
        assert {"cpu", "threads", "torch", "settings"} <= set(report)
        assert (tmp_path / "out/encoder/head.png").read_bytes()[:4] == b"\x89PNG"


# -----------------------------------------------------------------------------
# transformer.py


def transformer_tiny(norm_first=True, dtype=torch.float64, **changes):
    """A small model with large random weights, in biases and norms too: everything matters."""
    config = {"vocab_size": 11, "max_len": 24, "d_model": 12, "n_heads": 3, "n_layers": 2, "d_ff": 20}
    config |= {"dropout": 0.0, "tied": False, "norm_first": norm_first} | changes
    model = transformer.Transformer(transformer.TransformerConfig(**config))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.4)
    return model.to(dtype)


def transformer_sentences(n=6, longest=9, vocab=11):
    """Rows of random tokens with EOS, padded on the right; the first is the longest."""
    lengths = [longest] + torch.randint(2, longest + 1, (n - 1,)).tolist()
    rows = [torch.cat((torch.randint(3, vocab, (length - 1,)), torch.tensor([2]))) for length in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def transformer_to_torch(model):
    """nn.TransformerEncoder and nn.TransformerDecoder with the model's weights, and pairs (ours, theirs)."""
    c = model.config
    settings = {"d_model": c.d_model, "nhead": c.n_heads, "dim_feedforward": c.d_ff, "dropout": 0.0}
    settings |= {"batch_first": True, "norm_first": c.norm_first, "dtype": model.output.weight.dtype}
    norms = [nn.LayerNorm(c.d_model, dtype=settings["dtype"]) if c.norm_first else None for _ in range(2)]
    layers = nn.TransformerEncoderLayer(**settings), nn.TransformerDecoderLayer(**settings)
    encoder = nn.TransformerEncoder(layers[0], c.n_layers, norms[0], enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(layers[1], c.n_layers, norms[1])
    same = []  # modules: ours, theirs
    for ours, theirs in zip(model.encoder, encoder.layers, strict=True):
        same += [(ours.self_attention, theirs.self_attn), (ours.ffn[0], theirs.linear1)]
        same += [(ours.ffn[2], theirs.linear2), (ours.self_attention_norm, theirs.norm1)]
        same += [(ours.ffn_norm, theirs.norm2)]
    for ours, theirs in zip(model.decoder, decoder.layers, strict=True):
        same += [(ours.self_attention, theirs.self_attn), (ours.cross_attention, theirs.multihead_attn)]
        same += [(ours.ffn[0], theirs.linear1), (ours.ffn[2], theirs.linear2)]
        same += [(ours.self_attention_norm, theirs.norm1), (ours.cross_attention_norm, theirs.norm2)]
        same += [(ours.ffn_norm, theirs.norm3)]
    if c.norm_first:
        same += [(model.encoder_norm, norms[0]), (model.decoder_norm, norms[1])]
    pairs = []  # lists of our parameters, and theirs that holds them one below the other
    for ours, theirs in same:
        if isinstance(theirs, nn.MultiheadAttention):
            projections = ours.q_proj, ours.k_proj, ours.v_proj
            pairs.append(([p.weight for p in projections], theirs.in_proj_weight))
            pairs.append(([p.bias for p in projections], theirs.in_proj_bias))
            ours, theirs = ours.out_proj, theirs.out_proj
        pairs += [([ours.weight], theirs.weight), ([ours.bias], theirs.bias)]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(torch.cat(ours))
    return encoder, decoder, pairs


def transformer_greedy_oracle(model, src_row, max_len):
    """One sentence, no cache, no batch: the loop that anyone can check."""
    tokens = [1]
    while len(tokens) <= max_len and (len(tokens) == 1 or tokens[-1] != 2):
        logits = model(src_row[None], torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def transformer_log_prob(model, src_row, tokens):
    logits = model(src_row[None], torch.tensor([[1, *tokens[:-1]]]))[0].log_softmax(-1)
    return sum(logits[i, token].item() for i, token in enumerate(tokens))


def transformer_beam_oracle(model, src_row, max_len, beam_size, length_penalty):
    """Beam search with lists: frozen hypotheses compete by log-probability, only the end divides."""
    beams = [([], 0.0)]
    for _ in range(max_len):
        candidates = [beam for beam in beams if beam[0] and beam[0][-1] == 2]
        for tokens, log_prob in beams:
            if not tokens or tokens[-1] != 2:
                following = model(src_row[None], torch.tensor([[1, *tokens]]))[0, -1].log_softmax(-1).tolist()
                candidates += [([*tokens, i], log_prob + x) for i, x in enumerate(following)]
        beams = sorted(candidates, key=lambda beam: -beam[1])[:beam_size]
    scored = [(tokens, x / ((5 + len(tokens)) / 6) ** length_penalty) for tokens, x in beams]
    return max(scored, key=lambda beam: beam[1])


def transformer_rows(tokens):
    """Rows up to their EOS; all after it must be padding."""
    rows = []
    for row in tokens.tolist():
        end = row.index(2) + 1 if 2 in row else len(row)
        assert all(token == 0 for token in row[end:]), row
        rows.append(row[:end])
    return rows


TRANSFORMER_SMALL = {
    "epochs": 3, "d_model": 16, "d_ff": 16, "n_layers": 1, "dropout": 0.2, "save_every": 3,
    "vocab_size": 400, "batch_tokens": 400, "amp": "off", "device": "cpu",
}  # fmt: skip

TRANSFORMER_KILLED = """
import os, signal, sys
import torch, transformer

corpus = transformer.number_corpus
transformer.number_corpus = lambda seed: corpus(seed, 300, 20, 10)
place, n = sys.argv[1], int(sys.argv[2])  # kill -9 at the n-th call of place
places = {"step": (torch.nn.utils, "clip_grad_norm_"), "written": (os, "fsync"), "moved": (os, "replace")}
owner, name = places[place]
original, calls = getattr(owner, name), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, counted)
transformer.main(transformer.parse(sys.argv[3:]))
"""


def transformer_run(out, **changes):
    """The script's work in this process, on a small corpus. Returns the report and the state it left."""
    corpus = transformer.number_corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "number_corpus", lambda seed: corpus(seed, 300, 20, 10))
        transformer.main(transformer.Settings(**(TRANSFORMER_SMALL | {"out": str(out)} | changes)))
    return json_of(out / "report.json"), transformer.load(out / "model.pt")["model"]


def transformer_stop(out, **changes):
    """The exit status of a run that stops. (An exception that is kept would keep the lock's frame.)"""
    try:
        transformer_run(out, **changes)
    except SystemExit as stop:
        return stop.code
    raise AssertionError("it ran to its end")


def transformer_pairs(n, max_len=32, seed=1):
    """A tokenizer, and n pairs of ids."""
    corpus = transformer.number_corpus(seed, n, 2, 2)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 300)
    return tokenizer, [[tokenizer.encode(text, max_len) for text in pair] for pair in corpus.train]


def transformer_state():
    return {"step": 0, "seconds": 0.0, "history": [], "average": {}}


def transformer_small_multi30k(folder, n=12, **changes):
    """Files in Multi30k's layout; changes replaces the text of some, by name with _ for the dot."""
    folder.mkdir(exist_ok=True)
    german, english = "ein mann mit dem hund auf der wiese {}", "a man with the dog on the meadow {}"
    for part, language in itertools.product(transformer.MULTI30K, ("de", "en")):
        line = german if language == "de" else english
        text = changes.get(f"{part}_{language}", "".join(f"{line.format(i)}\n" for i in range(n)))
        if text is not None:
            (folder / f"{part}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(scope="module")
def transformer_half_trained(tmp_path_factory):
    """A model after two short epochs, in float64: unsure, so that greedy, beam and penalties differ."""
    corpus = transformer.number_corpus(3, 2500, 20, 40)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 450)
    s = transformer.Settings(amp="off", device="cpu", d_model=32, epochs=2, average=1, seed=1)
    s.batch_tokens, s.warmup, s.lr_scale, s.out = 512, 60, 1.0, str(tmp_path_factory.mktemp("half"))
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = transformer.TransformerConfig(tokenizer.vocab_size, 32, 32, 4, 1, 64, 0.0, True)
    model, state = transformer.Transformer(config), transformer_state()
    encoded = [[[tokenizer.encode(t, 32) for t in pair] for pair in part] for part in corpus[1:3]]
    transformer.train(s, model, *encoded, state)
    assert state["history"][1]["dev_loss"] < state["history"][0]["dev_loss"]
    return model.double().eval(), tokenizer, corpus


@pytest.fixture
def transformer_searched(transformer_half_trained):
    """(model, src) to search: the half-trained one, and random ones of both norms."""
    model, tokenizer, corpus = transformer_half_trained
    src = transformer.pad([tokenizer.encode(source, 32) for source, _ in corpus.test], model)
    random_ones = [(transformer_tiny(i).eval(), transformer_sentences(n=5)[0]) for i in (False, True)]
    return [(model, src), *random_ones]


@pytest.fixture(scope="module")
def transformer_undisturbed(tmp_path_factory):
    """A small run without interruption: its folder, report and weights."""
    torch.set_num_threads(1)  # the test's fixtures come later
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

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("d_model, n_heads", [(12, 3), (15, 5), (16, 1)])
    def test_transformer_equals_torch(self, norm_first, dtype, tolerance, d_model, n_heads):
        """Values and the gradient of every parameter."""
        model = transformer_tiny(norm_first, dtype, d_model=d_model, n_heads=n_heads)
        encoder, decoder, pairs = transformer_to_torch(model)
        src, _ = transformer_sentences()
        tgt = F.pad(transformer_sentences(longest=7)[0], (1, 0), value=1)
        positions = transformer.sinusoidal_positional_encoding(24, d_model).to(dtype)
        x, y = (
            embedding(tokens) * math.sqrt(d_model) + positions[: tokens.shape[1]]
            for embedding, tokens in ((model.src_embedding, src), (model.tgt_embedding, tgt))
        )
        memory, memory_mask = model.encode(src)
        assert memory_mask.shape == (6, 1, 1, 9)
        expected = encoder(x, src_key_padding_mask=src == 0)
        real = (src != 0)[..., None]
        check_close(memory * real, expected * real, tolerance, "encoder")

        causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=dtype)
        expected = decoder(y, expected, tgt_mask=causal, memory_key_padding_mask=src == 0)
        expected = F.linear(expected, model.output.weight)
        logits = model(src, tgt)
        real = (tgt != 0)[..., None]
        check_close(logits * real, expected * real, tolerance, "model")

        upstream = torch.randn_like(logits) * real
        shared = [model.src_embedding.weight, model.tgt_embedding.weight, model.output.weight]
        theirs = [*shared, *(their for _, their in pairs)]
        theirs = torch.autograd.grad((expected * upstream).sum(), theirs)
        (logits * upstream).sum().backward()
        ours = [[p] for p in shared] + [our for our, _ in pairs]
        assert sum(map(len, ours)) == len(list(model.parameters()))
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            check_close(torch.cat([p.grad for p in our]), their, tolerance * 10, f"gradient {i}")

    def test_transformer_parameter_counts(self):
        def count(**changes):
            with torch.device("meta"):
                model = transformer.Transformer(transformer.TransformerConfig(**changes))
            return sum(p.numel() for p in model.parameters())

        assert count() == 63_082_496
        assert count(d_model=1024, n_heads=16, d_ff=4096) == 214_245_376
        assert count(tied=False) == 63_082_496 + 2 * 37_000 * 512
        assert count(norm_first=True) == 63_082_496 + 2 * 2 * 512  # the two final norms

    def test_transformer_tying_and_initial_scale(self):
        sizes = {"vocab_size": 300, "d_model": 64, "n_heads": 4, "n_layers": 1, "d_ff": 64}
        model = transformer.Transformer(transformer.TransformerConfig(**sizes))
        assert model.src_embedding.weight is model.tgt_embedding.weight is model.output.weight
        for layer in (model.encoder[0], model.decoder[0]):
            projection = layer.self_attention.q_proj
            assert abs(projection.weight.abs().max().item() / math.sqrt(6 / 128) - 1) < 0.01  # Xavier
            assert projection.bias.abs().max() == 0
        untied = transformer.Transformer(transformer.TransformerConfig(**sizes, tied=False))
        matrices = [untied.src_embedding.weight, untied.tgt_embedding.weight, untied.output.weight]
        assert len({id(m) for m in matrices}) == 3 and not torch.equal(matrices[0], matrices[1])
        assert all(abs(m.std().item() * 8 - 1) < 0.05 for m in matrices)  # 1 / sqrt(d_model)

    def test_sinusoidal_positional_encoding_is_the_formula(self):
        table = transformer.sinusoidal_positional_encoding(50, 7)
        for position, feature in itertools.product((0, 1, 49), range(7)):
            angle = position / 10_000 ** (2 * (feature // 2) / 7)
            expected = math.cos(angle) if feature % 2 else math.sin(angle)
            assert abs(table[position, feature].item() - expected) < 1e-6, (position, feature)
        assert table.dtype == torch.float32 and table.shape == (50, 7)

    def test_transformer_made_on_meta_is_right_once_it_is_loaded(self):
        model, (src, _) = transformer_tiny(dtype=torch.float32), transformer_sentences()
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
        grads = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (output, expected))
        for grad, other in zip(*grads, strict=True):
            check_close(grad, other, 1e-12)
        low, _ = transformer.attention(60 * q, -60 * q, v, mask)  # what is seen scores lower than any fill
        check_close(low, F.scaled_dot_product_attention(60 * q, -60 * q, v, attn_mask=mask), 1e-12)
        big = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
        assert transformer.attention(big, big, big, torch.ones(4, 4, dtype=torch.bool))[0].isfinite().all()
        padding, bos = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
        assert transformer_tiny()(padding, bos).isfinite().all()

    def test_causal_mask_is_aligned_bottom_right(self):
        assert transformer.causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
        assert transformer.causal_mask(3).tolist() == torch.ones(3, 3).tril().bool().tolist()

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_no_look_ahead(self, norm_first):
        model, (src, _) = transformer_tiny(norm_first), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 8))
        before = model(src, tgt)
        for t in range(8):
            changed = tgt.clone()
            changed[:, t] = 3 + (tgt[:, t] - 3 + 1) % 8
            after = model(src, changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert (before[:, t:] != after[:, t:]).any(-1).all()  # and every later one does see it

    def test_transformer_padding_changes_nothing(self):
        model, (src, lengths) = transformer_tiny(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 5))
        together = model(src, tgt)
        wider = model(F.pad(src, (0, 5)), F.pad(tgt, (0, 3)))[:, :5]
        check_close(wider, together, 1e-12, "more padding")
        for row, length in enumerate(lengths):
            alone = model(src[row : row + 1, :length], tgt[row : row + 1])
            check_close(alone[0], together[row], 1e-12, "alone")

    def test_decode_cache_gives_the_same_logits(self):
        model, (src, _) = transformer_tiny().eval(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 10))
        memory, memory_mask = model.encode(src)
        whole = model.decode(tgt, memory, memory_mask)
        cache = {}
        pieces = [model.decode(piece, memory, memory_mask, cache) for piece in tgt.split((1, 3, 1, 4, 1), 1)]
        check_close(torch.cat(pieces, dim=1), whole, 1e-12)
        for _ in range(2):  # what is refused leaves the cache as it was
            with pytest.raises(ValueError, match="max_len=24"):
                model.decode(torch.ones(6, 15, dtype=torch.long), memory, memory_mask, cache)
        check_close(model.decode(tgt[:, :1], memory, memory_mask, cache)[:, 0], model.decode(
            torch.cat((tgt, tgt[:, :1]), dim=1), memory, memory_mask)[:, -1], 1e-12)  # fmt: skip

    def test_decode_projects_the_memory_once(self):
        """With a cache, a memory of NaN in later calls changes nothing."""
        model, (src, _) = transformer_tiny().eval(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 2))
        memory, memory_mask = model.encode(src)
        expected, cache = model.decode(tgt, memory, memory_mask)[:, 1:], {}
        model.decode(tgt[:, :1], memory, memory_mask, cache)
        second = model.decode(tgt[:, 1:], torch.full_like(memory, math.nan), memory_mask, cache)
        check_close(second, expected, 1e-12)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_decoder_layer_under_activation_checkpointing(self, reentrant):
        """Loss and every gradient as without, the encoder's too."""
        model, (src, _) = transformer_tiny(), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 5))
        expected = torch.autograd.grad(model(src, tgt).sin().sum(), list(model.parameters()))
        for layer in (*model.encoder, *model.decoder):
            checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
            layer.forward = functools.partial(checkpoint, layer.forward)
        model(src, tgt).sin().sum().backward()
        for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
            check_close(p.grad, grad, 1e-12, name)

    def test_transformer_dropout_only_while_training(self):
        model, (src, _) = transformer_tiny(dropout=0.5), transformer_sentences()
        tgt = torch.randint(3, 11, (6, 5))
        assert not torch.equal(model(src, tgt), model(src, tgt))
        for search in (transformer.greedy_decode, lambda *a: transformer.beam_search(*a)[0]):
            assert torch.equal(search(model, src, 12), search(model, src, 12)) and model.training
        model.eval()
        assert torch.equal(model(src, tgt), model(src, tgt))
        # Dropout acts on the embeddings as well: with p near 1 nothing is left of a token.
        assert (transformer_tiny(dropout=0.999999).encode(src)[0].std(0) < 1e-9).all()

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_drops_at_every_sublayer(self, norm_first):
        """With everything dropped, a pre-norm layer returns its input, a post-norm layer only its norms."""
        model = transformer_tiny(norm_first, dropout=0.999999).train()
        x, mask = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(2, 1, 1, 5, dtype=torch.bool)
        for layer in model.encoder:
            expected = x if norm_first else layer.ffn_norm(layer.self_attention_norm(x))
            check_close(layer(x, mask), expected, 1e-12)
        for layer in model.decoder:
            norms = layer.self_attention_norm, layer.cross_attention_norm, layer.ffn_norm
            expected = x if norm_first else functools.reduce(lambda y, norm: norm(y), norms, x)
            check_close(layer(x, transformer.causal_mask(5), x, mask)[0], expected, 1e-12)

    def test_evaluating_puts_every_mode_back(self):
        model = transformer_tiny().train()
        model.encoder.eval()
        modes = [module.training for module in model.modules()]
        with pytest.raises(ZeroDivisionError), transformer.evaluating(model):
            assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2

    def test_label_smoothed_loss_is_the_formula(self):
        logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(1, 11, (3, 5))
        targets[0, 3:] = targets[1, 1:] = 0
        loss = transformer.label_smoothed_loss(logits, targets, pad_id=0, smoothing=0.2)
        terms = []
        for row, position in (targets != 0).nonzero().tolist():
            q = torch.full((11,), 0.2 / 11, dtype=torch.float64)
            q[targets[row, position]] += 0.8
            terms.append(-(q * logits[row, position].log_softmax(-1)).sum())
        assert len(terms) == 9
        check_close(loss, torch.stack(terms).mean(), 1e-12)
        grad = torch.autograd.grad(loss, logits)[0]
        assert (grad[targets == 0] == 0).all() and (grad[targets != 0] != 0).all()
        poisoned = logits.detach().masked_fill((targets == 0)[..., None], math.nan).requires_grad_()
        again = transformer.label_smoothed_loss(poisoned, targets, 0, 0.2)
        assert torch.equal(again, loss) and torch.equal(torch.autograd.grad(again, poisoned)[0], grad)
        low = transformer.label_smoothed_loss(logits.bfloat16(), targets, 0)
        check_close(low, transformer.label_smoothed_loss(logits.bfloat16().float(), targets, 0, 0.1), 1e-6)

    def test_noam_lr_rises_in_a_line_and_falls_with_the_root(self):
        rates = [transformer.noam_lr(step, 512, 4000) for step in range(1, 20_000)]
        assert max(rates) == rates[3999] and abs(rates[3999] - (512 * 4000) ** -0.5) < 1e-12
        assert abs(rates[0] - rates[3999] / 4000) < 1e-12 and abs(rates[15_999] - rates[3999] / 2) < 1e-12

    # ---- search

    @torch.no_grad()
    def test_greedy_decode_equals_the_plain_loop(self, transformer_searched):
        """And a beam of 1; alone and in a batch."""
        lengths, cut_off = set(), 0
        for model, src in transformer_searched:
            tokens = transformer.greedy_decode(model, src, 12)
            rows = transformer_rows(tokens)
            assert rows == [transformer_greedy_oracle(model, row[row != 0], 12) for row in src]
            assert torch.equal(tokens, transformer.beam_search(model, src, 12, beam_size=1)[0])
            assert tokens.shape[1] == max(map(len, rows)) and tokens.dtype == torch.int64
            for i in range(0, len(src), 4):
                assert transformer_rows(transformer.greedy_decode(model, src[i : i + 1], 12)) == [rows[i]]
            lengths |= {len(row) for row in rows}
            cut_off += sum(row[-1] != 2 for row in rows)
        assert len(lengths) > 5 and cut_off > 2, (lengths, cut_off)  # both kinds were there

    @pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
    @torch.no_grad()
    def test_beam_search_of_full_width_equals_brute_force(self, length_penalty):
        for seed in range(4):
            torch.manual_seed(seed)
            model = transformer_tiny(vocab_size=4, n_layers=1).eval()
            src = torch.tensor([[3, 3, 2], [3, 2, 0]])
            tokens, scores = transformer.beam_search(model, src, 4, 4**4, length_penalty)
            for row in range(2):
                candidates = []
                for n in range(1, 5):
                    for sequence in itertools.product(range(4), repeat=n):
                        if 2 in sequence[:-1] or (n < 4 and sequence[-1] != 2):
                            continue  # EOS ends, and nothing else but max_len does
                        score = transformer_log_prob(model, src[row][src[row] != 0], sequence)
                        candidates.append((score / ((5 + n) / 6) ** length_penalty, list(sequence)))
                best_score, best = max(candidates)
                assert tokens[row].tolist() == best + [0] * (tokens.shape[1] - len(best))
                assert abs(scores[row].item() - best_score) < 1e-10
            assert tokens.shape[1] == max(len(r) for r in transformer_rows(tokens))

    @pytest.mark.parametrize("beam_size, length_penalty", [(2, 0.0), (4, 0.6), (5, 1.5)])
    @torch.no_grad()
    def test_beam_search_equals_lists(self, transformer_searched, beam_size, length_penalty):
        lengths = set()
        for model, src in transformer_searched:
            src = src[:12]
            tokens, scores = transformer.beam_search(model, src, 10, beam_size, length_penalty)
            assert scores.dtype == torch.float64
            for row, found in enumerate(transformer_rows(tokens)):
                real = src[row][src[row] != 0]
                best, score = transformer_beam_oracle(model, real, 10, beam_size, length_penalty)
                assert found == best and abs(scores[row].item() - score) < 1e-10
                lengths.add(len(found))
            wider = transformer.beam_search(model, F.pad(src, (0, 2)), 10, beam_size, length_penalty)
            assert torch.equal(wider[0], tokens)
            check_close(wider[1], scores, 1e-12)
        assert len(lengths) > 4, lengths

    def test_beam_search_beats_greedy_and_penalty_lengthens(self, transformer_half_trained):
        model, tokenizer, corpus = transformer_half_trained
        sources = [source for source, _ in corpus.test]
        found = {
            name: transformer.translate(model, tokenizer, sources, *search)
            for name, search in {"greedy": (1, 0.0), 0: (4, 0.0), 1: (4, 1.0), 3: (4, 3.0)}.items()
        }
        for source, row in zip(sources, found[1], strict=True):  # log_prob is undivided
            src = transformer.pad([tokenizer.encode(source, 32)], model)
            tokens = transformer_rows(transformer.beam_search(model, src, 32, 4, 1.0)[0])[0]
            with torch.no_grad():
                assert abs(row["log_prob"] - transformer_log_prob(model, src[0], tokens)) < 1e-5
            assert row["n_tokens"] == len(tokens) and row["finished"] == (tokens[-1] == 2)
            assert row["text"] == tokenizer.decode(tokens)

        def mean(name, key):
            return statistics.fmean(row[key] for row in found[name])

        assert mean(0, "log_prob") > mean("greedy", "log_prob") + 0.1
        assert mean(0, "n_tokens") < mean(1, "n_tokens") < mean(3, "n_tokens")

    def test_search_of_no_sentence(self):
        model, none = transformer_tiny().eval(), torch.zeros(0, 4, dtype=torch.long)
        assert transformer.greedy_decode(model, none, 5).shape == (0, 0)
        tokens, scores = transformer.beam_search(model, none, 5)
        assert tokens.shape == (0, 0) and scores.shape == (0,)

    def test_beam_search_of_a_bf16_model_scores_in_float32(self):
        model, (src, _) = transformer_tiny(dtype=torch.bfloat16).eval(), transformer_sentences()
        scores = transformer.beam_search(model, src, 1, 2, 0.0)[1]
        with torch.no_grad():
            logits = model.decode(torch.ones(len(src), 1, dtype=torch.long), *model.encode(src))[:, 0]
        check_close(scores, logits.float().log_softmax(-1).amax(-1), 1e-6)

    def test_translate_loses_no_text_and_sees_no_reference(self, transformer_half_trained):
        model, tokenizer, corpus = transformer_half_trained
        texts = ["", *(transformer.english_number(n) for n in range(70)), "  "]
        rows = transformer.translate(model, tokenizer, texts, 1, 0.0)
        blank = {"text": "", "log_prob": 0.0, "n_tokens": 0, "finished": True}
        assert rows[0] == rows[-1] == blank and min(row["n_tokens"] for row in rows[1:-1]) >= 1
        alone = transformer.translate(model, tokenizer, texts[40:41], 1, 0.0)[0]
        assert rows[40] == alone | {"log_prob": pytest.approx(alone["log_prob"])}
        s, tables = transformer.Settings(), []
        for targets in ("eins", "tausend und"):  # a poisoned reference
            test = [(source, targets) for source, _ in corpus.test[:9]]
            report = transformer.evaluate(model, tokenizer, corpus._replace(test=test), s)
            tables.append([row | {"exact_match": 0} for row in report["searches"].values()])
        assert tables[0] == tables[1]
        both = [transformer.translate(model, tokenizer, [t[0] for t in test], k, 0.0) for k in (4, 1)]
        for key in ("log_prob", "n_tokens", "finished"):
            mean = statistics.fmean(row[key] for row in both[1])
            assert report["searches"]["greedy"][key] == pytest.approx(mean)
        gains = [beam["log_prob"] - greedy["log_prob"] for beam, greedy in zip(*both, strict=True)]
        expected = sum(x > 1e-3 for x in gains), sum(x < -1e-3 for x in gains)
        assert (report["search_gains"], report["search_errors"]) == expected

    # ---- bad input

    def test_transformer_config_refuses(self):
        for changes, words in (
            ({"d_model": 10, "n_heads": 3}, "n_heads"),
            ({"vocab_size": 2}, "eos_id"),
            ({"eos_id": 1}, "eos_id"),
            ({"pad_id": -1}, "pad_id"),
            ({"bos_id": 37_000}, "bos_id"),
        ):
            with pytest.raises(ValueError, match=words):
                transformer.TransformerConfig(**changes)

    def test_transformer_refuses(self):
        model = transformer_tiny()
        src, tgt = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
        for bad_src, bad_tgt in (
            (src[0], tgt),
            (src.float(), tgt),
            (src, tgt[:1]),
            (src.repeat(1, 7), tgt),
            (src, tgt[0]),
        ):
            with pytest.raises(ValueError, match="tokens|max_len|batch"):
                model(bad_src, bad_tgt)
        assert model(src.int(), tgt.int()).shape == (2, 3, 11)
        assert model(src.repeat(1, 6), tgt).shape == (2, 3, 11)  # exactly max_len
        memory, mask = model.encode(src)
        for wrong in (mask[:, 0, 0], mask[:, :, :, :-1], mask.long(), mask[:1]):
            with pytest.raises(ValueError, match="memory_mask"):
                model.decode(src, memory, wrong)
        model.output.weight.data[2] = 0.0
        model.output.weight.data[3] = 9.0  # EOS hardly ever
        assert transformer.greedy_decode(model, src, 24).shape[1] <= 24
        for smoothing in (1.0, -0.1, math.nan):
            with pytest.raises(ValueError, match="smoothing"):
                transformer.label_smoothed_loss(torch.randn(2, 3, 11), tgt, 0, smoothing)

    # ---- data

    def test_numbers_in_words(self):
        for n, english, german in (
            (0, "zero", "null"),
            (21, "twenty-one", "ein und zwanzig"),
            (30, "thirty", "dreißig"),
            (100, "one hundred", "einhundert"),
            (101, "one hundred and one", "einhundert eins"),
            (742, "seven hundred and forty-two", "siebenhundert zwei und vierzig"),
            (1_000, "one thousand", "ein tausend"),
            (1_001, "one thousand and one", "ein tausend eins"),
            (1_100, "one thousand one hundred", "ein tausend einhundert"),
            (342_000, "three hundred and forty-two thousand", "dreihundert zwei und vierzig tausend"),
        ):
            assert transformer.english_number(n) == english and transformer.german_number(n) == german
        sample = [*range(2000), *range(2000, 1_000_000, 997)]
        for words in (transformer.english_number, transformer.german_number):
            assert len({words(n) for n in sample}) == len(sample)

    def test_number_corpus_parts_share_nothing(self):
        corpus = transformer.number_corpus(0)
        parts = [corpus.train, corpus.dev, corpus.test]
        assert [len(part) for part in parts] == [8_000, 500, 1_000]
        for side in (0, 1):
            assert len({pair[side] for part in parts for pair in part}) == 9_500
        short = [sum(len(source.split()) < 5 for source, _ in part) / len(part) for part in parts]
        assert max(short) - min(short) < 0.05 and min(short) > 0.05, short  # each part has short ones
        assert transformer.number_corpus(0) == corpus and transformer.number_corpus(1) != corpus
        assert corpus.test[0][0] == "three hundred thousand eight hundred and forty-six"

    def test_tokenizer_keeps_every_text(self):
        texts = [transformer.english_number(n) for n in range(2000)]
        tokenizer = transformer.Tokenizer.train(texts, 400)
        assert 259 < tokenizer.vocab_size <= 400
        for text in ("forty-two thousand", "Größe, 東京 🦊!", "  a  b ", "", "\x00\x7f"):
            ids = tokenizer.encode(text, 99)
            assert ids[-1] == 2 and all(3 <= i < tokenizer.vocab_size for i in ids[:-1])
            assert tokenizer.decode(ids) == tokenizer.decode([1, *ids, 0, 0]) == text.strip().lower()
        assert tokenizer.encode("forty", 9)[0] == tokenizer.encode("one forty", 9)[1]
        assert b" one" in transformer.Tokenizer.train(["ONE ONE"] * 9, 300).vocabulary
        assert transformer.Tokenizer.train(texts, 400).vocabulary == tokenizer.vocabulary
        assert transformer.Tokenizer.train(["one"], 259).vocab_size == 259
        assert len(tokenizer.encode("forty-two", 4)) == 4
        with pytest.raises(ValueError, match="max_len=3: 'forty-two'"):
            tokenizer.encode("forty-two", 3)

    def test_token_batches_are_full_and_hold_each_sentence_once(self):
        rng = random.Random(0)
        lengths = [rng.randint(1, 30) for _ in range(500)] + [1000]
        batches = transformer.token_batches(lengths, 120, "0 0")
        assert sorted(i for batch in batches for i in batch) == list(range(501))
        assert all(len(b) * max(lengths[i] for i in b) <= 120 or len(b) == 1 for b in batches)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert padded < 1.06 * sum(lengths) and len(batches) < sum(lengths) / 120 * 1.3
        assert [lengths[b[0]] for b in batches] != sorted(lengths[b[0]] for b in batches)  # in no order
        assert transformer.token_batches(lengths, 120, "0 0") == batches
        other = transformer.token_batches(lengths, 120, "0 1")
        assert {frozenset(b) for b in other} != {frozenset(b) for b in batches}
        assert len(other) == len(batches)  # train counts on it
        assert [len(batch) for batch in transformer.token_batches([10] * 24, 120, "x")] == [12, 12]

    def test_lines_of_ends_lines_as_people_do(self):
        text = "one\u2028two\r\nthree\x0b\x85four \rfive\n\nsix"
        for encoding in ("utf-8", "utf-8-sig"):
            lines = transformer.lines_of(text.encode(encoding))
            assert lines == ["one\u2028two", "three\x0b\x85four", "five", "", "six"]
        assert transformer.lines_of(b"") == [] and transformer.lines_of(b"a\n") == ["a"]
        with pytest.raises(UnicodeDecodeError):
            transformer.lines_of("one".encode("utf-16"))

    def test_multi30k_corpus_refuses_what_is_missing_damaged_or_altered(self, tmp_path, monkeypatch):
        folder = transformer_small_multi30k(tmp_path / "good")
        corpus = transformer.multi30k_corpus(str(folder))
        assert corpus.name == "own" and [len(part) for part in corpus[1:]] == [12] * 3
        german, english = corpus.train[7]
        assert german.endswith("auf der wiese 7") and english.endswith("on the meadow 7")
        text = "\n".join([german for german, _ in corpus.train] + [english for _, english in corpus.train])
        known = dict.fromkeys(transformer.MULTI30K, (12, hashlib.sha256(text.encode()).hexdigest()))
        monkeypatch.setattr(transformer, "MULTI30K", known)
        for i, (changes, words) in enumerate((
            ({"val_en": None}, "val.en"),
            ({"train_en": "a dog\n" * 11}, "train: 12 German lines, 11 English"),
            ({"train_de": "", "train_en": ""}, "train: 0 German"),
            ({"test_2016_flickr_de": "ein hund\n" * 12}, "flickr.* altered"),
        )):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                transformer.multi30k_corpus(str(transformer_small_multi30k(tmp_path / str(i), **changes)))
        whole = (folder / "train.de.gz").read_bytes()
        latin1 = gzip.compress("ein mann auf der straße\n".encode("latin1") * 12)
        for damaged in (whole[:-20], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], b"no gzip", latin1):
            (folder / "train.de.gz").write_bytes(damaged)
            with pytest.raises(ValueError, match="train.de.gz"):
                transformer.multi30k_corpus(str(folder))
        # It has Multi30k's name where all parts have its lines; a byte-order mark and CR LF change nothing.
        lines = "\ufeff" + "".join(f"{english}\r\n" for _, english in corpus.train)
        folder = transformer_small_multi30k(tmp_path / "crlf", val_en=lines)
        assert transformer.multi30k_corpus(str(folder)) == corpus._replace(name="multi30k")
        for part in known:
            monkeypatch.setattr(transformer, "MULTI30K", known | {part: (13, known[part][1])})
            assert transformer.multi30k_corpus(str(folder)).name == "own"

    def test_multi30k_corpus_of_the_official_files(self):
        folder = os.environ.get("MULTI30K_DATA")
        if not folder:
            pytest.skip("MULTI30K_DATA is not set")
        corpus = transformer.multi30k_corpus(folder)
        assert corpus.name == "multi30k" and [len(p) for p in corpus[1:]] == [29_000, 1_014, 1_000]
        assert corpus.test[0][1].startswith("A man in an orange hat")

    def test_read_lines_downloads_once(self, tmp_path, monkeypatch, capfd):
        good = gzip.compress(b"ein mann auf der wiese\n" * 3)
        answers = [None, good[:-10], b"<html>", good[:20], good]  # the fourth breaks off

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer = answers.pop(0)
                self.send_response(200 if answer else 404)
                self.send_header("Content-Length", str(len(good if answer == good[:20] else answer or b"")))
                self.end_headers()
                self.wfile.write(answer or b"")

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(transformer, "MULTI30K_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/cache"))
        while len(answers) > 1:
            with pytest.raises(ValueError, match="train.de.gz.*--data"):
                transformer.read_lines("train.de", "")
        assert not (tmp_path / "new/cache/multi30k/train.de.gz").exists()  # nothing wrong was kept
        for _ in range(2):  # the second time, from the cache
            assert transformer.read_lines("train.de", "") == ["ein mann auf der wiese"] * 3
        server.shutdown()
        monkeypatch.setattr(transformer, "MULTI30K", {"train": (4, "0")})  # of the cache, all is known
        (tmp_path / "new/cache/multi30k/train.en.gz").write_bytes(good)
        with pytest.raises(ValueError, match="train.* altered"):
            transformer.multi30k_corpus("")

    # ---- files

    def test_save_and_load_refuse_what_is_damaged_runs_code_or_is_not_finite(self, tmp_path, monkeypatch):
        path = tmp_path / "x.pt"
        content = {"model": {"weight": torch.arange(1000.0)}, "vocabulary": [b"a", b"\xff"]}
        transformer.save(path, content)
        loaded = transformer.load(path)
        assert torch.equal(loaded["model"]["weight"], content["model"]["weight"])
        assert (
            loaded["vocabulary"] == content["vocabulary"] == torch.load(path, weights_only=True)["vocabulary"]
        )
        whole = path.read_bytes()
        place = whole.index(torch.arange(500.0, 510.0).numpy().tobytes())
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
        assert not (tmp_path / "was run").exists()

        path.write_bytes(whole)
        for bad in (math.nan, math.inf):
            with pytest.raises(FloatingPointError):
                transformer.save(path, {"model": {"fine": torch.ones(1), "weight": torch.tensor([1.0, bad])}})
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            transformer.save(path, content)
        assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

    def test_main_waits_for_another_run_and_gives_up(self, tmp_path, monkeypatch, capsys):
        lock = transformer.lock_out(tmp_path)
        monkeypatch.setattr(transformer.lock_out, "__defaults__", (0.2,))
        assert transformer_stop(tmp_path) == 2 and "in use" in capsys.readouterr().err
        lock.close()

    # ---- training

    def test_batch_loss_is_the_mean_over_all_target_tokens(self):
        """64 sentences of mixed lengths: the gradient is the token-weighted sum of the single ones'."""
        tokenizer, pairs = transformer_pairs(64, max_len=64)
        assert len({len(target) for _, target in pairs}) > 5
        model = transformer_tiny(vocab_size=tokenizer.vocab_size, max_len=64)

        def gradient(batch):
            loss = transformer.batch_loss(model, batch, 0.1, bf16=False)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

        counts = [len(target) for _, target in pairs]
        parts = [gradient([pair]) * n for pair, n in zip(pairs, counts, strict=True)]
        check_close(gradient(pairs), sum(parts) / sum(counts), 1e-10)

    def test_batch_loss_autocasts_to_bf16(self):
        tokenizer, pairs = transformer_pairs(4)
        model, dtypes = transformer_tiny(dtype=torch.float32, vocab_size=tokenizer.vocab_size, max_len=32), []
        model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        for bf16 in (True, False):
            assert transformer.batch_loss(model, pairs, 0.1, bf16).dtype == torch.float32
        assert dtypes == [torch.bfloat16, torch.float32]

    def test_use_bf16_where_it_is_native(self, monkeypatch):
        for native in (True, False):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
            chosen = [transformer.use_bf16(amp, torch.device("cpu")) for amp in ("auto", "bf16", "off")]
            assert chosen == [native, True, False]
        assert not transformer.use_bf16("auto", torch.device("mps"))

    def test_train_steps_written_out(self, tmp_path):
        """AdamW with the paper's betas, Noam's rate, clipped gradient of the smoothed loss, decay of matrices
        alone; every epoch has every pair once; final weights are the mean over the last epochs' ends."""
        tokenizer, pairs = transformer_pairs(40)
        s = transformer.Settings(amp="off", device="cpu", epochs=4, average=2, batch_tokens=100, clip=0.1)
        s.d_model, s.warmup, s.lr_scale, s.weight_decay, s.out, s.seed = 12, 7, 3.0, 0.2, str(tmp_path), 5
        config = {"vocab_size": tokenizer.vocab_size, "max_len": 32, "dropout": 0.2}
        model = transformer_tiny(**config)  # float64: in float32 Adam makes steps of rounding errors
        expected, state, ends = copy.deepcopy(model), transformer_state(), []
        transformer.train(s, model, pairs, pairs[:9], state)

        names = dict(expected.named_parameters())
        decay = [p for name, p in names.items() if name.endswith("weight") and "norm" not in name]
        rest = [p for name, p in names.items() if not (name.endswith("weight") and "norm" not in name)]
        groups = [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
        optimizer, step, dev_losses = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9), 0, []

        def loss_of(batch, smoothing):
            src = nn.utils.rnn.pad_sequence([torch.tensor(a) for a, _ in batch], batch_first=True)
            tgt = nn.utils.rnn.pad_sequence([torch.tensor([1, *b]) for _, b in batch], batch_first=True)
            logits = expected(src, tgt[:, :-1]).transpose(1, 2)
            return F.cross_entropy(logits, tgt[:, 1:], ignore_index=0, label_smoothing=smoothing)

        for epoch in range(4):
            lengths = [max(map(len, pair)) for pair in pairs]
            batches = transformer.token_batches(lengths, 100, f"5 {epoch}")
            for batch in batches:
                torch.manual_seed(5 * 1_000_003 + step)  # dropout
                step += 1
                optimizer.zero_grad()
                loss_of([pairs[i] for i in batch], 0.1).backward()
                assert nn.utils.clip_grad_norm_(expected.parameters(), 0.1) > 0.1
                for group in optimizer.param_groups:
                    group["lr"] = 3.0 * transformer.noam_lr(step, 12, 7)
                optimizer.step()
            ends.append({name: p.detach().clone() for name, p in names.items()})
            with torch.no_grad(), transformer.evaluating(expected):
                dev_losses.append(loss_of(pairs[:9], 0.0).item())
        assert len(batches) > 4 and state["step"] == step
        assert [row["epoch"] for row in state["history"]] == [1, 2, 3, 4]
        assert [row["dev_loss"] for row in state["history"]] == pytest.approx(dev_losses, abs=1e-6)
        for name, p in model.named_parameters():
            check_close(p, (ends[2][name] + ends[3][name]) / 2, 1e-6, name)

    def test_main_goes_on_bit_for_bit_after_kill_9(self, transformer_undisturbed, tmp_path, capsys):
        """In the 5th step, 2 after a checkpoint; while a checkpoint is written; before it is moved."""
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in TRANSFORMER_SMALL.items()]
        for place, n in (("step", 5), ("written", 1), ("moved", 2)):
            command = [
                sys.executable,
                "-c",
                TRANSFORMER_KILLED,
                place,
                str(n),
                "--out",
                str(tmp_path),
                *flags,
            ]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert killed.returncode == -signal.SIGKILL, (killed.returncode, killed.stderr)
            assert not (tmp_path / "model.pt").exists() and (tmp_path / "checkpoint.pt").exists()
        assert transformer.load(tmp_path / "checkpoint.pt")["step"] == 6
        report, weights = transformer_run(tmp_path)
        assert transformer_undisturbed[1]["steps"] == report["steps"] > 12
        assert all(torch.equal(transformer_undisturbed[2][name], weights[name]) for name in weights)
        for key in ("history", "searches"):
            assert transformer_undisturbed[1][key] == report[key]

    def test_main_of_a_finished_run_evaluates_again(self, transformer_undisturbed, tmp_path, capsys):
        """Without its lock; with settings that may change; not with others, nor on other sentences."""
        out = shutil.copytree(transformer_undisturbed[0], tmp_path / "copy")
        lock = transformer.lock_out(out)
        report, weights = transformer_run(out, save_every=50, beam_size=2)
        assert list(report["searches"])[1] == "beam 2, penalty 0"
        assert report["history"] == transformer_undisturbed[1]["history"]
        assert all(torch.equal(transformer_undisturbed[2][name], weights[name]) for name in weights)
        may = {"data", "translate", "out", "device", "save_every", "beam_size", "length_penalty"}
        assert set(transformer.MAY_CHANGE) == may
        capsys.readouterr()
        assert transformer_stop(out, lr_scale=0.7) == 2
        assert "lr_scale=0.4, not 0.7" in capsys.readouterr().err
        with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
            corpus = transformer.number_corpus(0, 300, 20, 10)
            patch.setattr(transformer, "number_corpus", lambda *_: corpus._replace(train=corpus.train[1:]))
            transformer.main(transformer.Settings(**TRANSFORMER_SMALL, out=str(out)))
        assert "sentences" in capsys.readouterr().err
        lock.close()

    def test_main_saves_nothing_that_is_not_finite(self, transformer_undisturbed, tmp_path, capsys):
        """A gradient that is once infinite stops the run; the next start goes on from a good checkpoint."""
        batch_loss, calls = transformer.batch_loss, itertools.count(1)

        def overflow(*arguments):
            return batch_loss(*arguments) * (math.inf if next(calls) == 5 else 1.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "batch_loss", overflow)
            stop = str(transformer_stop(tmp_path))
        assert "step 5" in stop and "--lr-scale" in stop  # before that step, not at the next checkpoint
        assert not (tmp_path / "model.pt").exists()
        assert transformer.load(tmp_path / "checkpoint.pt")["step"] == 3
        _, weights = transformer_run(tmp_path)
        assert all(torch.equal(transformer_undisturbed[2][name], weights[name]) for name in weights)
        for changes in ({"lr_scale": 1e38, "save_every": 1}, {"lr_scale": math.nan}, {"lr_scale": 1e35}):
            out = tmp_path / str(changes)
            stop = transformer_stop(out, batch_tokens=10**6, epochs=1, **changes)  # one step: it diverges
            assert "--lr-scale" in str(stop)
            assert {path.name for path in out.iterdir()} == {"lock"}

    def test_main_ends_in_a_sentence_where_there_is_advice(self, tmp_path, monkeypatch, capsys):
        for error, code in ((KeyboardInterrupt, "130"), (OSError, "no space left")):
            raised = error("no space left")
            monkeypatch.setattr(transformer, "train", lambda *_, raised=raised: (_ for _ in ()).throw(raised))
            assert code in str(transformer_stop(tmp_path / code))
        monkeypatch.setattr(transformer, "train", lambda *_: 1 / 0)  # an error of the code has a traceback
        with pytest.raises(ZeroDivisionError):
            transformer_run(tmp_path)
        capsys.readouterr()
        (tmp_path / "file").touch()
        for changes, words in (
            ({"out": tmp_path / "file/below"}, "file"),
            ({"seed": 1764460800000000000}, "--seed"),
            ({"seed": -1}, "--seed"),
            ({"translate": "one", "out": tmp_path / "none"}, "model.pt"),
            ({"max_len": 3}, "max_len=3"),
            ({"d_model": 18}, "n_heads"),
        ):
            code = transformer_stop(**({"out": tmp_path / "new"} | changes))
            lines = capsys.readouterr().err.splitlines()
            assert code == 2 and len(lines) == 1 and words in lines[0], lines

    def test_prepare_trains_on_no_test_sentence(self, tmp_path, monkeypatch):
        corpus = transformer.Corpus("numbers", [("one", "eins")] * 4, [("two", "zwei")], [("six", "sechs")])
        monkeypatch.setattr(transformer, "number_corpus", lambda seed: corpus)
        s = transformer.Settings(**(TRANSFORMER_SMALL | {"out": str(tmp_path)}))
        _, tokenizer, train, dev, _, lock = transformer.prepare(s)
        assert [tokenizer.decode(side) for side in (*train[3], *dev[0])] == ["one", "eins", "two", "zwei"]
        lock.close()

    # ---- the command line and the demo

    def test_parse_lets_a_flag_override_its_preset(self, capsys):
        assert transformer.parse([]) == transformer.Settings()
        for preset in (["--preset", "multi30k"], ["--preset=multi30k"]):
            s = transformer.parse([*preset, "--epochs", "3", "--no-tied", "--length-penalty", "-1"])
            assert (s.epochs, s.dropout, s.tied, s.length_penalty, s.translate) == (3, 0.3, False, -1.0, None)
            assert s.out != transformer.Settings().out
        assert transformer.parse(["--translate", ""]).translate == ""
        for argv in (["--wrong", "1"], ["--preset", "french"], ["--amp", "fp8"], ["--epochs", "many"]):
            with pytest.raises(SystemExit) as leaving:
                transformer.parse(argv)
            assert leaving.value.code == 2
        capsys.readouterr()
        with pytest.raises(SystemExit):
            transformer.parse(["--preset", "multi30k", "--help"])
        assert "4000" in capsys.readouterr().out

    def test_main_of_a_corpus_of_ones_own(self, tmp_path, capsys, monkeypatch):
        """Multi30k's path from files to BLEU and --translate, on sentences that can be learned by heart.
        They have $ signs, which are no formulas in the picture, and a vertical tab, which ends no line."""
        data = tmp_path / "data"
        german, english = "ein mann mit 7 $$ am\x0btag {}\r\n", "a man with 7 $$ a day {}\r\n"
        texts = {"de": german, "en": english}
        texts = {f"{part}_{language}": "\ufeff" + "".join(line.format(i % 4) for i in range(12))
                 for part in transformer.MULTI30K for language, line in texts.items()}  # fmt: skip
        transformer_small_multi30k(data, **texts)
        monkeypatch.setenv("MULTI30K_DATA", str(data))
        s = transformer.parse(["--preset", "multi30k", "--out", str(tmp_path / "out")])
        changes = {"epochs": 30, "d_model": 32, "d_ff": 32, "n_layers": 1, "dropout": 0.0, "vocab_size": 400}
        s = dataclasses.replace(s, **changes, warmup=40, amp="off", device="cpu")
        transformer.main(s)
        report = json_of(tmp_path / "out/report.json")
        assert report["dataset"] == "own" and report["measure"] == "bleu" and "case:lc" in report["signature"]
        assert report["beam"] > 50, report["beam"]
        stdin = io.TextIOWrapper(io.BytesIO("\ufeffEIN MANN mit\u2028dem\r\n\nein mann".encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
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
        assert 0 < report["train_seconds"] < report["seconds"] and report["threads"] == 1
        assert report["settings"] == dataclasses.asdict(transformer.Settings())
        assert (out / "alignment.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob("*.part"))
        rows = list(report["searches"].values())
        assert rows[1]["log_prob"] >= rows[0]["log_prob"] - 1e-4 and rows[0]["finished"] > 0.99

    def test_demo_swaps_tens_and_units(self, transformer_demo):
        """In its cross-attention, "zwei und vierzig" looks at "two" before it looks at "forty"."""
        last_json(transformer_demo[1])
        saved = transformer.load(transformer_demo[0] / "out" / "transformer" / "model.pt")
        model = transformer.Transformer(transformer.TransformerConfig(**saved["config"]))
        model.load_state_dict(saved["model"])
        tokenizer, right = transformer.Tokenizer(saved["vocabulary"]), []
        for units, tens in itertools.product(range(2, 10), range(2, 10)):
            n = 517_000 + 10 * tens + units
            source = tokenizer.encode(transformer.english_number(n), 32)
            target = tokenizer.encode(transformer.german_number(n), 32)
            src, tgt = torch.tensor([source]), torch.tensor([[1, *target[:-1]]])
            weights = transformer.cross_attention_weights(model, src, tgt)
            assert weights.shape == (1, 4, len(target), len(source))
            check_close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-5)
            looked_at = weights[0].mean(0).argmax(-1)  # (Tt,)
            right.append(looked_at[-4] > looked_at[-2])  # ... units und tens EOS
        assert sum(right) / len(right) > 0.9
        assert not model.decoder[-1].cross_attention._forward_pre_hooks

    def test_demo_translates(self, transformer_demo):
        last_json(transformer_demo[1])
        text = "Three hundred and forty-two thousand"
        row = last_json(run_script("transformer.py", "--translate", text, cwd=transformer_demo[0]))
        assert row["text"] == "dreihundert zwei und vierzig tausend" and row["finished"] is True
        assert row["source"] == text and row["n_tokens"] == 6 and -3 < row["log_prob"] < 0
        long = run_script("transformer.py", "--translate", "nine " * 40, cwd=transformer_demo[0])
        check_one_line_error(long, "max_len=32")


# -----------------------------------------------------------------------------
# losses.py: a table of all losses, each with an oracle and a sampler, drives most of the class


def losses_cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def losses_focal(z, y, gamma=2.0, alpha=None, reduction="mean"):
    p = z.softmax(1)
    kept = y != -100
    p_y = p.gather(1, y.clamp(min=0)[:, None]).squeeze(1)
    rows = -((1 - p_y) ** gamma) * p_y.log() * (1 if alpha is None else alpha[y.clamp(min=0)])
    rows = torch.where(kept, rows, 0.0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]


def losses_torchvision_focal(logits, targets, alpha=0.25, gamma=2.0, reduction="mean"):
    """torchvision.ops.sigmoid_focal_loss, line by line (0.20)."""
    targets = targets.to(logits)
    p = torch.sigmoid(logits)
    ce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha is not None:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]


def losses_ordinal(z, y):
    terms = []
    for row, target in zip(z.softmax(1), y.tolist(), strict=True):
        for k in range(len(row) - 1 if target >= 0 else 0):
            terms.append(-(row[: k + 1] if target <= k else row[k + 1 :]).sum().log() / (len(row) - 1))
    return sum(terms) / (y >= 0).sum()


def losses_contrastive(a, b, same, margin=1.0):
    rows = []
    for x1, x2, together in zip(a, b, same.tolist(), strict=True):
        d = (x1 - x2).square().sum().sqrt()
        rows.append(d**2 / 2 if together else (margin - d).clamp(min=0) ** 2 / 2)
    return sum(rows) / len(rows)


def losses_info_nce(query, keys, _=None, temperature=0.07):
    rows = []
    for i, q in enumerate(query):
        scores = [(losses_cosine(q, k) / temperature).exp() for k in keys]
        rows.append(-(scores[i] / sum(scores)).log())
    return sum(rows) / len(rows)


def losses_supcon(z, y, temperature=0.1):
    """Khosla et al., eq. 2, as loops over anchors and positives."""
    rows = []
    for i in range(len(z)):
        scores = {j: (losses_cosine(z[i], z[j]) / temperature).exp() for j in range(len(z)) if j != i}
        positives = [j for j in scores if y[j] == y[i]]
        if positives:
            rows.append(-sum((scores[j] / sum(scores.values())).log() for j in positives) / len(positives))
    return sum(rows) / len(rows)


def losses_nt_xent(z1, z2, _=None, temperature=0.5):
    return losses_supcon(torch.cat((z1, z2)), torch.arange(len(z1)).repeat(2), temperature)


def losses_mined(z, y, margin=0.2, mining="hard"):
    """Loops, with torch's norm: what the docstring says of each mining."""
    n, terms = len(z), []
    d = [[(z[i] - z[j]).norm() if i != j else torch.tensor(0.0) for j in range(n)] for i in range(n)]

    def cost(x):
        return F.softplus(x) if margin == "soft" else F.relu(x + margin)

    for a in range(n):
        positives = [p for p in range(n) if p != a and y[p] == y[a]]
        negatives = [k for k in range(n) if y[k] != y[a]]
        if mining == "hard" and positives and negatives:
            terms.append(cost(max(d[a][p] for p in positives) - min(d[a][k] for k in negatives)))
        for p in positives if mining == "semihard" else []:
            farther = [d[a][k] for k in negatives if d[a][k] > d[a][p]]
            terms += [cost(d[a][p] - min(farther))] if farther else []
        if mining == "all":
            terms += [cost(d[a][p] - d[a][k]) for p in positives for k in negatives]
    return torch.stack(terms).mean()


def losses_logits(n=9, k=5):
    y = torch.randint(k, (n,))
    y[::4] = -100
    return [3 * torch.randn(n, k, dtype=torch.float64)], y


def losses_bits(n=9):
    return [3 * torch.randn(n, dtype=torch.float64)], torch.arange(n) % 2


def losses_labelled(n=9):
    y = torch.randint(3, (n,))
    y[:4] = torch.tensor([0, 0, 1, 99])  # at least one triplet, and a class of one sample
    return [torch.randn(n, 3, dtype=torch.float64)], y


def losses_two(n=6):
    return list(torch.randn(2, n, 4, dtype=torch.float64)), torch.arange(n) % 2


def losses_three(n=6):
    return list(torch.randn(3, n, 4, dtype=torch.float64)), torch.arange(n)


LOSSES_WEIGHT = torch.tensor([0.2, 1.0, 0.5, 2.0, 0.7], dtype=torch.float64)


def losses_table() -> dict[str, tuple]:
    """name: (the loss of (*inputs, targets), its oracle, sampler)"""
    partial, weight = functools.partial, LOSSES_WEIGHT
    smoothing, mined = losses.label_smoothing_cross_entropy, losses.batch_hard_triplet_loss
    smoothed, weighted = {"label_smoothing": 0.1}, {"label_smoothing": 0.3, "weight": weight}
    focal = {"gamma": 0.5, "alpha": weight}
    table = {
        "smoothing": (smoothing, partial(F.cross_entropy, **smoothed), losses_logits),
        "weight": (
            partial(smoothing, smoothing=0.3, weight=weight),
            partial(F.cross_entropy, **weighted),
            losses_logits,
        ),
        "focal": (losses.focal_loss, losses_focal, losses_logits),
        "alpha": (partial(losses.focal_loss, **focal), partial(losses_focal, **focal), losses_logits),
        "ordinal": (losses.ordinal_loss, losses_ordinal, losses_logits),
        "binary_focal": (losses.binary_focal_loss, losses_torchvision_focal, losses_bits),
        "contrastive": (losses.contrastive_loss, losses_contrastive, losses_two),
        "info_nce": (lambda q, k, _: losses.info_nce_loss(q, k), losses_info_nce, losses_two),
        "nt_xent": (lambda a, b, _: losses.nt_xent_loss(a, b), losses_nt_xent, losses_two),
        "supcon": (losses.supervised_contrastive_loss, losses_supcon, losses_labelled),
        "triplet": (
            lambda a, p, n, _: losses.triplet_loss(a, p, n),
            lambda a, p, n, _: F.triplet_margin_loss(a, p, n, eps=0),
            losses_three,
        ),
        "soft": (
            lambda a, p, n, _: losses.triplet_loss(a, p, n, "soft"),
            lambda a, p, n, _: F.softplus((a - p).norm(dim=1) - (a - n).norm(dim=1)).mean(),
            losses_three,
        ),
        "batch_hard": (mined, losses_mined, losses_labelled),
    }
    margin, cold = {"margin": 3.0}, {"temperature": 0.2}
    for name, options in (("contrastive", margin), ("supcon", cold)):
        loss, oracle, sampler = table[name]
        table[f"{name}_option"] = (partial(loss, **options), partial(oracle, **options), sampler)
    for mining, margin in itertools.product(("hard", "semihard", "all"), (0.0, 1.5, "soft")):
        options = {"mining": mining, "margin": margin}
        pair = (partial(mined, **options), partial(losses_mined, **options))
        table[f"batch_{mining}_{margin}"] = (*pair, losses_labelled)
    return table


LOSSES = losses_table()
LOSSES_ON_LOGITS = {name: row[0] for name, row in LOSSES.items() if row[2] is losses_logits}
LOSSES_ON_LABELS = {name: row[0] for name, row in LOSSES.items() if row[2] is losses_labelled}


def losses_results(loss, inputs: list, y) -> list[Tensor]:
    """Value, and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves, y)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def losses_check(loss, oracle, inputs: list, y=None, tolerance: float = 1e-10) -> None:
    results = zip(losses_results(loss, inputs, y), losses_results(oracle, inputs, y), strict=True)
    for i, (actual, expected) in enumerate(results):
        check_close(actual, expected, tolerance, f"gradient of input {i - 1}" if i else "value")


def losses_gather_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def losses_gather_batch():
    return torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def losses_gather_worker(rank: int, folder: str) -> None:
    """One of two processes with half of the batch: writes its loss and the averaged gradients."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, half = losses_gather_model(), losses_gather_batch()[:, 4 * rank : 4 * rank + 4]
    z1, z2 = (losses.gather_batch(model(x)) for x in half)
    loss = losses.nt_xent_loss(z1, z2)
    loss.backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= 2
    a, weight = torch.ones(2, 3).requires_grad_(), torch.arange(12.0).view(4, 3)
    (losses.gather_batch(a) * weight * (rank + 1)).sum().backward()  # a loss of its own on each process
    labels = losses.gather_batch(torch.tensor([rank, 7, -rank]))
    try:
        losses.gather_batch(torch.ones(2 + rank, 3))
        message = "no error"
    except ValueError as error:
        message = str(error)
    result = {"loss": loss.detach(), "gradients": [p.grad for p in model.parameters()], "labels": labels}
    torch.save(result | {"message": message, "sum": a.grad}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends the long way (TORCH: T1)


def losses_refused():
    """(call, words of its ValueError)"""
    z, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    bits, one, nan = (y > 0).long(), z[:1], math.nan
    for loss in (losses.label_smoothing_cross_entropy, losses.focal_loss, losses.ordinal_loss):
        for bad, words in (
            (y + 1, ("targets", "0 .. 2", "3")),
            (y - 1, ("targets", "0 .. 2", "-1")),
            (y.float(), ("targets", "integers", "float32")),
            (y > 0, ("targets", "integers", "bool")),
            (y + 0j, ("targets", "complex64")),
            (y[:5], ("targets", "(6,)", "(5,)")),
            (F.one_hot(y), ("targets", "(6,)", "(6, 3)")),
        ):
            yield functools.partial(loss, z, bad), words
        yield functools.partial(loss, z, y, reduction="avg"), ("reduction", "avg", "none")
    for bad in (-0.1, 1.0, nan):
        yield lambda b=bad: losses.label_smoothing_cross_entropy(z, y, b), ("smoothing", "[0, 1)")
    for bad in (torch.ones(2), torch.ones(3, 1), 0.5, -torch.ones(3), torch.tensor([1, math.inf, 1])):
        yield lambda b=bad: losses.label_smoothing_cross_entropy(z, y, weight=b), ("weight", "3")
        yield lambda b=bad: losses.focal_loss(z, y, alpha=b), ("alpha", "3")
    yield lambda: losses.ordinal_loss(z[:, :1], y * 0), ("logits", "2", "1")
    for bad in (-1.0, nan, math.inf, "hard"):
        for name, call in (
            ("gamma", functools.partial(losses.focal_loss, z, y)),
            ("gamma", functools.partial(losses.binary_focal_loss, z[:, 0], bits)),
            ("margin", functools.partial(losses.contrastive_loss, z, z, bits)),
            ("margin", functools.partial(losses.triplet_loss, z, z, z)),
            ("margin", functools.partial(losses.batch_hard_triplet_loss, z, y)),
            ("alpha", functools.partial(losses.GradNorm, 2)),
        ):
            yield functools.partial(call, bad), (name, str(bad))
    for bad in (-0.1, 1.1, nan):
        yield lambda b=bad: losses.binary_focal_loss(z[:, 0], bits, 2.0, b), ("alpha", "[0, 1]")
        yield lambda b=bad: losses.class_balanced_weights(torch.ones(3), b), ("beta", "[0, 1]")
    yield lambda: losses.binary_focal_loss(z[:, 0], y), ("targets", "2")
    yield lambda: losses.binary_focal_loss(z[:, 0], bits * 0.5), ("targets", "0.5")
    yield lambda: losses.binary_focal_loss(z[:, :1], bits), ("targets", "(6, 1)", "(6,)")
    yield lambda: losses.binary_focal_loss(z[:, 0], bits, reduction=None), ("reduction", "None")
    for bad in (0.0, -1.0, nan, math.inf):
        yield lambda b=bad: losses.nt_xent_loss(z, z, b), ("temperature", str(bad))
        yield lambda b=bad: losses.info_nce_loss(z, z, b), ("temperature", str(bad))
        yield lambda b=bad: losses.supervised_contrastive_loss(z, y, b), ("temperature", str(bad))
    for loss in (losses.nt_xent_loss, losses.info_nce_loss):
        for pair in ((one, one), (z, z[:5]), (z[0], z[0])):
            yield functools.partial(loss, *pair), ("(N, D)", str(tuple(pair[1].shape)))
    for loss in (losses.supervised_contrastive_loss, losses.batch_hard_triplet_loss):
        yield functools.partial(loss, z, y[:1]), ("labels", "(6,)", "(1,)")
        yield functools.partial(loss, z, y.float()), ("labels", "float32")
        yield functools.partial(loss, z[None], y), ("z", "(1, 6, 3)")
        yield functools.partial(loss, one, y[:1]), ("z", "2", "(1, 3)")
    yield lambda: losses.triplet_loss(z, z, one), ("negative", "(1, 3)")
    yield lambda: losses.triplet_loss(z[:0], z[:0], z[:0]), ("anchor", "(0, 3)")
    yield lambda: losses.contrastive_loss(z[:0], z[:0], bits[:0]), ("x1", "(0, 3)")
    yield lambda: losses.contrastive_loss(z, z, y), ("same", "0 or 1", "2")
    yield lambda: losses.contrastive_loss(z, z, bits[:, None]), ("same", "(6, 1)")
    yield lambda: losses.batch_hard_triplet_loss(z, y, mining="easy"), ("mining", "easy", "semihard")
    yield lambda: losses.has_collapsed(one), ("z", "2")


def losses_refused_by_weighting():
    w = torch.ones(3, requires_grad=True)
    for bad in ([3, 0], [], [[2, 2]], 3):
        yield lambda b=bad: losses.class_balanced_weights(torch.tensor(b)), ("counts", str(bad))
    for bad in (torch.ones(3), torch.ones(1)):
        yield lambda b=bad: losses.UncertaintyWeighting(2)(b), ("losses", "(2,)", str(tuple(bad.shape)))
        yield lambda b=bad: losses.GradNorm(2)(b * w[0], w), ("losses", "(2,)", str(tuple(bad.shape)))
    yield lambda: losses.GradNorm(3)(w * 0, w), ("losses", "0")
    yield lambda: losses.make_optimizers("lion", [w], [], 0.1, 0.1), ("name", "lion", "muon")
    yield lambda: losses.main(losses.Settings(n_seeds=1)), ("n_seeds", "2", "1")


class TestLosses:
    # Oracles

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_equals_its_oracle(self, name):
        """Values and gradients, float64, 1e-10."""
        loss, oracle, sampler = LOSSES[name]
        for n in (6, 9, 12):
            losses_check(loss, oracle, *sampler(n))

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_gradcheck(self, name):
        loss, _, sampler = LOSSES[name]
        inputs, y = sampler(7)
        leaves = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: loss(*x, y), leaves, atol=1e-7)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
    def test_label_smoothing_cross_entropy_equals_torch(self, smoothing, weighted, reduction):
        for shape, k in (((17,), 5), ((3, 4), 2), ((2, 3, 2), 7), ((4,), 1)):
            for ignore_index in (-1, 0):  # a class may be ignored, too: a pad id
                logits = 3 * torch.randn(shape[0], k, *shape[1:], dtype=torch.float64)
                y = torch.randint(k, shape)
                y.view(-1)[0] = k - 1
                y.view(-1)[1::4] = ignore_index
                weight = torch.rand(k, dtype=torch.float64) if weighted else None
                kw = {"ignore_index": ignore_index, "weight": weight, "reduction": reduction}
                if k > 1 or ignore_index < 0:
                    losses_check(
                        lambda z, y, kw=kw: losses.label_smoothing_cross_entropy(z, y, smoothing, **kw),
                        lambda z, y, kw=kw: F.cross_entropy(z, y, label_smoothing=smoothing, **kw),
                        [logits], y,
                    )  # fmt: skip

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_focal_losses_equal_their_formulas(self, reduction):
        inputs, y = losses_logits(17)
        for gamma in (0.0, 0.5, 1.0, 3.5):
            for alpha in (None, LOSSES_WEIGHT):
                losses_check(
                    lambda z, y, g=gamma, a=alpha: losses.focal_loss(z, y, g, a, reduction=reduction),
                    lambda z, y, g=gamma, a=alpha: losses_focal(z, y, g, a, reduction),
                    inputs, y,
                )  # fmt: skip
        losses_check(
            lambda z, y: losses.focal_loss(z, y, 0.0, reduction=reduction),
            lambda z, y: F.cross_entropy(z, y, reduction=reduction), inputs, y,
        )  # fmt: skip
        z, bits = torch.randn(6, 4, dtype=torch.float64), torch.randint(2, (6, 4))
        for gamma, alpha in ((2.0, 0.25), (0.5, 0.9), (1.0, None), (0.0, 0.0), (2.0, 1.0)):
            for y in (bits, bits.bool(), bits.double(), bits.to(torch.uint16)):
                losses_check(
                    lambda z, y, g=gamma, a=alpha: losses.binary_focal_loss(z, y, g, a, reduction),
                    lambda z, y, g=gamma, a=alpha: losses_torchvision_focal(z, y, a, g, reduction),
                    [z], y,
                )  # fmt: skip

    # Properties

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_permutation_of_rows(self, name):
        """Duplicates tie for the hardest; their gradients are shared, whoever comes first."""
        loss, _, sampler = LOSSES[name]
        inputs, y = sampler(12)
        for x in inputs:
            x[8] = x[1]
        if sampler is losses_labelled:
            y[8:10] = torch.tensor([0, 1])
            inputs[0][9] = inputs[0][0]
        order = torch.randperm(12)
        value, *gradients = losses_results(loss, inputs, y)
        permuted, *others = losses_results(loss, [x[order] for x in inputs], y[order])
        check_close(permuted, value, 1e-12)
        for gradient, other in zip(gradients, others, strict=True):
            check_close(other, gradient[order], 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_in_half_precision(self, name, dtype):
        """Computed, and returned, in float32 from the rounded inputs, under autocast too."""
        loss, _, sampler = LOSSES[name]
        inputs, y = sampler(8)
        inputs = [(100 * x).to(dtype) for x in inputs]
        value, *gradients = losses_results(loss, inputs, y)
        expected, *_ = losses_results(loss, [x.float() for x in inputs], y)
        assert value.dtype == torch.float32
        check_close(value, expected, 1e-6)
        for gradient in gradients:
            assert gradient.dtype == dtype and gradient.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_close(losses_results(loss, [x.float() for x in inputs], y)[0], expected, 1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_at_extremes(self, name):
        """Rows of 1e4, 1e-20 and 0, and equal rows: as float64 has it, with finite gradients."""
        loss, _, sampler = LOSSES[name]
        inputs, y = sampler(12)
        for x in inputs:
            x[:3] = 1e4 * x[:3].sign()
            x[3:6] *= 1e-20
            x[6:10] = 0.0
        for dtype in (torch.float64, torch.float32):
            results = losses_results(loss, [x.to(dtype) for x in inputs], y)
            assert all(result.isfinite().all() and result.dtype == dtype for result in results)
            if "semihard" not in name:  # there a tie that rounding breaks changes which triplets exist
                check_close(results[0].double(), loss(*inputs, y), 1e-6)

    @pytest.mark.parametrize("name", LOSSES)
    def test_loss_makes_its_tensors_on_its_inputs_device(self, name):
        """Where new tensors would go elsewhere by default: as on a GPU."""
        loss, _, sampler = LOSSES[name]
        inputs, y = sampler(8)
        with torch.device("meta"):
            value = loss(*inputs, y)
        assert value.device.type == "cpu" and value == loss(*inputs, y)

    @pytest.mark.parametrize("name", LOSSES_ON_LOGITS)
    def test_loss_ignored_rows_change_nothing(self, name):
        loss = LOSSES_ON_LOGITS[name]
        logits, y = 3 * torch.randn(17, 5, dtype=torch.float64), torch.arange(17) % 5
        value, gradient = losses_results(loss, [logits], y)
        ignored = torch.cat((y, torch.tensor([-100, -100])))
        for junk in (0.0, 1e4, math.inf, math.nan):
            more = torch.cat((logits, torch.full((2, 5), junk, dtype=torch.float64)))
            value_more, gradient_more = losses_results(loss, [more], ignored)
            assert torch.equal(value_more, value)
            assert torch.equal(gradient_more, torch.cat((gradient, 0 * gradient[:2])))
        rows = loss(more, ignored, reduction="none")
        assert rows.shape == (19,) and (rows[-2:] == 0).all()
        check_close(loss(more, ignored, reduction="sum"), rows.sum(), 1e-12)
        for other in (-1, 3, 99):  # the id to ignore is the caller's choice, a class's too
            marked = y.masked_fill(y == 3, other)
            expected = loss(logits[y != 3], y[y != 3])
            check_close(loss(logits, marked, ignore_index=other), expected, 1e-12)
        volume = logits[:16].view(2, 8, 5).movedim(-1, 1)  # (2, 5, 8)
        check_close(loss(volume, y[:16].view(2, 8), reduction="none"), rows[:16].view(2, 8), 1e-12)
        for dtype in (torch.uint8, torch.uint16, torch.int32):
            assert torch.equal(loss(logits, y.to(dtype)), value)

    @pytest.mark.parametrize("name", LOSSES_ON_LOGITS)
    def test_loss_over_no_rows_is_0(self, name):
        loss = LOSSES_ON_LOGITS[name]
        for logits in (torch.randn(4, 5), torch.full((4, 5), math.nan), torch.empty(0, 5)):
            y = torch.full((len(logits),), -100)
            for reduction in ("mean", "sum"):
                value, gradient = losses_results(functools.partial(loss, reduction=reduction), [logits], y)
                assert value == 0 and (gradient == 0).all()
        weight = torch.tensor([0.0, 1, 1, 1, 1])  # rows that count, of weight 0
        of_class_0 = functools.partial(losses.label_smoothing_cross_entropy, weight=weight)
        value, gradient = losses_results(of_class_0, [torch.randn(4, 5)], torch.zeros(4).long())
        assert value == 0 and (gradient == 0).all()

    @pytest.mark.parametrize("name", LOSSES_ON_LOGITS)
    def test_loss_with_classes_ruled_out(self, name):
        """Logits of -inf for all classes but the target: p = 1 exactly, a logsumexp over -inf alone."""
        loss = LOSSES_ON_LOGITS[name]
        if name in ("smoothing", "weight"):
            loss = functools.partial(losses.label_smoothing_cross_entropy, smoothing=0.0)
        logits = torch.full((2, 5), -math.inf, dtype=torch.float64)
        logits[0, 0] = logits[1, 1] = 1.0
        value, gradient = losses_results(loss, [logits], torch.tensor([0, 1]))
        assert value == 0 and (gradient == 0).all()

    @pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    def test_focal_losses_at_p_1_have_finite_gradients(self, gamma):
        """p rounds to 1 from a logit gap of 37 (float64), 17 (float32)."""
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for gap in (0.0, 5.0, 17.0, 40.0, 1e3, 1e4):
                z = torch.tensor([[gap, 0.0], [0.0, gap], [gap, 0.0]], dtype=dtype)
                y = torch.tensor([0, 1, 1])
                two = losses_results(functools.partial(losses.focal_loss, gamma=gamma), [z], y)
                binary = functools.partial(losses.binary_focal_loss, gamma=gamma)
                one = losses_results(binary, [z[:, 1] - z[:, 0]], y)
                assert all(result.isfinite().all() for result in (*two, *one)), (dtype, gap)
        z = torch.tensor([[30.0, 0.0]]).double()  # and digits: 1 - p in float32 would be 0
        expected = math.exp(-30 * gamma) * F.cross_entropy(z, torch.tensor([0]))
        assert losses.focal_loss(z, torch.tensor([0]), gamma) / expected == pytest.approx(1, abs=1e-6)

    def test_batch_without_pairs_or_triplets_is_0(self):
        z = torch.randn(4, 3)
        for name, loss in LOSSES_ON_LABELS.items():
            for y in (torch.arange(4), torch.zeros(4).long()):
                if "supcon" not in name or y[3]:  # one class: every anchor has positives
                    value, gradient = losses_results(loss, [z], y)
                    assert value == 0 and (gradient == 0).all(), name
            assert loss(z, torch.tensor([0, 0, 1, 1]).to(torch.uint16)).isfinite()
        semihard = functools.partial(losses.batch_hard_triplet_loss, mining="semihard")
        value, gradient = losses_results(semihard, [torch.zeros(6, 3)], torch.arange(6) % 2)
        assert value == 0 and (gradient == 0).all()  # among ties no negative is farther

    def test_batch_hard_triplet_loss_of_near_duplicates(self):
        """Beyond 25 rows cdist goes by matrix products, which lose distances of 1e-4 at 100."""
        z = 100 + 1e-4 * torch.randn(60, 8)
        y = torch.arange(60) % 3
        for mining in ("hard", "semihard", "all"):
            actual = losses.batch_hard_triplet_loss(z, y, 0.0, mining)
            expected = losses.batch_hard_triplet_loss(z.double(), y, 0.0, mining)
            assert actual.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-9)

    def test_has_collapsed_where_the_loss_is_the_margin(self):
        point, y = torch.randn(1, 5).expand(8, 5), torch.arange(8) % 2
        assert losses.has_collapsed(point) and losses.has_collapsed(torch.zeros(2, 2).bfloat16())
        for mining in ("hard", "all"):
            for margin, stands_at in ((0.2, 0.2), ("soft", 0.6931472)):
                loss = losses.batch_hard_triplet_loss(point, y, margin, mining)
                assert loss.item() == pytest.approx(stands_at, abs=1e-6)
        spread = torch.randn(8, 5)
        spread = spread / torch.pdist(spread).mean()
        assert losses.has_collapsed(0.009 * spread) and not losses.has_collapsed(0.011 * spread)
        assert losses.has_collapsed(0.4 * spread, 0.5) and not losses.has_collapsed(0.6 * spread, 0.5)

    def test_ordinal_loss_far_mistakes_cost_more(self):
        wrong, zeros = 5.0 * torch.eye(5, dtype=torch.float64), torch.zeros(5).long()
        costs = losses.ordinal_loss(wrong, zeros, reduction="none")
        _, gradient = losses_results(losses.ordinal_loss, [wrong], zeros)
        assert (costs.diff() > 0.5).all() and (gradient[:, 0].diff() < 0).all()
        for k in (2, 5, 50):  # at the start it costs about the same whatever K
            assert 0.5 < losses.ordinal_loss(torch.zeros(k, k), torch.arange(k)) < 0.7
        # a proper score: the expected cost under a truth q is least where the softmax is q
        q = torch.tensor([0.1, 0.5, 0.15, 0.25]).double()
        z = q.log().requires_grad_()
        expected = q @ losses.ordinal_loss(z.expand(4, 4), torch.arange(4), reduction="none")
        assert torch.autograd.grad(expected, z)[0].abs().max() < 1e-12

    @pytest.mark.parametrize(
        ("bug", "claim"),
        [
            (lambda z, y: losses.ordinal_loss(z, y), None),
            (lambda z, y: F.cross_entropy(z, y), "limit"),
            (lambda z, y: losses.ordinal_loss(z, y) - 5, "never negative"),
            (lambda z, y: losses.ordinal_loss(z, y) + 0.1, "0 at best"),
            (lambda z, y: losses.ordinal_loss(z, 4 - y), "downhill"),
            (lambda z, y: losses.ordinal_loss(z, y) * losses.ordinal_loss(z, y).detach(), "gradcheck"),
            (lambda z, y: 2 * losses.ordinal_loss(z, y).detach() - losses.ordinal_loss(z, y), "small step"),
            (lambda z, y: 20 * losses.ordinal_loss(z, y), "scale"),
            (lambda z, y: 0.01 * losses.ordinal_loss(z, y), "scale"),
            (lambda z, y: losses_ordinal(z.float(), y), "float32"),
            (lambda z, y: losses_ordinal(z, y), "float16"),
        ],
    )
    def test_check_loss_refutes(self, bug, claim):
        """Each planted bug fails its claim; the loss itself passes all."""
        y = torch.arange(5).repeat(4)
        best = 50.0 * F.one_hot(y, 5)
        limits = {"as ordinal_loss": (lambda z: losses.ordinal_loss(z, y), lambda z: bug(z, y), best / 30)}
        holds = losses.check_loss(lambda z: bug(z, y), 0 * best, best, limits)
        failed = [name for name, held in holds.items() if not held]
        assert any(claim in name for name in failed) if claim else not failed, failed
        assert len(holds) == 11 and all(type(held) is bool for held in holds.values())

    def test_check_loss_takes_embedding_losses(self):
        y = torch.arange(12) % 3
        best = F.one_hot(y, 3).double()
        loss = functools.partial(losses.batch_hard_triplet_loss, labels=y, margin=0.2)
        assert all(losses.check_loss(loss, torch.randn(12, 3), best).values())
        collapsed = losses.check_loss(loss, torch.randn(12, 3), 0 * best)
        assert not collapsed["lower bound: about 0 at best"]

    # Refusals

    def test_losses_refuse_what_would_be_silently_wrong(self):
        for i, (call, words) in enumerate([*losses_refused(), *losses_refused_by_weighting()]):
            with pytest.raises(ValueError) as error:
                call()
            assert all(word in str(error.value) for word in words), (i, words, str(error.value))

    # Weighting

    def test_class_balanced_weights_by_hand(self):
        counts = torch.tensor([1000, 50, 1], dtype=torch.float64)
        for beta in (0.0, 0.9, 0.999, 1 - 1e-9):
            effective = [sum(beta**j for j in range(int(n))) for n in counts]  # the geometric series
            shares = torch.tensor([1 / e for e in effective], dtype=torch.float64)
            expected = 3 * shares / shares.sum()
            check_close(losses.class_balanced_weights(counts, beta), expected, 1e-10, f"beta {beta}")
        inverse = 3 / counts / (1 / counts).sum()
        check_close(losses.class_balanced_weights(counts, 1.0), inverse, 1e-12)
        for given in ([1000, 50, 1], counts.to(torch.uint16)):
            check_close(losses.class_balanced_weights(given, 1.0), inverse.float(), 1e-6)
        assert torch.equal(losses.class_balanced_weights(torch.tensor([7, 7]), 0.5), torch.ones(2))

    def test_uncertainty_weighting_reaches_the_analytic_optimum(self):
        """L1 = x^2 + 1, L2 = 100 ((x - 1)^2 + 1): s_i = log L_i, and sum L_i' / L_i = 0 puts x half-way."""
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        weighting = losses.UncertaintyWeighting(2).double()
        assert weighting(torch.tensor([3.0, 0.5])) == 1.75  # s = 0: half the sum
        parameters = [x, *weighting.parameters()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            total = weighting(torch.cat((x**2 + 1, 100 * ((x - 1) ** 2 + 1))))
            total.backward()
            return total

        optimizer.step(closure)
        check_close(x.detach(), torch.tensor([0.5]).double(), 1e-4)
        check_close(weighting.log_variances.detach(), torch.tensor([1.25, 125.0]).double().log(), 1e-4)
        by_hand = (1 + math.log(1.25) + 1 + math.log(125)) / 2
        assert closure().item() == pytest.approx(by_hand, abs=1e-6)

    def test_gradnorm_by_hand(self):
        """Two linear tasks with gradient norms 3 and 4 on the shared weights: d w_i / d s_j is
        w_i (delta_ij - w_j / 2)."""
        gradnorm = losses.GradNorm(2).double()
        w = torch.ones(2, dtype=torch.float64, requires_grad=True)
        tasks = torch.stack((3 * w[0], 4 * w[1]))
        half_way = torch.stack((3 * w[0] - 1.5, 4 * w[1]))

        def check(tasks, of_weights, total, alpha=1.5):
            gradnorm.alpha = alpha
            value = gradnorm(tasks, w)
            gradients = torch.autograd.grad(value, (w, gradnorm.log_weights), retain_graph=True)
            assert value.item() == pytest.approx(total)
            model = gradnorm.weights().detach() * torch.tensor([3.0, 4.0]).double()
            check_close(gradients[0], model, 1e-12)
            check_close(gradients[1], torch.tensor([of_weights, -of_weights]).double(), 1e-12)

        assert gradnorm.alpha == 1.5
        check(tasks, -3.5, 7.0)  # G = 3, 4, targets 3.5: signs -, +: -1.5 - 2
        check(half_way, 3.5, 5.5)  # r = 2/3, 4/3: targets 1.9, 5.4: signs +, -
        check(half_way, -3.5, 5.5, alpha=0.0)  # progress plays no part
        with torch.no_grad():
            gradnorm.log_weights.copy_(torch.tensor([3.0, 1.0]).double().log())  # weights 1.5, 0.5
        check(half_way, 2.625, 1.5 * 1.5 + 0.5 * 4, alpha=1.0)  # G = 4.5, 2, targets 2.2, 4.3: 1.125 + 1.5
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
        tasks = torch.cat((3 * a + 4 * b, 10 * a))  # norms 5 and 10, on a alone 3 and 10, on b alone 4 and 0
        for shared in ([a, b], (b, a), iter([a, b])):
            gradnorm = losses.GradNorm(2).double()
            total = gradnorm(tasks, shared)
            gradient = torch.autograd.grad(total, gradnorm.log_weights, retain_graph=True)[0]
            check_close(gradient, torch.tensor([-7.5, 7.5]).double(), 1e-12)  # -5 / 2 - 10 / 2

    def test_gather_batch_nt_xent_on_two_processes_is_one(self, tmp_path):
        torch.multiprocessing.spawn(losses_gather_worker, args=(str(tmp_path),), nprocs=2)
        model = losses_gather_model()
        z1, z2 = (losses.gather_batch(model(x)) for x in losses_gather_batch())  # one process: as it is
        loss = losses.nt_xent_loss(z1, z2)
        loss.backward()
        for rank in range(2):
            result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
            check_close(result["loss"], loss.detach(), 1e-12)
            for actual, p in zip(result["gradients"], model.parameters(), strict=True):
                check_close(actual, p.grad, 1e-12)
            assert result["labels"].tolist() == [0, 7, 0, 1, 7, -1] and "2 to 3" in result["message"]
            assert torch.equal(result["sum"], 3 * torch.arange(12.0).view(2, 2, 3)[rank])  # 1 + 2

    # Optimization strategies

    def test_parameter_groups_decay_matrices_alone(self):
        layers = (nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))
        model = nn.Sequential(*layers)
        model[1].weight.requires_grad_(False)
        decayed, free = losses.parameter_groups(model.parameters(), 0.1)
        assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
        assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4), (3, 2, 2)]
        assert sorted(len(p) for p in free["params"]) == [3, 3, 3, 4, 4, 4]

    @pytest.mark.parametrize(
        ("name", "expected"), [("adamw", 1.98), ("muon", 1.98), ("adam", 1.9), ("sgd", 1.98)]
    )
    def test_make_optimizers_decay(self, name, expected):
        """Gradient 0: AdamW and Muon shrink a matrix by lr * decay; Adam and SGD step along decay * w."""
        hidden, head, bias = (nn.Parameter(torch.full(shape, 2.0)) for shape in ((3, 3), (2, 3), (3,)))
        optimizers = losses.make_optimizers(name, iter([hidden]), iter([head, bias]), 0.1, 0.1)
        for p in (hidden, head, bias):
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
        check_close(hidden.detach(), torch.full((3, 3), expected), 1e-4)
        check_close(head.detach(), torch.full((2, 3), expected), 1e-4)
        assert torch.equal(bias.detach(), torch.full((3,), 2.0))
        kinds = [type(optimizer).__name__.lower() for optimizer in optimizers]
        assert kinds == [name, "adamw"][: len(kinds)] and (len(kinds) == 2) == (name == "muon")
        if name == "muon":
            assert [len(group["params"]) for group in optimizers[0].param_groups] == [1]
            assert optimizers[0].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
        assert optimizers[0].param_groups[0].get("momentum", 0.9) == (0.95 if name == "muon" else 0.9)

    def test_warmup_cosine_by_hand(self):
        factors = [losses.warmup_cosine(step, 4, 12) for step in range(14)]
        falling = [(1 + math.cos(math.pi * part / 8)) / 2 for part in range(8)]
        assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling, 0.0, 0.0], abs=1e-12)
        assert [losses.warmup_cosine(step, 9, 2) for step in range(3)] == [0.5, 1.0, 0.0]  # cut to the run

    # The demo

    def test_calibration_error_and_best_temperature_by_hand(self):
        p = torch.tensor([[0.95, 0.05], [0.91, 0.09], [0.4, 0.6], [0.62, 0.38], [1.0, 0.0]])
        y = torch.tensor([0, 1, 1, 1, 0])
        # of 15 bins: 0.95 and 1.0 share the last, 0.91 is in the one before, 0.6 and 0.62 share another
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
            assert torch.equal(data["test"][0], sets[0]["test"][0])  # no seed trains on another's test
        assert not torch.equal(sets[0]["train"][1], sets[1]["train"][1])

    def test_judge_by_hand(self):
        """Paired: a constant difference in noisy rows is found; noise is not. Less is better for some."""
        base = [0.5, 0.9, 0.1, 0.7, 0.3]
        up = [0.61, 1.0, 0.2, 0.79, 0.4]
        noise = [0.6, 0.8, 0.2, 0.6, 0.4]
        rows = {
            name: {"values": {"accuracy": values, "NLL": values}}
            for name, values in (("base", base), ("up", up), ("noise", noise))
        }
        sentence = losses.judge(rows)
        mean, error, verdict = rows["up"]["difference"]["accuracy"]
        assert mean == pytest.approx(0.1) and verdict == "better"
        assert error == pytest.approx(statistics.stdev([0.11, 0.1, 0.1, 0.09, 0.1]) / math.sqrt(5))
        assert rows["up"]["difference"]["NLL"][2] == "worse" and rows["noise"]["difference"]["NLL"][2] == ""
        assert "up" in sentence and "noise" not in sentence and "difference" not in rows["base"]
        del rows["up"]
        assert "beyond chance" in losses.judge(rows)

    def test_tune_takes_the_rate_that_is_best_on_dev(self):
        """On average, though not for seed 1; the test counts for nothing; an edge is told."""
        dev = {0.1: (0.0, 0.2), 0.2: (1.0, 0.3), 0.3: (0.2, 0.9)}

        def evaluate(model, k, part):
            lr = model
            return {"score": dev[lr][k] if part == "dev" else 10 * lr, "other": -dev[lr][k]}

        s = losses.Settings(n_seeds=2)
        models, row = losses.tune(lambda lr, k: lr, evaluate, "score", s, (0.1, 0.2, 0.3))
        assert models == [0.2, 0.2] and row["rate"] == 0.2 and not row["at_edge"]
        assert row["values"]["score"] == [2.0, 2.0] and row["dev"][0.3]["score"] == pytest.approx(0.55)
        for rates, best in (((0.2, 0.3), 0.2), ((0.1, 0.2), 0.2)):
            _, row = losses.tune(lambda lr, k: lr, evaluate, "score", s, rates)
            assert row["rate"] == best and row["at_edge"]

    def test_train_options_do_something(self):
        """Same seed, same weights; each option gives others; the batches don't depend on the sizes."""
        s = losses.Settings(n_seeds=1, steps=12)
        sets = losses.digits(s, 200, 50)
        runs = {"plain": {}, "cosine": {"cosine": True}, "sgd": {"optimizer": "sgd"}}
        weights, seen = {}, []

        def loss_of(z, y):
            seen.append(y)
            return F.cross_entropy(z, y)

        for label, options in (runs | {"again": {}}).items():
            model = losses.train(0.01, 0, sets, (64, 16, 16, 10), loss_of, s, **options)
            weights[label] = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(weights.pop("again"), weights["plain"])
        for one, other in itertools.combinations(weights, 2):
            assert not torch.allclose(weights[one], weights[other]), (one, other)
        losses.train(0.01, 0, sets, (64, 10), loss_of, s)
        assert torch.equal(torch.stack(seen[-12:]), torch.stack(seen[:12]))

    @pytest.mark.parametrize("name", ["smoothing", "imbalance", "embeddings", "tasks", "optimizers"])
    def test_demo_learning_rate_comes_from_dev_alone(self, name, monkeypatch):
        """Test labels turned to nonsense change no rate and no dev score, but the values."""
        digits, s = losses.digits, losses.Settings(n_seeds=2, steps=4)
        demo = getattr(losses, f"demo_{name}")
        honest = demo(s)

        def with_nonsense(*arguments):
            return [d | {"test": (d["test"][0], (d["test"][1] + 1) % 10)} for d in digits(*arguments)]

        monkeypatch.setattr(losses, "digits", with_nonsense)
        other = demo(s)
        for row, values in honest.items():
            assert other[row]["rate"] == values["rate"] and other[row]["dev"] == values["dev"]
            assert other[row]["values"] != values["values"]

    def test_demo_script(self, tmp_path):
        result = run_script("losses.py", "--steps", "2", "--n-seeds", "2", "--out", "here", cwd=tmp_path,
                            PYTHONIOENCODING="ascii")  # fmt: skip
        summary = last_json(result)
        assert len(result.stdout.strip().splitlines()[-1]) < 300
        report = json_of(tmp_path / summary["report"])
        assert list(report["tables"]) == ["smoothing", "imbalance", "embeddings", "tasks", "optimizers"]
        assert all(report["checklist"].values()) and len(report["checklist"]) == 11
        edges = 0
        for title, rows in report["tables"].items():
            assert title in result.stdout and report["conclusions"][title] in result.stdout
            for name, row in rows.items():
                assert name in result.stdout
                assert all(len(v) == 2 and math.isfinite(sum(v)) for v in row["values"].values())
                edges += row["at_edge"]
        assert summary["rates_on_an_edge"] == edges and report["settings"]["n_seeds"] == 2
        assert (tmp_path / "here" / "losses.png").read_bytes()[:4] == b"\x89PNG"
        for key in ("seconds", "torch", "threads", "cpu"):
            assert report[key]


# -----------------------------------------------------------------------------
# train_ddp.py and train_fsdp.py

# A process that has imported torch once; each rank is a fork of it: a start costs 0.1 s, not 3. Ranks are
# processes of their own, with the variables that torchrun sets, and end as a script does.
LAUNCHER = """
import gc, importlib, json, os, signal, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import matplotlib.backends.backend_agg, matplotlib.pyplot, safetensors.torch, tqdm, tyro
import torch, torch._dynamo, torch.distributed.checkpoint._fsspec_filesystem, torch.utils.serialization
import pydoc_data.topics
from pathlib import Path
script = globals()[sys.argv[2]] = importlib.import_module(sys.argv[2])
RANK = 0
matplotlib.pyplot.Figure.savefig = lambda *_, **__: None
def run():
    script.exit_now(script.main(tyro.cli(script.Settings)))
gc.collect()
gc.freeze()  # a rank's collections don't walk through torch, nor copy its pages
for line in sys.stdin:
    job, pids = json.loads(line), []
    for RANK in job["ranks"]:
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['log']}.{RANK}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            os.environ.update(job["env"])
            if job["world"] > 1:
                os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(job["world"]))
            sys.argv = [sys.argv[2] + ".py", *job["arguments"][RANK]]
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
    """Runs a script on any number of ranks, one run at a time."""

    def __init__(self, folder: Path, module: str):
        (folder / "launcher.py").write_text(LAUNCHER)
        self.folder, self.module, self.pids, self.ranks = folder, module, [], []
        self.running = False
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "launcher.py"), str(ROOT), module],
            env=env | {"OMP_NUM_THREADS": "1"},
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, world: int, *arguments: str, of_rank=None, code="run()", **environment) -> None:
        """of_rank: more arguments for a rank; None: this rank never starts. code: what each rank runs."""
        of_rank = of_rank or {}
        if self.running:  # a test before failed half-way: its ranks would be waited for
            self.wait(0)
        self.running = True
        self.ranks = [rank for rank in range(world) if of_rank.get(rank, []) is not None]
        for log in self.folder.glob("log.*"):
            log.unlink()
        job = {"world": world, "ranks": self.ranks, "code": code, "log": str(self.folder / "log")}
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

    def attempt(self, world: int, *arguments: str, **options) -> list[subprocess.CompletedProcess]:
        self.start(world, *arguments, **options)
        return self.wait()

    def run(self, world: int, *arguments: str, **options) -> list[subprocess.CompletedProcess]:
        results = self.attempt(world, *arguments, **options)
        assert all(r.returncode == 0 for r in results), results
        return results

    def wait_until(self, condition) -> None:
        wait_until(condition, 120, lambda: (self.out(0), self.out(0, "err")))

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


def launcher_of(module: str, scope: str = "module", **options):
    """A fixture: one launcher of a script for all tests."""

    @pytest.fixture(scope=scope, **options)
    def fixture(request, tmp_path_factory):
        name = getattr(request, "param", module)
        launcher = Launcher(tmp_path_factory.mktemp(name), name)
        yield launcher
        launcher.end()

    return fixture


ddp = launcher_of("train_ddp")
fsdp = launcher_of("train_fsdp")
trainer = launcher_of("", params=["train_ddp", "train_fsdp"])

# Rows of the parameters divide neither by 4 nor all by 2, batches neither: every slice and part is uneven.
TINY = "--steps 20 --batch-size 13 --max-len 21 --d-model 18 --n-heads 2 --n-layers 2 --warmup 3".split()
TINY += "--lr 3e-3 --eval-every 10 --save-every 0 --timeout 40".split()
KILLS = int(os.environ.get("KILLS", 3))  # KILLS=20 KILL_SEED=7: a longer search, and which
KILL_SEED = int(os.environ.get("KILL_SEED", time.time()))
CPU = torch.device("cpu")
SCRIPTS = [train_ddp, train_fsdp]


def saved(out: Path) -> list[Path]:
    """Checkpoints of either script, oldest first."""
    return sorted(p for p in out.glob("step_*") if not p.name.endswith((".part", ".damaged")))


def newest_name(out: Path) -> str:
    return max((path.name for path in saved(out)), default="")


def saved_state(out: Path) -> dict:
    """The numbers of the newest checkpoint, whichever script's."""
    newest = saved(out)[-1]
    if newest.is_dir():
        return json_of(newest / "manifest.json")
    return torch.load(newest, weights_only=True)


def final_weights(out: Path) -> Tensor:
    state = torch.load(out / "final.pt", weights_only=True)
    return torch.cat([value.flatten() for value in state.values()])


def distance_of_weights(a: Path, b: Path | Tensor) -> float:
    """Norm of the difference of all weights, relative to the norm."""
    a, b = final_weights(a), b if isinstance(b, Tensor) else final_weights(b)
    assert a.dtype == b.dtype
    return ((a - b).norm() / b.norm()).item()


def rows_of_steps(first: int, last: int, n: int, s) -> Tensor:
    """(last - first, batch_size): an endless row of shuffles, cut into batches."""
    epochs = range(last * s.batch_size // n + 1)
    seeds = [torch.Generator().manual_seed(s.seed * 1_000_003 + epoch) for epoch in epochs]
    rows = torch.cat([torch.randperm(n, generator=generator) for generator in seeds])
    return rows[first * s.batch_size : last * s.batch_size].view(-1, s.batch_size)


def by_hand(module, s) -> tuple[Tensor, Tensor]:
    """The same training as a plain loop over whole batches: the weights and the losses of the steps, which
    all ways of splitting the batches must give."""
    (inputs, targets), _ = module.load_manual(s.max_len)
    torch.manual_seed(s.seed)
    model = module.GPT(s.d_model, s.n_heads, s.n_layers, s.max_len).to(getattr(torch, s.dtype))
    if module is train_fsdp:
        module.initialise(model, s.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=1.0)
    losses = []
    for step, rows in enumerate(rows_of_steps(0, s.steps, len(inputs), s)):
        warm = (step + 1) / s.warmup if step < s.warmup else 1.0
        half = math.pi * max(0, step - s.warmup) / (s.steps - s.warmup)
        loss = F.cross_entropy(model(inputs[rows]).flatten(0, 1), targets[rows].flatten())  # of real tokens
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * warm * (1 + math.cos(half)) / 2
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([value.detach().flatten() for value in model.state_dict().values()])
    return weights, torch.tensor(losses, dtype=torch.float64)


def settings_of(module, *arguments: str):
    return tyro.cli(module.Settings, args=[*arguments])


def torchrun(script, *arguments: str, node=(), prefix=(), cwd: Path, **environment) -> subprocess.Popen:
    """As a user starts it, with two processes; what it prints goes to cwd/agentN.log."""
    node = node or ["--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *node, str(script), *arguments]
    log = open(cwd / f"agent{len(list(cwd.glob('agent*')))}.log", "w")  # closed with the process
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=log, stderr=log)


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent's look doesn't."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def kill_with_children(agent: subprocess.Popen) -> None:
    """As if its machine had lost power: torchrun and its workers, which live in a session of their own."""
    for pid in (*children(agent), agent.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's workers below /proc")


class EvilPickle:
    """Pickled, it makes who unpickles it touch a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestTraining:
    """Both scripts: what is parametrized with `trainer` starts processes of one or the other."""

    # ---- oracle: the model, the data, the schedule

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_gpt_equals_torch_layers(self, module):
        """Values and gradients of the whole model against nn.TransformerEncoder, in float64."""
        model = module.GPT(d_model=24, n_heads=3, n_layers=2, max_len=20).double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        oracle = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24), enable_nested_tensor=False).double()
        names = {"qkv_proj.": "self_attn.in_proj_", "out_proj.": "self_attn.out_proj."}
        names |= {"self_attention_norm.": "norm1.", "ffn_norm.": "norm2."}
        names |= {"ffn.0.": "linear1.", "ffn.2.": "linear2.", "blocks.": "layers."}
        pairs, own = {}, dict(model.named_parameters())
        table, position = own.pop("embedding.weight"), own.pop("position.weight")
        for name in own:
            theirs = functools.reduce(lambda text, pair: text.replace(*pair), names.items(), name)
            pairs[name] = oracle.get_parameter(theirs)
            pairs[name].data = own[name].detach().clone()
        assert len(pairs) == len(list(oracle.parameters()))
        tokens = torch.randint(256, (4, 17))
        mask = nn.Transformer.generate_square_subsequent_mask(17, dtype=torch.float64)
        x = (table[tokens] + position[:17]).detach()
        expected = oracle(x, mask=mask, is_causal=True) @ table.detach().T
        logits = model(tokens)
        check_close(logits, expected, 1e-10, "logits")
        logits.square().sum().backward()
        expected.square().sum().backward()
        for name, theirs in pairs.items():
            check_close(own[name].grad, theirs.grad, 1e-10, name)

    def test_initialise_depends_on_seed_and_name_alone(self):
        """GPT-2's start weights in both scripts; train_fsdp.py's don't depend on the model around them."""

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

    @pytest.mark.parametrize("max_len", [7, 128])
    def test_load_manual_has_every_byte_as_a_target_once(self, max_len):
        from pydoc_data.topics import topics

        texts = sorted(set(topics.values()))
        train, dev = train_ddp.load_manual(max_len)
        others = itertools.chain(*train_fsdp.load_manual(max_len))
        assert all(torch.equal(*pair) for pair in zip([*train, *dev], others, strict=True))
        learnt = [t for i, t in enumerate(texts) if i % 10 != 9]
        for (inputs, targets), expected in ((dev, texts[9::10]), (train, learnt)):
            real = targets != -100
            assert inputs.shape == targets.shape == (len(inputs), max_len) and inputs.min() >= 0
            assert bytes(targets[real].tolist()) == "".join(expected).encode()
            assert torch.equal(inputs[:, 1:][real[:, 1:]], targets[:, :-1][real[:, 1:]]), "inputs lag by one"
            assert (real[:, 1:] <= real[:, :-1]).all() and real[:, 0].all(), "the end alone is filled up"
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
            ranks = [module.micro_batches(text, 6, s, module.Processes(rank, 3, CPU)) for rank in range(3)]
            steps = rows_of_steps(6, 12, n, s)
            assert n < 40 or len(steps.unique(dim=0)) == 6
            for expected in steps:
                parts = [next(rank) for rank in ranks for _ in range(2)]
                rows = torch.cat([x[:, 0] for x, _, _ in parts])
                assert torch.equal(rows.sort().values, expected.sort().values) and all(
                    len(x) for x, _, _ in parts
                )
                assert {n for _, _, n in parts} == {(targets[expected] != -100).sum().item()}
                assert all(torch.equal(targets[x[:, 0]], y) for x, y, _ in parts)

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_warmup_cosine(self, module):
        table = ((0, 0, 5, 1), (10, 10, 10, 0), (99, 3, 10, 0), (1, 50, 4, 0.5))
        table += ((0, 4, 9, 0.25), (6, 4, 8, 0.5))
        for *arguments, rate in table:
            assert module.warmup_cosine(*arguments) == pytest.approx(rate)

    # ---- properties: the same weights, however the work is split

    def test_train_same_weights_however_the_batch_is_split(self, trainer, tmp_path):
        """13 sequences of unequal length on 1 to 4 processes, accumulated, as HSDP, in float64; by hand."""
        module = importlib.import_module(trainer.module)
        arguments = [*TINY, "--dtype", "float64", "--seed", "3", "--clip", "0.4"]
        (expected, by_step), losses = by_hand(module, settings_of(module, *arguments)), {}
        runs = {"1": [], "1 accumulated": ["--accumulate", "4"], "2 accumulated": ["--accumulate", "2"]}
        runs |= {"2": [], "3": [], "4": []}
        if module is train_fsdp:
            runs |= {"3": ["--exact"], "4, 2 x 2": ["--replicate", "2", "--accumulate", "2"]}
            runs |= {"2, 2 x 1": ["--replicate", "2"], "2": ["--recompute"]}
        for name, more in runs.items():
            out, world = tmp_path / name.replace(" ", "_"), int(name[0])
            trainer.run(world, *arguments, *more, "--out", str(out))
            assert distance_of_weights(out, expected) <= 1e-12, name
            report = json_of(out / "report.json")
            assert report["processes"] == world and len(report["losses"]) == 20
            dev_losses = [row["dev_loss"] for row in report["log"]]
            losses[name] = torch.tensor(report["losses"] + dev_losses, dtype=torch.float64)
            check_close(losses[name], losses["1"], 1e-12, "losses")
        check_close(losses["1"][:-2], by_step, 1e-12, "losses")

    def test_train_two_processes_are_bitwise_one_with_two_micro_batches(self, trainer, tmp_path):
        """Float32, with dropout too: its masks belong to a part of the batch, not to a process. The held-out
        loss is that of the final weights without dropout."""
        arguments = [*TINY, "--dropout", "0.2", "--clip", "0.3"]
        arguments += ["--exact"] * (trainer.module == "train_fsdp")
        trainer.run(1, *arguments, "--accumulate", "2", "--out", str(tmp_path / "1x2"))
        expected = final_weights(tmp_path / "1x2")
        runs = {"2": []} | ({"recompute": ["--recompute"]} if trainer.module == "train_fsdp" else {})
        for name, more in runs.items():
            trainer.run(2, *arguments, *more, "--out", str(tmp_path / name))
            assert torch.equal(final_weights(tmp_path / name), expected), name
        trainer.run(1, *arguments, "--out", str(tmp_path / "1"))
        assert distance_of_weights(tmp_path / "1", expected) > 1e-3, "other micro-batches, other dropout"
        model, (_, (inputs, targets)) = train_ddp.GPT(18, 2, 2, 21), train_ddp.load_manual(21)
        model.load_state_dict(torch.load(tmp_path / "2/final.pt", weights_only=True))
        with torch.no_grad():
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
        assert json_of(tmp_path / "2/report.json")["dev_loss"] == pytest.approx(loss, rel=1e-5)

    def test_train_float32_and_mixed_precision(self, trainer, tmp_path):
        """bf16 and scaled fp16 stay near float32 (a loss that wasn't unscaled before clipping wouldn't move
        the same way); more ranks sum in another order."""
        arguments, fsdp = [*TINY, "--clip", "0.3"], trainer.module == "train_fsdp"
        trainer.run(1, *arguments, *["--exact"] * fsdp, "--out", str(tmp_path / "1"))
        runs = {"3": [], "2 bf16": ["--amp", "bf16"], "2 fp16": ["--amp", "fp16"]}
        runs |= {"4 x": ["--exact"], "4 r": ["--exact", "--replicate", "2"]} if fsdp else {}
        for name, more in runs.items():
            out = tmp_path / name.replace(" ", "_")
            trainer.run(int(name[0]), *arguments, *more, "--out", str(out))
            distance = distance_of_weights(out, tmp_path / "1")
            assert final_weights(out).dtype == torch.float32
            assert 5e-5 < distance < 0.02 if "16" in name else distance <= 1e-4, (name, distance)

    def test_train_clip_0_is_no_clipping(self, trainer, tmp_path):
        weights, exact = [], ["--exact"] * (trainer.module == "train_fsdp")
        for clip in ("0", "1e9", "0.01"):
            arguments = [*TINY, *exact, "--steps", "4", "--clip", clip, "--out", str(tmp_path / clip)]
            trainer.run(1, *arguments)
            weights.append(final_weights(tmp_path / clip))
        assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])

    def test_train_gradients_travel_with_the_last_micro_batch_alone(self, trainer, tmp_path):
        """Three micro-batches a step: counted where the gradients leave; each has dropout of its own, for the
        largest seed too."""
        code = """
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
sent, seeds, seed = [], [], torch.manual_seed
torch.manual_seed = lambda number: seeds.append(number) or seed(number)
if hasattr(script, "wrap"):
    wrap = script.wrap
    def hooked(*arguments):
        parallel = wrap(*arguments)
        parallel.register_comm_hook(None, lambda _, bucket: sent.append(1) or allreduce_hook(None, bucket))
        return parallel
    script.wrap = hooked
else:
    set_sync = FSDPModule.set_requires_gradient_sync
    FSDPModule.set_requires_gradient_sync = lambda self, now: sent.extend([1] * now) or set_sync(self, now)
script.main(tyro.cli(script.Settings))
print(json.dumps([len(sent), [n for n in seeds if n > 2**32]]))  # not generate's seed, nor the model's
"""
        arguments = [*TINY, "--steps", "4", "--accumulate", "3", "--seed", str(2**32 - 1)]
        results = trainer.run(2, *arguments, "--out", str(tmp_path), code=code)
        sent, seeds = zip(*(json.loads(r.stdout.splitlines()[-1]) for r in results), strict=True)
        assert sent == (4, 4)
        assert len(set(sum(seeds, []))) == 4 * 3 * 2, "dropout of its own in each part of each step"
        assert {n // 4_096 // 1_000_003 for n in sum(seeds, [])} == {2**32 - 1}, "and no other seed's"

    def test_compile_saves_a_plain_state_dict(self, trainer, tmp_path):
        """torch's "eager" backend stands for the compiler; going on without --compile gives the same."""
        code = """
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: print("compiled") or compile(self, backend="eager")
run()
"""
        arguments, out = [*TINY, "--steps", "4", "--save-every", "2", "--out"], tmp_path / "compiled"
        trainer.run(1, *arguments, str(tmp_path / "plain"))
        assert "compiled" in trainer.run(2, *arguments, str(out), "--compile", code=code)[0].stdout
        assert distance_of_weights(out, tmp_path / "plain") < 1e-5
        state = torch.load(out / "final.pt", weights_only=True)
        assert state.keys() == train_ddp.GPT(18, 2, 2, 21).state_dict().keys()
        (out / "final.pt").unlink()
        saved(out)[-1].rename(tmp_path / "removed")
        assert "from_step=2" in trainer.run(1, *arguments, str(out))[0].stdout
        assert distance_of_weights(out, tmp_path / "plain") < 1e-5

    def test_wrap_data_parallel_where_there_are_gpus(self, monkeypatch):
        monkeypatch.setattr(nn, "DataParallel", lambda model: "copies")
        model, gpu = nn.Linear(2, 2), torch.device("cuda:0")
        for device, asked, expected in ((gpu, True, "copies"), (gpu, False, model), (CPU, True, model)):
            assert train_ddp.wrap(model, train_ddp.Processes(0, 1, device), asked) is expected

    # ---- properties: shards

    def test_shard_each_rank_holds_its_slices_and_no_more(self, fsdp, tmp_path):
        """1/N of weights, gradients and moments, of a replica with HSDP, as the report counts them."""
        model = train_ddp.GPT(18, 2, 2, 21)
        n_all = sum(p.numel() for p in model.parameters())
        for world, replicate in ((2, 1), (4, 2)):
            out, shards = tmp_path / str(world), world // replicate
            arguments = [*TINY, "--steps", "2", "--replicate", str(replicate), "--out", str(out)]
            stdout = fsdp.run(world, *arguments)[0].stdout
            report = json_of(out / "report.json")
            assert report["n_parameters"] == n_all
            all_of_it = {"weights": 4 * n_all, "gradients": 4 * n_all, "moments": 8 * n_all}
            assert report["held"]["all"] == all_of_it
            for rank in range(world):
                chunks = [p.chunk(shards) for p in model.parameters()]
                n = sum(c[rank % shards].numel() for c in chunks if rank % shards < len(c))
                held = report["held"][f"rank {rank}"]
                assert held.pop("peak") > 50e6
                assert held == {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n}
                assert n <= n_all / shards * 1.05 and f"rank {rank}   weights {4 * n / 2**20:,.3f}" in stdout

    def test_shard_gathers_one_block_at_a_time(self, fsdp):
        """While a block computes it is whole, and the others are in slices; the whole model is never made.
        129 held-out rows: the last forward has one, and a rank that counts nothing."""
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
for block in model.blocks:
    block.ffn_norm.register_forward_hook(lambda *_: seen.append(
        [not isinstance(b.qkv_proj.weight, DTensor) for b in model.blocks]))
model(torch.zeros(2, 8, dtype=torch.long)).sum().backward()
assert seen == [[True, False, False], [False, True, False], [False, False, True]], seen
assert all(isinstance(w, DTensor) and isinstance(w.grad, DTensor) for w in model.parameters())

x, y = (part[-129:] for part in script.load_manual(8)[1])
expected = script.F.cross_entropy(reference(x).flatten(0, 1), y.flatten()).item()
assert abs(script.evaluate(model, (x, y), p) / expected - 1) < 1e-6 and model.training

s.amp, dtypes = "bf16", set()
model = script.sharded_model(s, p)
model.blocks[1].ffn_norm.register_forward_hook(lambda m, *_: dtypes.add(m.weight.dtype))
model(torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(p.rank))).sum().backward()
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
        for result in fsdp.run(2, code=code):
            assert result.stderr == ""

    # ---- properties: checkpoints

    def test_save_checkpoint_keeps_the_last_and_leaves_no_parts(self, tmp_path):
        folder = tmp_path / "new/folder"
        for attempt in range(6):  # of one step: the names' order is that of their sha256
            train_ddp.save_checkpoint(folder, 1, {"attempt": attempt})
            assert train_ddp.load_checkpoint(folder) == {"attempt": attempt}
        others = [folder / f"step_{name}.pt" for name in ("1", "00000009", "00000009.ab", "best")]
        for other in others:
            other.write_text("not ours")
        for step in (5, 50, 500, 5000):
            weights = torch.arange(1000.0) + step
            path = train_ddp.save_checkpoint(folder, step, {"step": step, "weights": weights}, keep=2)
        names = {p.name.split(".")[0] for p in set(folder.iterdir()) - set(others)}
        assert names == {"step_00000500", "step_00005000"} and all(other.exists() for other in others)
        loaded = train_ddp.load_checkpoint(folder)
        assert path.exists() and loaded["step"] == 5000 and torch.equal(loaded["weights"], weights)
        assert train_ddp.load_checkpoint(tmp_path / "nothing") is None

    def test_load_checkpoint_and_tensors_run_no_code(self, tmp_path):
        """Neither of a checkpoint, nor from .metadata, nor from an entry that it calls an object's."""
        import torch.distributed.checkpoint as dcp

        evil = EvilPickle(tmp_path / "ran")
        data = pickle.dumps({"step": evil}, protocol=2)
        (tmp_path / f"step_00000001.{hashlib.sha256(data).hexdigest()}.pt").write_bytes(data)
        with contextlib.suppress(Exception):
            train_ddp.load_checkpoint(tmp_path)
        assert not (tmp_path / "ran").exists()
        tensors = {"a": torch.zeros(3)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for what in (tensors, {"a": evil}):
                dcp.save(what, checkpoint_id=tmp_path / "c")
                if what is tensors:
                    (tmp_path / "c/.metadata").write_bytes(pickle.dumps(evil))
                (tmp_path / "ran").unlink(missing_ok=True)
                with pytest.raises(OSError):
                    train_fsdp.load_tensors(tmp_path / "c", tensors)
                assert not (tmp_path / "ran").exists()
        for name in (b"load", b"os.system"):
            with pytest.raises(pickle.UnpicklingError):
                train_fsdp.MetadataUnpickler(io.BytesIO(b"\x80\x04ctorch\n" + name + b"\n.")).load()

    def test_write_atomically_two_writers(self, tmp_path):
        """Readers see one writer's bytes or the other's, and nothing is left behind."""
        path, stop = tmp_path / "file", time.monotonic() + 1
        texts = [letter * 200_000 for letter in (b"a", b"b")]
        path.write_bytes(texts[0])

        def write(text: bytes) -> None:
            while time.monotonic() < stop:
                train_ddp.write_atomically(path, text)

        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write, text) for text in texts]
            while time.monotonic() < stop:
                assert path.read_bytes() in texts
        for writer in writers:
            writer.result()
        assert list(tmp_path.iterdir()) == [path]

    def test_load_optimizer_after_a_change_of_device(self):
        """What an unfused AdamW saved goes into a fused one, whose fp16 steps need it fused; and back."""
        weights = []
        for kinds in itertools.product((False, True), repeat=2):
            torch.manual_seed(0)
            model, state = nn.Linear(3, 2), None
            for fused in kinds:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
                if state:
                    train_ddp.load_optimizer(optimizer, state, train_ddp.Processes(0, 1, CPU))
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

    def test_load_tensors_on_any_number_of_ranks(self, fsdp, tmp_path):
        """Saved on 2, loaded on 1, 2, 4, 2 x 2 and by one without a group: the same digest of weights,
        moments and step counts; the weights are those of final.pt."""
        digest = """
def digest(p, path, s):
    import hashlib
    model = script.sharded_model(s, p) if p else script.GPT(s.d_model, s.n_heads, s.n_layers, s.max_len)
    tensors = script.state_tensors(model, script.make_optimizer(model, s))
    script.load_tensors(path, tensors, p)
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        sha.update(name.encode() + whole.numpy().tobytes())
    return sha.hexdigest(), tensors
"""
        arguments, out = [*TINY, "--save-every", "10", "--out", str(tmp_path)], tmp_path
        fsdp.run(2, *arguments)
        path = saved(out)[-1]
        code = digest + "p = script.start_processes('cpu', 30)\n"
        code += f"print(digest(p, Path({str(path)!r}), tyro.cli(script.Settings))[0])"
        found = [fsdp.run(world, *arguments, code=code)[0].stdout.strip() for world in (2, 1, 4)]
        found += [fsdp.run(4, *arguments, "--replicate", "2", code=code)[0].stdout.strip()]
        scope = {"script": train_fsdp}
        exec(digest, scope)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is disabled": so it is meant
            sha, tensors = scope["digest"](None, path, settings_of(train_fsdp, *arguments))
        assert set(found) == {sha} and len(tensors) == 4 * len(train_fsdp.GPT(18, 2, 2, 21).state_dict())
        assert all(value == 20 for name, value in tensors.items() if name.endswith(".step"))
        final = torch.load(out / "final.pt", weights_only=True)
        table = safetensors.torch.load_file(out / "final.safetensors")
        assert final.keys() == table.keys() == train_ddp.GPT(18, 2, 2, 21).state_dict().keys()
        for name, value in final.items():
            assert torch.equal(value, tensors[f"model.{name}"]) and torch.equal(value, table[name])
        files = set(json_of(path / "manifest.json")["files"])
        assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert {p.name for p in path.iterdir()} == files | {"manifest.json"}, "a checksum covers each"

    def test_newest_checkpoint_is_an_undamaged_one(self, fsdp, tmp_path, capsys):
        """Whatever the damage: it is said, and training goes on from the one before to the same end."""
        arguments = [*TINY, "--save-every", "8", "--exact", "--out"]
        fsdp.run(2, *arguments, str(tmp_path / "whole"))
        (tmp_path / "whole/report.json").unlink()
        files = {"missing": "__1_0.distcp", "truncated": "__1_0.distcp", "altered": "__0_0.distcp"}
        files |= {"altered metadata": ".metadata"}
        files |= {"altered manifest": "manifest.json", "missing manifest": "manifest.json"}
        for damage, name in files.items():
            out = tmp_path / damage
            shutil.copytree(tmp_path / "whole", out)
            newest = saved(out)[-1]
            data = bytearray((newest / name).read_bytes())
            data[len(data) // 2] ^= 4 * ("altered" in damage)
            (newest / name).write_bytes(data[:-1] if damage == "truncated" else data)
            if "missing" in damage:
                (newest / name).unlink()
            for said in (f"{newest} is damaged ({name} missing or altered)\n", ""):  # once
                assert train_fsdp.newest_checkpoint(out)[0].name[:13] == "step_00000016"
                assert capsys.readouterr().err == said
            assert newest.with_name(newest.name + ".damaged").is_dir()
        assert "from_step=16" in fsdp.run(2, *arguments, str(tmp_path / "missing"))[0].stdout
        for path in saved(tmp_path / "altered"):  # the last good ones: training begins anew
            (path / ".metadata").write_bytes(b"")
        assert "from_step=0" in fsdp.run(2, *arguments, str(tmp_path / "altered"))[0].stdout
        for damage in ("missing", "altered"):
            assert distance_of_weights(tmp_path / damage, tmp_path / "whole") == 0

    def test_publish_needs_an_out_that_all_machines_see(self, fsdp, tmp_path):
        """Each would write its slices on its own disk: no checkpoint could ever be read."""
        fsdp.run(2, *TINY, "--steps", "2", "--out", str(tmp_path))
        part = saved(tmp_path)[0].rename(tmp_path / "step_00000005.part")
        (part / "__1_0.distcp").rename(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="__1_0.distcp"):
            train_fsdp.publish(part, {}, 3)
        (tmp_path / "elsewhere").rename(part / "__1_0.distcp")
        assert train_fsdp.publish(part, {}, 3).exists()

    # ---- refusals

    def test_main_refuses_in_one_line(self, trainer, tmp_path):
        """Two processes, of which one says it (both, where they haven't met); nothing is written. Then ranks
        that disagree on a setting or on the text (a Python with another manual)."""
        (tmp_path / "file").write_text("not a folder")
        refused = {"lr": ["--lr", "nan"], "file": ["--out", str(tmp_path / "file")]}
        refused |= {"amp bf16 needs": ["--amp", "bf16", "--dtype", "float64"]}
        if trainer.module == "train_ddp":
            refused |= {"data_parallel": ["--data-parallel", "--amp", "bf16"]}
        else:
            refused |= {"replicate": ["--replicate", "3"], "exact": ["--exact", "--amp", "bf16"]}
        arguments = [*TINY, "--out", str(tmp_path / "out")]
        for words, more in (refused | {"needs a GPU": ["--device", "cuda"]}).items():
            results = trainer.attempt(2, *arguments, *more)
            check_one_line_error(results[0], words)
            assert results[1].returncode == 2 and (words not in refused or results[1].stderr == "")
        assert not (tmp_path / "out").exists()
        other = "pydoc_data.topics.topics = dict(list(pydoc_data.topics.topics.items())[: 20 + 20 * RANK])\n"
        for words, more, code in (("save_every", ["--save-every", "7"], ""), ("text", [], other)):
            results = trainer.attempt(2, *arguments, of_rank={1: more}, code=code + "run()")
            check_one_line_error(results[1], "rank 1", words)
            assert results[0].returncode in (1, 2) and not (tmp_path / "out/final.pt").exists()

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_check_settings_takes_the_least_of_each_and_no_less(self, module):
        ones = "steps batch_size accumulate d_model n_heads n_layers eval_every keep timeout".split()
        zeros = "lr warmup weight_decay clip seed save_every dropout".split()
        alone, two = (module.Processes(0, world, CPU) for world in (1, 2))
        for name, least in (dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0)).items():
            module.check_settings(module.Settings(**({"n_heads": 1} | {name: least})), alone)
            with pytest.raises(ValueError, match=name):
                module.check_settings(module.Settings(**{name: least - 1}), alone)
        module.check_settings(module.Settings(batch_size=6, accumulate=3, seed=2**32 - 1), two)
        for wrong in ({"batch_size": 5, "accumulate": 3}, {"seed": 2**32}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                module.check_settings(module.Settings(**wrong), two)

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_start_processes_names_what_the_environment_lacks(self, module, monkeypatch):
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        for name, lacking in zip(names, [*list(names)[1:], "none"], strict=True):  # set one by one
            monkeypatch.setenv(name, names[name])
            if lacking != "none":
                with pytest.raises(KeyError, match=lacking):
                    module.start_processes("cpu", 5.0)
        restarts = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
        for name, value in (restarts | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
            module.start_processes("cpu", 5.0)

    def test_start_processes_meet_again_after_a_restart(self, trainer):
        """In the store that torchrun keeps, where the addresses of those that have ended still stand."""
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
        code = """
time.sleep(2 * RANK)
p = script.start_processes("cpu", 20)
print(script.sum_over_ranks([1.0], p))
"""
        for attempt in ("0", "1"):
            environment["TORCHELASTIC_RESTART_COUNT"] = attempt
            for result in trainer.run(2, code=code, **environment):
                assert result.stdout == "[2.0]\n"

    def test_main_refuses_the_out_of_another_run(self, trainer, tmp_path):
        """Other settings, another version's checkpoint, the other script's run; what may change may."""
        run, out = [*TINY, "--steps", "4", "--out", str(tmp_path / "a")], tmp_path / "a"
        trainer.run(2, *run)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        other = {"train_ddp": "train_fsdp.py", "train_fsdp": "train_ddp.py"}[trainer.module]
        check_one_line_error(run_script(other, *run, cwd=tmp_path), f"{other} here")
        may = ["--save-every", "3", "--timeout", "39", "--keep", "1", "--eval-every", "7", "--compile"]
        may += ["--replicate", "2", "--recompute"] * (trainer.module == "train_fsdp")
        assert "this run is finished" in trainer.run(2, *run, *may)[0].stdout
        check_one_line_error(trainer.attempt(2, *run, "--lr", "0.01")[0], "lr 0.003", "--out")
        assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        (out / "report.json").unlink()
        results = trainer.attempt(2, *run, "--steps", "5")
        check_one_line_error(results[0], "steps 4", "--out")
        assert results[1].returncode == 2 and results[1].stderr == ""
        if trainer.module == "train_ddp":
            train_ddp.save_checkpoint(tmp_path / "old", 10, {"step": 10, "model": {}})
            (result,) = trainer.attempt(1, *TINY, "--out", str(tmp_path / "old"))
            check_one_line_error(result, "another --out")

    # ---- runs: going on, ending, failing

    def test_main_goes_on_where_it_was_on_other_processes(self, trainer, tmp_path):
        """Half on 2 processes, half on 1, 2, 3, 4, as HSDP, recomputed: the undisturbed run's weights; on 2
        bitwise. A damaged newest checkpoint is passed over."""
        arguments = [*TINY, "--dtype", "float64", "--save-every", "8", "--dropout", "0"]
        trainer.run(2, *arguments, "--out", str(tmp_path / "whole"))
        runs = {"1": [], "2": [], "3": [], "4": []}
        if trainer.module == "train_fsdp":
            runs = {"1": ["--recompute"], "2": [], "4": [], "4 replicas": ["--replicate", "2"]}
        for name, more in runs.items():
            out = tmp_path / name.replace(" ", "_")
            out.mkdir()
            for path in saved(tmp_path / "whole"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, out / path.name)
            damaged = saved(out)[-1] / "__0_0.distcp" if saved(out)[-1].is_dir() else saved(out)[-1]
            data = bytearray(damaged.read_bytes())
            data[-2000] ^= 16
            damaged.write_bytes(data)
            result = trainer.run(int(name[0]), *arguments, *more, "--out", str(out))[0]
            assert "is damaged" in result.stderr and "from_step=16" in result.stdout
            assert len(list(out.glob("*.damaged"))) == 1, "so that it isn't reported again"
            distance = distance_of_weights(out, tmp_path / "whole")
            assert distance <= (0 if name == "2" else 1e-12), (name, distance)
            curves = [json_of(o / "report.json")["losses"] for o in (out, tmp_path / "whole")]
            check_close(*(torch.tensor(curve, dtype=torch.float64) for curve in curves), 1e-12, "losses")

    def test_main_finished_means_that_all_is_there(self, trainer, tmp_path):
        """What is missing or damaged is made again; what is finished needs no lock, nor to write."""
        out, arguments = tmp_path / "out", [*TINY, "--steps", "4", "--out", str(tmp_path / "out")]
        first = last_json(trainer.run(1, *arguments)[0])
        report, weights = json_of(out / "report.json"), final_weights(out)
        assert first["report"] == str(out / "report.json") and len(json.dumps(first)) < 300
        assert first["loss"] == report["losses"][-1] == report["loss"] and len(set(report["losses"])) == 4
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert rows == report["log"] and rows[-1]["dev_loss"] == report["dev_loss"] == first["dev_loss"]
        (inputs, targets), _ = train_ddp.load_manual(21)
        learnt = rows_of_steps(0, 4, len(inputs), settings_of(train_ddp, *arguments))
        assert report["tokens"] == (targets[learnt] != -100).sum()
        rate = report["tokens"] / report["train_seconds"]
        assert report["tokens_per_second"] == round(rate) and rows[-1]["gradient_norm"] > 0
        (out / "final.pt").unlink()
        trainer.run(1, *arguments)
        assert torch.equal(final_weights(out), weights)
        (out / "report.json").write_text((out / "report.json").read_text()[:-9])
        trainer.run(1, *arguments)
        assert json_of(out / "report.json")["losses"] == report["losses"]
        lock = train_ddp.lock_out(out)
        out.chmod(0o500)
        (again,) = trainer.run(1, *arguments)
        out.chmod(0o700)
        assert "this run is finished" in again.stdout and last_json(again) == first
        lock.close()

    def test_train_a_step_that_diverges_ends_the_run(self, trainer, tmp_path):
        """An inf gradient is never applied nor saved: the run goes on from before. In fp16 that step is
        skipped. A last step that diverges leaves no final.pt."""
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
        for clip in ("1", "0"):
            arguments = [*TINY, "--save-every", "2", "--clip", clip, "--out", str(tmp_path / clip)]
            results = trainer.attempt(2, *arguments, code=code)
            assert [r.returncode for r in results] == [1, 1], results
            assert len(results[0].stderr.splitlines()) == 1 and results[1].stderr == ""
            assert "norm" in results[0].stderr and "step 8" in results[0].stderr
            assert saved_state(tmp_path / clip)["step"] == 8
        assert "from_step=8" in trainer.run(2, *arguments)[0].stdout
        assert final_weights(tmp_path / "0").isfinite().all()
        results = trainer.attempt(2, *TINY, "--out", str(tmp_path / "loss"), code=code, LOSS="1")
        assert [r.returncode for r in results] == [1, 1] and "loss is inf at step 8" in results[0].stderr
        trainer.run(2, *TINY, "--amp", "fp16", "--out", str(tmp_path / "fp16"), code=code)
        assert final_weights(tmp_path / "fp16").isfinite().all()
        assert saved_state(tmp_path / "fp16")["scaler"]["_growth_tracker"] == 11
        arguments = "--steps 1 --warmup 0 --lr 1e30 --clip 0".split()
        (result,) = trainer.attempt(1, *TINY, *arguments, "--out", str(tmp_path / "last"))
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "--lr" in result.stderr
        assert not (tmp_path / "last/final.pt").exists() and not saved(tmp_path / "last")

    BROKEN = """
def broken(*arguments, batches=script.micro_batches):
    for _, batch in zip(range(4), batches(*arguments)): yield batch
    {}["no such row"]
if RANK == 1: script.micro_batches = broken
"""
    ONE_LOSS = "if RANK == 1: script.F.cross_entropy = lambda *a, **k: torch.zeros(2) @ torch.zeros(3)"
    FAILURES = {  # a user's own errors: (what goes wrong, what the traceback says, on which ranks)
        "a wrong shape": ("script.Block.forward = lambda self, x: x[..., :-1]", "RuntimeError", (0, 1)),
        "a loss on one rank": (ONE_LOSS, "RuntimeError", (1,)),
        "a data set on one rank": (BROKEN, "KeyError: 'no such row'", (1,)),
    }

    @pytest.mark.parametrize("failure", FAILURES)
    def test_explain_leaves_a_user_s_error_its_traceback(self, failure, trainer, tmp_path):
        """The rank that has it shows it; the others end too, within the time limit, as a process is lost."""
        code, said, ranks = self.FAILURES[failure]
        start = time.monotonic()
        results = trainer.attempt(2, *TINY, "--timeout", "20", "--out", str(tmp_path), code=code + "\nrun()")
        assert time.monotonic() - start < 60
        for rank, result in enumerate(results):
            assert result.returncode == 1, results
            assert ("Traceback" in result.stderr and said in result.stderr) == (rank in ranks), result.stderr
            assert rank in ranks or f"rank {rank} has lost another process" in result.stderr, result.stderr

    def test_explain_a_lost_process(self, trainer, tmp_path):
        """One that is killed, one that halts, one that never comes."""
        arguments = [*TINY, "--steps", "5000", "--eval-every", "3", "--out", str(tmp_path), "--timeout"]
        for number, timeout in ((signal.SIGKILL, "60"), (signal.SIGSTOP, "4")):
            code = f"""
check = script.check_finite
def ends(what, value, step):
    if step == 5 and RANK == 1:  # while the others go on to the next gradients
        os.kill(os.getpid(), {int(number)})
    check(what, value, step)
script.check_finite = ends
run()
"""
            trainer.start(3, *arguments, timeout, code=code)
            trainer.wait_until(lambda: all("has lost" in trainer.out(rank, "err") for rank in (0, 2)))
            trainer.kill([1])  # in case it is only halted
            results = trainer.wait()
            assert [r.returncode for r in results] == [1, -signal.SIGKILL, 1], results
            for rank in (0, 2):
                assert f"rank {rank} has lost another process" in results[rank].stderr
                assert "Traceback" not in results[rank].stderr
        trainer.start(2, *TINY, "--timeout", "3", "--out", str(tmp_path / "b"), of_rank={1: None})
        (result,) = trainer.wait(60)
        assert result.returncode == 1 and "rank 0 has lost another process" in result.stderr

    def test_on_rank_0_may_take_longer_than_the_timeout(self, trainer, tmp_path):
        """A slow disk kills no job: neither while rank 0 saves, nor at the end, nor another rank's slices."""
        code = """
replace = os.replace
def slow(*arguments):
    time.sleep(3)
    return replace(*arguments)
os.replace = slow
if RANK == 1 and hasattr(script, "dcp"):
    save = script.dcp.save
    script.dcp.save = lambda *a, **k: time.sleep(3) or save(*a, **k)
run()
"""
        arguments = [*TINY, "--steps", "4", "--timeout", "2", "--out", str(tmp_path)]
        assert last_json(trainer.run(2, *arguments, code=code)[0])["loss"] > 0

    def test_save_checkpoint_on_a_full_disk_ends_the_run(self, trainer, tmp_path):
        """A rank may write no file above 10 kB: a sentence, the older checkpoint stays, nothing half written
        does, and the same command goes on."""
        limited = {"train_ddp": 0, "train_fsdp": 1}[trainer.module]
        code = f"""
import resource
save = script.save_checkpoint
def limited(folder, step, *rest):
    if step == 20 and RANK == {limited}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return save(folder, step, *rest)
script.save_checkpoint = limited
run()
"""
        arguments = [*TINY, "--save-every", "10", "--out", str(tmp_path)]
        results = trainer.attempt(2, *arguments, code=code)
        assert [r.returncode for r in results] == [1, 1], results
        assert len(results[0].stderr.splitlines()) == 1 and results[1].stderr == "", results
        assert trainer.module == "train_ddp" or "rank 1" in results[0].stderr
        assert [path.name[:13] for path in saved(tmp_path)] == ["step_00000010"]
        assert not list(tmp_path.glob("*.part"))
        (tmp_path / "tmpx.part").mkdir()  # of a process killed earlier
        assert "from_step=10" in trainer.run(2, *arguments)[0].stdout
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("world", [1, 2])
    def test_save_checkpoint_survives_kill_9_at_random_moments(self, trainer, world, tmp_path):
        """Of one process or of all, in a step or in a save (each step saves): bitwise the same end."""
        arguments = [*TINY, "--steps", "40", "--save-every", "1", "--keep", "2", "--dropout", "0.1"]
        trainer.run(world, *arguments, "--save-every", "0", "--out", str(tmp_path / "whole"))
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
        for attempt in range(2 * KILLS + 2):
            if kills == KILLS:
                break
            code = in_a_save.replace("SAVES", str(rng.randint(2, 9))) if attempt % 2 else "run()"
            before = newest_name(out)
            trainer.start(world, *arguments, "--out", str(out), code=code)
            if attempt % 2 == 0:
                trainer.wait_until(lambda before=before: newest_name(out) != before)
                time.sleep(rng.random() * 0.1)
                with contextlib.suppress(ProcessLookupError):
                    trainer.kill(range(world) if attempt % 4 else [world - 1])
            results = trainer.wait()
            killed = any(r.returncode == -signal.SIGKILL for r in results)
            assert killed or all(r.returncode == 0 for r in results), results
            kills += killed
            if (out / "report.json").exists():
                shutil.rmtree(out)
        assert kills == KILLS, results
        assert "from_step=" in trainer.run(world, *arguments, "--out", str(out))[0].stdout
        assert torch.equal(final_weights(out), final_weights(tmp_path / "whole"))
        assert not list(out.glob("*.part")) and len(saved(out)) == 2

    @pytest.mark.parametrize(
        "world, who, name", [(1, [0], "SIGHUP"), (2, [1], "SIGTERM"), (2, [0, 1], "SIGINT")]
    )
    def test_signals_stop_all_ranks_at_one_step(self, trainer, world, who, name, tmp_path):
        """Saved, with the scaler; the same command goes on to the same end."""
        number = getattr(signal, name)
        arguments = [*TINY, *"--steps 40 --amp fp16 --dropout 0.1".split()]
        trainer.run(world, *arguments, "--out", str(tmp_path / "whole"))
        out = tmp_path / "stopped"
        trainer.start(world, *arguments, "--out", str(out))
        trainer.wait_until(lambda: (out / "log.jsonl").exists())
        trainer.kill(who, number)
        results = trainer.wait()
        assert [r.returncode for r in results] == [128 + number] * world, results
        assert len(saved(out)) == 1 and not (out / "final.pt").exists()
        assert "the same command goes on" in results[0].stderr
        assert all(r.stderr == "" for r in results[1:]), "one line an event"
        state = saved_state(out)
        assert 10 <= state["step"] < 40 and state["scaler"]["_growth_tracker"] > 0
        result = trainer.run(world, *arguments, "--out", str(out))[0]
        assert f"from_step={state['step']}" in result.stdout
        assert torch.equal(final_weights(out), final_weights(tmp_path / "whole"))
        assert saved_state(out)["scaler"] == saved_state(tmp_path / "whole")["scaler"]

    @pytest.mark.parametrize("module", SCRIPTS)
    def test_signals_are_noted_and_given_back(self, module):
        before = signal.getsignal(signal.SIGTERM)
        for world in (1, 2):
            signals = module.Signals(module.Processes(0, world, CPU))
            assert not signals.received()
            signal.raise_signal(signal.SIGTERM)
            assert signals.received() and signals.noted == [signal.SIGTERM]
            alone = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends it at once
            assert alone == (world == 1)
            signals.restore()
            assert signal.getsignal(signal.SIGTERM) == before

    def test_lock_out_one_run_at_a_time(self, trainer, tmp_path):
        """A second start on the same OUT waits a while, then says so; the first one's work stays."""
        arguments = [*TINY, "--steps", "4", "--out", str(tmp_path)]
        lock = importlib.import_module(trainer.module).lock_out(tmp_path)
        code = "lock = script.lock_out\nscript.lock_out = lambda out: lock(out, patience=0.5)\nrun()"
        results = trainer.attempt(2, *arguments, code=code)
        check_one_line_error(results[0], "is in use by another run")
        assert results[1].returncode == 2 and results[1].stderr == ""
        trainer.start(1, *arguments)
        time.sleep(1)
        lock.close()
        assert trainer.wait()[0].returncode == 0, "it has waited"

    # ---- runs: as a user starts them

    @linux
    def test_main_under_torchrun_survives_a_killed_worker(self, trainer, tmp_path):
        """Alone in an empty folder, with a short warm-up; no orphan is left. Then torchrun itself is killed:
        its workers leave, and the same command goes on."""
        script = shutil.copy(ROOT / f"{trainer.module}.py", tmp_path)
        arguments = [*TINY, "--steps", "150", "--save-every", "5", "--eval-every", "75", "--warmup", "200"]
        trainer.run(2, *arguments, "--out", str(tmp_path / "whole"))
        for name, restarts in (("worker", ["--max-restarts=3"]), ("torchrun", [])):
            out, logs = tmp_path / name, len(list(tmp_path.glob("agent*")))
            node = ["--nproc_per_node=2", f"--master_port={free_port()}", *restarts]
            agent = torchrun(script, *arguments, "--out", name, node=node, cwd=tmp_path)
            wait_until(lambda out=out: newest_name(out), 60, "a checkpoint")
            workers = children(agent)
            os.kill(workers[1] if restarts else agent.pid, signal.SIGKILL)
            if not restarts:
                agent.wait()
                wait_until(lambda ids=workers: not any(map(is_alive, ids)), 10, "the orphans to leave")
                assert not (out / "final.pt").exists()
                agent = torchrun(script, *arguments, "--out", name, cwd=tmp_path)
            assert agent.wait(120) == 0, (tmp_path / f"agent{logs}.log").read_text()
            log = "".join(path.read_text() for path in sorted(tmp_path.glob("agent*"))[logs:])
            assert log.count("processes=2") == 2 and log.count("from_step=0") == 1, "once by each start"
            assert log.count("lost another process") <= 1, "the second attempt met at once"
            assert not any(is_alive(pid) for pid in workers), "no orphans"
            assert torch.equal(final_weights(out), final_weights(tmp_path / "whole"))

    @linux
    def test_main_elastic_on_one_node_and_on_two_again(self, ddp, tmp_path):
        """The node that doesn't host the rendezvous comes, is killed and comes back; the loss curve stays."""
        arguments = [*TINY, *"--dtype float64 --steps 100000 --save-every 20 --eval-every 9999".split()]
        node = "--nnodes=1:2 --nproc_per_node=1 --max-restarts=9 --rdzv_backend=c10d --rdzv_id=test".split()
        node += ["--rdzv_endpoint=127.0.0.1:" + str(free_port())]
        node += ["--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"]
        out, agents = tmp_path / "elastic", []
        options = {"node": node, "cwd": tmp_path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

        def starts(processes: int) -> int:
            return sum(log.read_text().count(f"processes={processes} ") for log in tmp_path.glob("agent*"))

        try:
            for processes, n_starts in ((1, 1), (2, 1), (1, 2), (2, 2)):
                if n_starts == 2 and processes == 1:
                    kill_with_children(agents[1])
                else:
                    agents.append(torchrun(ROOT / "train_ddp.py", *arguments, "--out", str(out), **options))
                wait_until(lambda n=n_starts, p=processes: starts(p) == n, 60, f"{processes} node(s)")
                reached = int(newest_name(out)[5:13] or 0) + 20
                wait_until(lambda r=reached: int(newest_name(out)[5:13] or 0) > r, 60, "steps")
        finally:
            for agent in agents:
                kill_with_children(agent)
        curve = train_ddp.load_checkpoint(out)["losses"]
        ddp.start(1, *arguments, "--out", str(tmp_path / "whole"))
        ddp.wait_until(lambda: int(newest_name(tmp_path / "whole")[5:13] or 0) >= len(curve))
        ddp.kill([0])
        ddp.wait()
        undisturbed = train_ddp.load_checkpoint(tmp_path / "whole")["losses"][: len(curve)]
        curves = (torch.tensor(losses, dtype=torch.float64) for losses in (curve, undisturbed))
        check_close(*curves, 1e-5, "loss curve")

    def test_main_on_two_hosts(self, tmp_path):
        """Two network namespaces, a virtual cable, two processes in each: the same weights as by hand."""
        if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
            pytest.skip("two hosts are simulated with `ip netns`: needs Linux, root and iproute2")
        tag = os.getpid() % 10_000
        hosts = [(f"nsA{tag}", f"vA{tag}", "10.77.0.1"), (f"nsB{tag}", f"vB{tag}", "10.77.0.2")]
        arguments, agents = [*TINY, "--dtype", "float64", "--out", str(tmp_path / "out")], []

        def ip(*words: str) -> None:
            done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
            if done.returncode:
                pytest.skip(f"two hosts can't be simulated: ip {' '.join(words)}: {done.stderr.strip()}")

        try:
            for name, _, _ in hosts:
                ip("netns", "add", name)
            ip("link", "add", hosts[0][1], "type", "veth", "peer", "name", hosts[1][1])
            for name, cable, address in hosts:
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                for device in ("lo", cable):
                    ip("-n", name, "link", "set", device, "up")
            for i, (name, cable, address) in enumerate(hosts):
                node = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=1"]
                node += ["--rdzv_endpoint=10.77.0.1:29511", f"--rdzv-conf=is_host={1 - i}"]
                node += [f"--local-addr={address}"]
                options = {"prefix": ["ip", "netns", "exec", name], "cwd": tmp_path}
                command = (ROOT / "train_ddp.py", *arguments)
                agents.append(torchrun(*command, node=node, GLOO_SOCKET_IFNAME=cable, **options))
            codes = [agent.wait(90) for agent in agents]
            assert codes == [0, 0], [(tmp_path / f"agent{i}.log").read_text()[-2000:] for i in (0, 1)]
        finally:
            for agent in agents:
                kill_with_children(agent)
            for name, _, _ in hosts:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)
        expected, _ = by_hand(train_ddp, settings_of(train_ddp, *arguments))
        assert distance_of_weights(tmp_path / "out", expected) <= 1e-12
        assert json_of(tmp_path / "out/report.json")["processes"] == 4


# -----------------------------------------------------------------------------
# export.py

EXPORT_FORMATS = {
    "trace": lambda model, x, folder: export.export_torchscript(model, x, folder / "trace.ts"),
    "script": lambda model, x, folder: export.export_torchscript(model, x, folder / "script.ts", "script"),
    "program": lambda model, x, folder: export.export_program(model, x, folder / "program.pt2"),
    "onnx": lambda model, x, folder: export.export_onnx(model, x, folder / "model.onnx"),
}


def export_tokens(b: int, t: int, vocab_size: int = 50) -> Tensor:
    """Ids with a tail of padding alone, and (in a batch) a row of nothing but padding."""
    tokens = torch.randint(1, vocab_size, (b, t))
    tokens[:, max(1, t - t // 4) :] = 0
    if b > 1:
        tokens[1] = 0
    return tokens


@torch.no_grad()
def check_export(run, model: nn.Module, tolerance: float = 1e-5) -> None:
    """Equal to the model on sizes that the exporter hasn't seen; 224 is max_len."""
    model = copy.deepcopy(model).eval()
    for b, t in ((1, 1), (1, 199), (7, 5), (33, 64), (2, 224)):
        tokens = export_tokens(b, t)
        check_close(run(tokens), model(tokens), tolerance, f"{b} x {t}")


def export_graph(path: Path):
    """(kinds of operators, name -> weights) of an ONNX file."""
    import onnx

    graph = onnx.load(path).graph
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    return collections.Counter(node.op_type for node in graph.node), weights


def export_gated(model: nn.Module, gates: dict[str, Tensor]) -> nn.Module:
    """A copy in which the inputs of these Linears are multiplied by gates (features,)."""
    model = copy.deepcopy(model)
    for name, gate in gates.items():
        linear = model.get_submodule(name)
        linear.register_forward_pre_hook(lambda _module, inputs, gate=gate: (inputs[0] * gate,))
    return model


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
    embedding, head = nn.Embedding(50, 16), nn.Linear(16, 2)
    if name == "bag":
        return ExportModule(lambda m, x: m.head(m.bag(x)), bag=nn.EmbeddingBag(50, 16), head=head)
    if name == "lstm":
        lstm = nn.LSTM(16, 16, batch_first=True)
        parts = {"embedding": embedding, "lstm": lstm, "head": head}
        return ExportModule(lambda m, x: m.head(m.lstm(m.embedding(x))[0][:, -1]), **parts)
    if name == "attention":
        inner = nn.MultiheadAttention(16, 2, batch_first=True)
    else:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor="nested" in name)

    def forward(m: nn.ModuleDict, tokens: Tensor) -> Tensor:
        x = m.embedding(tokens)
        padding = (tokens == 0) & (torch.arange(tokens.size(1)) > 0)  # all of a row would be NaN in torch
        if name == "attention":
            x = m.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        else:
            x = m.inner(x, src_key_padding_mask=padding)
        if "all places" in name:
            return m.head(x.mean(1))
        return m.head((x * ~padding[:, :, None]).sum(1) / (~padding).sum(1, keepdim=True))

    return ExportModule(forward, embedding=embedding, inner=inner, head=head)


class ExportAttention(nn.Module):
    """Has the convention's parts, and does something else between them."""

    def __init__(self, change: str):
        super().__init__()
        self.change = change
        self.n_heads = 2
        self.qkv_proj = nn.Linear(8, 24)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None):
        x = x * 1.5 if self.change == "scaled" else x
        mask = None if self.change == "mask ignored" else mask
        y = export.SelfAttention(self.qkv_proj, self.out_proj, 2)(x, mask)
        return (y, y) if self.change == "tuple" else y


class TestExport:
    PLACES = {"encoder": "encoder.layers", "own": "layers"}

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

    @pytest.mark.parametrize("name", EXPORT_FORMATS)
    @pytest.mark.parametrize("which", ["encoder", "own"])
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
        """A query that may attend to nothing gets 0; masks broadcast, and are booleans or added."""
        q, k, v = (torch.randn(3, 4, t, 8).to(dtype) for t in (5, 7, 7))
        keys = torch.arange(3)[:, None, None, None] > torch.arange(7)  # (B, 1, 1, Tk), the first row empty
        rows = (torch.rand(5, 7) < 0.5) & (torch.arange(5) > 0)[:, None]
        added = torch.where(rows, torch.arange(7) / 3, -math.inf).to(dtype)
        for mask in (None, keys, rows, added):
            for scale in (None, 0.7, -0.7):
                y = export.attention_for_onnx(q, k, v, mask, scale=scale)
                check_close(y, F.scaled_dot_product_attention(q, k, v, mask, scale=scale), tolerance)
        shared = k[:, :2], v[:, :2, :, :3]
        for rest in ((None, 0.0, True), (rows,)):
            y = export.attention_for_onnx(q, *shared, *rest, enable_gqa=True)
            check_close(y, F.scaled_dot_product_attention(q, *shared, *rest, enable_gqa=True), tolerance)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_export_onnx_attention_has_torchs_masks(self, kind, tmp_path):
        """In onnxruntime too, where a row may attend to nothing."""

        def attend(m: nn.ModuleDict, x: Tensor, mask: Tensor) -> Tensor:
            mask = mask[:, None, None, :]
            mask = torch.where(mask, 0.5, -math.inf) if kind == "float" else mask
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]

        model = ExportModule(attend)
        example = torch.randn(3, 4, 8), torch.rand(3, 4) < 0.5
        run = export.load_artefact(EXPORT_FORMATS["onnx"](model, example, tmp_path))
        for b, t in ((1, 1), (2, 7), (5, 3)):
            x, mask = torch.randn(b, t, 8), torch.arange(b)[:, None] > torch.arange(t)
            check_close(run(x, mask), model(x, mask), 1e-6, f"{b} x {t}")

    TORCHS = [  # what the formats make of torch's own modules
        ("attention", "onnx", "right"), ("attention", "program", "right"), ("encoder", "onnx", "right"),
        ("encoder", "trace", "right"), ("encoder nested", "program", "right"), ("lstm", "trace", "right"),
        ("bag", "onnx", "right"), ("bag", "program", "refused"), ("lstm", "program", "refused"),
        ("encoder nested", "trace", "refused"), ("encoder nested, all places", "program", "refused"),
    ]  # fmt: skip

    @pytest.mark.parametrize("module,name,verdict", TORCHS)
    def test_exports_of_torchs_modules_are_right_or_refused(self, module, name, verdict, tmp_path):
        model = export_torch_module(module)
        if verdict == "right":
            check_export(
                export.load_artefact(EXPORT_FORMATS[name](model, export_tokens(3, 9), tmp_path)), model
            )
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
        metadata = session.get_modelmeta().custom_metadata_map
        read = {name: json.loads(value) for name, value in metadata.items()}
        assert read == {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}
        onnx.checker.check_model(onnx.load(onnx_file), full_check=True)
        assert str(ROOT).encode() not in onnx_file.read_bytes()  # no paths of this machine

    def test_exports_take_shapes_and_several_inputs(self, tmp_path):
        """Lengths of their own, two or one; dynamic_shapes as torch.export takes them."""
        model = transformer_tiny(dtype=torch.float32, n_layers=1)
        example = torch.randint(3, 11, (3, 5)), torch.randint(3, 11, (3, 5))
        run = export.load_artefact(EXPORT_FORMATS["onnx"](model, example, tmp_path))
        for batch, source, target in ((1, 1, 1), (2, 7, 3), (4, 3, 9)):
            src, tgt = torch.randint(3, 11, (batch, source)), torch.randint(3, 11, (batch, target))
            src[0, source // 2 + 1 :] = 0
            check_close(run(src, tgt), model(src, tgt).detach(), 1e-5)
        model = ExportModule(lambda m, x, y: m.linear(x) * y[:, None], linear=nn.Linear(6, 4))
        batch = torch.export.Dim("n", min=2, max=9)
        x, y = torch.randn(3, 6), torch.randn(3)
        shapes = {"x": {0: batch}, "y": {0: batch}}
        for write, suffix in ((export.export_program, "pt2"), (export.export_onnx, "onnx")):
            run = export.load_artefact(write(model, [x, y], tmp_path / f"a.{suffix}", shapes))
            check_close(run(torch.ones(9, 6), torch.ones(9)), model(torch.ones(9, 6), torch.ones(9)), 1e-6)
        with pytest.raises(Exception, match="9"):
            export.load_artefact(tmp_path / "a.pt2")(torch.ones(10, 6), torch.ones(10))

    def test_free_sizes_are_the_batch_and_lengths(self):
        ids, auto = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 2, 2, dtype=torch.long)
        assert export.free_sizes((torch.tensor(1.0), ids)) == ({}, {0: "batch", 1: "length_1"})
        inputs = ids, ids[:, :4] > 0, torch.zeros(3), torch.zeros(7), torch.zeros(3, 6), auto
        assert export.free_sizes((*inputs, torch.zeros(3, 5, 6), torch.zeros(1, 5))) == (
            {0: "batch", 1: "length"}, {0: "batch", 1: "length_1"}, {0: "batch"}, {}, {0: "batch"},
            {0: "batch"}, {0: "batch", 1: "length_6"}, {},
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["trace", "onnx"])
    def test_exports_take_what_users_have(self, name, tmp_path):
        """Outputs of -inf, large ones, several; a row beside a batch, scalars, inputs with gradients."""
        several = ExportModule(lambda m, x, y: (x + y, x > 0), unused=nn.Linear(1, 1))
        x, row = torch.randn(4, 3), torch.tensor([[0.0, -math.inf, 0.0]])
        for inputs in ((x.clone().requires_grad_(), row), [x, torch.tensor(2.0)]):
            run = export.load_artefact(EXPORT_FORMATS[name](several, inputs, tmp_path))
            found = run(torch.ones(7, 3), inputs[1])
            assert torch.equal(found[0], 1 + inputs[1].expand(7, 3)) and found[1].all() and len(found) == 2
        large = nn.Linear(512, 300)
        torch.nn.init.normal_(large.weight, 0, 1e7)
        run = export.load_artefact(EXPORT_FORMATS[name](large, torch.randn(2, 512), tmp_path))
        x = torch.randn(5, 512)
        check_close(run(x), large(x).detach(), 1e-5)

    def test_exports_hold_what_they_promise_or_refuse(self, tmp_path):
        """A trace that has frozen a size isn't written."""
        ids = torch.ones(3, 5, dtype=torch.long)
        for function, example in (
            (lambda m, x: sum(x[:, i] for i in range(x.size(1))), ids),
            (lambda m, x: x.reshape(3, 2) if len(x) == 3 else x[:, :1] * 5, torch.ones(3, 2)),
        ):
            for name in ("trace", "program"):
                with pytest.raises(ValueError, match="ExportModule"):
                    EXPORT_FORMATS[name](ExportModule(function), example, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_trace_freezes_a_branch(self, tmp_path):
        x = torch.tensor([[3.0, -1.0]])
        assert export.Gate()(x).tolist() == [[6.0, -2.0]] and export.Gate()(-x).tolist() == [[3.0, -1.0]]
        found = {}
        for name in ("trace", "script"):
            found[name] = export.load_artefact(EXPORT_FORMATS[name](export.Gate(), x, tmp_path))(-x)
        assert torch.equal(found["trace"], -2 * x) and torch.equal(found["script"], x)
        for name in ("program", "onnx"):
            with pytest.raises(ValueError, match="torch.export can't capture Gate"):
                EXPORT_FORMATS[name](export.Gate(), torch.ones(2, 2), tmp_path)

    # ---- refusals

    @pytest.mark.parametrize("existing", [b"", b"an earlier artefact"])
    @pytest.mark.parametrize("name", EXPORT_FORMATS)
    def test_exports_refuse_by_name_and_write_nothing(self, name, existing, tmp_path):
        class Strange(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with open("/dev/null", "rb") as file:
                    return x * len(file.read(1)) if float(x.sum()) > 0 else "no tensor"

        class Random(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.rand(3)

        suffix = {"program": "program.pt2", "onnx": "model.onnx"}.get(name, f"{name}.ts")
        path = tmp_path / suffix
        for model in (Strange(), Random()):
            path.write_bytes(existing)
            with pytest.raises(ValueError, match=type(model).__name__) as raised:
                EXPORT_FORMATS[name](model, torch.zeros(2, 3), tmp_path)
            assert "\n" not in str(raised.value)
            assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == existing

    def test_exports_refuse_bad_arguments(self, tmp_path):
        linear, x = nn.Linear(3, 1), torch.zeros(2, 3)
        for write, words in (
            (lambda p: export.export_torchscript(linear, x, p, "compile"), "method.*trace.*script.*compile"),
            (lambda p: export.export_program(linear, (x, 3), p), "must be tensors.*'Tensor', 'int'"),
            (
                lambda p: export.export_program(linear, x[:, :2], p),
                "Linear refuses its example_inputs.*shapes",
            ),
            (lambda p: export.export_onnx(linear, x[:1], p), "can't capture Linear.*specialized"),
        ):
            with pytest.raises(ValueError, match=words):
                write(tmp_path / "m")
        with pytest.raises(TypeError, match="JSON"):
            export.export_onnx(linear, x, tmp_path / "m", metadata={"labels": {1, 2}})
        assert not list(tmp_path.iterdir())

    def test_places_that_cannot_be_written(self, onnx_file, tmp_path):
        (tmp_path / "file").write_text("")
        model, x = nn.Linear(3, 1), torch.zeros(2, 3)
        for write in (export.export_torchscript, export.export_program, export.export_onnx):
            with pytest.raises(OSError, match="file"):
                write(model, x, tmp_path / "file/m")
        with pytest.raises(ValueError, match="nowhere"):
            export.quantize_dynamic(tmp_path / "nowhere.onnx", tmp_path / "m")
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
    def test_load_artefact_refuses_what_is_damaged(self, suffix, tmp_path):
        for content in (b"", b"no model", b"PK\x03\x04 and no more"):
            (tmp_path / f"a{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=f"a{suffix} is damaged"):
                export.load_artefact(tmp_path / f"a{suffix}")
        with pytest.raises(FileNotFoundError):
            export.load_artefact(tmp_path / f"b{suffix}")
        with pytest.raises(ValueError, match="onnx, .pt2 or .ts, got model.pth"):
            export.load_artefact("model.pth")

    def test_load_artefact_changes_nothing_in_the_process(self, models, onnx_file, tmp_path):
        """From four threads at once, and an export in a fifth: modes stay, and so do stderr and logging."""
        model, example = models["encoder"], torch.randint(0, 50, (3, 20))
        paths = [EXPORT_FORMATS[name](model, example, tmp_path) for name in ("trace", "program")]
        root = logging.getLogger()

        def state() -> tuple:
            logs = root.manager.disable, root.level, root.handlers[:]
            return sys.stderr, sys.stdout, *logs, warnings.filters[:], torch.get_num_threads()

        before = state()
        model.train()
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
        """int8 matrices with a scale a column; attention and metadata untouched; 7 bits unless asked."""
        import onnx

        wide = {} if bits == 7 else {"reduce_range": False}
        path = export.quantize_dynamic(onnx_file, tmp_path / "m.onnx", **wide)
        kinds, weights = export_graph(path)
        matrices = {n: w for n, w in weights.items() if w.dtype == np.int8 and w.ndim == 2}
        linears = [m for m in models["encoder"].modules() if isinstance(m, nn.Linear)]
        assert sorted(w.shape for w in matrices.values()) == sorted(m.weight.T.shape for m in linears)
        unmatched = [m.weight.detach().T.numpy() for m in linears]
        for name, w in matrices.items():
            scale = weights[name.removesuffix("_quantized") + "_scale"]
            assert scale.shape == (w.shape[1],), name
            errors = [np.abs(w * scale - m).max() for m in unmatched if m.shape == w.shape]
            assert min(errors) <= 0.51 * scale.max(), name  # half a unit
            assert 2 * 255 * np.abs(w.astype(int)).max() <= 32767 or bits == 8, "saturates without VNNI"
        assert max(np.abs(w.astype(int)).max() for w in matrices.values()) > (2 ** (bits - 1)) - 3
        assert kinds["MatMul"] >= 4 and kinds["MatMulInteger"]  # attention stays
        kept = {x.key: x.value for x in onnx.load(path).metadata_props}
        assert json.loads(kept["note"]) == "gut, süß" and json.loads(kept["max_len"]) == 224
        check_export(export.load_artefact(path), models["encoder"], tolerance=0.05)

    def test_quantize_dynamic_shrinks_embeddings(self, tmp_path):
        model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 2))
        fp32 = export.export_onnx(model, torch.zeros(2, 3, dtype=torch.long), tmp_path / "m.onnx")
        tokens, table = torch.arange(5000).view(1, -1), 5000 * 64
        for embeddings, low, high in ((False, 4.0, 4.1), (True, 1.0, 1.1)):
            path = export.quantize_dynamic(fp32, tmp_path / "q.onnx", embeddings=embeddings)
            check_close(export.load_artefact(path)(tokens), model(tokens).detach(), 0.05)
            assert low * table < path.stat().st_size < high * table

    def test_quantize_static_learns_its_ranges(self, tmp_path):
        """The range of an activation is the calibration's: what lies beyond it is clipped."""
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
        fp32 = export.export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx", metadata={"labels": "ab"})
        calibration = ({"input": torch.rand(size, 4) * 2 - 1} for size in (2, 5, 1, 50))
        run = export.load_artefact(export.quantize_static(fp32, tmp_path / "s.onnx", calibration))
        inside, beyond = torch.rand(50, 4) * 1.6 - 0.8, torch.full((1, 4), 40.0)
        check_close(run(inside), model(inside).detach(), 0.05)
        assert (run(beyond) - model(beyond)).abs().max() > 1  # dynamic quantization would follow
        kinds, weights = export_graph(tmp_path / "s.onnx")
        assert kinds["QuantizeLinear"] and kinds["DequantizeLinear"] and not kinds["DynamicQuantizeLinear"]
        largest = [np.abs(w.astype(int)).max() for w in weights.values() if w.dtype == np.int8]
        assert largest and 2 * 255 * max(largest) <= 32767
        points = {w.dtype.name for n, w in weights.items() if n.endswith("zero_point") and w.size == 1}
        assert points == {"uint8"}  # activations
        run = export.load_artefact(export.quantize_dynamic(fp32, tmp_path / "d.onnx"))
        check_close(run(beyond), model(beyond).detach(), 0.05)
        wide = export.quantize_static(fp32, tmp_path / "w.onnx", [{"input": inside}], reduce_range=False)
        matrices = [w for w in export_graph(wide)[1].values() if w.dtype == np.int8]
        assert max(np.abs(w.astype(int)).max() for w in matrices) == 127

    def test_quantize_static_leaves_attention_alone(self, models, onnx_file, tmp_path):
        feeds = [{"tokens": export_tokens(*size)} for size in ((1, 1), (7, 5), (33, 64), (2, 224)) * 2]
        path = export.quantize_static(onnx_file, tmp_path / "s.onnx", feeds)
        check_export(export.load_artefact(path), models["encoder"], tolerance=0.15)
        linears = sum(isinstance(m, nn.Linear) for m in models["encoder"].modules())
        kinds, weights = export_graph(path)
        assert sum(w.dtype == np.int8 and w.ndim == 2 for w in weights.values()) == linears

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
        for cpu, has in (
            ({"avx2": True}, False), ({"avx2": True, "avx512_bf16": True}, True),
            ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
            ({"bf16": True}, True), ({"bf16": False}, False),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
            model = nn.Linear(2, 2)
            assert export.has_bf16() == has, cpu
            with contextlib.nullcontext() if has else pytest.raises(ValueError, match="no bf16"):
                assert export.to_bfloat16(model).weight.dtype == torch.bfloat16
            assert model.weight.dtype == torch.float32

    # ---- pruning

    def test_prune_unstructured_zeroes_the_smallest(self):
        model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        with torch.no_grad():
            model[3].weight.mul_(10)  # ranked over all layers, so these survive
        model[1].requires_grad_(False)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        old = torch.cat([model[i].weight.flatten() for i in (1, 3)])
        for amount in (0, 0.25, 0.5, 1):
            pruned = export.prune_unstructured(model, amount)
            weights = torch.cat([pruned[i].weight.flatten() for i in (1, 3)])
            assert (weights == 0).sum() == round(amount * 300), amount
            kept = weights != 0
            assert torch.equal(weights[kept], old[kept])
            assert not 0 < amount < 1 or old[~kept].abs().max() <= old[kept].abs().min()
            assert pruned.state_dict().keys() == before.keys()  # no mask left beside
            assert torch.equal(pruned[0].weight, model[0].weight)
            assert not pruned[1].weight.requires_grad and pruned[3].weight.requires_grad
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            assert not export.prune_unstructured(nn.Sequential(convolution(1, 2, 3)), 1)[0].weight.any()
        for amount in (-0.1, 1.5, 7):
            with pytest.raises(ValueError, match=f"amount must be in 0 .. 1, got {amount}"):
                export.prune_unstructured(model, amount)
        with pytest.raises(ValueError, match="GELU has no Linear or Conv"):
            export.prune_unstructured(nn.GELU(), 0.5)

    @pytest.mark.parametrize("which", ["encoder", "own"])
    @pytest.mark.parametrize(
        "part,keep", [("head", 1), ("head", 2), ("head", 3), ("neuron", 1), ("neuron", 7)]
    )
    def test_pruned_models_equal_masked_ones(self, models, which, part, keep):
        model, place = models[which].eval(), self.PLACES[which]
        module, reader, width, n = (
            ("self_attention", "out_proj", 8, 3) if part == "head" else ("ffn", "2", 1, 32)
        )
        scores = {f"{place}.{i}.{module}": torch.rand(n) for i in range(2)}
        prune = export.prune_heads if part == "head" else export.prune_neurons
        smaller = prune(model, scores, keep)
        gates = {}
        for name, score in scores.items():
            gate = torch.zeros(n)
            gate[score.argsort()[-keep:]] = 1
            gates[f"{name}.{reader}"] = gate.repeat_interleave(width)
        tokens = export_tokens(5, 40)
        masked = export_gated(model, gates)(tokens)
        check_close(smaller(tokens), masked, 1e-6)
        assert keep == n or (masked - model(tokens)).abs().max() > 1e-4  # the masks do something
        for name in scores:
            linear = smaller.get_submodule(f"{name}.{reader}")
            assert linear.weight.shape == (24, width * keep) == (linear.out_features, linear.in_features)
            first = smaller.get_submodule(f"{name}.{'qkv_proj' if part == 'head' else '0'}")
            rows = 3 * 8 * keep if part == "head" else keep
            assert (first.out_features, first.in_features) == first.weight.shape == (rows, 24)
            assert model.get_submodule(f"{name}.{reader}").weight.shape == (24, width * n)  # left whole
        again = export.load_pruned(model, smaller.state_dict())
        assert torch.equal(again(tokens), smaller(tokens)) and not again.training
        assert torch.equal(export.load_pruned(smaller, smaller.state_dict())(tokens), smaller(tokens))

    @pytest.mark.parametrize("which", ["encoder", "own"])
    def test_importance_is_the_derivative_by_a_gate(self, models, which):
        """Michel's definition: a gate of 1 on each head and example; |dloss/dgate|, mean over examples."""
        model, place = models[which].train(), self.PLACES[which]
        batches = [((export_tokens(b, t),), torch.randint(0, 2, (b,))) for b, t in ((4, 9), (3, 6))]
        heads = export.head_importance(model, iter(batches))
        neurons = export.neuron_importance(model, [(tokens, labels) for (tokens,), labels in batches])
        assert all(module.training and not module._forward_pre_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        model.eval()
        for found, width, part in ((heads, 8, "self_attention.out_proj"), (neurons, 1, "ffn.2")):
            assert [name.split(".")[-1] for name in found] == [part.split(".")[0]] * 2
            for layer, scores in enumerate(found.values()):
                expected = torch.zeros_like(scores)
                for (tokens,), labels in batches:
                    for row, label in zip(tokens, labels, strict=True):  # one by one
                        gate = torch.ones(len(scores), requires_grad=True)
                        spread = {f"{place}.{layer}.{part}": gate.repeat_interleave(width)}
                        loss = F.cross_entropy(export_gated(model, spread)(row[None]), label[None])
                        expected += torch.autograd.grad(loss, gate)[0].abs() / 7
                check_close(scores, expected, 1e-6)
                assert scores.max() > 0
        squared = export.head_importance(model, batches, lambda y, t: (y**2).sum())
        assert not torch.allclose(squared[f"{place}.0.self_attention"], heads[f"{place}.0.self_attention"])

    @torch.no_grad()
    @pytest.mark.parametrize("frozen", [False, True])
    def test_importance_of_a_net_that_is_called_twice(self, frozen):
        """Both calls count (ALBERT); frozen weights, and a caller's no_grad, change nothing."""

        def net() -> nn.Sequential:
            return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 6))

        def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
            return m.head(m.net(x + m.net(x)))

        model = ExportModule(forward, net=net(), unused=net(), head=nn.Linear(6, 2)).requires_grad_(
            not frozen
        )
        batches = [(torch.randn(5, 6), torch.randint(2, (5,))) for _ in range(2)]
        found = export.neuron_importance(model, batches)
        expected = torch.zeros(8)
        for x, y in ((x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(5)):
            gate = torch.ones(8, requires_grad=True)
            with torch.enable_grad():
                loss = F.cross_entropy(export_gated(model.eval(), {"parts.net.3": gate})(x), y)
            expected += torch.autograd.grad(loss, gate)[0].abs() / 10
        check_close(found["parts.net"], expected, 1e-6)
        assert not found["parts.unused"].any()
        pruned = export.prune_neurons(model, found, keep=3)
        assert pruned.parts.net[0].out_features == 3 and pruned(torch.randn(2, 6)).shape == (2, 2)
        assert all(p.requires_grad == (not frozen) for p in pruned.parameters())  # frozen stays frozen

    def test_pruned_attention_keeps_what_is_frozen(self):
        attention = export.SelfAttention(
            nn.Linear(12, 36, bias=False), nn.Linear(12, 12).requires_grad_(False), 3
        )
        smaller = export.prune_heads(nn.Sequential(attention), {"0": torch.rand(3)}, 2)
        assert [p.requires_grad for p in smaller.parameters()] == [True, False, False]
        assert smaller[0].training and smaller[0].qkv_proj.bias is None

    def test_pruning_refuses_what_it_does_not_know(self, models):
        model = models["own"]
        heads = {f"layers.{i}.self_attention": torch.ones(3) for i in range(2)}
        neurons = {f"layers.{i}.ffn": torch.ones(32) for i in range(2)}
        for prune, scores, n in ((export.prune_heads, heads, 3), (export.prune_neurons, neurons, 32)):
            for keep in (0, n + 1, -1):
                with pytest.raises(ValueError, match=rf"layers.0.*1 .. {n}.*{keep}"):
                    prune(model, scores, keep)
            for wrong in ({}, {name: torch.ones(5) for name in scores}):
                with pytest.raises(ValueError, match=f"of {n} scores, got 2, [05]$"):
                    prune(model, wrong, 2)
        state = model.state_dict()
        wide = state | {"layers.1.ffn.0.weight": torch.ones(99, 24)}
        less = {name: p for name, p in state.items() if "out_proj" not in name}
        for wrong in (wide, less, {}):
            with pytest.raises(ValueError, match="no state dict of a pruned Classifier"):
                export.load_pruned(model, wrong)
        for change in ("scaled", "mask ignored", "tuple"):
            with pytest.raises(ValueError, match="ExportAttention is not plain softmax attention"):
                export.prune_heads(nn.Sequential(ExportAttention(change)), {"0": torch.ones(2)}, 1)
        export.prune_heads(nn.Sequential(ExportAttention("")), {"0": torch.ones(2)}, 1)
        shared = ExportAttention("")
        with pytest.raises(ValueError, match="stands in two places"):
            export.prune_heads(nn.Sequential(shared, shared), {"0": torch.ones(2)}, 1)
        for importance, other in (
            (export.head_importance, nn.Linear(3, 3)),
            (export.neuron_importance, nn.GELU()),
        ):
            with pytest.raises(ValueError, match=type(other).__name__):
                importance(other, [])
        with pytest.raises(ValueError, match="batches must hold at least one"):
            export.head_importance(model, [])

    def test_feed_forwards_are_linear_elementwise_linear(self):
        """A Softmax mixes neurons, a Dropout alone has none: only known functions may stand between."""
        first, last = nn.Linear(4, 6), nn.Linear(6, 4)
        for net, found in (
            ([first, nn.ReLU(), last], 1), ([first, nn.GELU(), nn.Dropout(), last], 1),
            ([first, nn.Softmax(-1), last], 0), ([first, nn.ReLU(), nn.Dropout()], 0),
            ([nn.Dropout(), nn.ReLU(), last], 0), ([first, nn.Unflatten(1, (2, 3)), nn.Flatten(1), last], 0),
            ([first, nn.LayerNorm(6), last], 0), ([first, last], 0),
        ):  # fmt: skip
            assert len(export.feed_forwards(nn.Sequential(*net))) == found, net
        net = nn.Sequential(first, nn.ReLU(), last)
        smaller = export.prune_neurons(net, {"": torch.arange(6.0)}, 2)
        x = torch.randn(5, 4)
        assert torch.equal(export.load_pruned(net, smaller.state_dict())(x), smaller(x))

    # ---- the evidence

    def test_benchmark_alternates_and_counts(self, monkeypatch):
        """A clock that the models advance; the first call of a turn, which takes longer, isn't counted."""
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
        results = export.benchmark(
            runners, {"mix": [(torch.zeros(1, 4),), (torch.zeros(3, 4),)]}, seconds=0.0
        )
        assert len(calls) == 3 * 3 * 6  # one round of warm-up, five that count
        rounds = [tuple(calls[i : i + 9 : 3]) for i in range(0, 54, 9)]
        assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
        assert results["a"]["mix"] == {"p50_ms": 2.0, "p90_ms": 3.0, "throughput": 1000.0}
        assert results["b"]["mix"]["throughput"] == 250.0 and results["c"]["mix"]["p50_ms"] == 4.0
        calls.clear()
        export.benchmark(runners, {"x": [(torch.zeros(1, 4),)]}, seconds=1000.0)
        assert len(calls) > 300  # as long as it may

    def test_export_all_recommends_by_agreement_and_says_what_is_refused(self, tmp_path):
        """The fastest that agrees, whatever the labels are; a model with an `if` has no .pt2 and no ONNX."""
        x = torch.randn(64, 64)
        slow = nn.Sequential(nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 2), nn.Dropout(0.5))
        slow[2].bias.data[0] = 5.0  # its answer is mostly 0
        fast = nn.Sequential(export.Gate(), nn.Linear(64, 2))
        with torch.no_grad():
            fast[1].weight.zero_()
            fast[1].bias.copy_(torch.tensor([0.0, 1.0]))  # its answer is always 1
        labels = torch.ones(64, dtype=torch.long)  # which would make it the most accurate
        cases = {"first": [(x,)], "other": [(x[:1],)]}
        models = {"it": slow, "fast": fast}
        report = export.export_all(models, x, [((x,), labels)], cases, [], tmp_path / "a/b", seconds=0.01)
        rows = {row["name"]: row for row in report["models"]}
        assert {"fast, torch.export", "fast, ONNX int8, dynamic"} <= set(report["refused"])
        assert "capture Sequential" in report["refused"]["fast, ONNX"]
        assert "ONNX int8, static" in report["refused"]  # without calibration
        assert {"eager", "TorchScript, trace", "TorchScript, script", "ONNX", "ONNX int8, dynamic"} <= set(
            rows
        )
        assert rows["fast, TorchScript, trace"]["accuracy"] == 1 > rows["eager"]["accuracy"]
        for row in rows.values():
            assert row["size_bytes"] == (tmp_path / "a/b" / row["file"]).stat().st_size
            assert (row["batch"], row["seq_len"]) == (64, 64) and set(row["latency"]) == set(cases)
            assert (
                row["p50_ms"] == row["latency"]["first"]["p50_ms"] <= row["p90_ms"] and row["throughput"] > 0
            )
        agreeing = [row for row in rows.values() if row["agreement"] >= 0.99]
        assert report["recommended"] == min(agreeing, key=lambda row: row["p50_ms"])["name"]
        assert rows["fast, TorchScript, trace"] not in agreeing and rows["ONNX"] in agreeing
        assert slow.training and report["case"] == "first" and report["threads"] == torch.get_num_threads()

    # ---- the demo

    @pytest.fixture(scope="class")
    def demo(self, tmp_path_factory):
        """A run of the demo in an empty folder, without a compiler and without a network."""
        folder = tmp_path_factory.mktemp("export")
        without = {
            "PATH": str(folder),
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        }
        result = run_script(
            "export.py", "--seconds", "0.002", "--out", "run", cwd=folder, timeout=600, **without
        )
        return folder / "run", result

    def test_demo_reports_all_formats(self, demo):
        out, result = demo
        summary, report = last_json(result), json_of(out / "report.json")
        assert result.stderr == "" and len(result.stdout.splitlines()[-1]) < 300
        assert summary["recommended"] == report["recommended"] and summary["report"] == "run/report.json"
        rows = {row["name"]: row for row in report["models"]}
        formats = {"TorchScript, trace", "TorchScript, script", "torch.export", "torch.export, bf16", "ONNX"}
        formats |= {f"ONNX int8, {kind}" for kind in ("dynamic", "dynamic, embeddings", "static")}
        expected = formats | {f"pruned, {name}" for name in formats} | {"eager"}
        assert set(rows) | set(report["refused"]) == expected
        assert set(report["refused"]) == {n for n in expected if "bf16" in n and not export.has_bf16()}
        for name, row in rows.items():
            assert row["size_bytes"] == (out / row["file"]).stat().st_size
            assert (row["batch"], row["seq_len"]) == (32, 256) and row["accuracy"] > 0.9
            if "pruned" not in name:
                exact = "int8" not in name and "bf16" not in name
                assert (
                    row["max_abs_diff"] <= (1e-4 if exact else 1) and row["agreement"] >= 0.99 + 0.01 * exact
                )
                assert row["accuracy"] >= rows["eager"]["accuracy"] - 0.003
        assert rows["pruned, ONNX"]["size_bytes"] < 0.6 * rows["ONNX"]["size_bytes"]
        assert rows["ONNX int8, dynamic"]["size_bytes"] < 0.5 * rows["ONNX"]["size_bytes"]
        assert report["test_accuracy"] == summary["test_accuracy"] > 0.9
        assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
        assert not [p.name for p in out.iterdir() if p.name.endswith((".part", ".data"))]
        for key in ("cpu", "threads", "torch", "seconds", "settings"):
            assert report[key], key
        assert report["control_flow"] == {
            "TorchScript, trace": "wrong, silently", "TorchScript, script": "right",
            "torch.export": "refused",
        }  # fmt: skip
        whole, most = report["zeros"]["0% zeros"], report["zeros"]["90% zeros"]
        assert whole["accuracy"] == rows["eager"]["accuracy"] > most["accuracy"]

    # Reads nothing but the artefacts: -I leaves neither the project nor PYTHONPATH on the path.
    FRESH = """
import json, sys
import numpy as np, onnxruntime, torch
folder, sentences = sys.argv[1], sys.argv[2:]
session = onnxruntime.InferenceSession(f"{folder}/original.int8.onnx", providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
words, labels = json.loads(metadata["words"]), json.loads(metadata["labels"])
ids = [[words.index(word) for word in sentence.split()] for sentence in sentences]
length = max(map(len, ids))
tokens = np.array([row + [0] * (length - len(row)) for row in ids] + [[0] * length])
answers = {}
for name in ("original", "original.int8", "original.e8", "original.static", "pruned.int8"):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
    answers[name] = session.run(None, {"tokens": tokens})[0]
tokens = torch.from_numpy(tokens)
with torch.no_grad():
    answers["trace"] = torch.jit.load(f"{folder}/original.trace.ts")(tokens).numpy()
    answers["script"] = torch.jit.load(f"{folder}/original.script.ts")(tokens).numpy()
    answers["program"] = torch.export.load(f"{folder}/original.pt2").module()(tokens).numpy()
print(json.dumps({name: [y.tolist(), [labels[i] for i in y.argmax(1)]] for name, y in answers.items()}))
"""

    def test_demo_artefacts_answer_in_a_fresh_process(self, demo, tmp_path):
        """With the words from the metadata; a row of padding alone is finite and the same in all formats."""
        sentences = {
            "the plot was superb": "positive", "the plot was not superb": "negative",
            "the script was dull but the music was not awful": "positive",
            "the music was gripping but the cast was lifeless": "negative",
        }  # fmt: skip
        command = [sys.executable, "-I", "-W", "ignore", "-c", self.FRESH, str(demo[0]), *sentences]
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
        """A run on 200 rows of one's own, as a user starts it, with all that it does by default."""
        folder = tmp_path_factory.mktemp("own")
        cls.table(folder / "my.csv", cls.own_rows(200))
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
        assert second["total_seconds"] > other["run"]["total_seconds"] > 0

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
# README's quiz: where a number is asked, it is computed here


class DrawnModel(nn.Module):
    """After each beginning another distribution of the next token, drawn at random."""

    def __init__(self):
        super().__init__()
        self.config, self.logits = transformer.TransformerConfig(16, max_len=8), torch.randn(9973, 16)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(src), 1, 1), torch.ones(len(src), 1, 1, 1, dtype=torch.bool)

    def decode(self, tgt: Tensor, memory: Tensor, memory_mask: Tensor, cache: dict) -> Tensor:
        past = [layer[0] for layer in cache.get("layers", [])]
        beginning = torch.cat((*past, tgt), dim=1)  # (B, T)
        cache["layers"] = [(beginning, beginning)]
        numbers = (beginning * 16 ** torch.arange(beginning.shape[1])).sum(1) % len(self.logits)
        return self.logits[numbers][:, None]  # (B, 1, V)


class TestQuiz:
    def test_quiz_scores_spread_with_the_root_of_the_width(self):
        q, k = torch.randn(2, 100_000, 64, dtype=torch.float64)
        scores = (q * k).sum(-1)
        assert scores.std().item() == pytest.approx(8, rel=0.02)
        many = scores[:1000].view(10, 100)
        slope = [(w * (1 - w)).mean() for w in (many.softmax(-1), (many / 8).softmax(-1))]
        assert slope[0] < slope[1] / 2  # nearly one-hot: nearly no gradient

    def test_quiz_a_row_without_keys(self):
        hidden = torch.zeros(4, dtype=torch.bool)
        scores = torch.randn(4)
        assert torch.equal(scores.masked_fill(~hidden, -1e9).softmax(-1), torch.full((4,), 0.25))
        assert scores.masked_fill(~hidden, -math.inf).softmax(-1).isnan().all()
        weights = attention.scaled_dot_product_attention(*torch.randn(3, 4, 8), mask=hidden)[1]
        assert (weights == 0).all()

    def test_quiz_masks_are_the_other_way_round(self):
        hidden = torch.rand(5, 5) < 0.5
        hidden.fill_diagonal_(False)  # no row without a key, either way
        hidden[torch.arange(5), torch.arange(5).roll(1)] = True
        x = torch.randn(1, 5, 8)
        weights = nn.MultiheadAttention(8, 1, batch_first=True)(x, x, x, attn_mask=hidden)[1]
        assert (weights[0][hidden] == 0).all() and (weights[0][~hidden] > 0).all()
        output, weights = attention.scaled_dot_product_attention(x, x, x, hidden)
        assert (weights[0][hidden] > 0).all() and (weights[0][~hidden] == 0).all()
        check_close(F.scaled_dot_product_attention(x, x, x, hidden), output, 1e-5)

    def test_quiz_torch_triangle_is_top_left(self):
        q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
        check_close(F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., 0, :], v[..., 0, :], 1e-6)
        weights = attention.scaled_dot_product_attention(q, k, v, causal=True)[1]
        assert (weights > 0).all() and attention.causal_mask(1, 6).all()

    def test_quiz_sizes(self):
        def size(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        q = torch.empty(8, 8192, 64, device="meta")
        assert attention.scaled_dot_product_attention(q, q, q)[1].nbytes == 2 * 2**30
        assert (
            size(attention.MultiHeadAttention(512, 8))
            == size(attention.MultiHeadAttention(512, 16))
            == 1_050_624
        )
        layer = encoder.EncoderLayer(encoder.EncoderConfig(vocab_size=1, d_model=128, d_ff=512))
        assert size(layer) == 198_272 and size(layer.self_attention) == 66_048 and size(layer.ffn) == 131_712
        with torch.device("meta"):
            assert size(transformer.Transformer(transformer.TransformerConfig())) == 63_082_496
            assert size(transformer.Transformer(transformer.TransformerConfig(tied=False))) == 100_970_496
        weight = nn.Parameter(torch.ones(1000))
        optimizer = torch.optim.AdamW([weight])
        weight.sum().backward()
        optimizer.step()
        moments = [v for v in optimizer.state[weight].values() if v.numel() > 1]
        assert sum(t.nbytes for t in (weight, weight.grad, *moments)) == 16 * 1000

    def test_quiz_attention_sees_a_set(self):
        q, k, v = torch.randn(3, 5, 8, dtype=torch.float64)
        order = torch.tensor([3, 1, 4, 0, 2])
        plain = attention.scaled_dot_product_attention(q, k, v)[0]
        check_close(attention.scaled_dot_product_attention(q, k[order], v[order])[0], plain, 1e-12)
        check_close(attention.scaled_dot_product_attention(q[order], k, v)[0], plain[order], 1e-12)

    def test_quiz_wavelengths(self):
        longest = 2 * math.pi * 10_000 ** (126 / 128)
        assert round(longest) == 54_410
        encoding = encoder.sinusoidal_positional_encoding(54_411, 128).double()
        check_close(encoding[54_410, -2:], encoding[0, -2:], 1e-3)
        assert (encoding[300:54_000, -1] < 1).all(), "no earlier return"
        check_close(encoding[:100, 0], (torch.arange(100.0).double()).sin(), 1e-6)

    def test_quiz_noam_peak(self):
        rates = [transformer.noam_lr(step, 512, 4000) for step in range(1, 8000)]
        assert rates.index(max(rates)) + 1 == 4000 and round(max(rates), 6) == 0.000699

    def test_quiz_smoothing_floor(self):
        target = torch.tensor([0.925, 0.025, 0.025, 0.025], dtype=torch.float64)
        floor = losses.label_smoothing_cross_entropy(target.log()[None], torch.tensor([0]), 0.1).item()
        assert round(floor, 3) == 0.349
        for _ in range(100):
            z = torch.randn(1, 4, dtype=torch.float64) * 5
            assert losses.label_smoothing_cross_entropy(z, torch.tensor([0]), 0.1).item() >= floor

    def test_quiz_length_penalty(self):
        def score(log_probability: float, n: int) -> float:
            return log_probability / ((5 + n) / 6) ** 0.6

        assert round(score(-4.0, 5), 2) == -2.94 and round(score(-4.6, 8), 2) == -2.89

    def test_quiz_a_wider_beam_may_find_less(self):
        gains, _ = [], torch.manual_seed(0)
        for _ in range(150):
            model = DrawnModel()
            narrow, wide = (
                transformer.beam_search(model, torch.ones(1, 1), 6, beam, 0.0)[1] for beam in (2, 3)
            )
            gains.append((wide - narrow).item())
        assert min(gains) < -1 and statistics.fmean(gains) > 0.5

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
        logits, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 0])
        gradients = []
        for alpha in (None, torch.full((3,), 0.25).double()):
            z = logits.clone().requires_grad_()
            losses.focal_loss(z, targets, alpha=alpha, reduction="sum").backward()
            gradients.append(z.grad)
        check_close(gradients[1], 0.25 * gradients[0], 1e-12)
        weights = [nn.Parameter(logits.clone()) for _ in gradients]
        for weight, weight.grad in zip(weights, gradients, strict=True):
            torch.optim.Adam([weight], eps=0.0).step()
        check_close(weights[0].detach(), weights[1].detach(), 1e-12)

    def test_quiz_collapsed_nt_xent(self):
        z = torch.ones(256, 16, dtype=torch.float64)
        loss = losses.nt_xent_loss(z, z.clone()).item()
        assert loss == pytest.approx(math.log(511)) and round(loss, 2) == 6.24

    def test_quiz_mean_of_means(self):
        tokens = torch.cat((torch.full((12,), 1.0), torch.full((4,), 3.0)))
        assert tokens.mean() == 1.5 and (tokens[:12].mean() + tokens[12:].mean()) / 2 == 2.0
        shares = [train_ddp.share_of_mean(part.sum(), 16, world=2) for part in (tokens[:12], tokens[12:])]
        assert sum(shares) / 2 == 1.5  # what DDP's average makes of them

    def test_quiz_int8(self):
        assert 2 * 255 * 127 == 64_770 > torch.iinfo(torch.int16).max > 2 * 255 * 63 == 32_130
        assert round(100 / 127, 2) == 0.79 and round(1 / 127, 4) == 0.0079
        rows = torch.stack((torch.linspace(-1, 1, 101), torch.linspace(-100, 100, 101)))  # (2, 101)
        for scales, expected in (
            (rows.abs().max() / 127, 0.39),
            (rows.abs().amax(1, keepdim=True) / 127, 0.004),
        ):
            assert ((rows / scales).round() * scales - rows)[0].abs().max() == pytest.approx(
                expected, rel=0.1
            )


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

    def test_attention_is_the_same_in_transformer(self):
        """Without a key to see, too: values, weights, gradients."""
        long = attention.MultiHeadAttention(12, 3).double()
        short = transformer.MultiHeadAttention(12, 3).double()
        short.load_state_dict(long.state_dict())
        x, context = (torch.randn(2, t, 12, dtype=torch.float64, requires_grad=True) for t in (4, 6))
        lengths = attention.padding_mask(torch.tensor([6, 0]))
        for mask in (torch.rand(2, 1, 4, 6) < 0.6, lengths, torch.tensor(True)):
            expected, weights = long.forward_with_weights(x, context, mask)
            k, v = short.keys_values(context)
            short_weights = transformer.attention(short.split_heads(short.q_proj(x)), k, v, mask)[1]
            output = short(x, k, v, mask)
            check_close(output, expected, 1e-12)
            check_close(short_weights, weights, 1e-12)
            gradients = [torch.autograd.grad(y.sin().sum(), [x, context]) for y in (output, expected)]
            for one, other in zip(*gradients, strict=True):
                check_close(one, other, 1e-12)

    def test_smoothed_loss_is_the_same_in_transformer(self):
        logits, targets = torch.randn(3, 5, 9, dtype=torch.float64), torch.randint(1, 9, (3, 5))
        targets[1, 2:] = 0  # padding
        for smoothing in (0.0, 0.1, 0.4):
            flat = logits.flatten(0, 1), targets.flatten()
            long = losses.label_smoothing_cross_entropy(*flat, smoothing, ignore_index=0)
            check_close(transformer.label_smoothed_loss(logits, targets, 0, smoothing), long, 1e-12)

    @pytest.mark.parametrize("module", having("warmup_cosine"), ids=name_of)
    def test_warmup_cosine(self, module):
        factors = [module.warmup_cosine(step, 3, 7) for step in range(9)]
        falling = [0.5 + 0.5 * math.cos(math.pi * part / 4) for part in range(4)]
        assert factors == pytest.approx([1 / 3, 2 / 3, 1, *falling, 0, 0][:9], abs=1e-12)
        assert [module.warmup_cosine(step, 10, 2) for step in range(4)] == [0.5, 1, 0, 0]  # cut to the run
        assert module.warmup_cosine(0, 0, 1) == 1 and module.warmup_cosine(10, 10, 10) == 0

    @pytest.mark.parametrize("module", having("write_atomically"), ids=name_of)
    def test_write_atomically(self, module, tmp_path, monkeypatch):
        """Flushed to the disk before it is moved over the old file; a full disk leaves the old one alone."""
        path, done = tmp_path / "file", []
        fsync, move = os.fsync, os.replace
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: done.append(path.read_bytes()) or fsync(fd))
            patch.setattr(os, "replace", lambda a, b: done.append(Path(a).read_bytes()) or move(a, b))
            module.write_atomically(path, b"new")
        assert done == [b"old", b"new"] and path.read_bytes() == b"new"
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
        """On the device "meta": a tensor made on the CPU beside one there is an error, as on a GPU."""
        meta = torch.device("meta")
        q, x, context = (torch.empty(size, device=meta) for size in ((2, 3, 5, 8), (2, 5, 16), (2, 7, 16)))
        ids = torch.ones(2, 5, dtype=torch.long, device=meta)
        fold = torch.zeros(2, dtype=torch.long, device=meta)
        mask = attention.causal_mask(5, device=meta)
        many = attention.MultiHeadAttention(16, 2).to(meta)
        outputs = [
            attention.scaled_dot_product_attention(q, q, q, causal=True)[0],
            attention.fused_attention(q, q, q, mask, causal=True),
            many(x, context, causal=True),
            many.forward_with_weights(x, causal=True)[1],
        ]
        small = {"max_len": 8, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
        for pool in ("mean", "max", "mean+max", "first"):
            config = encoder.EncoderConfig(30, pool=pool, **small)
            outputs.append(encoder.EncoderClassifier(config).to(meta)(ids))
        outputs.append(transformer.Transformer(transformer.TransformerConfig(30, **small)).to(meta)(ids, ids))
        outputs.append(imdb.make_model(imdb.Settings(**small), 300).to(meta)(ids, fold))
        outputs += [script.GPT(16, 2, 1, 8).to(meta)(ids) for script in (train_ddp, train_fsdp)]
        assert all(output.device == meta for output in outputs) and len(outputs) == 12

    @pytest.mark.parametrize("module", ALL_FILES, ids=name_of)
    def test_help_lists_every_setting(self, module, tmp_path):
        """With the reason beside it; on a terminal that knows ASCII alone, too."""
        result = run_script(
            f"{module.__name__}.py", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="100"
        )
        assert result.returncode == 0, result.stderr
        for field in dataclasses.fields(module.Settings):
            assert f"--{field.name.replace('_', '-')}" in result.stdout, field.name
        comments = re.findall(r"^    \w+: .*  # (\w+)", inspect.getsource(module.Settings), re.M)
        assert len(comments) == len(dataclasses.fields(module.Settings)), "a setting without its reason"
        assert all(comment in result.stdout for comment in comments)
        assert f"python {module.__name__}.py" in result.stdout and not list(tmp_path.iterdir())

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

    Of the same entry in a list of runs: mean and standard deviation. Of the rows of an export table: how many
    times as fast each is as the first one.
    """
    if isinstance(log, dict):
        found = set().union(*map(numbers_in, log.values())) if log else set()
        times = [row.get("latency", {}) for row in log.get("models", []) if isinstance(row, dict)]
        for case in times[0] if times else ():
            found |= {times[0][case]["p50_ms"] / row[case]["p50_ms"] for row in times}
        return found
    if isinstance(log, list):
        found = set().union(*map(numbers_in, log)) if log else set()
        if log and all(type(x) in (int, float) for x in log):
            found.add(abs(statistics.mean(log)))
        if len(log) > 1 and all(isinstance(run, dict) for run in log):
            for name in set.intersection(*(set(run) for run in log)):
                values = [run[name] for run in log if type(run[name]) in (int, float)]
                if len(values) == len(log):
                    found |= {statistics.mean(values), statistics.stdev(values)}
        return found
    return {abs(float(log))} if type(log) in (int, float) else set()


class TestReadme:
    def test_every_number_of_a_table_is_logged(self):
        """In a section that links logs, each cell behind the first, at the precision given there.

        As it is, in percent, thousands, millions, MiB or minutes.
        """
        checked = 0
        for title, part in readme_parts().items():
            links = set(re.findall(r"\]\((assets/\w+\.json)\)", part))
            logged = set().union(*(numbers_in(json_of(ROOT / link)) for link in links))
            rows = [line for line in part.splitlines() if line.startswith("|")]
            for row in rows if links else ():
                cells = re.sub(r"`[^`]*`|\([^)]*\)|\]\(.*?\)", " ", row).split("|")[2:]
                for text in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?", " ".join(cells)):
                    digits = text.replace(",", "").rstrip(",")
                    decimals = len(digits.partition(".")[2])
                    if len(digits) < 3:
                        continue  # a batch of 32, five seeds
                    scales = (1, 100, 1e-3, 1e-6, 2**-20, 1 / 60)
                    error = 0.5001 * 10**-decimals
                    assert any(abs(x * k - float(digits)) <= error for x in logged for k in scales), (
                        title, row, text,
                    )  # fmt: skip
                    checked += 1
        assert checked >= 60

    def test_headlines_are_the_logged_ones(self):
        top, log = readme_parts()["top"], json_of(ROOT / "assets/imdb.json")
        for preset in ("fast", "best"):
            values = [100 * run["test_accuracy"] for run in log[preset]]
            assert len({run["seed"] for run in log[preset]}) >= 3
            assert f"{statistics.mean(values):.2f}" in top
        assert f"{json_of(ROOT / 'assets/multi30k.json')['beam']:.1f}" in top

    def test_attention_adds_little_on_imdb(self):
        """README and the quiz say so; a model that changes it must change them."""
        log = json_of(ROOT / "assets/imdb.json")
        without, whole = log["without_attention"][0], log["fast_20261130"][0]  # one CPU
        assert without["seed"] == whole["seed"]
        assert 0 < whole["test_accuracy"] - without["test_accuracy"] < 0.01 < without["test_accuracy"] - 0.88

    def test_first_commands_are_the_ones_that_ci_runs(self):
        commands = re.findall(r"^(python3 -m venv .*)$", "\n".join(readme_parts().values()), re.M)
        ends = [command.split("/")[-1].split()[-1] for command in commands]
        assert "classify_imdb.py" in ends and ends.count("test_all.py") == 1

    def test_commands_parse(self, tmp_path, monkeypatch):
        """Every `python FILE ...` and `torchrun ... FILE ...` of README and of the files' docstrings."""
        import shlex

        import tyro
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
            if words[1] in ("test_all.py", "FILE"):
                continue
            assert (ROOT / words[1]).exists(), line
            module = sys.modules[words[1].removesuffix(".py")]
            if hasattr(module, "parse"):  # presets come first
                module.parse(words[2:])
            else:
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
# Planted bugs: python test_all.py --mutants [FILE]. Each is one replacement in a copy of a file: what a tired
# person might write. The tests named must fail on it, and pass on the file as it is.

MUTANTS = {  # file -> (what stands there, what would stand there, tests for pytest -k)
    "attention.py": [
        (".tril(k_len - q_len)", ".tril()", "causal_mask or cache_equals"),
        (".tril(k_len - q_len)", ".tril(k_len - q_len - 1)", "causal_mask"),
        ("device=lengths.device) < lengths", "device=lengths.device) <= lengths", "padding_mask"),
        ("scores = (q * q.size(-1) ** -0.5)", "scores = q", "all_ways_agree"),
        (".softmax(dim=-1).masked_fill(hidden, 0.0)", ".softmax(dim=-1)", "nothing_to_attend_to"),
        ("masked_fill(hidden, lowest)", "masked_fill(hidden, -math.inf)", "nothing_to_attend_to"),
        ("dropout_p) @ v, weights", "dropout_p) @ v, F.dropout(weights)", "all_ways_agree"),
        ("alpha = (m[..., i, :] - m_new).exp()", "alpha = 1.0", "all_ways_agree"),
        ("ds = p * (dp - delta[..., i, :])", "ds = p * dp", "all_ways_agree"),
        ("q.size(-2) != k.size(-2))):", "False)):", "all_ways_agree"),
        ("self.dropout if self.training else 0.0", "self.dropout", "dropout_only_in_training"),
        ("if causal and context is not None:", "if causal and context is None:", "leaves_python and export"),
        ("        cache.k, cache.v = k, v\n", "", "cache_equals"),
        ("x.clone(), packed.requires_grad", "x.clone()", "from_torch_keeps"),
        ("    lengths = lengths.long()", "    # lengths = lengths.long()", "padding_mask"),
    ],
    "encoder.py": [
        (
            "x + self.dropout(self.self_attention(self",
            "self.dropout(x + self.self_attention(self",
            "encoder_dropout",
        ),
        (
            "x + self.dropout(self.self_attention(self",
            "self.dropout(self.self_attention(self",
            "layer_equals_torch",
        ),
        (
            "self.self_attention_norm(x + self.dropout(self.self_attention(x, mask)))",
            "x + self.dropout(self.self_attention(self.self_attention_norm(x), mask))",
            "layer_equals_torch",
        ),
        ("10_000.0 ** (-torch.arange", "1_000.0 ** (-torch.arange", "sinusoidal_positional_encoding"),
        (".softmax(dim=-1).masked_fill(~mask, 0.0)", ".softmax(dim=-1)", "equals_attention_py"),
        ("tokens) * self.scale + self", "tokens) + self", "stack_equals_torch"),
        ("mask = tokens != self.pad_id", "mask = tokens == self.pad_id", "encoder_stack"),
        (
            "nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()",
            "nn.LayerNorm(config.d_model)",
            "paper_s_parameters or stack_equals",
        ),
        ("mask.sum(1, keepdim=True).clamp(min=1)", "x.size(1)", "padding_and_batch"),
        ("x.masked_fill(padding, -math.inf).amax(1)", "x.amax(1)", "pool_tokens"),
        ("self.embedding.weight.dtype))", "self.embedding.weight.dtype), persistent=False)", "meta_device"),
    ],
    "transformer.py": [
        (".tril(k_len - q_len)", ".tril()", "causal_mask"),
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
        ("[(k[rows], v[rows], *of_memory)", "[(k, v, *of_memory)", "equals_lists"),
        ("lengths.gather(1, parent) + ~was_finished", "lengths.gather(1, parent) + 1", "equals_lists"),
        ("((5 + lengths.to(log_probs)) / 6)", "(lengths.to(log_probs))", "full_width"),
        ("tgt = F.pad(targets[:, :-1], (1, 0), value=model.config.bos_id)", "tgt = targets", "written_out"),
        (
            'io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig")',
            "data.decode().splitlines()",
            "lines_of",
        ),
        ("rows, parse_math=False)", "rows)", "ones_own"),
        ('optimizer.load_state_dict(state["optimizer"])', "pass", "kill_9"),
        ("if not norm.isfinite():", "if False:", "not_finite"),
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
        ("s.clip or math.inf", "s.clip or 1.0", "clip_0"),
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
        ("p.parent = os.getppid()", "pass", "under_torchrun"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "warmup_cosine"),
        ("more = p.world > 1 and micro < s.accumulate - 1", "more = False", "travel"),
        ("micro < s.accumulate - 1", "micro > 0", "same_weights"),
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
        ("torch.arange(p.rank, len(inputs), p.world)", "torch.arange(len(inputs))", "same_weights"),
        (
            'map_location="cpu", weights_only=True',
            'map_location="cpu", weights_only=False',
            "run_no_code",
        ),
    ],
    "classify_imdb.py": [
        ("(tokens != PAD).unfold(1, WINDOW, STRIDE).any(-1)", "tokens[:, 2:-2:4] != PAD", "written_out"),
        ("tokens = tokens.long()  # 32", "# 32", "ngram_ids"),
        ("0 <= n % fifth - fifth * 2 // 5 < fifth // 10", "n % 10 == 4", "dev_split"),
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
        ("s.clip or math.inf", "s.clip or 1.0", "clip_0"),
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
        ("p.parent = os.getppid()", "pass", "under_torchrun"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "warmup_cosine"),
        ("gradient_sync(micro == s.accumulate - 1)", "gradient_sync(True)", "travel"),
        ("loss * (p.world / n_tokens)", "loss / n_tokens", "same_weights"),
        (
            "model.set_requires_gradient_sync(micro == s.accumulate - 1)",
            "model.set_requires_gradient_sync(micro == 0)",
            "same_weights",
        ),
        ("fused=not s.exact", "fused=True", "two_processes_are_bitwise"),
        (".clamp(max=1.0))", "  )", "clip_0"),
        ("        fully_shard(block, mesh=mesh, mp_policy=policy)\n", "", "one_block_at_a_time"),
        (
            'if sha256_of(path, wrong)["manifest.json"] == path.suffix[1:]:',
            'if sha256_of(path, wrong)["manifest.json"]:',
            "newest_checkpoint",
        ),
        (
            'if found[name] != manifest["files"][name]]',
            "if not found[name]]",
            "newest_checkpoint",
        ),
        (
            'raise pickle.UnpicklingError(f".metadata',
            'return super().find_class(module, name)\n        raise pickle.UnpicklingError(f".metadata',
            "run_no_code",
        ),
    ],
    "export.py": [
        ("if sum(m is child for child in places) > 1:", "if False:", "pruning_refuses"),
        ("runners[name](*batches[0])  # untimed", "pass  # untimed", "benchmark"),
        (
            "model = copy.deepcopy(model).eval()\n    with torch.no_grad()",
            "model = copy.deepcopy(model)\n    with torch.no_grad()",
            "equal_the_model",
        ),
        (
            "model = copy.deepcopy(model).eval()\n    with torch.no_grad()",
            "model = model.eval()\n    with torch.no_grad()",
            "equal_the_model",
        ),
        (
            "torch.where(attn_mask, 0.0, -torch.inf)",
            "torch.where(attn_mask, -torch.inf, 0.0)",
            "attention_for_onnx",
        ),
        ("** -0.5 if scale is None else scale", "** -0.5", "attention_for_onnx"),
        (".softmax(-1) @ value * allowed", ".softmax(-1) @ value", "attention_for_onnx"),
        ('free[1] = f"length_{i}" if i else "length"', "pass", "free_sizes or one_file"),
        ('f"length_{i}" if i else "length"', '"length"', "free_sizes"),
        ("if name not in gates:", "if True:", "called_twice"),
        ('"atol": 1e-3 * max(1.0, largest)', '"atol": 1e3', "refuse_by_name"),
        ("[inputs, *other_sizes(inputs)] if free else [inputs]", "[inputs]", "hold_what_they_promise"),
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
        process = subprocess.Popen(
            [*command, "-k", selection],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
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
    with ThreadPoolExecutor(int(os.environ.get("MUTANT_PROCESSES", 2))) as pool:
        verdicts = []
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
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        node.value = node.value + 1 if isinstance(node.value, int) else 2 * node.value + (node.value == 0)
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
        if isinstance(node, ast.JoinedStr | ast.arguments) or ast.unparse(node).startswith(
            ("print(", "if __")
        ):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            return
        if hasattr(node, "lineno") and changed(node) is not None:
            found.append(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "exc"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    visit(ast.parse(source))
    lines = source.encode().splitlines(keepends=True)  # columns are counted in bytes
    bugs = []
    for node in random.Random(seed).sample(found, min(n, len(found))):
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        stop = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
        new = ast.unparse(changed(node))
        if isinstance(node, ast.expr):
            new = f"({new})"  # whatever stands around it
        text = source.encode()
        old = " ".join(text[start:stop].decode().split())
        source_with_bug = (text[:start] + new.encode() + text[stop:]).decode()
        bugs.append((file, f"line {node.lineno}: {old} -> {new}", source_with_bug, SECTIONS[file]))
    return bugs


def plant_from_command_line(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Plant bugs; see that the tests notice.")
    parser.add_argument("--mutants", nargs="*", metavar="FILE", help="in these files; without: in all")
    parser.add_argument(
        "--random", type=int, metavar="N", help="N bugs a file drawn at random; else the named ones"
    )
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
