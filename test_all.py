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
import runpy
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
    config = dict(
        vocab_size=11, max_len=24, d_model=12, n_heads=3, n_layers=2, d_ff=20, dropout=0.0, tied=False
    )
    model = transformer.Transformer(
        transformer.TransformerConfig(**(config | {"norm_first": norm_first} | changes))
    )
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.4)
    return model.to(dtype)


def transformer_sentences(n=6, longest=9, vocab=11, with_eos=True):
    """Rows of random tokens of different lengths, padded on the right; the first is the longest."""
    lengths = [longest] + torch.randint(2, longest + 1, (n - 1,)).tolist()
    rows = [torch.randint(3, vocab, (length,)) for length in lengths]
    if with_eos:
        rows = [torch.cat((row[:-1], torch.tensor([2]))) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def transformer_copy_attention(ours, theirs):
    """Weights of ours into an nn.MultiheadAttention."""
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())


def transformer_to_torch(model):
    """nn.TransformerEncoder and nn.TransformerDecoder with copies of the model's weights."""
    c = model.config
    settings = dict(d_model=c.d_model, nhead=c.n_heads, dim_feedforward=c.d_ff, dropout=0.0, batch_first=True)
    settings |= {"norm_first": c.norm_first, "dtype": next(model.parameters()).dtype}
    norms = [nn.LayerNorm(c.d_model, dtype=settings["dtype"]) if c.norm_first else None for _ in range(2)]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**settings), c.n_layers, norms[0], enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**settings), c.n_layers, norms[1])
    for stack, layers in ((encoder, model.encoder), (decoder, model.decoder)):
        for theirs, ours in zip(stack.layers, layers, strict=True):
            transformer_copy_attention(ours.self_attention, theirs.self_attn)
            theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
            theirs.linear2.load_state_dict(ours.feed_forward[2].state_dict())
            theirs.norm1.load_state_dict(ours.norm1.state_dict())
            theirs.norm2.load_state_dict(ours.norm2.state_dict())
            if stack is decoder:
                transformer_copy_attention(ours.cross_attention, theirs.multihead_attn)
                theirs.norm3.load_state_dict(ours.norm3.state_dict())
    for norm, ours in zip(norms, (model.encoder_norm, model.decoder_norm), strict=True):
        if norm is not None:
            norm.load_state_dict(ours.state_dict())
    return encoder, decoder


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("d_model, n_heads", [(12, 3), (15, 5), (16, 1)])
def test_transformer_equals_torch(norm_first, dtype, tolerance, d_model, n_heads):
    model = transformer_tiny(norm_first, dtype, d_model=d_model, n_heads=n_heads)
    encoder, decoder = transformer_to_torch(model)
    src, _ = transformer_sentences()
    tgt = F.pad(transformer_sentences(longest=7, with_eos=False)[0], (1, 0), value=1)
    positions = transformer.sinusoidal_positions(24, d_model).to(dtype)

    def embed(embedding, tokens):
        return embedding(tokens) * math.sqrt(d_model) + positions[: tokens.shape[1]]

    memory, memory_mask = model.encode(src)
    assert memory_mask.shape == (6, 1, 1, 9)
    expected_memory = encoder(embed(model.src_embedding, src), src_key_padding_mask=src == 0)
    real = (src != 0)[..., None]
    check_close(memory * real, expected_memory * real, tolerance, "encoder")

    causal = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=dtype)
    x = embed(model.tgt_embedding, tgt)
    expected = decoder(x, expected_memory, tgt_mask=causal, memory_key_padding_mask=src == 0)
    expected = F.linear(expected, model.output.weight)
    logits = model(src, tgt)
    real = (tgt != 0)[..., None]
    check_close(logits * real, expected * real, tolerance, "model")

    upstream = torch.randn_like(logits) * real
    ours = torch.autograd.grad((logits * upstream).sum(), list(model.parameters()))
    ours = dict(zip([name for name, _ in model.named_parameters()], ours, strict=True))
    names = [name for name, _ in model.named_parameters() if "embedding" in name or name == "output.weight"]
    shared = torch.autograd.grad(
        (expected * upstream).sum(), [model.get_parameter(n) for n in names], retain_graph=True
    )
    for name, grad in zip(names, shared, strict=True):
        check_close(ours[name], grad, tolerance * 10, name)
    (expected * upstream).sum().backward()
    for i, theirs in enumerate(decoder.layers):
        for mine, torchs in (
            ("self_attention", theirs.self_attn),
            ("cross_attention", theirs.multihead_attn),
        ):
            stacked = torch.cat([ours[f"decoder.{i}.{mine}.{p}_proj.weight"] for p in "qkv"])
            check_close(stacked, torchs.in_proj_weight.grad, tolerance * 10, f"{mine} weight {i}")
            stacked = torch.cat([ours[f"decoder.{i}.{mine}.{p}_proj.bias"] for p in "qkv"])
            check_close(stacked, torchs.in_proj_bias.grad, tolerance * 10, f"{mine} bias {i}")
        check_close(ours[f"decoder.{i}.norm3.weight"], theirs.norm3.weight.grad, tolerance * 10, f"norm3 {i}")
    for i, theirs in enumerate(encoder.layers):
        stacked = torch.cat([ours[f"encoder.{i}.self_attention.{p}_proj.weight"] for p in "qkv"])
        check_close(stacked, theirs.self_attn.in_proj_weight.grad, tolerance * 10, f"encoder weight {i}")
        check_close(
            ours[f"encoder.{i}.feed_forward.0.weight"], theirs.linear1.weight.grad, tolerance * 10, f"ffn {i}"
        )


def test_transformer_parameter_counts():
    def count(**changes):
        with torch.device("meta"):
            model = transformer.Transformer(transformer.TransformerConfig(**changes))
        return sum(p.numel() for p in model.parameters())

    assert count() == 63_082_496
    assert count(d_model=1024, n_heads=16, d_ff=4096) == 214_245_376
    assert count(tied=False) == 63_082_496 + 2 * 37_000 * 512
    assert count(norm_first=True) == 63_082_496 + 2 * 2 * 512  # the two final norms


def test_transformer_tying_and_initial_scale():
    config = transformer.TransformerConfig(vocab_size=300, d_model=64, n_heads=4, n_layers=1, d_ff=64)
    model = transformer.Transformer(config)
    assert model.src_embedding.weight is model.tgt_embedding.weight is model.output.weight
    assert abs(model.src_embedding.weight.std().item() * 8 - 1) < 0.05  # 1 / sqrt(d_model)
    for layer in (model.encoder[0], model.decoder[0]):
        weight = layer.self_attention.q_proj.weight
        assert abs(weight.abs().max().item() / math.sqrt(6 / 128) - 1) < 0.01  # Xavier, uniform
        assert layer.self_attention.q_proj.bias.abs().max() == 0
    untied = transformer.Transformer(transformer.TransformerConfig(**(vars(config) | {"tied": False})))
    matrices = [untied.src_embedding.weight, untied.tgt_embedding.weight, untied.output.weight]
    assert len({id(m) for m in matrices}) == 3 and not torch.equal(matrices[0], matrices[1])
    assert all(abs(m.std().item() * 8 - 1) < 0.05 for m in matrices)
    assert "positions" not in untied.state_dict()
    s = transformer.Settings(tied=False, norm_first=False, dropout=0.25)
    made = vars(transformer.model_config(s, 300))
    assert all(
        made[name] == value for name, value in vars(s).items() if name in made and name != "vocab_size"
    )


def test_transformer_positions():
    table = transformer.sinusoidal_positions(50, 7)
    for position, feature in itertools.product((0, 1, 49), range(7)):
        angle = position / 10_000 ** (2 * (feature // 2) / 7)
        expected = math.cos(angle) if feature % 2 else math.sin(angle)
        assert abs(table[position, feature].item() - expected) < 1e-6, (position, feature)
    assert table.dtype == torch.float32 and table.shape == (50, 7)


def test_transformer_attention_with_nothing_to_see():
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    mask = torch.rand(2, 5, 5) < 0.5
    mask[0, 2] = False
    output, weights = transformer.attention(q, k, v, mask)
    assert (output[0, 2] == 0).all() and (weights[~mask] == 0).all()
    check_close(output, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 1e-12)
    grads = torch.autograd.grad(output.square().sum(), (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum()
    for grad, other in zip(grads, torch.autograd.grad(expected, (q, k, v)), strict=True):
        check_close(grad, other, 1e-12)
    low = transformer.attention(60 * q, -60 * q, v, mask)[
        0
    ]  # what may be seen scores lower than any fill value
    check_close(low, F.scaled_dot_product_attention(60 * q, -60 * q, v, attn_mask=mask), 1e-12)
    big = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
    assert transformer.attention(big, big, big, torch.ones(4, 4, dtype=torch.bool))[0].isfinite().all()
    model = transformer_tiny()
    logits = model(
        torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    )  # sources all padding
    assert logits.isfinite().all()


def test_transformer_causal_mask():
    assert transformer.causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert transformer.causal_mask(3, 3).tolist() == torch.ones(3, 3).tril().bool().tolist()


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_no_look_ahead(norm_first):
    model = transformer_tiny(norm_first)
    src, _ = transformer_sentences()
    tgt = torch.randint(3, 11, (6, 8))
    before = model(src, tgt)
    for t in range(8):
        changed = tgt.clone()
        changed[:, t] = 3 + (tgt[:, t] - 3 + 1) % 8
        after = model(src, changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()  # and every later one does see it


def test_transformer_padding_changes_nothing():
    model = transformer_tiny()
    src, lengths = transformer_sentences()
    tgt = torch.randint(3, 11, (6, 5))
    together = model(src, tgt)
    wider = model(F.pad(src, (0, 5)), F.pad(tgt, (0, 3)))[:, :5]
    check_close(wider, together, 1e-12, "more padding")
    for row, length in enumerate(lengths):
        alone = model(src[row : row + 1, :length], tgt[row : row + 1])
        check_close(alone[0], together[row], 1e-12, "alone")


def test_transformer_every_layer_drops_by_itself():
    """In both orders of norm and sublayer; the embedding's dropout is off."""
    for norm_first in (True, False):
        model = transformer_tiny(norm_first, dropout=0.5).train()
        x, mask = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(2, 1, 1, 5, dtype=torch.bool)
        for layer in model.encoder:
            assert not torch.equal(layer(x, mask), layer(x, mask))
        causal = transformer.causal_mask(5, 5)
        for layer in model.decoder:
            assert not torch.equal(layer(x, causal, x, mask, {}), layer(x, causal, x, mask, {}))


def test_transformer_dev_loss_has_no_dropout(tmp_path):
    s = transformer.Settings(d_model=16, n_heads=2, d_ff=16, n_layers=1, dropout=0.5, device="cpu", amp="off")
    s.out = str(tmp_path)
    corpus = transformer.number_corpus(0, 40, 10, 5)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 300)
    dev = [tuple(tokenizer.encode(text, s.max_len) for text in pair) for pair in corpus.dev]
    training = transformer.Training(s, tokenizer, dev, dev)
    training.model.train()
    assert training.dev_loss() == training.dev_loss() and training.model.training
    training.save()
    other = transformer.Training(s, tokenizer, dev[:-1], dev)
    with pytest.raises(ValueError, match="other sentences"):  # another folder under --data
        other.restore(transformer.load(tmp_path / "checkpoint.pt", "checkpoint"))


def test_transformer_decode_refuses_a_mask_of_another_shape():
    model, (src, _) = transformer_tiny(), transformer_sentences(n=5, longest=5)
    memory, mask = model.encode(src)
    for wrong in (mask[:, 0, 0], mask[:, :, :, :-1], mask.long(), mask[:1]):
        with pytest.raises(ValueError, match="memory_mask"):
            model.decode(src, memory, wrong)


def test_transformer_settings_and_what_may_change():
    for name in "epochs batch-tokens warmup average save-every beam-size lr-scale clip".split():
        with pytest.raises(ValueError, match=f"--{name} must be above 0, got 0"):
            transformer.settings_from_command_line([f"--{name}", "0"])
    may = {"data", "translate", "out", "device", "save_every", "beam_size", "length_penalty"}
    assert set(transformer.MAY_CHANGE) == may


def test_transformer_load_names_a_damage_without_a_message(tmp_path, monkeypatch):
    transformer.save(tmp_path / "a.pt", {"kind": "model"})
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(EOFError()))
    with pytest.raises(ValueError, match="a.pt is damaged or isn't a model: EOFError"):
        transformer.load(tmp_path / "a.pt", "model")


def test_transformer_dropout_only_while_training():
    model = transformer_tiny(dropout=0.5)
    src, _ = transformer_sentences()
    tgt = torch.randint(3, 11, (6, 5))
    assert not torch.equal(model(src, tgt), model(src, tgt))
    decoded = [transformer.greedy_decode(model, src, 12) for _ in range(2)]
    found = [transformer.beam_search(model, src, 12)[0] for _ in range(2)]
    assert torch.equal(*decoded) and torch.equal(*found) and model.training
    model.eval()
    assert torch.equal(model(src, tgt), model(src, tgt))
    transformer.greedy_decode(model, src, 3)
    assert not model.training
    # Dropout acts on the embeddings and on each sublayer's output: with p near 1 nothing is left of a token.
    nothing = transformer_tiny(dropout=0.999999)
    assert (nothing.encode(src)[0].std(0) < 1e-9).all()


def test_transformer_loss():
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 11, (3, 5))
    targets[0, 3:] = targets[1, 1:] = 0
    loss = transformer.label_smoothed_loss(logits, targets, pad_id=0, smoothing=0.2)
    terms = []
    for row, position in itertools.product(range(3), range(5)):
        if targets[row, position] != 0:
            q = torch.full((11,), 0.2 / 11, dtype=torch.float64)
            q[targets[row, position]] += 0.8
            terms.append(-(q * logits[row, position].log_softmax(-1)).sum())
    assert len(terms) == 9
    check_close(loss, torch.stack(terms).mean(), 1e-12)
    for wrong, smoothing in ((11, 0.1), (-1, 0.1), (5, 1.0), (5, -0.1), (5, math.nan)):
        words = "targets must lie in 0 .. 10" if smoothing == 0.1 else "smoothing"
        with pytest.raises(ValueError, match=words):
            transformer.label_smoothed_loss(logits, targets.masked_fill(targets == 3, wrong), 0, smoothing)
    grad = torch.autograd.grad(loss, logits)[0]
    assert (grad[targets == 0] == 0).all() and (grad[targets != 0] != 0).all()
    low = transformer.label_smoothed_loss(logits.bfloat16(), targets, 0)
    assert low.dtype == torch.float32
    check_close(low, transformer.label_smoothed_loss(logits.bfloat16().float(), targets, 0, 0.1), 1e-6)


def test_transformer_main_translates_the_empty_text_and_finds_multi30k_by_its_variable(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(transformer, "translate_command", lambda s: asked.append(s.translate))
    monkeypatch.setattr(sys, "argv", ["transformer.py", "--translate", "", "--out", str(tmp_path / "a")])
    transformer.main()
    assert asked == [""] and not (tmp_path / "a").exists()
    monkeypatch.setenv("MULTI30K_DATA", "there")
    monkeypatch.setattr(transformer, "multi30k_corpus", lambda folder: asked.append(folder) or 1 / 0)
    for given in ([], ["--data", "here"]):
        with pytest.raises(ZeroDivisionError):
            transformer.prepare(transformer.settings_from_command_line(["--preset", "multi30k", *given]))
    assert asked == ["", "there", "here"]


def test_transformer_noam():
    rates = [transformer.noam_lr(step, 512, 4000) for step in range(1, 20_000)]
    assert max(rates) == rates[3999] and abs(rates[3999] - (512 * 4000) ** -0.5) < 1e-12
    assert abs(rates[0] - rates[3999] / 4000) < 1e-12  # a straight line up to there
    assert abs(rates[15_999] - rates[3999] / 2) < 1e-12  # and half at four times the steps
    for step, warmup in ((0, 10), (1, 0)):
        with pytest.raises(ValueError, match="step and warmup"):
            transformer.noam_lr(step, 512, warmup)


# ---- search


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


def transformer_rows(tokens):
    """Rows up to their EOS; all after it must be padding."""
    rows = []
    for row in tokens.tolist():
        end = row.index(2) + 1 if 2 in row else len(row)
        assert all(token == 0 for token in row[end:]), row
        rows.append(row[:end])
    return rows


@pytest.fixture(scope="module")
def transformer_half_trained(tmp_path_factory):
    """A model after two short epochs, in float64: still unsure, so that greedy, beam and penalties differ."""
    corpus = transformer.number_corpus(3, 2500, 20, 40)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 450)
    s = transformer.Settings(
        amp="off", device="cpu", d_model=32, d_ff=64, n_layers=1, epochs=2, average=1, seed=1
    )
    s.batch_tokens, s.warmup, s.lr_scale, s.out = 512, 60, 1.0, str(tmp_path_factory.mktemp("half"))
    train, dev = (
        [tuple(tokenizer.encode(text, 32) for text in pair) for pair in pairs]
        for pairs in (corpus.train, corpus.dev)
    )
    training = transformer.Training(s, tokenizer, train, dev)
    torch.set_num_threads(1)
    training.run()
    return training.model.double().eval(), tokenizer, corpus, training


@pytest.fixture
def transformer_searched(transformer_half_trained):
    """(model, src) to search: the half-trained one, and random ones of both norms."""
    model, tokenizer, corpus, _ = transformer_half_trained
    src = transformer.pad([tokenizer.encode(source, 32) for source, _ in corpus.test], 0, "cpu")
    return [(model, src)] + [
        (transformer_tiny(bool(i)).eval(), transformer_sentences(n=5)[0]) for i in range(2)
    ]


@torch.no_grad()
def test_transformer_greedy_equals_the_plain_loop(transformer_searched):
    lengths, cut_off = set(), 0
    for model, src in transformer_searched:
        tokens = transformer.greedy_decode(model, src, 12)
        rows = transformer_rows(tokens)
        assert rows == [transformer_greedy_oracle(model, row[row != 0], 12) for row in src]
        assert torch.equal(tokens, transformer.greedy_decode(model, src, 12, use_cache=False))
        assert torch.equal(tokens, transformer.beam_search(model, src, 12, beam_size=1)[0])
        assert tokens.shape[1] == max(map(len, rows)) and tokens.dtype == torch.int64
        for i in range(len(src)):
            assert transformer_rows(transformer.greedy_decode(model, src[i : i + 1], 12)) == [rows[i]]
        lengths |= {len(row) for row in rows}
        cut_off += sum(row[-1] != 2 for row in rows)
    assert len(lengths) > 5 and cut_off > 2, (lengths, cut_off)  # both kinds were there


def test_transformer_cache_gives_the_same_logits():
    model = transformer_tiny().eval()
    src, _ = transformer_sentences()
    tgt = torch.randint(3, 11, (6, 10))
    memory, memory_mask = model.encode(src)
    whole = model.decode(tgt, memory, memory_mask)
    cache = {}
    pieces = [model.decode(piece, memory, memory_mask, cache) for piece in tgt.split((1, 3, 1, 4, 1), dim=1)]
    check_close(torch.cat(pieces, dim=1), whole, 1e-12)
    with pytest.raises(ValueError, match="max_len=24"):
        model.decode(torch.ones(6, 15, dtype=torch.long), memory, memory_mask, cache)


def test_transformer_the_memory_is_projected_once():
    model = transformer_tiny().eval()
    src, _ = transformer_sentences()
    counts = {"encoder": 0, "memory": 0}

    def count(name):
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    model.encoder[0].register_forward_hook(count("encoder"))
    model.decoder[0].cross_attention.k_proj.register_forward_hook(count("memory"))
    for use_cache, projections in ((True, 1), (False, 6)):
        counts.update(encoder=0, memory=0)
        with torch.no_grad():
            model.output.weight[2] = 0.0  # next to never EOS
        assert transformer.greedy_decode(model, src, 6, use_cache).shape[1] == 6
        assert counts == {"encoder": 1, "memory": projections}


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_transformer_full_beam_equals_brute_force(length_penalty):
    for seed in range(4):
        torch.manual_seed(seed)
        model = transformer_tiny(vocab_size=4, n_layers=1).eval()
        src = torch.tensor([[3, 3, 2], [3, 2, 0]])
        tokens, scores = transformer.beam_search(model, src, 4, beam_size=4**4, length_penalty=length_penalty)
        for row in range(2):
            best, best_score = None, -math.inf
            for n in range(1, 5):
                for sequence in itertools.product(range(4), repeat=n):
                    if 2 in sequence[:-1] or (n < 4 and sequence[-1] != 2):
                        continue  # EOS ends, and nothing else but max_len does
                    with torch.no_grad():
                        score = transformer_log_prob(model, src[row][src[row] != 0], sequence)
                    score /= ((5 + n) / 6) ** length_penalty
                    if score > best_score:
                        best, best_score = list(sequence), score
            assert tokens[row].tolist() == best + [0] * (tokens.shape[1] - len(best))
            assert abs(scores[row].item() - best_score) < 1e-10
        assert tokens.shape[1] == max(len(r) for r in transformer_rows(tokens))


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


@pytest.mark.parametrize("beam_size, length_penalty", [(2, 0.0), (4, 0.6), (5, 1.5)])
@torch.no_grad()
def test_transformer_beam_equals_lists(transformer_searched, beam_size, length_penalty):
    lengths = set()
    for model, src in transformer_searched:
        src = src[:20]
        tokens, scores = transformer.beam_search(model, src, 10, beam_size, length_penalty)
        assert scores.dtype == torch.float64
        for row, found in enumerate(transformer_rows(tokens)):
            best, score = transformer_beam_oracle(
                model, src[row][src[row] != 0], 10, beam_size, length_penalty
            )
            assert found == best and abs(scores[row].item() - score) < 1e-10
            alone, alone_score = transformer.beam_search(
                model, src[row : row + 1], 10, beam_size, length_penalty
            )
            assert transformer_rows(alone) == [found] and abs(alone_score.item() - score) < 1e-10
            lengths.add(len(found))
        wider = transformer.beam_search(model, F.pad(src, (0, 2)), 10, beam_size, length_penalty)
        assert torch.equal(wider[0], tokens)
        check_close(wider[1], scores, 1e-12)
    assert len(lengths) > 4, lengths


@torch.no_grad()
def test_transformer_beam_beats_greedy_and_penalty_lengthens(transformer_half_trained):
    model, tokenizer, corpus, _ = transformer_half_trained
    src = transformer.pad([tokenizer.encode(source, 32) for source, _ in corpus.test], 0, "cpu")
    found = transformer.greedy_decode(model, src, 16)
    greedy, n_tokens, finished = transformer.sequence_log_probs(model, src, found)
    for row, tokens in enumerate(transformer_rows(found)):
        assert abs(greedy[row].item() - transformer_log_prob(model, src[row][src[row] != 0], tokens)) < 1e-10
        assert n_tokens[row] == len(tokens) and finished[row] == (tokens[-1] == 2)
    lengths = []
    for penalty in (0.0, 1.0, 3.0):
        tokens, scores = transformer.beam_search(model, src, 16, 4, penalty)
        log_prob, n_tokens, _ = transformer.sequence_log_probs(model, src, tokens)
        check_close(scores, log_prob / ((5 + n_tokens) / 6) ** penalty, 1e-6)  # the divisor here is float32
        lengths.append(n_tokens.double().mean().item())
        if penalty == 0:
            assert log_prob.mean() > greedy.mean() + 0.5
    assert lengths[0] < lengths[1] < lengths[2], lengths


@torch.no_grad()
def test_transformer_translate_loses_no_text(transformer_half_trained):
    model, tokenizer, _, _ = transformer_half_trained
    texts = [transformer.english_number(n) for n in range(130)]
    found = transformer.translate(
        model, tokenizer, texts, lambda src: transformer.greedy_decode(model, src, 3)
    )
    assert min(t.n_tokens for t in found) >= 1
    blank = transformer.Translation("", 0.0, 0, True)
    assert transformer.translate(model, tokenizer, ["", "   "], None) == [blank, blank]


def test_transformer_search_of_no_sentence():
    model, none = transformer_tiny().eval(), torch.zeros(0, 4, dtype=torch.long)
    assert transformer.greedy_decode(model, none, 5).shape == (0, 0)
    tokens, scores = transformer.beam_search(model, none, 5)
    assert tokens.shape == (0, 0) and scores.shape == (0,)


def test_transformer_log_probs_of_a_bf16_model_are_float32():
    model = transformer_tiny(dtype=torch.bfloat16).eval()
    src, _ = transformer_sentences()
    log_probs, n_tokens, _ = transformer.sequence_log_probs(
        model, src, transformer.greedy_decode(model, src, 9)
    )
    assert log_probs.dtype == torch.float32 and (log_probs < 0).all() and (n_tokens >= 1).all()
    scores = transformer.beam_search(model, src, 1, 2, 0.0)[1]
    with torch.no_grad():
        logits = model.decode(torch.ones(len(src), 1, dtype=torch.long), *model.encode(src))[:, 0]
    check_close(scores, logits.float().log_softmax(-1).amax(-1), 1e-6)


def test_transformer_search_leaves_the_model_as_it_was():
    """Every submodule's mode; and no hook of cross_attention_weights."""
    model = transformer_tiny().train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    transformer.greedy_decode(model, torch.full((1, 3), 3), 2)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    transformer.cross_attention_weights(model, *torch.full((2, 2, 4), 3))
    assert not any(layer.cross_attention._forward_pre_hooks for layer in model.decoder)


def test_transformer_evaluation_counts_what_was_cut_off(monkeypatch):
    rows = [transformer.Translation("a", -1.0, 3, finished) for finished in (True, True, False)]
    monkeypatch.setattr(transformer, "translate", lambda *_: rows)
    corpus = transformer.Corpus("numbers", [], [], [("x", "a")] * 3)
    report = transformer.evaluate(None, None, corpus, transformer.Settings())
    searches = report["searches"]
    assert list(searches) == ["greedy", "beam 4, penalty 0", "beam 4, penalty 0.6", "beam 4, penalty 2"]
    assert all(row["cut_off"] == 1 for row in searches.values())
    texts = iter("xabb")  # of greedy, and penalties 0, 0.6, 2
    monkeypatch.setattr(transformer, "translate", lambda *_: [transformer.Translation(next(texts))] * 3)
    corpus.test = [("x", "a")] * 3
    report = transformer.evaluate(None, None, corpus, transformer.Settings(length_penalty=0.0))
    assert report["beam"] == 1 and report["greedy"] == 0
    texts = iter("xbab")
    report = transformer.evaluate(None, None, corpus, transformer.Settings())
    assert report["beam"] == 1 and report["greedy"] == 0


def test_transformer_beam_ends_with_the_last_hypothesis(monkeypatch):
    model, calls = transformer_tiny(), []

    def decode(tgt, memory, memory_mask, cache):
        calls.append(tgt.shape)
        cache[0] = {"self": (memory, memory)}
        logits = torch.zeros(len(tgt), 1, 11)
        logits[..., 2] = 20.0  # EOS
        return logits

    monkeypatch.setattr(model, "decode", decode)
    transformer.beam_search(model, torch.tensor([[3, 4, 2]]), 20, beam_size=2)
    assert len(calls) == 2  # the second hypothesis needs another token for its EOS


def test_transformer_translates_with_the_search_asked_for(tmp_path, monkeypatch, capsys):
    tokenizer, asked = transformer.Tokenizer.train(["one two"], 259), []
    model = transformer_tiny(dtype=torch.float32, vocab_size=259)
    content = {"kind": "model", "config": dataclasses.asdict(model.config), "model": model.state_dict()}
    transformer.save(tmp_path / "model.pt", content | {"vocabulary": tokenizer.vocabulary})
    search = transformer.beam_search
    monkeypatch.setattr(transformer, "beam_search", lambda *a: asked.append(a[2:]) or search(*a))
    s = transformer.Settings(
        translate="one", out=str(tmp_path), device="cpu", beam_size=3, length_penalty=0.9
    )
    transformer.translate_command(s)
    assert asked == [(24, 3, 0.9)] and json.loads(capsys.readouterr().out)["source"] == "one"


def test_transformer_missing_sacrebleu_is_known_before_the_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setattr(transformer, "prepare", lambda s: 1 / 0)
    with pytest.raises(ImportError, match="sacrebleu"):
        transformer.train_and_evaluate(transformer.Settings(preset="multi30k"))
    with pytest.raises(ZeroDivisionError):
        transformer.train_and_evaluate(transformer.Settings())


def test_transformer_a_run_goes_on_with_its_own_sentences_alone(tmp_path):
    s = transformer.settings_from_command_line([*TRANSFORMER_SMALL.split(), "--out", str(tmp_path)])
    tokenizer, pair, other = transformer.Tokenizer.train(["one"], 259), ([5, 2], [6, 2]), ([7, 2], [6, 2])
    training = transformer.Training(s, tokenizer, [pair] * 3, [pair])
    for train, dev in (([pair] * 3, [other]), ([pair, pair, other], [pair])):
        with pytest.raises(ValueError, match="a run on other sentences"):
            transformer.Training(s, tokenizer, train, dev).restore({"corpus": training.corpus})


def test_transformer_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(ROOT / "transformer.py"), run_name="__main__")
    assert leaving.value.code == 130 and len(capsys.readouterr().err.splitlines()) == 1


def test_transformer_decoding_has_no_reference_to_see():
    """The decoder reads what was found, nothing else; a poisoned reference changes no translation."""
    model = transformer_tiny().eval()
    src, _ = transformer_sentences()
    read = []
    model.tgt_embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].clone()))
    expected = transformer.greedy_decode(model, src, 10)
    assert torch.equal(torch.cat(read, dim=1)[:, 1:], expected[:, :-1]) and (read[0] == 1).all()
    # A poisoned reference: translate() has no access to the corpus's target side
    corpus = transformer.number_corpus(0, 20, 2, 2)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 300)
    poisoned = transformer_tiny(vocab_size=tokenizer.vocab_size, max_len=40).eval()
    s = transformer.Settings(beam_size=2, max_len=40)
    found = []
    for targets in (["eins"] * 2, ["tausend und"] * 2):
        test = [(source, target) for (source, _), target in zip(corpus.test, targets, strict=True)]
        found.append(
            transformer.evaluate(poisoned, tokenizer, transformer.Corpus("numbers", [], [], test), s)
        )
    assert found[0]["searches"] == found[1]["searches"]
    ways = (
        lambda src: transformer.greedy_decode(poisoned, src, 40),
        transformer.beam_of(poisoned, 40, 2, 0.0),
    )
    texts = [source for source, _ in corpus.test]
    greedy, beam = (transformer.translate(poisoned, tokenizer, texts, way) for way in ways)
    gains = [b.log_prob - g.log_prob for g, b in zip(greedy, beam, strict=True)]
    expected = sum(x > 1e-3 for x in gains), sum(x < -1e-3 for x in gains)
    assert (found[0]["search_gains"], found[0]["search_errors"]) == expected


def test_transformer_a_step_is_the_sum_of_its_sentences():
    """64 sentences of mixed lengths: the batch's gradient is the token-weighted sum of the single ones."""
    corpus = transformer.number_corpus(1, 64, 2, 2)
    tokenizer = transformer.Tokenizer.train([text for pair in corpus.train for text in pair], 300)
    pairs = [tuple(tokenizer.encode(text, 64) for text in pair) for pair in corpus.train]
    assert len({len(target) for _, target in pairs}) > 5
    s = transformer.Settings(amp="off", device="cpu", d_model=16, d_ff=16, max_len=64)
    training = transformer.Training(s, tokenizer, pairs, pairs)
    got = []
    hook = training.model.register_forward_hook(lambda module, inputs, output: got.append(output.dtype))
    for s.amp in ("bf16", "off"):
        training.loss(pairs[:4], 0.0)
    hook.remove()
    assert got == [torch.bfloat16, torch.float32]
    model = training.model.double()

    def gradient(batch):
        loss, n_tokens = training.loss(batch, 0.1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]), n_tokens

    whole, n_all = gradient(pairs)
    singles = [gradient([pair]) for pair in pairs]
    assert n_all == sum(n for _, n in singles) == sum(len(target) for _, target in pairs)
    check_close(whole, sum(g * n for g, n in singles) / n_all, 1e-10)


def test_transformer_rejects():
    config = transformer.TransformerConfig
    for changes, words in (
        ({"d_model": 10, "n_heads": 3}, "n_heads"),
        ({"n_layers": 0}, "n_layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 2}, "eos_id"),
        ({"eos_id": 1}, "eos_id"),
        ({"pad_id": -1}, "pad_id"),
    ):
        with pytest.raises(ValueError, match=words):
            config(**changes)
    model = transformer_tiny()
    src, tgt = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    for bad_src, bad_tgt in (
        (src[0], tgt),
        (src.float(), tgt),
        (src, tgt[:1]),
        (src.repeat(1, 7), tgt),
        (src, tgt[0]),
    ):
        with pytest.raises(ValueError, match="tokens|max_len|batches"):
            model(bad_src, bad_tgt)
    assert model(src.int(), tgt.int()).shape == (2, 3, 11)
    assert model(src.repeat(1, 6), tgt).shape == (2, 3, 11)  # exactly max_len
    for max_len in (0, 25):
        with pytest.raises(ValueError, match="max_len"):
            transformer.greedy_decode(model, src, max_len)
        with pytest.raises(ValueError, match="max_len"):
            transformer.beam_search(model, src, max_len)
    with pytest.raises(ValueError, match="beam_size"):
        transformer.beam_search(model, src, 5, beam_size=0)
    assert transformer.greedy_decode(model, src, 24).shape[1] <= 24


# ---- data


def test_transformer_numbers():
    for n, english, german in (
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "ein und zwanzig"),
        (30, "thirty", "dreißig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhundert eins"),
        (742, "seven hundred and forty-two", "siebenhundert zwei und vierzig"),
        (1_000, "one thousand", "ein tausend"),
        (1_001, "one thousand and one", "ein tausend eins"),
        (1_100, "one thousand one hundred", "ein tausend einhundert"),
        (101_000, "one hundred and one thousand", "einhundert ein tausend"),
        (342_000, "three hundred and forty-two thousand", "dreihundert zwei und vierzig tausend"),
        (
            999_999,
            "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            "neunhundert neun und neunzig tausend neunhundert neun und neunzig",
        ),
    ):
        assert transformer.english_number(n) == english and transformer.german_number(n) == german
    sample = [*range(2000), *range(2000, 1_000_000, 997)]
    assert len({transformer.english_number(n) for n in sample}) == len(sample)
    assert len({transformer.german_number(n) for n in sample}) == len(sample)


