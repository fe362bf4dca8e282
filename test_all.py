"""Asserts the correctness of all files, in their order: values and gradients against independent
oracles, properties over random sizes, the scripts as subprocesses, downloads that break off.

    python test_all.py                    # everything; prints the slowest ten
    python test_all.py -x -q -k encoder   # any pytest option works
    python test_all.py --mutants          # plants bugs and sees them caught
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

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU changes anything: hidden before torch looks

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
    """A test that takes longer fails where it waits. Never cleared: preparations end, too."""

    def end(*_):
        raise TimeoutError(f"no end after {DEADLINE} s (TEST_SECONDS sets this limit)")

    if hasattr(signal, "SIGALRM"):  # not on Windows
        signal.signal(signal.SIGALRM, end)
        signal.alarm(DEADLINE)


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """The same random state for each test; one thread: two crawl on a busy core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference, relative to max(1, largest reference value); NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if actual.numel():
        difference = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert difference <= tolerance, f"{what}: {difference:.3e} > {tolerance:.0e}"


def run_script(name: str, *arguments: str, cwd: Path, folder=ROOT, timeout=240, **environment):
    """`python FOLDER/name arguments` in cwd; no data set is known there but what the arguments give."""
    unset = ("IMDB_DATA", "MULTI30K_DATA", "ORT_DISABLE_TELEMETRY")  # the last by importing export
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")} | environment
    command = [sys.executable, str(folder / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def check_one_line_error(result, *words: str) -> None:
    """Exit code 2, one line on stderr with these words, no traceback."""
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


def results(function, inputs, *others) -> list[Tensor]:
    """Value of function(*inputs, *others), and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves, *others)
    weights = 1 + torch.arange(value.numel()).view(value.shape) % 7  # of a scalar: 1
    return [value.detach(), *torch.autograd.grad((weights * value).sum(), leaves)]


def check_all_close(actual, expected, tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        check_close(a, b, tolerance)


TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]
MultiHeadAttention = attention.MultiHeadAttention


class TestAttention:
    ways = {
        "attention_loop": attention.attention_loop,
        "scaled_dot_product_attention": attention.WAYS["written out"],
        "blockwise_attention": functools.partial(attention.blockwise_attention, block_size=3),
        "fused_attention": attention.fused_attention,
    }
    every_way = pytest.mark.parametrize("way", ways.values(), ids=ways)
    fused_or_not = pytest.mark.parametrize("fused", [False, True])

    @every_way
    def test_all_ways_agree_with_torch(self, way):
        """Values and gradients, random sizes, masks, strides and dtypes."""
        draw = random.Random(1)
        for _ in range(300):
            batch = draw.choice([(), (4,), (2, 1, 2), (draw.randint(1, 3), draw.randint(1, 3))])
            tq, tk = draw.randint(1, 8), draw.randint(1, 9)
            tk = draw.choice([tq, tk, tk])  # the fused form takes torch's own triangle where Tq = Tk
            d, dv = draw.choice([1, 3, 4, 8]), draw.choice([1, 4, 5, 8])
            dtype, tolerance = draw.choice(TOLERANCES)
            sizes = (d, tq), (d, tk), (dv, tk)
            inputs = [torch.randn(*batch, *size, dtype=dtype).mT for size in sizes]
            if draw.random() < 0.5:
                inputs = [x.contiguous() for x in inputs]
            causal = draw.random() < 0.5
            allowed = torch.ones(*batch, tq, tk).tril(tk - tq if causal else tk).bool()
            mask = None
            if draw.random() < 0.9:  # of any shape that broadcasts
                shape = [draw.choice([1, n]) for n in allowed.shape]
                mask = torch.rand(shape[draw.randint(0, len(shape)) :]) < 0.67
                allowed &= mask
            exact = [x.double() for x in inputs]
            expected = results(F.scaled_dot_product_attention, exact, allowed)
            found = results(way, inputs, mask, causal)
            check_all_close(found, [x.to(dtype) for x in expected], tolerance)
            assert not found[0][~allowed.any(dim=-1)].any()

    @every_way
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_nothing_to_attend_to(self, way):
        """No keys, no queries, rows that a mask empties: 0, and finite gradients."""
        q, k, v = torch.randn(2, 3, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 5)
        assert torch.equal(way(q, k, v), torch.zeros(2, 3, 5))
        assert way(q[:, :0], q, q).shape == (2, 0, 4)
        with torch.autograd.detect_anomaly():  # no NaN on the way, either
            found = results(way, torch.randn(3, 2, 3, 4), torch.zeros(3, 3).bool(), False)
        assert found[0].shape == (2, 3, 4) and not any(x.any() for x in found)

    @every_way
    def test_large_logits_stay_finite(self, way):
        q = torch.tensor([[1e4], [-1e4]])
        k = torch.tensor([[1.0], [-1.0], [0.5]])
        v = torch.tensor([[1.0], [2.0], [4.0]])
        output, *gradients = results(way, [q, k, v])  # D = 1: the logits are q k
        assert output.tolist() == [[1.0], [2.0]]  # each query sees its best key alone
        assert all(x.isfinite().all() for x in gradients)
        only_the_worst = torch.tensor([[False, True, False], [True, False, False]])
        assert way(q, k, v, only_the_worst).tolist() == [[2.0], [1.0]]
        assert way(q[:1], -k[:2] - 5, v[:2]).tolist() == [[2.0]]  # all scores are far below 0

    @every_way
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, way, dtype):
        q, k, v = (torch.randn(1, 2, 9, 64).to(dtype) for _ in range(3))
        mask = torch.rand(9, 9) < 0.5
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
        check_close(way(q, k, v, mask, False).double(), exact, 2e-2)
        for x in results(way, [30 * q, 30 * q, v], mask, False):  # q q' overflows in float16
            assert x.dtype == dtype and x.isfinite().all()

    @every_way
    def test_all_ways_follow_their_input(self, way):
        """Not the default device or dtype, wherever they make a tensor."""
        q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
        expected = way(q, k, k, None, True)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                output = way(q, k, k, None, True)
        finally:
            torch.set_default_dtype(torch.float32)
        check_close(output, expected, 1e-6)

    def test_second_derivatives(self):
        """Right where there are some, refused by the blockwise form."""
        module = MultiHeadAttention(6, 2, fused=False).double()
        x = torch.randn(1, 3, 6).double().requires_grad_()
        call = functools.partial(module.forward_with_weights, causal=True)
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)
        output = attention.blockwise_attention(x, x, x, block_size=1)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(output.sum(), x, create_graph=True)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads its peak memory below /proc")
    def test_blockwise_memory(self):
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
        blockwise, written_out = subprocess.check_output(command, cwd=ROOT, timeout=240).split()
        assert float(blockwise) < 32 and float(written_out) > 150, (blockwise, written_out)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_blockwise_sums_in_float32(self, dtype):
        """As of the same numbers in float32, to the last bit; under autocast, too."""
        blockwise = functools.partial(attention.blockwise_attention, block_size=7)
        inputs = [torch.randn(t, 8).to(dtype) for t in (50, 70, 70)]
        expected = results(blockwise, [x.float() for x in inputs])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results(blockwise, inputs)
        check_all_close(found, [x.to(dtype) for x in expected], 0.0)

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
        assert attention.padding_mask(torch.zeros(0).long()).shape == (0, 1, 1, 0)
        for kind in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32"):
            lengths = np.array([0, 2, 3], dtype=kind)
            for given in (lengths, torch.from_numpy(lengths)):
                assert torch.equal(attention.padding_mask(given), padding), kind

    def test_multi_head_attention_agrees_with_torch(self):
        """Values, weights, gradients of inputs and of parameters."""
        draw = random.Random(2)
        for _ in range(300):
            heads, b, tq, tk = (draw.randint(1, n) for n in (3, 3, 6, 7))
            c = heads * draw.choice([1, 4, 5])
            kv_dim = draw.choice([None, None, c, 6, 7])  # None: self-attention
            dtype, tolerance = draw.choice(TOLERANCES)
            sizes = {"bias": draw.random() < 0.5, "kdim": kv_dim, "vdim": kv_dim}
            theirs = nn.MultiheadAttention(c, heads, batch_first=True, dtype=dtype, **sizes)
            for p in theirs.parameters():
                nn.init.normal_(p, std=0.3)  # biases of 0 would hide a mix-up
            ours = MultiHeadAttention.from_torch(theirs)
            ours.fused = draw.random() < 0.5
            inputs = [torch.randn(b, tq, c, dtype=dtype, requires_grad=True)]
            if kv_dim:
                inputs.append(torch.randn(b, tk, kv_dim, dtype=dtype, requires_grad=True))
            x, source = inputs[0], inputs[-1]
            tk = source.size(1)
            causal = draw.random() < 0.4 and tk >= tq
            future = ~attention.causal_mask(tq, tk) if causal else None
            hidden = torch.rand(b, tk) < draw.choice([0, 0.3])
            hidden[:, 0] = False  # torch gives NaN where nothing may be attended to
            mask = ~hidden[:, None, None, :] if hidden.any() else None

            call = {"attn_mask": future, "average_attn_weights": False}
            expected = theirs(x, source, source, hidden, **call)
            found = ours.forward_with_weights(*inputs, mask=mask, causal=causal)
            check_all_close(found, expected, tolerance)
            assert torch.equal(found[0], ours(*inputs, mask=mask, causal=causal))
            given = [*inputs, *ours.parameters()]
            gradients = torch.autograd.grad(found[0].square().sum(), given)
            given = [*inputs, *theirs.parameters()]
            wanted = torch.autograd.grad(expected[0].square().sum(), given)
            for p, gradient in zip(given, wanted, strict=True):
                p.data = gradient
            named = MultiHeadAttention.from_torch(theirs)  # so that they have our names
            check_all_close(gradients, [*inputs, *named.parameters()], tolerance)

    def test_from_torch_keeps_everything(self):
        source = nn.MultiheadAttention(12, 3, dropout=0.3, dtype=torch.float64).eval()
        source.in_proj_weight.requires_grad_(False)
        source.out_proj.bias.requires_grad_(False)
        with torch.no_grad():  # grad mode has no say in it
            ours = MultiHeadAttention.from_torch(source)
        assert not ours.training and ours.dropout == 0.3 and ours.n_heads == 3
        assert MultiHeadAttention.from_torch(source.train()).training
        frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
        assert frozen == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.bias"}
        assert {p.dtype for p in ours.parameters()} == {torch.float64}
        for p in source.parameters():
            nn.init.constant_(p, 7)
        assert not any((q == 7).any() for q in ours.parameters()), "copies"

    def test_multi_head_attention_starts_as_glorot_says(self):
        module = MultiHeadAttention(24, 4, kv_dim=10)
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            limit = math.sqrt(6 / (24 + projection.in_features))
            assert 0.9 * limit < projection.weight.abs().max() <= limit
            assert not projection.bias.any()

    @fused_or_not
    def test_padding_and_empty_rows(self, fused):
        module = MultiHeadAttention(12, 3, fused=fused).double()
        nn.init.normal_(module.out_proj.bias)
        x = torch.randn(3, 6, 12).double().requires_grad_()
        mask = attention.padding_mask([4, 0, 6])
        output, weights = module.forward_with_weights(x, mask=mask)
        check_close(output[1], module.out_proj.bias.expand(6, 12), 0.0)
        assert (weights[1] == 0).all()
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in (x, *module.parameters()))
        longer = F.pad(x[:1, :4], (0, 0, 0, 7), value=1e3)
        longer = module(longer, mask=attention.padding_mask([4], 11))
        check_close(longer[0, :4], output[0, :4], 1e-12)
        check_close(module(x[:1, :4])[0], output[0, :4], 1e-12)

    @fused_or_not
    def test_causality(self, fused):
        """A later token moves no earlier output; it moves its own and the later ones."""
        module = MultiHeadAttention(12, 3, fused=fused)
        x = torch.randn(3, 6, 12)
        altered = x + (torch.arange(6) == 4)[:, None]
        difference = module(altered, causal=True) - module(x, causal=True)
        moved = difference.abs().amax(dim=(0, 2))
        assert (moved[:4] == 0).all() and (moved[4:] > 1e-6).all()

    @fused_or_not
    def test_dropout_only_in_training(self, fused):
        module = MultiHeadAttention(8, 2, dropout=0.5, fused=fused).eval()
        x = torch.randn(2, 7, 8)
        for causal in (False, True):
            expected, expected_weights = module.eval().forward_with_weights(x, causal=causal)
            assert torch.equal(module(x, causal=causal), expected)
            module.train()
            torch.manual_seed(1)
            first, weights = module.forward_with_weights(x, causal=causal)
            check_close(weights, expected_weights, 1e-6)
            torch.manual_seed(1)
            assert torch.equal(first, module(x, causal=causal))
            assert not torch.equal(first, module(x, causal=causal))
            mean = sum(module(x, causal=causal) for _ in range(2000)) / 2000
            assert (mean - expected).abs().max() < 0.15  # unbiased

    @fused_or_not
    def test_forward_cached_equals_one_shot(self, fused):
        """Values and gradients, in pieces of any size, after left padding."""
        module = MultiHeadAttention(12, 3, fused=fused).double()
        x = torch.randn(2, 9, 12).double()
        mask = torch.ones(2, 1, 1, 9).bool()
        mask[0, ..., :2] = False

        def in_pieces(x, *pieces):
            cache, outputs = attention.KVCache(), []
            for piece, seen in zip(x.split(pieces, 1), itertools.accumulate(pieces), strict=True):
                outputs.append(module.forward_cached(piece, cache, mask[..., :seen]))
            assert cache.k.shape == cache.v.shape == (2, 3, 9, 4)
            return torch.cat(outputs, dim=1)

        expected = results(module, [x], None, mask, True)
        for pieces in ([1] * 9, [4, 1, 3, 1], [9]):
            check_all_close(results(in_pieces, [x], *pieces), expected, 1e-12)

    def test_forward_cached_survives_what_it_refuses(self):
        """A wrong mask or batch leaves the tokens that were there."""
        module = MultiHeadAttention(12, 3)
        cache, x = attention.KVCache(), torch.randn(2, 4, 12)
        module.forward_cached(x[:, :3], cache)
        for query, mask in ((x, torch.ones(4)), (x, torch.ones(2).bool()), (x[:1], None)):
            with pytest.raises((ValueError, RuntimeError)):
                module.forward_cached(query[:, 3:], cache, mask)
            assert cache.k.shape == cache.v.shape == (2, 3, 3, 4)
        check_close(module.forward_cached(x[:, 3:], cache), module(x, causal=True)[:, 3:], 1e-6)

    def test_attention_refuses_what_would_be_silently_wrong(self):
        mha, theirs = MultiHeadAttention, nn.MultiheadAttention
        plot, page = attention.plot_attention, attention.attention_html
        x, row = torch.randn(2, 5, 8), torch.randn(5, 8)
        tokens = "ab", "ab", os.devnull
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
            ("weights.*1, 2, 3", plot, torch.rand(1, 2, 3), *tokens),
            ("weights.*1, 3, 2", page, torch.rand(1, 3, 2), *tokens),
            ("weights.*2, 2", plot, torch.rand(2, 2), *tokens),
            ("weights.*1.02", page, torch.full((1, 2, 2), 1.02), *tokens),
            ("weights.*-0.5", plot, torch.full((1, 2, 2), -0.5), *tokens),
            ("weights.*nan", page, torch.full((1, 2, 2), math.nan), *tokens),
        ):
            with pytest.raises(ValueError, match=words):
                function(*arguments)

    @every_way
    def test_all_ways_refuse_what_does_not_fit(self, way):
        """Masks that would enlarge the output, or hold numbers; more values than keys."""
        q, k, v = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 7, 4), torch.randn(2, 1, 9, 4)
        mask = torch.ones(5, 7).bool()
        for shape in ((7, 5), (5, 6), (2, 7), (1, 2, 1, 5, 7), (2, 3, 5, 7)):
            with pytest.raises((RuntimeError, IndexError)):
                way(q, k, k, torch.ones(shape).bool())
        for numbers in (mask.float(), mask.long()):
            with pytest.raises(ValueError, match="mask.*boolean"):
                way(q, k, k, numbers)
        for values in (v, v[:, :, :6]):
            with pytest.raises((RuntimeError, IndexError)):
                way(q, k, values, mask)

    @pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
    @pytest.mark.parametrize("how", ["trace", "script", "export"])
    @pytest.mark.parametrize("kv_dim", [None, 10])
    @pytest.mark.parametrize("masked", [False, True])
    @fused_or_not
    def test_multi_head_attention_leaves_python(self, fused, masked, kv_dim, how):
        """The same outputs, at sizes that were not there then."""

        def example(b, tq, tk):
            given = {"query": torch.randn(b, tq, 12)}
            if kv_dim:
                given["context"] = torch.randn(b, tk, kv_dim)
            if masked:
                given["mask"] = torch.rand(b, 1, 1, tk if kv_dim else tq) < 0.7
            return given

        module = MultiHeadAttention(12, 3, kv_dim=kv_dim, fused=fused)
        given = example(2, 5, 5 if how == "trace" else 7)  # a trace mustn't rely on Tq = Tk
        causal = {"causal": True}
        if how == "trace":  # it takes tensors alone
            module.forward = functools.partial(module.forward, **causal)
            converted, causal = torch.jit.trace(module, example_kwarg_inputs=given), {}
        elif how == "script":
            converted = torch.jit.script(module)
        else:
            free = {"query": (0, 1), "context": (0, 1), "mask": (0, 3)}
            free = {name: dict.fromkeys(free[name], torch.export.Dim.AUTO) for name in given}
            free["causal"] = None
            program = torch.export.export(module, (), given | causal, dynamic_shapes=free)
            converted = program.module()
        for sizes in ((2, 5, 7), (3, 4, 9), (1, 8, 6), (2, 6, 6)):
            given = example(*sizes)
            check_close(converted(**given, **causal), module(**given, causal=True), 1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_fused_attention_traced_fits_other_lengths(self):
        q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 7, 8)
        attend = lambda q, k: attention.fused_attention(q, k, k, causal=True)  # noqa: E731
        check_close(torch.jit.trace(attend, (q, q))(q, k), attend(q, k), 1e-6)

    @pytest.mark.filterwarnings("error")
    def test_plot_attention_of_any_tokens_and_sizes(self, tmp_path):
        tokens = ["a", "$\\frac$", "<b>", "two\nlines", "word" * 9, "$"] * 200
        for shape in ((2, 5, 7), (3, 4, 6, 6), (1, 1, 1), (1, 1, 700, 600)):
            weights = torch.rand(shape).softmax(dim=-1)
            queries, keys = tokens[: shape[-2]], tokens[: shape[-1]]
            path = attention.plot_attention(weights, queries, keys, tmp_path / "a.png")
            assert path.read_bytes()[:4] == b"\x89PNG"

    def test_attention_html(self, tmp_path):
        """Self-contained; no token gets out of its place; 0 alone is masked."""
        queries = ["<script>alert(1)</script>", "</script>", 'quo"te', "ünï\u2028", "DATA"]
        keys = ["<!--", "&amp;", "x"]
        weights = torch.rand(2, 3, 5, 3).softmax(dim=-1)
        weights[0, 0, 0] = torch.tensor([1.005, 1e-7, 0.0])  # as bfloat16 may round them
        path = attention.attention_html(weights, queries, keys, tmp_path / "a.html")
        page = path.read_text("utf-8")
        assert not re.findall(r"https?:|src=|url\(|import |<!--", page)
        assert page.count("<script") == page.count("</script>") == 2
        data = json.loads(re.search(r'<script id="data".*?>(.*?)</script>', page, re.S)[1])
        assert data["queries"] == queries and data["keys"] == keys
        stored = torch.tensor(data["weights"])
        assert stored[0, 0, 0].tolist() == [10_000, 1, 0]
        check_close(stored / 10_000, weights.clamp(max=1), 1e-4)

    def test_attention_demo_alone_in_an_empty_folder(self, tmp_path):
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
        assert {"heads.html", "heads.png"} < set(os.listdir(tmp_path / "out/attention"))


# -----------------------------------------------------------------------------
# encoder.py

ENCODER_POOLS = ["mean", "max", "mean+max", "first"]


def encoder_small(**given) -> encoder.EncoderConfig:
    sizes = {"max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16}
    return encoder.EncoderConfig(30, **(sizes | given))


def encoder_classifier(**given) -> encoder.EncoderClassifier:
    return encoder.EncoderClassifier(encoder_small(**given)).eval()


def encoder_case(seed: int):
    """A small random config, and (4, T) ids with padding after lengths from 1 to T."""
    rng = random.Random(seed)
    n_heads = rng.choice([1, 2, 3, 4])
    config = encoder_small(
        d_model=n_heads * rng.randint(1, 6),
        n_heads=n_heads,
        n_layers=rng.randint(1, 3),
        dropout=0.0,  # so that training mode can be compared
        norm_first=rng.random() < 0.5,
        activation=rng.choice(["relu", "gelu"]),
        pad_id=rng.choice([0, 3]),
        pool=rng.choice(ENCODER_POOLS),
    )
    tokens = torch.randint(0, 29, (4, rng.randint(2, 12)))
    tokens += tokens >= config.pad_id  # any id but pad_id
    for row in tokens:
        row[rng.randint(1, len(row)) :] = config.pad_id
    return config, tokens


def encoder_torch_layer(config, **given) -> nn.TransformerEncoderLayer:
    """torch's layer with random parameters: a zero bias would hide a forgotten one."""
    given = {"dropout": 0.0, "activation": config.activation} | given
    sizes = config.d_model, config.n_heads, config.d_ff
    choices = {"batch_first": True, "norm_first": config.norm_first}
    layer = nn.TransformerEncoderLayer(*sizes, **choices, **given)
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


class TestEncoder:
    def test_encoder_layer_equals_torch(self):
        """Values, gradients of the input and of every parameter, with padding."""
        for seed in range(60):
            config, tokens = encoder_case(seed)
            dtype, tolerance = TOLERANCES[seed % 2]
            theirs = encoder_torch_layer(config, dtype=dtype, layer_norm_eps=0.01)
            ours = encoder.EncoderLayer.from_torch(theirs)
            mask = tokens != config.pad_id
            x = torch.randn(*mask.shape, config.d_model, dtype=dtype, requires_grad=True)
            output = ours(x, mask[:, None, None, :])
            expected = theirs(x, src_key_padding_mask=~mask)
            check_close(output, expected, tolerance)
            found = torch.autograd.grad(output.sin().sum(), [x, *ours.parameters()])
            given = [x, *theirs.parameters()]
            wanted = torch.autograd.grad(expected.sin().sum(), given)
            for p, gradient in zip(given, wanted, strict=True):
                p.data = gradient
            named = encoder.EncoderLayer.from_torch(theirs)  # so that they have our names
            check_all_close(found, [x, *named.parameters()], tolerance)

    def test_encoder_stack_equals_torch(self):
        """embedding * sqrt(C) + positions, the layers; a final norm in pre-norm alone."""
        for seed in range(20):
            config, tokens = encoder_case(seed)
            ours = encoder.Encoder(config).double()
            theirs = [encoder_torch_layer(config).double() for _ in range(config.n_layers)]
            ours.layers = nn.ModuleList(map(encoder.EncoderLayer.from_torch, theirs))
            mask = tokens != config.pad_id
            x = ours.embedding.weight[tokens] * math.sqrt(config.d_model)
            x = x + encoder.sinusoidal_positional_encoding(tokens.size(1), config.d_model)
            output, weights = ours.forward_with_weights(tokens)
            for layer, found in zip(theirs, weights, strict=True):
                seen = layer.norm1(x) if config.norm_first else x
                call = {"key_padding_mask": ~mask, "average_attn_weights": False}
                check_close(found, layer.self_attn(seen, seen, seen, **call)[1], 1e-10)
                x = layer(x, src_key_padding_mask=~mask)
            if config.norm_first:
                x = F.layer_norm(x, x.shape[-1:])
            check_close(output[mask], x[mask], 1e-10)
            assert torch.equal(output, ours(tokens))

    def test_self_attention_equals_attention_py(self):
        """Values, weights and gradients; a row without keys, too."""
        theirs = nn.MultiheadAttention(12, 3)
        long, short = MultiHeadAttention.from_torch(theirs), encoder.SelfAttention(12, 3)
        short.qkv_proj.weight, short.qkv_proj.bias = theirs.in_proj_weight, theirs.in_proj_bias
        short.out_proj = theirs.out_proj
        long, short, x = long.double(), short.double(), torch.randn(5, 7, 12).double()
        padding = attention.padding_mask([7, 4, 1, 0, 6])  # (5, 1, 1, 7)
        for mask in (None, padding, torch.rand(7, 7) < 0.5, torch.rand(5, 3, 7, 7) < 0.5):
            found = *results(short, [x], mask), short.weights(x, mask)
            weights = long.forward_with_weights(x, None, mask)[1]
            check_all_close(found, [*results(long, [x], None, mask), weights], 1e-12)

    def test_sinusoidal_positional_encoding_equals_the_formula(self):
        for d_model in (1, 2, 5, 8, 17):
            table = encoder.sinusoidal_positional_encoding(30, d_model)
            assert table.shape == (30, d_model) and table.dtype == torch.float32
            for t, i in itertools.product(range(30), range(d_model)):
                angle = t / 10000 ** (2 * (i // 2) / d_model) + i % 2 * math.pi / 2
                assert abs(table[t, i].item() - math.sin(angle)) < 1e-7
        far = encoder.sinusoidal_positional_encoding(100_001, 4)[100_000]
        assert abs(far[0].item() - math.sin(100_000)) < 1e-7  # float32: 4e-3 off

    @pytest.mark.parametrize("pool", ENCODER_POOLS)
    def test_pool_tokens_equals_its_loops(self, pool):
        x = torch.randn(5, 7, 4).double() - 3  # below 0: padding's 0 would show in a max
        mask = torch.rand(5, 7) < 0.6
        mask[:2] = torch.tensor([[False], [True]])
        mask[2] = torch.arange(7) == 3  # a single token
        seen = x.masked_fill(~mask[:, :, None], math.nan)  # it counts for nothing
        for row, result in enumerate(encoder.pool_tokens(seen, mask, pool)):
            real = x[row, mask[row]] if mask[row].any() else torch.zeros(1, 4).double()
            expected = {"mean": sum(real) / len(real), "max": real.max(dim=0).values}
            expected["mean+max"] = torch.cat((expected["mean"], expected["max"]))
            expected["first"] = x[row, 0] * mask[row, 0]
            check_close(result, expected[pool], 1e-12)
        given = x.requires_grad_(), mask, pool
        assert torch.autograd.gradcheck(encoder.pool_tokens, given)

    def test_from_torch_keeps_what_the_layer_has(self):
        """Activation, dropout, mode, dtypes, and what is frozen."""
        x = torch.randn(2, 3, 16)
        for activation in (nn.ReLU(), nn.GELU(), F.relu, F.gelu):
            layer = encoder_torch_layer(encoder_small(), activation=activation, dropout=0.25)
            layer.eval().linear1.requires_grad_(False)
            ours = encoder.EncoderLayer.from_torch(layer)
            check_close(ours(x), layer(x), 1e-5)
            frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
            assert frozen == {"ffn.0.weight", "ffn.0.bias"}
            assert ours.dropout.p == 0.25 and not ours.training
        layer.bfloat16().train().norm1.float()
        ours = encoder.EncoderLayer.from_torch(layer)
        dtypes = ours.self_attention_norm.bias.dtype, ours.ffn_norm.bias.dtype
        assert ours.training and dtypes == (torch.float32, torch.bfloat16)
        ours.ffn[0].weight.data.zero_()
        assert layer.linear1.weight.any(), "copies"

    def test_encoder_padding_and_batch_invariance(self):
        """More padding, other rows, ids under the mask change nothing."""
        for seed in range(30):
            config, tokens = encoder_case(seed)
            model = encoder.EncoderClassifier(config).double().eval()
            logits = model(tokens)
            for row, length in enumerate((tokens != config.pad_id).sum(1).tolist()):
                alone = model(tokens[row : row + 1, :length])
                check_close(alone, logits[row : row + 1], 1e-12)
            longer = F.pad(tokens, (0, 12 - tokens.size(1)), value=config.pad_id)
            check_close(model(longer.int()), logits, 1e-12)
            mask = torch.rand(tokens.shape) < 0.7  # holes in the middle, too
            noise = torch.where(mask, tokens, torch.randint(0, 30, tokens.shape))
            check_close(model(noise, mask), model(tokens, mask), 1e-12)
            check_close(model(tokens, mask & False), model.head.bias.expand(4, 2), 0.0)

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_encoder_dropout_in_training_alone(self, norm_first):
        """On embeddings, each sub-layer's output and the pooled vector."""
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
        words = embed(torch.arange(500)[:, None])[0].diff(dim=0)
        assert 1.2 < words.std() < 1.6  # sqrt(2): a difference of two

    def test_encoder_config_defaults(self):
        """Weights without their config are another model's once a default changes."""
        defaults = 9, 512, 128, 4, 2, 512, 0.1, True, "gelu", 2, 0, "mean"
        assert dataclasses.astuple(encoder.EncoderConfig(9)) == defaults

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_encoder_from_the_meta_device(self, dtype):
        """All is right once weights are loaded, whatever the default dtype is."""
        tokens = torch.randint(1, 20, (3, 6))
        torch.set_default_dtype(dtype)
        try:
            source = encoder_classifier()
            with torch.device("meta"):
                assigned, copied = encoder_classifier(), encoder_classifier()
        finally:
            torch.set_default_dtype(torch.float32)
        copied.to_empty(device="cpu")  # leaves old memory there
        for tensor in (*copied.parameters(), *copied.buffers()):
            nn.init.constant_(tensor, math.nan)
        copied.load_state_dict(source.state_dict())
        assigned.load_state_dict(source.state_dict(), assign=True)
        for model in (assigned, copied):
            logits = model(tokens)
            assert torch.equal(logits, source(tokens))
            assert logits.dtype == dtype and logits.isfinite().all()

    def test_self_attention_weights_in_float16(self):
        model = encoder.SelfAttention(64, 1).half()
        model.qkv_proj.weight.data = torch.eye(64).repeat(3, 1).half() * 8
        weights = model.weights(torch.full((1, 3, 64), 8.0).half())
        check_close(weights.float(), torch.full((1, 1, 3, 3), 1 / 3), 1e-3)  # q k' = 262,144

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("pool", ["mean+max", "first", "max"])
    def test_encoder_leaves_python_at_other_sizes(self, pool):
        model = encoder_classifier(norm_first=pool != "first", pool=pool)
        example, other = torch.randint(1, 30, (3, 9)), torch.randint(1, 30, (5, 12))
        other[1, 4:] = other[2] = 0
        free = {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", max=12)}}
        for made in (
            torch.jit.script(model),
            torch.jit.trace(model, (example,)),
            torch.export.export(model, (example,), dynamic_shapes=free).module(),
            torch.compile(model, fullgraph=True, backend="eager"),
        ):
            check_close(made(other), model(other), 1e-6)

    def test_encoder_refuses_what_would_be_silently_wrong(self):
        theirs = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16)
        ours = encoder.EncoderLayer.from_torch
        model, tokens = encoder_classifier(), torch.ones(2, 12).long()
        weights = model.encoder.forward_with_weights
        for words, make in (
            ("n_heads.*d_model=9.*2", lambda: encoder_small(d_model=9)),
            ("n_heads.*0", lambda: encoder_small(n_heads=0)),
            ("activation.*tanh", lambda: encoder_small(activation="tanh")),
            ("pool.*cls", lambda: encoder_small(pool="cls")),
            ("batch_first", lambda: ours(theirs())),
            ("bias", lambda: ours(theirs(batch_first=True, bias=False))),
            ("activation", lambda: ours(theirs(batch_first=True, activation=F.silu))),
            ("activation", lambda: ours(theirs(activation=nn.GELU(approximate="tanh")))),
            ("max_len=12.*13", lambda: model(torch.ones(2, 13).long())),
            ("mask must be", lambda: model(tokens, tokens[:, :1] > 0)),  # would broadcast
            ("mask must be", lambda: model(tokens, torch.ones(2, 12, 12) > 0)),
            ("mask must be", lambda: weights(tokens, tokens.float())),  # would be added
            ("mask must be", lambda: encoder_classifier(n_layers=0)(tokens, tokens)),
        ):
            with pytest.raises(ValueError, match=words):
                make()

    def test_generate_reviews_are_twins(self):
        make = encoder.generate_reviews
        reviews = make(4000, 5)
        assert reviews == make(4000, 5) != make(4000, 6)
        assert len(dict(reviews)) == 4000, "so no sentence is in two splits"
        for (text, label), (twin, other) in zip(reviews[::2], reviews[1::2], strict=True):
            assert label > other and sorted(text.split()) == sorted(twin.split())

    def test_main_that_diverges_ends_in_a_sentence(self, tmp_path):
        with pytest.raises(SystemExit, match="--lr"):
            encoder.main(encoder.Settings(lr=1e30, out=str(tmp_path)))
        assert not list(tmp_path.iterdir())

    def test_encoder_demo_alone_in_an_empty_folder(self, tmp_path):
        shutil.copy(ROOT / "encoder.py", tmp_path)
        result = run_script("encoder.py", cwd=tmp_path, folder=tmp_path, PYTHONIOENCODING="ascii")
        summary = last_json(result)
        assert summary["encoder"] >= 0.99 and len(result.stdout.splitlines()[-1]) < 300
        for name in ("bag of words", "encoder without positions"):
            assert abs(summary[name] - 0.5) < 0.02
        assert len(json_of(tmp_path / summary["report"])["rows"]) == 3
        assert (tmp_path / "out/encoder/head.png").read_bytes()[:4] == b"\x89PNG"


# -----------------------------------------------------------------------------
# transformer.py


def tiny_transformer(norm_first=True, **changes):
    """Large random weights in all its parts: everything matters."""
    sizes = {"vocab_size": 11, "max_len": 24, "d_model": 12, "n_heads": 3, "n_layers": 2}
    sizes |= {"d_ff": 20, "dropout": 0.0, "tied": False, "norm_first": norm_first} | changes
    model = transformer.Transformer(transformer.TransformerConfig(**sizes))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.4)
    return model.double()


def sentences(n=6, longest=9):
    """Random tokens with EOS, padded on the right; the first is the longest."""
    rows = []
    for length in (longest, *torch.randint(2, longest + 1, (n - 1,)).tolist()):
        rows.append(F.pad(torch.randint(3, 11, (length - 1,)), (0, 1), value=2))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def gradient_of(model, logits):
    model.zero_grad()
    logits.sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def logits_by_torch(model, src, tgt):
    """By nn.Transformer, as a function of the model's parameters."""
    pairs = {  # torch's: ours
        "linear1": "ffn.0", "linear2": "ffn.2", "coder.layers": "coder", "coder.norm": "coder_norm",
        "norm1": "self_attention_norm", "norm3": "ffn_norm",
        "self_attn": "self_attention", "multihead_attn": "cross_attention",
    }  # fmt: skip
    c = model.config
    sizes = (c.d_model, c.n_heads, c.n_layers, c.n_layers, c.d_ff, 0.0)
    theirs = nn.Transformer(*sizes, batch_first=True, norm_first=c.norm_first)
    if not c.norm_first:
        theirs.encoder.norm = theirs.decoder.norm = None
    weights = {}
    for name, _ in theirs.named_parameters():
        second = "ffn_norm" if "encoder" in name else "cross_attention_norm"
        ours = name.replace("norm2", second)
        for their, our in pairs.items():
            ours = ours.replace(their, our)
        parts = [ours.replace("in_proj_", f"{x}_proj.") for x in "qkv"]  # torch joins three
        weights[name] = torch.cat([model.get_parameter(part) for part in dict.fromkeys(parts)])
    waves = transformer.sinusoidal_positional_encoding(24, c.d_model)
    x = model.src_embedding(src) * c.d_model**0.5 + waves[: src.size(1)]
    y = model.tgt_embedding(tgt) * c.d_model**0.5 + waves[: tgt.size(1)]
    masks = dict.fromkeys(("src_key_padding_mask", "memory_key_padding_mask"), src == 0)
    masks["tgt_mask"] = torch.ones(tgt.size(1), tgt.size(1)).triu(1).bool()
    hidden = torch.func.functional_call(theirs, weights, (x, y), masks)
    return F.linear(hidden, model.output.weight)


@torch.no_grad()
def beams_by_lists(model, src, max_len, size, penalty):
    """Row after row, without cache. Only the end divides log-probabilities."""
    found, scores = [], []
    for row in src:
        beams = [(0.0, [1])]
        for _ in range(max_len):
            candidates = [beam for beam in beams if beam[1][-1] == 2]
            for log_prob, tokens in beams:
                if tokens[-1] != 2:
                    logits = model(row[None, row != 0], torch.tensor([tokens]))[0, -1]
                    following = enumerate(logits.log_softmax(-1).tolist())
                    candidates += [(log_prob + x, [*tokens, i]) for i, x in following]
            beams = sorted(candidates, reverse=True)[:size]
        score, tokens = max((x / ((4 + len(t)) / 6) ** penalty, t) for x, t in beams)
        found.append(torch.tensor(tokens[1:]))
        scores.append(score)
    found = nn.utils.rnn.pad_sequence(found, batch_first=True)
    return found, torch.tensor(scores, dtype=torch.float64)


TRANSFORMER_SMALL = {
    "epochs": 5, "d_model": 32, "d_ff": 32, "n_layers": 1, "dropout": 0.05, "save_every": 8,
    "vocab_size": 400, "batch_tokens": 400, "warmup": 20, "lr_scale": 1.0, "amp": "off",
}  # fmt: skip

TRANSFORMER_KILLED = """
import json, os, signal, sys, transformer
corpus = transformer.number_corpus(0, 500, 30, 20)
transformer.number_corpus = lambda seed: corpus
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
transformer.main(transformer.Settings(**json.loads(sys.argv[1])))
"""


def transformer_run(out, corpus=None, **changes):
    """In this process. Returns the report, and the model and tokenizer left."""
    corpus = corpus or transformer.number_corpus(0, 500, 30, 20)
    s = transformer.Settings(**(TRANSFORMER_SMALL | {"out": str(out)} | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "number_corpus", lambda seed: corpus)
        transformer.main(s)
    return json_of(out / "report.json"), *transformer_saved(out)


def transformer_saved(out):
    saved = transformer.load(out / "model.pt")
    model = transformer.Transformer(transformer.TransformerConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.double(), transformer.Tokenizer(saved["vocabulary"])


def exit_status(out, **changes):
    """Of a run that stops. (An exception that is kept would keep the lock.)"""
    try:
        transformer_run(out, **changes)
    except SystemExit as stop:
        return stop.code
    raise AssertionError("it ran to its end")


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def pairs_of_ids():
    rows = [row[row > 0].tolist() for row in sentences(80)]
    return list(zip(rows[::2], rows[1::2], strict=True))


def multi30k_files(folder, changes=()):
    """Files in Multi30k's layout, 12 lines each, or what changes has."""
    lines = {"de": "ein mann mit 7 $$ am\x0btag {}\r\n", "en": "a man with 7 $$ a day {}\r\n"}
    for part, language in itertools.product(transformer.MULTI30K, lines):
        text = "\ufeff" + "".join(lines[language].format(i % 4) for i in range(12))
        data = {f"{part}.{language}": gzip.compress(text.encode())} | dict(changes)
        (folder / f"{part}.{language}.gz").write_bytes(data[f"{part}.{language}"])
    return str(folder)


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """Folder, report, model (unsure: greedy and beam differ), tokenizer."""
    torch.set_num_threads(1)  # the test's fixtures come later
    out = tmp_path_factory.mktemp("trained")
    return out, *transformer_run(out)


class TestTransformer:
    # ---- the model
    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("d_model", [12, 15])
    def test_transformer_equals_torch(self, norm_first, d_model):
        model, src = tiny_transformer(norm_first, d_model=d_model), sentences()
        tgt = F.pad(sentences(longest=7), (1, 0), value=1)
        real = (tgt != 0)[..., None]
        logits, expected = model(src, tgt) * real, logits_by_torch(model, src, tgt) * real
        check_close(logits, expected, 1e-10)
        ours, theirs = (gradient_of(model, x) for x in (logits, expected))
        check_close(ours, theirs, 1e-10)

    def test_transformer_parameter_counts(self):
        paper = 63_082_496
        for n_parameters, changes in (
            (paper, {}),
            (214_245_376, {"d_model": 1024, "n_heads": 16, "d_ff": 4096}),
            (paper + 2 * 37_000 * 512, {"tied": False}),
            (paper + 2 * 2 * 512, {"norm_first": True}),  # the two final norms
        ):
            with torch.device("meta"):
                model = transformer.Transformer(transformer.TransformerConfig(**changes))
            assert sum(p.numel() for p in model.parameters()) == n_parameters

    def test_transformer_initial_scale(self):
        config = transformer.TransformerConfig(300, 9, 64, 4, 1, 64, tied=False)
        model = transformer.Transformer(config)
        for matrix in (model.src_embedding, model.tgt_embedding, model.output):
            assert abs(matrix.weight.std() - 64**-0.5) < 0.005
        for layer in (model.encoder[0], model.decoder[0]):
            linear = layer.self_attention.q_proj
            assert abs(linear.weight.abs().max() - (6 / 128) ** 0.5) < 0.002
            assert linear.bias.abs().max() == 0

    def test_sinusoidal_positional_encoding(self):
        t, i = torch.arange(50)[:, None], torch.arange(7)
        angles = t / 10_000 ** (2 * (i // 2) / 7)
        expected = torch.where(i % 2 == 0, angles.sin(), angles.cos())
        check_close(transformer.sinusoidal_positional_encoding(50, 7), expected, 1e-5)

    def test_transformer_made_on_meta_is_right(self):
        model, src = tiny_transformer().float(), sentences()
        with torch.device("meta"):
            other = transformer.Transformer(model.config)
        other.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert torch.equal(other(src, src), model(src, src))

    def test_attention_is_torchs_and_0_where_nothing_is_seen(self):
        q, v = torch.randn(2, 2, 5, 4, dtype=torch.float64)
        mask = torch.rand(2, 5, 5) < 0.5
        mask[0, 2] = False
        for scale in (1, 60):  # at 60 what is seen scores below any fill
            inputs = (scale * q, -scale * q, v)
            output, weights = transformer.attention(*inputs, mask)
            assert (output[0, 2] == 0).all() and (weights[~mask] == 0).all()
            expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
            check_close(output, expected, 1e-12)
        big = torch.full((1, 4, 64), 60.0, dtype=torch.float16)
        assert transformer.attention(big, big, big, mask.new_ones(4, 4))[0].isfinite().all()
        model = tiny_transformer()
        logits = model(torch.zeros(2, 4).long(), torch.ones(2, 3).long())  # only padding
        assert gradient_of(model, logits).isfinite().all()

    def test_transformer_no_look_ahead_and_padding_changes_nothing(self):
        """Nor do the other sentences of the batch."""
        model, src = tiny_transformer(), sentences()
        tgt = torch.randint(3, 11, (6, 8))
        changed = tgt.clone()
        changed[:, 4] = 3 + (tgt[:, 4] - 2) % 8
        before, after = model(src, tgt), model(src, changed)
        assert torch.equal(before[:, :4], after[:, :4])
        assert (before[:, 4:] != after[:, 4:]).any(-1).all()  # later ones see it
        padded = model(F.pad(src, (0, 5)), F.pad(tgt, (0, 3)))[:, :8]
        for i in range(6):
            alone = model(src[i : i + 1, src[i] != 0], tgt[i : i + 1])
            check_close(alone[0], padded[i], 1e-12)

    def test_decode_cache_gives_the_same_logits(self):
        """The memory is projected once: NaN there, later, changes nothing."""
        model, src = tiny_transformer(), sentences()
        tgt = torch.randint(3, 11, (6, 10))
        memory, mask = model.encode(src)
        expected, cache, pieces = model.decode(tgt, memory, mask), {}, []
        for piece in tgt.split((1, 3, 1, 4, 1), dim=1):
            pieces.append(model.decode(piece, memory, mask, cache))
            memory = memory * math.nan
            with pytest.raises(ValueError, match="max_len"):  # the cache stays
                model.decode(torch.ones(6, 24).long(), memory, mask, cache)
        check_close(torch.cat(pieces, dim=1), expected, 1e-12)

    def test_decoder_layer_under_checkpointing(self):
        """Every gradient as without, the encoder's too."""
        model, src = tiny_transformer(), sentences()
        expected = gradient_of(model, model(src, src))
        checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
        for layer in (*model.encoder, *model.decoder):
            layer.forward = functools.partial(checkpoint, layer.forward)
        check_close(gradient_of(model, model(src, src)), expected, 1e-12)

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_transformer_drops_at_every_sublayer(self, norm_first):
        """At 1, pre-norm layers return their input, post-norm ones its norms."""
        model = tiny_transformer(norm_first, dropout=1.0)
        x, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 1, 1, 5).bool()
        for layer in (*model.encoder, *model.decoder):
            decodes = hasattr(layer, "cross_attention")
            y = layer(x, mask, x, mask)[0] if decodes else layer(x, mask)
            norms = [part for part in layer.children() if isinstance(part, nn.LayerNorm)]
            check_close(y, x if norm_first else nn.Sequential(*norms)(x), 1e-12)
        assert (model.encode(sentences())[0].std(0) < 1e-9).all()

    def test_label_smoothed_loss_is_the_formula(self):
        logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(1, 11, (3, 5))
        targets[0, 3:] = targets[1, 1:] = 0
        real = targets != 0
        log_p = logits.log_softmax(-1)
        rows = -0.8 * log_p.gather(-1, targets[..., None])[..., 0] - 0.2 * log_p.mean(-1)
        expected = rows[real].mean()
        poisoned = logits.detach().masked_fill(~real[..., None], math.nan)
        poisoned.requires_grad_()
        loss = transformer.label_smoothed_loss(poisoned, targets, pad_id=0, smoothing=0.2)
        check_close(loss, expected, 1e-12)
        loss.backward()
        expected.backward()
        check_close(poisoned.grad, logits.grad, 1e-12)

    def test_noam_lr_is_the_formula(self):
        peak = (512 * 4000) ** -0.5
        for step, part in ((1, 1 / 4000), (3000, 3 / 4), (4000, 1), (16_000, 1 / 2)):
            assert transformer.noam_lr(step, 512, 4000) == pytest.approx(part * peak)

    def test_transformer_refuses(self):
        bad = ("n_heads", 5), ("n_heads", -1), ("vocab_size", 2), ("eos_id", 1), ("pad_id", -1)
        for name, value in bad:
            with pytest.raises(ValueError, match=name):
                transformer.TransformerConfig(**{name: value})
        model, src, tgt = tiny_transformer(), *torch.ones(2, 2, 4).long()
        assert model(src.repeat(1, 6).int(), tgt.int()).shape == (2, 4, 11)  # max_len
        memory, mask = model.encode(src)
        loss = functools.partial(transformer.label_smoothed_loss, memory, tgt, 0)
        for words, function, *inputs in (
            ("memory_mask", model, src, tgt[:1]),
            ("max_len", model, src.repeat(1, 7), tgt),
            ("memory_mask", model.decode, src, memory, mask[:, :, :, :-1]),
            ("memory_mask", model.decode, src, memory, mask.long()),
            ("smoothing", loss, 1.0),
            ("smoothing", loss, -0.1),
        ):
            with pytest.raises(ValueError, match=words):
                function(*inputs)

    # ---- search
    def test_greedy_decode_and_beam_search_equal_lists(self, half_trained):
        """With a model that trains, whose modes stay."""
        _, _, model, tokenizer = half_trained
        texts = map(transformer.english_number, range(41_000, 541_000, 41_700))
        src = transformer.pad([tokenizer.encode(text, 32) for text in texts], model)
        cases, lengths, cut_off = [(model, src)], set(), 0
        for norm in (False, True):
            cases.append((tiny_transformer(norm, dropout=0.5), sentences(n=12)))
        searches = ((1, 0.6), (2, 0.0), (4, 1.5))
        for (model, src), (size, penalty) in itertools.product(cases, searches):
            model.train().encoder.eval()
            modes = [module.training for module in model.modules()]
            found = transformer.beam_search(model, src, 6, size, penalty)
            greedy = transformer.greedy_decode(model, src, 6)
            assert modes == [module.training for module in model.modules()]
            expected = beams_by_lists(model.eval(), src, 6, size, penalty)
            for actual, wanted in zip(found, expected, strict=True):
                check_close(actual, wanted, 1e-10)
            assert size > 1 or torch.equal(greedy, found[0])
            lengths |= set((found[0] != 0).sum(1).tolist())
            cut_off += (found[0][:, -1] > 2).sum()
        assert len(lengths) > 4 and cut_off > 0  # both kinds were there

    def test_beam_search_of_full_width_equals_brute_force(self):
        """4^4 lists leave nothing out."""
        src = torch.tensor([[3, 3, 2], [3, 2, 0]])
        for penalty in (0.0, 0.6, 2.0):
            model = tiny_transformer(vocab_size=4, n_layers=1)
            found = transformer.beam_search(model, src, 4, 4**4, penalty)
            expected = beams_by_lists(model, src, 4, 4**4, penalty)
            for actual, wanted in zip(found, expected, strict=True):
                check_close(actual, wanted, 1e-10)

    def test_beam_search_of_nothing_and_in_bf16(self):
        model, none = tiny_transformer().bfloat16().eval(), torch.zeros(0, 4).long()
        tokens, scores = transformer.beam_search(model, none, 5)
        greedy = transformer.greedy_decode(model, none, 5)
        assert greedy.shape == tokens.shape == (0, 0) and scores.shape == (0,)
        src = sentences()
        scores = transformer.beam_search(model, src, 1, 2, 0.0)[1]  # in float32
        logits = model(src, torch.ones(6, 1).long())[:, 0].detach().float()
        check_close(scores, logits.log_softmax(-1).amax(-1), 1e-6)

    def test_translate_loses_no_text_and_sees_no_reference(self, half_trained, capsys):
        _, _, model, tokenizer = half_trained
        texts = map(transformer.english_number, range(100_000, 1_000_000, 13_007))
        texts = ["", *texts, "  "]
        empty, *rows, last = transformer.translate(model, tokenizer, texts, 4, 1.0)
        assert empty == last == {"text": "", "log_prob": 0, "n_tokens": 0, "finished": True}
        for text, row in zip(texts[1:-1], rows, strict=True):
            src = transformer.pad([tokenizer.encode(text, 32)], model)
            found, score = transformer.beam_search(model, src, 32, 4, 1.0)
            n, log_prob = found.shape[1], row.pop("log_prob")  # undivided
            assert log_prob / ((5 + n) / 6) == pytest.approx(score.item())
            text = tokenizer.decode(found[0].tolist())
            assert row == {"text": text, "n_tokens": n, "finished": found[0, -1] == 2}
        texts, s, reports = texts[1:-1], transformer.Settings(), []
        for target in ("eins", "tausend und"):
            corpus = transformer.Corpus("numbers", [], [], [(text, target) for text in texts])
            reports.append(transformer.evaluate(model, tokenizer, corpus, s))
        assert reports[0] == reports[1] and "70 of 70 aren't" in capsys.readouterr().out
        greedy = transformer.translate(model, tokenizer, texts, 1, 0.0)
        beam = transformer.translate(model, tokenizer, texts, 4, 0.0)
        for key, mean in reports[0]["searches"]["greedy"].items():
            assert mean == pytest.approx(np.mean([row.get(key, 0) for row in greedy]))
        greedy, beam = ([row["log_prob"] for row in rows] for rows in (greedy, beam))
        gains = np.array(beam) - np.array(greedy)
        assert reports[0]["search_gains"] == (gains > 1e-3).sum()
        assert reports[0]["search_errors"] == (gains < -1e-3).sum()

    # ---- data
    def test_numbers_in_words_and_number_corpus(self):
        for n, english, german in (
            (101, "one hundred and one", "einhundert eins"),
            (742, "seven hundred and forty-two", "siebenhundert zwei und vierzig"),
            (1_001, "one thousand and one", "ein tausend eins"),
            (30_100, "thirty thousand one hundred", "dreißig tausend einhundert"),
            (41_000, "forty-one thousand", "ein und vierzig tausend"),
        ):
            assert transformer.english_number(n) == english
            assert transformer.german_number(n) == german
        corpus = transformer.number_corpus(0)
        parts = corpus[1:]
        assert [len(part) for part in parts] == [8_000, 500, 1_000]
        for side in (0, 1):  # they share nothing
            assert len({pair[side] for part in parts for pair in part}) == 9_500
        for part in parts:  # short ones, too
            assert 0.2 < sum(len(pair[0].split()) < 5 for pair in part) / len(part) < 0.3

    def test_tokenizer_keeps_every_text(self):
        tokenizer = transformer.Tokenizer.train(["ONE", "two one"] * 9, 262)
        assert tokenizer.encode("ONE one", 3) == [261, 261, 2]
        assert transformer.Tokenizer.train(["one"], 259).vocab_size == 259
        for text in ("forty-two thousand", "Größe, 東京 🦊!", "  a  b ", "", "\x00\x7f"):
            ids = tokenizer.encode(text, 99)
            assert ids[-1] == 2 and all(3 <= i < 262 for i in ids[:-1])
            assert tokenizer.decode([1, *ids, 0, 0]) == text.strip().lower()
        with pytest.raises(ValueError, match="max_len=2: 'one one'"):
            tokenizer.encode("one one", 2)

    def test_token_batches_are_full_and_complete(self):
        rng = random.Random(0)
        lengths = [rng.randint(1, 30) for _ in range(500)] + [1000]
        batches = transformer.token_batches(lengths, 120, "0 0")
        assert sorted(i for batch in batches for i in batch) == list(range(501))
        sizes = [len(batch) * lengths[batch[-1]] for batch in batches]
        assert [size for size in sizes if size > 120] == [1000]
        assert sum(sizes) < 1.06 * sum(lengths) and len(batches) < 1.3 * sum(lengths) / 120
        longest = [lengths[batch[-1]] for batch in batches]
        assert longest != sorted(longest)  # in no order
        other = transformer.token_batches(lengths, 120, "0 1")
        assert len(other) == len(batches)  # train counts on it
        assert set(map(frozenset, other)) != set(map(frozenset, batches))
        assert list(map(len, transformer.token_batches([10] * 24, 120, ""))) == [12, 12]

    def test_lines_of_and_multi30k_corpus(self, tmp_path, monkeypatch):
        """Lines end as people mean it; damaged files are refused."""
        data = "\ufeffone\u2028two\r\nthree\x0b\x85four \rfive\n\nsix".encode()
        lines = ["one\u2028two", "three\x0b\x85four", "five", "", "six"]
        assert transformer.lines_of(data) == lines
        official = os.environ.get("MULTI30K_DATA")
        assert not official or transformer.multi30k_corpus(official).name == "multi30k"
        folder = multi30k_files(tmp_path)
        corpus = transformer.multi30k_corpus(folder)
        assert corpus.name == "own" and [len(part) for part in corpus[1:]] == [12] * 3
        assert corpus.train[7] == ("ein mann mit 7 $$ am\x0btag 3", "a man with 7 $$ a day 3")
        german, english = zip(*corpus.train, strict=True)
        sha256 = hashlib.sha256("\n".join(german + english).encode()).hexdigest()
        known = dict.fromkeys(transformer.MULTI30K, (12, sha256))
        monkeypatch.setattr(transformer, "MULTI30K", known | {"val": (13, sha256)})
        assert transformer.multi30k_corpus(folder).name == "own"
        monkeypatch.setattr(transformer, "MULTI30K", known)
        assert transformer.multi30k_corpus(folder) == corpus._replace(name="multi30k")
        pack, whole = gzip.compress, (tmp_path / "train.de.gz").read_bytes()
        for words, changes in (
            ("train: 12 German lines, 11 English", {"train.en": pack(b"a dog\n" * 11)}),
            ("val: 0 German", {"val.de": pack(b""), "val.en": pack(b"")}),
            ("flickr.* altered", {"test_2016_flickr.de": pack(b"ein hund\n" * 12)}),
            ("train.de.gz", {"train.de": whole[:-20]}),
            ("train.de.gz", {"train.de": whole[:40] + b"?" + whole[41:]}),
            ("train.de.gz", {"train.de": b"junk"}),
            ("train.de.gz", {"train.de": pack("straße\n".encode("latin1") * 12)}),
        ):
            multi30k_files(tmp_path, changes)
            with pytest.raises(ValueError, match=words):
                transformer.multi30k_corpus(folder)

    def test_read_lines_downloads_once(self, tmp_path, monkeypatch):
        there, cache = tmp_path / "train.de.gz", tmp_path / "new/cache"
        monkeypatch.setattr(transformer, "MULTI30K_URL", f"{tmp_path.as_uri()}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        good = gzip.compress(b"ein mann auf der wiese\n" * 3)
        for wrong in (b"<html>", good[:-10], b"", gzip.compress(b"")):
            there.write_bytes(wrong)
            with pytest.raises(ValueError, match="train.de.gz.*--data"):
                transformer.read_lines("train.de", "")
        there.write_bytes(good)
        for _ in range(2):  # the second time, from the cache
            assert transformer.read_lines("train.de", "") == ["ein mann auf der wiese"] * 3
            there.unlink(missing_ok=True)
        monkeypatch.setattr(transformer, "MULTI30K", {"train": (4, "0")})  # known, of the cache
        (cache / "multi30k/train.en.gz").write_bytes(good)
        with pytest.raises(ValueError, match="train.* altered"):
            transformer.multi30k_corpus("")

    # ---- files and training
    def test_save_and_load_refuse(self, tmp_path, monkeypatch):
        path, weight = tmp_path / "x.pt", torch.arange(1000.0)
        content = {"model": {"weight": weight}}
        transformer.save(path, content)
        whole = path.read_bytes()
        place = whole.index(weight[500:510].numpy().tobytes())
        changed = whole[:place] + b"\x01" + whole[place + 1 :]
        for damaged in (changed, whole[:-100], b"", b"junk" * 50):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="x.pt"):
                transformer.load(path)
        transformer.save(path, content | {"code": os.mkdir})
        with pytest.raises(pickle.UnpicklingError):
            transformer.load(path)
        path.write_bytes(whole)
        with pytest.raises(FloatingPointError):
            transformer.save(path, {"model": {"weight": weight / 0, "fine": weight}})
        monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)  # a full disk
        with pytest.raises(ZeroDivisionError):
            transformer.save(path, content)
        assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

    def test_batch_loss_and_use_bf16(self):
        model, pairs = tiny_transformer(), pairs_of_ids()
        rows, options = [], {"label_smoothing": 0.1, "reduction": "none"}
        for source, target in pairs:
            logits = model(torch.tensor([source]), torch.tensor([[1, *target[:-1]]]))[0]
            rows.append(F.cross_entropy(logits, torch.tensor(target), **options))
        together = transformer.batch_loss(model, pairs, 0.1, bf16=False)
        check_close(together, torch.cat(rows).mean(), 1e-10)
        low = transformer.batch_loss(model.float(), pairs, 0.1, bf16=True)
        assert low.dtype == torch.float32 and 1e-6 < abs(low - together) < 0.1
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
        for amp, chosen in (("auto", native), ("bf16", True), ("off", False)):
            assert transformer.use_bf16(amp, torch.device("cpu")) == chosen

    @pytest.mark.parametrize("average", [2, 9])
    def test_train_steps_written_out(self, average, tmp_path):
        """The final weights are the mean over the last epochs' ends."""
        pairs = pairs_of_ids()
        s = transformer.Settings(out=str(tmp_path), epochs=4, batch_tokens=100, warmup=7, seed=5)
        s.average, s.lr_scale, s.d_model, s.clip, s.save_every = average, 3.0, 12, 0.1, 0
        # float64: in float32 Adam makes steps of rounding errors
        model = tiny_transformer(dropout=0.2)
        expected = copy.deepcopy(model)
        state = {"step": 0, "seconds": 0.0, "history": [], "average": {}}
        transformer.train(s, model, pairs, pairs[:9], state)
        matrices = [p for p in expected.parameters() if p.dim() == 2]
        vectors = [p for p in expected.parameters() if p.dim() == 1]
        optimizer = torch.optim.AdamW(vectors, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0)
        optimizer.add_param_group({"params": matrices, "weight_decay": 0.01})
        lengths = [max(map(len, pair)) for pair in pairs]
        step, ends = 0, []
        for epoch in range(4):
            for batch in transformer.token_batches(lengths, 100, f"5 {epoch}"):
                torch.manual_seed(5 * 1_000_003 + step)  # dropout
                step += 1
                optimizer.zero_grad()
                batch = [pairs[i] for i in batch]
                transformer.batch_loss(expected, batch, 0.1, False).backward()
                assert nn.utils.clip_grad_norm_(expected.parameters(), 0.1) > 0.1
                for group in optimizer.param_groups:
                    group["lr"] = 3.0 * transformer.noam_lr(step, 12, 7)
                optimizer.step()
            ends.append(weights_of(expected))
            with transformer.evaluating(expected):
                dev_loss = transformer.batch_loss(expected, pairs[:9], 0.0, False).item()
            row = state["history"][epoch]
            assert row["epoch"] == epoch + 1 and row["dev_loss"] == pytest.approx(dev_loss)
        assert state["step"] == step > 12
        check_close(weights_of(model), torch.stack(ends[-average:]).mean(0), 1e-6)

    def test_main_goes_on_bit_for_bit_after_kill_9(self, half_trained, tmp_path):
        """While a checkpoint is saved; and after a gradient that isn't finite."""
        loss, factors = transformer.batch_loss, iter([1.0] * 9 + [math.inf])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "batch_loss", lambda *given: loss(*given) * next(factors))
            stop = exit_status(tmp_path)
        assert "step 10" in stop and "--lr-scale" in stop
        given = json.dumps(TRANSFORMER_SMALL | {"out": str(tmp_path)})
        command = [sys.executable, "-c", TRANSFORMER_KILLED, given]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert transformer.load(tmp_path / "checkpoint.pt")["step"] == 8
        _, expected, undisturbed, _ = half_trained
        lock = None
        for changes in ({}, {"save_every": 50, "beam_size": 2}):  # then it evaluates again
            report, model, _ = transformer_run(tmp_path, **changes)
            assert torch.equal(weights_of(undisturbed), weights_of(model))
            assert report["history"] == expected["history"] and report["steps"] > 20
            lock = lock or transformer.lock_out(tmp_path)  # a finished run needs none
        assert list(report["searches"])[1] == "beam 2, penalty 0"
        lock.close()

    @pytest.mark.parametrize("lr_scale, save_every", [(1e38, 1), (1e35, 3)])
    def test_main_saves_only_what_is_finite(self, tmp_path, lr_scale, save_every):
        """One step, after which a weight or the loss isn't."""
        changes = {"lr_scale": lr_scale, "save_every": save_every, "batch_tokens": 10**6}
        assert "--lr-scale" in exit_status(tmp_path, **changes, epochs=1)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]

    def test_main_ends_in_a_sentence(self, half_trained, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        other = transformer.number_corpus(1, 500, 30, 20)
        lock = transformer.lock_out(tmp_path)
        monkeypatch.setattr(transformer.lock_out, "__defaults__", (0.2,))
        ones = "max_len d_model n_heads n_layers d_ff epochs batch_tokens warmup beam_size"
        zeros = "seed dropout lr_scale smoothing weight_decay clip average save_every"
        wrong = [("vocab_size", 258), ("seed", 2**43), ("dropout", 1.0), ("smoothing", 1.0)]
        wrong += [(name, 0) for name in ones.split()] + [(name, -1) for name in zeros.split()]
        for words, changes in (
            ("in use", {"out": tmp_path}),
            ("file", {"out": tmp_path / "file/below"}),
            *((name, {name: value}) for name, value in [*wrong, ("lr_scale", math.nan)]),
            ("model.pt", {"translate": "one"}),
            ("max_len=3", {"max_len": 3}),
            ("n_heads", {"d_model": 18}),
            ("lr_scale=1.0, not 0.7", {"out": half_trained[0], "lr_scale": 0.7}),
            ("sentences", {"corpus": other, "out": half_trained[0]}),
        ):
            code = exit_status(**({"out": tmp_path / "new"} | changes))
            lines = capsys.readouterr().err.splitlines()
            assert code == 2 and len(lines) == 1 and words in lines[0], lines
        lock.close()
        errors = [ZeroDivisionError(), OSError("full"), KeyboardInterrupt()]

        def fail(s, model, pairs, dev, state):
            assert (len(pairs), len(dev)) == (500, 30)  # no test sentence
            raise errors.pop()

        monkeypatch.setattr(transformer, "train", fail)
        assert exit_status(tmp_path) == 130 and "full" in exit_status(tmp_path)
        with pytest.raises(ZeroDivisionError):  # of the code: a traceback
            transformer_run(tmp_path)

    # ---- the command line and the demo
    def test_parse_lets_a_flag_override_its_preset(self):
        assert transformer.parse([]) == transformer.Settings()
        flags = ["--preset=multi30k", "--epochs", "3", "--no-tied", "--length-penalty", "-1"]
        s = transformer.parse(flags)
        assert (s.epochs, s.dropout, s.tied, s.length_penalty) == (3, 0.3, False, -1.0)
        assert s.translate is None and s.out != transformer.Settings().out

    def test_main_of_a_corpus_of_ones_own(self, tmp_path, capsys, monkeypatch):
        """From files to BLEU, picture ($ is no formula) and --translate."""
        monkeypatch.setenv("MULTI30K_DATA", multi30k_files(tmp_path))
        s = transformer.parse(["--preset", "multi30k", "--out", str(tmp_path / "out")])
        s = dataclasses.replace(s, **TRANSFORMER_SMALL | {"epochs": 30, "dropout": 0.0})
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

    def test_demo_gets_every_number_right(self, tmp_path, capsys):
        """Alone in a folder, on a terminal of ASCII."""
        shutil.copy(ROOT / "transformer.py", tmp_path)
        options = {"cwd": tmp_path, "folder": tmp_path, "PYTHONIOENCODING": "ascii"}
        result = run_script("transformer.py", **options)
        summary, out = last_json(result), tmp_path / "out/transformer"
        report = json_of(tmp_path / summary["report"])
        assert len(result.stdout.strip().splitlines()[-1]) < 300
        assert report["dataset"] == "numbers"
        assert min(summary["beam"], summary["greedy"]) >= 0.99
        assert (out / "alignment.png").read_bytes()[:4] == b"\x89PNG"
        assert not list(out.glob("*.part"))
        text = "Three hundred and forty-two thousand"
        transformer.main(transformer.Settings(out=str(out), translate=text))
        row = json.loads(capsys.readouterr().out)
        assert row.pop("text") == "dreihundert zwei und vierzig tausend"
        assert -3 < row.pop("log_prob") < 0
        assert row == {"source": text, "n_tokens": 6, "finished": True}
        model, tokenizer = transformer_saved(out)
        right = []  # "zwei und vierzig" looks at "two" before it looks at "forty"
        for n in range(517_022, 517_100):
            source = tokenizer.encode(transformer.english_number(n), 32)
            target = tokenizer.encode(transformer.german_number(n), 32)
            src, tgt = torch.tensor([source]), torch.tensor([[1, *target[:-1]]])
            weights = transformer.cross_attention_weights(model, src, tgt)  # (1, H, Tt, Ts)
            looked_at = weights[0].mean(0).argmax(-1)
            right += [looked_at[-4] > looked_at[-2]] * (n % 10 > 1)  # units und tens EOS
        check_close(weights.sum(-1), torch.ones(1, 4, tgt.size(1)).double(), 1e-5)
        assert sum(right) / len(right) > 0.9


# -----------------------------------------------------------------------------
# losses.py: a table of losses and oracles drives most of the class

losses_smoothed = functools.partial(F.cross_entropy, label_smoothing=0.1)
losses_triplet = functools.partial(F.triplet_margin_loss, eps=0)


def losses_focal(z, y, gamma=2.0, alpha=None, reduction="mean"):
    kept = y != -100
    y = y.clamp(min=0)
    p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
    rows = -((1 - p) ** gamma) * p.log() * kept
    rows = rows if alpha is None else rows * alpha[y]
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]


def losses_binary_focal(z, y, gamma=2.0, alpha=0.25, reduction="mean"):
    """A sigmoid of z is a softmax over 0 and z."""
    alpha = None if alpha is None else torch.tensor([1 - alpha, alpha], dtype=z.dtype)
    return losses_focal(torch.stack((0 * z, z), 1), y.long(), gamma, alpha, reduction)


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
    e = (F.cosine_similarity(z[:, None], z, dim=-1) / temperature).exp()
    rows = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        shares = [e[i, j] / e[i, others].sum() for j in others if y[j] == y[i]]
        if shares:
            rows.append(-torch.stack(shares).log().mean())
    return torch.stack(rows).mean()


def losses_nt_xent(z1, z2):
    return losses_supcon(torch.cat((z1, z2)), torch.arange(len(z1)).repeat(2), 0.5)


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
    gaps = torch.stack([near - far for near, far in pairs])
    return (F.softplus(gaps) if margin == "soft" else F.relu(gaps + margin)).mean()


def losses_sample(kind: str, n: int) -> tuple[list, list]:
    """Inputs, and targets."""
    if kind == "logits":
        y = torch.randint(5, (n,))
        y[::4] = -100
        return [3 * torch.randn(n, 5).double()], [y]
    if kind == "labels":
        y = torch.randint(3, (n,))
        y[:4] = torch.tensor([0, 0, 1, 99])  # a triplet, and a class of one sample
        return [torch.randn(n, 3).double()], [y]
    a, b, c = torch.randn(3, n, 4).double()
    bits = [torch.arange(n) % 2]
    kinds = {"bits": ([a[:, 0]], bits), "same": ([a, b], bits)}
    return (kinds | {"two": ([a, b], []), "three": ([a, b, c], [])})[kind]


LOSSES_WEIGHT = torch.tensor([0.2, 1.0, 0.5, 2.0, 0.7]).double()
LOSSES_MINING = ("hard", "semihard", "all")


def losses_table() -> dict:
    """name: (loss, its oracle, kind of inputs)"""
    rows = [
        ("smoothing", "logits", losses.label_smoothing_cross_entropy, losses_smoothed, {}),
        ("focal", "logits", losses.focal_loss, losses_focal, {}),
        ("alpha", "logits", losses.focal_loss, losses_focal, {"alpha": LOSSES_WEIGHT}),
        ("ordinal", "logits", losses.ordinal_loss, losses_ordinal, {}),
        ("binary_focal", "bits", losses.binary_focal_loss, losses_binary_focal, {}),
        ("contrastive", "same", losses.contrastive_loss, losses_contrastive, {}),
        ("far", "same", losses.contrastive_loss, losses_contrastive, {"margin": 3.0}),
        ("info_nce", "two", losses.info_nce_loss, losses_info_nce, {}),
        ("nt_xent", "two", losses.nt_xent_loss, losses_nt_xent, {}),
        ("supcon", "labels", losses.supervised_contrastive_loss, losses_supcon, {}),
        ("triplet", "three", losses.triplet_loss, losses_triplet, {}),
        ("near", "three", losses.triplet_loss, losses_triplet, {"margin": 0.3}),
    ]
    mined = "labels", losses.batch_hard_triplet_loss, losses_mined
    for mining, margin in itertools.product(LOSSES_MINING, (0.2, 0.0, 1.5, "soft")):
        options = {"mining": mining, "margin": margin}
        rows.append((f"{mining}_{margin}", *mined, options))
    table = {}
    for name, kind, *pair, options in rows:
        table[name] = *(functools.partial(f, **options) for f in pair), kind
    return table


LOSSES = losses_table()


def losses_refuse(name: str, given, loss, *arguments, **options) -> None:
    with pytest.raises(ValueError, match=f"{name}.*" + re.escape(str(given))):
        loss(*arguments, **options)


def losses_gather_worker(rank: int, folder: str) -> None:
    """One of two processes, with half of the batch."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    batch, weights = torch.randn(2, 8, 5).double(), [*model.parameters()]
    gather = losses.gather_batch  # at first without a process group
    expected = losses.nt_xent_loss(*(gather(model(x)) for x in batch))
    wanted = torch.autograd.grad(expected, weights)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    loss = losses.nt_xent_loss(*(gather(model(x[4 * rank :][:4])) for x in batch))
    check_close(loss, expected, 1e-12)
    found = torch.autograd.grad(loss, weights)
    for gradient in found:
        torch.distributed.all_reduce(gradient.div_(2))  # the mean, as DDP does
    check_all_close(found, wanted, 1e-12)
    _, of_both = results(lambda x: (rank + 1) * gather(x), [torch.ones(2, 3)])
    each = 1 + torch.arange(12.0).view(2, 2, 3) % 7  # the gradient in results
    assert torch.equal(of_both, 3 * each[rank])  # 1 + 2: a loss a process
    assert gather(torch.tensor([rank, 7, -rank])).tolist() == [0, 7, 0, 1, 7, -1]
    losses_refuse("x", "2 to 3", gather, torch.ones(2 + rank, 3))
    Path(folder, f"rank {rank}").touch()
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort a process that ends the long way


class TestLosses:
    every_loss = pytest.mark.parametrize("name", LOSSES)
    on_logits = pytest.mark.parametrize("name", ["smoothing", "focal", "alpha", "ordinal"])
    reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

    @every_loss
    def test_loss_equals_its_oracle(self, name):
        """Values, gradients, other orders, gradcheck, its inputs' device."""
        loss, oracle, kind = LOSSES[name]
        for n in (6, 9, 12) if kind == "labels" else (2, 7, 12):
            inputs, targets = losses_sample(kind, n)
            found = results(loss, inputs, *targets)
            check_all_close(found, results(oracle, inputs, *targets), 1e-10)
            order = torch.randperm(n)
            expected = [found[0], *(x[order] for x in found[1:])]
            given = [x[order] for x in inputs], *(y[order] for y in targets)
            check_all_close(results(loss, *given), expected, 1e-12)
        leaves = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: loss(*x, *targets), leaves, atol=1e-7)
        with torch.device("meta"):
            assert loss(*inputs, *targets).device.type == "cpu"

    @reductions
    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_smoothing_cross_entropy_equals_torch(self, weighted, reduction):
        sizes = ((17,), 5, -1), ((3, 4), 2, -1), ((2, 3, 2), 7, 0), ((4,), 1, -1)
        for smoothing, (shape, k, ignored) in itertools.product((0.0, 0.7), sizes):
            logits = 3 * torch.randn(shape[0], k, *shape[1:]).double()
            y = torch.randint(k, shape)
            y.view(-1)[0] = k - 1
            y.view(-1)[1::4] = ignored  # 0, a class, too: a pad id
            weight = torch.rand(k).double() if weighted else None
            given = y, smoothing, ignored, weight, reduction
            found = results(losses.label_smoothing_cross_entropy, [logits], *given)
            given = y, weight, None, ignored, None, reduction, smoothing
            check_all_close(found, results(F.cross_entropy, [logits], *given), 1e-10)

    @reductions
    def test_focal_losses_equal_their_formulas(self, reduction):
        (z,), (y,) = losses_sample("logits", 17)
        for gamma, alpha in itertools.product((0.0, 0.5, 3.5), (None, LOSSES_WEIGHT)):
            found = results(losses.focal_loss, [z], y, gamma, alpha, -100, reduction)
            wanted = results(losses_focal, [z], y, gamma, alpha, reduction)
            check_all_close(found, wanted, 1e-10)
        z, y = torch.randn(6, 4).double(), torch.randint(2, (6, 4))
        kinds = (torch.int64, torch.bool, torch.float64, torch.uint16)
        options = ((2.0, 0.25), (0.5, 0.9), (1.0, None), (0.0, 0.0))
        for dtype, (gamma, alpha) in zip(kinds, options, strict=True):
            given = y.to(dtype), gamma, alpha, reduction
            found = results(losses.binary_focal_loss, [z], *given)
            check_all_close(found, results(losses_binary_focal, [z], *given), 1e-10)

    @every_loss
    def test_loss_in_half_precision_and_at_extremes(self, name):
        """Half precision is computed in float32, under autocast, too."""
        loss, _, kind = LOSSES[name]
        inputs, targets = losses_sample(kind, 30)
        for dtype in (torch.float16, torch.bfloat16):
            given = [(100 * x).to(dtype) for x in inputs]
            wide = [x.float() for x in given]
            value, *gradients = results(loss, given, *targets)
            assert all(x.dtype == dtype and x.isfinite().all() for x in gradients)
            check_close(value, loss(*wide, *targets), 1e-6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                check_close(loss(*wide, *targets), value, 1e-6)
        near = [(100 + 1e-4 * x).float() for x in inputs]  # products lose that
        expected = loss(*(x.double() for x in near), *targets)
        check_close(loss(*near, *targets).double(), expected, 1e-4)
        for x in inputs:
            x[:3] = 1e4 * x[:3].sign()
            x[3:6] *= 1e-20
            x[6:10] = 0.0
        for dtype in (torch.float64, torch.float32):
            found = results(loss, [x.to(dtype) for x in inputs], *targets)
            assert all(x.isfinite().all() and x.dtype == dtype for x in found)
            if "semihard" not in name:  # rounding decides which triplets exist
                check_close(found[0].double(), loss(*inputs, *targets), 1e-6)

    @on_logits
    def test_loss_ignored_rows_change_nothing(self, name):
        loss = LOSSES[name][0]
        logits, y = 3 * torch.randn(17, 5).double(), torch.arange(17) % 5
        value, gradient = results(loss, [logits], y)
        ignored = F.pad(y, (0, 2), value=-100)
        for junk in (0.0, 1e4, math.inf, math.nan):
            more = F.pad(logits, (0, 0, 0, 2), value=junk)
            found = results(loss, [more], ignored)
            check_all_close(found, [value, F.pad(gradient, (0, 0, 0, 2))], 0.0)
        rows = loss(more, ignored, reduction="none")
        assert rows.shape == (19,) and (rows[-2:] == 0).all()
        for other in (-1, 3, 99):  # the caller's choice, a class's id too
            marked = y.masked_fill(y == 3, other)
            expected = loss(logits[y != 3], y[y != 3])
            check_close(loss(logits, marked, ignore_index=other), expected, 1e-12)
        volume = logits[:16].view(2, 8, 5).mT, y[:16].view(2, 8)
        check_close(loss(*volume, reduction="none"), rows[:16].view(2, 8), 1e-12)
        for dtype in (torch.uint8, torch.uint16, torch.int32):
            assert torch.equal(loss(logits, y.to(dtype)), value)

    @on_logits
    def test_loss_over_no_rows_and_of_certainty_is_0(self, name):
        """And of weight 0. Certain: all logits but the target's are -inf."""
        loss = LOSSES[name][0]
        cases = [(torch.full((n, 5), math.nan), torch.full((n,), -100)) for n in (0, 4)]
        cases.append((torch.eye(5).log(), torch.arange(5)))
        if name == "smoothing":
            weight = torch.tensor([0.0, 1, 1, 1, 1])
            loss = functools.partial(loss, smoothing=0.0, weight=weight)
            cases.append((torch.randn(4, 5), torch.zeros(4).long()))
        for (logits, y), reduction in itertools.product(cases, ("mean", "sum")):
            reduced = functools.partial(loss, reduction=reduction)
            assert not any(x.any() for x in results(reduced, [logits], y))

    @pytest.mark.parametrize("name", ["supcon", "hard_0.2", "semihard_0.2", "all_soft"])
    def test_loss_without_pairs_or_triplets_is_0(self, name):
        loss, z = LOSSES[name][0], torch.randn(4, 3)
        cases = (z, [0, 1, 2, 3]), (z, [0, 0, 0, 0]), (0 * z, [0, 0, 1, 1])
        n = {"supcon": 1, "semihard_0.2": 3}.get(name, 2)  # semihard: no negative is farther
        for z, y in cases[:n]:
            assert not any(x.any() for x in results(loss, [z], torch.tensor(y)))
            assert loss(z, torch.tensor(y).to(torch.uint16)) == 0

    @pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
    def test_focal_losses_at_p_1_have_finite_gradients(self, gamma):
        """p rounds to 1 from a logit gap of 37 (float64), 17 (float32)."""
        focal, binary = losses.focal_loss, losses.binary_focal_loss
        gaps, y = torch.tensor([0, 5, 17, 40, 1e3, 1e4] * 2), torch.arange(12) // 6
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            z = gaps.to(dtype)
            found = results(focal, [F.pad(z[:, None], (0, 1))], y, gamma)
            found += results(binary, [z], y, gamma)
            assert all(x.isfinite().all() for x in found)
        z, y = torch.tensor([[30.0, 0.0]]).double(), torch.tensor([0])
        expected = math.exp(-30 * gamma) * F.cross_entropy(z, y)
        assert focal(z, y, gamma) / expected == pytest.approx(1, abs=1e-6)

    def test_has_collapsed_where_the_loss_is_the_margin(self):
        point, y = torch.randn(1, 5).expand(8, 5), torch.arange(8) % 2
        mined = losses.batch_hard_triplet_loss
        found = mined(point, y), mined(point, y, 0.3, "all"), mined(point, y, "soft")
        found = *found, losses.triplet_loss(point, point, point, "soft")
        assert torch.stack(found).tolist() == pytest.approx([0.2, 0.3, 0.6931472, 0.6931472])
        spread, collapsed = torch.randn(8, 5), losses.has_collapsed
        spread = spread / torch.pdist(spread).mean()
        assert collapsed(point) and collapsed(torch.zeros(2, 2).bfloat16())
        assert collapsed(0.009 * spread) and not collapsed(0.011 * spread)
        assert collapsed(0.4 * spread, 0.5) and not collapsed(0.6 * spread, 0.5)

    def test_check_loss_refutes(self):
        """Each bug fails its claims, and no other."""
        y = torch.arange(5).repeat(4)
        best = 50.0 * F.one_hot(y, 5)
        loss = functools.partial(losses.ordinal_loss, targets=y)
        check, start = losses.check_loss, loss(0 * best)
        for bug, expected in (
            (loss, []),
            (lambda z: loss(z) - 5, ["negative", "0 at best", "scale"]),
            (lambda z: 8 * loss(z) + 0.007, ["0 at best"]),
            (lambda z: 8 * loss(z) + 0.002, []),
            (lambda z: losses.ordinal_loss(z, 4 - y), ["0 at best", "downhill"]),
            (lambda z: loss(z) * loss(z).detach(), ["gradcheck"]),
            (lambda z: 2 * loss(z).detach() - loss(z), ["small step", "downhill", "gradcheck"]),
            (lambda z: 10.5 / start * loss(z), ["scale"]),
            (lambda z: 0.15 / start * loss(z), []),
            (lambda z: 0.08 / start * loss(z), ["scale"]),
            (lambda z: losses_ordinal(z, y), ["float64", "float32", "float16", "bfloat16"]),
        ):
            holds = check(bug, 0 * best, best)
            failed = [claim for claim, held in holds.items() if not held]
            for claim, word in zip(failed, expected, strict=True):
                assert word in claim
        other = functools.partial(F.cross_entropy, target=y)
        limits = {"same": (loss, loss, best / 30), "other": (loss, other, best / 30)}
        holds = check(loss, 0 * best, best, limits)
        assert holds["limit: same"] is True and holds["limit: other"] is False
        y = torch.arange(12) % 3  # embeddings
        best, loss = F.one_hot(y, 3), functools.partial(losses.batch_hard_triplet_loss, labels=y)
        assert all(check(loss, torch.randn(12, 3), best).values())
        collapsed = check(loss, torch.randn(12, 3), 0 * best)
        assert not collapsed["lower bound: about 0 at best"]

    def test_losses_refuse_what_would_be_silently_wrong(self):
        z, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
        bits, one, nan, inf = y.clamp(max=1), z[:1], math.nan, math.inf
        smoothing, focal = losses.label_smoothing_cross_entropy, losses.focal_loss
        binary, mined = losses.binary_focal_loss, losses.batch_hard_triplet_loss
        contrastive, triplet = losses.contrastive_loss, losses.triplet_loss
        balanced, refuse = losses.class_balanced_weights, losses_refuse
        for loss in (smoothing, focal, losses.ordinal_loss):
            refuse("targets", 3, loss, z, y + 1)
            refuse("targets", -1, loss, z, y - 1)
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
            refuse("beta", bad, balanced, [1, 1], bad)
        refuse("targets", 2, binary, z[:, 0], y)
        refuse("targets", (6,), binary, z[:, :1], bits)
        for bad in (0.0, -1.0, nan, inf):
            refuse("temperature", bad, losses.info_nce_loss, z, z, bad)
        for a, b in ((one, one), (z, z[:5]), (z[0], z[0])):
            refuse("z1, z2", tuple(b.shape), losses.nt_xent_loss, a, b)
            refuse("query, keys", tuple(b.shape), losses.info_nce_loss, a, b)
        for loss in (losses.supervised_contrastive_loss, mined):
            refuse("labels", (1,), loss, z, y[:1])
            refuse("labels", torch.float32, loss, z, y.float())
            refuse("z", (1, 6, 3), loss, z[None], y)
            refuse("z", (1, 3), loss, one, y[:1])
        assert contrastive(one, one, bits[:1]) / 0.5 == triplet(one, one, one) == 1
        refuse("anchor", (0, 3), triplet, z[:0], z[:0], z[:0])
        refuse("same", (6, 1), contrastive, z, z, bits[:, None])
        refuse("mining", "easy", mined, z, y, mining="easy")
        refuse("z", (1, 3), losses.has_collapsed, one)
        w = torch.ones(3, requires_grad=True)
        for bad in ([3, 0], [], [[2, 2]], 3):
            refuse("counts", bad, balanced, torch.tensor(bad))
        for n in (3, 1):
            refuse("losses", (n,), losses.UncertaintyWeighting(2), w[:n])
            refuse("losses", (n,), losses.GradNorm(2), w[:n], w)
        refuse("losses", 0, losses.GradNorm(3), w * 0, w)
        refuse("name", "lion", losses.make_optimizers, "lion", [w], [], 0.1, 0.1)
        refuse("n_seeds", 1, losses.main, losses.Settings(n_seeds=1))

    def test_class_balanced_weights_by_hand(self):
        counts, balanced = torch.tensor([1000, 50, 1.0]).double(), losses.class_balanced_weights
        for beta in (0.0, 0.9, 0.999, 1 - 1e-9, 1.0):
            effective = [sum(beta**j for j in range(n)) for n in (1000, 50, 1)]
            shares = 1 / torch.tensor(effective, dtype=torch.float64)
            expected = 3 * shares / shares.sum()
            check_close(balanced(counts, beta), expected, 1e-10)
        for given in ([1000, 50, 1], counts.to(torch.uint16)):
            check_close(balanced(given, 1.0), expected.float(), 1e-6)

    def test_uncertainty_weighting_reaches_the_analytic_optimum(self):
        """At s_i = log L_i, every task pulls with weight 1 / (2 L_i)."""
        weighting = losses.UncertaintyWeighting(2).double()
        tasks = torch.tensor([1.25, 125.0]).double()
        assert weighting(tasks) == 126.25 / 2  # s = 0: half the sum
        weighting.log_variances.data = tasks.log()
        total, of_tasks = results(weighting, [tasks])
        assert total.item() == pytest.approx(1 + math.log(1.25 * 125) / 2)
        check_close(of_tasks, 0.5 / tasks, 1e-12)
        weighting(tasks).backward()
        check_close(weighting.log_variances.grad, 0 * tasks, 1e-12)

    def test_gradnorm_by_hand(self):
        """Gradient norms 3 and 4: d w_i / d s_j = w_i (delta_ij - w_j / 2)."""
        w = torch.ones(2).double().requires_grad_()
        tasks = torch.stack((3 * w[0], 4 * w[1]))
        half_way = tasks - torch.tensor([1.5, 0.0])
        gradnorm = losses.GradNorm(2).double()
        assert gradnorm.alpha == 1.5
        for later, alpha, weights, total, of_weights in (
            (tasks, 1.5, (1, 1), 7.0, -3.5),  # G = 3, 4, targets 3.5: -1.5 - 2
            (half_way, 1.5, (1, 1), 5.5, 3.5),  # r = 2/3, 4/3: targets 1.9, 5.4
            (half_way, 0.0, (1, 1), 5.5, -3.5),  # progress plays no part
            (half_way, 1.0, (1.5, 0.5), 4.25, 2.625),  # targets 2.2, 4.3
        ):
            gradnorm.alpha = alpha
            gradnorm.log_weights.data = torch.tensor(weights).double().log()
            value = gradnorm(later, w)
            assert value.item() == pytest.approx(total)
            of_w, of_s = torch.autograd.grad(value, (w, gradnorm.log_weights), retain_graph=True)
            assert of_w.tolist() == pytest.approx([3 * weights[0], 4 * weights[1]])
            assert of_s.tolist() == pytest.approx([of_weights, -of_weights])
        with torch.no_grad():  # in validation: the weighted sum alone
            assert gradnorm(2 * w, w).item() == pytest.approx(4.0)

    def test_gradnorm_of_losses_that_reached_0_and_of_several_weights(self):
        for n in (1, 2):
            gradnorm, w = losses.GradNorm(n), torch.ones(n, requires_grad=True)
            gradnorm(0.5 * w, w)
            for later in (torch.zeros(n), -torch.ones(n), torch.arange(n)):
                total = gradnorm(later * w, w)
                gradient = torch.autograd.grad(total, gradnorm.log_weights)[0]
                assert total == later.sum() and gradient.isfinite().all()
            copied = losses.GradNorm(n)
            copied.load_state_dict(gradnorm.state_dict())
            copied(3 * w, w)
            assert copied.first_losses.tolist() == [0.5] * n
        a, b = (torch.ones(1).double().requires_grad_() for _ in range(2))
        tasks = torch.cat((3 * a + 4 * b, 10 * a))  # norms 5 and 10
        for shared in ([a, b], iter([b, a])):
            gradnorm = losses.GradNorm(2).double()
            gradnorm(tasks, shared).backward(retain_graph=True)
            found = gradnorm.log_weights.grad.tolist()
            assert found == pytest.approx([-7.5, 7.5])  # -5 / 2 - 10 / 2

    def test_gather_batch_nt_xent_on_two_processes_is_one(self, tmp_path):
        torch.multiprocessing.spawn(losses_gather_worker, args=(str(tmp_path),), nprocs=2)
        assert len(list(tmp_path.glob("rank *"))) == 2

    @pytest.mark.parametrize("name", ["adamw", "muon", "adam", "sgd"])
    def test_parameter_groups_of_make_optimizers_decay(self, name):
        """AdamW and Muon shrink by lr * decay; Adam and SGD step along decay * w."""
        shapes = ((3, 3), (2, 3), (2, 3, 2), (3,), ())
        parameters = [nn.Parameter(torch.full(shape, 2.0)) for shape in shapes]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        hidden, *others = parameters
        others.append(nn.Parameter(torch.ones(3, 3), requires_grad=False))
        optimizers = losses.make_optimizers(name, iter([hidden]), iter(others), 0.1, 0.1)
        for optimizer in optimizers:
            optimizer.step()
        for p in parameters:
            expected = 2.0 if p.dim() < 2 else 1.9 if name == "adam" else 1.98
            check_close(p.detach(), torch.full_like(p, expected), 1e-4)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert sum(len(group["params"]) for group in groups) == 5  # none is frozen
        kinds = [type(optimizer).__name__.lower() for optimizer in optimizers]
        assert kinds == (["muon", "adamw"] if name == "muon" else [name])
        assert name != "sgd" or groups[0]["momentum"] == 0.9
        assert name != "muon" or groups[0]["adjust_lr_fn"] == "match_rms_adamw"

    def test_warmup_cosine_by_hand(self):
        factors = [losses.warmup_cosine(step, 2, 5) for step in range(7)]
        assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.25, 0, 0])
        assert [losses.warmup_cosine(step, 9, 2) for step in range(3)] == [0.5, 1.0, 0.0]

    def test_calibration_error_and_best_temperature_by_hand(self):
        p = torch.tensor([[0.95, 0.05], [0.91, 0.09], [0.4, 0.6], [0.62, 0.38], [1.0, 0.0]])
        # of 15 bins: 0.95 and 1.0 share the last, 0.6 and 0.62 another
        expected = 0.4 * 0.11 + 0.4 * (1 - 0.975) + 0.2 * 0.91
        found = losses.calibration_error(p, torch.tensor([0, 1, 1, 1, 0]))
        assert found == pytest.approx(expected, abs=1e-6)
        truth = torch.randn(20_000, 4)
        drawn = truth.softmax(1).multinomial(1)[:, 0]
        assert losses.best_temperature(3 * truth, drawn) == pytest.approx(3, rel=0.1)

    def test_digits_parts_share_no_image(self):
        sets = losses.digits(losses.Settings(n_seeds=3), 957, 240)
        for data in sets:
            assert [len(y) for _, y in data.values()] == [957, 240, 600]
            assert len(torch.cat([x for x, _ in data.values()]).unique(dim=0)) == 1797
            assert torch.equal(data["test"][0], sets[0]["test"][0])
        assert not torch.equal(sets[0]["train"][1], sets[1]["train"][1])

    def test_judge_by_hand(self):
        """A constant difference of noisy rows is found, noise is not."""
        values = {"base": [0.5, 0.9, 0.1, 0.7, 0.3], "up": [0.61, 1.0, 0.2, 0.79, 0.4]}
        values["noise"] = [0.6, 0.8, 0.2, 0.6, 0.4]
        rows = {name: {"values": {"accuracy": x, "NLL": x}} for name, x in values.items()}
        sentence = losses.judge(rows)
        assert "up" in sentence and "noise" not in sentence
        mean, error, verdict = rows["up"]["difference"]["accuracy"]
        assert mean == pytest.approx(0.1) and verdict == "better"
        assert error == pytest.approx(0.0070711 / 5**0.5, abs=1e-6)
        assert rows["up"]["difference"]["NLL"][2] == "worse"

    def test_tune_takes_the_rate_that_is_best_on_dev(self):
        """On average. The test counts for nothing; an edge is told."""
        s = losses.Settings(n_seeds=2)
        dev = {0.1: (0.0, 0.2), 0.2: (1.0, 0.3), 0.3: (0.2, 0.9)}

        def evaluate(lr, k, part):
            return {"score": dev[lr][k] if part == "dev" else 10 * lr}

        for rates in ((0.1, 0.2, 0.3), (0.2, 0.3), (0.1, 0.2)):
            models, row = losses.tune(lambda lr, k: lr, evaluate, "score", s, rates)
            assert models == [0.2, 0.2] and row["rate"] == 0.2
            assert row["at_edge"] == (len(rates) == 2)
            assert row["values"]["score"] == [2, 2] and row["dev"][0.2]["score"] == 0.65

    @pytest.mark.parametrize("name", "smoothing imbalance embeddings tasks optimizers".split())
    def test_demo_learning_rate_comes_from_dev_alone(self, name, monkeypatch):
        """Nonsense as test labels changes the values alone."""
        digits, s = losses.digits, losses.Settings(n_seeds=2, steps=4)
        demo = getattr(losses, f"demo_{name}")
        honest = demo(s)
        found = {str(row["dev"]) for row in honest.values()}
        assert name != "optimizers" or len(found) == 8  # schedules do something

        def with_nonsense(*arguments):
            sets = digits(*arguments)
            for data in sets:
                data["test"] = data["test"][0], (data["test"][1] + 1) % 10
            return sets

        monkeypatch.setattr(losses, "digits", with_nonsense)
        for row, other in zip(honest.values(), demo(s).values(), strict=True):
            assert row["rate"] == other["rate"] and row["dev"] == other["dev"]
            assert row["values"] != other["values"]

    def test_demo_script(self, tmp_path):
        flags = "--steps 2 --n-seeds 2 --out here".split()
        result = run_script("losses.py", *flags, cwd=tmp_path, PYTHONIOENCODING="ascii")
        summary = last_json(result)
        assert len(result.stdout.strip().splitlines()[-1]) < 300
        report = json_of(tmp_path / summary["report"])
        assert all(report["checklist"].values()) and len(report["checklist"]) == 11
        rows = [row for table in report["tables"].values() for row in table.values()]
        assert len(re.findall("NaN|Infinity", json.dumps(report))) == 0
        assert summary["rates_on_an_edge"] == sum(row["at_edge"] for row in rows)
        assert (tmp_path / "here/losses.png").read_bytes()[:4] == b"\x89PNG"


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
        """of_rank: more arguments for a rank; None: it never starts. code: what each rank runs."""
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


# 150 rows to learn: an epoch ends within a run; and 3 to look at: fewer than ranks. code = WHOLE
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
# Parameters' rows divide neither by 4 nor all by 2, batches neither: every slice and part is uneven.
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
    """As a plain loop: the weights, the steps' losses and the held-out one. n_steps: of all rows."""
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
    """Torchrun and its workers, as if their machine lost power."""
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
        """bf16 and scaled fp16 stay near float32; clipping scaled gradients wouldn't."""
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
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
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
        """With torch's "eager" backend; going on without --compile gives the same."""
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
        """A block that computes is whole, the others sliced; the whole model is never made."""
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
rows = torch.randint(256, (128, 8), generator=torch.Generator().manual_seed(0))
loss = script.F.cross_entropy(reference(rows).flatten(0, 1), rows.flatten()).item()
assert abs(script.evaluate(model, (rows, rows), p) - loss) < 1e-3

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
        """An unfused AdamW's state goes into a fused one, and back; at first it may be empty."""
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
        """Saved on 2, loaded on 1, 2, 4, 2 x 2 and without a group: weights, moments, step counts."""
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
        """Any damage is said once, and the checkpoint before is taken, if there is one."""
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
            for n_lines in (1, 0):
                path, manifest = train_fsdp.newest_checkpoint(out)
                assert path == before and manifest["step"] == 10
                assert len(capsys.readouterr().err.splitlines()) == n_lines
            (before / ".metadata").write_bytes(b"")
            assert train_fsdp.newest_checkpoint(out) == (None, None)
            capsys.readouterr()
        part = shutil.copytree(saved(sharded)[0], out / "step_00000005.part")
        # Damaged ones don't count.
        assert train_fsdp.publish(part, {}, 1).exists()
        part = shutil.copytree(saved(sharded)[0], part)
        (part / "__1_0.distcp").unlink()
        with pytest.raises(OSError, match="__1_0.distcp"):  # on another machine's disk
            train_fsdp.publish(part, {}, 3)

    def test_main_refuses_in_one_line(self, trainer, tmp_path):
        """One of two says it (both, where they haven't met), also of ranks that differ."""
        (tmp_path / "file").write_text("not a folder")
        refused = {"lr": "--lr nan", "file": "", "amp bf16 needs": "--amp bf16 --dtype float64"}
        if trainer.module == "train_ddp":
            refused |= {"data_parallel": "--data-parallel --amp bf16"}
            refused |= {"compiled": "--data-parallel --compile", "torchrun": "--data-parallel"}
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
            module.check_settings(module.Settings(**{"n_heads": 1, name: least}), alone)
            with pytest.raises(ValueError, match=name):
                module.check_settings(module.Settings(**{name: least - 1}), alone)
        module.check_settings(module.Settings(batch_size=6, accumulate=3, seed=2**32 - 1), two)
        for wrong in ({"batch_size": 5, "accumulate": 3}, {"seed": 2**32}, {"d_model": 30}):
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
        """In torchrun's store, where the addresses of those that have ended still stand."""
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
        """Other settings, another version's checkpoint, the other script's run."""
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
        assert report["tokens_per_second"] == round(report["tokens"] / report["train_seconds"]) > 9
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
        """An inf gradient is neither applied nor saved; fp16 skips that step."""
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

    def test_on_rank_0_may_take_longer_than_the_timeout(self, trainer, tmp_path):
        """A slow disk kills no job, whichever rank writes."""
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
        """No file above 10 kB can be written: the older checkpoint stays, no half one does."""
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
        out, rng, kills = tmp_path / f"killed_{KILL_SEED}", random.Random(KILL_SEED), 0
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
                trainer.wait_until(lambda b=before: newest_step(out) != b or (out / "report.json").exists())
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


class TestTrainingProcesses:
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
        before = [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_DFL]  # as a shell's background job has them
        given = list(map(signal.signal, numbers, before))
        signals = module.Signals(module.Processes(0, 2, CPU))
        for number in numbers:
            signal.raise_signal(number)
        assert all(signal.getsignal(number) == signals.note for number in numbers), "also a second one"
        assert signals.received() and signals.noted == numbers
        signals.restore()
        assert [signal.getsignal(number) for number in numbers] == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        alone = module.Signals(module.Processes(0, 1, CPU))
        signal.raise_signal(signal.SIGHUP)
        assert not alone.received()
        signal.raise_signal(signal.SIGTERM)  # a second one would end it at once:
        assert alone.received() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        alone.restore()
        list(map(signal.signal, numbers, given))

    def test_signals_orphans_leave(self, trainer, tmp_path):
        """Their torchrun (here a process between) is killed; the same command goes on."""
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
        """A second start on one OUT waits, then says so; the first one's work stays."""
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

EXPORTS = {  # the function, the file that it writes, further arguments
    "export_torchscript": (export.export_torchscript, "trace.ts"),
    "script": (export.export_torchscript, "script.ts", "script"),
    "export_program": (export.export_program, "program.pt2"),
    "export_onnx": (export.export_onnx, "model.onnx"),
}


def exported(name, model, example, folder):
    """The path of what one of EXPORTS wrote."""
    function, file, *method = EXPORTS[name]
    return function(model, example, folder / file, *method)


def token_ids(b, t):
    """(B, T) below 50, with a tail of padding, and (in a batch) a row of padding alone."""
    tokens = torch.randint(1, 50, (b, t))
    tokens[:, max(1, t - t // 4) :] = 0
    tokens[1:2] = 0
    return tokens


@torch.no_grad()
def check_export(path, model, tolerance=1e-5):
    """Equal to the model on sizes that the exporter hasn't seen; 224 is max_len."""
    run, model = export.load_artefact(path), copy.deepcopy(model).eval()
    for b, t in ((1, 1), (1, 199), (7, 5), (33, 64), (2, 224)):
        tokens = token_ids(b, t)
        check_close(run(tokens), model(tokens), tolerance, f"{b} x {t}")


def read_onnx(path):
    """An ONNX file's kinds of operators, its weights by name, and its int8 matrices."""
    import onnx

    graph = onnx.load(path).graph
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    int8 = {name: w for name, w in weights.items() if w.dtype == np.int8 and w.ndim == 2}
    return collections.Counter(node.op_type for node in graph.node), weights, int8


@torch.enable_grad()
def derivative(model, linear, n, examples):
    """|dloss/dgate| for a gate of 1 on each of n heads, mean over examples."""
    weight = model.get_submodule(linear).weight.detach()
    model, total = copy.deepcopy(model).eval(), torch.zeros(n)
    for x, label in examples:
        gate = torch.ones(n, requires_grad=True)
        gated = weight * gate.repeat_interleave(weight.size(1) // n)
        output = torch.func.functional_call(model, {f"{linear}.weight": gated}, x[None])
        loss = F.cross_entropy(output, label[None])
        total += torch.autograd.grad(loss, gate)[0].abs()
    return total / len(examples)


class ExportModule(nn.Module):
    """A function with parameters of its own, as a module."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(parts)

    def forward(self, x, y=None):
        return self.function(self.parts, x) if y is None else self.function(self.parts, x, y)


def torchs_module(name):
    """torch's own modules as people use them, of tokens (B, T)."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    inner = {
        "bag": nn.EmbeddingBag(50, 16),
        "lstm": nn.LSTM(16, 16, batch_first=True),
        "attention": nn.MultiheadAttention(16, 2, batch_first=True),
        "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "nested": nn.TransformerEncoder(layer, 2),
    }[name]

    def forward(m, tokens):
        x = m.embedding(tokens)
        padding = (tokens == 0) & (torch.arange(tokens.size(1)) > 0)  # of all: NaN in torch
        if name == "bag":
            return m.inner(tokens)
        if name == "lstm":
            return m.inner(x)[0]
        if name == "attention":
            y = m.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        else:
            y = m.inner(x, src_key_padding_mask=padding)
        return y.masked_fill(padding[:, :, None], 0.0)

    return ExportModule(forward, embedding=nn.Embedding(50, 16), inner=inner)


# Reads nothing but the demo's artefacts: python -I has no PYTHONPATH.
EXPORT_FRESH = """
import json, sys
import numpy as np, onnxruntime, torch
folder, *sentences = sys.argv[1:]
file = f"{folder}/original.int8.onnx"
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
words = json.loads(session.get_modelmeta().custom_metadata_map["words"])
ids = [[words.index(word) for word in sentence.split()] for sentence in sentences]
tokens = np.array([row + [0] * (9 - len(row)) for row in ids])
answers = session.run(None, {"tokens": tokens})
tokens = torch.from_numpy(tokens)
with torch.no_grad():
    answers.append(torch.jit.load(f"{folder}/original.trace.ts")(tokens))
    answers.append(torch.export.load(f"{folder}/original.pt2").module()(tokens))
print(json.dumps([logits.tolist() for logits in answers]))
"""


class TestExport:
    LAYERS = "encoder.layers.0", "encoder.layers.1"

    @pytest.fixture(scope="class")
    def model(self):
        """encoder.py's classifier, with random weights and dropout left on."""
        torch.manual_seed(1)
        sizes = {"d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 32}
        config = encoder.EncoderConfig(50, 224, pool="mean+max", **sizes)
        return encoder.EncoderClassifier(config)

    @pytest.fixture(scope="class")
    def onnx_file(self, model, tmp_path_factory):
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        metadata = {"labels": ["negative", "positive"], "note": "gut, süß"}
        return export.export_onnx(model, token_ids(2, 9), path, metadata=metadata)

    # ---- formats
    @pytest.mark.parametrize("name", EXPORTS)
    def test_exports_equal_the_model_at_other_sizes(self, model, name, tmp_path):
        path = exported(name, model.train(), token_ids(3, 20), tmp_path)
        check_export(path, model)
        assert all(module.training for module in model.modules())
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
    def test_attention_for_onnx_is_torchs(self, dtype, tolerance):
        """Masks are booleans or added; a query that may attend to nothing gets 0."""
        q, k, v = (torch.randn(3, 4, t, 8).to(dtype) for t in (5, 7, 7))
        keys = torch.arange(3).view(3, 1, 1, 1) > torch.arange(7)  # (B, 1, 1, Tk)
        rows = (torch.rand(5, 7) < 0.5) & (torch.arange(5) > 0)[:, None]
        added = torch.where(rows, torch.arange(7) / 3, -math.inf).to(dtype)
        ours, theirs = export.attention_for_onnx, F.scaled_dot_product_attention
        for mask in (None, keys, rows, added):
            for scale in (None, 0.7, -0.7):
                y = ours(q, k, v, mask, scale=scale)
                check_close(y, theirs(q, k, v, mask, scale=scale), tolerance)
        check_close(*(function(q, k, v, keys, 0.0, True) for function in (ours, theirs)), tolerance)
        shared = q, k[:, :2], v[:, :2, :, :3]
        for rest in ((None, 0.0, True), (rows,)):
            y = ours(*shared, *rest, enable_gqa=True)
            check_close(y, theirs(*shared, *rest, enable_gqa=True), tolerance)

    def test_export_onnx_has_torchs_masks_and_two_lengths(self, tmp_path):
        """Of a row of padding alone, too, where a query may attend to nothing."""

        def attend(m, x, y):
            x, keys = m.embedding(x), m.embedding(y)
            return F.scaled_dot_product_attention(x, keys, keys, (y > 0)[:, None])

        model = ExportModule(attend, embedding=nn.Embedding(50, 8))
        example = token_ids(3, 5), token_ids(3, 4)
        run = export.load_artefact(exported("export_onnx", model, example, tmp_path))
        for b, q, k in ((1, 1, 1), (2, 7, 3), (5, 3, 9)):
            x, y = token_ids(b, q), token_ids(b, k)
            check_close(run(x, y), model(x, y).detach(), 1e-6, f"{b}, {q} x {k}")

    @pytest.mark.parametrize("module,right,refused", [
        ("attention", "export_program", None),
        ("encoder", "export_onnx", None),
        ("nested", "export_program", "export_torchscript"),
        ("lstm", "export_torchscript", "export_program"),
        ("bag", "export_onnx", "export_program"),
    ])  # fmt: skip
    def test_exports_of_torchs_modules(self, module, right, refused, tmp_path):
        model, example = torchs_module(module), token_ids(3, 9)
        if refused:
            with pytest.raises(ValueError, match="ExportModule"):
                exported(refused, model, example, tmp_path)
        assert not list(tmp_path.iterdir())
        check_export(exported(right, model, example, tmp_path), model)

    def test_export_onnx_is_one_file_that_says_what_it_is(self, onnx_file):
        import onnx
        import onnxruntime

        assert os.listdir(onnx_file.parent) == ["model.onnx"]
        session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
        (tokens,), (output,) = session.get_inputs(), session.get_outputs()
        assert (tokens.name, tokens.shape) == ("tokens", ["batch", "length"])
        assert (output.name, output.shape) == ("output", ["batch", 2])
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["labels"]) == ["negative", "positive"]
        onnx.checker.check_model(onnx.load(onnx_file), full_check=True)
        assert str(ROOT).encode() not in onnx_file.read_bytes()  # no paths of this machine

    def test_exports_take_dynamic_shapes(self, tmp_path):
        model = ExportModule(lambda m, x, y: m.linear(x) * y[:, None], linear=nn.Linear(6, 4))
        batch = torch.export.Dim("n", min=2, max=9)
        shapes = {"x": {0: batch}, "y": {0: batch}}
        x, y = torch.randn(9, 6), torch.randn(9)
        for write, file in ((export.export_onnx, "a.onnx"), (export.export_program, "a.pt2")):
            run = export.load_artefact(write(model, (x[:3], y[:3]), tmp_path / file, shapes))
            check_close(run(x, y), model(x, y), 1e-6)
        with pytest.raises(Exception, match="9"):
            run(torch.ones(10, 6), torch.ones(10))

    def test_free_sizes_are_the_batch_and_lengths(self):
        ids, batch = torch.zeros(3, 5).long(), {0: "batch"}
        assert export.free_sizes((torch.tensor(1.0), ids)) == ({}, {0: "batch", 1: "length_1"})
        for other, free in (
            (ids[:, :4] > 0, batch | {1: "length_1"}),
            (torch.zeros(3, 5, 6), batch | {1: "length_1"}),
            (torch.zeros(3, 6), batch),
            (torch.zeros(3, 2, 2).long(), batch),
            (torch.zeros(7), {}),
            (torch.zeros(1, 5), {}),
        ):
            assert export.free_sizes((ids, other)) == ({0: "batch", 1: "length"}, free)

    @pytest.mark.parametrize("name", ["export_torchscript", "export_onnx"])
    def test_exports_take_what_users_have(self, name, tmp_path):
        """Outputs of -inf, large ones, several; a row beside a batch, a scalar."""
        several = ExportModule(lambda m, x, y: (x + y, x > 0), unused=nn.Linear(1, 1))
        x, row = torch.randn(4, 3), torch.tensor([[0.0, -math.inf, 0.0]])
        for inputs in ((x.clone().requires_grad_(), row), [x, torch.tensor(2.0)]):
            run = export.load_artefact(exported(name, several, inputs, tmp_path))
            total, positive = run(torch.ones(7, 3), inputs[1])
            assert torch.equal(total, 1 + inputs[1].expand(7, 3)) and positive.all()
        large = nn.Linear(512, 300)
        nn.init.normal_(large.weight, 0, 1e7)
        x = torch.randn(5, 512)
        example = x[: 2 if "onnx" in name else 1]
        run = export.load_artefact(exported(name, large, example, tmp_path))
        check_close(run(x), large(x).detach(), 1e-5)

    # ---- refusals
    @pytest.mark.parametrize("name", EXPORTS)
    def test_exports_refuse_by_name_and_write_nothing(self, name, tmp_path):
        """What isn't a tensor, changes with each call, or is frozen at the example's size."""
        path = exported(name, nn.Linear(3, 3), torch.zeros(2, 3), tmp_path)
        path.write_bytes(b"an earlier artefact")
        for function in (
            lambda _, x: x if float(x.sum()) > 0 else "no tensor",
            lambda _, x: x + torch.rand(4),
            lambda _, x: (x + torch.rand(x.shape), None),
            lambda _, x: sum(x[:, i] for i in range(x.size(1))),
            lambda _, x: x.reshape(3, 4) if len(x) == 3 else x[:, :1] * 5,
        ):
            with pytest.raises(ValueError, match="ExportModule") as raised:
                exported(name, ExportModule(function), torch.zeros(3, 4).long(), tmp_path)
            assert "\n" not in str(raised.value)
            assert list(tmp_path.iterdir()) == [path]
            assert path.read_bytes() == b"an earlier artefact"

    def test_exports_and_quantization_refuse(self, onnx_file, tmp_path):
        linear, x, path = nn.Linear(3, 1), torch.zeros(2, 3), tmp_path / "m"
        static = functools.partial(export.quantize_static, onnx_file, path)
        for words, function, *arguments in (
            ("method.*compile", export.export_torchscript, linear, x, path, "compile"),
            ("must be tensors.*'Tensor', 'int'", export.export_program, linear, (x, 3), path),
            ("Linear refuses.*shapes", export.export_program, linear, x[:, :2], path),
            ("can't capture Linear.*specialized", export.export_onnx, linear, x[:1], path),
            ("got model.pth", export.load_artefact, "model.pth"),
            ("nowhere", export.quantize_dynamic, tmp_path / "nowhere", path),
            ("can't quantize .*model.onnx", static, []),
            ("can't quantize .*model.onnx", static, [{"ids": x.long()}]),
            ("can't quantize .*model.onnx", static, [{"tokens": x}]),
        ):
            with pytest.raises(ValueError, match=words):
                function(*arguments)
        assert not list(tmp_path.iterdir())
        for name in ("a.onnx", "a.pt2", "a.ts"):
            for content in (b"", b"PK\x03\x04 and no more"):
                (tmp_path / name).write_bytes(content)
                with pytest.raises(ValueError, match=f"{name} is damaged"):
                    export.load_artefact(tmp_path / name)
        with pytest.raises(ValueError, match="can't quantize .*a.onnx"):
            export.quantize_dynamic(tmp_path / "a.onnx", path)

    def test_load_artefact_changes_nothing(self, model, onnx_file, tmp_path):
        """In the process, from four threads at once."""
        example, log = token_ids(3, 20), logging.getLogger()
        paths = [exported(name, model, example, tmp_path) for name in list(EXPORTS)[1:3]]

        def state():
            logs = [log.manager.disable, log.level, log.handlers[:], warnings.filters[:]]
            return [sys.stderr, sys.stdout, torch.get_num_threads(), *logs]

        before = state()
        with ThreadPoolExecutor(4) as pool:
            loaded = list(pool.map(export.load_artefact, [onnx_file, *paths] * 4))
        assert state() == before
        expected = model.eval()(example).detach()
        for run in loaded:
            check_close(run(example).detach(), expected, 1e-5)
        with pytest.raises(ValueError):
            loaded[0](example, example)

    # ---- int8
    def test_int8_product_is_off_by_the_rounding(self):
        x, weight = torch.randn(50, 64), torch.randn(20, 64)
        weight[0] *= 100
        exact, errors = x @ weight.T, []
        for bits, per_channel in ((8, True), (7, True), (8, False)):
            difference = export.int8_product(x, weight, bits, per_channel) - exact
            errors.append(difference[:, 1:].norm() / exact[:, 1:].norm())
        assert errors[0] < 0.015 and errors[0] < errors[1] < 0.03
        assert errors[2] > 10 * errors[0]  # small rows drown beside a large one
        integers = torch.randint(-127, 128, (9, 30)).float()
        integers[:, 0] = 127  # so that the unit of every row is 1
        check_close(export.int8_product(integers, integers), integers @ integers.T, 1e-6)

    @pytest.mark.parametrize("bits", [7, 8])
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_quantize_rounds_as_by_hand(self, model, onnx_file, kind, bits, tmp_path):
        """A scale a column, 7 bits unless asked; attention and metadata stay."""
        given = [onnx_file, tmp_path / "m.onnx"]
        if kind == "static":
            sizes = ((99, 1), (99, 5), (33, 64), (9, 224))
            given.append([{"tokens": token_ids(*size)} for size in sizes])
        wide = {} if bits == 7 else {"reduce_range": False}
        path = getattr(export, f"quantize_{kind}")(*given, **wide)
        kinds, weights, int8 = read_onnx(path)
        linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        assert len(int8) == len(linears) and kinds["MatMul"] >= 4  # attention stays
        for name, w in int8.items():
            w = w.astype(int)
            scale = weights[name.removesuffix("_quantized") + "_scale"]
            w = w if len(scale) == w.shape[1] else w.T  # Gemm's
            assert scale.shape == (w.shape[1],), name
            same = [m.detach().T.numpy() for m in linears if m.T.shape == w.shape]
            errors = [np.abs(w * scale - m).max() for m in same]
            assert min(errors) <= 0.51 * scale.max(), name  # half a unit
        largest = max(np.abs(w.astype(int)).max() for w in int8.values())
        assert 2 ** (bits - 1) - 3 < largest <= 2 ** (bits - 1) - 1 + (bits == 7)
        assert json.loads(export.load_artefact(path).metadata["note"]) == "gut, süß"
        check_export(path, model, tolerance=0.05 if kind == "dynamic" else 0.15)

    def test_quantize_dynamic_shrinks_embeddings(self, tmp_path):
        model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(64, 2))
        fp32 = export.export_onnx(model, torch.zeros(2, 3).long(), tmp_path / "m.onnx")
        path = export.quantize_dynamic(fp32, tmp_path / "q.onnx", embeddings=True)
        tokens = torch.arange(5000).view(1, -1)
        check_close(export.load_artefact(path)(tokens), model(tokens).detach(), 0.05)
        assert path.stat().st_size < 0.3 * fp32.stat().st_size

    def test_quantize_static_learns_its_ranges(self, tmp_path):
        """An activation's range is the calibration's: what lies beyond is clipped."""
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

    def test_to_bfloat16_follows_the_cpu(self, monkeypatch):
        model = nn.Linear(2, 2)
        for name in ("avx512_bf16", "amx_bf16", "bf16", "avx2"):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
            if name != "avx2":
                assert export.to_bfloat16(model).weight.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="no bf16"):
            export.to_bfloat16(model)
        assert model.weight.dtype == torch.float32

    # ---- pruning
    def test_prune_unstructured_zeroes_the_smallest(self):
        """Of Linear and Conv weights, ranked over all layers; in a copy."""
        model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 20), nn.Conv1d(20, 5, 1))
        nn.init.normal_(model[2].weight, std=3.0)
        model[1].requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        ranked = torch.cat([model[i].weight.flatten() for i in (1, 2)]).abs().sort().values
        for amount in (0, 0.25, 0.5, 1):
            pruned = export.prune_unstructured(model, amount)
            threshold = ranked[round(amount * 300) - 1] if amount else 0
            for name, weight in pruned.state_dict().items():
                old = before[name]
                if name in ("1.weight", "2.weight"):
                    old = old * (old.abs() > threshold)
                assert torch.equal(weight, old)
            assert [layer.weight.requires_grad for layer in pruned] == [True, False, True]
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

    @pytest.mark.parametrize("keep", [2, 3])
    @pytest.mark.parametrize("prune, reader, width, n, smaller_by", [
        ("prune_heads", "self_attention.out_proj", 8, 3, 8 * (3 * (24 + 1) + 24)),
        ("prune_neurons", "ffn.2", 1, 32, 24 + 1 + 24),
    ])  # fmt: skip
    def test_pruned_models_equal_masked_ones(self, model, keep, prune, reader, width, n, smaller_by):
        scores, masked, tokens = {}, copy.deepcopy(model).eval(), token_ids(5, 40)
        for layer in self.LAYERS:
            score = scores[f"{layer}.{reader.split('.')[0]}"] = torch.rand(n)
            mask = (score >= score.sort().values[-keep]).repeat_interleave(width)
            masked.get_submodule(f"{layer}.{reader}").weight.data *= mask
        smaller = getattr(export, prune)(model.eval(), scores, keep)
        check_close(smaller(tokens), masked(tokens), 1e-6)
        assert keep == n or (masked(tokens) - model(tokens)).abs().max() > 1e-4
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
        assert sizes[0] - sizes[1] == 2 * (n - keep) * smaller_by
        for start in (model, smaller):  # the model was left whole
            again = export.load_pruned(start, smaller.state_dict())
            assert torch.equal(again(tokens), smaller(tokens)) and not again.training

    def test_head_importance_is_the_derivative_by_a_gate(self, model):
        batches = []
        for b, t in ((4, 9), (3, 6)):
            batches.append(((token_ids(b, t),), torch.randint(0, 2, (b,))))
        found = export.head_importance(model.train(), iter(batches))
        assert all(m.training and not m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        examples = [pair for (x,), y in batches for pair in zip(x, y, strict=True)]
        for name in (f"{layer}.self_attention" for layer in self.LAYERS):
            check_close(found[name], derivative(model, f"{name}.out_proj", 3, examples), 1e-6)
        squared = export.head_importance(model, batches, lambda y, t: (y**2).sum())
        assert not torch.allclose(squared[name], found[name])

    @torch.no_grad()
    def test_neuron_importance_of_a_net_that_is_called_twice(self):
        """Both calls count (ALBERT); frozen weights and a caller's no_grad change nothing."""
        net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 6))
        parts = {"net": net, "unused": copy.deepcopy(net), "head": nn.Linear(6, 2)}
        model = ExportModule(lambda m, x: m.head(m.net(x + m.net(x))), **parts)
        model.requires_grad_(False)
        x, y = torch.randn(10, 6), torch.randint(2, (10,))
        found = export.neuron_importance(model, [(x[:5], y[:5]), (x[5:], y[5:])])
        examples = list(zip(x, y, strict=True))
        expected = derivative(model, "parts.net.3", 8, examples)
        check_close(found["parts.net"], expected, 1e-6)
        assert not found["parts.unused"].any()
        pruned = export.prune_neurons(model, found, keep=3)
        assert pruned.parts.net[0].out_features == 3 and pruned(x).shape == (10, 2)
        assert not any(p.requires_grad for p in pruned.parameters())  # stays frozen

    def test_pruning_refuses(self, model):
        """Attention that isn't plain, too, or that stands in two places."""
        linears = nn.Linear(8, 24, bias=False), nn.Linear(8, 8).requires_grad_(False)
        plain, two, gelu = export.SelfAttention(*linears, 2), {"0": torch.ones(2)}, nn.GELU()
        rows = [
            ("amount must.*got -0.1", export.prune_unstructured, model, -0.1),
            ("amount must.*got 1.5", export.prune_unstructured, model, 1.5),
            ("GELU has no Linear or Conv", export.prune_unstructured, gelu, 0.5),
            ("GELU", export.head_importance, gelu, []),
            ("GELU", export.neuron_importance, gelu, []),
            ("batches must hold at least one", export.head_importance, model, []),
            ("two places", export.prune_heads, nn.Sequential(plain, plain), two, 1),
        ]
        for change in (
            lambda x, mask: plain(1.5 * x, mask),
            lambda x, mask: plain(x),
            lambda x, mask: [plain(x, mask)],
        ):
            changed = nn.Sequential(copy.deepcopy(plain))
            changed[0].forward = change
            rows.append(("is not plain softmax", export.prune_heads, changed, two, 1))
        state = model.state_dict()
        wide = state | {"encoder.layers.1.ffn.0.weight": torch.ones(99, 24)}
        less = {name: p for name, p in state.items() if "out_proj" not in name}
        for wrong in (wide, less, {}):
            rows.append(("of a pruned EncoderClassifier", export.load_pruned, model, wrong))
        for prune, part, n in (("heads", "self_attention", 3), ("neurons", "ffn", 32)):
            prune = getattr(export, f"prune_{prune}")
            scores = {f"{layer}.{part}": torch.ones(n) for layer in self.LAYERS}
            for keep in (0, n + 1):
                rows.append((rf"layers.0.*1 .. {n}.*{keep}", prune, model, scores, keep))
            for wrong in ({}, dict.fromkeys(scores, torch.ones(5))):
                rows.append((f"of {n} scores, got 2, [05]$", prune, model, wrong, 2))
        for words, function, *arguments in rows:
            with pytest.raises(ValueError, match=words):
                function(*arguments)
        plain.register_forward_hook(lambda m, _, y: F.dropout(y, 0.5, m.training))
        (smaller,) = export.prune_heads(nn.Sequential(plain), two, 1)
        assert [p.requires_grad for p in smaller.parameters()] == [True, False, False]
        assert smaller.training

    def test_feed_forwards_are_linear_elementwise_linear(self):
        """A Softmax mixes neurons, a Dropout alone has none."""
        first, last = nn.Linear(4, 6), nn.Linear(6, 4)
        for n, *net in (
            (1, first, nn.GELU(), nn.Dropout(), last),
            (0, first, nn.Softmax(-1), last),
            (0, first, nn.ReLU(), nn.ReLU()),
            (0, nn.ReLU(), nn.ReLU(), last),
            (0, first, last),
        ):
            assert len(export.feed_forwards(nn.Sequential(*net))) == n, net
        net = nn.Sequential(first, nn.ReLU(), last)  # whose name is ""
        smaller, x = export.prune_neurons(net, {"": torch.arange(6.0)}, 2), torch.randn(5, 4)
        assert torch.equal(export.load_pruned(net, smaller.state_dict())(x), smaller(x))

    # ---- the evidence
    def test_benchmark_alternates_and_counts(self, monkeypatch):
        """A clock that the models advance; the first call of a turn isn't counted."""
        now, calls = [0.0], []
        monkeypatch.setattr(export.time, "perf_counter", lambda: now[0])

        def model(name, later):
            def run(x):
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
        assert results["b"]["mix"]["throughput"] == 250.0
        calls.clear()
        export.benchmark(runners, {"x": mix[:1]}, seconds=1000.0)
        assert len(calls) > 300  # as long as it may

    def test_export_all_recommends_by_agreement_and_says_what_is_refused(self, tmp_path):
        """The fastest that agrees, whatever the labels are."""
        x = torch.randn(64, 64)
        slow = nn.Sequential(nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 2), nn.Dropout(0.5))
        slow[2].bias.data = torch.tensor([5.0, 1.0])  # 0, but for dropout
        fast = nn.Sequential(export.Gate(), nn.Linear(64, 2))
        nn.init.zeros_(fast[1].weight)
        nn.init.constant_(fast[1].bias[1:], 5.0)  # its answer is always 1
        dev = [((x,), torch.ones(64).long())]  # which would make it the most accurate
        cases = {"first": [(x,)], "other": [(x[:1],)]}
        models = {"it": slow, "fast": fast}
        out = tmp_path / "a/b"
        report = export.export_all(models, x, dev, cases, [], out, seconds=0.01)
        rows = {row["name"]: row for row in report["models"]}
        assert {"fast, torch.export", "ONNX int8, static"} <= set(report["refused"])
        assert "capture Sequential" in report["refused"]["fast, ONNX"]
        for row in rows.values():
            assert row["size_bytes"] == (out / row["file"]).stat().st_size
            assert row["p50_ms"] == row["latency"]["first"]["p50_ms"]
        agreeing = [row for row in rows.values() if row["agreement"] >= 0.99]
        assert report["recommended"] == min(agreeing, key=lambda row: row["p50_ms"])["name"]
        disagreeing = rows["fast, TorchScript, trace"]
        assert disagreeing["accuracy"] == 1 > rows["eager"]["accuracy"]
        assert disagreeing not in agreeing and rows["ONNX"] in agreeing

    # ---- the demo
    def test_demo_reports_all_formats_and_its_files_travel(self, tmp_path):
        """Without compiler and network; then in a process of their own."""
        without = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        without |= {"PATH": str(tmp_path), "HOME": str(tmp_path)}
        (tmp_path / "cache").mkdir()  # where onnxruntime would write an id
        arguments = ["export.py", "--seconds", "0.002", "--out", "run"]
        result = run_script(*arguments, cwd=tmp_path, timeout=600, **without)
        out = tmp_path / "run"
        summary, report = last_json(result), json_of(out / "report.json")
        assert result.stderr == "" and len(result.stdout.splitlines()[-1]) < 300
        rows = {row["name"]: row for row in report["models"]}
        formats = export.formats(nn.Identity(), None, None, "")
        expected = {"eager", *formats, *(f"pruned, {name}" for name in formats)}
        bf16 = {name for name in expected if "bf16" in name and not export.has_bf16()}
        assert set(report["refused"]) == bf16 and set(rows) == expected - bf16
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
        assert not [p for p in out.iterdir() if p.suffix in (".part", ".data")]
        found = list(report["control_flow"].values())
        assert found == ["wrong, silently", "right", "refused"]  # trace, script, torch.export
        assert not list(tmp_path.rglob("*onnxruntime*"))  # no telemetry
        sentences = [
            ("the plot was superb", 1),
            ("the plot was not superb", 0),
            ("the script was dull but the music was warm", 1),
            ("the music was fresh but the cast was dull", 0),
        ]
        command = [sys.executable, "-I", "-W", "ignore", "-c", EXPORT_FRESH, str(out)]
        command += [text for text, _ in sentences]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        model = export.Classifier(len(export.WORDS)).eval()
        model.load_state_dict(torch.load(out / "weights.pt", weights_only=True))
        ((inputs, labels),) = export.encode(sentences)
        for tolerance, logits in zip((0.3, 1e-5, 1e-5), last_json(result), strict=True):
            check_close(torch.tensor(logits), model(*inputs).detach(), tolerance)
            assert torch.equal(torch.tensor(logits).argmax(1), labels)