def test_transformer_number_corpus():
    corpus = transformer.number_corpus(0)
    parts = [corpus.train, corpus.dev, corpus.test]
    assert [len(part) for part in parts] == [8_000, 500, 1_000]
    assert len({source for part in parts for source, _ in part}) == 9_500  # no number is in two parts
    assert len({target for part in parts for _, target in part}) == 9_500
    short = [sum(len(source.split()) < 5 for source, _ in part) / len(part) for part in parts]
    assert max(short) - min(short) < 0.05 and min(short) > 0.05, short  # each part has short ones as well
    assert transformer.number_corpus(0) == corpus and transformer.number_corpus(1) != corpus
    assert max(source.count("thousand") for part in parts for source, _ in part) == 1
    assert corpus.test[0][0] == "three hundred thousand eight hundred and forty-six"


def test_transformer_tokenizer():
    texts = [transformer.english_number(n) for n in range(2000)]
    tokenizer = transformer.Tokenizer.train(texts, 400)
    assert 259 < tokenizer.vocab_size <= 400
    for text in ("forty-two thousand", "Größe, 東京 🦊!", "  a  b ", "", "\x00\x7f"):
        ids = tokenizer.encode(text, 99)
        assert ids[-1] == 2 and all(3 <= i < tokenizer.vocab_size for i in ids[:-1])
        assert tokenizer.decode(ids) == tokenizer.decode([1, *ids, 0, 0]) == text.strip().lower()
    assert tokenizer.encode("forty", 9)[0] == tokenizer.encode("one forty", 9)[1]
    assert tokenizer.decode([3 + 0xFF]) == "\ufffd" if tokenizer.vocabulary[0xFF] == b"\xff" else True
    again = transformer.Tokenizer.train(texts, 400)
    assert again.vocabulary == tokenizer.vocabulary == transformer.Tokenizer(tokenizer.vocabulary).vocabulary
    with pytest.raises(ValueError, match="max_len=3: 'forty-two'"):
        tokenizer.encode("forty-two", 3)
    assert len(tokenizer.encode("forty-two", 4)) == 4
    with pytest.raises(ValueError, match="vocab_size"):
        transformer.Tokenizer.train(texts, 258)


def test_transformer_token_batches():
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(500)] + [1000]
    batches = transformer.token_batches(lengths, 120, "0 0")
    assert sorted(i for batch in batches for i in batch) == list(range(501))
    assert all(len(b) * max(lengths[i] for i in b) <= 120 or len(b) == 1 for b in batches)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert padded < 1.06 * sum(lengths)  # similar lengths meet
    assert len(batches) < sum(lengths) / 120 * 1.3  # and batches are full
    assert [lengths[b[0]] for b in batches] != sorted(lengths[b[0]] for b in batches)  # in no order
    assert transformer.token_batches(lengths, 120, "0 0") == batches
    other = transformer.token_batches(lengths, 120, "0 1")
    assert {frozenset(b) for b in other} != {frozenset(b) for b in batches}
    assert transformer.pad([[5], [6, 7]], 0, "cpu").tolist() == [[5, 0], [6, 7]]


def transformer_small_multi30k(folder, n=40, **changes):
    """Files in Multi30k's layout; changes replaces the text of some, by name with _ for the dot."""
    folder.mkdir(exist_ok=True)
    german, english = "ein mann mit dem hund auf der wiese {}", "a man with the dog on the meadow {}"
    for name in transformer.MULTI30K:
        line = german if name.endswith("de") else english
        text = changes.get(name.replace(".", "_"), "".join(f"{line.format(i)}\n" for i in range(n)))
        if text is not None:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_transformer_multi30k_files(tmp_path):
    folder = transformer_small_multi30k(tmp_path / "good")
    corpus = transformer.multi30k_corpus(str(folder))
    assert (
        corpus.name == "own" and [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == [40] * 3
    )
    assert corpus.train[7] == ("ein mann mit dem hund auf der wiese 7", "a man with the dog on the meadow 7")
    (folder / "val.de").write_bytes(gzip.decompress((folder / "val.de.gz").read_bytes()))
    (folder / "val.de.gz").unlink()  # unpacked files do as well
    assert transformer.multi30k_corpus(str(folder)) == corpus
    german = "ein hund auf der wiese\n"
    for i, (changes, words) in enumerate(
        (
            ({"val_en": None}, "val.en"),
            ({"train_en": "a dog on the meadow\n" * 39}, "train: 40 lines in German, 39 in English"),
            ({"train_de": "a dog on the meadow\n" * 40}, "train.de isn't in its language"),
            ({"val_en": german * 40}, "val.en isn't in its language"),
            (
                {"test_2016_flickr_de": german * 3 + "\n" + german * 36},
                "test_2016_flickr.de: line 4 is empty",
            ),
            ({"train_de": ""}, "train.de: line 1 is empty"),
            ({"test_2016_flickr_de": german * 1000}, "was altered: 1000 lines"),
            ({"test_2016_flickr_de": german * 999 + german[:9]}, "was altered: 1000 lines"),
        )
    ):
        with pytest.raises(ValueError, match=words):
            transformer.multi30k_corpus(str(transformer_small_multi30k(tmp_path / str(i), **changes)))
    with pytest.raises(ValueError, match="nowhere has neither train.de.gz nor train.de"):
        transformer.multi30k_corpus(str(tmp_path / "nowhere"))
    whole = (folder / "train.de.gz").read_bytes()
    latin1 = gzip.compress("ein mann auf der straße\n".encode("latin1") * 40)
    for damaged in (whole[:-20], whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], b"no gzip", latin1):
        (folder / "train.de.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="train.de.gz is damaged"):
            transformer.multi30k_corpus(str(folder))


@pytest.fixture
def transformer_server():
    """A server on 127.0.0.1 that answers with what `files` holds: bytes, or an int that is a status."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1]
            asked.append(name)
            answer = files.get(name, 404)
            self.send_response(200 if isinstance(answer, bytes) else answer)
            if isinstance(answer, bytes):
                self.send_header("Content-Length", str(len(answer) + (100 if name in cut else 0)))
            self.end_headers()
            if isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *_):
            pass

    cut = set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", files, asked, cut
    server.shutdown()


def test_transformer_download(tmp_path, monkeypatch, transformer_server, capfd):
    url, files, asked, cut = transformer_server
    text = b"ein mann auf der wiese\n" * 3
    entry = (3, len(text), transformer.hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(transformer, "MULTI30K_URL", url)
    monkeypatch.setattr(transformer, "MULTI30K", {"train.de": entry})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new/cache"))
    cached = tmp_path / "new/cache/multi30k/train.de.gz"
    with pytest.raises(ValueError, match="404"):
        transformer.read_multi30k("train.de", "")
    for altered in (text.replace(b"mann", b"frau"), text * 2):
        files["train.de.gz"] = gzip.compress(altered)
        with pytest.raises(ValueError, match="was altered"):
            transformer.read_multi30k("train.de", "")
    files["train.de.gz"] = gzip.compress(text)[:-10]
    with pytest.raises(ValueError, match="damaged"):
        transformer.read_multi30k("train.de", "")
    files["train.de.gz"] = gzip.compress(text)
    cut.add("train.de.gz")  # breaks off
    with pytest.raises(ValueError, match="train.de.gz"):
        transformer.read_multi30k("train.de", "")
    assert not cached.exists()  # nothing wrong was kept
    cut.clear()
    assert transformer.read_multi30k("train.de", "") == (text, True)
    asked.clear()
    assert transformer.read_multi30k("train.de", "") == (text, True) and asked == [] and cached.exists()
    cached.unlink()
    assert transformer.read_multi30k("train.de", "") == (text, True)  # into a folder that is there
    monkeypatch.setattr(transformer, "MULTI30K_URL", "http://127.0.0.1:9/")
    cached.unlink()
    with pytest.raises(ValueError, match="--data"):
        transformer.read_multi30k("train.de", "")


def test_transformer_multi30k_official():
    folder = os.environ.get("MULTI30K_DATA")
    if not folder:
        pytest.skip("MULTI30K_DATA is not set")
    corpus = transformer.multi30k_corpus(folder)
    assert corpus.name == "multi30k" and [len(p) for p in (corpus.train, corpus.dev, corpus.test)] == [
        29_000,
        1_014,
        1_000,
    ]
    assert corpus.test[0][1].startswith("A man in an orange hat")


# ---- training


def test_transformer_parameter_groups():
    model = transformer_tiny(tied=True)
    decayed, plain = transformer.parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    for group, ends in (
        (decayed, ("weight",)),
        (plain, ("bias", "norm1.weight", "norm2.weight", "norm3.weight", "norm.weight")),
    ):
        assert all(names[id(p)].endswith(ends) for p in group["params"])
    assert len(decayed["params"] + plain["params"]) == len(names)
    assert not any("norm" in names[id(p)] for p in decayed["params"])


def test_transformer_training_step(transformer_half_trained, monkeypatch):
    """Steps written out: AdamW with the paper's betas, Noam's rate, clipped gradient of the smoothed loss."""
    _, tokenizer, corpus, _ = transformer_half_trained
    pairs = [tuple(tokenizer.encode(text, 32) for text in pair) for pair in corpus.train[:12]]
    s = transformer.Settings(
        amp="off", device="cpu", d_model=16, d_ff=16, clip=0.1, warmup=7, lr_scale=3.0, weight_decay=0.2
    )
    training = transformer.Training(s, tokenizer, pairs, pairs)
    training.model.double()  # in float32 Adam would make steps of rounding errors: k_proj.bias has gradient 0
    expected = transformer.Transformer(training.model.config).double()
    expected.load_state_dict(training.model.state_dict())
    optimizer = torch.optim.AdamW(transformer.parameter_groups(expected, 0.2), betas=(0.9, 0.98), eps=1e-9)
    losses = []
    for step in (1, 2, 3):
        training.step(pairs)
        src = nn.utils.rnn.pad_sequence([torch.tensor(source) for source, _ in pairs], batch_first=True)
        tgt = nn.utils.rnn.pad_sequence([torch.tensor([1, *target]) for _, target in pairs], batch_first=True)
        logits = expected(src, tgt[:, :-1])
        loss = F.cross_entropy(logits.transpose(1, 2), tgt[:, 1:], ignore_index=0, label_smoothing=0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(expected.parameters(), 0.1) > 0.1
        for group in optimizer.param_groups:
            group["lr"] = 3.0 * transformer.noam_lr(step, 16, 7)
        optimizer.step()
    for ours, theirs in zip(training.model.parameters(), expected.parameters(), strict=True):
        check_close(ours, theirs, 1e-8)
    n_tokens = sum(len(target) for _, target in pairs)
    assert abs(training.progress["loss"] - sum(losses) * n_tokens) < 1e-6
    assert (
        training.progress["step"] == training.progress["batch"] == 3
        and training.progress["tokens"] == 3 * n_tokens
    )
    model, training.progress["seconds"] = training.model, 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", itertools.count().__next__)  # every product takes 1 s
        report = transformer.cost(training)
    n_encoder, n_decoder = (sum(p.numel() for p in x.parameters()) for x in (model.encoder, model.decoder))
    n_src, n_tgt = (s.epochs * sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    flops = 6 * (n_encoder * n_src + (n_decoder + model.output.weight.numel()) * n_tgt)
    assert report["gemm_gflops"] == 2.1
    assert report["mfu"] == pytest.approx(flops * 1e6 / (2 * 1024**3), rel=1e-6, abs=1e-3)
    seeds, training.s.seed = [], 1
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for _ in range(3):
        training.step(pairs)
    assert seeds == [1_000_003 + step for step in (3, 4, 5)], "dropout of its own in every step"


def test_transformer_average_and_losses(transformer_half_trained, tmp_path):
    """The final weights are the mean over the last epochs' ends; dev and train losses are per token."""
    _, tokenizer, corpus, trained = transformer_half_trained
    assert len(trained.history) == 2 and trained.history[1]["dev_loss"] < trained.history[0]["dev_loss"]
    pairs = [tuple(tokenizer.encode(text, 32) for text in pair) for pair in corpus.train[:60]]
    changes = dict(
        amp="off", device="cpu", d_model=8, d_ff=8, n_heads=1, n_layers=1, out=str(tmp_path), batch_tokens=200
    )
    for epochs, average, expected in ((4, 2, [2, 3]), (2, 5, [0, 1])):
        s = transformer.Settings(**changes, epochs=epochs, average=average)
        training = transformer.Training(s, tokenizer, pairs, pairs[:9])
        ends, end_epoch = [], training.end_epoch

        def recorded(ends=ends, end_epoch=end_epoch, model=training.model):
            ends.append({name: w.clone() for name, w in model.state_dict().items()})
            end_epoch()

        training.end_epoch = recorded
        training.run()
        for name, weight in training.model.state_dict().items():
            check_close(weight, torch.stack([ends[i][name] for i in expected]).mean(0), 1e-6, name)
    with torch.no_grad():
        losses = [(training.loss([pair], 0.0)[0].item(), len(pair[1])) for pair in pairs[:9]]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    training.s.batch_tokens = 25  # several batches, of unequal numbers of tokens
    assert abs(training.dev_loss() - expected) < 1e-5
    training.progress |= {"epoch": 1, "loss": math.nan, "tokens": 1}
    with pytest.raises(ValueError, match="lr-scale"):
        end_epoch()


def test_transformer_every_epoch_has_every_pair_once(transformer_half_trained, tmp_path):
    _, tokenizer, corpus, _ = transformer_half_trained
    pairs = [tuple(tuple(tokenizer.encode(text, 32)) for text in pair) for pair in corpus.train[:60]]
    s = transformer.Settings(amp="off", device="cpu", d_model=8, d_ff=8, n_heads=1, n_layers=1, epochs=3)
    s.out, s.batch_tokens = str(tmp_path), 100
    training = transformer.Training(s, tokenizer, [tuple(map(list, pair)) for pair in pairs], pairs[:2])
    epochs, step = [[], [], []], training.step

    def recorded(batch):
        epochs[training.progress["epoch"]].append([tuple(map(tuple, pair)) for pair in batch])
        step(batch)

    seen, loss = [], training.loss

    def noted(batch, smoothing):
        value, n = loss(batch, smoothing)
        if smoothing:  # a training batch
            seen.append((training.progress["epoch"] + 1, value.item() * n, n))
        return value, n

    training.step, training.loss = recorded, noted
    training.dev = [tuple(map(list, pair)) for pair in pairs[:2]]
    training.run()
    for row in training.history:
        sums, counts = zip(*((x, n) for epoch, x, n in seen if epoch == row["epoch"]), strict=True)
        assert abs(row["train_loss"] - sum(sums) / sum(counts)) < 1e-6
    for batch in itertools.chain(*epochs):
        assert len(batch) * max(len(side) for pair in batch for side in pair) <= 100 or len(batch) == 1
    assert [len(batch) for batch in transformer.token_batches([10] * 24, 120, "x")] == [12, 12]
    for batches in epochs:
        assert sorted(pair for batch in batches for pair in batch) == sorted(pairs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]  # in other batches each time
    assert training.progress["step"] == sum(map(len, epochs)) and len(training.history) == 3


def test_transformer_bf16_only_where_native(monkeypatch):
    def chosen(amp):
        return transformer.precision(transformer.Settings(device="cpu", amp=amp))

    for native, auto in ((False, "float32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert (chosen("auto"), chosen("bf16"), chosen("off")) == (auto, "bf16", "float32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # another architecture
    assert chosen("auto") == "float32"

    def auto(device):
        return transformer.precision(transformer.Settings(device=device))

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert auto("cuda:1") == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert (auto("cuda:1"), auto("mps")) == ("bf16", "float32")


def test_transformer_multi30k_name_needs_all_files(tmp_path, monkeypatch):
    folder, known = transformer_small_multi30k(tmp_path / "data"), {}
    for name in transformer.MULTI30K:
        text = gzip.decompress((folder / f"{name}.gz").read_bytes())
        known[name] = (40, len(text), hashlib.sha256(text).hexdigest())
    monkeypatch.setattr(transformer, "MULTI30K", known)
    assert transformer.multi30k_corpus(str(folder)).name == "multi30k"
    blanks = transformer_small_multi30k(tmp_path / "crlf", 41, val_en="a dog on the meadow\r\n" * 41)
    assert transformer.multi30k_corpus(str(blanks)).dev[0][1] == "a dog on the meadow"
    for name in list(known):
        monkeypatch.setitem(known, name, (41, 0, ""))
        assert transformer.multi30k_corpus(str(folder)).name == "own"
        monkeypatch.undo()
        monkeypatch.setattr(transformer, "MULTI30K", known)


def test_transformer_prepare_keeps_the_test_set_out(tmp_path, monkeypatch):
    corpus = transformer.Corpus("numbers", [("one", "eins")] * 4, [("two", "zwei")], [("six", "sechs")])
    monkeypatch.setattr(transformer, "number_corpus", lambda seed: corpus)
    s = transformer.settings_from_command_line([*TRANSFORMER_SMALL.split(), "--out", str(tmp_path)])
    training = transformer.prepare(s)[1]
    assert [training.tokenizer.decode(side) for pair in training.dev for side in pair] == ["two", "zwei"]


def test_transformer_edges():
    """What is just allowed, and just not."""
    assert b" one" in transformer.Tokenizer.train(["ONE ONE"] * 9, 300).vocabulary  # learns what encode makes
    assert [n for n, *_ in transformer.MULTI30K.values()] == [29_000, 29_000, 1_014, 1_014, 1_000, 1_000]
    assert transformer.noam_lr(1, 512, 1) == 512**-0.5
    assert transformer.greedy_decode(transformer_tiny(), torch.tensor([[3, 2]]), 1).shape == (1, 1)
    assert transformer.Tokenizer.train(["one"], 259).vocab_size == 259
    assert transformer.settings_from_command_line(["--smoothing", "0"]).smoothing == 0
    transformer.check_lines("x", ["hund"], "de", "en")  # no frequent word at all: no reason to refuse
    with pytest.raises(ValueError, match="language"):
        transformer.check_lines("x", ["A DOG ON THE MEADOW"], "de", "en")
    with pytest.raises(ValueError, match="dropout"):
        transformer.TransformerConfig(dropout=-0.5)
    for flag in ("--lr-scale", "--length-penalty"):
        with pytest.raises(ValueError, match=f"{flag} .*nan"):
            transformer.settings_from_command_line([flag, "nan"])


def test_transformer_checkpoint_files(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    content = {"kind": "model", "weights": torch.arange(1000.0), "vocabulary": [b"a", b"\xff"]}
    transformer.save(path, content)
    loaded = transformer.load(path, "model")
    assert torch.equal(loaded.pop("weights"), content["weights"]) and loaded == {
        "kind": "model",
        "vocabulary": [b"a", b"\xff"],
    }
    with pytest.raises(ValueError, match="isn't a checkpoint"):
        transformer.load(path, "checkpoint")
    whole = path.read_bytes()
    place = whole.index(torch.arange(500.0, 510.0).numpy().tobytes())
    for damaged in (whole[:-100], whole[:place] + b"\x01" + whole[place + 1 :], b"", b"junk" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x.pt"):
            transformer.load(path, "model")

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was run"),))

    torch.save({"kind": "model", "code": Code()}, path)
    with pytest.raises(ValueError, match="x.pt"):
        transformer.load(path, "model")
    assert not (tmp_path / "was run").exists()

    path.write_bytes(whole)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        transformer.save(path, content)
    assert path.read_bytes() == whole


TRANSFORMER_KILLED = """
import os, signal, sys
import torch, transformer

corpus = transformer.number_corpus
transformer.number_corpus = lambda seed: corpus(seed, 300, 20, 10)
place, n = sys.argv.pop(1), int(sys.argv.pop(1))  # kill -9 at the n-th call of place
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
transformer.main()
"""


TRANSFORMER_SMALL = (
    "--epochs 3 --d-model 16 --d-ff 16 --n-layers 1 --dropout 0.2 --save-every 3 --vocab-size 400"
)
TRANSFORMER_SMALL += " --batch-tokens 400 --amp off"


def transformer_run(monkeypatch, out, *arguments):
    """What the script does, in this process and on a small corpus. Returns the report."""
    out.mkdir(exist_ok=True)
    s = transformer.settings_from_command_line([*TRANSFORMER_SMALL.split(), "--out", str(out), *arguments])
    corpus = transformer.number_corpus(s.seed, 300, 20, 10)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "number_corpus", lambda seed: corpus)
        return transformer.train_and_evaluate(s)


def test_transformer_kill_and_go_on(tmp_path, monkeypatch, capsys):
    undisturbed = transformer_run(monkeypatch, tmp_path / "a")
    assert undisturbed["steps"] > 12
    out = tmp_path / "b"
    # in the 5th step, 2 after a checkpoint; while the next one is written; before one is moved into place
    for place, n in (("step", 5), ("written", 1), ("moved", 2)):
        command = [
            sys.executable,
            "-c",
            TRANSFORMER_KILLED,
            place,
            str(n),
            "--out",
            str(out),
            *TRANSFORMER_SMALL.split(),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, (killed.returncode, killed.stderr)
        assert not (out / "model.pt").exists() and (out / "checkpoint.pt").exists()
        if place != "step":
            assert (out / "checkpoint.pt.part").exists()  # what was in the making, beside the good one
    resumed = transformer_run(monkeypatch, out)
    assert "going on after step 6" in capsys.readouterr().out
    models = [transformer.load(folder / "model.pt", "model")["model"] for folder in (tmp_path / "a", out)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    for key in ("history", "searches", "steps"):
        assert undisturbed[key] == resumed[key]
    again = transformer_run(monkeypatch, out, "--save-every", "50")  # a setting that may change
    assert (
        "training was finished after step" in capsys.readouterr().out
        and again["searches"] == resumed["searches"]
    )
    with pytest.raises(ValueError, match="lr_scale=0.4, not 0.7"):
        transformer_run(monkeypatch, out, "--lr-scale", "0.7")
    different = transformer_run(monkeypatch, tmp_path / "c", "--seed", "1", "--epochs", "1")
    assert different["history"][0] != undisturbed["history"][0]


# ---- the script


def test_transformer_settings(capsys):
    def read(*argv):
        return transformer.settings_from_command_line(list(argv))

    assert read().preset == "numbers" and read().d_model == transformer.Settings().d_model
    multi30k = read("--preset", "multi30k", "--epochs", "3", "--no-tied")
    assert (multi30k.epochs, multi30k.dropout, multi30k.tied) == (
        3,
        0.3,
        False,
    ) and multi30k.out != read().out
    for argv, words in (
        (("--epochs", "0"), "--epochs"),
        (("--lr-scale", "-1"), "--lr-scale"),
        (("--smoothing", "1"), "--smoothing"),
        (("--data", "x"), "--preset multi30k"),
        (("--device", "nonsense"), "--device nonsense"),
        (("--device", "meta"), "--device meta"),
    ):
        with pytest.raises(ValueError, match=words):
            read(*argv)
    assert math.copysign(1, read("--length-penalty", "-0.0").length_penalty) == 1  # its name in the table
    for argv in (
        ("--epoch", "3"),
        ("--wrong", "1"),
        ("--preset", "french"),
        ("--amp", "fp8"),
        ("--epochs", "many"),
    ):
        with pytest.raises(SystemExit) as exit:
            read(*argv)
        assert exit.value.code == 2
    with pytest.raises(SystemExit):
        read("--preset", "multi30k", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(
        f"(default: {value})" in text for value in (transformer.PRESETS["multi30k"]["vocab_size"], 0.3)
    )


@pytest.fixture(scope="module")
def transformer_demo(tmp_path_factory):
    """The default run, as a user starts it."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_script("transformer.py", cwd=folder, timeout=240)


def test_transformer_demo(transformer_demo):
    folder, result = transformer_demo
    report = last_json(result)
    out = folder / "out" / "transformer"
    assert report == json.loads((out / "report.json").read_text())
    first = result.stdout.splitlines()[:2]
    assert "seed=0" in first[0] and "precision=" in first[0] and first[1].startswith("torch=")
    assert report["dataset"] == "numbers" and report["beam"] >= 0.98 and report["greedy"] >= 0.98
    for key in (
        "seconds",
        "train_seconds",
        "torch",
        "threads",
        "cpu",
        "gemm_gflops",
        "mfu",
        "settings",
        "search_errors",
    ):
        assert key in report
    assert result.stdout.count("\n  source ") == min(5, round((1 - report["beam"]) * 1000))
    assert 0 < report["train_seconds"] < report["seconds"] < 240 and report["cache_speedup"] > 1
    assert report["searches"]["greedy"]["cut_off"] <= 20
    assert (out / "alignment.png").read_bytes()[:4] == b"\x89PNG" and not list(out.glob("*.part"))
    rows = list(report["searches"].values())
    assert rows[1]["log_prob"] >= rows[0]["log_prob"] - 1e-4 and rows[1]["n_tokens"] <= rows[-1]["n_tokens"]


def test_transformer_alignment_swaps_tens_and_units(transformer_demo):
    """In the demo's model, "zwei und vierzig" looks at "two" before it looks at "forty"."""
    last_json(transformer_demo[1])
    saved = transformer.load(transformer_demo[0] / "out" / "transformer" / "model.pt", "model")
    model = transformer.Transformer(transformer.TransformerConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    tokenizer = transformer.Tokenizer(saved["vocabulary"])
    right = total = 0
    for units, tens in itertools.product(range(2, 10), range(2, 10)):
        n = 517_000 + 10 * tens + units
        source = tokenizer.encode(transformer.english_number(n), 32)
        target = tokenizer.encode(transformer.german_number(n), 32)
        src, tgt = torch.tensor([source]), torch.tensor([[1, *target[:-1]]])
        weights = transformer.cross_attention_weights(model, src, tgt)
        assert weights.shape == (2, 1, 4, len(target), len(source))
        check_close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-5)
        looked_at = weights[-1, 0].mean(0).argmax(-1)  # (Tt,)
        at_units, at_tens = looked_at[-4].item(), looked_at[-2].item()  # ... units und tens EOS
        right += at_units > at_tens
        total += 1
    assert right / total > 0.9, right / total


def test_transformer_translate(transformer_demo, tmp_path, monkeypatch, capsys):
    last_json(transformer_demo[1])
    folder = transformer_demo[0]
    one = run_script("transformer.py", "--translate", "Three hundred and forty-two thousand", cwd=folder)
    row = last_json(one)
    assert row["text"] == "dreihundert zwei und vierzig tausend" and row["finished"] is True
    assert (
        row["source"] == "Three hundred and forty-two thousand"
        and row["n_tokens"] == 6
        and -3 < row["log_prob"] < 0
    )
    lines = "one hundred thousand\n\nfive thousand and seventeen\n東京\n"
    command = [sys.executable, str(ROOT / "transformer.py"), "--translate", "-"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    many = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True, env=environment)
    assert "fünf tausend siebzehn" in many.stdout
    rows = [json.loads(line) for line in many.stdout.splitlines()]
    assert [r["text"] for r in rows[:3]] == ["einhundert tausend", "", "fünf tausend siebzehn"] and len(
        rows
    ) == 4
    monkeypatch.chdir(folder)
    for text, words in (("nine " * 40, "max_len=32"), ("nine " * 31, None), ("", None)):
        s = transformer.settings_from_command_line(["--translate", text])
        if words:
            with pytest.raises(ValueError, match=words):
                transformer.translate_command(s)
        else:
            transformer.translate_command(s)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == ""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="train first"):
        transformer.translate_command(s)


def test_transformer_script_errors(tmp_path):
    (tmp_path / "file").write_text("")
    check_one_line_error(run_script("transformer.py", "--out", "file/below", cwd=tmp_path), "file/below")
    (tmp_path / "out" / "transformer").mkdir(parents=True)
    (tmp_path / "out" / "transformer" / "checkpoint.pt").write_bytes(b"no checkpoint")
    check_one_line_error(run_script("transformer.py", cwd=tmp_path), "checkpoint.pt", "damaged")
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    missing = run_script("transformer.py", "--out", "new", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    check_one_line_error(missing, "matplotlib is missing")  # before any work
    assert "pairs; vocabulary" not in missing.stdout


def test_transformer_multi30k_run(tmp_path, capsys):
    """The Multi30k path from files to BLEU and --translate, on a corpus that can be learned by heart."""
    data = transformer_small_multi30k(tmp_path / "data", n=12)
    settings = (
        "--preset multi30k --epochs 30 --d-model 32 --d-ff 32 --n-layers 1 --dropout 0 --vocab-size 400"
    )
    arguments = [
        *settings.split(),
        "--warmup",
        "40",
        "--amp",
        "off",
        "--data",
        str(data),
        "--out",
        str(tmp_path),
    ]
    report = transformer.train_and_evaluate(transformer.settings_from_command_line(arguments))
    assert report["dataset"] == "own" and report["measure"] == "bleu" and "case:lc" in report["signature"]
    assert report["beam"] > 50, report["beam"]
    s = transformer.settings_from_command_line(
        ["--out", str(tmp_path), "--translate", "EIN MANN mit dem Hund"]
    )
    transformer.translate_command(s)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"].startswith("a man")


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
script.hardware = lambda p: {"processes": p.world, "gemm_gflops": 1.0}
def no_network(*_):
    raise OSError("no network")
matplotlib.pyplot.Figure.savefig = lambda *_, **__: None
def run():
    script.exit_now(script.main(tyro.cli(script.Settings)))
gc.collect()
gc.freeze()  # a rank's collections don't walk through torch, nor copy its pages
for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in job["ranks"]:
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{job['log']}.{rank}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            os.environ.update(job["env"])
            if job["world"] > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]))
            sys.argv = [sys.argv[2] + ".py", *job["arguments"][rank]]
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


@contextlib.contextmanager
def beside_other_tests(request, name: str, run):
    """run() as a future that starts now, if a test or fixture of this name is asked for: long waits pass
    meanwhile."""
    asked_for = any(name in (item.name, *item.fixturenames) for item in request.session.items)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run) if asked_for else None


# Rows of the parameters divide neither by 4 nor all by 2, batches neither: every slice and part is uneven.
TINY = "--steps 20 --batch-size 13 --max-len 21 --d-model 18 --n-heads 2 --n-layers 2 --warmup 3".split()
TINY += "--lr 3e-3 --eval-every 10 --save-every 0 --timeout 40".split()
KILLS = int(os.environ.get("KILLS", 3))  # KILLS=20 KILL_SEED=7: a longer search, and which
KILL_SEED = int(os.environ.get("KILL_SEED", time.time()))
CPU = torch.device("cpu")


def saved(out: Path) -> list[Path]:
    """Checkpoints of either script, oldest first."""
    return sorted(p for p in out.glob("step_*") if not p.name.endswith((".part", ".damaged")))


def ddp_newest(out: Path) -> str:
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


def by_hand(module, s) -> tuple[Tensor, Tensor]:
    """The same training as a plain loop over whole batches: the weights and the losses of the steps, which
    all ways of splitting the batches must give."""
    (inputs, targets), _ = train_ddp.load_manual(s.max_len)
    torch.manual_seed(s.seed)
    model = module.GPT(s.d_model, s.n_heads, s.n_layers, s.max_len).to(getattr(torch, s.dtype))
    if module is train_fsdp:
        module.initialise(model, s.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=1.0)
    losses = []
    for step in range(s.steps):
        warm = (step + 1) / s.warmup if step < s.warmup else 1.0
        half = math.pi * max(0, step - s.warmup) / (s.steps - s.warmup)
        rows = train_ddp.rows_of_step(step, len(inputs), s.batch_size, s.seed)
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


@pytest.fixture(scope="module", params=["train_ddp", "train_fsdp"])
def trainer(request, tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp(request.param), request.param)
    yield launcher
    launcher.end()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("ddp"), "train_ddp")
    yield launcher
    launcher.end()


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("fsdp"), "train_fsdp")
    yield launcher
    launcher.end()


def elastic(folder: Path) -> tuple[list[float], list[str]]:
    """The losses of a run on 1, 2, 1 and 2 nodes, and its arguments."""
    arguments = [*TINY, "--dtype", "float64", "--steps", "100000", "--save-every", "20"]
    arguments += ["--eval-every", "9999"]
    node = "--nnodes=1:2 --nproc_per_node=1 --max-restarts=9 --rdzv_backend=c10d --rdzv_id=test".split()
    node += ["--rdzv_endpoint=127.0.0.1:" + str(free_port())]
    node += ["--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"]
    out, agents = folder / "elastic", []

    def add_node() -> None:
        variable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = (ROOT / "train_ddp.py", *arguments, "--out", str(out))
        agents.append(torchrun(*command, node=node, cwd=folder, **variable))

    def step() -> int:
        return int(ddp_newest(out)[5:13] or 0)

    def starts(processes: int) -> int:
        return sum(log.read_text().count(f"processes={processes} ") for log in folder.glob("agent*.log"))

    def steps_with(processes: int, n_starts: int) -> None:
        wait_until(lambda: starts(processes) == n_starts, 60, f"{processes} node(s)")
        reached = step()
        wait_until(lambda: step() > reached + 20, 60, f"steps with {processes} node(s)")

    try:
        add_node()
        steps_with(1, 1)
        add_node()
        steps_with(2, 1)
        kill_with_children(agents[1])
        steps_with(1, 2)
        add_node()
        steps_with(2, 2)
    finally:
        for agent in agents:
            kill_with_children(agent)
    return train_ddp.load_checkpoint(out)["losses"], arguments


@pytest.fixture(scope="module")
def elastic_begun(request, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp("elastic"), "test_main_elastic_on_one_node_and_on_two_again"
    with beside_other_tests(request, name, functools.partial(elastic, folder)) as losses:
        yield losses


class TestTraining:
    """Both scripts: what is parametrized with `trainer` starts processes of one or the other."""

    # ---- oracle: the model, the data, the schedule

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_gpt_equals_torch_layers(self, module):
        """Values and gradients of the whole model against nn.TransformerEncoder, in float64."""
        model = module.GPT(d_model=24, n_heads=3, n_layers=2, max_len=20).double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
        oracle = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(24), enable_nested_tensor=False).double()
        names = {"qkv_proj.": "self_attn.in_proj_", "out_proj.": "self_attn.out_proj."}
        names |= {"self_attention_norm.": "norm1.", "ffn_norm.": "norm2."}
        names |= {"ffn.0.": "linear1.", "ffn.2.": "linear2."}
        pairs = {"norm.weight": oracle.norm.weight, "norm.bias": oracle.norm.bias}
        for i, theirs in enumerate(oracle.layers):
            for ours, name in names.items():
                for kind in ("weight", "bias"):
                    pairs[f"blocks.{i}.{ours}{kind}"] = dict(theirs.named_parameters())[name + kind]
        own = dict(model.named_parameters())
        assert set(own) == set(pairs) | {"embedding.weight", "position.weight"}
        for name, theirs in pairs.items():
            theirs.data = own[name].detach().clone()
        tokens = torch.randint(256, (4, 17))
        table = model.embedding.weight.detach().clone().requires_grad_()
        mask = nn.Transformer.generate_square_subsequent_mask(17, dtype=torch.float64)
        x = (model.embedding.weight[tokens] + model.position.weight[:17]).detach()
        expected = oracle(x, mask=mask, is_causal=True) @ table.T
        logits = model(tokens)
        check_close(logits, expected, 1e-10, "logits")
        logits.square().sum().backward()
        expected.square().sum().backward()
        for name, theirs in pairs.items():
            check_close(own[name].grad, theirs.grad, 1e-10, name)

    def test_gpt_is_causal_and_drops_out_in_training_alone(self):
        model = train_ddp.GPT(16, 2, 2, max_len=12, dropout=0.5).double().eval()
        tokens = torch.randint(256, (2, 12))
        before = model(tokens)
        for place in range(12):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 256
            difference = (model(changed) - before).abs().amax(-1)  # (B, T)
            assert (difference[:, :place] == 0).all()
            assert (difference[:, place] > 0).all()
        noisy = []
        for module in (train_ddp, train_fsdp):
            other = module.GPT(16, 2, 2, 12, dropout=0.5).double()
            other.load_state_dict(model.state_dict())
            torch.manual_seed(3)
            noisy.append(other(tokens))
        assert torch.equal(*noisy) and not torch.equal(noisy[0], before)

    def test_initialise_depends_on_seed_and_name_alone(self):
        """GPT-2's start weights in both scripts; train_fsdp.py's don't depend on the model around them."""
        torch.manual_seed(0)
        models = {"ddp": train_ddp.GPT(64, 4, 8, 128)}
        for key, (n_layers, seed) in {"a": (8, 0), "b": (8, 0), "deeper": (9, 0), "other": (8, 1)}.items():
            models[key] = train_fsdp.GPT(64, 4, n_layers, 128)
            train_fsdp.initialise(models[key], seed)
        models["double"] = train_fsdp.GPT(64, 4, 8, 128).double()
        train_fsdp.initialise(models["double"], 0)
        a, b, other, deeper, double, ddp = (
            dict(models[key].named_parameters()) for key in ("a", "b", "other", "deeper", "double", "ddp")
        )
        for name, p in a.items():
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
        assert not torch.equal(a["blocks.0.qkv_proj.weight"], a["blocks.1.qkv_proj.weight"])

    @pytest.mark.parametrize("max_len", [7, 32, 128])
    def test_load_manual_has_every_byte_as_a_target_once(self, max_len):
        from pydoc_data.topics import topics

        texts = sorted(set(topics.values()))
        assert len(texts) > 50
        train, dev = train_ddp.load_manual(max_len)
        for ours, theirs in zip(
            [*train, *dev], itertools.chain(*train_fsdp.load_manual(max_len)), strict=True
        ):
            assert torch.equal(ours, theirs)
        learnt = [t for i, t in enumerate(texts) if i % 10 != 9]
        for (inputs, targets), expected in ((dev, texts[9::10]), (train, learnt)):
            real = targets != -100
            assert inputs.shape == targets.shape == (len(inputs), max_len) and inputs.min() >= 0
            assert bytes(targets[real].tolist()) == "".join(expected).encode()
            assert torch.equal(inputs[:, 1:][real[:, 1:]], targets[:, :-1][real[:, 1:]]), "inputs lag by one"
            assert (real[:, 1:] <= real[:, :-1]).all() and real[:, 0].all(), "the end alone is filled up"
            starts = torch.tensor([0, *(len(text.encode()) for text in expected[:-1])]).cumsum(0)
            assert (inputs[real][starts] == 10).all(), "a text starts from a line's end"
        assert ((train[1] != -100).sum(1) < max_len).sum() > 20, "rows of unequal length"

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_rows_of_step_is_an_endless_row_of_shuffles(self, module):
        for n, batch_size in ((10, 3), (7, 7), (5, 12), (100, 32)):
            rows = torch.cat([module.rows_of_step(step, n, batch_size, seed=4) for step in range(3 * n)])
            epochs = rows[: len(rows) // n * n].view(-1, n)
            assert len(rows) == 3 * n * batch_size
            assert (epochs.sort(dim=1).values == torch.arange(n)).all()
            assert n < 6 or len(epochs[:4].unique(dim=0)) == min(4, len(epochs))
            again = module.rows_of_step(2, n, batch_size, 4)
            assert torch.equal(again, rows[2 * batch_size : 3 * batch_size])
        assert not torch.equal(module.rows_of_step(0, 100, 32, 5), module.rows_of_step(0, 100, 32, 4))

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_micro_batches_give_each_row_to_one_rank_once(self, module):
        """And say how many tokens the whole batch has, on every rank and in every micro-batch."""
        targets = torch.arange(40).repeat_interleave(3).view(40, 3)
        targets[::7, 1:] = -100
        text = (torch.arange(40)[:, None].expand(40, 3), targets)
        s = module.Settings(batch_size=11, accumulate=2, seed=5)
        ranks = [module.micro_batches(text, 6, s, module.Processes(rank, 3, CPU)) for rank in range(3)]
        for step in range(6, 12):
            parts = [next(rank) for rank in ranks for _ in range(2)]
            rows = torch.cat([x[:, 0] for x, _, _ in parts])
            expected = module.rows_of_step(step, 40, 11, 5)
            assert torch.equal(rows.sort().values, expected.sort().values) and all(
                len(x) for x, _, _ in parts
            )
            assert {n for _, _, n in parts} == {(targets[expected] != -100).sum().item()}
            for x, y, _ in parts:
                assert torch.equal(targets[x[:, 0]], y)

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_warmup_cosine(self, module):
        rates = [module.warmup_cosine(step, 10, 30) for step in range(30)]
        assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert rates[10] == 1 and rates[20] == pytest.approx(0.5) and 0 < rates[29] < 0.01
        assert rates[10:] == sorted(rates[10:], reverse=True)
        for step, warmup, total, rate in ((0, 0, 5, 1), (10, 10, 10, 0), (99, 3, 10, 0), (1, 50, 4, 0.5)):
            assert module.warmup_cosine(step, warmup, total) == rate

    def test_make_optimizer_decays_matrices_alone(self):
        for module, more in ((train_ddp, [CPU]), (train_fsdp, [])):
            model = module.GPT(16, 2, 1, 8)
            optimizer = module.make_optimizer(model, module.Settings(lr=0.5, weight_decay=0.3), *more)
            decay = {
                id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
            }
            assert len(decay) == len(list(model.parameters())) and optimizer.defaults["lr"] == 0.5
            for name, p in model.named_parameters():
                assert decay[id(p)] == (0.3 if p.ndim == 2 else 0.0), name

    def test_evaluate_is_the_mean_over_real_tokens(self):
        alone, autocast = train_ddp.Processes(0, 1, CPU), torch.autocast("cpu", enabled=False)
        _, (inputs, targets) = train_ddp.load_manual(32)
        model = train_ddp.GPT(16, 2, 1, 32, dropout=0.5)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
        plain = train_ddp.GPT(16, 2, 1, 32)
        plain.load_state_dict(model.state_dict())
        for n in (99, 64, 1):
            x, y = inputs[-n:], targets[-n:]
            expected = F.cross_entropy(plain(x).flatten(0, 1), y.flatten()).item()
            assert train_ddp.evaluate(model, (x, y), autocast, alone) == pytest.approx(expected, rel=1e-6)
            assert model.training

    def test_generate_goes_on_past_max_len(self):
        class Alternates(nn.Module):
            """Sure of "ab" again and again; of nothing while it trains."""

            max_len, widest = 8, 0

            def forward(self, tokens: Tensor) -> Tensor:
                Alternates.widest = max(Alternates.widest, tokens.shape[1])
                following = torch.where(tokens == ord("a"), ord("b"), ord("a"))
                return (not self.training) * 50.0 * F.one_hot(following, 256)

        assert train_ddp.generate(Alternates(), "xa", 12, CPU, temperature=0.02) == "xa" + "ba" * 6
        assert Alternates.widest == 7  # one less than max_len, see there
        assert "\x1b" not in train_ddp.generate(Alternates(), "\x1b[2J\nxa", 2, CPU)

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
        """Float32, with dropout too: its masks belong to a part of the batch, not to a process."""
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
        for clip in ("0", "1e9", "0.01"):
            trainer.run(1, *TINY, "--steps", "4", "--clip", clip, "--out", str(tmp_path / clip))
        a, b, c = (final_weights(tmp_path / clip) for clip in ("0", "1e9", "0.01"))
        assert torch.equal(a, b) and not torch.equal(a, c)

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
print(json.dumps([len(sent), seeds]))
"""
        arguments = [*TINY, "--steps", "4", "--accumulate", "3", "--seed", str(2**32 - 1)]
        results = trainer.run(2, *arguments, "--out", str(tmp_path), code=code)
        sent, seeds = zip(*(json.loads(r.stdout.splitlines()[-1]) for r in results), strict=True)
        assert sent == (4, 4)
        seeds = [
            [n for n in of_rank if n > 2**32] for of_rank in seeds
        ]  # but those of generate and the model
        assert len(set(sum(seeds, []))) == 4 * 3 * 2, "dropout of its own in each part of each step"
        assert {n // 4_096 // 1_000_003 for n in sum(seeds, [])} == {2**32 - 1}, "and no other seed's"

    def test_compile_saves_a_plain_state_dict(self, trainer, tmp_path):
        """torch's "eager" backend stands for the compiler; going on without --compile gives the same."""
        code = """
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: print("compiled") or compile(self, backend="eager")
run()
"""
        arguments = [*TINY, "--steps", "4", "--save-every", "2", "--out"]
        trainer.run(1, *arguments, str(tmp_path / "plain"))
        done = trainer.run(2, *arguments, str(tmp_path / "compiled"), "--compile", code=code)[0]
        assert (
            "compiled" in done.stdout
            and distance_of_weights(tmp_path / "compiled", tmp_path / "plain") < 1e-5
        )
        state = torch.load(tmp_path / "compiled/final.pt", weights_only=True)
        assert state.keys() == train_ddp.GPT(18, 2, 2, 21).state_dict().keys()
        (tmp_path / "compiled/final.pt").unlink()
        saved(tmp_path / "compiled")[-1].rename(tmp_path / "removed")
        assert "from_step=2" in trainer.run(1, *arguments, str(tmp_path / "compiled"))[0].stdout
        assert distance_of_weights(tmp_path / "compiled", tmp_path / "plain") < 1e-5

    def test_wrap_data_parallel_is_the_plain_model_on_a_cpu(self, ddp, tmp_path, monkeypatch):
        for name, more in {"plain": [], "dp": ["--data-parallel"]}.items():
            ddp.run(1, *TINY, "--steps", "4", *more, "--out", str(tmp_path / name))
        assert torch.equal(final_weights(tmp_path / "plain"), final_weights(tmp_path / "dp"))
        monkeypatch.setattr(nn, "DataParallel", lambda model: "copies")  # as on a machine with GPUs
        gpu, model = train_ddp.Processes(0, 1, torch.device("cuda:0")), nn.Linear(2, 2)
        assert train_ddp.wrap(model, gpu) is model and train_ddp.wrap(model, gpu, True) == "copies"

    # ---- properties: shards

    def test_clip_gradients_both_ways(self):
        for largest in (0.01, 1.0, 100.0, math.inf):
            for exact in (False, True):
                torch.manual_seed(1)
                model = nn.Linear(30, 40)
                model(torch.randn(5, 30)).square().sum().backward()
                before = torch.cat([p.grad.flatten() for p in model.parameters()])
                norm = train_fsdp.clip_gradients(model, largest, exact)
                after = torch.cat([p.grad.flatten() for p in model.parameters()])
                check_close(norm, before.norm(), 1e-5, "norm")
                check_close(after, before * min(1.0, largest / before.norm()), 1e-5, f"{largest} {exact}")

    def test_shard_each_rank_holds_its_slices_and_no_more(self, fsdp, tmp_path):
        """1/N of weights, gradients and moments, of a replica with HSDP, as the report counts them."""
        model = train_ddp.GPT(18, 2, 2, 21)
        n_all = sum(p.numel() for p in model.parameters())
        for world, replicate in ((2, 1), (4, 1), (4, 2)):
            out = tmp_path / f"{world}x{replicate}"
            arguments = [*TINY, "--steps", "2", "--replicate", str(replicate), "--out", str(out)]
            stdout = fsdp.run(world, *arguments)[0].stdout
            report, shards = json_of(out / "report.json"), world // replicate
            assert report["n_parameters"] == n_all
            all_of_it = {"weights": 4 * n_all, "gradients": 4 * n_all, "moments": 8 * n_all}
            assert report["held"]["all"] == all_of_it
            for rank in range(world):
                chunks = [p.chunk(shards) for p in model.parameters()]
                n = sum(c[rank % shards].numel() for c in chunks if rank % shards < len(c))
                held = report["held"][f"rank {rank}"]
                assert held.pop("peak") > 50e6
                assert held == {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n}
                assert n <= n_all / shards * 1.05 and f"rank {rank}   {4 * n / 2**20:12,.3f}" in stdout

    def test_shard_gathers_one_block_at_a_time(self, fsdp):
        """While a block computes it is whole, and the others are in slices; the whole model is never made."""
        code = """
from torch.distributed.tensor import DTensor, Shard
largest, randn = [], torch.randn
torch.randn = lambda *a, **k: largest.append(randn(*a, **k)) or largest[-1]
p = script.start_processes("cpu", 30)
s = script.Settings(d_model=16, n_heads=2, n_layers=3, max_len=8)
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

    def test_evaluate_sharded_when_ranks_run_out_of_rows(self, fsdp):
        """194 rows on three ranks: two are left for the last forward; the third counts nothing."""
        code = """
p = script.start_processes("cpu", 30)
model = script.sharded_model(script.Settings(d_model=16, n_heads=2, n_layers=1, max_len=8, dropout=0.5), p)
_, (inputs, targets) = script.load_manual(8)
print(script.evaluate(model, (inputs[-194:], targets[-194:]), p), model.training)
"""
        results = fsdp.run(3, code=code)
        model = train_fsdp.GPT(16, 2, 1, 8)
        train_fsdp.initialise(model, 0)
        _, (inputs, targets) = train_ddp.load_manual(8)
        expected = F.cross_entropy(model(inputs[-194:]).flatten(0, 1), targets[-194:].flatten()).item()
        for result in results:
            loss, training = result.stdout.split()
            assert float(loss) == pytest.approx(expected, rel=1e-6) and training == "True"

    # ---- properties: checkpoints

    def test_save_checkpoint_keeps_the_last_and_leaves_no_parts(self, tmp_path):
        folder = tmp_path / "new/folder"
        for attempt in range(6):  # of one step: the names' order is that of their sha256
            train_ddp.save_checkpoint(folder, 1, {"attempt": attempt})
            assert train_ddp.load_checkpoint(folder) == {"attempt": attempt}
        assert len(list(folder.iterdir())) == 1
        others = [folder / f"step_{name}.pt" for name in ("1", "00000009", "00000009.ab", "best")]
        others += [folder / "video.part"]
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

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
    def test_load_checkpoint_damaged_is_reported_and_the_one_before_taken(self, damage, tmp_path, capsys):
        for step in (1, 2):
            path = train_ddp.save_checkpoint(tmp_path, step, {"step": step, "weights": torch.arange(99.0)})
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= damage == "flip"
        path.write_bytes(data[: {"flip": None, "truncate": len(data) // 2, "empty": 0}[damage]])
        for said in (str(path), ""):  # the second time nothing is left to report
            assert train_ddp.load_checkpoint(tmp_path)["step"] == 1
            err = capsys.readouterr().err
            assert said in err and bool(err) == bool(said)
        assert len(list(tmp_path.glob("*.damaged"))) == 1

    def test_load_checkpoint_runs_no_code(self, tmp_path):
        data = pickle.dumps({"step": EvilPickle(tmp_path / "ran")}, protocol=2)
        (tmp_path / f"step_00000001.{hashlib.sha256(data).hexdigest()}.pt").write_bytes(data)
        with contextlib.suppress(Exception):
            train_ddp.load_checkpoint(tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("where", ["metadata", "bytes"])
    def test_load_tensors_runs_no_code(self, where, tmp_path):
        """Neither from .metadata nor from an entry that .metadata calls an object's."""
        import torch.distributed.checkpoint as dcp

        tensors = {"a": torch.zeros(3)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what = {"a": EvilPickle(tmp_path / "ran")} if where == "bytes" else tensors
            dcp.save(what, checkpoint_id=tmp_path / "c")
            (tmp_path / "ran").unlink(missing_ok=True)
            if where == "metadata":
                (tmp_path / "c/.metadata").write_bytes(pickle.dumps(EvilPickle(tmp_path / "ran")))
            with pytest.raises(OSError):
                train_fsdp.load_tensors(tmp_path / "c", tensors)
        assert not (tmp_path / "ran").exists()
        for name in (b"load", b"os.system"):
            with pytest.raises(pickle.UnpicklingError):
                train_fsdp.MetadataUnpickler(io.BytesIO(b"\x80\x04ctorch\n" + name + b"\n.")).load()

    def test_write_atomically_two_writers_and_a_full_disk(self, tmp_path):
        """Readers see one writer's bytes or the other's, and what can't be written leaves nothing behind."""
        path = tmp_path / "file"
        texts = [letter * 200_000 for letter in (b"a", b"b")]
        path.write_bytes(texts[0])
        stop = time.monotonic() + 1

        def write(text: bytes) -> None:
            while time.monotonic() < stop:
                train_ddp.write_atomically(path, text)

        with ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write, text) for text in texts]
            while time.monotonic() < stop:
                assert path.read_bytes() in texts
        for writer in writers:
            writer.result()
        code = f"""
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import train_ddp
folder = Path({str(tmp_path)!r})
train_ddp.save_checkpoint(folder, 1, {{"step": 1, "w": torch.zeros(100)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    train_ddp.save_checkpoint(folder, 2, {{"step": 2, "w": torch.zeros(100_000)}}, keep=1)
except OSError as error:
    print("OSError", train_ddp.load_checkpoint(folder)["step"])
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.stdout == "OSError 1\n", result
        assert sorted(p.name[:13] for p in tmp_path.iterdir()) == ["file", "step_00000001"]

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
    optimizer = script.make_optimizer(model, s)
    tensors = script.state_tensors(model, optimizer)
    script.load_tensors(path, tensors, p)
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(name.encode() + script.full_tensor(value).numpy().tobytes())
    return sha.hexdigest(), len(tensors)
"""
        arguments = [*TINY, "--save-every", "10", "--out", str(tmp_path / "a")]
        fsdp.run(2, *arguments)
        path = saved(tmp_path / "a")[-1]
        code = digest + "p = script.start_processes('cpu', 30)\n"
        code += f"print(*digest(p, Path({str(path)!r}), tyro.cli(script.Settings)))"
        found = [fsdp.run(world, *arguments, code=code)[0].stdout for world in (2, 1, 4)]
        found += [fsdp.run(4, *arguments, "--replicate", "2", code=code)[0].stdout]
        scope, s = {"script": train_fsdp}, settings_of(train_fsdp, *arguments)
        exec(digest, scope)
        model = train_fsdp.GPT(18, 2, 2, 21)
        optimizer = train_fsdp.make_optimizer(model, s)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is disabled": so it is meant
            found += [" ".join(map(str, scope["digest"](None, path, s))) + "\n"]
            train_fsdp.load_tensors(path, train_fsdp.state_tensors(model, optimizer))
        n_parameters = len(list(model.parameters()))
        assert len(set(found)) == 1 and found[0].split()[1] == str(4 * n_parameters), found
        assert all(v["step"] == 20 and v["exp_avg_sq"].max() > 0 for v in optimizer.state.values())
        final = torch.load(tmp_path / "a/final.pt", weights_only=True)
        assert final.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in final.items())
        table = safetensors.torch.load_file(tmp_path / "a/final.safetensors")
        assert final.keys() == table.keys() and all(torch.equal(final[name], table[name]) for name in final)
        files = set(json_of(path / "manifest.json")["files"])
        assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert {p.name for p in path.iterdir()} == files | {"manifest.json"}, "a checksum covers each"

    def test_newest_checkpoint_is_an_undamaged_one(self, fsdp, tmp_path):
        """Whichever rank finds the damage, on another number of ranks too: reported, renamed, and training
        goes on from the one before to the same end."""
        arguments = [*TINY, "--save-every", "8", "--exact", "--out"]
        fsdp.run(2, *arguments, str(tmp_path / "whole"))
        (tmp_path / "whole/report.json").unlink()
        files = {"missing": "__1_0.distcp", "truncated": "__1_0.distcp", "altered": "__0_0.distcp"}
        files |= {"altered metadata": ".metadata"}
        files |= {"altered manifest": "manifest.json", "missing manifest": "manifest.json"}
        newest = {}
        for damage, name in files.items():
            shutil.copytree(tmp_path / "whole", tmp_path / damage)
            newest[damage] = saved(tmp_path / damage)[-1]
            file = newest[damage] / name
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 4 * ("altered" in damage)
            file.write_bytes(data[:-1] if damage == "truncated" else data)
            if "missing" in damage:
                file.unlink()
        for damage, world in {"truncated": 1, "missing": 2}.items():  # trained to the end
            results = fsdp.run(world, *arguments, str(tmp_path / damage))
            assert f"{newest[damage]} is damaged ({files[damage]} missing or altered)" in results[0].stderr
            assert "from_step=16" in results[0].stdout and len(results[0].stderr.splitlines()) == 1
            distance = distance_of_weights(tmp_path / damage, tmp_path / "whole")
            assert distance <= (1e-5 if world == 1 else 0), "on one rank: sums in another order"
            assert newest[damage].with_name(newest[damage].name + ".damaged").is_dir()
        others = [str(tmp_path / damage) for damage in files if damage not in ("truncated", "missing")]
        code = """
p = script.start_processes("cpu", 30)
for out in sys.argv[1:]:
    print(script.newest_checkpoint(Path(out), p)[0].name[:13])
"""
        for world in (2, 1):  # the second time nothing is left to report
            results = fsdp.run(world, *others, code=code)
            assert all(r.stdout == "step_00000016\n" * len(others) for r in results), results
            assert len(results[0].stderr.splitlines()) == (len(others) if world == 2 else 0)
        for path in saved(tmp_path / "altered"):  # the last good ones: training begins anew
            (path / ".metadata").write_bytes(b"")
        assert "from_step=0" in fsdp.run(2, *arguments, str(tmp_path / "altered"))[0].stdout
        assert distance_of_weights(tmp_path / "altered", tmp_path / "whole") == 0

    def test_publish_needs_an_out_that_all_machines_see(self, tmp_path):
        """Each would write its slices on its own disk: no checkpoint could ever be read."""
        part = tmp_path / "step_00000005.part"
        part.mkdir()
        manifest = json.dumps({"files": {"__0_0.distcp": "", "__1_0.distcp": "", ".metadata": ""}}).encode()
        for there in ("__0_0.distcp", ".metadata"):
            (part / there).touch()
            with pytest.raises(OSError, match="__1_0.distcp"):
                train_fsdp.publish(part, manifest, 3)
        (part / "__1_0.distcp").touch()
        assert train_fsdp.publish(part, manifest, 3).exists()

    # ---- refusals

    REFUSED = {  # one line on stderr with these words, exit 2, no traceback
        "batch_size": ["--batch-size", "1"],
        "n_heads": ["--n-heads", "4"],
        "lr": ["--lr", "nan"],
        "steps": ["--steps", "0"],
        "clip": ["--clip", "-1"],
        "seed": ["--seed", str(2**32)],
        "timeout": ["--timeout", "0"],
        "amp bf16 needs dtype float32": ["--amp", "bf16", "--dtype", "float64"],
        "needs a GPU": ["--device", "cuda"],
    }
    OWN = {
        "train_ddp": {"data_parallel": ["--data-parallel", "--amp", "bf16"]},
        "train_fsdp": {"replicate": ["--replicate", "3"], "exact": ["--exact", "--amp", "bf16"]},
    }

    def test_main_refuses_in_one_line(self, trainer, tmp_path):
        """Two processes, of which one says it; nothing is written."""
        (tmp_path / "file").write_text("not a folder")
        refused = self.REFUSED | self.OWN[trainer.module] | {"file": ["--out", str(tmp_path / "file")]}
        for words, arguments in refused.items():
            results = trainer.attempt(2, *TINY, "--out", str(tmp_path / "out"), *arguments)
            check_one_line_error(results[0], words)
            assert results[1].returncode == 2
            assert results[1].stderr == "" or words in ("timeout", "needs a GPU"), "before they have met"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_check_settings_takes_the_least_of_each_and_no_less(self, module):
        ones = "steps batch_size accumulate d_model n_heads n_layers eval_every keep".split()
        zeros = "lr warmup weight_decay clip seed save_every dropout".split()
        alone = module.Processes(0, 1, CPU)
        for name, least in (dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0)).items():
            module.check_settings(module.Settings(**({"n_heads": 1} | {name: least})), alone)
            with pytest.raises(ValueError, match=name):
                module.check_settings(module.Settings(**{name: least - 1}), alone)
        two = module.Processes(0, 2, CPU)
        module.check_settings(module.Settings(batch_size=6, accumulate=3, seed=2**32 - 1), two)
        with pytest.raises(ValueError, match="accumulate 3"):
            module.check_settings(module.Settings(batch_size=5, accumulate=3), two)
        if module is train_ddp:
            with pytest.raises(ValueError, match="data_parallel"):
                module.check_settings(module.Settings(data_parallel=True, amp="bf16"), alone)

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
    def test_start_processes_names_what_the_environment_lacks(self, module, monkeypatch):
        names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        for lacking in names:
            for name, value in names.items():
                monkeypatch.setenv(name, value)
            monkeypatch.delenv(lacking)
            with pytest.raises(ValueError, match=lacking):
                module.start_processes("cpu", 5.0)
        monkeypatch.setenv("MASTER_PORT", "1")
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
time.sleep(2 * int(os.environ["RANK"]))
p = script.start_processes("cpu", 20)
print(script.sum_over_ranks([1.0], p))
"""
        for attempt in ("0", "1"):
            environment["TORCHELASTIC_RESTART_COUNT"] = attempt
            for result in trainer.run(2, code=code, **environment):
                assert result.stdout == "[2.0]\n"

    def test_main_refuses_ranks_that_disagree(self, trainer, tmp_path):
        """On a setting, one that may change between runs too (ranks that save at other steps would wait for
        each other), or on the text (a Python with another manual)."""
        for extra in (["--lr", "0.5"], ["--save-every", "7"]):
            results = trainer.attempt(2, *TINY, "--out", str(tmp_path / "out"), of_rank={1: extra})
            assert all(r.returncode in (1, 2) for r in results), results
            check_one_line_error(results[1], "rank 1", f"{extra[0][2:].replace('-', '_')} ")
        code = """
if os.environ["RANK"] == "1":
    pydoc_data.topics.topics = dict(list(pydoc_data.topics.topics.items())[:40])
run()
"""
        results = trainer.attempt(2, *TINY, "--out", str(tmp_path / "out"), code=code)
        check_one_line_error(results[1], "rank 1", "text ")
        assert not (tmp_path / "out/final.pt").exists()

    def test_main_refuses_the_out_of_another_run(self, trainer, tmp_path):
        """Other settings, another version's checkpoint, the other script's run; what may change may."""
        run, out = [*TINY, "--steps", "4", "--out", str(tmp_path / "a")], tmp_path / "a"
        trainer.run(2, *run)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for finished in (True, False):
            for extra, words in (["--lr", "0.01"], "lr 0.003"), (["--steps", "5"], "steps 4"):
                results = trainer.attempt(2, *run, *extra)
                check_one_line_error(results[0], words, "--out")
                assert results[1].returncode == 2 and results[1].stderr == ""
            other = {"train_ddp": "train_fsdp.py", "train_fsdp": "train_ddp.py"}[trainer.module]
            if finished:
                check_one_line_error(run_script(other, *run, cwd=tmp_path), f"{other} here")
                (out / "report.json").rename(tmp_path / "report.json")
        (tmp_path / "report.json").rename(out / "report.json")
        assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        may = ["--save-every", "3", "--timeout", "39", "--keep", "1", "--eval-every", "7", "--compile"]
        may += ["--replicate", "2", "--recompute"] * (trainer.module == "train_fsdp")
        assert "this run is finished" in trainer.run(2, *run, *may)[0].stdout
        assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        if trainer.module == "train_ddp":
            train_ddp.save_checkpoint(tmp_path / "old", 10, {"step": 10, "model": {}})
            check_one_line_error(
                trainer.attempt(1, *TINY, "--out", str(tmp_path / "old"))[0], "another --out"
            )

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
        steps = [train_ddp.rows_of_step(step, len(inputs), 13, 0) for step in range(4)]
        assert report["tokens"] == (targets[torch.cat(steps)] != -100).sum()
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
    if torch.is_grad_enabled():
        steps[0] += 1
        if steps[0] == 9 and os.environ.get("RANK", "0") == "0":  # the value stays, the gradient doesn't
            if "LOSS" in os.environ:
                return loss + float("inf")
            return loss + (0 * logits.sum()).clamp(min=0).sqrt()
    return loss
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
            assert final_weights(tmp_path / clip).isfinite().all()
        arguments = [*TINY, "--out", str(tmp_path / "loss")]
        results = trainer.attempt(2, *arguments, code=code, LOSS="1")
        assert [r.returncode for r in results] == [1, 1] and "loss is inf at step 8" in results[0].stderr
        trainer.run(2, *TINY, "--amp", "fp16", "--out", str(tmp_path / "fp16"), code=code)
        assert final_weights(tmp_path / "fp16").isfinite().all()
        assert saved_state(tmp_path / "fp16")["scaler"]["_growth_tracker"] == 11
        assert json.loads((tmp_path / "fp16/log.jsonl").read_text().splitlines()[-1])["step"] == 20
        arguments = "--steps 1 --warmup 0 --lr 1e30 --clip 0".split()
        (result,) = trainer.attempt(1, *TINY, *arguments, "--out", str(tmp_path / "last"))
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "--lr" in result.stderr
        assert not (tmp_path / "last/final.pt").exists() and not saved(tmp_path / "last")

    FAILURES = {  # a user's own errors: (what goes wrong, what the traceback says, on which ranks)
        "a wrong shape": ("script.Block.forward = lambda self, x: x[..., :-1]", "RuntimeError", (0, 1)),
        "a loss on one rank": (
            "import torch.nn.functional as F\n"
            "if RANK == 1: F.cross_entropy = lambda *a, **k: torch.zeros(2) @ torch.zeros(3)",
            "RuntimeError",
            (1,),
        ),
        "a data set on one rank": (
            "if RANK == 1:\n"
            "    rows = script.rows_of_step\n"
            "    script.rows_of_step = lambda step, *a: rows(step, *a) if step < 4 else {}['no such row']",
            "KeyError: 'no such row'",
            (1,),
        ),
    }

    @pytest.mark.parametrize("failure", FAILURES)
    def test_waiting_leaves_a_user_s_error_its_traceback(self, failure, trainer, tmp_path):
        """The rank that has it shows it; the others end too, within the time limit, as a process is lost."""
        code, said, ranks = self.FAILURES[failure]
        start = time.monotonic()
        code = f"RANK = int(os.environ['RANK'])\n{code}\nrun()"
        results = trainer.attempt(2, *TINY, "--timeout", "20", "--out", str(tmp_path), code=code)
        assert time.monotonic() - start < 60
        for rank, result in enumerate(results):
            assert result.returncode == 1, results
            assert ("Traceback" in result.stderr and said in result.stderr) == (rank in ranks), result.stderr
            assert rank in ranks or f"rank {rank} waited for" in result.stderr, result.stderr

    def test_waiting_says_what_a_lost_process_was_needed_for(self, trainer, tmp_path):
        """One that is killed, one that halts, one that never comes."""
        arguments = [*TINY, "--steps", "5000", "--eval-every", "3", "--out", str(tmp_path), "--timeout"]
        for number, timeout in ((signal.SIGKILL, "60"), (signal.SIGSTOP, "4")):
            trainer.start(3, *arguments, timeout)
            trainer.wait_until(lambda: "step 3/" in trainer.out(0))
            trainer.kill([1], number)
            trainer.wait_until(lambda: all("waited for" in trainer.out(rank, "err") for rank in (0, 2)))
            trainer.kill([1])  # in case it is only halted
            results = trainer.wait()
            assert [r.returncode for r in results] == [1, -signal.SIGKILL, 1], results
            for rank in (0, 2):
                assert f"rank {rank} waited for" in results[rank].stderr
                assert "Traceback" not in results[rank].stderr
        trainer.start(2, *TINY, "--timeout", "3", "--out", str(tmp_path / "b"), of_rank={1: None})
        (result,) = trainer.wait(60)
        assert result.returncode == 1 and "rank 0 waited for up to 3 s for 2 processes" in result.stderr

    def test_on_rank_0_may_take_longer_than_the_timeout(self, trainer, tmp_path):
        """A slow disk kills no job: neither while rank 0 saves, nor at the end, nor another rank's slices."""
        code = """
replace = os.replace
def slow(*arguments):
    time.sleep(3)
    return replace(*arguments)
os.replace = slow
if os.environ["RANK"] == "1" and hasattr(script, "dcp"):
    save = script.dcp.save
    script.dcp.save = lambda *a, **k: time.sleep(3) or save(*a, **k)
run()
"""
        arguments = [*TINY, "--steps", "4", "--timeout", "2", "--out", str(tmp_path)]
        results = trainer.run(2, *arguments, code=code)
        assert last_json(results[0])["loss"] > 0

    def test_save_checkpoint_on_a_full_disk_ends_the_run(self, trainer, tmp_path):
        """A rank may write no file above 10 kB: a sentence, the older checkpoint stays, nothing half written
        does, and the same command goes on."""
        limited = {"train_ddp": "0", "train_fsdp": "1"}[trainer.module]
        code = f"""
import resource
save = script.save_checkpoint
def limited(folder, step, *rest):
    if step == 20 and os.environ["RANK"] == "{limited}":
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
            before = ddp_newest(out)
            trainer.start(world, *arguments, "--out", str(out), code=code)
            if attempt % 2 == 0:
                trainer.wait_until(lambda before=before: ddp_newest(out) != before)
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
        result = trainer.run(world, *arguments, "--out", str(out))[0]
        assert "from_step=" in result.stdout
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
        trainer.wait_until(lambda: "step 10/" in trainer.out(0))
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

    @pytest.mark.parametrize("module", [train_ddp, train_fsdp])
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
        arguments = [*TINY, "--out", str(tmp_path)]
        lock = train_ddp.lock_out(tmp_path)
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
        out = tmp_path / "out"
        node = ["--nproc_per_node=2", "--max-restarts=3", f"--master_port={free_port()}"]
        agent = torchrun(script, *arguments, "--out", "out", node=node, cwd=tmp_path)
        wait_until(lambda: ddp_newest(out), 60, "a checkpoint")
        workers = children(agent)
        os.kill(workers[1], signal.SIGKILL)
        assert agent.wait(120) == 0, (tmp_path / "agent0.log").read_text()
        log = (tmp_path / "agent0.log").read_text()
        assert log.count("processes=2") == 2 and log.count("from_step=0") == 1, "once by each start"
        assert "to meet at" not in log, "the second attempt met at once"
        assert not any(is_alive(pid) for pid in workers), "no orphans"
        assert torch.equal(final_weights(out), final_weights(tmp_path / "whole"))

        again = tmp_path / "again"
        agent = torchrun(script, *arguments, "--out", str(again), cwd=tmp_path)
        wait_until(lambda: ddp_newest(again), 60, "a checkpoint")
        workers = children(agent)
        agent.kill()
        agent.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in workers), 10, "the orphans to leave")
        assert not (again / "final.pt").exists()
        agent = torchrun(script, *arguments, "--out", str(again), cwd=tmp_path)
        assert agent.wait(120) == 0, (tmp_path / "agent2.log").read_text()
        assert "from_step=0" not in (tmp_path / "agent2.log").read_text()
        assert torch.equal(final_weights(again), final_weights(tmp_path / "whole"))

    @linux
    def test_main_elastic_on_one_node_and_on_two_again(self, elastic_begun, ddp, tmp_path):
        """The node that doesn't host the rendezvous comes, is killed and comes back; the loss curve stays."""
        curve, arguments = elastic_begun.result()
        ddp.start(1, *arguments, "--out", str(tmp_path))
        ddp.wait_until(lambda: int(ddp_newest(tmp_path)[5:13] or 0) >= len(curve))
        ddp.kill([0])
        ddp.wait()
        undisturbed = train_ddp.load_checkpoint(tmp_path)["losses"][: len(curve)]
        curves = (torch.tensor(losses, dtype=torch.float64) for losses in (curve, undisturbed))
        check_close(*curves, 1e-5, "loss curve")

    @pytest.mark.parametrize("rendezvous", ["static", "c10d"])
    def test_main_on_two_hosts(self, rendezvous, tmp_path):
        """Two network namespaces, a virtual cable, two processes in each: the same weights as by hand."""
        if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
            pytest.skip("two hosts are simulated with `ip netns`: needs Linux, root and iproute2")
        tag = f"{os.getpid() % 10_000}{rendezvous[0]}"
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
                node = ["--nnodes=2", "--nproc_per_node=2"]
                if rendezvous == "static":
                    node += [f"--node_rank={i}", "--master_addr=10.77.0.1", "--master_port=29511"]
                else:
                    node += ["--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29511", "--rdzv_id=1"]
                    node += [f"--local-addr={address}", f"--rdzv-conf=is_host={1 - i}"]
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