# -----------------------------------------------------------------------------
# classify_imdb.py

IMDB_SMALL = "--d-model 16 --n-heads 2 --d-ff 16 --n-layers 1 --vocab-size 400 --max-len 64"
IMDB_SMALL = f"{IMDB_SMALL} --epochs 1 --min-steps 0 --no-export --out".split()


@pytest.fixture(scope="module")
def imdb_ranks(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("imdb"), "classify_imdb")
    yield launcher
    launcher.end()


def imdb_few(here: str = "") -> str:
    """For the launcher: a run on few demo reviews; here makes something different."""
    return f"""
import os, sys
script.exit_now = script.ddp.exit_now
os.environ["XDG_CACHE_HOME"] = "cache"
script.IMDB_URL = "http://127.0.0.1:9"  # no network
few = script.load_corpus(script.Settings(data=""))
for part in (few.train, few.test, few.unlabelled):
    del part[300:]
script.load_corpus = lambda s: few
script.BUCKETS = 10_007
script.export_models = lambda *_: {{"exported": True}}
script.write_page = lambda *_: None
die = lambda *_, **__: os.kill(os.getpid(), 9)
rate = script.ddp.warmup_cosine
late = lambda step, *rest: die() if step == 12 else rate(step, *rest)
{here}
script.exit_now(script.main(sys.argv[1:]))
"""


class BreakingServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked[6:-1]) if asked and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start:][: self.most])


def imdb_corpus(n: int = 200) -> imdb.Corpus:
    pairs = enumerate(encoder.generate_reviews(3 * n, seed=5))
    reviews = [imdb.Review(i // 2, label, text) for i, (text, label) in pairs]
    rest = [imdb.Review(i, -1, r.text) for i, r in enumerate(reviews[2 * n :])]
    return imdb.Corpus("demo", ["no", "yes"], reviews[:n], reviews[n : 2 * n], rest)


def imdb_model(**settings) -> imdb.ReviewClassifier:
    sizes = dict(d_model=16, n_heads=2, d_ff=24, max_len=64)
    model = imdb.make_model(imdb.Settings(**sizes, **settings), 300).eval()
    model.odds.table[1:].normal_()
    model.odds.without_fold.normal_()[:: imdb.BUCKETS + 1] = 0.0
    return model


def imdb_training(out: Path, **settings):
    """(model, examples, dev, run, settings) of a training on 200 demo reviews."""
    sizes = dict(d_model=8, d_ff=8, n_heads=1, n_layers=1, max_len=16, vocab_size=300)
    sizes |= dict(batch_size=10, epochs=1, min_steps=0, out=str(out)) | settings
    s = imdb.Settings(**sizes)
    corpus = imdb_corpus()
    tokenizer = imdb.Tokenizer.train(corpus.train, s.vocab_size)
    parts = []
    for reviews in (corpus.train, corpus.test[:50]):
        labels = [r.label for r in reviews]
        parts.append(imdb.encode(tokenizer, reviews, labels, s.max_len))
    model = imdb.make_model(s, tokenizer.vocab_size)
    model.odds.fit(parts[0])
    return model, *parts, imdb.Run({}, tokenizer.ranks), s


def imdb_folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, "utf-8", "surrogateescape", newline="")
    return path


def imdb_tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar, tempfile.TemporaryDirectory() as folder:
        tar.add(imdb_folder(Path(folder), files), "aclImdb")
    return path


def imdb_csv(n: int) -> tuple[list, str]:
    """Rows as people have them: quotes, commas, line breaks, emoji, nothing."""
    odd = ['"{}"', "{},\nhe said", "\U0001f600 {}", "", "  {}\r\n", "<b>{}</b> $x_1$"]
    rows = []
    for i, (text, label) in enumerate(encoder.generate_reviews(n, 7)):
        rows.append((("bad", "good & fine")[label], odd[i % 6].format(text)))
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("label", "text"), *rows])
    return rows, file.getvalue()