EXPORT_SIZES = [(1, 1), (1, 199), (7, 5), (33, 64), (2, 224), (1, 224)]  # batch, length; 224 is max_len


def export_tokens(b: int, t: int, vocab_size: int) -> Tensor:
    """Ids with a tail of padding alone, and (in a batch) a row of nothing but padding."""
    tokens = torch.randint(1, vocab_size, (b, t))
    tokens[:, max(1, t - t // 4) :] = 0
    if b > 1:
        tokens[1] = 0
    return tokens


@pytest.fixture(scope="module")
def export_models(export_demo_begun) -> dict[str, nn.Module]:
    """encoder.py's classifier and the demo's own, both with random weights and dropout left on."""
    torch.manual_seed(1)
    config = encoder.EncoderConfig(50, 224, d_model=24, n_heads=3, n_layers=2, d_ff=32, pool="mean+max")
    own = export.Classifier(50, max_len=224, d_model=24, n_heads=3, n_layers=2, d_ff=32)
    return {"encoder": encoder.EncoderClassifier(config), "own": own}


@pytest.fixture(scope="module")
def export_onnx_file(export_models, tmp_path_factory) -> Path:
    """encoder.py's classifier as ONNX, exported with a batch of one row."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    metadata = {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}
    return export.export_onnx(export_models["encoder"], torch.randint(0, 50, (1, 9)), path, metadata=metadata)


@pytest.fixture(scope="module")
def export_demo_begun(request, tmp_path_factory):
    """A short run of the demo, without a compiler and without a network; where it is needed it goes on beside
    the other tests of export.py, as it takes as long as all of them."""
    folder = tmp_path_factory.mktemp("export")
    small = "--n-train 4000 --n-test 400 --epochs 3 --seconds 0.005 --out run".split()
    without = {"PATH": str(folder), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with ThreadPoolExecutor(1) as pool:
        needed = any("export_demo" in item.fixturenames for item in request.session.items)
        run = pool.submit(run_script, "export.py", *small, cwd=folder, **without) if needed else None
        yield folder / "run", run


@pytest.fixture(scope="module")
def export_demo(export_demo_begun):
    folder, run = export_demo_begun
    return folder, run.result()


def check_export(run, model: nn.Module, vocab_size: int = 50, tolerance: float = 1e-5) -> None:
    """Equal to the model on sizes that the exporter hasn't seen, rows of padding alone among them."""
    with torch.no_grad():
        for b, t in EXPORT_SIZES:
            tokens = export_tokens(b, t, vocab_size)
            output = run(tokens)
            assert output.isfinite().all()
            with export.evaluating(model):
                check_close(output, model(tokens), tolerance, f"{b} x {t}")


@pytest.mark.parametrize("which", ["encoder", "own"])
def test_export_torch_formats_equal_the_original_on_other_sizes(export_models, which, tmp_path):
    model, example = export_models[which].train(), torch.randint(0, 50, (3, 20))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for method in ("trace", "script"):
        path = export.export_torchscript(model, (example,), tmp_path / f"{method}.ts", method)
        assert path == tmp_path / f"{method}.ts"
        check_export(export.load_artefact(path), model)
    for shape in ((3, 20), (1, 20)):
        example = torch.ones(shape, dtype=torch.long)
        path = export.export_program(model, example, tmp_path / "model.pt2")  # a tensor alone is fine too
        check_export(export.load_artefact(path), model)
    assert all(module.training for module in model.modules())  # as it was
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt2", "script.ts", "trace.ts"]


def test_export_onnx_equals_the_original_on_other_sizes(export_models, export_onnx_file, tmp_path):
    check_export(export.load_artefact(export_onnx_file), export_models["encoder"])
    path = export.export_onnx(export_models["own"], torch.randint(0, 50, (3, 20)), tmp_path / "18", opset=18)
    check_export(export.onnx_runner(path), export_models["own"])


def test_export_onnx_is_one_file_that_says_what_it_is(export_onnx_file):
    import onnx
    import onnxruntime

    assert [p.name for p in export_onnx_file.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(export_onnx_file, providers=["CPUExecutionProvider"])
    (tokens,), (output,) = session.get_inputs(), session.get_outputs()
    assert (tokens.name, tokens.shape) == ("tokens", ["batch", "length"])
    assert (output.name, output.shape) == ("output", ["batch", 2])
    metadata = session.get_modelmeta().custom_metadata_map
    read = {name: json.loads(value) for name, value in metadata.items()}
    assert read == {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}
    graph = onnx.load(export_onnx_file)
    onnx.checker.check_model(graph, full_check=True)
    assert [x.version for x in graph.opset_import if x.domain == ""] == [23]
    kinds = collections.Counter(node.op_type for node in graph.graph.node)
    assert kinds["Attention"] == 2 and kinds["Softmax"] == 0
    assert (
        str(ROOT).encode() not in export_onnx_file.read_bytes()
    )  # no paths of this machine, no stack traces
    assert not any(node.metadata_props for node in graph.graph.node)


class ExportAttention(nn.Module):
    """Bare attention of x (B, H, T, D), by kind of mask; some rows of it may see nothing."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "none":
            return F.scaled_dot_product_attention(x, x, x)
        if self.kind == "causal":
            return F.scaled_dot_product_attention(x, x, x, None, 0.0, True)
        if self.kind == "float":  # a bias on what is seen
            bias = torch.arange(mask.size(-1), dtype=x.dtype)
            mask = torch.where(mask, bias, -math.inf)
        if self.kind == "scale":
            return F.scaled_dot_product_attention(5 * x, x, x[..., :3], mask, scale=0.7)
        if self.kind == "negative scale":
            return F.scaled_dot_product_attention(x, x, x, mask, scale=-0.7)
        return F.scaled_dot_product_attention(x, x, x, mask, scale=None)  # as if it were left out


@pytest.mark.parametrize("kind", ["none", "causal", "float", "keys", "rows", "scale"])
def test_export_onnx_attention_has_torchs_masks(kind, tmp_path):
    """In onnxruntime too, a query that may attend to nothing gets 0, and a mask may broadcast."""

    def inputs(b: int, t: int) -> tuple[Tensor, Tensor]:
        if kind == "rows":
            return torch.randn(b, 2, t, 8), (torch.rand(b, 1, t, t) < 0.5) & (torch.arange(t) > 0)[:, None]
        return torch.randn(b, 2, t, 8), torch.arange(b)[:, None, None, None] > torch.arange(t)  # (B, 1, 1, T)

    model = ExportAttention(kind)
    run = export.onnx_runner(export.export_onnx(model, inputs(3, 4), tmp_path / "m.onnx"))
    if kind in ("none", "causal"):  # the mask has no part in the graph, but is an input still
        assert run(*inputs(2, 3)).shape == (2, 2, 3, 8)
    for b, t in ((1, 1), (2, 7), (5, 3)):
        x, mask = inputs(b, t)
        check_close(run(x, mask), model(x, mask), 1e-6, f"{b} x {t}")


def test_export_onnx_attention_with_a_negative_scale_is_refused(tmp_path):
    """onnxruntime has none; hidden keys must not get all of the weight instead."""
    model, x = ExportAttention("negative scale"), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match="not valid.*Attention"):
        export.export_onnx(model, (x, torch.ones(2, 1, 1, 5, dtype=torch.bool)), tmp_path / "m.onnx")


class ExportScale(nn.Module):
    """One parameter, two inputs of their own names, (B, C) and (B,)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, features: Tensor, weight: Tensor) -> Tensor:
        return self.linear(features) * weight[:, None]


def test_export_onnx_takes_shapes_and_several_inputs(tmp_path):
    import onnx

    model, batch = ExportScale(), torch.export.Dim("n", min=2, max=9)
    inputs = (torch.randn(3, 6), torch.randn(3))
    shapes = {"features": {0: batch}, "weight": {0: batch}}
    for path, given, sizes in (("a.onnx", None, (1, 5, 40)), ("b.onnx", shapes, (2, 5, 9))):
        run = export.load_artefact(export.export_onnx(model, inputs, tmp_path / path, given))
        names = [x.name for x in onnx.load(tmp_path / path).graph.input]
        assert names == ["features", "weight"]
        for b in sizes:
            x, w = torch.randn(b, 6), torch.randn(b)
            check_close(run(x, w), model(x, w), 1e-6)
    export.export_program(model, inputs, tmp_path / "c.pt2", shapes)
    run = export.load_artefact(tmp_path / "c.pt2")
    check_close(run(torch.ones(9, 6), torch.ones(9)), model(torch.ones(9, 6), torch.ones(9)), 1e-6)
    with pytest.raises(Exception, match="9"):
        run(torch.ones(10, 6), torch.ones(10))


class ExportFixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 2) if x.size(0) == 3 else x.reshape(2, 3)


class ExportStrange(nn.Module):
    """Takes tensors, and is refused by every format: its output hangs on a value, outside of torch."""

    def forward(self, x: Tensor) -> Tensor:
        with open("/dev/null", "rb") as file:
            return x * len(file.read(1)) if float(x.sum()) > 0 else "no tensor"


@pytest.mark.parametrize("existing", [b"", b"an earlier artefact"])
def test_export_bad_models_are_refused_and_nothing_is_written(existing, tmp_path, monkeypatch, capfd):
    def check(write, *words: str, error=ValueError):
        path = tmp_path / "artefact"
        path.write_bytes(existing) if existing else path.unlink(missing_ok=True)
        with pytest.raises(error, match="(?s)" + ".*".join(words)) as raised:
            write(path)
        assert "\n" not in str(raised.value)
        assert [p.name for p in tmp_path.iterdir()] == ["artefact"] * bool(existing)
        assert not existing or path.read_bytes() == existing
        assert capfd.readouterr() == ("", "")

    x, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for method in ("trace", "script"):
        check(
            lambda p, m=method: export.export_torchscript(ExportStrange(), x, p, m), f"{method} ExportStrange"
        )
    check(lambda p: export.export_torchscript(export.Gate(), x, p, "compile"), "trace.*script.*compile")
    for write in (export.export_program, export.export_onnx):
        check(lambda p, w=write: w(export.Gate(), ones, p), "torch.export can't capture Gate")
        check(lambda p, w=write: w(ExportFixedBatch(), x, p), "torch.export can't capture ExportFixedBatch")
    for opset in (5, 17, 26, 99):
        check(
            lambda p, o=opset: export.export_onnx(nn.Linear(3, 1), x, p, opset=o), "opset.*18.*25", str(opset)
        )

    class Strange(nn.Module):
        def forward(self, x: Tensor):
            return (x, x) if len(x) == 2 else x > 0

    check(lambda p: export.export_onnx(Strange(), x, p), "must return one tensor of floats, got tuple")
    check(lambda p: export.export_onnx(Strange(), x[:1], p), "must return one tensor of floats, got Tensor")
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: 1 / 0)
    check(lambda p: export.export_onnx(nn.Linear(3, 1), x, p), "ONNX can't express Linear.*zero")
    check(lambda p: export.export_program(nn.Linear(4, 1), x, p), "shapes", error=RuntimeError)


def test_export_refuses_a_graph_that_answers_otherwise(tmp_path, monkeypatch):
    """The artefact has to give the example's output before it is written."""
    monkeypatch.setattr(export, "onnx_runner", lambda data: lambda x: nn.Linear(3, 1)(x) + 0.5)
    with pytest.raises(ValueError, match="differs"):
        export.export_onnx(nn.Linear(3, 1), torch.zeros(2, 3), tmp_path / "m.onnx")
    monkeypatch.setattr(export, "onnx_runner", lambda data: lambda x: x[:, :1] * torch.nan)
    with pytest.raises(ValueError, match="differs from it by nan"):
        export.export_onnx(nn.Linear(3, 1), torch.zeros(2, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_export_places_that_cannot_be_written(export_onnx_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    model, x = nn.Linear(3, 1), torch.zeros(2, 3)
    feeds = [{"tokens": torch.ones(2, 5, dtype=torch.long)}]
    writers = [
        lambda p: export.export_torchscript(model, x, p),
        lambda p: export.export_program(model, x, p),
        lambda p: export.export_onnx(model, x, p),
        lambda p: export.quantize_dynamic(export_onnx_file, p),
        lambda p: export.quantize_static(export_onnx_file, p, feeds),
    ]
    for write in writers:
        with pytest.raises(OSError, match="file/m"):
            write(tmp_path / "file/m")
    with pytest.raises(OSError, match="nowhere"):
        export.quantize_dynamic(tmp_path / "nowhere.onnx", tmp_path / "m")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        export.export_torchscript(model, x, tmp_path / "m.ts")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # no half of one, also not beside its place


def test_export_graphs_that_contradict_themselves_are_refused(export_onnx_file, tmp_path, monkeypatch):
    import onnx

    shape, renamed, old = (onnx.load(export_onnx_file) for _ in range(3))
    shape.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5  # shape inference knows: 2
    renamed.graph.node[3].input[0] = "nowhere"
    old.opset_import[0].version = 7
    for graph in (shape, renamed, old):
        with pytest.raises(ValueError, match="the ONNX graph is not valid"):
            export.checked_bytes(graph)

    def complain(graph, full_check: bool):
        raise onnx.checker.ValidationError("no good")

    monkeypatch.setattr(onnx.checker, "check_model", complain)  # every writer asks it
    with pytest.raises(ValueError, match="not valid: no good"):
        export.export_onnx(nn.Linear(3, 1), torch.zeros(2, 3), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="not valid: no good"):
        export.quantize_dynamic(export_onnx_file, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_export_sessions_have_the_threads_asked_for(export_onnx_file, monkeypatch):
    import onnxruntime

    options, session = [], onnxruntime.InferenceSession

    def spy(model, option, **rest):
        options.append((option.intra_op_num_threads, option.inter_op_num_threads, rest))
        return session(model, option, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    export.onnx_runner(export_onnx_file)
    export.load_artefact(export_onnx_file, threads=3)
    rest = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["SkipLayerNormFusion"]}
    assert options == [(n, 1, rest) for n in (1, 3)]


def test_export_runs_sum_and_norm_by_themselves(export_onnx_file, tmp_path):
    """onnxruntime knows the name of the optimizer left out: where it isn't, the slow kernel is there."""
    import onnx
    import onnxruntime

    for disabled, found in ((["SkipLayerNormFusion"], False), ([], True)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "o.onnx"), 3
        rest = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": disabled}
        onnxruntime.InferenceSession(export_onnx_file, options, **rest)
        kinds = {node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node}
        assert ("SkipLayerNormalization" in kinds) == found


def test_export_onnx_of_a_translation_model(tmp_path):
    """Two inputs of tokens, each with a length of its own."""
    model = transformer_tiny(dtype=torch.float32, n_layers=1)
    example = torch.randint(3, 11, (3, 5)), torch.randint(3, 11, (3, 5))
    run = export.onnx_runner(export.export_onnx(model, example, tmp_path / "m.onnx"))
    for batch, source, target in ((1, 1, 1), (2, 7, 3), (4, 3, 9)):
        src, tgt = torch.randint(3, 11, (batch, source)), torch.randint(3, 11, (batch, target))
        src[0, source // 2 + 1 :] = 0
        check_close(run(src, tgt), model(src, tgt).detach(), 1e-5)


def test_export_names_one_size_alike_alone():
    """To onnxruntime one name is one size."""
    tokens, auto = torch.zeros(3, 5, dtype=torch.long), torch.export.Dim.AUTO
    assert export.free_dimensions((torch.tensor(1.0), tokens)) == ({}, {0: "batch", 1: "length_1"})
    inputs = tokens, torch.zeros(3, 4, dtype=torch.long), torch.zeros(3), torch.zeros(7), torch.zeros(3, 6)
    assert export.free_dimensions((*inputs, torch.zeros(3, 2, 2, dtype=torch.long))) == (
        {0: "batch", 1: "length"}, {0: "batch", 1: "length_1"}, {0: "batch"}, {0: auto},
        {0: "batch", 1: auto}, {0: "batch", 1: auto, 2: auto},
    )  # fmt: skip


class AddsRows(nn.Module):
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return x + row


class Logs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        logging.getLogger("of_a_model").warning("called")
        return -x


def test_export_takes_what_users_have(tmp_path):
    """A row beside a batch, outputs of -inf, a list of inputs, inputs with gradients, a model that logs."""
    x, row = torch.randn(4, 3), torch.randn(1, 3)
    path = export.export_program(AddsRows(), [x, row], tmp_path / "a.pt2")
    check_close(export.load_artefact(path)(x, row), x + row, 1e-6)
    masked = torch.tensor([0.0, -math.inf, 0.0])
    path = export.export_onnx(AddsRows(), (x.clone().requires_grad_(), masked), tmp_path / "a.onnx")
    assert torch.equal(export.load_artefact(path)(x, masked), x + masked)
    export.export_torchscript(Logs(), x, tmp_path / "a.ts")
    assert logging.getLogger("of_a_model").isEnabledFor(logging.WARNING)
    with pytest.raises(ValueError, match="must be tensors, got .*'Tensor', 'int'"):
        export.export_program(AddsRows(), (x, 3), tmp_path / "b.pt2")
    with pytest.raises(ValueError, match="metadata: labels can't be written as JSON"):
        export.export_onnx(Logs(), x, tmp_path / "b.onnx", metadata={"labels": {1, 2}})
    with pytest.raises(ValueError, match="inputs of floats"):
        export.export_bfloat16(Logs(), x, tmp_path / "b.pt2")
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts"])
def test_export_damaged_artefacts_are_refused(suffix, tmp_path):
    for content in (b"", b"no model", b"PK\x03\x04 and no more"):
        (tmp_path / f"a{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=f"a{suffix} is damaged"):
            export.load_artefact(tmp_path / f"a{suffix}")
    with pytest.raises(FileNotFoundError):
        export.load_artefact(tmp_path / f"b{suffix}")


def test_export_load_artefact_knows_three_suffixes(tmp_path):
    with pytest.raises(ValueError, match="onnx, .pt2 or .ts, got model.pth"):
        export.load_artefact("model.pth")


# Quantization


def export_weights(path: Path) -> dict[str, np.ndarray]:
    import onnx

    return {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}


def test_export_dynamic_quantization(export_models, export_onnx_file, tmp_path, monkeypatch):
    """int8 matrices with a scale a column, half the range without VNNI; attention and metadata untouched."""
    import onnx

    model, largest = export_models["encoder"], {}
    for vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda v=vnni: {"avx2": True, "avx512_vnni": v})
        path = export.quantize_dynamic(export_onnx_file, tmp_path / f"{vnni}.onnx")
        weights = export_weights(path)
        matrices = {n: w for n, w in weights.items() if w.dtype == np.int8 and w.ndim == 2}
        assert sorted(w.shape for w in matrices.values()) == sorted(
            m.weight.T.shape for m in model.modules() if isinstance(m, nn.Linear)
        )
        largest[vnni] = max(np.abs(w.astype(int)).max() for w in matrices.values())
        for name, w in matrices.items():
            scale = weights[name.removesuffix("_quantized") + "_scale"]
            assert scale.shape == (w.shape[1],), name
        check_export(export.load_artefact(path), model, tolerance=0.05)
    assert largest[True] == 127 and largest[False] in (63, 64)
    path = export.quantize_dynamic(
        export_onnx_file, tmp_path / "m.onnx", per_channel=False, reduce_range=False
    )
    scales = [w for n, w in export_weights(path).items() if n.endswith("_scale") and "weight" in n]
    assert scales and all(w.size == 1 for w in scales)
    graph = onnx.load(path)
    assert collections.Counter(n.op_type for n in graph.graph.node)["Attention"] == 2
    kept = {x.key: json.loads(x.value) for x in graph.metadata_props}
    assert kept == {"labels": ["negative", "positive"], "max_len": 224, "note": "gut, süß"}


def test_export_reduced_range_and_bf16_follow_the_cpu(monkeypatch):
    for cpu, reduced, bf16 in (
        ({"avx2": True}, True, False),
        ({"avx2": True, "avx512_vnni": True}, False, False),
        ({"avx2": True, "avx_vnni": True, "avx512_bf16": False}, False, False),
        ({"avx2": True, "avx512_vnni": True, "avx512_bf16": True}, False, True),
        ({"avx2": True, "avx512_vnni": True, "amx_bf16": True}, False, True),
        ({"neon": True, "bf16": True}, False, True),
        ({"neon": True, "bf16": False}, False, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert (export.needs_reduced_range(), export.has_bf16()) == (reduced, bf16), cpu
        if bf16:
            model = nn.Linear(2, 2)
            assert export.to_bfloat16(model).weight.dtype == torch.bfloat16
            assert model.weight.dtype == torch.float32
        else:
            with pytest.raises(ValueError, match="no bf16"):
                export.to_bfloat16(nn.Linear(2, 2))


def test_export_embeddings_shrink(export_models, tmp_path):
    """32, 8 and 4 bits a value; closer to the original with more of them, and finite everywhere."""
    model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 2))
    fp32 = export.export_onnx(model, torch.zeros(2, 3, dtype=torch.long), tmp_path / "m.onnx")
    tokens, differences, sizes = torch.arange(5000).view(1, -1), {}, {}
    for bits in (32, 8, 4):
        path = export.quantize_dynamic(fp32, tmp_path / f"{bits}.onnx", embedding_bits=bits)
        with torch.no_grad():
            differences[bits] = (export.load_artefact(path)(tokens) - model(tokens)).abs().max().item()
        sizes[bits] = path.stat().st_size
    table = 5000 * 64
    assert 4 * table < sizes[32] < 4.1 * table and table < sizes[8] < 1.1 * table
    assert table * 0.6 < sizes[4] < table * 0.75  # a scale and a zero point for each 32 values
    assert 0 < differences[32] <= differences[8] < differences[4] < 0.5
    with pytest.raises(ValueError, match="embedding_bits must be 4, 8 or 32, got 16"):
        export.quantize_dynamic(fp32, tmp_path / "16.onnx", embedding_bits=16)


@pytest.mark.parametrize("static", [False, True])
def test_export_4_bits_leave_narrow_tables_at_8(tmp_path, static):
    """A table of one column would take 5 bytes a row; one of 32 takes 20.5 instead of 32."""
    import onnx

    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(map(nn.Embedding, (30_000, 2000, 2000), (1, 31, 32)))
            self.head = nn.Linear(64, 2)

        def forward(self, tokens):
            return self.head(torch.cat([table(tokens) for table in self.tables], -1))

    model, tokens = Tables(), torch.arange(2000).view(10, 200)
    fp32 = export.export_onnx(model, tokens[:2], tmp_path / "m.onnx", metadata={"labels": "ab"})
    quantize = export.quantize_static if static else export.quantize_dynamic
    rest = [[{"tokens": tokens}]] if static else []
    sizes, outputs = {}, {}
    for bits in (8, 4):
        path = quantize(fp32, tmp_path / f"{bits}.onnx", *rest, embedding_bits=bits)
        sizes[bits], outputs[bits] = path.stat().st_size, export.load_artefact(path)(tokens)
        assert onnx.load(path).metadata_props[0].key == "labels"
    assert 30_000 + 2000 * (31 + 32) < sizes[8] < 30_000 + 2000 * (31 + 32) + 9000
    assert 30_000 + 2000 * (31 + 20) < sizes[4] < 30_000 + 2000 * (31 + 21) + 9000
    check_close(outputs[8], model(tokens).detach(), 0.05)
    check_close(outputs[4], model(tokens).detach(), 0.4)


def test_export_static_quantization_learns_its_ranges(tmp_path):
    """The range of an activation is the calibration's: what lies beyond it is clipped."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    fp32 = export.export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx", metadata={"labels": "ab"})
    reads = []

    def calibration():
        for size in (2, 5, 1):
            reads.append(size)
            yield {"input": torch.rand(size, 4) * 2 - 1}

    run = export.load_artefact(export.quantize_static(fp32, tmp_path / "s.onnx", calibration()))
    assert reads == [2, 5, 1]
    inside, beyond = torch.rand(50, 4) * 1.6 - 0.8, torch.full((1, 4), 40.0)
    with torch.no_grad():
        check_close(run(inside), model(inside), 0.05)
        assert (run(beyond) - model(beyond)).abs().max() > 1  # dynamic quantization would follow
    zeros = [w for n, w in export_weights(tmp_path / "s.onnx").items() if n.endswith("zero_point")]
    assert {w.dtype.name for w in zeros if w.size == 1} == {"uint8"}  # activations
    assert {w.dtype.name for w in zeros if w.size > 1} <= {"int8", "int32"}  # weights by channel, biases
    kinds = collections.Counter(export_kinds(tmp_path / "s.onnx"))
    assert kinds["QuantizeLinear"] and kinds["DequantizeLinear"] and not kinds["DynamicQuantizeLinear"]
    run = export.load_artefact(export.quantize_dynamic(fp32, tmp_path / "d.onnx"))
    with torch.no_grad():
        check_close(run(beyond), model(beyond), 0.05)


def export_kinds(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def test_export_static_quantization_errors(export_onnx_file, tmp_path):
    path = tmp_path / "m.onnx"
    ids = torch.ones(2, 5, dtype=torch.long)
    for calibration, words in (
        ([], "calibration must hold at least one"),
        (iter(()), "calibration must hold at least one"),
        ([{"tokens": ids}, {"ids": ids}], "calibration.*tokens.*ids"),
        ([{"tokens": ids, "mask": ids}], "calibration.*tokens.*mask"),
        ([{"tokens": ids.float()}], "can't quantize"),
    ):
        with pytest.raises(ValueError, match=words):
            export.quantize_static(export_onnx_file, path, calibration)
    (tmp_path / "garbage").write_bytes(b"no graph at all" * 9)
    for quantize in (export.quantize_dynamic, lambda a, b: export.quantize_static(a, b, [{"tokens": ids}])):
        with pytest.raises(ValueError, match="garbage is not an ONNX file"):
            quantize(tmp_path / "garbage", path)
    assert [p.name for p in tmp_path.iterdir()] == ["garbage"]


# Pruning


def test_export_unstructured_pruning_zeroes_the_smallest():
    model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    with torch.no_grad():
        model[3].weight.mul_(10)  # ranked over all layers, so these survive
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for amount in (0, 0.25, 0.5, 1, 1.0):
        pruned = export.prune_unstructured(model, amount)
        weights = torch.cat([pruned[i].weight.flatten() for i in (1, 3)])
        old = torch.cat([model[i].weight.flatten() for i in (1, 3)])
        assert (weights == 0).sum() == round(amount * 300), amount
        kept = weights != 0
        assert torch.equal(weights[kept], old[kept])
        if 0 < amount < 1:
            assert old[~kept].abs().max() <= old[kept].abs().min()
        assert pruned.state_dict().keys() == before.keys()  # no mask left beside
        assert torch.equal(pruned[0].weight, model[0].weight)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    for amount in (-0.1, 1.5, 7):
        with pytest.raises(ValueError, match=f"amount must be in 0 .. 1, got {amount}"):
            export.prune_unstructured(model, amount)
    with pytest.raises(ValueError, match="GELU has no Linear or Conv"):
        export.prune_unstructured(nn.GELU(), 0.5)


def export_masked(model: nn.Module, parts: dict[str, nn.Linear], kept: dict[str, list[int]], width: int):
    """The original with the other heads' (or neurons') outputs times 0: hooks, for the caller to remove."""

    def mask(kept: list[int], _module, inputs: tuple) -> tuple:
        gate = torch.zeros(inputs[0].size(-1) // width)
        gate[kept] = 1.0
        return (inputs[0] * gate.repeat_interleave(width),)

    return [
        linear.register_forward_pre_hook(lambda m, x, k=kept[name]: mask(k, m, x))
        for name, linear in parts.items()
    ]


EXPORT_PLACES = {"encoder": "encoder.layers", "own": "layers"}


@pytest.mark.parametrize("which", ["encoder", "own"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_export_pruned_heads_equal_masked_heads(export_models, which, keep):
    model, place = export_models[which].eval(), EXPORT_PLACES[which]
    scores = {f"{place}.{i}.self_attention": torch.rand(3) for i in range(2)}
    smaller = export.prune_heads(model, scores, keep)
    kept = {name: sorted(s.argsort()[-keep:].tolist()) for name, s in scores.items()}
    parts = {name: model.get_submodule(name).out_proj for name in scores}
    hooks = export_masked(model, parts, kept, width=8)
    tokens = export_tokens(5, 40, 50)
    expected = model(tokens)
    for hook in hooks:
        hook.remove()
    check_close(smaller(tokens), expected, 1e-6)
    assert keep == 3 or (expected - model(tokens)).abs().max() > 1e-3  # the masks do something
    for name in scores:
        attention = smaller.get_submodule(name)
        assert attention.n_heads == keep
        assert attention.qkv_proj.weight.shape == (3 * 8 * keep, 24) == (attention.qkv_proj.out_features, 24)
        assert attention.out_proj.weight.shape == (24, 8 * keep) == (24, attention.out_proj.in_features)
    assert model.get_submodule(f"{place}.0.self_attention").qkv_proj.weight.shape == (72, 24)  # left whole


@pytest.mark.parametrize("which", ["encoder", "own"])
def test_export_pruned_neurons_equal_masked_neurons(export_models, which):
    model, place = export_models[which].eval(), EXPORT_PLACES[which]
    scores = {f"{place}.{i}.ffn": torch.rand(32) for i in range(2)}
    tokens = export_tokens(5, 40, 50)
    for keep in (1, 7, 32):
        smaller = export.prune_neurons(model, scores, keep)
        kept = {name: s.argsort()[-keep:].tolist() for name, s in scores.items()}
        hooks = export_masked(model, {n: model.get_submodule(n)[2] for n in scores}, kept, width=1)
        check_close(smaller(tokens), model(tokens), 1e-6)
        for hook in hooks:
            hook.remove()
        for name in scores:
            net = smaller.get_submodule(name)
            assert net[0].weight.shape == (keep, 24) and net[0].bias.shape == (keep,)
            assert net[2].weight.shape == (24, keep) and (net[0].out_features, net[2].in_features) == (
                keep,
                keep,
            )


@pytest.mark.parametrize("which", ["encoder", "own"])
def test_export_importance_is_the_derivative_by_a_gate(export_models, which):
    """Michel's definition: a gate of 1 on each head of each example; |dloss/dgate|, mean over examples."""
    model, place = export_models[which].train(), EXPORT_PLACES[which]
    batches = [((export_tokens(b, t, 50),), torch.randint(0, 2, (b,))) for b, t in ((4, 9), (3, 6))]
    heads = export.head_importance(model, iter(batches))
    neurons = export.neuron_importance(model, batches)
    assert all(module.training for module in model.modules()) and all(
        p.grad is None for p in model.parameters()
    )
    model.eval()
    for found, width, part in ((heads, 8, "self_attention.out_proj"), (neurons, 1, "ffn.2")):
        for layer, scores in enumerate(found.values()):
            expected = torch.zeros_like(scores)
            linear = model.get_submodule(f"{place}.{layer}.{part}")
            for (tokens,), labels in batches:
                for row, label in zip(tokens, labels, strict=True):  # one by one
                    gate = torch.ones(len(scores), requires_grad=True)
                    spread = gate.repeat_interleave(width)
                    hook = linear.register_forward_pre_hook(lambda m, x, s=spread: (x[0] * s,))
                    loss = F.cross_entropy(model(row[None]), label[None])
                    hook.remove()
                    expected += torch.autograd.grad(loss, gate)[0].abs() / 7
            check_close(scores, expected, 1e-6)
            assert scores.max() > 0
    assert list(heads) == [f"{place}.{i}.self_attention" for i in range(2)]
    assert list(neurons) == [f"{place}.{i}.ffn" for i in range(2)]
    squared = export.head_importance(model, batches, lambda y, t: (y**2).sum())
    assert not torch.allclose(squared[f"{place}.0.self_attention"], heads[f"{place}.0.self_attention"])
    with pytest.raises(ValueError, match="batches must hold at least one"):
        export.head_importance(model, [])
    assert not any(m._forward_pre_hooks for m in model.modules())


class ExportOddAttention(nn.Module):
    """Has the convention's parts, and does something else between them."""

    def __init__(self, change: str):
        super().__init__()
        self.change, self.n_heads = change, 2
        self.qkv_proj, self.out_proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.change == "scaled":
            x = x * 1.5
        if self.change == "mask ignored":
            mask = None
        y = export.SelfAttention(self.qkv_proj, self.out_proj, 2)(x, mask)
        return (y, y) if self.change == "tuple" else y


class FeedForward(nn.Sequential):
    """As in many projects: a subclass that is made of widths."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))


class Repeats(nn.Module):
    """The same net twice (ALBERT), and one that is never called."""

    def __init__(self):
        super().__init__()
        self.net, self.unused, self.head = FeedForward(6, 8), FeedForward(6, 8), nn.Linear(6, 2)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        for _ in range(2):
            hidden = self.net[1](self.net[0](x))  # (B, 8)
            x = x + (self.net[2](hidden) if gate is None else self.net[2](hidden * gate))
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_export_importance_of_a_net_that_is_called_twice(frozen):
    """Both calls count; frozen weights, and a caller's no_grad, change nothing."""
    model = Repeats().requires_grad_(not frozen)
    batches = [(torch.randn(5, 6), torch.randint(2, (5,))) for _ in range(2)]
    expected = torch.zeros(8)
    with torch.enable_grad():
        for (x,), y in (
            (rows.split(1), t)
            for inputs, targets in batches
            for rows, t in zip(inputs.split(1), targets.split(1), strict=True)
        ):
            gate = torch.ones(8, requires_grad=True)
            loss = F.cross_entropy(model(x, gate), y)
            expected += torch.autograd.grad(loss, gate)[0].abs() / 10
    found = export.neuron_importance(model, batches)
    check_close(found["net"], expected, 1e-6)
    assert not found["unused"].any()
    pruned = export.prune_neurons(model, found, keep=3)
    assert pruned.net[0].out_features == 3 and pruned(torch.randn(2, 6)).shape == (2, 2)


def test_export_onnx_may_differ_in_proportion_to_the_outputs(tmp_path):
    model = nn.Linear(512, 3)
    with torch.no_grad():
        model.weight.mul_(1e7)
    x = torch.randn(2, 512)
    run = export.onnx_runner(export.export_onnx(model, x, tmp_path / "large.onnx"))
    check_close(run(x), model(x), 1e-5)


def test_export_onnx_differs_by_a_thousandth_at_most(tmp_path, monkeypatch):
    model, x = nn.Linear(3, 1), torch.ones(2, 3)
    for shift in (5e-4, 2e-3):
        monkeypatch.setattr(export, "onnx_runner", lambda d, s=shift: lambda x: model(x).detach() + s)
        with pytest.raises(ValueError, match="differs") if shift > 1e-3 else contextlib.nullcontext():
            export.export_onnx(model, x, tmp_path / "m.onnx")


def test_export_refuses_what_onnxruntime_cannot_load():
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    node = onnx.helper.make_node("Nothing", ["x"], ["y"], domain="nowhere")  # valid for onnx's own checker
    sets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("nowhere", 1)]
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    with pytest.raises(ValueError, match="not valid.*Nothing"):
        export.checked_bytes(onnx.helper.make_model(graph, opset_imports=sets, ir_version=10))


def test_export_refuses_a_wrong_number_or_shape_of_inputs(export_onnx_file, tmp_path):
    x = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError):
        export.load_artefact(export_onnx_file)(x, x)
    with pytest.raises(RuntimeError, match="shapes"):  # the model's own complaint
        export.export_torchscript(nn.Linear(4, 1), torch.zeros(2, 3), tmp_path / "m.ts")


def test_export_other_sequentials_are_no_feed_forward_nets():
    for net in (
        [nn.Linear(4, 6), nn.ReLU(), nn.Dropout()],
        [nn.Dropout(), nn.ReLU(), nn.Linear(6, 4)],
        [nn.ReLU(), nn.Dropout(), nn.ReLU()],
        [nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(1), nn.Linear(6, 4)],
    ):
        with pytest.raises(ValueError, match="no feed-forward net"):
            export.neuron_importance(nn.Sequential(*net), [])


def test_export_gate_is_what_it_says():
    x = torch.tensor([3.0, -1.0])
    for gate in (export.Gate(), export.GateWithoutIf()):
        assert gate(x).tolist() == [6.0, -2.0] and gate(-x).tolist() == [3.0, -1.0]


def test_export_unstructured_pruning_takes_convolutions():
    for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        assert not export.prune_unstructured(nn.Sequential(convolution(1, 2, 3)), 1.0)[0].weight.any()


def test_export_neurons_of_a_net_that_mixes_them_are_not_pruned():
    net = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="no feed-forward net"):
        export.prune_neurons(net, {"": torch.arange(6.0)}, 3)


def test_export_pruning_refuses_what_it_does_not_know(export_models):
    model = export_models["own"]
    heads = {f"layers.{i}.self_attention": torch.ones(3) for i in range(2)}
    neurons = {f"layers.{i}.ffn": torch.ones(32) for i in range(2)}
    for keep in (0, 4, -1):
        with pytest.raises(ValueError, match=f"heads of layers.0.self_attention.*1 .. 3.*{keep}"):
            export.prune_heads(model, heads, keep)
    for keep in (0, 33):
        with pytest.raises(ValueError, match=f"neurons of layers.0.ffn.*1 .. 32.*{keep}"):
            export.prune_neurons(model, neurons, keep)
    with pytest.raises(ValueError, match="5 scores"):
        export.prune_heads(model, {name: torch.ones(5) for name in heads}, 2)
    with pytest.raises(ValueError, match="0 scores"):
        export.prune_heads(model, neurons, 2)
    with pytest.raises(ValueError, match="0 scores"):
        export.prune_neurons(model, heads, 2)
    state = model.state_dict()
    wide = state | {"layers.1.ffn.0.weight": torch.ones(99, 24)}
    for wrong in (
        {},
        wide,
        state | {"more": torch.ones(1)},
        {"layers.0.attention.out_proj.weight": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match="no state dict of a pruned Classifier"):
            export.load_pruned(model, wrong)
    for change in ("scaled", "mask ignored", "tuple"):
        odd = nn.Sequential(ExportOddAttention(change))
        with pytest.raises(ValueError, match="ExportOddAttention is not plain softmax attention"):
            export.prune_heads(odd, {"0": torch.ones(2)}, 1)
    shared = nn.Sequential(ExportOddAttention("none"))
    shared.add_module("again", shared[0])
    with pytest.raises(ValueError, match="0 stands in two places of Sequential"):
        export.prune_heads(shared, {"0": torch.ones(2)}, 1)
    plain = export.prune_heads(nn.Sequential(ExportOddAttention("none")), {"0": torch.ones(2)}, 1)
    assert isinstance(plain[0], export.SelfAttention)
    with pytest.raises(ValueError, match="Linear has no attention"):
        export.prune_heads(nn.Linear(2, 2), {}, 1)
    for net in (
        [nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)],
        [nn.Linear(2, 3), nn.Linear(3, 2)],
        [nn.Linear(2, 3), nn.Flatten(0), nn.Linear(6, 2)],
        [nn.Embedding(5, 4), nn.Dropout(), nn.Linear(4, 2)],
    ):
        with pytest.raises(ValueError, match="no feed-forward net"):
            export.neuron_importance(nn.Sequential(*net), [])


def test_export_pruned_models_with_heads_or_neurons_alone_are_read_back():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    attention_ = nn.Sequential(export.SelfAttention(nn.Linear(12, 36), nn.Linear(12, 12), 3))
    smaller = (
        export.prune_neurons(net, {"": torch.rand(6)}, 2),
        export.prune_heads(attention_, {"0": torch.rand(3)}, 2),
    )
    inputs = torch.randn(5, 4), torch.randn(2, 5, 12)
    for whole, part, x in zip((net, attention_), smaller, inputs, strict=True):
        assert torch.equal(export.load_pruned(whole, part.state_dict())(x), part(x))


def test_export_models_whose_labels_share_a_file_are_refused(tmp_path):
    model, x = nn.Linear(3, 1), torch.zeros(2, 3)
    for labels in (("whole", "model"), ("whole", "a b", "a_b")):
        models = {label: copy.deepcopy(model) for label in labels}
        with pytest.raises(ValueError, match="would share a file"):
            export.write_artefacts(models, x, [], tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_export_gflops_are_the_median_s(monkeypatch):
    times = (50, 50, 7, 1, 3, 2, 6, 5, 4, 4, 4, 9)  # ms; the first two warm up
    ticks = itertools.accumulate(t for ms in times for t in (0, ms / 1000))
    monkeypatch.setattr(export.time, "perf_counter", lambda: next(ticks))
    assert export.hardware(1)["gemm_gflops"] == 537  # 2 * 1024^3 in 4 ms


def test_export_pruned_models_load_in_a_fresh_process(tmp_path):
    """Only the sizes of the original and the pruned state dict are known there; the answers are the same."""
    config = {"vocab_size": 50, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 32, "pool": "max"}
    model = encoder.EncoderClassifier(encoder.EncoderConfig(**config)).eval()
    smaller = export.prune_heads(
        model, {f"encoder.layers.{i}.self_attention": torch.rand(3) for i in range(2)}, 2
    )
    smaller = export.prune_neurons(smaller, {f"encoder.layers.{i}.ffn": torch.rand(32) for i in range(2)}, 5)
    tokens = export_tokens(4, 12, 50)
    torch.save(
        {"state": smaller.state_dict(), "tokens": tokens, "logits": smaller(tokens)}, tmp_path / "pruned.pt"
    )
    code = f"""
import torch, encoder, export
saved = torch.load("pruned.pt", weights_only=True)
model = encoder.EncoderClassifier(encoder.EncoderConfig(**{config}))
smaller = export.load_pruned(model, saved["state"]).eval()
assert torch.equal(smaller(saved["tokens"]), saved["logits"])
assert model.encoder.layers[0].ffn[0].out_features == 32  # the original is left whole
again = export.load_pruned(export.prune_heads(model, {{f"encoder.layers.{{i}}.self_attention": torch.ones(3)
    for i in range(2)}}, 3), saved["state"]).eval()
assert torch.equal(again(saved["tokens"]), saved["logits"])
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# The evidence


def test_export_benchmark_alternates_and_counts(monkeypatch):
    """A clock that the models advance: 5 rounds of every model on every input, after one to warm up; the
    first call of a turn, which takes longer, is not counted."""
    now, calls = [0.0], []
    monkeypatch.setattr(export.time, "perf_counter", lambda: now[0])

    def model(name: str, first: float, later: float):
        def run(x: Tensor) -> None:
            calls.append((name, len(x), torch.get_num_threads(), torch.is_grad_enabled()))
            n_calls = sum(c[0] == name for c in calls)
            now[0] += first if n_calls <= 3 or n_calls % 3 == 1 and slow_starts else later * len(x)

        return run

    torch.set_num_threads(1)
    slow_starts = True
    runners = {"a": model("a", 9.0, 0.001), "b": model("b", 9.0, 0.004), "c": model("c", 9.0, 0.002)}
    cases = {"mix": [(torch.zeros(1, 4),), (torch.zeros(3, 4),)]}
    results = export.benchmark(runners, cases, seconds=0.0, threads=2)
    assert torch.get_num_threads() == 1 and {c[2:] for c in calls} == {(2, False)}
    assert len(calls) == 3 * 3 * 6  # one round of warm-up, five that count
    rounds = [[c[0] for c in calls[i : i + 9 : 3]] for i in range(0, 54, 9)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len({tuple(r) for r in rounds}) > 1
    a = results["a"]["mix"]
    assert a == {"rounds": 5, "p50_ms": 2.0, "p90_ms": 3.0, "p99_ms": 3.0, "throughput": 1000.0}
    assert results["b"]["mix"]["throughput"] == 250.0 and results["c"]["mix"]["p50_ms"] == 4.0
    slow_starts = False
    results = export.benchmark(runners, {"x": [(torch.zeros(1, 4),)]}, seconds=0.14)
    assert results["b"]["x"]["rounds"] == 30  # 0.42 s of twice 0.007 s each


def test_export_benchmark_percentiles():
    seconds = [i / 1000 for i in range(101)]
    assert export.latency(seconds, 505) == {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "throughput": 100.0}


def test_export_recommends_the_fastest_within_the_loss():
    rows = [
        {"name": n, "accuracy": a, "p50_ms": t} for n, a, t in
        [("eager", 0.9, 10.0), ("slow", 0.95, 9.0), ("fast", 0.895, 3.0), ("wrong", 0.894, 1.0)]
    ]  # fmt: skip
    assert export.recommended(rows, 0.005)["name"] == "fast"
    assert export.recommended(rows, 0.0)["name"] == "slow"
    exactly = [{"accuracy": 0.50504, "p50_ms": 2.0}, {"accuracy": 0.50004, "p50_ms": 1.0}]
    assert export.recommended(exactly, 0.005) is exactly[1]
    assert export.recommended(rows, 1.0)["name"] == "wrong"


def test_export_table_says_how_much_faster_the_recommended_is(tmp_path, capsys):
    def row(name: str, p50: float, size: int, accuracy: float) -> dict:
        latency = {"32 x 256": {"p50_ms": p50}}
        return {
            "name": name, "p50_ms": p50, "size_bytes": size, "accuracy": accuracy, "agreement": 1.0,
            "max_abs_diff": 0.0, "latency": latency,
        }  # fmt: skip

    rows = [row("eager", 10.0, 4000, 0.9), row("ONNX", 2.5, 1000, 0.89)]
    report = {"models": rows, "refused": {"script": "why"}, "recommended": "ONNX", "headline": "32 x 256"}
    export.print_table(report | {"threads": 1, "max_loss": 0.02})
    out = capsys.readouterr().out
    assert "ONNX: 4.0 times as fast" in out and "0.25 of its size, accuracy -1.00 points (may lose 2)" in out
    assert "not possible: script: why" in out
    picture = export.plot_rows(report | {"threads": 1}, str(tmp_path / "a.png"))
    assert picture.read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


def test_export_demo_reports_all_formats(export_demo):
    out, result = export_demo
    report = last_json(result)
    assert result.stderr == "" and "arning" not in result.stdout  # no noise
    assert report == json.loads((out / "report.json").read_text())
    refused = set() if export.has_bf16() else {"torch.export, bf16", "pruned, torch.export, bf16"}
    assert set(report["refused"]) == refused
    assert report["threads"] == 1 and report["headline"] == "32 x 256"
    rows = {row["name"]: row for row in report["models"]}
    expected = {
        "eager": "weights.pt", "TorchScript, trace": "trace.ts", "TorchScript, script": "script.ts",
        "torch.export": "program.pt2", "ONNX": "model.onnx", "ONNX int8": "model.int8.onnx",
        "ONNX int8, embeddings 8 bits": "model.int8.e8.onnx", "ONNX int8, static": "model.static.onnx",
        "ONNX int8, embeddings 4 bits": "model.int8.e4.onnx", "pruned, ONNX": "pruned.onnx",
        "pruned, ONNX int8": "pruned.int8.onnx",
        "pruned, ONNX int8, embeddings 8 bits": "pruned.int8.e8.onnx",
        "pruned, ONNX int8, embeddings 4 bits": "pruned.int8.e4.onnx",
    }  # fmt: skip
    if export.has_bf16():
        expected |= {"torch.export, bf16": "model.bf16.pt2", "pruned, torch.export, bf16": "pruned.bf16.pt2"}
    assert {name: row["file"] for name, row in rows.items()} == expected
    sizes = {f"{b} x {t}" for b in (1, 8, 32) for t in (32, 128, 256)} | {"1 x real"}
    for name, row in rows.items():
        assert row["size_bytes"] == (out / row["file"]).stat().st_size
        assert (row["batch"], row["seq_len"]) == (32, 256) and set(row["latency"]) == sizes
        for timing in row["latency"].values():
            assert 0 < timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"] and timing["throughput"] > 0
        assert row["p50_ms"] == row["latency"]["32 x 256"]["p50_ms"]
        if name != "eager":
            assert 0 <= row["load_seconds"] < 30 and 20 < row["peak_mb"] < 3000
        if "pruned" not in name and "int8" not in name and "bf16" not in name:
            assert row["max_abs_diff"] <= 1e-5 and row["agreement"] == 1.0
        if "pruned" not in name:
            assert row["agreement"] >= (0.95 if "4 bits" in name else 0.99), name  # int8 too
    assert rows["eager"]["accuracy"] > 0.9 and rows["pruned, ONNX"]["accuracy"] > 0.9
    assert rows["pruned, ONNX"]["size_bytes"] < 0.6 * rows["ONNX"]["size_bytes"]
    assert rows["ONNX int8"]["size_bytes"] < 0.5 * rows["ONNX"]["size_bytes"]
    assert report["recommended"] in rows and f"recommended: {report['recommended']}" in result.stdout
    for key in ("cpu", "gemm_gflops", "torch", "seconds", "settings"):
        assert report[key], key
    assert (out / "accuracy_latency.png").read_bytes().startswith(b"\x89PNG")
    assert not [p.name for p in out.iterdir() if p.name.endswith((".part", ".data"))]


def test_export_demo_shows_what_a_trace_freezes_and_that_zeros_bring_nothing(export_demo):
    report = last_json(export_demo[1])
    assert report["control_flow"] == {
        "TorchScript, trace": "wrong, without a word", "TorchScript, script": "right",
        "torch.export": "refused", "torch.export, torch.where": "right",
    }  # fmt: skip
    sweep = {row["name"]: row for row in report["unstructured"]}
    assert sweep["0% zeros"]["accuracy"] == report["models"][0]["accuracy"] > sweep["90% zeros"]["accuracy"]
    assert "deprecated" in export_demo[1].stdout


# Reads nothing but the artefact: -I leaves neither the project nor PYTHONPATH on the path.
EXPORT_FRESH = """
import json, sys
import numpy as np, onnxruntime, torch
assert not any(name in sys.modules for name in ("export", "encoder"))
folder, sentences = sys.argv[1], sys.argv[2:]
def session(name):
    return onnxruntime.InferenceSession(f"{folder}/{name}", providers=["CPUExecutionProvider"])
metadata = session("model.int8.onnx").get_modelmeta().custom_metadata_map
vocabulary, labels = json.loads(metadata["vocabulary"]), json.loads(metadata["labels"])
ids = [[vocabulary[word] for word in sentence.split()] for sentence in sentences]
length = max(map(len, ids))
tokens = np.array([row + [0] * (length - len(row)) for row in ids] + [[0] * length])
answers = {}
for kind in ("", ".int8", ".int8.e8", ".int8.e4", ".static"):
    answers["ONNX" + kind] = session(f"model{kind}.onnx").run(None, {"tokens": tokens})[0]
tokens = torch.from_numpy(tokens)
with torch.no_grad():
    answers["trace"] = torch.jit.load(f"{folder}/trace.ts")(tokens).numpy()
    answers["script"] = torch.jit.load(f"{folder}/script.ts")(tokens).numpy()
    answers["program"] = torch.export.load(f"{folder}/program.pt2").module()(tokens).numpy()
print(json.dumps({name: [y.tolist(), [labels[i] for i in y.argmax(1)]] for name, y in answers.items()}))
"""


def test_export_artefacts_answer_in_a_fresh_process(export_demo, tmp_path):
    """With the vocabulary from the metadata; a row of padding alone is finite and the same in all formats."""
    sentences = {
        "the plot was superb": "positive", "the plot was not superb": "negative",
        "the script was dull but to be fair the music was not awful": "positive",
        "late at night the music was gripping but the cast was lifeless": "negative",
    }  # fmt: skip
    command = [sys.executable, "-I", "-W", "ignore", "-c", EXPORT_FRESH, str(export_demo[0]), *sentences]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    reference = torch.tensor(answers["trace"][0])
    assert len(answers) == 8 and reference.isfinite().all()
    vocabulary_size = torch.load(export_demo[0] / "weights.pt", weights_only=True)["embedding.weight"].size(0)
    model = export.Classifier(vocabulary_size).eval()
    model.load_state_dict(torch.load(export_demo[0] / "weights.pt", weights_only=True))
    check_close(reference[-1], model(torch.zeros(1, 3, dtype=torch.long))[0].detach(), 1e-5)
    for name, (logits, labels) in answers.items():
        assert labels[:-1] == list(sentences.values()), name
        tolerance = 0.3 if "." in name else 1e-5
        check_close(torch.tensor(logits), reference, tolerance, name)
    padding = torch.tensor([logits[-1] for logits, _ in answers.values()])
    check_close(padding, reference[-1].expand_as(padding), 0.05)


def test_export_fresh_process_has_nothing_of_this_one(export_onnx_file, tmp_path, monkeypatch):
    ballast = torch.ones(100_000_000)  # 400 MB here are not the child's
    facts, output = export.in_a_fresh_process(export_onnx_file, (torch.ones(2, 3, dtype=torch.long),))
    assert facts["peak_mb"] < 300 and ballast[-1] == 1 and 0 <= facts["load_seconds"] < 10
    check_close(output, export.load_artefact(export_onnx_file)(torch.ones(2, 3, dtype=torch.long)), 1e-6)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    for module in ("export", "encoder"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"No module named '{module}'"):
            patch.setattr(export, "FRESH", f"import {module}")
            export.in_a_fresh_process(export_onnx_file, (torch.ones(2, 3, dtype=torch.long),))
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="bad.onnx fails in a fresh process"):
        export.in_a_fresh_process(tmp_path / "bad.onnx", (torch.ones(2, 3, dtype=torch.long),))


def test_export_all_says_what_a_model_refuses(tmp_path):
    """A model with an `if` on its input has no .pt2 and no ONNX; the rest is compared all the same."""
    model, x = nn.Sequential(export.Gate(), nn.Linear(3, 2), nn.Dropout(0.5)), torch.randn(4, 3)
    labels = model.eval()(x).argmax(-1).clone()
    model.train()
    cases = {"small": [(x[:2],)], "large": [(x,)]}
    report = export.export_all({"it": model}, x, [((x,), labels)], cases, [], tmp_path, seconds=0.001)
    assert set(report["refused"]) == {"torch.export", "torch.export, bf16", "ONNX"}
    assert "inputs of floats" in report["refused"]["torch.export, bf16"] and report["headline"] == "large"
    assert [row["name"] for row in report["models"]] == ["eager", "TorchScript, trace", "TorchScript, script"]
    assert all(row["accuracy"] == row["agreement"] == 1 and row["batch"] == 4 for row in report["models"])
    assert all(row["max_abs_diff"] <= 1e-6 for row in report["models"])  # without dropout
    assert model.training  # as it was
    for wrong in ({"evaluation": []}, {"cases": {}}, {"models": {}}, {"max_loss": -0.1}, {"max_loss": 1.1}):
        given = {"models": {"it": model}, "evaluation": [((x,), labels)], "cases": cases} | wrong
        with pytest.raises(ValueError, match="models, evaluation and cases must hold something"):
            export.export_all(example_inputs=x, calibration=[], out=tmp_path, **given)


def test_export_all_holds_everything_to_the_threads_asked_for(tmp_path, monkeypatch):
    given, load, measure = [], export.load_artefact, export.benchmark
    monkeypatch.setattr(export, "load_artefact", lambda path, n=1: given.append(n) or load(path, n))
    monkeypatch.setattr(export, "benchmark", lambda r, c, t=1.0, n=1: given.append(n) or measure(r, c, t, n))
    monkeypatch.setattr(export, "in_a_fresh_process", lambda path, x, n=1: (given.append(n) or {}, None))
    model, x = nn.Sequential(export.Gate(), nn.Linear(3, 2)), torch.randn(4, 3)
    data, cases = [((x,), torch.zeros(4))], {"c": [(x,)]}
    for max_loss in (0, 1):
        out = tmp_path / "a" / "b"
        export.export_all({"it": model}, x, data, cases, [], out, threads=2, seconds=0.001, max_loss=max_loss)
    assert given == [2] * 10


def test_export_sentences_mean_what_their_labels_say():
    sentences = export.generate_sentences(500, 3)
    assert len(dict(sentences)) == 500 and sentences == export.generate_sentences(500, 3)
    assert 0.4 < np.mean([label for _, label in sentences]) < 0.6
    for text, label in sentences:
        clause = text.split(" but ")[-1].split()
        assert label == (clause[-1] in export.GOOD) ^ ("not" in clause), text


def test_export_is_quiet_and_leaves_logging_alone(export_models, tmp_path, capfd):
    import logging

    root = logging.getLogger()
    before = root.level, root.handlers[:], root.manager.disable, warnings.filters[:]
    model, x = export_models["own"], torch.randint(0, 50, (2, 9))
    export.export_torchscript(model, x, tmp_path / "m.ts")
    export.export_program(model, x, tmp_path / "m.pt2")
    path = export.export_onnx(model, x, tmp_path / "m.onnx")
    export.quantize_dynamic(path, tmp_path / "d.onnx", embedding_bits=4)
    export.quantize_static(path, tmp_path / "s.onnx", [{"tokens": x}])
    with pytest.raises(ValueError):
        export.export_program(export.Gate(), torch.ones(2, 2), tmp_path / "g.pt2")
    assert capfd.readouterr() == ("", "")
    assert before == (root.level, root.handlers[:], root.manager.disable, warnings.filters[:])


def test_export_errors_on_the_command_line(tmp_path):
    (tmp_path / "file").write_text("")
    check_one_line_error(run_script("export.py", "--out", "file/below", cwd=tmp_path), "file")
    unknown = run_script("export.py", "--widht", "3", cwd=tmp_path)
    assert unknown.returncode == 2 and "--widht" in unknown.stderr
    for arguments, words in (
        ("--epochs 0", "epochs.*0"), ("--threads 0", "threads.*0"), ("--seconds -1", "seconds.*-1"),
        ("--n-train 10", "n_train.*200.*10"), ("--n-test 0", "n_test.*200.*0"),
        ("--n-test 100001", "n_test.*100000.*100001"), ("--max-loss -0.1", "max_loss.*-0.1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            export.settings_from_command_line(arguments.split())
    with pytest.raises(ValueError, match="needs nowhere_onnx: pip install nowhere_onnx"):
        export.need("torch", "nowhere_onnx")


# -----------------------------------------------------------------------------
# classify_imdb.py: data

NO_NETWORK = {
    "https_proxy": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
}  # nothing listens there


def imdb_files(per_folder: int) -> dict[str, str]:
    """Texts in IMDB's layout: {"train/pos/0_7.txt": text}."""
    return {
        f"{folder}/{number}_{7 if 'pos' in folder else 2}.txt": f"{folder} {number}, a film<br />Über alles."
        for folder in imdb.PER_FOLDER
        for number in range(per_folder)
    }


def imdb_tarball(path: Path, files: dict[str, str], prefix: str = "aclImdb/") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(prefix + "train/pos")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, text in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def imdb_folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


def test_classify_imdb_reads_tarball_and_folder_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 30))
    files = imdb_files(30)
    unasked = {"train/unsup/0_0.txt": "no label", "README": "read me", "train/pos/._0_7.txt": "no review"}
    from_tar = imdb.read_imdb(imdb_tarball(tmp_path / "aclImdb_v1.tar.gz", files | unasked))
    outer = imdb_folder(tmp_path / "there" / "aclImdb", files | unasked).parent
    assert from_tar == imdb.read_imdb(outer) == imdb.read_imdb(outer / "aclImdb")
    assert imdb.read_imdb(imdb_tarball(tmp_path / "again.tar.gz", files, prefix="./aclImdb/")) == from_tar
    for split in ("train", "test"):
        assert [(r.number, r.label) for r in from_tar[split]] == [(i, 1) for i in range(30)] + [
            (i, 0) for i in range(30)
        ]
        for review in from_tar[split]:
            assert review.text.startswith(f"{split}/{'pos' if review.label else 'neg'} {review.number},")
    other = imdb.read_imdb(imdb_folder(tmp_path / "other", files | {"test/neg/3_2.txt": "a word changed"}))
    assert imdb.fingerprint(other) != imdb.fingerprint(from_tar)
    monkeypatch.setattr(imdb, "UNLABELLED", {"train/unsup": 12})
    more = {f"train/unsup/{i}_0.txt": f"unsup {i}" for i in range(12)}
    for path in (
        imdb_tarball(tmp_path / "all.tar.gz", files | more),
        imdb_folder(tmp_path / "all", files | more),
    ):
        with_unlabelled = imdb.read_imdb(path, unlabelled=True)
        unlabelled = with_unlabelled.pop("unlabelled")
        assert with_unlabelled == from_tar == imdb.read_imdb(path)
        assert unlabelled == [imdb.Review(i, -1, f"unsup {i}") for i in range(12)]
    with pytest.raises(ValueError, match="1 reviews in train/unsup, not 12"):
        imdb.read_imdb(tmp_path / "aclImdb_v1.tar.gz", unlabelled=True)