class TestClassifyImdb:
    @pytest.fixture(autouse=True)
    def small_table(self, monkeypatch):
        monkeypatch.setattr(imdb, "BUCKETS", 10_007)

    def test_ngram_ids_equal_a_loop(self):
        tokens = torch.randint(0, 30, (4, 40))  # with padding and hidden words
        buckets = imdb.ngram_ids(tokens)
        for b, t, n in itertools.product(range(4), range(40), (1, 2, 3)):
            gram = tokens[b, t - n + 1 : t + 1].tolist() if t >= n - 1 else [0]
            code = sum(map(int.__mul__, gram[::-1], imdb.FACTORS))
            expected = code % imdb.BUCKETS + 1 if min(gram) >= 2 else 0
            assert buckets[b, t, n - 1] == expected
        assert torch.equal(imdb.ngram_ids(tokens[:, :1]), buckets[:, :1])
        short = torch.randint(9000, 16_000, (2, 9), dtype=torch.int32)
        assert torch.equal(imdb.ngram_ids(short), imdb.ngram_ids(short.long()))

    def test_odds_equal_counting_and_never_see_a_text_s_own_label(self):
        rng = random.Random(0)
        ids = [torch.randint(2, 12, (rng.randint(0, 12),)) for _ in range(40)]
        ids[0] = torch.tensor([imdb.BUCKETS])  # bucket 1
        targets = [rng.choice((0, 1, 0.4, 0.7)) for _ in ids]
        folds = [rng.randrange(5) for _ in ids]
        odds, others = imdb.NgramOdds(), imdb.NgramOdds()
        odds.fit(imdb.Examples(ids, targets, folds))
        tables = [*odds.without_fold.view(5, -1), odds.table[:, 0]]
        for left_out, table in enumerate(tables):
            counts = torch.ones(2, imdb.BUCKETS + 1)
            for x, y, fold in zip(ids, targets, folds, strict=True):
                for bucket in set(imdb.ngram_ids(x[None]).flatten().tolist()) - {0}:
                    counts[int(y > 0.5), bucket] += fold != left_out
            check_close(table, (counts[1] / counts[0]).log(), 1e-6)
        turned = [1 - y if f == 2 else y for y, f in zip(targets, folds, strict=True)]
        others.fit(imdb.Examples(ids, turned, folds))
        x, own = ids[folds.index(2)][None], torch.tensor([2])
        assert torch.equal(others(x, own), odds(x, own))
        assert not torch.equal(others(x), odds(x))
        assert list(odds.state_dict()) == ["table"]

    @torch.no_grad()
    def test_model_is_its_parts_written_out(self):
        model, own = imdb_model(n_layers=2), torch.tensor([1, 3])
        positions = encoder.sinusoidal_positional_encoding(64, 16)
        mean = torch.eye(16)[:, :, None] / 5
        noise = model.shorten.weight.unflatten(1, (16, 5)) - mean
        assert noise.abs().max() <= 80**-0.5 + 1e-6
        for n, fold in itertools.product((21, 22, 23, 24), (None, own)):
            tokens = torch.randint(2, 300, (2, n))
            grams = imdb.ngram_ids(tokens)
            odds = model.odds.table[grams]
            if fold is not None:
                grams += own[:, None, None] * (imdb.BUCKETS + 1)
                odds = model.odds.without_fold[grams]
            x = model.encoder.embedding(tokens) * 4 + model.from_odds(odds[..., 0])
            x = torch.cat((torch.zeros(2, 2, 16), x, torch.zeros(2, 5, 16)), 1)
            starts = range(0, n + 2, 4)
            y = [model.shorten(x[:, i : i + 5].mT.flatten(1)) for i in starts]
            y = torch.stack(y, 1) + positions[: len(starts)]
            for layer in model.encoder.layers:
                y = layer(y, torch.ones(2, 1, 1, len(starts), dtype=torch.bool))
            y = model.encoder.final_norm(y)
            expected = model.head(torch.cat((y.mean(1), y.amax(1)), 1))
            check_close(model(tokens, fold), expected, 1e-5)

    def test_linear_model_weighs_by_naive_bayes(self):
        from sklearn.linear_model import LogisticRegression

        reviews = imdb_corpus().train
        y = np.array([r.label for r in reviews])
        linear, n_parameters = imdb.linear_model(reviews, y.tolist())
        grams = []
        for words in (re.findall(r"\w+|[^\w\s]", r.text) for r in reviews):
            spans = [(i, i + n) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1)]
            grams.append({" ".join(words[i:end]) for i, end in spans})
        counts = collections.Counter(itertools.chain(*grams))
        names = [gram for gram, n in counts.items() if n >= 2]
        x = np.array([[name in held for name in names] for held in grams]) * 1.0
        n0, n1 = (1 + x[y == label].sum(0) for label in (0, 1))
        x *= np.log(n1 / n1.sum()) - np.log(n0 / n0.sum())
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        p = LogisticRegression(C=30, max_iter=300).fit(x, y).predict_proba(x)[:, 1]
        assert linear(reviews) == pytest.approx(p, abs=0.01)
        assert n_parameters == len(names) + 1 and ((p > 0.5) == y).mean() > 0.8

    def test_train_is_its_loop(self, tmp_path):
        sizes = dict(warmup=7, clip=0.2, lr=1e-2, epochs=2, seed=3)
        model, examples, dev, run, s = imdb_training(tmp_path, **sizes)
        opinions = [0.6 * y + 0.3 for y in examples.targets]
        examples = examples._replace(targets=opinions)
        other = copy.deepcopy(model)
        imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        groups = losses.parameter_groups(other.parameters(), 0.01)
        optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)
        right = []
        lengths = [len(x) for x in examples.ids]
        for step, rows in enumerate(imdb.batches(lengths, s, 0, 40)):
            torch.manual_seed(3 * 1_000_003 + step)
            tokens = imdb.pad([examples.ids[i] for i in rows])
            y = torch.tensor(opinions)[rows]
            folds = torch.tensor(examples.folds)[rows]
            hidden = (torch.rand(tokens.shape) < 0.2) & (tokens > 0)
            log_p = other.train()(tokens.masked_fill(hidden, 1), folds).log_softmax(1)
            right += (log_p.argmax(1) == y.round()).tolist()
            optimizer.zero_grad()
            (-(1 - y) * log_p[:, 0] - y * log_p[:, 1]).mean().backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.2)
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / 40)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min((step + 1) / 7, cosine)
            optimizer.step()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            check_close(one.detach(), two.detach(), 1e-6)
        assert not model.encoder.embedding.weight[0].any()
        assert [row["step"] for row in run.history] == [10, 20, 30, 40]
        for row in run.history:
            part = right[10 * row["step"] - 100 : 10 * row["step"]]
            assert row["train_accuracy"] == pytest.approx(sum(part) / 100, abs=1e-4)
        scores = imdb.log_odds(model.eval(), dev.ids, imdb.ALONE)  # without dropout
        labels = torch.tensor(dev.targets).double()
        loss = F.binary_cross_entropy_with_logits(scores, labels).item()
        assert row["dev_loss"] == round(loss, 4) and run.seconds > 0

    def test_pruned_copy_is_taught_half_by_the_model(self, tmp_path, monkeypatch):
        sizes = dict(d_model=16, n_heads=8, d_ff=24)
        model, examples, *_, s = imdb_training(tmp_path, **sizes)
        learnt, hidden_loss = [], imdb.hidden_loss

        def note(pruned, tokens, y, folds, s):
            learnt.extend((2 * y - model(tokens, folds).softmax(1)[:, 1]).tolist())
            return hidden_loss(pruned, tokens, y, folds, s)

        monkeypatch.setattr(imdb, "hidden_loss", note)
        sample = imdb.in_batches(examples, every=2)
        pruned = imdb.pruned_copy(model.eval(), sample, examples, s)
        assert sorted(learnt) == pytest.approx([0] * 100 + [1] * 100, abs=1e-6)
        sizes = [x.shape for x in pruned.encoder.layers.parameters() if x.ndim > 1]
        assert sizes == [(12, 16), (16, 4), (3, 16), (16, 3)]

    def test_finish_numbers_and_page_by_hand(self, tmp_path, monkeypatch):
        model, examples, dev, run, s = imdb_training(tmp_path)
        corpus = imdb_corpus(300)
        corpus.test = [r._replace(text=f"{r.text} <script>") for r in corpus.test]
        linear = torch.rand(300)
        run.teacher = {"test": linear.tolist()}
        run.history = [{"seconds": 1.0, "train_accuracy": 0.5, "dev_accuracy": 0.25}]
        model.head.weight.data *= 5
        monkeypatch.setattr(imdb, "export_models", lambda *_: {"exported": True})
        (tmp_path / "export.png").touch()
        tokenizer = imdb.Tokenizer(run.ranks)
        imdb.finish(model, tokenizer, corpus, examples, dev, run, s, imdb.ALONE)
        report = json_of(tmp_path / "report.json")
        ids = tokenizer.encode([r.text for r in corpus.test], 16)
        own = imdb.log_odds(model, ids, imdb.ALONE)
        labels = torch.tensor([r.label for r in corpus.test])
        linear = linear.logit()
        scores = {"": own, "linear_": linear, "with_linear_": own + linear}
        for name, x in scores.items():
            expected = ((x > 0) == labels).double().mean().item()
            assert report[f"{name}test_accuracy"] == pytest.approx(expected, abs=1e-5)
        p = own.sigmoid()
        gaps = [(p - labels)[(10 * p).long() == i].sum().item() for i in range(10)]
        assert report["calibration_error"] == pytest.approx(sum(map(abs, gaps)) / 300, abs=1e-4)
        page = (tmp_path / "index.html").read_text(encoding="utf-8")
        given = [float(x) for x in re.findall(r"given (\d.*?)%", page)]
        right = 100 * torch.where(labels == 1, p, 1 - p).sort().values[:20]
        assert given == pytest.approx(right.tolist(), abs=0.06)
        assert "<script" not in page and "&lt;script&gt;" in page
        weights, words = imdb.attention_of(model, tokenizer, "a superb film")
        assert len(words) == weights.size(-1) and "".join(words) == "a superb film"

    def test_tokenizer_encodes_any_text(self):
        texts = [r.text.upper() + "<br />" for r in imdb_corpus().train]
        reviews = [imdb.Review(0, 0, text) for text in texts]
        tokenizer = imdb.Tokenizer.train(reviews, 400)
        merged = b"".join(token for token in tokenizer.ranks if len(token) > 1)
        assert merged and merged == merged.lower() and b"<" not in merged
        odd = ["", "a", "Ünï <br />çødé \U0001f600 \x00\x7f 12345", texts[0]]
        for raw, ids in zip(odd, tokenizer.encode(odd, 1000), strict=True):
            assert ids.dtype == torch.long and all(2 <= i < 400 for i in ids)
            assert tokenizer.bpe.decode((ids - 2).tolist()) == imdb.clean(raw)
        assert imdb.clean("A b.<br /><br />Über\t c\n") == "a b. über c"
        long = " ".join(texts[:20])
        (whole,) = tokenizer.encode([long], 10_000)
        n = len(whole)
        for max_len in (1, 2, 7, n - 1, n, n + 1):
            (short,) = tokenizer.encode([long], max_len)
            head = max_len // 2 if max_len < n else n
            tail = whole[n - min(max_len, n) + head :]
            assert torch.equal(short, torch.cat((whole[:head], tail)))
        padded = imdb.pad([torch.tensor(x) for x in ([3, 4], [], [5])])
        assert padded.tolist() == [[3, 4], [0, 0], [5, 0]]
        assert imdb.pad([whole[:0]]).tolist() == [[0]]
        numbers = [(0, i) for i in range(50)] + [(1, i) for i in range(10)]
        reviews = [imdb.Review(i, label, "") for label, i in numbers]
        folds = imdb.encode(tokenizer, reviews, [], 8).folds
        assert folds == [i // (2 if label else 10) for label, i in numbers]

    def test_batches_hold_each_text_once_and_little_padding(self):
        rng = random.Random(0)
        s, other_seed = imdb.Settings(seed=1), imdb.Settings(seed=2)
        for n in (1, 32, 33, 5000):
            lengths = [min(256, int(rng.expovariate(1 / 200)) + 1) for _ in range(n)]
            one = -(-n // 32)  # epoch
            whole = list(imdb.batches(lengths, s, 0, 2 * one))
            other = list(imdb.batches(lengths, other_seed, 0, one))
            for epoch in (whole[:one], whole[one:], other):
                assert sorted(itertools.chain(*epoch)) == list(range(n))
                assert all(0 < len(rows) <= 32 for rows in epoch)
            for step in (0, 1, one, 2 * one - 1, 2 * one):
                assert list(imdb.batches(lengths, s, step, 2 * one)) == whole[step:]
        longest = [max(lengths[i] for i in rows) for rows in other]
        assert 32 * sum(longest) < 1.1 * sum(lengths)
        assert longest[:50] != sorted(longest[:50])
        epochs = [set(map(frozenset, x)) for x in (whole[:one], whole[one:], other)]
        assert all(len(a & b) < 3 for a, b in itertools.combinations(epochs, 2))

    def test_dev_split_is_blocks_of_neighbours(self):
        for n in (12_500, 4000, 50):
            reviews = [imdb.Review(i, y, "") for y in (1, 0) for i in range(n)]
            train, dev = imdb.split_dev(imdb.Corpus("imdb", [], reviews, []))
            assert sorted(train + dev) == sorted(reviews)
            for label in (0, 1):
                numbers = {r.number for r in dev if r.label == label}
                edges = numbers ^ {i + 1 for i in numbers}  # of blocks
                assert len(numbers) == n // 10 and len(edges) == 10
        assert sorted(numbers) == [4, 14, 24, 34, 44]

    @torch.no_grad()
    def test_model_padding_and_batch_invariance(self):
        model = imdb_model()
        for n, T in itertools.product((1, 2, 3, 4, 5, 17, 62), (0, 1, 2, 64)):
            tokens = torch.randint(2, 300, (3, n))
            padded = torch.zeros(4, min(n + T, 64), dtype=torch.long)
            padded[:3, :n] = tokens
            check_close(model(padded)[:3], model(tokens), 1e-5)
            assert torch.equal(model(padded)[3], model.head.bias)  # padding alone
        for T in range(1, 14):
            tokens = torch.full((1, T), 7)
            others = tokens + torch.eye(T, dtype=torch.long)  # one other token each
            assert (model(others) != model(tokens)).any(1).all(), T
        ids = [torch.randint(2, 300, (i * 37 % 51,)) for i in range(150)]
        scores = imdb.log_odds(model, ids, imdb.ALONE)  # in the order given
        for i in (0, 1, 70, 149):
            logits = model(imdb.pad([ids[i]])).double()[0]
            check_close(scores[i], logits[1] - logits[0], 1e-5)

    def test_explain_speaks_in_log_odds(self):
        tokenizer = imdb.Tokenizer.train(imdb_corpus().train, 400)
        film = tokenizer.encode(["a film"], 99)[0][-1]

        def run(tokens: Tensor) -> Tensor:
            there = (tokens == film).any(1).float()  # all that it counts
            return torch.stack((0 * there, 9 + 5 * there), 1)

        text = "a superb film, naïve хорошо don't and superb"
        (ids,) = tokenizer.encode([text], 99)
        answer = imdb.explain(ids, torch.tensor([14.0]), tokenizer, run)
        assert answer[0] == ["film,", 5.0]
        assert not any(effect for _, effect in answer[1:])
        assert sorted(word for word, _ in answer) == sorted(text.split())

    def test_read_imdb_takes_tarball_and_folder_alike(self, tmp_path, monkeypatch):
        monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 12))
        monkeypatch.setattr(imdb, "UNLABELLED", {"train/unsup": 12})
        numbers = [*range(11), 99]  # in order, with gaps
        places = itertools.product(imdb.PER_FOLDER, numbers)
        files = {f"{place}/{i}_7.txt": f"{place} {i} Ü" for place, i in places}
        more = {f"train/unsup/{i}_0.txt": f"{i}" for i in range(12)}
        odd = {"README": "", "train/pos/._0_7.txt": ""}
        whole = imdb_tarball(tmp_path / "a.tar.gz", files | more | odd)
        outer = imdb_folder(tmp_path / "there/aclImdb", files).parent
        found = imdb.read_imdb(whole)
        renamed = imdb_folder(tmp_path / "renamed", files)
        for path in (outer, outer / "aclImdb", renamed):
            assert imdb.load_corpus(imdb.Settings(data=str(path))) == found
        for name in ("train", "test"):
            for y, part in ((1, "pos"), (0, "neg")):
                texts = [f"{name}/{part} {i} Ü" for i in numbers]
                expected = [(i, y, text) for i, text in enumerate(texts)]
                assert [r for r in getattr(found, name) if r.label == y] == expected
        found.unlabelled = [imdb.Review(i, -1, f"{i}") for i in range(12)]
        assert imdb.read_imdb(whole, unlabelled=True) == found
        with pytest.raises(ValueError, match="0 of 12 .*train/unsup"):
            imdb.read_imdb(outer, unlabelled=True)

    def test_load_corpus_takes_no_part_of_imdb(self, tmp_path, monkeypatch):
        monkeypatch.setattr(imdb, "PER_FOLDER", dict.fromkeys(imdb.PER_FOLDER, 2))
        files = [f"aclImdb/{f}/{i}_7.txt" for f in imdb.PER_FOLDER for i in range(2)]
        part = {name: "" for name in files if "test/neg" not in name}
        less = {name: "" for name in files if "train/neg/1" not in name}
        data = imdb_tarball(tmp_path / "whole.tar.gz", part).read_bytes()
        head = "text,label\n"
        many = head + "a,x\na,y\n" * 10

        def own(train: str, test: str = many) -> dict[str, str]:
            return {"train.csv": train, "test.csv": test}

        rows = [
            (part, "0 of 2 .*test/neg"), (less, "1 of 2 .*train/neg"),
            ({}, "does not exist"), ({"train.csv": many}, "test.csv"),
            (own(many + "c,z\n"), "'x', 'y', 'z'.*two"),
            (own(head + "a,x\n", head), r"labels \['x'\]"),
            (own(head + "a,x\n" * 9 + "a,y\n" * 10), "9 texts x"),
            (own("review,label\na,x\n"), "train.csv has no column 'text'"),
            (own(many + "b\n"), "labels"), (own(head + '"a,x\n'), "train.csv: line"),
            (own("label,text\n" + "x,a\ny,a\n" * 10 + "x,a, b\n"), "labels"),
            (own("na\udcefve"), "train.csv is not UTF-8"), (own(many, head), "to test on"),
            (b"no tarball", "damaged"), (gzip.compress(b"no tar" * 100), "damaged"),
            (data[:-1], "damaged"), (data[:-9], "damaged"),
        ]  # fmt: skip
        for i in (30, 99, len(data) // 2, len(data) - 20, len(data) - 1):
            rows.append((data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], "damaged"))
        for i, (content, words) in enumerate(rows):
            path = tmp_path / str(i)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                imdb_folder(path, content)
            with pytest.raises((ValueError, OSError), match=words):
                imdb.load_corpus(imdb.Settings(data=str(path)))
        for path in ("0/aclImdb", "0/aclImdb/train"):
            with pytest.raises(ValueError, match="0 of 2 "):
                imdb.load_corpus(imdb.Settings(data=str(tmp_path / path)))

    def test_read_own_takes_tables_and_folders(self, tmp_path):
        rows, table = imdb_csv(100)
        names = ("aclImdb/my.csv", "two/train.csv", "two/test.csv")
        imdb_folder(tmp_path, dict.fromkeys(names, table))
        s = imdb.Settings(data=str(tmp_path / names[0]))
        corpus = imdb.load_corpus(s)
        assert (corpus.name, corpus.labels) == ("own", ["bad", "good & fine"])
        found = [(corpus.labels[r.label], r.text) for r in corpus.train + corpus.test]
        assert sorted(found) == sorted(rows) and len(corpus.test) == 10
        assert sum(r.label for r in corpus.test) == 5  # a tenth of each class
        train, dev = imdb.split_dev(corpus)
        assert sorted(train + dev) == sorted(corpus.train) and len(dev) == 9
        with pytest.raises(ValueError, match="no unlabelled"):
            imdb.load_corpus(dataclasses.replace(s, unlabelled=True))
        two = imdb.read_own(tmp_path / "two")
        assert two.train == two.test == sorted(train + dev + corpus.test, key=lambda r: r[1::-1])
        places = {"train/no": 30, "train/yes": 30, "test/no": 5, "test/yes": 5}
        files = {f"{f}/{i}.txt": f for f, n in places.items() for i in range(n)}
        odd = {"train/no/.x.txt": "", "train/x.txt": "", "train/yes/0.txt": "\ufeffmark"}
        own = imdb.read_own(imdb_folder(tmp_path / "own", files | odd))
        assert (len(own.train), len(own.test)) == (60, 10)
        assert own.train[30] == (0, 1, "mark") and own.test[5] == (0, 1, "test/yes")

    def test_download_goes_on_from_what_arrived(self, tmp_path, monkeypatch):
        data = random.Random(0).randbytes(1_000_000)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(imdb, "IMDB_SIZE", len(data))
        monkeypatch.setattr(imdb, "IMDB_MD5", hashlib.md5(data).hexdigest())
        got = tmp_path / "imdb/aclImdb_v1.tar.gz"
        part = got.with_name(got.name + ".part")
        got.parent.mkdir()
        again = ["bytes=400000-", "bytes=700000-"]
        for before, served, most, ranges, expected in [
            (400_000, data, 300_000, True, again),  # killed; then it breaks off
            (400_000, data, None, False, again[:1]),  # sends all of it again
            (0, data[1:] + b"x", None, True, "md5"),
            (0, data, 100_000, False, "100,000 of 1,000,000"),
        ]:
            given = dict(data=served, most=most, ranges=ranges, asked=[])
            handler = type("Handler", (BreakingServer,), given)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setattr(imdb, "IMDB_URL", f"http://127.0.0.1:{server.server_port}")
            part.write_bytes(data[:before])
            if isinstance(expected, str):
                with pytest.raises(OSError, match=expected):
                    imdb.find_imdb()
                assert not got.exists() and part.exists() == (expected != "md5")
                continue
            with ThreadPoolExecutor() as pool:  # three first runs: one downloads
                assert set(pool.map(lambda _: imdb.find_imdb(), range(3))) == {got}
            assert handler.asked == expected
            assert got.read_bytes() == data and not part.exists()
            got.unlink()
        assert part.read_bytes() == data[:100_000]

    def test_parse_flags_override_their_preset(self, capsys, monkeypatch):
        assert imdb.parse([]) == imdb.Settings()
        best = imdb.parse("--preset best --epochs 1 --no-export".split())
        assert (best.epochs, best.unlabelled, best.max_len) == (1, True, 1024)
        plain = imdb.parse(["--preset=plain", "--vocab-size", "258"])
        assert (plain.odds, plain.vocab_size) == (False, 258)
        monkeypatch.setattr(imdb, "classify", None)
        for arguments in (
            "--lr nan", "--seed -1", "--epochs 0", "--batch-size 0", "--mask-words 1", "--predict=",
            "--explain", "--vocab-size 257", "--n-heads 3", "--target 85", "--seed 4294967296",
            "--max-len 0", "--d-model 0", "--dropout 1", "--min-steps -1", "--warmup 0", "--predict ",
        ):  # fmt: skip
            assert imdb.main(arguments.split(" ")) == 2, arguments
            (line,) = capsys.readouterr().err.splitlines()
            assert arguments.split()[0].strip("-=").replace("-", "_") in line

    def test_open_run_knows_its_own(self, tmp_path, monkeypatch):
        corpus = imdb_corpus(20)
        monkeypatch.setattr(imdb, "load_corpus", lambda s: corpus)
        lock_out = functools.partial(train_ddp.lock_out, patience=0.1)
        monkeypatch.setattr(train_ddp, "lock_out", lambda out: None)
        monkeypatch.setattr(imdb, "print_end", print)
        s = imdb.Settings(out=str(tmp_path))

        def opened(**changes):
            return imdb.open_run(dataclasses.replace(s, **changes), {})[1]

        def refused(words: str, **changes):
            with pytest.raises(ValueError, match=words):
                opened(**changes)

        run = opened()
        run.step, run.total_seconds = 5, 1e6
        train_ddp.save_checkpoint(tmp_path, 5, {"run": vars(run), "model": {}})
        free = "data predict explain baseline device export keep_exports save_every"
        for name, value in dataclasses.asdict(s).items():
            other = {name: f"{value}x" if isinstance(value, str) else 1 - value}
            if name in free.split():
                assert opened(**other).begun < run.begun - 9e5
            elif name != "out":
                refused(f"another run.*{name}", **other)
        for exported, finished in ((False, [False, True]), (True, [True, True])):
            content = json.dumps({"settings": run.settings, "exported": exported})
            (tmp_path / "report.json").write_text(content)
            found = [opened(export=export) is None for export in (True, False)]
            assert found == finished and opened(keep_exports=True).step == 5
        refused("another run.*seed", seed=1)
        (tmp_path / "report.json").write_text("no json")
        for rows in (corpus.train, corpus.test, corpus.unlabelled):
            for change in ({"text": "x"}, {"label": 7}):
                right, rows[3] = rows[3], rows[3]._replace(**change)
                refused("texts")
                rows[3] = right
        monkeypatch.setattr(train_ddp, "lock_out", lock_out)
        kept = {}
        assert imdb.open_run(s, kept)[1].step == 5 and kept["model"] == {}
        refused("in use")
        kept["lock"].close()
        train_ddp.save_checkpoint(tmp_path, 9, {"weights": 1})
        refused("another run")

    def test_train_stops_at_its_target(self, tmp_path):
        handler = signal.getsignal(signal.SIGINT)
        rest = dict(target=0.6, epochs=8, lr=2e-3, warmup=1)
        model, examples, dev, run, s = imdb_training(tmp_path, **rest)
        imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        limit = 0.6 + (0.6 * 0.4 / 50) ** 0.5
        *before, last = (row["dev_accuracy"] for row in run.history)
        assert run.reached and run.step < 160 and last > limit >= max(before)
        assert run.history[0]["step"] == round(160 / (16 * 8))
        saved = train_ddp.load_checkpoint(tmp_path)
        again = imdb.Run(**saved["run"])
        imdb.train(model, examples, dev, again, saved, s, imdb.ALONE)
        assert again.step == run.step == saved["run"]["step"]
        assert signal.getsignal(signal.SIGINT) == handler  # Ctrl-C ends what follows

    def test_train_saves_nothing_that_is_not_finite(self, tmp_path, monkeypatch):
        model, examples, dev, run, s = imdb_training(tmp_path, save_every=0.0)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        steps = itertools.count()
        model.head.weight.register_hook(lambda g: g / (next(steps) != 5))
        with pytest.raises(train_ddp.Stop, match="gradient.*step 5.*--lr"):
            imdb.train(model, examples, dev, run, {}, s, imdb.ALONE)
        saved = train_ddp.load_checkpoint(tmp_path)
        assert saved["run"]["step"] == 5
        assert all(x.isfinite().all() for x in saved["model"].values())

    @pytest.fixture(scope="class")
    @classmethod
    def own_run(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("own")
        imdb_folder(folder, {"my.csv": imdb_csv(2300)[1]})
        sizes = "--d-model 32 --n-heads 4 --d-ff 32 --vocab-size 500 --max-len 80"
        rest = "--min-steps 120 --lr 5e-3 --data my.csv --out out/classify_imdb"
        command = ["classify_imdb.py", *sizes.split(), *rest.split()]
        return folder, run_script(*command, cwd=folder, PYTHONIOENCODING="ascii")

    def test_own_texts_work_whole(self, own_run):
        folder, result = own_run
        out = folder / "out/classify_imdb"
        summary = last_json(result)
        report = json_of(folder / summary.pop("report"))
        assert summary.items() <= report.items() and "drawn at random" in result.stdout
        assert report["dataset"] == "own" and report["test_accuracy"] >= 0.6
        assert report["n_counted"] == 2_097_144 and report["gemm_gflops"] > 0
        assert 0 < report["train_seconds"] < report["total_seconds"]
        rows = {row["name"]: row for row in report["models"]}
        int8 = "ONNX int8, dynamic, embeddings"
        assert {"ONNX", int8, "pruned, ONNX", f"pruned, {int8}"} <= set(rows)
        assert rows["ONNX"]["max_abs_diff"] <= 1e-5 and not rows.pop("eager")["file"]
        best = rows[report["recommended"]]
        near = [row["p50_ms"] for row in rows.values() if row["agreement"] >= 0.95]
        assert best["agreement"] >= 0.95 and best["p50_ms"] == min(near)
        assert [row["name"] for row in rows.values() if row["file"]] == [best["name"]]
        assert best["size_bytes"] == (out / "model.onnx").stat().st_size
        assert sum(path.stat().st_size for path in out.rglob("*")) < 60e6
        page = (out / "index.html").read_text(encoding="utf-8")
        assert page.count("data:image/png;base64") == 2 and "good &amp; fine" in page
        assert not re.search(r"(src|href)=.?(http|//|/)", page)

    def test_predict_answers_line_by_line(self, own_run, tmp_path, capsys, monkeypatch):
        out = str(own_run[0] / "out/classify_imdb")
        monkeypatch.chdir(tmp_path)
        long = "the plot was clever , " * 2000
        text, odd = "they call it dull", "a dull\x85film\u2028x"
        Path("texts.txt").write_text(f"\ufeff{text}\n\n  \n{odd}\n", encoding="utf-8")
        Path("utf16.txt").write_bytes("praise".encode("utf-16"))

        def predict(*what: str) -> list[dict]:
            assert imdb.main(["--out", out, "--predict", *what]) == 0
            return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        (answer,) = predict(text)
        assert set(answer) == {"label", "probability", "text", "probabilities"}
        p = answer["probabilities"]
        assert [*p] == ["bad", "good & fine"] and sum(p.values()) == pytest.approx(1)
        assert p[answer["label"]] == answer["probability"] == max(p.values())
        one, two = predict("texts.txt")
        assert one == answer and two["text"] == odd
        assert predict(long)[0]["text"] == long
        (explained,) = predict(text, "--explain")
        effects = [abs(effect) for _, effect in explained["explain"]]
        assert len(effects) == 4 and effects == sorted(effects, reverse=True)
        Path("broken").mkdir()
        Path("broken/model.onnx").write_bytes(Path(out, "model.onnx").read_bytes()[:-999])
        for place, what in ((out, "utf16.txt"), (out, "."), ("nowhere", "x"), ("broken", "x")):
            assert imdb.main(["--out", place, "--predict", what]) == 2
            assert capsys.readouterr().err.count("\n") == 1
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        imdb.main(["--out", out, "--predict", text, "--explain"])
        first, *words = capsys.readouterr().out.splitlines()
        assert first.startswith(answer["label"]) and len(words) == 4

    def test_predict_streams(self, own_run):
        folder, _ = own_run
        command = [sys.executable, str(ROOT / "classify_imdb.py"), "--predict", "-"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=folder, **pipes) as process:
            for text in ("one", "A film to remember."):
                process.stdin.write(text + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                assert answer["text"] == text
            process.stdin.close()
            assert process.wait() == 0
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        parts = re.findall("```python\n(.+?)```", readme, re.S)
        (snippet,) = (part for part in parts if "onnxruntime" in part)
        command = [sys.executable, "-I", "-c", snippet]
        printed = subprocess.check_output(command, cwd=folder, text=True, timeout=60)
        numbers = [float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", printed)]
        assert numbers == pytest.approx([*answer["probabilities"].values()], abs=1e-3)

    def test_killed_anywhere_gives_the_same_weights(self, imdb_ranks, tmp_path):
        arguments = ["--unlabelled", "--save-every", "0", *IMDB_SMALL]
        whole, out = tmp_path / "whole", tmp_path / "killed"
        imdb_ranks.run(1, *arguments, str(whole), code=imdb_few())
        stages = [  # where it is killed; the step of what is left
            ("Tokenizer.train", None), ("linear_model", None), ("encode", 0),
            ("ddp.warmup_cosine", 12), ("log_odds", 13), ("ddp.write_atomically", 13),
            ("plot_results", 18), ("print_end", 18),
        ]  # fmt: skip
        for place, step in stages:
            here = f"script.{place} = {'late' if 'cosine' in place else 'die'}"
            (killed,) = imdb_ranks.attempt(1, *arguments, str(out), code=imdb_few(here))
            assert killed.returncode == -signal.SIGKILL, (place, killed)
            left = train_ddp.load_checkpoint(out)
            assert (left and left["run"]["step"]) == step, place
        here = "script.linear_model = script.Tokenizer.train = script.train = die"
        (done,) = imdb_ranks.run(1, *arguments, str(out), code=imdb_few(here))
        one, other = (train_ddp.load_checkpoint(folder) for folder in (whole, out))
        for name, x in one["model"].items():
            assert torch.equal(x, other["model"][name])
        first, second = json_of(whole / "report.json"), json_of(out / "report.json")
        for row, same in zip(first["history"], second["history"], strict=True):
            assert row | {"seconds": 0} == same | {"seconds": 0}
        assert first["with_linear_test_accuracy"] == second["with_linear_test_accuracy"]
        assert last_json(done)["test_accuracy"] == first["test_accuracy"]
        assert first["dataset"] == "demo" and "IMDB WAS NOT FOUND" in done.stdout
        assert DEADLINE > second["total_seconds"] > other["run"]["total_seconds"] > 0

    def test_same_weights_on_any_number_of_processes(self, imdb_ranks, tmp_path):
        """Also where one is lost. The last batch has two texts: fewer than ranks."""
        rest = "--dropout 0 --mask-words 0 --batch-size 71 --lr 1e-4 --clip 0 --unlabelled"
        arguments = [*rest.split(), "--save-every", "0", *IMDB_SMALL]
        for world in (1, 2):
            imdb_ranks.run(world, *arguments, str(tmp_path / str(world)), code=imdb_few())
        arguments += [str(tmp_path / "3")]
        code = imdb_few("if os.environ['RANK'] == '1': script.ddp.warmup_cosine = late")
        code = code.replace("12 else", "5 else")
        first, second = imdb_ranks.attempt(2, *arguments, code=code)
        assert (first.returncode, second.returncode) == (1, -9)
        assert "Traceback" not in first.stderr
        assert "step 5" in imdb_ranks.run(3, *arguments, code=imdb_few())[0].stdout
        one, *others = (train_ddp.load_checkpoint(tmp_path / name) for name in "123")
        for other in others:
            for name, value in one["model"].items():
                check_close(other["model"][name], value, 2e-5)
            for i, moments in one["optimizer"]["state"].items():
                average = other["optimizer"]["state"][i]["exp_avg"]
                check_close(average, moments["exp_avg"], 1e-5)
            mine, row = other["run"]["history"][-1], one["run"]["history"][-1]
            assert mine["dev_loss"] == pytest.approx(row["dev_loss"], abs=2e-4)
            assert mine["train_accuracy"] == row["train_accuracy"]
        assert json_of(tmp_path / "3/report.json")["processes"] == 3

    @pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
    def test_signals_stop_all_ranks(self, imdb_ranks, tmp_path, world, number):
        arguments = [*IMDB_SMALL, str(tmp_path), "--epochs", "500", "--save-every", "0"]
        imdb_ranks.start(world, *arguments, code=imdb_few())
        imdb_ranks.wait_until(lambda: list(tmp_path.glob("step_*[1-9].*.pt")))
        imdb_ranks.kill([world - 1], number)
        results = imdb_ranks.wait()
        assert [result.returncode for result in results] == [128 + number] * world, results
        step = train_ddp.load_checkpoint(tmp_path)["run"]["step"]
        assert f"step {step} of 4500 is saved" in results[0].stderr

    def test_classify_gives_unlabelled_texts_their_teacher_s_opinion(self, tmp_path, monkeypatch):
        corpus, given, learnt = imdb_corpus(), [], []
        corpus.unlabelled.pop()
        opinions = torch.rand(199).tolist()

        def linear_model(_, labels):
            learnt.extend(labels)
            return lambda part: opinions if len(part) == 199 else [0.5] * 200, 0

        monkeypatch.setattr(imdb, "load_corpus", lambda s: corpus)
        monkeypatch.setattr(imdb, "train", lambda *rest: given.extend(rest))
        monkeypatch.setattr(imdb, "finish", lambda *_: None)
        monkeypatch.setattr(imdb, "linear_model", linear_model)
        arguments = [*IMDB_SMALL, str(tmp_path), "--unlabelled", "--shuffle-labels"]
        assert imdb.main(arguments) == 0
        model, examples, dev, run, *_ = given
        train_set, dev_set = imdb.split_dev(corpus)
        true = [r.label for r in train_set]
        assert examples.targets == learnt + opinions and run.teacher["test"][0] == 0.5
        assert dev.targets == [r.label for r in dev_set] and len(examples.ids) == 379
        assert sorted(learnt) == sorted(true) and sum(np.array(learnt) == true) < 130
        odds = imdb.NgramOdds()
        odds.fit(examples)
        assert torch.equal(model.odds.table, odds.table)

    def test_baseline_is_trained_and_tested(self, tmp_path, monkeypatch):
        monkeypatch.setattr(imdb, "load_corpus", lambda s: imdb_corpus(300))
        assert imdb.main(["--baseline", "--out", str(tmp_path / "a/b")]) == 0
        report = json_of(tmp_path / "a/b/baseline.json")
        assert report["test_accuracy"] > 0.7 and report["dev_accuracy"] > 0.5

    @pytest.mark.skipif(not os.environ.get("IMDB_DATA"), reason="IMDB_DATA is not set")
    def test_real_data_are_the_published_texts(self):
        assert imdb.UNLABELLED == {"train/unsup": 50_000}
        corpus = imdb.read_imdb(Path(os.environ["IMDB_DATA"]))
        texts = "".join(f"{r.label}{r.text}\0" for r in corpus.train + corpus.test)
        log = json_of(ROOT / "assets/imdb.json")["fast"][0]["settings"]
        assert hashlib.sha256(texts.encode()).hexdigest() == log["texts"]


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
        (tmp_path / "tmpx.part").mkdir()  # what a writer leaves that was killed
        assert module.lock_out(tmp_path, patience=5) and os.listdir(tmp_path) == ["lock"]

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
        ('encoding="utf-8-sig")', 'encoding="utf-8-sig").read().splitlines()', "lines_of"),
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
        ("(x1, x2, eps=0)).square()", "(x1, x2, eps=0).square())", "oracle"),
        ("F.normalize(a, dim=1)", "(a / a.square().sum(1, keepdim=True).sqrt())", "extremes"),
        (".masked_fill(itself, -math.inf)  # (2N, 2N)", "", "oracle"),
        ("(labels[:, None] == labels) & ~itself", "(labels[:, None] == labels)", "oracle"),
        ("d.masked_fill(~positive, -math.inf)", "d.masked_fill(positive, -math.inf)", "oracle"),
        ("torch.expm1(n * math.log(beta)) /", "torch.expm1(math.log(beta)) /", "balanced"),
        ("((-s).exp() * losses + s).sum() / 2", "((-s).exp() * losses + 2 * s).sum() / 2", "uncertainty"),
        ("remaining / remaining.mean()", "remaining.mean() / remaining", "gradnorm"),
        ("nn.functional.all_gather(x)", "nn.functional.all_gather(x.detach())", "two_processes"),
        ('< 2], "weight_decay": 0.0', '< 2], "weight_decay": weight_decay', "parameter_groups"),
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
        ("signals.received()], p)", "0], p); stopped = signals.received()", "signals_stop"),
        ('scaler.load_state_dict(run["scaler"])', "pass", "signals_stop"),
        ('run["step"] = step + 1', 'run["step"] = step + 2', "kill_9"),
        ("fcntl.LOCK_EX | fcntl", "fcntl.LOCK_SH | fcntl", "lock_out"),
        ("p.parent = os.getppid() if", "p.parent = 0 if", "orphans"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        ("object_list(answer, group=processes.files)", "object_list(answer)", "longer_than"),
        ('env["TORCHELASTIC_RESTART_COUNT"]', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "same_weights"),
        ("grad_sync = micro == s.accumulate - 1", "grad_sync = True", "travel"),
        ("grad_sync = micro == s.accumulate - 1", "grad_sync = micro == 0", "same_weights"),
        ("return loss_sum * (world / n_total)", "return loss_sum / n_total", "same_weights"),
        ("(targets[whole] !=", "p.world * (targets[whole[p.rank :: p.world]] !=", "same_weights or micro"),
        ("load_optimizer(optimizer, kept.pop", "(lambda *_: 0)(optimizer, kept.pop", "goes_on or kill_9"),
        ('if hashlib.sha256(data).hexdigest() == path.name.split(".")[1]:', "if data:", "goes_on"),
        ("finished_checkpoints(folder)[:-keep]", 'sorted(folder.glob("*.pt"))[:-keep]', "keeps_the_last"),
        ("torch.arange(len(inputs))[p.rank :: p.world]", "torch.arange(len(inputs))", "same_weights"),
        ('location="cpu", weights_only=True', 'location="cpu", weights_only=False', "run_no_code"),
    ],
    "classify_imdb.py": [
        ("(tokens != PAD).unfold(1, WINDOW, STRIDE).any(-1)", "tokens[:, 2:-2:4] != PAD", "written_out"),
        ("tokens = tokens.long()  # 32", "# 32", "ngram_ids"),
        ("range(first, first + fifth // 10)", "range(block, 5 * fifth, 50)", "dev_split"),
        ('"ab" if response.status == 206 else "wb"', '"ab"', "download"),
        ('{"pos": 1, "neg": 0,', '{"pos": 0, "neg": 1,', "read_imdb"),
        ("gzip.decompress(", "zlib.decompressobj(31).decompress(", "no_part_of_imdb"),
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
        ("repeat_interleave(WINDOW, 1) / WINDOW", "repeat_interleave(WINDOW, 1)", "written_out"),
        ("self.encoder.embedding.weight[PAD] = 0.0", "pass", "written_out"),
        ("self.encoder.embedding.padding_idx = PAD", "pass", "train_is_its"),
        ("(targets + said) / 2", "said", "pruned_copy"),
        ("keep=max(1, s.n_heads // 4)", "keep=s.n_heads", "pruned_copy"),
        ("ids + fold[:, None, None] *", "ids + 0 * fold[:, None, None] *", "odds_equal"),
        ("accuracy(scores + linear, labels)", "accuracy(scores.exp() + linear, labels)", "finish"),
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
        ("signals.received()], p)", "0], p); stopped = signals.received()", "signals_stop"),
        ('scaler.load_state_dict(run["scaler"])', "pass", "signals_stop"),
        ('run["step"] = step + 1', 'run["step"] = step + 2', "kill_9"),
        ("fcntl.LOCK_EX | fcntl", "fcntl.LOCK_SH | fcntl", "lock_out"),
        ("p.parent = os.getppid() if", "p.parent = 0 if", "orphans"),
        ("isinstance(error, dist.DistError) or gloos", "isinstance(error, RuntimeError)", "traceback"),
        ('check_finite("gradient\'s norm", norm, step)', "pass", "diverges"),
        ("object_list(answer, group=processes.files)", "object_list(answer)", "longer_than"),
        ('env["TORCHELASTIC_RESTART_COUNT"]', '"0"', "meet_again"),
        ('raise ValueError(f"rank {p.rank} was', 'print(f"rank {p.rank} was', "in_one_line"),
        ("warmup = min(warmup, total)", "warmup = warmup", "same_weights"),
        ("gradient_sync(micro == s.accumulate - 1)", "gradient_sync(True)", "travel"),
        ("loss * (p.world / n_tokens)", "loss / n_tokens", "same_weights"),
        ("gradient_sync(micro == s.accumulate - 1)", "gradient_sync(micro == 0)", "same_weights"),
        ("fused=not s.exact", "fused=True", "two_processes_are_bitwise"),
        (".clamp(max=1.0))", "  )", "same_weights"),
        ("        fully_shard(block, mesh=mesh, mp_policy=policy)\n", "", "one_block_at_a_time"),
        ('(path / "manifest.json") == path.suffix[1:]', '(path / "manifest.json")', "newest_checkpoint"),
        ("if sha256_of(path / name) != sha]", "if not sha256_of(path / name)]", "newest_checkpoint"),
        ("raise pickle.UnpicklingError(", "return super().find_class(module, name) #(", "run_no_code"),
    ],
    "export.py": [
        ("if sum(m is child for child in places) > 1:", "if False:", "pruning_refuses"),
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
        ("Iterable[dict], reduce_range=True", "Iterable[dict], reduce_range=False", "rounds_as_by_hand"),
        ("with LOADING:", "if True:", "changes_nothing"),
        (".view(3, H, -1)[:, kept]", ".view(3, H, -1)[:, : len(kept)]", "pruned_models"),
        ("scores.argsort(descending=True, stable=True)", "scores.argsort(stable=True)", "pruned_models"),
        ("nn.Parameter(weight, linear.weight.requires_grad)", "nn.Parameter(weight)", "called_twice"),
        ("draw.sample(list(runners), len(runners))", "list(runners)", "benchmark"),
        ("while rounds < 6 or", "while rounds < 2 or", "benchmark"),
        ('[row for row in rows if row["agreement"] >= min_agreement]', "rows", "recommends"),
        ('os.environ["ORT_DISABLE_TELEMETRY"] = "1"', "pass", "demo"),
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
    """A copy of node with an operator or constant swapped, or without its not; else None."""
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