def test_classify_imdb_takes_no_part_of_imdb_for_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 30))
    files = imdb_files(30)
    long = " ".join(
        f"{random.Random(i).random()}" for i in range(5000)
    )  # most of the bytes lie inside a text
    whole = imdb_tarball(tmp_path / "whole.tar.gz", files | {"train/unsup/0_0.txt": long})

    def refused(path: Path, *words: str):
        with pytest.raises(ValueError) as error:
            imdb.read_imdb(path)
        assert all(word in str(error.value) for word in ("data:", str(path), *words)), error.value

    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no folder train/pos")
    no_test_neg = {name: text for name, text in files.items() if not name.startswith("test/neg")}
    refused(imdb_folder(tmp_path / "part", no_test_neg), "no folder test/neg")
    refused(imdb_tarball(tmp_path / "part.tar.gz", no_test_neg), "0 reviews in test/neg")
    one_less = {name: text for name, text in files.items() if name != "train/neg/11_2.txt"}
    refused(imdb_folder(tmp_path / "less", one_less), "29 reviews in train/neg", "30")
    refused(
        imdb_tarball(tmp_path / "more.tar.gz", files | {"test/pos/30_7.txt": "one more"}),
        "31 reviews in test/pos",
    )
    (tmp_path / "text").write_text("no tarball")
    refused(tmp_path / "text", "no .tar.gz")
    plain = tmp_path / "plain.gz"
    plain.write_bytes(gzip.compress(b"no tar in it" * 100))
    refused(plain, "truncated, altered")
    data = whole.read_bytes()
    for cut in (3, len(data) // 2, len(data) - 9, len(data) - 1):
        whole.write_bytes(data[:cut])
        refused(whole, "truncated, altered")
    header = 10 + len("whole.tar") + 1  # gzip's own: time and file name, no text
    for place in random.Random(0).sample(range(header, len(data)), 60):
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        whole.write_bytes(altered)
        refused(whole, "truncated, altered")
    whole.write_bytes(data)
    assert len(imdb.read_imdb(whole)["test"]) == 60


def test_classify_imdb_loads_what_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 5))
    monkeypatch.setattr(imdb, "UNLABELLED", {"train/unsup": 3})
    files = imdb_files(5) | {f"train/unsup/{i}_0.txt": "?" for i in range(3)}
    path = imdb_tarball(tmp_path / "all.tar.gz", files)
    for unlabelled in (False, True):
        s = imdb.Settings(data=str(path), unlabelled=unlabelled)
        assert imdb.load_reviews(s) == ("imdb", imdb.read_imdb(path, unlabelled))
        assert "not exactly the published" in capsys.readouterr().out
    monkeypatch.setattr(imdb, "IMDB_FINGERPRINT", imdb.fingerprint(imdb.read_imdb(path)))
    imdb.load_reviews(s)
    assert not capsys.readouterr().out


def test_classify_imdb_constants_are_the_published_ones():
    assert (imdb.IMDB_SIZE, imdb.IMDB_MD5) == (84_125_825, "7c2ac02c03563afcf9b574c7e56c153a")
    assert set(imdb.PER_FOLDER.values()) == {12_500} and imdb.UNLABELLED == {"train/unsup": 50_000}
    log = json_of(ROOT / "assets/imdb.json")
    assert log["fast"][0]["settings"]["texts"] == imdb.IMDB_FINGERPRINT


def test_classify_imdb_fingerprint_sees_each_label_and_text():
    reviews = {split: rows[:20] for split, rows in imdb.demo_reviews(0).items()}
    seen = {imdb.fingerprint(reviews)}
    for split in ("train", "test", "unlabelled"):
        for change in ({"text": "x"}, {"label": 7}):
            rows = list(reviews[split])
            rows[3] = rows[3]._replace(**change)
            seen.add(imdb.fingerprint(reviews | {split: rows}))
    assert len(seen) == 7


def test_classify_imdb_unpacks_nothing(tmp_path, monkeypatch):
    """Members whose paths lead elsewhere are no reviews, and no file appears anywhere."""
    monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 5))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    evil = {"../evil.txt": "out", f"{tmp_path}/absolute.txt": "out", "train/pos/../../../evil.txt": "out"}
    path = imdb_tarball(tmp_path / "evil.tar.gz", imdb_files(5) | evil, prefix="")
    assert len(imdb.read_imdb(path)["train"]) == 10
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["evil.tar.gz", "here"]


def test_classify_imdb_dev_split_is_blocks_of_neighbours():
    """A tenth of each class; neighbours are in two splits at the blocks' ten edges and nowhere else."""
    for per_class in (12_500, 4000, 50):
        reviews = [imdb.Review(number, label, "") for label in (1, 0) for number in range(per_class)]
        train, dev = imdb.split_dev(reviews)
        assert sorted(train + dev) == sorted(reviews) and len(dev) == 2 * per_class // 10
        for label in (0, 1):
            numbers = {r.number for r in dev if r.label == label}
            assert len(numbers) == per_class // 10
            edges = [n for n in range(per_class - 1) if (n in numbers) != (n + 1 in numbers)]
            assert len(edges) == 10 and max(edges) - min(edges) > per_class // 2  # drawn from several places
    assert sorted(imdb.dev_numbers(50)) == [4, 14, 24, 34, 44]


def test_classify_imdb_cleans_and_finds_shared_texts():
    assert imdb.clean("A film.<br /><br />Über\t alles\n") == "a film. über alles"
    texts = ["Good film!", "good   FILM", "A bad one.<br />Really"]
    one = [imdb.Review(i, 1, text) for i, text in enumerate(texts)]
    other = [
        imdb.Review(i, 0, text) for i, text in enumerate(["good film", "a bad one, really!", "goodfilm", ""])
    ]
    assert imdb.shared_texts(one, other) == 2 and imdb.shared_texts(other, one) == 3


def test_classify_imdb_demo_reviews_share_no_text():
    reviews = imdb.demo_reviews(0)
    train, dev = imdb.split_dev(reviews["train"])
    assert (len(train), len(dev), len(reviews["test"])) == (7200, 800, 2000)
    assert imdb.shared_texts(train, dev) == imdb.shared_texts(train + dev, reviews["test"]) == 0
    assert all(2 * sum(r.label for r in part) == len(part) for part in (train, dev, reviews["test"]))


IMDB_GIVEN = pytest.mark.skipif(
    not os.environ.get("IMDB_DATA"), reason="IMDB_DATA is not set: IMDB itself isn't tested"
)


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


@pytest.fixture
def serve():
    """serve(data, ...) starts a server on 127.0.0.1 and returns (url, the handler class)."""
    servers = []

    def start(data: bytes, **given):
        handler = type("Handler", (BreakingServer,), {"data": data, "asked": [], **given})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/file", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_classify_imdb_download(tmp_path, serve):
    data = random.Random(0).randbytes(1_000_000)
    md5 = hashlib.md5(data).hexdigest()
    fetch = functools.partial(imdb.download, size=len(data), md5=md5)
    part = tmp_path / "got.part"

    url, whole = serve(data)
    fetch(url, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data and whole.asked == [None] and not part.exists()

    url, breaking = serve(data, sent_at_most=300_000)  # breaks off, and goes on where it was asked to
    fetch(url, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data
    assert breaking.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]

    part.write_bytes(data[:400_000])  # left by a run that was killed
    url, whole = serve(data)
    fetch(url, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data and whole.asked == ["bytes=400000-"]

    part.write_bytes(data[:400_000])  # a server that knows no ranges sends all from the start
    url, _ = serve(data, ranges=False)
    fetch(url, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data


def test_classify_imdb_download_that_fails_leaves_what_was_there(tmp_path, serve):
    data = random.Random(1).randbytes(500_000)
    md5 = hashlib.md5(data).hexdigest()
    got, part = tmp_path / "got", tmp_path / "got.part"
    altered = bytearray(data)
    altered[123_456] ^= 1

    def fails(url: str, *words: str):
        with pytest.raises(OSError) as error:
            imdb.download(url, got, len(data), md5)
        assert all(word in str(error.value) for word in (url, *words)), error.value
        assert not got.exists()

    fails(serve(bytes(altered))[0], "md5")
    assert not part.exists()  # wrong bytes are no start for the next attempt
    fails(serve(data + b"more")[0], "md5")
    fails(serve(data, status=404)[0], "404")
    fails(serve(data, status=503)[0], "503")
    fails("http://127.0.0.1:9/file", "refused")
    assert not part.exists()
    fails(serve(data, sent_at_most=100_000, ranges=False)[0], "100,000 of 500,000")  # never gets further
    assert part.read_bytes() == data[:100_000]
    imdb.download(serve(data)[0], got, len(data), md5)
    assert got.read_bytes() == data


def test_classify_imdb_finds_the_cache_first(tmp_path, monkeypatch, serve):
    data = b"tarball"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(imdb, "IMDB_SIZE", len(data))
    monkeypatch.setattr(imdb, "IMDB_MD5", hashlib.md5(data).hexdigest())
    url, server = serve(data)
    monkeypatch.setattr(imdb, "IMDB_URL", url)
    assert imdb.find_imdb("given") == Path("given") and not server.asked
    (tmp_path / "imdb").mkdir()  # left by a download that broke off
    path = imdb.find_imdb("")
    assert path == tmp_path / "imdb/aclImdb_v1.tar.gz" == imdb.find_imdb("") and path.read_bytes() == data
    assert len(server.asked) == 1  # the second time it was there
    path.unlink()
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:  # two first runs
        paths = list(pool.map(lambda _: (both.wait(), imdb.find_imdb(""))[1], range(2)))
    assert paths == [path, path] and path.read_bytes() == data and len(server.asked) == 2
    path.unlink()
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert imdb.find_imdb("").read_bytes() == data


def test_classify_imdb_a_stalled_server_is_given_up(tmp_path, monkeypatch):
    def urlopen(request, timeout=None):
        assert timeout and timeout <= 60
        raise TimeoutError("timed out")

    monkeypatch.setattr(imdb.urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match="timed out after 0 of 5 bytes"):
        imdb.download("http://127.0.0.1/a", tmp_path / "a", 5, "")


# -----------------------------------------------------------------------------
# classify_imdb.py: tokenizer, batches, training


def test_classify_imdb_tokenizer():
    texts = [review.text for review in imdb.demo_reviews(0)["train"][:500]]
    tokenizer = imdb.Tokenizer.train([imdb.clean(text) for text in texts], 400)
    assert tokenizer.ranks == imdb.Tokenizer.train([imdb.clean(text) for text in texts], 400).ranks
    assert 300 < tokenizer.vocab_size <= 400
    odd = ["", "a", "Ünï <br />çødé \U0001f600 \x00\x7f 12345", texts[0], "don't it's"]
    again = imdb.Tokenizer(list(tokenizer.ranks))  # what a checkpoint holds is enough
    every_byte = [bytes([i, j]) for i in range(256) for j in (0, 34, 92, 255)]
    assert imdb.unpacked(imdb.packed(every_byte)) == every_byte
    assert imdb.unpacked(imdb.packed(tokenizer.ranks)) == tokenizer.ranks
    for text, ids, same in zip(odd, tokenizer.encode(odd, 1000), again.encode(odd, 1000), strict=True):
        assert ids.dtype == torch.long and torch.equal(ids, same)
        assert ids.numel() == 0 or imdb.SPECIAL <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.bpe.decode([i - imdb.SPECIAL for i in ids.tolist()]) == imdb.clean(text)
    assert (
        len(tokenizer.encode([texts[0]], 1000)[0]) < len(texts[0].split()) * 2
    )  # merged: no letter-by-letter
    (whole,) = tokenizer.encode([" ".join(texts[:20])], 10_000)
    for max_len in (1, 2, 7, 64, len(whole) - 1, len(whole), len(whole) + 1):
        (short,) = tokenizer.encode([" ".join(texts[:20])], max_len)
        head = min(max_len, len(whole)) // 2 if max_len < len(whole) else len(whole)
        tail = min(max_len, len(whole)) - head
        assert torch.equal(short, torch.cat((whole[:head], whole[len(whole) - tail :])))
    assert imdb.pad([whole[:3], whole[:0], whole[:1]]).tolist() == [
        whole[:3].tolist(),
        [0, 0, 0],
        [whole[0], 0, 0],
    ]
    assert imdb.pad([whole[:0]]).tolist() == [[imdb.PAD]]


def test_classify_imdb_batches_hold_each_review_once_and_little_padding():
    rng = random.Random(0)
    for n in (1, 31, 32, 33, 5000):
        lengths = [min(256, int(rng.expovariate(1 / 200)) + 1) for _ in range(n)]
        batches = imdb.batches(lengths, 32, seed=1)
        assert sorted(i for batch in batches for i in batch) == list(range(n))
        assert len(batches) == -(-n // 32) and all(0 < len(batch) <= 32 for batch in batches)
        assert batches == imdb.batches(lengths, 32, seed=1)
    assert batches != imdb.batches(lengths, 32, seed=2)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches[:50]]
    assert longest != sorted(longest)  # batches come in random order, not the short ones first
    other = {tuple(sorted(batch)) for batch in imdb.batches(lengths, 32, seed=2)}
    assert len({tuple(sorted(batch)) for batch in batches} & other) < 3


def test_classify_imdb_upcoming_goes_on_in_any_epoch():
    s, lengths = imdb.Settings(epochs=3, batch_size=4), [7] * 10  # 3 steps an epoch
    whole = list(imdb.upcoming(lengths, s, 0))
    assert len(whole) == 9 and whole[:3] != whole[3:6] != whole[6:]
    assert all(sorted(sum(whole[e : e + 3], [])) == list(range(10)) for e in (0, 3, 6))
    assert all(list(imdb.upcoming(lengths, s, step)) == whole[step:] for step in range(10))
    other = list(imdb.upcoming(lengths, dataclasses.replace(s, seed=1), 0))
    assert not any(whole[e : e + 3] == other[f : f + 3] for e in (0, 3, 6) for f in (0, 3, 6))


def test_classify_imdb_hides_a_share_of_the_words_and_counts():
    seen, ids = [], [torch.randint(2, 300, (n,)) for n in (400, 1000, 1000)]

    def model(tokens, fold):
        seen.append((tokens, fold))
        return torch.zeros(len(tokens), 2)

    data, s = (ids, [0.2, 0.3, 0.9], [0, 1, 2]), imdb.Settings(mask_words=0.3)
    loss, right = imdb.share_of_batch(model, [0, 1, 2], data, False, s, imdb.ALONE)
    assert right == 2 and loss.item() == pytest.approx(3 * math.log(2))
    ((tokens, fold),) = seen
    assert (tokens[0, 400:] == imdb.PAD).all() and fold.tolist() == [0, 1, 2]
    assert abs((tokens == imdb.MASK).sum().item() / 2400 - 0.3) < 0.05


def test_classify_imdb_weights_follow_the_seed():
    a, b, c = (imdb.make_model(imdb.Settings(seed=n), 300).head.weight for n in (0, 1, 0))
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_classify_imdb_optimizer_and_schedule():
    s = imdb.Settings(lr=2.0, warmup=10, weight_decay=0.5)
    model = imdb.make_model(s, 300)
    optimizer = imdb.make_optimizer(model, s)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2, 3} and {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    rates = [imdb.learning_rate(step, 1000, s) for step in range(1000)]
    assert rates[:10] == pytest.approx(
        [0.2 * i for i in range(1, 11)], rel=1e-3
    )  # 1 / warmup first, then the peak
    assert (
        rates[500] == pytest.approx(1.0) and rates[250] == pytest.approx(1 + 2**-0.5) and 0 < rates[-1] < 1e-4
    )


def test_classify_imdb_bf16_only_where_the_cpu_has_it(monkeypatch):
    cpu = torch.device("cpu")
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        assert imdb.choose_bf16("auto", cpu) is has
        assert imdb.choose_bf16("bf16", cpu) is True and imdb.choose_bf16("off", cpu) is False
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # another architecture
    assert imdb.choose_bf16("auto", cpu) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert imdb.choose_bf16("auto", torch.device("cuda")) is False


def test_classify_imdb_probabilities_are_each_text_s_own():
    """In the order given, whatever stands beside a text in its batch; P(positive) is class 1's."""
    model = imdb.make_model(imdb.Settings(d_model=16, d_ff=16, max_len=50), 300)
    ids = [torch.randint(2, 300, (random.Random(i).randint(0, 50),)) for i in range(150)]
    p = imdb.probabilities(model, ids, imdb.ALONE)
    for i in (0, 1, 70, 149):
        check_close(p[i : i + 1], model(imdb.pad([ids[i]])).softmax(-1)[:, 1].detach(), 1e-5)
    labels = torch.tensor([1, 0, 1, 0])
    assert imdb.accuracy(torch.tensor([0.9, 0.1, 0.2, 0.6]), labels) == 0.5
    assert imdb.accuracy(torch.tensor([0.9, 0.1, 0.8, 0.4]), labels) == 1.0


def test_classify_imdb_training_flops_count_the_matrix_products():
    """2 operations for each weight and place, 4 * C for each pair of places; twice that backward."""
    s = imdb.Settings(n_layers=3, d_model=32, d_ff=48, n_heads=4)
    model = imdb.make_model(s, 300)
    weights = sum(p.numel() for p in model.encoder.layers.parameters() if p.dim() == 2)
    weights += model.shorten.weight.numel()
    forward = sum(2 * weights * T + 3 * (2 * T * T * 32 + 2 * T * T * 32) for T in (5, 2))
    assert imdb.training_flops(model.config, [17, 5]) == 3 * forward


def test_classify_imdb_ngram_ids_equal_a_loop():
    """By place: the bucket of the single, the pair, the triple that end there; 0 where one isn't a word."""
    for T in (1, 2, 3, 40):
        tokens = torch.randint(0, 30, (4, T))  # with padding (0) and hidden words (1) among them
        buckets = imdb.ngram_ids(tokens)
        assert buckets.shape == (4, T, 3) and torch.equal(imdb.ngram_ids(tokens.int()), buckets)
        for b, row in enumerate(tokens.tolist()):
            for t in range(T):
                for n in (1, 2, 3):
                    gram = row[t - n + 1 : t + 1] if t >= n - 1 else []
                    hashed = sum(x * f for x, f in zip(reversed(gram), imdb.FACTORS)) % imdb.BUCKETS + 1  # noqa: B905
                    assert buckets[b, t, n - 1] == (hashed if gram and min(gram) >= imdb.SPECIAL else 0)
    short = torch.randint(9000, 16_000, (2, 9), dtype=torch.int32)  # 32 bits would overflow
    assert torch.equal(imdb.ngram_ids(short), imdb.ngram_ids(short.long()))
    largest = torch.full((1, 3), 2**20)  # an id beyond any vocabulary here: no overflow
    assert imdb.ngram_ids(largest)[0, 2, 2] == sum(imdb.FACTORS) * 2**20 % imdb.BUCKETS + 1
    words = torch.randint(2, 16_000, (1, 3000))
    assert len(imdb.ngram_ids(words).unique()) > 0.99 * (len(words.unique()) + 2 * 3000 - 3)  # few collide


def test_classify_imdb_hidden_words_and_padding_have_no_odds():
    assert not imdb.ngram_ids(torch.tensor([[imdb.MASK, imdb.PAD]])).any()
    assert 0.8 < imdb.make_model(imdb.Settings(), 300).from_odds.weight.std() < 1.2  # see there
    assert len({imdb.PAD, imdb.MASK, imdb.SPECIAL}) == 3 and imdb.SPECIAL > max(imdb.PAD, imdb.MASK)
    for prime in (imdb.BUCKETS, *imdb.FACTORS):
        assert all(prime % k for k in range(2, math.isqrt(prime) + 1))


def test_classify_imdb_odds_equal_counting_and_never_see_a_review_s_own_label():
    rng = random.Random(0)
    ids = [torch.randint(2, 12, (rng.randint(0, 12),)) for _ in range(40)]
    labels, folds = [rng.randrange(2) for _ in ids], [rng.randrange(imdb.FOLDS) for _ in ids]
    odds = imdb.ngram_odds(ids, labels, folds)
    assert odds.shape == (imdb.FOLDS + 1, imdb.BUCKETS + 1) and (odds[:, 0] == 0).all()
    seen = set()
    for left_out in range(imdb.FOLDS + 1):
        counts = collections.defaultdict(lambda: [1, 1])
        for x, label, fold in zip(ids, labels, folds, strict=True):
            if fold != left_out:
                for bucket in set(imdb.ngram_ids(x[None]).flatten().tolist()) - {0}:
                    counts[bucket][label] += 1
        seen |= set(counts)
        for bucket in seen:
            negative, positive = counts[bucket]
            assert odds[left_out, bucket].item() == pytest.approx(math.log(positive / negative), abs=1e-6)
    assert (odds != 0).any(0).sum() <= len(seen)
    turned = [1 - label if fold == 2 else label for label, fold in zip(labels, folds, strict=True)]
    others = imdb.ngram_odds(ids, turned, folds)
    assert torch.equal(others[2], odds[2]) and not torch.equal(others[1], odds[1])


def imdb_random_model(**settings) -> imdb.ReviewClassifier:
    model = imdb.make_model(imdb.Settings(d_model=16, n_heads=2, d_ff=24, max_len=64, **settings), 300).eval()
    model.set_odds(torch.randn(imdb.FOLDS + 1, imdb.BUCKETS + 1).index_fill(1, torch.tensor(0), 0.0))
    return model


def test_classify_imdb_model_padding_and_batch_invariance():
    model = imdb_random_model()
    for n in (1, 2, 3, 4, 5, 17, 62):
        tokens = torch.randint(2, 300, (3, n))
        alone = model(tokens)
        for T in (n, n + 1, n + 2, 64):
            padded = torch.zeros(4, T, dtype=torch.long)
            padded[:3, :n] = tokens
            check_close(model(padded)[:3], alone, 1e-5)
            assert torch.equal(model(padded)[3], model.head.bias)  # a row of padding alone
    with pytest.raises(ValueError, match="T <= 64.*65"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="integers.*float"):
        model(torch.ones(1, 5))


@pytest.mark.parametrize("n", [21, 22, 23, 24])
def test_classify_imdb_model_is_its_parts_written_out(n):
    """Embedding * sqrt(C) + odds, 0 beyond the text; a convolution and a mean at every fourth place; then
    encoder.py's parts."""
    model, tokens = imdb_random_model(pool="mean"), torch.randint(2, 300, (2, n))
    x = model.encoder.embedding(tokens) * 4 + model.odds[imdb.ngram_ids(tokens), 0] @ model.from_odds.weight.T
    x = torch.cat((torch.zeros(2, 2, 16), x, torch.zeros(2, 5, 16)), 1)
    places = []
    for start in range(0, n + 2, 4):  # while one of five tokens is there
        window = x[:, start : start + 5]  # (B, 5, C)
        conv = torch.einsum("bkc,ock->bo", window, model.shorten.weight) + model.shorten.bias
        places.append(conv + window.mean(1))
    x = torch.stack(places, 1) + encoder.sinusoidal_positional_encoding(64, 16)[: len(places)]
    for layer in model.encoder.layers:
        x = layer(x, torch.ones(2, 1, 1, len(places), dtype=torch.bool))
    check_close(model(tokens), model.head(model.encoder.final_norm(x).mean(1)), 1e-5)


@torch.no_grad()
def test_classify_imdb_every_token_counts():
    """Wherever it stands: also the last one of a text whose length the stride divides."""
    model = imdb_random_model()
    for run in (model, imdb.FusedClassifier(model)):
        for T in range(1, 14):
            tokens = torch.full((1, T), 7)
            for i in range(T):
                other = tokens.clone()
                other[0, i] = 8
                assert not torch.equal(run(other), run(tokens)), (T, i)


def test_classify_imdb_refuses_the_weights_of_another_model():
    model, other = imdb_random_model(), imdb.make_model(imdb.Settings(d_model=8, n_heads=2), 300)
    with pytest.raises(ValueError, match="out holds another model's weights .*delete it"):
        imdb.load_weights(model, other.state_dict(), "out")
    other = imdb_random_model()
    imdb.load_weights(model, other.state_dict(), "out")
    assert torch.equal(model.shorten.weight, other.shorten.weight)


@torch.no_grad()
def test_classify_imdb_dropout_is_of_words_and_odds():
    """And of the pooled vector."""
    model, tokens = imdb_random_model().train(), torch.randint(2, 300, (2, 10))
    model.dropout.forward = torch.zeros_like
    check_close(model(tokens).detach(), model.head.bias.detach().expand(2, -1), 1e-6)
    model.encoder.dropout.forward = torch.zeros_like
    places, _ = model.embed(tokens)
    check_close(places, (model.shorten.bias + model.encoder.positions[:4]).expand(2, 4, 16), 1e-6)
    for max_len in (1, 2, 3, 4, 5, 63, 64, 65):
        model = imdb.make_model(imdb.Settings(max_len=max_len, d_model=16, n_heads=2), 300)
        assert model.encoder.positions.shape == (max_len // 4 + 2, 16)
        assert model(torch.full((1, max_len), 7)).shape == (1, 2)


def test_classify_imdb_pruned_copy_keeps_the_lower_layers(monkeypatch):
    """And is trained by the whole model, which stays as it is."""
    seen = []
    s = imdb.Settings(d_model=16, n_heads=8, n_layers=5, d_ff=24, max_len=64)
    model = imdb.make_model(s, 300).eval()
    for i, layer in enumerate(model.encoder.layers):
        nn.init.constant_(layer.self_attention_norm.bias, float(i))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(imdb, "fine_tuned", lambda *a: seen.append(a) or a[0])
    sample = [((torch.randint(2, 300, (4, 9)),), torch.tensor([0, 1, 1, 0]))]
    pruned = imdb.pruned_copy(model, sample, {"train": ()}, s)
    ((tuned, *rest),) = seen
    assert rest == [model, {"train": ()}, s] and tuned is not model
    assert isinstance(pruned, imdb.FusedClassifier) and len(model.encoder.layers) == 5
    assert not isinstance(tuned, imdb.FusedClassifier) and model.fold_odds.numel() > 0
    tokens = torch.randint(2, 300, (3, 20))
    check_close(pruned(tokens).detach(), tuned.eval()(tokens).detach(), 1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [layer.self_attention_norm.bias[0].item() for layer in pruned.encoder.layers] == [0.0, 1.0]
    for layer in pruned.encoder.layers:
        assert layer.self_attention.n_heads == 2 and (24 // 4, 16) in {p.shape for p in layer.parameters()}


def test_classify_imdb_fine_tuning_ends_after_700_steps(tmp_path, monkeypatch):
    model, data, s, _ = imdb_tiny_training(tmp_path)
    calls, parameter = [], next(model.parameters())
    monkeypatch.setattr(imdb, "batches", lambda *_, **__: [[0, 1]] * 800)
    monkeypatch.setattr(imdb, "share_of_batch", lambda *_: calls.append(0) or (parameter.sum(), 0))
    imdb.fine_tuned(model, copy.deepcopy(model).eval(), data, s)
    assert len(calls) == 700


@torch.no_grad()
def test_classify_imdb_fused_model_is_the_same_function():
    """On every length; the model itself stays as it is."""
    model = imdb_random_model()
    before = copy.deepcopy(model.state_dict())
    fused = imdb.FusedClassifier(model.train())
    assert not fused.training
    model.eval()
    for T in (1, 2, 3, 4, 5, 6, 23, 62, 63, 64):
        tokens = torch.randint(0, 300, (3, T))  # padding (0) and hidden words (1) among them
        (x, mask), (y, fused_mask) = model.embed(tokens), fused.embed(tokens)
        check_close(y[mask], x[mask], 1e-5)
        assert torch.equal(mask, fused_mask)
        check_close(fused(tokens), model(tokens), 1e-5)
    assert "shorten.weight" not in fused.state_dict() and not hasattr(fused, "fold_odds")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="T <= 64.*65"):
        fused(torch.ones(1, 65, dtype=torch.long))


def test_classify_imdb_model_takes_the_odds_of_a_review_s_fold():
    model, tokens = imdb_random_model(), torch.randint(2, 300, (imdb.FOLDS, 30))
    answers, odds = model(tokens, torch.arange(imdb.FOLDS)), model.fold_odds.view(imdb.FOLDS, -1)
    for fold in range(imdb.FOLDS):
        model.odds.copy_(odds[fold][:, None])
        check_close(answers[fold], model(tokens)[fold], 1e-5)
    assert "fold_odds" not in model.state_dict() and "odds" in model.state_dict()


def test_classify_imdb_linear_model_weighs_by_naive_bayes():
    reviews = [r._replace(text=f"The<br />{r.text}") for r in imdb.demo_reviews(1)["train"][:400]]
    labels = [r.label for r in reviews]
    model = imdb.LinearModel(reviews, labels)
    names = model.counts.get_feature_names_out()
    holders = {0: collections.Counter(), 1: collections.Counter()}
    all_grams = collections.Counter()
    for review in reviews:
        words = re.findall(r"\w+|[^\w\s]", imdb.clean(review.text))
        grams = {" ".join(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)}
        holders[review.label].update(grams & set(names))
        all_grams.update(grams)
    assert set(names) == {gram for gram, n in all_grams.items() if n >= 2}
    total = [sum(holders[label][name] + 1 for name in names) for label in (0, 1)]
    for i in range(0, len(names), 50):
        n0, n1 = (holders[label][names[i]] + 1 for label in (0, 1))
        assert model.weights[i] == pytest.approx(math.log(n1 / total[1]) - math.log(n0 / total[0]))
    p = torch.tensor(model([r.text for r in reviews]))
    assert imdb.accuracy(p, torch.tensor(labels)) > 0.8
    # Where the penalised loss is least, the weights are C times what the errors pull at.
    x = model.counts.transform([imdb.clean(r.text) for r in reviews]).toarray() * model.weights
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pull, weights = 30 * x.T @ (np.array(labels) - p.numpy()), model.model.coef_[0]
    assert np.abs(pull - weights).max() < 0.2 * np.abs(weights).max()  # it stops a little before that


@functools.cache
def imdb_demo_run(folder: Path) -> subprocess.CompletedProcess:
    return run_script(
        "classify_imdb.py", *IMDB_SMALL, "--no-export", "--out", "run", cwd=folder, **NO_NETWORK
    )


IMDB_SMALL = (
    "--d-model",
    "32",
    "--d-ff",
    "32",
    "--epochs",
    "1",
    "--n-heads",
    "1",
    "--vocab-size",
    "500",
    "--lr",
    "5e-3",
)


IMDB_REAL_DATA = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import classify_imdb as imdb
reviews = imdb.read_imdb(Path(os.environ["IMDB_DATA"]))
found = {"fingerprint": imdb.fingerprint(reviews)}
for split, rows in reviews.items():
    found[split] = [len(rows), sum(r.label for r in rows), sum(len(r.text.encode()) for r in rows)]
train, dev = imdb.split_dev(reviews["train"])
found["parts"] = [len(train), len(dev)]
found["shared"] = [imdb.shared_texts(reviews["train"], reviews["test"]), imdb.shared_texts(train, dev)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imdb_real_data_begun(request):
    """Ten seconds, beside other tests of classify_imdb.py."""
    command = [sys.executable, "-c", IMDB_REAL_DATA, str(ROOT)]
    run = functools.partial(subprocess.run, command, capture_output=True, text=True, timeout=300)
    given = "test_classify_imdb_real_data" if os.environ.get("IMDB_DATA") else ""
    with beside_other_tests(request, given, run) as begun:
        yield begun


@pytest.fixture(scope="module")
def imdb_run(imdb_formats_begun, imdb_real_data_begun, tmp_path_factory):
    """A finished run on demo data: (the folder that holds it, what it printed)."""
    folder = tmp_path_factory.mktemp("imdb")
    return folder, imdb_demo_run(folder)


def test_classify_imdb_without_network_says_so_and_runs_the_demo(imdb_run):
    folder, result = imdb_run
    report = last_json(result)
    banner = result.stdout.split("preset=")[0]
    assert banner.count("!" * 100) == 2 and "NOT FOUND" in banner and "127.0.0.1" not in result.stderr
    assert "refused" in banner and "--data aclImdb_v1.tar.gz" in banner and imdb.IMDB_URL in banner
    assert report["dataset"] == "demo" and report["test_accuracy"] > 0.7
    names = "test_accuracy dev_accuracy train_seconds total_seconds n_parameters preset seed"
    names += " cpu threads gemm_gflops torch"
    assert all(report[name] is not None for name in names.split())
    assert report == json.loads((folder / "run/report.json").read_text())
    assert report["test_texts_also_in_train"] == 0 and 0 < report["train_seconds"] < report["total_seconds"]
    assert 0 < report["prepare_seconds"] < report["total_seconds"] < 240
    assert [row["step"] for row in report["history"]] == [56, 112, 169, 225]
    assert 0.4 < report["history"][0]["train_accuracy"] < report["history"][-1]["train_accuracy"] <= 1
    made = {"confusion.png", "curves.png", "mistakes.json", "model.pt", "report.json"}
    made |= {"calibration.png", "test.json", "index.html"}
    made |= {f"attention_{label}.{kind}" for label in imdb.LABELS for kind in ("png", "html")}
    checkpoints = {path.name for path in (folder / "run").glob("step_*.pt")}
    assert {path.name for path in (folder / "run").iterdir()} == made | checkpoints
    assert ddp_newest(folder / "run").startswith("step_00000225.") and len(checkpoints) == 2
    mistakes = json.loads((folder / "run/mistakes.json").read_text())
    surenesses = [m["probability"] for m in mistakes]
    assert len(mistakes) == min(20, round(2000 * (1 - report["test_accuracy"])))
    assert surenesses == sorted(surenesses) and all(sureness <= 0.5 for sureness in surenesses)
    lines = [
        line for line in result.stdout.splitlines() if "train accuracy" in line and "dev accuracy" in line
    ]
    assert len(lines) == 4


def test_classify_imdb_finished_run_says_so(imdb_run):
    folder, result = imdb_run
    before = (folder / "run/model.pt").stat().st_mtime_ns
    again = imdb_demo_run.__wrapped__(folder)
    assert last_json(again) == last_json(result) and "finished" in again.stdout
    assert (folder / "run/model.pt").stat().st_mtime_ns == before


def test_classify_imdb_checkpoint_is_one_safe_file(imdb_run):
    """weights_only=True reads it; with the tokenizer in it, it gives the report's accuracy again."""
    folder, result = imdb_run
    state = torch.load(folder / "run/model.pt", weights_only=True)
    assert set(state) == {"settings", "config", "ranks", "model"}
    model = imdb.ReviewClassifier(encoder.EncoderConfig(**state["config"]))
    model.load_state_dict(state["model"])
    test_set = imdb.demo_reviews(0)["test"]
    ids = imdb.Tokenizer(state["ranks"]).encode([r.text for r in test_set], model.config.max_len)
    p = imdb.probabilities(model, ids, imdb.ALONE)
    assert imdb.accuracy(p, torch.tensor([r.label for r in test_set])) == last_json(result)["test_accuracy"]


def test_classify_imdb_predicts(imdb_run, tmp_path, capsys, monkeypatch):
    folder, _ = imdb_run
    monkeypatch.chdir(tmp_path)
    long = "the plot was clever , " * 2000  # far over the length that a file name may have
    (tmp_path / "texts.txt").write_text(
        "a superb film , the plot was clever\n\na dull\x85film\n", encoding="utf-8"
    )

    def predict(what: str) -> list[dict]:
        imdb.run_job(["--out", str(folder / "run"), "--predict", what])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (answer,) = predict("a superb film , the plot was clever")
    assert list(answer) == ["label", "probability", "text"]
    assert answer["label"] == "positive" and answer["text"] == "a superb film , the plot was clever"
    assert 0.5 < answer["probability"] <= 1
    from_file = predict("texts.txt")
    assert [a["text"] for a in from_file] == ["a superb film , the plot was clever", "", "a dull\x85film"]
    assert from_file[0] == answer and from_file[2]["label"] == "negative"
    assert from_file[2]["probability"] > 0.5  # the answer's, not P(positive)
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfa superb film , the plot was clever\ncaf\xe9\n")
    assert predict("latin.txt")[0] == answer  # without the mark that some editors put in front
    assert predict("latin.txt")[1]["text"] == "caf\ufffd"
    reader, writer = os.pipe()
    os.write(writer, b"a superb film , the plot was clever\n")
    os.close(writer)
    assert predict(f"/dev/fd/{reader}") == [answer]
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        predict(".")
    command = [sys.executable, str(ROOT / "classify_imdb.py"), "--out", str(folder / "run"), "--predict", "-"]
    piped = subprocess.run(
        command, input=f"a dull\x85film\n{long}", capture_output=True, text=True, timeout=60
    )
    assert [json.loads(line) for line in piped.stdout.splitlines()] == [from_file[2], predict(long)[0]], (
        piped.stderr
    )


def test_classify_imdb_predict_errors(imdb_run, tmp_path):
    folder, _ = imdb_run
    with pytest.raises(ValueError, match="nowhere/model.pt.*train a model first"):
        imdb.run_job(["--predict", "a text", "--out", "nowhere"])
    for nothing in ("", "  "):
        with pytest.raises(ValueError, match="no text"):
            imdb.run_job(["--predict", nothing, "--out", str(folder / "run")])
    data = bytearray((folder / "run/model.pt").read_bytes())
    (tmp_path / "bad").mkdir()
    for place in (len(data) // 2, len(data) // 3):
        data[place] ^= 1  # inside a tensor: torch.load would not notice
        (tmp_path / "bad/model.pt").write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            imdb.load(tmp_path / "bad/model.pt")
    bad = run_script("classify_imdb.py", "--predict", "a text", "--out", "bad", cwd=tmp_path)
    check_one_line_error(bad, "bad/model.pt", "damaged")
    for content in (b"", b"no checkpoint", bytes(data[:1000])):
        (tmp_path / "bad/model.pt").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            imdb.load(tmp_path / "bad/model.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "bad/model.pt")
    with pytest.raises(ValueError, match="no model of this script"):
        imdb.load(tmp_path / "bad/model.pt")
    (checkpoint, *_) = (folder / "run").glob("step_*.pt")  # has settings and a model, but no config
    with pytest.raises(ValueError, match="no model of this script"):
        imdb.load(checkpoint)


class Evil:
    """Unpickled, it makes a file: what any code in a checkpoint could do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_classify_imdb_loading_runs_no_code_from_the_file(tmp_path):
    torch.save({"settings": {}, "model": Evil(tmp_path / "evil")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no model of this script"):
        imdb.load(tmp_path / "model.pt")
    assert not (tmp_path / "evil").exists()


def same_weights(one: Path, other: Path) -> bool:
    one, other = (torch.load(path, weights_only=True)["model"] for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def imdb_ranks(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("imdb_ranks"), "classify_imdb")
    yield launcher
    launcher.end()


IMDB_OFFLINE = "script.find_imdb = no_network; script.exit_now(script.main())"


def test_classify_imdb_killed_and_started_again_gives_the_same_weights(imdb_run, imdb_ranks, tmp_path):
    """kill -9 twice, once during a save, then the same command: the undisturbed run's weights."""
    folder, result = imdb_run
    out, code = tmp_path / "run", IMDB_OFFLINE
    arguments = [*IMDB_SMALL, "--no-export", "--out", str(out)]
    for kill in range(2):
        before = max(ddp_newest(out), "step_00000001")
        imdb_ranks.start(1, *arguments, "--save-every", "0", code=code)  # after each step
        imdb_ranks.wait_until(lambda before=before: ddp_newest(out) > before)
        if kill == 1:
            imdb_ranks.wait_until(lambda: list(out.glob("*.part")))
        else:
            time.sleep(0.2)
        imdb_ranks.kill([0])
        imdb_ranks.wait()
        assert not (out / "model.pt").exists()
    left = train_ddp.load_checkpoint(out)
    assert 2 < left["step"] < 225
    (last,) = imdb_ranks.run(1, *arguments, code=code)
    assert f"going on at step {left['step']}" in last.stdout
    assert same_weights(out / "model.pt", folder / "run/model.pt")
    mine, other = last_json(last), last_json(result)
    assert mine["test_accuracy"] == other["test_accuracy"]
    drop = [{k: v for k, v in row.items() if k != "seconds"} for row in mine["history"]]
    assert drop == [{k: v for k, v in row.items() if k != "seconds"} for row in other["history"]]


IMDB_FEW = """
import signal
rows = {split: rows[:300] for split, rows in script.demo_reviews(0).items()}
script.demo_reviews, script.find_imdb = lambda seed: rows, no_network
script.BUCKETS = 10_007  # a small table of odds: every step is saved

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def again(*_, **__):
    raise AssertionError("done again")

def late(step, steps, s, rate=script.learning_rate):
    return die() if step == 12 else rate(step, steps, s)

{here}
script.exit_now(script.main())
"""
IMDB_TINY = "--d-model 16 --n-heads 2 --d-ff 16 --n-layers 1 --vocab-size 400 --max-len 64 --unlabelled"
IMDB_TINY += " --epochs 1 --no-export --save-every 0"


def imdb_code(here: str = "") -> str:
    """For the launcher: a run on 270 + 300 reviews, in which something is different."""
    return IMDB_FEW.replace("{here}", here)


def test_classify_imdb_killed_in_any_stage_does_the_finished_ones_once(imdb_ranks, tmp_path):
    arguments, out = IMDB_TINY.split(), tmp_path / "killed"
    (whole,) = imdb_ranks.run(1, *arguments, "--out", str(tmp_path / "whole"), code=imdb_code())
    stages = [  # where it is killed; the step of what is left
        ("Tokenizer.train", None), ("LinearModel", None), ("encoded", 0), ("learning_rate", 12),
        ("record_dev", 13), ("plot_confusion", 18), ("write_page", 18),
    ]  # fmt: skip
    for place, wanted in stages:
        here = f"script.{place} = {'late' if place == 'learning_rate' else 'die'}"
        (killed,) = imdb_ranks.attempt(1, *arguments, "--out", str(out), code=imdb_code(here))
        assert killed.returncode == -signal.SIGKILL, (place, killed)
        left = train_ddp.load_checkpoint(out)
        assert (left and left["step"]) == wanted, place
    assert left["total_seconds"] > 0 and left["prepare"] > 0
    for old in out.glob("step_*.pt"):
        old.unlink()
    train_ddp.save_checkpoint(out, 18, left | {"total_seconds": 1000.0, "prepare": 500.0})
    done_once = ("LinearModel", "Tokenizer.train", "learning_rate", "test")
    nothing = "".join(f"script.{name} = " for name in done_once) + "again"
    (done,) = imdb_ranks.run(1, *arguments, "--out", str(out), code=imdb_code(nothing))
    assert same_weights(out / "model.pt", tmp_path / "whole/model.pt")
    assert last_json(done)["test_accuracy"] == last_json(whole)["test_accuracy"]
    assert last_json(done)["total_seconds"] > 1000 and last_json(done)["prepare_seconds"] >= 500


def imdb_tiny_training(tmp_path: Path, **settings):
    """(model, data, settings, run) of a training on 200 demo reviews."""
    s = imdb.Settings(d_model=8, d_ff=8, n_heads=1, n_layers=1, max_len=16, batch_size=10, vocab_size=300)
    s = dataclasses.replace(s, **{"out": str(tmp_path), "epochs": 1} | settings)
    reviews = {split: rows[:200] for split, rows in imdb.demo_reviews(5).items()}
    run = imdb.earlier_run(s, "demo", reviews) | {"start": 0.0, "bf16": False}
    run["ranks"] = imdb.Tokenizer.train([r.text for r in reviews["train"]], s.vocab_size).ranks
    data = imdb.encoded(imdb.Tokenizer(run["ranks"]), reviews["train"], reviews["test"][:50], reviews, run, s)
    return imdb.model_of(run, data, s), data, s, run


def test_classify_imdb_every_step_and_rank_has_its_own_randomness(tmp_path, monkeypatch):
    """And gradients are clipped to the norm asked for."""
    seeds, norms, share, clip = [], [], imdb.share_of_batch, nn.utils.clip_grad_norm_
    monkeypatch.setattr(imdb, "share_of_batch", lambda *a: seeds.append(torch.initial_seed()) or share(*a))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, n: norms.append(n) or clip(p, n))
    for rank, seed in ((1, 0), (1, 1), (0, 0)):  # rank 1 saves nothing
        model, data, s, run = imdb_tiny_training(tmp_path, clip=0.125, seed=seed)
        imdb.train(model, data, s, run, imdb.Processes(rank, 1, torch.device("cpu")))
    assert len(set(seeds)) == 60 and norms == [0.125] * 60


def test_classify_imdb_a_stage_of_another_run_is_done_again(tmp_path):
    run, path = {"settings": {"seed": 0}, "history": [1], "start": 0.0}, tmp_path / "stage.json"
    for now, made, result in (
        (run, 1, 1),
        (run, 2, 1),
        (run | {"history": [2]}, 3, 3),
        (run | {"settings": 0}, 4, 4),
    ):
        assert imdb.stage(path, now, lambda made=made: {"a": made}) == {"a": result}
    for damaged in ("", "{}", "[]", "5", path.read_text()[:-9]):
        path.write_text(damaged)
        assert imdb.stage(path, run, lambda: {"a": 5}) == {"a": 5} == json_of(path)["result"], damaged


def test_classify_imdb_a_kept_stage_counts_its_seconds(tmp_path):
    run = {"settings": {}, "history": [], "start": 100.0}
    imdb.stage(tmp_path / "a.json", run, lambda: time.sleep(0.2) or {})
    assert run["start"] == 100.0
    imdb.stage(tmp_path / "a.json", run, lambda: {})
    assert 99 < run["start"] <= 99.8


def test_classify_imdb_dev_loss_and_accuracy_by_hand(monkeypatch):
    p, labels = torch.tensor([0.9, 0.2, 0.6, 0.4]), [1, 0, 0, 1]
    monkeypatch.setattr(imdb, "probabilities", lambda *_: p)
    run = {"step": 3, "seconds": 1.26, "right": 3, "seen": 4, "history": [], "bf16": False}
    line = imdb.record_dev(None, ([], labels), run, imdb.ALONE)
    loss = -sum(math.log(x) for x in (0.9, 0.8, 0.4, 0.4)) / 4
    row = {"step": 3, "seconds": 1.3, "train_accuracy": 0.75, "dev_accuracy": 0.5, "dev_loss": round(loss, 4)}
    assert run["history"] == [row] and run["right"] == run["seen"] == 0 and "dev loss" in line


def test_classify_imdb_confusion_counts_stand_in_the_row_of_the_actual_label(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    written, text = {}, Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, t, **kw: written.update({(x, y): t}) or text(self, x, y, t, **kw)
    )
    predicted, actual = torch.tensor([1, 1, 1, 0, 0, 1]) == 1, torch.tensor([0, 0, 1, 1, 0, 0]) == 1
    imdb.plot_confusion(predicted, actual, tmp_path / "a.png")
    cells = {place: words.split("\n") for place, words in written.items()}
    assert cells[0, 0] == ["1", "25.0%"] and cells[1, 0] == ["3", "75.0%"]  # x: predicted, y: actual
    assert cells[0, 1] == ["1", "50.0%"] and cells[1, 1] == ["1", "50.0%"]


def test_classify_imdb_curves_are_named_right_and_time_left_counts_from_a_resume(
    tmp_path, monkeypatch, capsys
):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **kw: drawn.update({kw["label"]: y}) or plot(self, x, y, *a, **kw),
    )
    imdb.plot_curves([{"seconds": 1.0, "train_accuracy": 0.5, "dev_accuracy": 0.25}], tmp_path / "a.png")
    assert drawn == {"training, words hidden": [50.0], "dev, other films": [25.0]}
    progress = imdb.Progress(50, 100, imdb.ALONE)
    progress.start = progress.said = time.monotonic() - 20
    progress.show(60, 0.5)
    assert "step 60/100, loss 0.500, 80 s left" in capsys.readouterr().err


def test_classify_imdb_learns_in_bf16(tmp_path):
    """Autocast for real: the loss in float32, the weights near those of float32 and not the same."""
    ends = []
    for bf16 in (False, True):
        model, data, s, run = imdb_tiny_training(tmp_path / str(bf16))
        run["bf16"] = bf16
        share = imdb.share_of_batch(model, [0, 1, 2], data["train"], bf16, s, imdb.ALONE)
        assert share[0].dtype == torch.float32
        imdb.train(model, data, s, run, imdb.ALONE)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        p = imdb.probabilities(model, data["dev"][0], imdb.ALONE, bf16)
        assert (torch.equal(p, imdb.probabilities(model, data["dev"][0], imdb.ALONE))) != bf16
    assert 1e-5 < ((ends[0] - ends[1]).norm() / ends[0].norm()).item() < 0.05


def test_classify_imdb_keeps_two_checkpoints_and_the_time(tmp_path):
    for step in range(4):
        run = {"step": step, "start": time.perf_counter() - 5}
        imdb.save_run(run, {}, imdb.Settings(out=str(tmp_path)))
    assert len(list(tmp_path.glob("step_*.pt"))) == 2
    assert 5 <= train_ddp.load_checkpoint(tmp_path)["total_seconds"] < 60


def test_classify_imdb_looks_sixteen_times_an_epoch_for_its_target(tmp_path):
    for epochs in (1, 2):
        model, data, s, run = imdb_tiny_training(tmp_path / str(epochs), target=0.99, epochs=epochs)
        imdb.train(model, data, s, run, imdb.ALONE)
        assert len(run["history"]) == 16 * epochs


def test_classify_imdb_knows_a_place_that_cannot_be_written_before_the_work(read_only, tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "load_reviews", lambda s: 1 / 0)
    with pytest.raises(OSError, match="read-only"):
        imdb.begin(imdb.Settings(out=str(tmp_path), export=False))


def test_classify_imdb_tokenizer_learns_clean_texts(tmp_path):
    s = imdb.Settings(out=str(tmp_path), vocab_size=300)
    reviews = {split: rows[:100] for split, rows in imdb.demo_reviews(0).items()}
    raw = {
        split: [r._replace(text=r.text.upper() + "<br />") for r in rows] for split, rows in reviews.items()
    }
    run = imdb.earlier_run(s, "demo", raw) | {"start": 0.0}
    merged = b"".join(token for token in imdb.prepared(raw["train"], raw, run, s)["ranks"] if len(token) > 1)
    assert merged and merged == merged.lower() and b"<" not in merged


def test_classify_imdb_fine_tuning_is_its_loop(tmp_path):
    (model, data, s, _), (other, *_) = (imdb_tiny_training(tmp_path, clip=0.05) for _ in range(2))
    teacher = copy.deepcopy(model).eval()
    teacher.head.bias.data += torch.tensor([0.0, 2.0])
    ids, targets, folds = data["train"]
    torch.manual_seed(1)  # must not matter
    tuned = imdb.fine_tuned(model.eval(), teacher, data, s)
    optimizer = torch.optim.AdamW(other.train().parameters(), lr=1.0)
    torch.manual_seed(s.seed)
    for step, rows in enumerate(imdb.batches([len(x) for x in ids], 10, seed=s.seed)):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 - step / 20)
        halfway = list(targets)
        for i in rows:
            said = teacher(ids[i][None], torch.tensor([folds[i]])).softmax(-1)[0, 1].item()
            halfway[i] = 0.5 * targets[i] + 0.5 * said
        (imdb.share_of_batch(other, rows, (ids, halfway, folds), False, s, imdb.ALONE)[0] / 10).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
    assert not tuned.training
    for one, two in zip(tuned.parameters(), other.parameters(), strict=True):
        check_close(one.detach(), two.detach(), 1e-5)


def test_classify_imdb_batches_for_the_formats_are_padded_and_of_classes():
    (((tokens,), labels),) = imdb.in_batches([torch.full((2,), 5), torch.full((1,), 5)], [0.9, 0.2])
    assert labels.tolist() == [0, 1] and tokens.tolist() == [[5, imdb.PAD], [5, 5]]  # the shorter first


def test_classify_imdb_mfu_and_calibration_error(tmp_path):
    model, data, s, run = imdb_tiny_training(tmp_path)
    run |= {"step": 10, "steps": 20, "seconds": 2.0, "history": [{"dev_accuracy": 0.5}]}
    flops = imdb.training_flops(model.config, [len(x) for x in data["train"][0]])
    assert imdb.results(model, data, run, s, flops / 8 / 1e9)["mfu"] == pytest.approx(2.0)
    p, y = torch.tensor([0.15] * 4 + [0.85, 0.95, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1, 0])
    # bins: 4 of 7 say 0.15, 0.25 is right; 1 says 0.85, right; 2 say 0.975, half of them right
    expected = (4 * 0.10 + 0.15 + 2 * 0.475) / 7
    assert imdb.plot_calibration(p, y, tmp_path / "c.png") == pytest.approx(expected, abs=1e-5)


def test_classify_imdb_saves_every_so_often_and_after_the_last_step(tmp_path, monkeypatch):
    model, data, s, run = imdb_tiny_training(tmp_path, save_every=10.0)
    saved, seconds = [], itertools.count()
    monkeypatch.setattr(imdb, "save_run", lambda run, *_: saved.append(run["step"]))
    monkeypatch.setattr(imdb.time, "monotonic", lambda: float(next(seconds)))  # each look at the clock: 1 s
    imdb.train(model, data, s, run, imdb.ALONE)
    assert saved[-1] == 20 and 3 <= len(saved) <= 6
    gaps = [b - a for a, b in itertools.pairwise(saved[:-1])]
    assert max(gaps) - min(gaps) <= 1


def test_classify_imdb_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    model, data, s, run = imdb_tiny_training(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    monkeypatch.setattr(imdb, "save_run", lambda run, *_: signal.raise_signal(signal.SIGINT))  # the last save
    try:
        with pytest.raises(KeyboardInterrupt):
            imdb.train(model, data, s, run, imdb.ALONE)
    finally:
        signal.signal(signal.SIGINT, before)


def test_classify_imdb_diverging_is_an_error(tmp_path):
    model, data, s, run = imdb_tiny_training(tmp_path)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(ValueError, match="loss is nan at step 0.*--lr"):
        imdb.train(model, data, s, run, imdb.ALONE)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_classify_imdb_training_accuracy_is_of_the_steps_since_the_last_time(tmp_path):
    model, data, _, run = imdb_tiny_training(tmp_path)
    for right, seen in ((3, 4), (1, 2)):
        run |= {"right": run["right"] + right, "seen": run["seen"] + seen, "step": run["step"] + 1}
        imdb.record_dev(model, data["dev"], run, imdb.ALONE)
    assert [row["train_accuracy"] for row in run["history"]] == [0.75, 0.5]


def test_classify_imdb_finished_means_all_that_was_asked_for(tmp_path, monkeypatch):
    reviews = {split: rows[:100] for split, rows in imdb.demo_reviews(0).items()}
    monkeypatch.setattr(imdb, "load_reviews", lambda s: ("demo", reviews))
    s, without = (imdb.Settings(out=str(tmp_path), export=export_) for export_ in (True, False))
    report = {"settings": imdb.begin(s)[-1]["settings"]}
    for content, finished in (
        (json.dumps(report), (False, True)),  # a run without the export isn't all of one with it
        (json.dumps(report | {"models": []}), (True, True)),
        (json.dumps(report | {"settings": {}}), (False, False)),
        ("no json", (False, False)),
        ("[]", (False, False)),
        ("5", (False, False)),
    ):
        (tmp_path / "report.json").write_text(content)
        assert tuple(bool(imdb.begin(each)[0]) for each in (s, without)) == finished, content


def test_classify_imdb_shuffled_labels_teach_the_teacher_too(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(imdb, "LinearModel", lambda _, labels: given.append(labels) or (lambda texts: [0.5]))
    s = imdb.Settings(out=str(tmp_path), shuffle_labels=True, unlabelled=True, vocab_size=300)
    reviews = {split: rows[:100] for split, rows in imdb.demo_reviews(0).items()}
    run = imdb.earlier_run(s, "demo", reviews) | {"start": 0.0}
    made = imdb.prepared(reviews["train"], reviews, run, s)
    assert given == [imdb.shuffled_labels(reviews["train"], s)] != [[r.label for r in reviews["train"]]]
    assert made["prepare"] > 0 and made["linear"] == {"unlabelled": [0.5], "test": [0.5]}


def test_classify_imdb_a_new_model_ends_what_predict_used_before(tmp_path):
    """A demo's model.onnx must not answer for a model of IMDB that wasn't exported."""
    model, _, s, run = imdb_tiny_training(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"of another run")
    tokenizer, test_set = imdb.Tokenizer(run["ranks"]), imdb.demo_reviews(5)["test"][:30]
    imdb.test(model, tokenizer, test_set, run, tmp_path, imdb.ALONE)
    assert not (tmp_path / "model.onnx").exists() and (tmp_path / "model.pt").exists()


def test_classify_imdb_unlabelled_reviews_carry_the_linear_model_s_opinion():
    """As targets, and their n-grams count on the side it takes them for; folds are blocks of neighbours."""
    s = imdb.Settings(d_model=16, d_ff=16, n_heads=2, max_len=30, unlabelled=True)
    reviews = {split: rows[:200] for split, rows in imdb.demo_reviews(3).items()}
    ranks = imdb.Tokenizer.train([r.text for r in reviews["train"]], 400).ranks
    opinions = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    run = {"step": 0, "ranks": ranks, "linear": {"unlabelled": opinions}}
    data = imdb.encoded(imdb.Tokenizer(ranks), reviews["train"], reviews["test"], reviews, run, s)
    ids, targets, folds = data["train"]
    assert len(ids) == len(folds) == 400 and targets == [r.label for r in reviews["train"]] + opinions
    assert set(folds[:200]) == set(folds[200:]) == set(range(imdb.FOLDS))
    for part, of in ((reviews["train"], folds[:200]), (reviews["unlabelled"], folds[200:])):
        by_number = sorted(zip([r.number for r in part], of, strict=True))
        assert sorted(of) == [fold for _, fold in by_number]
    model = imdb.model_of(run, data, s)
    odds = imdb.ngram_odds(ids, [round(t) for t in targets], folds)
    check_close(model.odds[:, 0], odds[-1], 1e-6)
    check_close(model.fold_odds.view(imdb.FOLDS, -1), odds[:-1], 1e-6)


def test_classify_imdb_counts_the_linear_model_s_logit_as_much_as_its_own(tmp_path):
    model, _, _, run = imdb_tiny_training(tmp_path)
    tokenizer, test_set = imdb.Tokenizer(run["ranks"]), imdb.demo_reviews(5)["test"][:300]
    linear = torch.rand(300, generator=torch.Generator().manual_seed(1))
    run["linear"] = {"test": linear.tolist()}
    with torch.no_grad():
        model.head.weight.mul_(5)  # an untrained model is never sure
    result = imdb.test(model, tokenizer, test_set, run, tmp_path, imdb.ALONE)
    own = imdb.probabilities(model, tokenizer.encode([r.text for r in test_set], 16), imdb.ALONE)
    labels = torch.tensor([r.label for r in test_set])
    both, alone = (own.logit() + linear.logit() > 0) == labels.bool(), (linear > 0.5) == labels.bool()
    assert result["with_linear_test_accuracy"] == pytest.approx(both.double().mean().item(), abs=1e-5)
    assert result["linear_test_accuracy"] == pytest.approx(alone.double().mean().item(), abs=1e-5)
    assert len({*result.values()}) == 4
    worst = torch.where(labels == 1, own, 1 - own).sort().values[:20].tolist()
    given = [mistake["probability"] for mistake in json_of(tmp_path / "mistakes.json")]
    assert given == pytest.approx(worst, abs=1e-4)
    right = [r for r, p in zip(test_set, own.tolist(), strict=True) if (p > 0.5) == r.label]
    for few in (right[:9], right[:9] + [r for r in test_set if r not in right][:2]):  # fewer than 20 mistakes
        imdb.test(model, tokenizer, few, run | {"linear": {}}, tmp_path, imdb.ALONE)
        assert len(json_of(tmp_path / "mistakes.json")) == len(few) - 9


def test_classify_imdb_learns_the_same_on_any_number_of_processes(imdb_ranks, tmp_path):
    """Without dropout and hidden words; batches of 71, the last one of 2: fewer than there are ranks."""
    arguments = [*IMDB_TINY.split(), *"--dropout 0 --mask-words 0 --batch-size 71 --lr 1e-4".split()]
    arguments += ["--clip", "100"]  # none: a gradient of another size would be clipped to the same
    reports = {}
    for world in (1, 2, 3):
        results = imdb_ranks.run(world, *arguments, "--out", str(tmp_path / str(world)), code=imdb_code())
        reports[world] = last_json(results[0])
        assert all(not result.stdout for result in results[1:])  # rank 0 alone speaks
    states = {world: train_ddp.load_checkpoint(tmp_path / str(world)) for world in reports}
    for world in (2, 3):
        for name, value in states[1]["model"].items():
            check_close(states[world]["model"][name], value, 2e-5)
        for i, moments in states[1]["optimizer"]["state"].items():  # an average of the last gradients
            check_close(states[world]["optimizer"]["state"][i]["exp_avg"], moments["exp_avg"], 1e-5)
        for mine, other in zip(reports[world]["history"], reports[1]["history"], strict=True):
            assert mine["dev_loss"] == pytest.approx(other["dev_loss"], abs=2e-4)
            assert mine["train_accuracy"] == other["train_accuracy"]
        assert reports[world]["processes"] == world


def test_classify_imdb_a_lost_process_ends_the_others_and_any_number_goes_on(imdb_ranks, tmp_path):
    arguments = [*IMDB_TINY.split(), *"--dropout 0 --mask-words 0 --lr 1e-4".split()]
    imdb_ranks.run(1, *arguments, "--out", str(tmp_path / "whole"), code=imdb_code())
    out = tmp_path / "lost"
    here = "script.learning_rate = late if os.environ['RANK'] == '1' else script.learning_rate"
    first, second = imdb_ranks.attempt(2, *arguments, "--out", str(out), code=imdb_code(here))
    assert second.returncode == -signal.SIGKILL and first.returncode == 1, (first, second)
    assert "rank 0 waited for the gradients of step 12" in first.stderr and "Traceback" not in first.stderr
    assert train_ddp.load_checkpoint(out)["step"] == 12
    last = imdb_ranks.run(3, *arguments, "--out", str(out), code=imdb_code())[0]
    assert "going on at step 12" in last.stdout
    one, other = (train_ddp.load_checkpoint(tmp_path / name)["model"] for name in ("whole", "lost"))
    assert all((one[name] - other[name]).abs().max() <= 2e-5 for name in one)


def test_classify_imdb_an_error_of_one_rank_alone_is_said(imdb_ranks, tmp_path):
    here = """
def broken(*_):
    raise OSError("the disk of rank 1")
if os.environ["RANK"] == "1":
    script.learning_rate = broken
"""
    arguments = [*IMDB_TINY.split(), "--out", str(tmp_path)]
    first, second = imdb_ranks.attempt(2, *arguments, code=imdb_code(here))
    assert second.returncode == 2 and "classify_imdb.py: the disk of rank 1" in second.stderr
    assert first.returncode == 1 and "rank 0 waited for the gradients of step 0" in first.stderr


def test_classify_imdb_signal_stops_all_ranks_at_one_step(imdb_ranks, tmp_path):
    arguments = [*IMDB_TINY.split(), "--epochs", "50", "--out", str(tmp_path / "run")]
    imdb_ranks.start(2, *arguments, code=imdb_code())
    imdb_ranks.wait_until(lambda: ddp_newest(tmp_path / "run") >= "step_00000005")
    imdb_ranks.kill([1], signal.SIGTERM)
    results = imdb_ranks.wait()
    assert [result.returncode for result in results] == [143, 143], results
    step = train_ddp.load_checkpoint(tmp_path / "run")["step"]
    assert f"step {step} of 900 is saved" in results[0].stderr and not results[1].stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_classify_imdb_interrupted_saves_and_says_how_to_go_on(imdb_ranks, tmp_path, number):
    out, code = tmp_path / "run", IMDB_OFFLINE
    arguments = [*IMDB_SMALL, "--out", str(out), "--epochs", "50", "--save-every", "0.1"]
    imdb_ranks.start(1, *arguments, code=code)
    imdb_ranks.wait_until(lambda: ddp_newest(out) > "step_00000001")
    imdb_ranks.kill([0], number)
    (stopped,) = imdb_ranks.wait()
    assert stopped.returncode == 128 + number and "Traceback" not in stopped.stderr
    assert "the same command goes on" in stopped.stderr and f"run/{ddp_newest(out)}" in stopped.stderr
    state = train_ddp.load_checkpoint(out)
    assert state["step"] > 0 and f"step {state['step']} of" in stopped.stderr
    (other,) = imdb_ranks.attempt(1, *arguments, "--seed", "7", "--dropout", "0.5", code=code)
    check_one_line_error(other, "seed 0 there, 7 here", "dropout 0.1 there, 0.5 here", "--out")


def test_classify_imdb_ctrl_c_before_training(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(imdb, "run_job", interrupted)
    assert imdb.main() == 130 and "same command goes on" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(imdb, "run_job", lambda: imdb.baseline(imdb.Settings()))
    assert imdb.main() == 2 and "scikit-learn" in capsys.readouterr().err
    monkeypatch.setattr(imdb, "run_job", lambda: importlib.import_module("no_such_package"))
    assert imdb.main() == 2 and "package no_such_package is missing" in capsys.readouterr().err


def test_classify_imdb_shuffled_labels_teach_nothing(imdb_ranks, tmp_path):
    """The honesty check; the test set has 2,000 demo reviews, so 50 +- 4% is 3.6 standard deviations."""
    arguments = [*IMDB_SMALL, "--no-export", "--shuffle-labels", "--out", str(tmp_path)]
    report = last_json(imdb_ranks.run(1, *arguments, code=IMDB_OFFLINE)[0])
    assert abs(report["test_accuracy"] - 0.5) <= 0.04


def test_classify_imdb_goes_from_demo_to_imdb_but_not_back(imdb_run, tmp_path):
    """A demo run in OUT gives way to IMDB; a run on IMDB is never overwritten by a demo."""
    reviews = imdb.demo_reviews(0)
    s = imdb.Settings(out=str(tmp_path))
    new = imdb.earlier_run(s, "demo", reviews)
    train_ddp.save_checkpoint(tmp_path, 5, new | {"step": 5})
    assert imdb.earlier_run(s, "demo", reviews)["step"] == 5
    new = imdb.earlier_run(s, "imdb", reviews)
    assert new["step"] == 0 and not ddp_newest(tmp_path)  # or the demo's would still be the newest
    train_ddp.save_checkpoint(tmp_path, 5, new | {"step": 5})
    with pytest.raises(ValueError, match="dataset imdb there, demo here"):
        imdb.earlier_run(s, "demo", reviews)
    reviews["test"][7] = reviews["test"][7]._replace(text="another text")
    with pytest.raises(ValueError, match="texts"):
        imdb.earlier_run(s, "imdb", reviews)
    train_ddp.save_checkpoint(tmp_path, 9, {"weights": 1})  # another program's
    with pytest.raises(ValueError, match="another run"):
        imdb.earlier_run(s, "imdb", reviews)


def test_classify_imdb_settings_that_may_change_within_a_run(tmp_path):
    reviews = {split: rows[:20] for split, rows in imdb.demo_reviews(0).items()}
    s = imdb.Settings(out=str(tmp_path))
    train_ddp.save_checkpoint(tmp_path, 5, imdb.earlier_run(s, "demo", reviews))
    changeable = "data predict explain baseline device export save_every".split()
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        other = (
            not value if f.type is bool else f"{value}x" if isinstance(value, str) or not value else value + 1
        )
        changed = dataclasses.replace(s, **{f.name: other})
        if f.name in changeable:
            assert imdb.earlier_run(changed, "demo", reviews)["settings"]
        elif f.name != "out":
            with pytest.raises(ValueError, match=f.name):
                imdb.earlier_run(changed, "demo", reviews)


def test_classify_imdb_missing_packages_are_known_before_the_work(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(imdb, "load_reviews", lambda s: 1 / 0)
    for missing, settings in (
        ("rustbpe", {"export": False}), ("matplotlib", {"export": False}), ("onnxruntime", {}),
        ("sklearn", {"export": False, "unlabelled": True}),
    ):  # fmt: skip
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else find(name)
        )
        with pytest.raises(ValueError, match={"sklearn": "scikit-learn"}.get(missing, missing)):
            imdb.begin(imdb.Settings(out=str(tmp_path), **settings))


def test_classify_imdb_amp_reaches_the_training(tmp_path, monkeypatch):
    few = {split: rows[:100] for split, rows in imdb.demo_reviews(0).items()}
    monkeypatch.setattr(imdb, "load_reviews", lambda s: ("demo", few))
    monkeypatch.setattr(imdb, "prepared", lambda train_set, reviews, run, s: {}[run["bf16"]])
    for amp, expected in (("off", False), ("bf16", True)):
        with pytest.raises(KeyError) as error:
            imdb.classify(imdb.Settings(out=str(tmp_path), amp=amp, export=False), imdb.ALONE)
        assert error.value.args == (expected,)


def test_classify_imdb_errors_on_the_command_line(tmp_path):
    run = functools.partial(run_script, "classify_imdb.py", cwd=tmp_path, **NO_NETWORK)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    check_one_line_error(run(IMDB_DATA="nowhere"), "data: nowhere does not exist")
    with pytest.raises(OSError, match="file/below"):
        imdb.run_job(["--out", str(tmp_path / "file/below")])
    for argument in ("folder", "file"):
        with pytest.raises(ValueError, match=f"data: {tmp_path}/{argument}"):
            imdb.run_job(["--data", str(tmp_path / argument), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "cache").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "folder",
        "out",
    ]
    with pytest.raises(SystemExit, match="2"):
        imdb.settings_from_command_line(["--widht", "3"])
    for arguments, words in [
        ("--lr nan", "lr.*nan"), ("--seed 4294967296", "seed.*4294967296"),
        ("--preset slow", "preset.*fast, best.*slow"), ("--epochs 0", "epochs.*0"), ("--lr 0", "lr.*0"),
        ("--batch-size -1", "batch_size.*-1"), ("--mask-words 1", "mask_words.*1"),
        ("--vocab-size 100", "vocab_size.*258.*100"),
        ("--n-heads 3", "n_heads.*128.*3"), ("--amp fp8", "amp.*fp8"), ("--pool cls", "pool.*cls"),
        ("--target 1", "target.*1"), ("--explain", "explain.*predict"),
        ("--warmup 0", "warmup"), ("--clip 0", "clip"), ("--max-len 0", "max_len"),
        ("--weight-decay -1", "weight_decay.*-1"), ("--save-every nan", "save_every.*nan"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            imdb.settings_from_command_line(arguments.split())


def test_classify_imdb_presets_give_way_to_flags():
    assert imdb.settings_from_command_line(["--vocab-size", "258"]).vocab_size == 258  # the least
    assert imdb.settings_from_command_line([]).preset == "fast"
    best = imdb.settings_from_command_line(["--preset", "best", "--epochs", "1"])
    assert best.epochs == 1 and best.unlabelled and not imdb.Settings().unlabelled
    assert (best.max_len, imdb.Settings().max_len) == (1024, 512)
    with pytest.raises(ValueError, match="max_len must be at least 4, got 3"):
        imdb.settings_from_command_line(["--max-len", "3"])
    fewer = imdb.settings_from_command_line("--preset best --no-unlabelled".split())
    assert fewer.preset == "best" and not fewer.unlabelled


IMDB_FORMATS = """
script.find_imdb = no_network
matplotlib.pyplot.Figure.savefig = savefig
script.export.in_a_fresh_process = lambda *_: ({}, None)  # half of the time; export.py's own tests have it
measure = script.export.benchmark
script.export.benchmark = lambda runners, cases, seconds, threads: measure(runners, cases, 0.01, threads)
script.exit_now(script.main())
"""


@pytest.fixture(scope="module")
def imdb_formats_begun(request, tmp_path_factory):
    """A run with the unlabelled reviews and all formats, killed among the formats and started again. Where it
    is needed it goes on beside the other tests of classify_imdb.py, as it takes as long as half of them."""
    folder = tmp_path_factory.mktemp("formats")
    launcher = Launcher(folder, "classify_imdb")

    def run() -> tuple[int, dict]:
        """(when the test was done before the kill, the report)"""
        arguments = [*IMDB_SMALL, "--preset", "best", "--out", str(folder / "run")]
        launcher.start(1, *arguments, code=IMDB_FORMATS)
        launcher.wait_until((folder / "run/export/trace.ts").exists)
        launcher.kill([0])
        launcher.wait()
        tested = (folder / "run/test.json").stat().st_mtime_ns
        return tested, last_json(launcher.run(1, *arguments, code=IMDB_FORMATS)[0])

    with beside_other_tests(request, "imdb_formats", run) as begun:
        yield folder, begun
    launcher.end()


@pytest.fixture(scope="module")
def imdb_formats(imdb_formats_begun):
    folder, run = imdb_formats_begun
    return folder, *run.result()


def test_classify_imdb_compares_formats_explains_and_writes_a_page(imdb_formats):
    """With the unlabelled reviews; killed among the formats: what was finished then isn't done again."""
    import onnx

    folder, tested, report = imdb_formats
    assert (folder / "run/test.json").stat().st_mtime_ns == tested
    assert report["with_linear_test_accuracy"] > 0.9 and report["linear_test_accuracy"] > 0.9
    rows = {row["name"]: row for row in report["models"]}
    assert {
        "eager",
        "TorchScript, trace",
        "torch.export",
        "ONNX",
        "ONNX int8, static",
        "pruned, ONNX",
    } <= set(rows)
    for name in ("TorchScript, trace", "torch.export", "ONNX"):
        assert rows[name]["max_abs_diff"] <= 1e-5 and rows[name]["agreement"] == 1
    assert all(row["agreement"] >= 0.99 for name, row in rows.items() if not name.startswith("pruned"))
    assert report["deployed"]["size_bytes"] <= 0.3 * rows["ONNX"]["size_bytes"]
    assert rows[report["deployed"]["name"]]["agreement"] >= 0.995
    smaller = [r for r in rows.values() if r["size_bytes"] < report["deployed"]["size_bytes"]]
    assert all(row["agreement"] < 0.995 for row in smaller if row["file"].endswith(".onnx"))
    assert abs(report["deployed"]["test_accuracy"] - report["test_accuracy"]) <= 0.01
    found = onnx.load(folder / "run/model.onnx").metadata_props
    assert json.loads({x.key: x.value for x in found}["max_len"]) == report["settings"]["max_len"]
    shapes = [weight.shape for weight in export_weights(folder / "run/export/pruned.onnx").values()]
    assert shapes.count((32, 8)) == 1  # of two layers one, of 32 neurons 8
    assert (15, 32) in shapes or (32, 15) in shapes  # fused
    assert rows["eager"]["accuracy"] == pytest.approx(report["test_accuracy"], abs=1e-4)  # all are compared
    for name in ("TorchScript, trace", "torch.export"):  # the counts for training are not in them
        assert rows[name]["size_bytes"] < 1.2 * rows["ONNX"]["size_bytes"]
    page, times = (folder / "run/index.html").read_text(), rows["eager"]["latency"]
    assert f"<td>{times['1 x 256']['p50_ms']}</td><td>{times['32 x 256']['p50_ms']}</td>" in page
    assert page.count("data:image/png;base64") == 4 and page.count("<iframe srcdoc=") == 2
    assert not re.search(r"(src|href)=.?(http|//|/)", page) and rows["eager"]["name"] in page
    assert f"{report['test_accuracy']}" in page
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/model.onnx").write_bytes((folder / "run/model.onnx").read_bytes())
    arguments = (
        "--predict",
        "the plot was superb , and not only for fans",
        "--explain",
        "--out",
        "elsewhere",
    )
    answer = last_json(run_script("classify_imdb.py", *arguments, cwd=folder))  # the file alone is enough
    assert answer["label"] == "positive" and len(answer["explain"]) == 10
    effects = [abs(effect) for _, effect in answer["explain"]]
    assert effects == sorted(effects, reverse=True)
    shutil.copy(folder / "run/model.onnx.sha256", folder / "elsewhere")
    imdb.predictor(folder / "elsewhere", imdb.ALONE)
    data = bytearray((folder / "run/model.onnx").read_bytes())
    data[len(data) // 2] ^= 1  # in a table of weights: onnxruntime would not notice
    (folder / "elsewhere/model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match="model.onnx is damaged"):
        imdb.predictor(folder / "elsewhere", imdb.ALONE)
    (folder / "elsewhere/model.onnx").write_bytes(b"no model")
    bad = run_script("classify_imdb.py", *arguments, cwd=folder)
    check_one_line_error(bad, "elsewhere/model.onnx", "damaged")


def test_classify_imdb_exports_short_texts_and_what_agrees_most(tmp_path, monkeypatch):
    """Nothing longer than max_len is timed; reviews of both classes judge the heads; where no file agrees on
    99.5% the one that agrees most is taken."""
    model, _, s, run = imdb_tiny_training(tmp_path)
    seen = {}

    def export_all(models, example, evaluation, cases, calibration, out, metadata, seconds):
        seen["cases"] = cases
        out.mkdir()
        rows = [{"name": "eager", "file": "weights.pt", "agreement": 1.0, "size_bytes": 1}]
        for name, agreement, size in (("a", 0.90, 5), ("b", 0.95, 9), ("c", 0.93, 4)):
            (out / f"{name}.onnx").write_text(name)
            rows.append({"name": name, "file": f"{name}.onnx", "agreement": agreement, "size_bytes": size})
        return {"models": rows, "refused": {}}

    monkeypatch.setattr(imdb, "pruned_copy", lambda model, sample, *_: seen.update(sample=sample) or model)
    monkeypatch.setattr(imdb, "onnx_probabilities", lambda path, ids: torch.full((len(ids),), 0.9))
    for name, stub in (("export_all", export_all), ("print_table", print), ("plot_rows", print)):
        monkeypatch.setattr(export, name, stub)
    ids = [torch.tensor([5, 6, 7])] * 3000
    data = {"train": (ids, [0.0] * 1500 + [1.0] * 1500, [0] * 3000)}  # in order, as read_imdb gives them
    test_set = imdb.demo_reviews(1)["test"][:40]
    report = imdb.export_models(model, imdb.Tokenizer(run["ranks"]), data, test_set, s, tmp_path)
    assert report["deployed"]["name"] == (tmp_path / "model.onnx").read_text() == "b"
    assert len(seen["cases"]) == 4
    assert all(x.size(1) <= s.max_len == 16 for inputs in seen["cases"].values() for (x,) in inputs)
    assert torch.cat([labels for _, labels in seen["sample"]]).float().mean() == 0.5


def test_classify_imdb_page_shows_any_text_as_text(tmp_path):
    model, _, _, run = imdb_tiny_training(tmp_path)
    texts = ['<script>alert(1)</script> "a" & b', "<b>dull</b>"]
    test_set = [imdb.Review(i, i, text) for i, text in enumerate(texts)]
    mistakes = [{"label": "positive", "probability": 0.1, "text": text} for text in texts]
    (tmp_path / "mistakes.json").write_text(json.dumps(mistakes))
    imdb.write_page({"dataset": "demo"}, model, imdb.Tokenizer(run["ranks"]), test_set, tmp_path)
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed((tmp_path / "index.html").read_text())
    frames = [attributes["srcdoc"] for tag, attributes in tags if tag == "iframe"]
    assert frames == [(tmp_path / f"attention_{name}.html").read_text() for name in imdb.LABELS]
    assert "script" not in dict(tags) and [a for tag, a in tags if tag == "b"] == [{"class": "positive"}] * 2


def test_classify_imdb_model_is_the_same_in_onnx_at_every_size(imdb_formats):
    out = imdb_formats[0] / "run"
    state = imdb.load(out / "model.pt")
    model = imdb.ReviewClassifier(encoder.EncoderConfig(**state["config"])).eval()
    model.load_state_dict(state["model"])
    run = export.onnx_runner(out / "export/model.onnx")
    for B, T in ((1, 1), (7, 5), (33, 64), (1, 4), (3, 63), (1, model.config.max_len)):
        tokens = torch.randint(0, model.config.vocab_size, (B, T))
        tokens[0, T // 2 :] = imdb.PAD
        tokens[-1] = imdb.PAD  # a row of padding alone
        check_close(run(tokens), model(tokens).detach(), 1e-5)


def test_classify_imdb_explains_by_hiding():
    """A model that counts one word: hiding it moves the probability, hiding others doesn't."""
    tokenizer = imdb.Tokenizer.train([imdb.clean(r.text) for r in imdb.demo_reviews(0)["train"][:500]], 400)
    (ids,) = tokenizer.encode(["a superb film , naïve хорошо and superb"], 99)

    def positive(texts: list[torch.Tensor]) -> torch.Tensor:
        assert all(x.shape == ids.shape and ((x == ids) | (x == imdb.MASK)).all() for x in texts)
        words = (
            tokenizer.bpe.decode([i - imdb.SPECIAL for i in x.tolist() if i >= imdb.SPECIAL]) for x in texts
        )
        return torch.tensor([0.9 if "film" in text else 0.3 for text in words])

    answer = imdb.explained(ids, 0.9, tokenizer, positive)
    assert answer[0] == ["film", 0.6] and all(effect == 0 for _, effect in answer[1:])
    assert sorted(word for word, _ in answer) == sorted("a superb film , naïve хорошо and superb".split())
    assert imdb.explained(ids[:0], 0.5, tokenizer, positive) == []
    (ids,) = tokenizer.encode(['the (first) "act" is well-made.but don\'t see 2nd'], 99)
    answer = imdb.explained(ids, 0.3, tokenizer, lambda texts: torch.full((len(texts),), 0.3))
    words = 'the ( first ) " act " is well - made . but don\'t see 2nd'.split()
    assert {word for word, _ in answer} <= set(words)
    (ids,) = tokenizer.encode(["a “größer” film—bad…so"], 99)
    answer = imdb.explained(ids, 0.3, tokenizer, lambda texts: torch.full((len(texts),), 0.3))
    assert [word for word, _ in answer] == "a “ größer ” film — bad … so".split()
    (ids,) = tokenizer.encode(["a b c d e f g h i j k l"], 99)
    assert len(imdb.explained(ids, 0.5, tokenizer, lambda texts: torch.linspace(0, 1, len(texts)))) == 10


def test_classify_imdb_stops_at_its_target(imdb_ranks, tmp_path):
    arguments = (*IMDB_SMALL, "--no-export", "--target", "0.7", "--out", str(tmp_path))
    report = last_json(imdb_ranks.run(1, *arguments, code=IMDB_OFFLINE)[0])
    last = report["history"][-1]
    assert (
        report["target"]["reached"]
        and last["step"] < 225
        and last["dev_accuracy"] > 0.7 + (0.21 / 800) ** 0.5
    )
    assert all(row["dev_accuracy"] <= 0.7 + (0.21 / 800) ** 0.5 for row in report["history"][:-1])
    assert report["train_seconds"] < report["target"]["seconds"]
    assert train_ddp.load_checkpoint(tmp_path)["step"] == last["step"], "saved before the test begins"
    row, dev = {"dev_accuracy": 0.86}, ([None] * 2500, None)  # sqrt(0.85 * 0.15 / 2500) = 0.00714
    assert imdb.safely_past(0.85, row, dev) and not imdb.safely_past(0.853, row, dev)


def test_classify_imdb_baseline_beside_another_run(tmp_path, monkeypatch):
    few = {split: rows[:300] for split, rows in imdb.demo_reviews(0).items()}
    monkeypatch.setattr(imdb, "load_reviews", lambda s: ("demo", few))
    for _ in range(2):
        report = imdb.baseline(imdb.Settings(out=str(tmp_path / "a/b")))
        assert 0 <= report["train_seconds"] <= report["total_seconds"] < 60
    turned = [review._replace(label=1 - review.label) for review in few["test"]]
    monkeypatch.setattr(imdb, "split_dev", lambda reviews: (reviews, turned))
    report = imdb.baseline(imdb.Settings(out=str(tmp_path)))
    assert (
        report["dev_accuracy"] == pytest.approx(1 - report["test_accuracy"]) and report["test_accuracy"] > 0.7
    )
    report = imdb.baseline(imdb.Settings(out=str(tmp_path), shuffle_labels=True))
    assert 0.3 < report["test_accuracy"] < 0.7


def test_classify_imdb_baseline(tmp_path):
    report = last_json(run_script("classify_imdb.py", "--baseline", "--out", "b", cwd=tmp_path, **NO_NETWORK))
    assert report == json.loads((tmp_path / "b/baseline.json").read_text())
    assert report["dataset"] == "demo" and report["test_accuracy"] > 0.9 and report["n_parameters"] > 100
    assert 0 < report["train_seconds"] <= report["total_seconds"] < 240


@IMDB_GIVEN
def test_classify_imdb_real_data(imdb_real_data_begun):
    """The published texts, all of them; 123 test reviews are in train in the original, and no more here."""
    found = last_json(imdb_real_data_begun.result())
    assert found["fingerprint"] == imdb.IMDB_FINGERPRINT
    for split, size in (("train", 33_132_823), ("test", 32_350_685)):
        assert found[split] == [25_000, 12_500, size]  # reviews, positive ones, bytes
    assert found["parts"] == [22_500, 2_500] and found["shared"] == [123, 3]


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
        beginning = torch.cat((*cache.get(0, {"self": ()})["self"], tgt), dim=1)  # (B, T)
        cache[0] = {"self": (beginning,)}
        numbers = (beginning * 16 ** torch.arange(beginning.shape[1])).sum(1) % len(self.logits)
        return self.logits[numbers][:, None]  # (B, 1, V)


QUIZ_NO_SYNC = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
exchanges = []
def hook(state, bucket):
    exchanges.append(1)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
model = DistributedDataParallel(torch.nn.Linear(2, 1))
model.register_comm_hook(None, hook)
x = torch.ones(3, 2)
loss = model(x).sum()
with model.no_sync():
    loss.backward()
print(len(exchanges))
with model.no_sync():
    model(x).sum().backward()
print(len(exchanges), flush=True)
os._exit(0)
"""


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

    def test_quiz_layer_norm_is_biased(self):
        x = torch.randn(100, 4, dtype=torch.float64)
        wrong = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        check_close(wrong / F.layer_norm(x, (4,), eps=0), torch.full_like(x, math.sqrt(3 / 4)), 1e-9)
        assert round(1 - math.sqrt(3 / 4), 2) == 0.13

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

    def test_quiz_half_precision(self):
        tiny = torch.tensor(1e-8)
        assert tiny.half() == 0 and (tiny * 65_536).half().item() == pytest.approx(6.55e-4, rel=1e-2)
        smallest = torch.finfo(torch.float16).smallest_normal / 1024
        assert smallest == pytest.approx(6e-8, rel=0.01) and torch.tensor(smallest).half() > 0
        assert torch.tensor(1 + 1 / 256).bfloat16() == 1 and torch.tensor(1 + 1 / 128).bfloat16() > 1

    def test_quiz_clipping_scaled_gradients(self):
        weight = nn.Parameter(torch.zeros(4))
        weight.grad = torch.full((4,), 0.25) * 65_536  # a gradient of norm 0.5, scaled
        nn.utils.clip_grad_norm_([weight], 1.0)
        assert (weight.grad / 65_536).norm().item() == pytest.approx(1.5e-5, rel=0.02)

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

    def test_quiz_confidence(self):
        for n, points in ((25_000, 0.37), (2_500, 1.18)):
            assert round(100 * 1.96 * math.sqrt(0.9 * 0.1 / n), 2) == points

    def test_quiz_distributed_sampler_repeats(self):
        from torch.utils.data import DistributedSampler

        seen = [i for rank in range(4) for i in DistributedSampler(range(10), 4, rank, shuffle=False)]
        assert len(seen) == 12 and len(set(seen)) == 10

    def test_quiz_no_sync_holds_forward(self, tmp_path):
        """DDP's exchange of gradients, counted: no_sync around backward alone does not stop it."""
        command = [sys.executable, "-c", QUIZ_NO_SYNC, str(tmp_path / "store")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stdout.split() == ["1", "1"], result


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
            output, short_weights = short.forward_with_weights(x, *short.keys_values(context), mask)
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
        if len(log) > 1 and all(isinstance(run, dict) for run in log):
            for name in set.intersection(*(set(run) for run in log)):
                values = [run[name] for run in log if type(run[name]) in (int, float)]
                if len(values) == len(log):
                    found |= {statistics.mean(values), statistics.stdev(values)}
        return found
    return {float(log)} if type(log) in (int, float) else set()


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
            assert f"{statistics.mean(values):.1f}" in top
        assert f"{json_of(ROOT / 'assets/multi30k.json')['beam']:.1f}" in top

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
        command = r"(?:python|torchrun) (?:[^\n`#|;]|\\\n)*\w+\.py(?:[^\n`#|;]|(?<= )#(?!\s))*"
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
        (".tril(k_len - q_len)", ".tril()", "transformer_causal_mask"),
        ("q.shape[-1] ** -0.5", "1.0", "transformer_equals_torch"),
        (
            "k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)",
            "k, v = torch.cat((k, past_k), dim=2), torch.cat((v, past_v), dim=2)",
            "cache_gives_the_same",
        ),
        (
            "x = self.embed(self.tgt_embedding, tgt, start=past)",
            "x = self.embed(self.tgt_embedding, tgt)",
            "cache_gives_the_same",
        ),
        (
            "return norm(x + self.dropout(sublayer(x)))",
            "return x + norm(self.dropout(sublayer(x)))",
            "transformer_equals_torch",
        ),
        ("ignore_index=pad_id, label_smoothing", "label_smoothing", "transformer_loss"),
        ("step * warmup**-1.5", "step * warmup**-0.5", "transformer_noam"),
        (".masked_fill(finished, model.config.pad_id)", "", "greedy_equals"),
        (
            "finished |= best == model.config.eos_id",
            "finished |= best == model.config.pad_id",
            "greedy_equals",
        ),
        ("torch.where(finished[..., None], only_pad, following)", "following", "full_beam"),
        ('layer["self"] = tuple(x[rows] for x in layer["self"])', "pass", "beam_equals_lists"),
        (
            "lengths.gather(1, parent) + ~was_finished",
            "lengths.gather(1, parent) + 1",
            "beam_equals_lists or full_beam",
        ),
        ("((5 + lengths.to(log_probs)) / 6)", "(lengths.to(log_probs))", "full_beam"),
        (
            "tgt = torch.cat((bos, targets[:, :-1]), dim=1)",
            "tgt = targets",
            "training_step or sum_of_its_sentences",
        ),
        ('self.optimizer.load_state_dict(checkpoint["optimizer"])', "pass", "kill_and_go_on"),
        ("mean + (weight - mean) / n_averaged", "weight.clone()", "average_and_losses"),
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
        ("manual_seed(seed * 1_000_003 + epoch)", "manual_seed(seed)", "endless_row"),
        ("rows[micro * p.world + p.rank ::", "rows[micro ::", "same_weights or micro_batches"),
        ("scaler.unscale_(optimizer)  #", "#", "mixed_precision"),
        ("is_causal=True", "is_causal=False", "is_causal"),
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
        ("if processes.world == 1 or not lost:", "if processes.world == 1:", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "disagree"),
        ("warmup = min(warmup, total)", "warmup = warmup", "warmup_cosine"),
        ("more = p.world > 1 and micro < s.accumulate - 1", "more = False", "travel"),
        ("micro < s.accumulate - 1", "micro > 0", "same_weights"),
        ("return loss_sum * (world / n_total)", "return loss_sum / n_total", "same_weights"),
        (
            "(targets[rows] != -100).sum().item()",
            "(targets[rows[p.rank :: p.world]] != -100).sum().item() * p.world",
            "same_weights or micro_batches",
        ),
        ("load_optimizer(optimizer, kept.pop", "(lambda *_: 0)(optimizer, kept.pop", "goes_on or kill_9"),
        ('if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:', "if data:", "damaged"),
        (
            "for old in finished_checkpoints(folder)[:-keep]:",
            'for old in sorted(folder.glob("step_*.pt"))[:-keep]:',
            "keeps_the_last",
        ),
        ("torch.arange(p.rank, len(inputs), p.world)", "torch.arange(len(inputs))", "same_weights"),
        (
            'map_location="cpu", weights_only=True',
            'map_location="cpu", weights_only=False',
            "checkpoint_runs_no_code",
        ),
    ],
    "classify_imdb.py": [
        (
            "avg_pool1d(real[:, None].to(x.dtype), WINDOW, STRIDE, WINDOW // 2)[:, 0] > 0",
            "avg_pool1d(real[:, None].to(x.dtype), 1, STRIDE)[:, 0] > 0",
            "every_token_counts",
        ),
        ("tokens = tokens.long()  # 32", "# 32", "classify_imdb_ngram_ids"),
        ('kept["seconds"]\n', "0\n", "kept_stage_counts"),
        ("if 0 <= number % period - period * 2 // 5 < length}", "if number % 10 == 0}", "dev_split"),
        ('"ab" if response.status == 206 else "wb"', '"ab"', "classify_imdb_download"),
        ('{"pos": 1, "neg": 0,', '{"pos": 0, "neg": 1,', "reads_tarball"),
        ("            while stream.read(1 << 20):\n                pass\n", "", "no_part_of_imdb"),
        ("ids[:head] + ids[head - max_len :]", "ids[:max_len]", "classify_imdb_tokenizer"),
        ("    model.eval()\n    out = torch.zeros", "    out = torch.zeros", "probabilities_are"),
        ('        optimizer.load_state_dict(run["optimizer"])', "        pass", "killed_and_started"),
        (
            'torch.manual_seed(s.seed * 1_000_003 + run["step"] + 2**40 * p.rank)',
            "pass",
            "killed_and_started",
        ),
        ("share_of_mean(loss, len(rows), p.world)", "(loss / len(rows))", "any_number_of"),
        ("return counts * loss, counts", "return loss, counts", "any_number_of"),
        ("mine = rows[p.rank :: p.world]", "mine = rows", "any_number_of"),
        (".split(64)[p.rank :: p.world]", ".split(64)", "any_number_of"),
        ("    save_run(run, made, s)\n", "", "in_any_stage"),
        ("            old.unlink()\n", "            pass\n", "goes_from_demo"),
        ("damaged = file.testzip()", "damaged = None", "predict_errors"),
        (
            "order = batches(lengths, s.batch_size, seed=s.seed * 1_000_003 + epoch)",
            "order = batches(lengths, s.batch_size, seed=epoch + int(time.time()))",
            "killed_and_started",
        ),
        ("counts.sum(0) - torch.cat((counts, ", "counts.sum(0) - 0 * torch.cat((counts, ", "odds_equal"),
        ("(before >= SPECIAL)", "(before >= MASK)", "ngram_ids"),
        ("self.encoder.dropout(x) * real[:, :, None]", "self.encoder.dropout(x)", "written_out"),
        ("flatten(1) * self.encoder.scale", "flatten(1)", "fused_model"),
        ("self.encoder.embedding.weight[PAD] = 0.0", "pass", "fused_model"),
        ("(halfway[rows] + said.softmax(-1)[:, 1]) / 2", "said.softmax(-1)[:, 1]", "fine_tuning_is"),
        ("copied.encoder.layers[: max(1, s.n_layers // 2)]", "copied.encoder.layers[1:]", "pruned_copy"),
        ("buckets + fold[:, None, None] *", "buckets + 0 * fold[:, None, None] *", "odds_of_a_review"),
        ("(p.logit(1e-6) + linear.logit(1e-6))", "(p + linear)", "linear_model_s_logit"),
        ('run["linear"].get("unlabelled", [])', 'run["linear"].get("test", [])', "linear_model_s_opinion"),
        ("- target > math.sqrt(", "- target > -math.sqrt(", "stops_at"),
        ("round(p - without, 4)", "round(p, 4)", "explains_by"),
        ("(1, 0))\n        self.weights", "(0, 1))\n        self.weights", "weighs_by"),
    ],
    "train_fsdp.py": [
        ("s.clip or math.inf", "s.clip or 1.0", "clip_0"),
        ("row + [-100] *", "row + [10] *", "same_weights or every_byte"),
        ("manual_seed(seed * 1_000_003 + epoch)", "manual_seed(seed)", "endless_row"),
        ("rows[micro * p.world + p.rank ::", "rows[micro ::", "same_weights or micro_batches"),
        ("scaler.unscale_(optimizer)  #", "#", "mixed_precision"),
        ("is_causal=True", "is_causal=False", "is_causal"),
        (
            "[loss / n_tokens, signals.received()], p)",
            "[loss / n_tokens, 0], p); stopped = signals.received()",
            "signals_stop",
        ),
        ('scaler.load_state_dict(run["scaler"])', "pass", "signals_stop"),
        ('run["step"] = step + 1', 'run["step"] = step + 2', "kill_9"),
        ("fcntl.LOCK_EX | fcntl", "fcntl.LOCK_SH | fcntl", "lock_out"),
        ("p.parent = os.getppid()", "pass", "under_torchrun"),
        ("if processes.world == 1 or not lost:", "if processes.world == 1:", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        (
            "broadcast_object_list(answer, group=processes.files)",
            "broadcast_object_list(answer)",
            "longer_than",
        ),
        ('env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "disagree"),
        ("warmup = min(warmup, total)", "warmup = warmup", "warmup_cosine"),
        ("gradient_sync(micro == s.accumulate - 1)", "gradient_sync(True)", "travel"),
        ("loss * (p.world / n_tokens)", "loss / n_tokens", "same_weights"),
        (
            "model.set_requires_gradient_sync(micro == s.accumulate - 1)",
            "model.set_requires_gradient_sync(micro == 0)",
            "same_weights",
        ),
        ("fused=not s.exact", "fused=True", "two_processes_are_bitwise"),
        (".clamp(max=1.0))", "  )", "clip_gradients"),
        ("        fully_shard(block, mesh=mesh, mp_policy=policy)\n", "", "one_block_at_a_time"),
        (
            'if sha256_of(path / "manifest.json") != path.suffix[1:]:',
            'if not sha256_of(path / "manifest.json"):',
            "newest_checkpoint",
        ),
        (
            'if sha256_of(path / name) != manifest["files"][name]]',
            "if not sha256_of(path / name)]",
            "newest_checkpoint",
        ),
        (
            'raise pickle.UnpicklingError(f".metadata',
            'return super().find_class(module, name)\n        raise pickle.UnpicklingError(f".metadata',
            "tensors_runs_no_code",
        ),
    ],
    "export.py": [
        ("if sum(m is child for child in places) > 1:", "if False:", "pruning_refuses"),
        ("                    timed(runners[name], batches[0])\n", "", "benchmark_alternates"),
        ("    model.eval()\n    try:\n        yield", "    try:\n        yield", "export_torch_formats"),
        (
            "masked_fill(~attn_mask, torch.finfo(k.dtype).min / 4)",
            "masked_fill(attn_mask, torch.finfo(k.dtype).min / 4)",
            "export_onnx",
        ),
        ('kwargs["scale"] = q.size(-1) ** -0.5', "pass", "export_onnx"),
        ('shapes[-1][1] = f"length_{i}" if i else "length"', "pass", "export_onnx_is_one_file"),
        ('f"length_{i}" if i else "length"', '"length"', "export_names_one_size"),
        ("groups = groups + change", "groups = change", "called_twice"),
        ("if not difference <= 1e-3", "if difference > 1e3", "export_refuses"),
        (
            'not (cpu.get("avx512_vnni") or cpu.get("avx_vnni"))',
            '(cpu.get("avx512_vnni") or cpu.get("avx_vnni"))',
            "export_reduced_range",
        ),
        (
            "    if not feeds:\n        raise",
            "    if feeds is None:\n        raise",
            "export_static_quantization_errors",
        ),
        (
            "columns + part * n_heads * width for part in range(3)",
            "columns for part in range(3)",
            "export_pruned_heads",
        ),
        ("scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)", "export_pruned"),
        ("draw.shuffle(order)", "pass", "export_benchmark"),
        ("while rounds < 5 or", "while rounds < 1 or", "export_benchmark"),
        (
            'accurate = [row for row in rows if row["accuracy"] >= round(rows[0]["accuracy"] - max_loss, 9)]',
            "accurate = rows",
            "export_recommends",
        ),
    ],
}


SECTIONS = {  # file -> the tests that have to notice a bug in it, for pytest -k
    "attention.py": "TestAttention", "encoder.py": "TestEncoder", "transformer.py": "transformer",
    "losses.py": "TestLosses", "train_ddp.py": "ddp or TestTraining", "train_fsdp.py": "fsdp or TestTraining",
    "export.py": "export", "classify_imdb.py": "imdb",
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
    half = "train_ddp or train_fsdp or attention or encoder or (losses and not losses_script)"
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
