"""From a trained module to the fastest correct model: formats, int8, pruning, and the evidence.

FIGURES

    python export.py                     # demo: trains a small classifier, exports it every way, compares
    python export.py --threads 2         # every setting is a flag; --help lists them

The functions above "Demo" take any nn.Module with example inputs. Which one, when:

    format        runs where                     what it costs
    TorchScript   libtorch, C++, no Python       deprecated; torch.export replaces it, AOTInductor in C++
    torch.export  PyTorch                        no faster by itself; what compilers and quantizers start from
    ONNX          onnxruntime, without PyTorch   an export that can fail; the fastest for single inputs
    int8          onnxruntime                    some accuracy; a quarter of the size
    bf16          PyTorch, on CPUs that have it  three digits of precision; the fastest for large batches
    pruning       anywhere                       accuracy, won back by fine-tuning; multiplies with the others

Not here, since both need a C++ compiler: torch.compile (faster inside a running Python process, after 10 to
20 s of compiling) and AOTInductor (torch._inductor.aoti_compile_and_package: a program as machine code).

Jacob et al., arXiv:1712.05877 (int8); Michel et al., "Are Sixteen Heads Really Better than One?",
arXiv:1905.10650 (importance of heads); Molchanov et al., arXiv:1906.10771 (the same, of neurons).
Shapes: B batch, T tokens, C = d_model, H heads, D width of a head, N examples, K classes.
"""

import contextlib
import copy
import inspect
import io
import json
import logging
import math
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import LambdaLR

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime writes a device id below the home folder

# -----------------------------------------------------------------------------
# 1. TorchScript: what a trace freezes


class Gate(nn.Module):
    """Control flow that depends on a value: doubles x where its sum is positive, else negates it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a trace with a positive example keeps this side alone, for all inputs, silently
            return 2 * x
        return -x


class GateWithoutIf(nn.Module):
    """The same function without an `if`: both sides are computed, and one is chosen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum() > 0, 2 * x, -x)


def export_torchscript(model: nn.Module, example_inputs, path, method: str = "trace") -> Path:
    """TorchScript, by method "trace" (records one run) or "script" (compiles the source). Deprecated.

    example_inputs: a tensor, or a tuple of them. A trace holds the operators of the example's run: sizes stay
    free, but an `if` on a tensor's value is frozen as the example took it, without an error. A script keeps
    the `if`, and refuses what its subset of Python lacks. Load with torch.jit.load(path). Like every exporter
    here it leaves the model alone, compares before it writes, and raises ValueError for a model that torch
    refuses or that answers otherwise, OSError where path can't be written.
    """
    if method not in ("trace", "script"):
        raise ValueError(f'method must be "trace" or "script", got "{method}"')
    model, inputs = prepare(model, example_inputs)
    buffer = io.BytesIO()
    with torch.no_grad(), refusing(f"TorchScript can't {method} {type(model).__name__}"):
        if method == "trace":
            scripted = torch.jit.trace(model, inputs)
        else:
            scripted = torch.jit.script(model)
        torch.jit.save(torch.jit.freeze(scripted), buffer)
    return write_checked(buffer.getvalue(), ".ts", path, model, [inputs, *other_sizes(inputs)])


def prepare(model: nn.Module, example_inputs) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model in evaluation mode, and the inputs as a tuple; ValueError if they aren't tensors.

    A copy, because switching the model's own mode would reach into a training that goes on in another thread.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"example_inputs must be tensors, got {[type(x).__name__ for x in inputs]}")
    return copy.deepcopy(model).eval(), inputs


@contextlib.contextmanager
def refusing(what: str):
    """Turn an exporter's error, of whichever of its many types, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {reason or type(error).__name__}") from error


def free_sizes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, str], ...]:
    """What stays free by default, a dict {dimension: name} an input: the batch, and the length.

    A length is the second dimension of (B, T) integers or booleans, and of (B, T) or (B, T, C) floats that
    are as long. In onnxruntime a name is one size, so each input's length has a name of its own.
    """
    batch = next((len(x) for x in inputs if x.dim()), 0)
    lengths = {x.size(1) for x in inputs if x.dim() == 2 and not x.is_floating_point()}
    sizes = []
    for i, x in enumerate(inputs):
        free = {}
        if x.dim() and len(x) == batch:
            free[0] = "batch"
            if x.dim() in (2, 3) and x.size(1) in lengths:
                free[1] = f"length_{i}" if i else "length"
        sizes.append(free)
    return tuple(sizes)


def other_sizes(inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs cut to one row, one place shorter; and with a row and a place more."""
    less, more = list(inputs), list(inputs)
    for i, free in enumerate(free_sizes(inputs)):
        for dim in free:
            n = 1 if dim == 0 else max(1, inputs[i].size(1) - 1)
            less[i] = less[i].narrow(dim, 0, n)
            more[i] = torch.cat((more[i], more[i].narrow(dim, 0, 1)), dim)
    return [tuple(less), tuple(more)]


@torch.no_grad()
def write_checked(data: bytes, suffix: str, path, model: nn.Module, trials: list[tuple]) -> Path:
    """Write an artefact once it has given the model's outputs on all trials, the first being the example.

    A size that the model itself refuses (longer than its max_len) is left out.
    """
    with refusing(f"the {suffix} file of {type(model).__name__} doesn't load"):
        run = runner_of(data, suffix)
    for inputs in trials:
        try:
            expected = tensors_in(model(*inputs))
        except Exception:
            if inputs is trials[0]:
                raise
            continue
        shapes = [list(x.shape) for x in inputs]
        with refusing(f"the {suffix} file of {type(model).__name__} differs from it on inputs {shapes}"):
            for output, wanted in zip(tensors_in(run(*inputs)), expected, strict=True):
                finite = wanted.double().nan_to_num(0.0, 0.0, 0.0).abs()
                largest = finite.max().item() if finite.numel() else 0.0
                tolerance = {"rtol": 0.0, "atol": 1e-3 * max(1.0, largest)}
                torch.testing.assert_close(output, wanted, **tolerance, equal_nan=True)
    write_atomically(Path(path), data)
    return Path(path)


def tensors_in(output) -> list[Tensor]:
    """The tensors of a model's output: one, or those of a tuple, list or dict."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [x for part in output for x in tensors_in(part)]
    return [output] if isinstance(output, Tensor) else []


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, even if we are killed mid-write."""
    with tempfile.TemporaryDirectory(
        dir=path.parent, suffix=".part"
    ) as folder:  # a name of its own, same disk
        temporary = Path(folder, path.name)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def runner_of(data: bytes, suffix: str, threads: int | None = None) -> Callable[..., Tensor]:
    """An artefact's bytes as a function of tensors; suffix .ts, .pt2 or .onnx says what they are."""
    if suffix == ".onnx":
        return onnx_runner(data, threads)
    if suffix == ".pt2":
        return torch.export.load(io.BytesIO(data)).module()
    return torch.jit.load(io.BytesIO(data))


def load_artefact(path, threads: int | None = None) -> Callable[..., Tensor]:
    """Whatever the functions here wrote, as a function of tensors; its suffix tells what it is.

    threads: of an ONNX file; None: as many as torch has now, which is what the other formats run on. Raises
    ValueError for another or a damaged file, OSError where there is none. Threads may load at the same time.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2", ".ts"):
        raise ValueError(f"a file ends in .onnx, .pt2 or .ts, got {path}")
    data = path.read_bytes()
    with refusing(f"{path} is damaged"):
        return runner_of(data, path.suffix, threads)


# -----------------------------------------------------------------------------
# 2. torch.export: the whole graph or an error


def capture(model: nn.Module, inputs: tuple, dynamic_shapes=None) -> torch.export.ExportedProgram:
    """The operators of a model in evaluation mode as a graph; ValueError where torch.export refuses."""
    if dynamic_shapes is None:
        free = free_sizes(inputs)
        ones = [list(x.shape) for x, dims in zip(inputs, free, strict=True) if 1 in map(x.size, dims)]
        if ones:  # torch.export takes a size of 1 for a constant
            raise ValueError(f"a size that stays free must be at least 2 in example_inputs, got {ones[0]}")
        dynamic_shapes = tuple(dict.fromkeys(dims, torch.export.Dim.DYNAMIC) for dims in free)
    with torch.no_grad(), refusing(f"torch.export can't capture {type(model).__name__}"):
        return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)


def export_program(model: nn.Module, example_inputs, path, dynamic_shapes=None) -> Path:
    """A torch.export program (.pt2). Load with torch.export.load(path).module().

    It is whole or refused: an `if` on a tensor's value is an error, with torch.cond or torch.where as the way
    out. Speed is eager PyTorch's. dynamic_shapes: as torch.export's, and then the example's sizes alone are
    compared; by default batch and length stay free (free_sizes). An LSTM's length can't: it is refused.
    Raises as export_torchscript.
    """
    model, inputs = prepare(model, example_inputs)
    buffer = io.BytesIO()
    torch.export.save(capture(model, inputs, dynamic_shapes), buffer)
    trials = [inputs, *other_sizes(inputs)] if dynamic_shapes is None else [inputs]
    return write_checked(buffer.getvalue(), ".pt2", path, model, trials)


# -----------------------------------------------------------------------------
# 3. ONNX: one file for every runtime


def attention_for_onnx(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """F.scaled_dot_product_attention, written out; arguments as there. query (..., Tq, D) to (..., Tq, Dv).

    The exporter's own translation is 1.3 times as slow in onnxruntime, or fails there on a mask (..., 1, Tk);
    and it has the mean of all values, where torch has 0, for a query that may attend to nothing.
    """
    if enable_gqa:  # a key head serves several query heads
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.mT  # (..., Tq, Tk)
    if is_causal:  # top-left, as torch's
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    is_boolean = attn_mask.dtype == torch.bool
    allowed = attn_mask if is_boolean else attn_mask > -math.inf
    bias = torch.where(allowed, 0.0 if is_boolean else attn_mask, torch.finfo(scores.dtype).min / 2)
    weights = (scores + bias.to(scores.dtype)).softmax(-1)
    return weights @ value * allowed.any(-1, keepdim=True)


def export_onnx(model: nn.Module, example_inputs, path, dynamic_shapes=None, metadata=None) -> Path:
    """One ONNX file, batch and length free, with metadata inside; runs wherever onnxruntime does.

    The inputs are named as forward's arguments are, the output, one tensor, "output". metadata (labels,
    max_len, a vocabulary: what a user of the file needs) is a dict of what JSON can hold; to read it:
    json.loads(session.get_modelmeta().custom_metadata_map[name]). The rest as in export_program.
    """
    import onnx

    texts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    model, inputs = prepare(model, example_inputs)
    with torch.no_grad():
        output = model(*inputs)
    if not isinstance(output, Tensor):
        raise ValueError(f"the model must return one tensor, got {type(output).__name__}")
    program = capture(model, inputs, dynamic_shapes)
    with refusing(f"ONNX can't express {type(model).__name__}"):
        attention = torch.ops.aten.scaled_dot_product_attention.default
        program = program.run_decompositions({attention: attention_for_onnx})  # in torch's own modules too
        names = list(inspect.signature(model.forward).parameters)[: len(inputs)]
        graph = torch.onnx.export(
            program,
            input_names=names,
            output_names=["output"],
            dynamic_shapes=dynamic_shapes or free_sizes(inputs),  # for the names in it
            opset_version=20,
            dynamo=True,
            verbose=False,
        ).model_proto
        for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.value_info):
            part.ClearField("metadata_props")  # stack traces: half of a small file, and paths of this machine
        for key, text in texts.items():
            graph.metadata_props.add(key=key, value=text)
        onnx.checker.check_model(graph, full_check=True)  # full: with shape inference
    trials = [inputs, *other_sizes(inputs)] if dynamic_shapes is None else [inputs]
    return write_checked(graph.SerializeToString(), ".onnx", path, model, trials)


def onnx_runner(model: bytes | str | Path, threads: int | None = None) -> Callable[..., Tensor]:
    """An ONNX file, or its bytes, as a function of tensors on the CPU; threads None: as many as torch has.

    Without onnxruntime's one kernel for sum and norm: it takes five times as long as the two.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised, and needn't be printed as well
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],
    )
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    run.metadata = session.get_modelmeta().custom_metadata_map  # what export_onnx was given, as JSON
    return run


# -----------------------------------------------------------------------------
# 4. int8 by hand


def quantize_by_hand(x: Tensor, per_channel: bool = True, bits: int = 8) -> tuple[Tensor, Tensor]:
    """x (rows, columns) as integers and the scale of their unit: x is about integers * scale.

    Symmetric, as onnxruntime does it with weights. per_channel: a scale a row, (rows, 1), so that a row of
    small values keeps its digits beside one of large ones; else one for all, (1, 1).
    """
    largest = x.abs().amax(1, keepdim=True) if per_channel else x.abs().amax().view(1, 1)
    levels = 2 ** (bits - 1) - 1  # 127: -128 would have no positive twin
    scale = largest.clamp(min=1e-12) / levels  # a row of zeros has a unit, too
    integers = (x / scale).round().clamp(-levels, levels).to(torch.int8)  # off by scale / 2 at most
    return integers, scale


def int8_linear(x: Tensor, weight: Tensor, bits: int = 8) -> Tensor:
    """x @ weight.T in integers. x (N, in), weight (out, in), result (N, out)."""
    x_int, x_scale = quantize_by_hand(x, per_channel=False)
    w_int, w_scale = quantize_by_hand(weight, bits=bits)  # (out, in), (out, 1)
    sums = x_int.int() @ w_int.int().T  # exact: int32 holds 132,000 products of 127 * 127
    return sums * x_scale * w_scale.T


# -----------------------------------------------------------------------------
# 5. int8 by onnxruntime
#
# A CPU without VNNI multiplies 8-bit activations (0 .. 255) by 8-bit weights and adds two products in 16 bits:
# 2 * 255 * 127 = 64,770 is above 32,767 and saturates silently. With 7-bit weights the sum is 32,130, right
# on every CPU. So 7 bits are the default, whatever the machine that builds the file can do: the file travels.
# For 8: reduce_range=False, and where it runs a CPU with VNNI, or an onnxruntime session with
# options.add_session_config_entry("session.x64quantprecision", "1"), which is right on the others, and slower.

MATRICES = ["MatMul", "Gemm"]  # norms, softmax and products of two activations stay fp32


def quantize_dynamic(onnx_path, path, embeddings: bool = False, reduce_range: bool = True) -> Path:
    """int8 weights, a scale for each output; activations are scaled anew in each run: no calibration.

    What it is for: models made of matrix products (Transformers). embeddings: make the tables int8 as well
    (one scale each), for size, not speed. reduce_range: 7-bit weights, see above. Metadata stays. Raises
    ValueError where onnxruntime refuses the file, OSError from the disk.
    """
    from onnxruntime import quantization

    graph = read_graph(onnx_path)
    metadata = list(graph.metadata_props)
    with tempfile.TemporaryDirectory() as folder, refusing(f"onnxruntime can't quantize {onnx_path}"):
        quantization.quantize_dynamic(
            graph,
            Path(folder, "int8.onnx"),
            op_types_to_quantize=MATRICES + ["Gather"] * embeddings,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=quantization.QuantType.QInt8,
        )
        data = with_metadata(Path(folder, "int8.onnx"), metadata)
    write_atomically(Path(path), data)
    return Path(path)


def quantize_static(onnx_path, path, calibration: Iterable[dict], reduce_range: bool = True) -> Path:
    """int8 weights, and int8 activations whose ranges are fixed beforehand, on real inputs.

    calibration: an iterable of input dicts, name -> tensor or array, as a session takes them; a hundred real
    inputs are enough, random ones are not. What it is for: devices that can't rescale. A Transformer's ranges
    differ from input to input, so dynamic quantization is closer. The rest as in quantize_dynamic; ValueError
    for an empty calibration too.
    """
    from onnxruntime import quantization

    feeds = [{name: np.asarray(x) for name, x in inputs.items()} for inputs in calibration]
    if not feeds:
        raise ValueError("calibration must hold at least one dict of inputs, got none")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.rest = iter(feeds)

        def get_next(self):
            return next(self.rest, None)

    graph = read_graph(onnx_path)
    metadata = list(graph.metadata_props)
    with tempfile.TemporaryDirectory() as folder, refusing(f"onnxruntime can't quantize {onnx_path}"):
        quantization.quantize_static(
            graph,
            Path(folder, "int8.onnx"),
            Reader(),
            op_types_to_quantize=MATRICES,
            extra_options={"MatMulConstBOnly": True},
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        data = with_metadata(Path(folder, "int8.onnx"), metadata)
    write_atomically(Path(path), data)
    return Path(path)


def read_graph(onnx_path):
    """The ONNX graph in a file; ValueError where there is none in it, OSError where there is no file."""
    import onnx

    data = Path(onnx_path).read_bytes()
    with refusing(f"{onnx_path} is not an ONNX file"):
        return onnx.load_from_string(data)


def with_metadata(path: Path, metadata: list) -> bytes:
    """The bytes of a quantized file, with the metadata of its source, once onnxruntime has loaded them."""
    graph = read_graph(path)
    del graph.metadata_props[:]
    graph.metadata_props.extend(metadata)
    data = graph.SerializeToString()
    onnx_runner(data)
    return data


# -----------------------------------------------------------------------------
# 6. bf16: float32 with fewer digits


def has_bf16() -> bool:
    """True if this CPU multiplies bf16 itself; others emulate it, many times slower than fp32."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))


def to_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bf16: half the bytes, 8 instead of 24 bits of precision; takes integers or bf16 as inputs.

    Export it with export_program. Raises ValueError on a CPU without bf16, where it would be slow.
    """
    if not has_bf16():
        raise ValueError("this CPU has no bf16 arithmetic (avx512_bf16, amx_bf16); use int8 instead")
    return copy.deepcopy(model).bfloat16()


# -----------------------------------------------------------------------------
# 7. Pruning: zeros, which bring no speed, and smaller matrices, which do


def prune_unstructured(model: nn.Module, amount: float) -> nn.Module:
    """A copy in which the smallest `amount` (0 .. 1) of all weights of Linear and Conv layers are 0.

    Magnitudes are ranked over all layers together. Zeros alone bring no speed: a dense product multiplies
    by them like by any other number, and torch's sparse product is slower still at 90% zeros. Raises
    ValueError for another amount, and where there is no such layer.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in 0 .. 1, got {amount}")
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer to prune")
    frozen = [layer for layer in layers if not layer.weight.requires_grad]
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=float(amount))
    for layer in layers:
        prune.remove(layer, "weight")  # the zeros into the weight itself, without a mask beside it
    for layer in frozen:
        layer.weight.requires_grad_(False)
    return model


# Heads and neurons that are gone for real. A convention says where they are:
# - an attention is a module with n_heads, qkv_proj (Linear to q, k, v of all heads, each H * D wide) and
#   out_proj (Linear from H * D), called as attention(x, mask), with plain softmax attention between the two;
# - a feed-forward net is an nn.Sequential of Linear, functions of single elements, Linear.


class SelfAttention(nn.Module):
    """Attention with as many heads as qkv_proj has room for, H * D <= C. x (B, T, C) to (B, T, C)."""

    def __init__(self, qkv_proj: nn.Linear, out_proj: nn.Linear, n_heads: int):
        super().__init__()
        self.qkv_proj = qkv_proj
        self.out_proj = out_proj
        self.n_heads = n_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def attentions(model: nn.Module, needed: bool = True) -> dict[str, nn.Module]:
    """name -> attention, by the convention above.

    Raises ValueError where there is none that is needed, and for one that two modules share: it can't be
    replaced in one of them.
    """
    parts = ("n_heads", "qkv_proj", "out_proj")
    found = {name: m for name, m in model.named_modules() if all(hasattr(m, part) for part in parts)}
    if needed and not found:
        raise ValueError(f"{type(model).__name__} has no attention (a module with {', '.join(parts)})")
    places = [child for parent in model.modules() for child in parent.children()]
    for name, attention in found.items():
        if sum(attention is child for child in places) > 1:
            raise ValueError(f"{name} stands in two places of {type(model).__name__}")
    return found


def feed_forwards(model: nn.Module, needed: bool = True) -> dict[str, nn.Sequential]:
    """name -> feed-forward net, by the convention above; ValueError where there is none that is needed."""
    found = {name: m for name, m in model.named_modules() if is_feed_forward(m)}
    if needed and not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward net (Sequential: Linear, ..., Linear)")
    return found


def is_feed_forward(m: nn.Module) -> bool:
    """True for a Sequential of Linear, functions of single elements, Linear.

    A neuron must be made of itself alone (a Softmax mixes them): tried on a few numbers.
    """
    if not isinstance(m, nn.Sequential) or len(m) < 3:
        return False
    first, *between, last = m
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        return False
    function = copy.deepcopy(nn.Sequential(*between)).eval()
    if first.out_features != last.in_features or list(function.parameters()):
        return False
    x = torch.randn(2, first.out_features, generator=torch.Generator().manual_seed(0))  # (2, d_ff)
    x = x.to(first.weight)
    try:
        with torch.no_grad():
            return torch.allclose(function(x)[:, ::2], function(x[:, ::2]), rtol=1e-3, atol=1e-4)
    except (IndexError, RuntimeError):  # it makes another shape
        return False


def head_importance(model: nn.Module, batches: Iterable, loss: Callable | None = None) -> dict[str, Tensor]:
    """What the loss would lose without each head: |sum of x * dloss/dx| over it, mean over examples (Michel).

    batches: an iterable of (inputs, targets). loss(outputs, targets): a sum over examples; default the summed
    cross-entropy. Returns attention's name -> (H,). Raises ValueError for no batch.
    """
    model = copy.deepcopy(model).eval()
    readers = {}
    for name, attention in attentions(model).items():
        readers[name] = (attention.out_proj, attention.out_proj.in_features // attention.n_heads)
    return importance(model, readers, batches, loss)


def neuron_importance(model: nn.Module, batches: Iterable, loss: Callable | None = None) -> dict[str, Tensor]:
    """The same for each neuron of the feed-forward nets (Molchanov). Returns net's name -> (d_ff,)."""
    model = copy.deepcopy(model).eval()
    readers = {name: (net[-1], 1) for name, net in feed_forwards(model).items()}
    return importance(model, readers, batches, loss)


def importance(model: nn.Module, readers: dict[str, tuple[nn.Linear, int]], batches, loss) -> dict:
    """First-order change of the loss if a group of inputs of a Linear were 0: name -> (groups,).

    readers: name -> (the Linear that reads the heads or neurons, features a group).
    """
    loss = loss or partial(F.cross_entropy, reduction="sum")
    seen = {name: [] for name in readers}  # a Linear may be called several times
    totals = {name: torch.zeros(linear.in_features // width) for name, (linear, width) in readers.items()}
    n_examples = 0

    def keep_input(name: str, _module, inputs: tuple) -> None:
        seen[name].append(inputs[0].requires_grad_())  # which it does already, unless all weights are frozen

    for name, (linear, _) in readers.items():
        linear.register_forward_pre_hook(partial(keep_input, name))
    for inputs, targets in batches:
        for xs in seen.values():
            xs.clear()
        with torch.enable_grad():
            value = loss(model(*inputs if isinstance(inputs, tuple | list) else (inputs,)), targets)
        every = [x for xs in seen.values() for x in xs]
        gradients = iter(torch.autograd.grad(value, every, materialize_grads=True))
        for name, xs in seen.items():
            change = torch.zeros(len(targets), len(totals[name]))  # (B, groups)
            for x in xs:
                products = x.detach() * next(gradients)  # (B, features) or (B, ..., features)
                products = products.reshape(len(x), -1, len(totals[name]), readers[name][1])
                change += products.sum((1, 3)).cpu()
            totals[name] += change.abs().sum(0)
        n_examples += len(targets)
    if not n_examples:
        raise ValueError("batches must hold at least one (inputs, targets), got none")
    return {name: total / n_examples for name, total in totals.items()}


def prune_heads(model: nn.Module, importance: dict[str, Tensor], keep: int) -> nn.Module:
    """A copy whose attentions keep only their `keep` most important heads, in smaller matrices.

    importance: attention's name -> (H,), from head_importance or any other. The pruned model equals the
    original with the other heads' outputs set to 0 (and drops no weights in training). Fine-tune it, save its
    state dict, read that back with load_pruned. Raises ValueError for a keep that is not in 1 .. H and for
    other attentions than plain ones.
    """
    model = copy.deepcopy(model)
    for name, attention in attentions(model).items():
        kept = most_important(f"heads of {name}", importance.get(name, ()), attention.n_heads, keep)
        model.set_submodule(name, smaller_attention(attention, kept))
    return model


def prune_neurons(model: nn.Module, importance: dict[str, Tensor], keep: int) -> nn.Module:
    """A copy whose feed-forward nets keep only their `keep` most important inner neurons. As prune_heads."""
    model = copy.deepcopy(model)
    for name, net in feed_forwards(model).items():
        scores = importance.get(name, ())
        kept = most_important(f"neurons of {name}", scores, net[0].out_features, keep)
        keep_outputs(net[0], kept)
        keep_inputs(net[-1], kept)
    return model


def load_pruned(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """An unpruned model's copy with sizes and weights of a pruned one's state dict, or ValueError."""
    model = copy.deepcopy(model)
    with refusing(f"this is no state dict of a pruned {type(model).__name__}"):
        for name, attention in attentions(model, needed=False).items():
            width = attention.out_proj.in_features // attention.n_heads
            n_heads = state[f"{name}.out_proj.weight"].size(1) // width
            model.set_submodule(name, smaller_attention(attention, torch.arange(n_heads)))
        for name, net in feed_forwards(model, needed=False).items():
            kept = torch.arange(state[f"{name}.0.weight".removeprefix(".")].size(0))  # "": the model itself
            keep_outputs(net[0], kept)
            keep_inputs(net[-1], kept)
        model.load_state_dict(state)
    return model


def most_important(what: str, scores: Tensor, n: int, keep: int) -> Tensor:
    """Indices (keep,) of the largest scores (n,), in ascending order."""
    if len(scores) != n or not 1 <= keep <= n:
        got = f"{keep}, {len(scores)} scores"
        raise ValueError(f"{what}: keep must be in 1 .. {n}, with {n} scores, got {got}")
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def smaller_attention(attention: nn.Module, kept: Tensor) -> SelfAttention:
    """The attention with these heads (kept,) alone; ValueError if it does more than SelfAttention does."""
    n_heads = attention.n_heads
    width = attention.out_proj.in_features // n_heads
    smaller = SelfAttention(attention.qkv_proj, attention.out_proj, n_heads).eval()
    weight = attention.qkv_proj.weight
    x = torch.randn(2, 5, weight.size(1), generator=torch.Generator().manual_seed(0)).to(weight)  # (B, T, C)
    mask = torch.tensor([5, 3], device=x.device)[:, None, None, None] > torch.arange(5, device=x.device)
    try:
        with torch.no_grad():
            y = copy.deepcopy(attention).eval()(x, mask)
            same = torch.allclose(y, smaller(x, mask), rtol=1e-3, atol=1e-4)
    except (TypeError, RuntimeError):
        same = False
    if not same:
        raise ValueError(f"{type(attention).__name__} is not plain softmax attention of (x, mask)")
    columns = (kept[:, None] * width + torch.arange(width)).flatten()  # (H' * D,) of out_proj's inputs
    keep_outputs(smaller.qkv_proj, torch.cat([columns + part * n_heads * width for part in range(3)]))
    keep_inputs(smaller.out_proj, columns)
    smaller.n_heads = len(kept)
    return smaller.train(attention.training)


def keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    """Keep these rows of the weight and the bias; what is frozen stays so."""
    for name in ("weight", "bias"):
        old = getattr(linear, name)
        if old is not None:
            setattr(linear, name, nn.Parameter(old.detach()[rows], old.requires_grad))
    linear.out_features = len(rows)


def keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    """Keep these columns of the weight; frozen, it stays so."""
    old = linear.weight
    linear.weight = nn.Parameter(old.detach()[:, columns].contiguous(), old.requires_grad)
    linear.in_features = len(columns)


# -----------------------------------------------------------------------------
# 8. The evidence: latency, size, accuracy, side by side


def benchmark(runners: dict[str, Callable], cases: dict[str, list[tuple]], seconds: float = 1.0) -> dict:
    """Latency of every runner on every case, in alternating rounds, so that a busy moment hits all of them.

    runners: name -> function of tensors. cases: name -> list of inputs; a case of several inputs (real texts
    of several lengths) is timed input by input. A case has one round to warm up, then rounds until `seconds`
    a runner are spent, 5 at least. PyTorch runs on the threads that it has; give load_artefact the same.
    Returns runner -> case -> {p50_ms, p90_ms of a call, throughput in examples a second}.
    """
    draw = random.Random(0)
    results = {name: {} for name in runners}
    for case, batches in cases.items():
        times = {name: [] for name in runners}
        timed_round(runners, batches, draw)  # to warm up
        until = time.perf_counter() + seconds * len(runners)
        while len(times[min(times)]) < 5 * len(batches) or time.perf_counter() < until:
            for name, spent in timed_round(runners, batches, draw).items():
                times[name] += spent
        for name, spent in times.items():
            n_examples = sum(len(inputs[0]) for inputs in batches) * len(spent) / len(batches)
            p50, p90 = np.percentile(spent, (50, 90))
            results[name][case] = {
                "p50_ms": round(1000 * float(p50), 3),
                "p90_ms": round(1000 * float(p90), 3),
                "throughput": round(n_examples / sum(spent), 1),
            }
    return results


@torch.no_grad()
def timed_round(runners: dict[str, Callable], batches: list[tuple], draw: random.Random) -> dict:
    """Seconds of each runner on each input, the runners in an order drawn anew."""
    times = {}
    for name in draw.sample(list(runners), len(runners)):
        runners[name](*batches[0])  # untimed: the others have filled the caches, and a server runs one model
        times[name] = []
        for inputs in batches:
            start = time.perf_counter()
            runners[name](*inputs)
            times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def outputs_on(run: Callable, examples: list) -> Tensor:
    """Logits (N, K) for examples, a list of (inputs, labels)."""
    outputs = []
    for inputs, _ in examples:
        outputs.append(run(*inputs if isinstance(inputs, tuple | list) else (inputs,)).float())
    return torch.cat(outputs)


def accuracy(run: Callable, examples: list) -> float:
    """Fraction of right labels, over a list of (inputs, labels)."""
    labels = torch.cat([labels for _, labels in examples])
    return fraction(outputs_on(run, examples).argmax(-1) == labels)


def fraction(right: Tensor) -> float:
    """Mean of booleans, five digits."""
    return round(right.double().mean().item(), 5)


def attempt(found: dict, name: str, write: Callable, *arguments, **options) -> None:
    """found[name] = the file that write made, or its ValueError; prints which."""
    try:
        found[name] = write(*arguments, **options)
        print(f"  {name:42s}{found[name].stat().st_size / 1000:8,.0f} kB", flush=True)
    except ValueError as error:
        found[name] = error
        print(f"  {name:42s}not possible: {error}", flush=True)


def write_formats(model: nn.Module, example_inputs, out: Path, metadata=None, label: str = "") -> dict:
    """Write the model in every format, if it has no label (a pruned one's), else as bf16 and ONNX.

    Returns name -> file, or the ValueError that says why not.
    """
    prefix = f"{label}, " if label else ""
    stem = label.replace(" ", "_") or "model"
    found = {}
    if not label:
        attempt(found, "eager", save_weights, model, out / "weights.pt")
        for method in ("trace", "script"):
            path = out / f"{method}.ts"
            attempt(found, f"TorchScript, {method}", export_torchscript, model, example_inputs, path, method)
        attempt(found, "torch.export", export_program, model, example_inputs, out / "program.pt2")
    path = out / f"{stem}.bf16.pt2"
    attempt(found, f"{prefix}torch.export, bf16", export_bfloat16, model, example_inputs, path)
    path = out / f"{stem}.onnx"
    attempt(found, f"{prefix}ONNX", export_onnx, model, example_inputs, path, metadata=metadata)
    return found


def write_int8(onnx_path: Path, calibration: list[dict], label: str = "") -> dict:
    """Write an ONNX file of write_formats in int8, the static kind if it has no label. Returns as there."""
    prefix = f"{label}, " if label else ""
    found = {}
    path = onnx_path.with_suffix(".int8.onnx")
    attempt(found, f"{prefix}ONNX int8, dynamic", quantize_dynamic, onnx_path, path)
    path = onnx_path.with_suffix(".int8.e8.onnx")
    name = f"{prefix}ONNX int8, dynamic, 8-bit embeddings"
    attempt(found, name, quantize_dynamic, onnx_path, path, embeddings=True)
    if not label:
        path = onnx_path.with_suffix(".static.onnx")
        attempt(found, "ONNX int8, static", quantize_static, onnx_path, path, calibration)
    return found


def save_weights(model: nn.Module, path: Path) -> Path:
    """The state dict alone."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())
    return path


def export_bfloat16(model: nn.Module, example_inputs, path) -> Path:
    """to_bfloat16's copy as a torch.export program. Raises ValueError for inputs of floats: float32 ones."""
    _, inputs = prepare(nn.Identity(), example_inputs)
    if any(x.is_floating_point() for x in inputs):
        raise ValueError("inputs of floats: call to_bfloat16 and convert them, too")
    return export_program(to_bfloat16(model), example_inputs, path)


def export_all(
    models: dict[str, nn.Module],
    example_inputs,
    dev: list,
    cases: dict[str, list[tuple]],
    calibration: list[dict],
    out,
    metadata: dict | None = None,
    case: str | None = None,
    min_agreement: float = 0.99,
    seconds: float = 1.0,
) -> dict:
    """Write every format of the models into the folder out, measure them side by side, recommend one.

    models: name -> classifier; the first is the original, which is exported every way; the others (pruned
    ones) in bf16 and as ONNX, fp32 and int8. The rest as compare and quantize_static take it.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for i, (label, model) in enumerate(models.items()):
        label = label if i else ""
        formats = write_formats(model, example_inputs, out, metadata, label)
        found.update(formats)
        onnx_path = list(formats.values())[-1]
        if isinstance(onnx_path, Path):
            found.update(write_int8(onnx_path, calibration, label))
    return compare(next(iter(models.values())), found, dev, cases, case, min_agreement, seconds)


def compare(
    original: nn.Module,
    found: dict,
    dev: list,
    cases: dict[str, list[tuple]],
    case: str | None = None,
    min_agreement: float = 0.99,
    seconds: float = 1.0,
) -> dict:
    """Measure the files that were found side by side, and recommend the fastest that agrees with original.

    found: as write_formats returns it, "eager" among them. dev: a list of (inputs, labels) that are no test
    set. cases: as benchmark takes them; case: the name of your own, default the first, by whose p50 the
    fastest is chosen, among those that answer as the original does on min_agreement (0 .. 1) of dev. Times
    are of torch.get_num_threads() threads.
    Returns {"models": rows, "refused": name -> why, "recommended": name, "threads", "case", "min_agreement"}.
    """
    original = copy.deepcopy(original).eval()
    case = case or next(iter(cases))
    files = {name: path for name, path in found.items() if isinstance(path, Path)}
    runners = {"eager": original}
    for name, path in files.items():
        if name != "eager":
            runners[name] = load_artefact(path)
    timings = benchmark(runners, cases, seconds)
    expected = outputs_on(original, dev)
    labels = torch.cat([labels for _, labels in dev])
    rows = []
    for name, run in runners.items():
        outputs = outputs_on(run, dev)
        shape = cases[case][0][0].shape
        row = {
            "name": name,
            "file": files[name].name,
            "size_bytes": files[name].stat().st_size,
            "accuracy": fraction(outputs.argmax(-1) == labels),
            "agreement": fraction(outputs.argmax(-1) == expected.argmax(-1)),
            "max_abs_diff": float(f"{(outputs - expected).abs().max().item():.2g}"),
            "batch": shape[0],
            "seq_len": shape[1] if len(shape) > 1 else None,
            "latency": timings[name],
        }
        rows.append(row | timings[name][case])
    return {
        "models": rows,
        "refused": {name: str(why) for name, why in found.items() if not isinstance(why, Path)},
        "recommended": recommended(rows, min_agreement)["name"],
        "threads": torch.get_num_threads(),
        "case": case,
        "min_agreement": min_agreement,
    }


def recommended(rows: list[dict], min_agreement: float) -> dict:
    """The row with the lowest p50 among those that agree with the original often enough."""
    return min((row for row in rows if row["agreement"] >= min_agreement), key=lambda row: row["p50_ms"])


def print_table(report: dict) -> None:
    """The rows of compare's report, and the recommendation in words."""
    rows = report["models"]
    cases = list(rows[0]["latency"])
    width = max(len(row["name"]) for row in rows)
    print(f"\n{report['threads']} thread(s); p50 of a call in ms, by batch x tokens:")
    head = "".join(f"{case:>10s}" for case in cases)
    print(f"{'':{width}s}   size kB  accuracy  agreement  max |d|{head}")
    for row in rows:
        times = "".join(f"{row['latency'][case]['p50_ms']:10.2f}" for case in cases)
        facts = f"{row['accuracy']:10.2%}{row['agreement']:11.2%}{row['max_abs_diff']:9.0e}"
        print(f"{row['name']:{width}s}{row['size_bytes'] / 1000:10,.0f}{facts}{times}")
    for name, why in report["refused"].items():
        print(f"not possible: {name}: {why}")
    best = next(row for row in rows if row["name"] == report["recommended"])
    speed = rows[0]["p50_ms"] / best["p50_ms"]
    size = best["size_bytes"] / rows[0]["size_bytes"]
    print(f"recommended: {best['name']}: {speed:.1f} times as fast as eager PyTorch at {report['case']},")
    print(f"  {size:.2f} of its size, the same answer on {best['agreement']:.2%} of dev", end="")
    print(f" (asked for: {report['min_agreement']:.2%})")


def plot_rows(report: dict, path: str | Path) -> Path:
    """Accuracy against latency, a point a model, its area the size of the file."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = report["models"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    largest = max(row["size_bytes"] for row in rows)
    for i, row in enumerate(rows):
        point = (row["p50_ms"], 100 * row["accuracy"])
        area = 500 * row["size_bytes"] / largest
        label = f"{i + 1}  {row['name']}, {row['size_bytes'] / 1000:,.0f} kB"
        axes.scatter(*point, s=area, color=colormaps["tab20"](i), alpha=0.7, edgecolors="k", label=label)
        offset = (0, (12, -20, 24, -32)[i % 4])  # by turns, so that neighbours' numbers stay apart
        axes.annotate(str(i + 1), point, offset, textcoords="offset points", ha="center", fontsize=8)
    axes.set_xlim(left=0)
    axes.margins(y=0.2)
    axes.set(xlabel=f"p50 latency of a batch, {report['case']} (ms)", ylabel="accuracy (%)")
    axes.set_title(f"Accuracy against latency, {report['threads']} thread(s); area: size of the file")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, markerscale=0.5)
    figure.savefig(path, dpi=110)
    return Path(path)


# -----------------------------------------------------------------------------
# Demo: a small classifier of generated sentences, in which "but" decides which half counts and "not" turns it


@dataclass
class Settings:
    threads: int = 1  # threads of every model compared
    seconds: float = 0.08  # benchmark time a model and size
    min_agreement: float = 0.98  # share of dev on which the recommended model must answer as the original
    out: str = "out/export"  # artefacts, picture and report.json go here
    seed: int = 0  # same seed, same sentences and weights


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). x (B, T, C)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(d_model)
        qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.self_attention = SelfAttention(qkv_proj, nn.Linear(d_model, d_model), n_heads)
        self.ffn_norm = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attention(self.self_attention_norm(x), mask)
        return x + self.ffn(self.ffn_norm(x))


class Classifier(nn.Module):
    """A compact pre-norm encoder: (B, T) token ids, 0 = padding, to (B, 2) logits; T <= max_len."""

    def __init__(self, vocab_size: int, max_len=256, d_model=64, n_heads=4, n_layers=2, d_ff=256):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        angles = torch.arange(max_len)[:, None] * 10_000 ** -(torch.arange(0, d_model, 2) / d_model)
        positions = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)  # (max_len, C)
        self.register_buffer("positions", positions)
        self.layers = nn.ModuleList(Layer(d_model, n_heads, d_ff) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0  # (B, T)
        x = self.embedding(tokens) + self.positions[: tokens.size(1)]  # (B, T, C)
        for layer in self.layers:
            x = layer(x, real[:, None, None, :])
        x = self.norm(x) * real[:, :, None]
        return self.head(x.sum(1) / real.sum(1, keepdim=True).clamp(min=1))  # padding alone: the head's bias


GOOD = "clever gripping fresh superb warm".split()
BAD = "dull lifeless stale awful tedious".split()
NOUNS = "plot acting music script ending cast".split()
ASIDES = ["on a rainy evening", "as my neighbour said", "whatever the poster says", "to be fair"]


def generate_sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """n (sentence, label), 1 = positive; no sentence twice."""
    rng = random.Random(seed)
    sentences = {}
    while len(sentences) < n:
        clauses = []
        for _ in range(rng.choice((1, 2, 2, 2))):
            label = rng.randrange(2)
            negated = rng.randrange(2)
            words = [f"the {rng.choice(NOUNS)} was", *["not"] * negated, rng.choice(GOOD if label else BAD)]
            clauses.append(" ".join(rng.sample(ASIDES, rng.randrange(3)) + words))
        sentences[" but ".join(clauses)] = label ^ negated  # what comes after "but" is what is meant
    return list(sentences.items())


def encode(sentences: list[tuple[str, int]], vocabulary: dict[str, int]) -> list[tuple[tuple, Tensor]]:
    """Batches of 50, ((tokens (B, T),), labels (B,)), each as long as its longest sentence."""
    batches = []
    for start in range(0, len(sentences), 50):
        part = sentences[start : start + 50]
        ids = [torch.tensor([vocabulary[word] for word in text.split()]) for text, _ in part]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (B, T)
        batches.append(((tokens,), torch.tensor([label for _, label in part])))
    return batches


def train(model: nn.Module, batches: list, epochs: int, lr: float, seed: int) -> nn.Module:
    """AdamW with warm-up and a linear decay, on batches of ((tokens,), labels)."""
    order = random.Random(seed)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 1.02 - step / steps))
    model.train()
    for _ in range(epochs):
        for (tokens,), labels in order.sample(batches, len(batches)):
            loss = F.cross_entropy(model(tokens), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def show_control_flow(out: Path) -> dict[str, str]:
    """Captured with a positive example, asked about a negative one: who is right?"""
    positive = torch.ones(2, 3)
    found = {}
    for name, module, write, *arguments in (
        ("TorchScript, trace", Gate(), export_torchscript, out / "gate_trace.ts", "trace"),
        ("TorchScript, script", Gate(), export_torchscript, out / "gate_script.ts", "script"),
        ("torch.export", Gate(), export_program, out / "gate.pt2"),
        ("torch.export, torch.where", GateWithoutIf(), export_program, out / "gate.pt2"),
    ):
        try:
            run = load_artefact(write(module, positive, *arguments))
            right = torch.equal(run(-positive), module(-positive))
            found[name] = "right" if right else "wrong, silently"
        except ValueError:
            found[name] = "refused"
    print("\n1, 2. an `if` on a tensor's value (TorchScript is deprecated for torch.export):")
    for name, what in found.items():
        print(f"  {name:42s}{what}")
    return found


def show_int8_by_hand(weight: Tensor) -> dict[str, float]:
    """Relative error of a product whose weight (out, in) has one row a hundred times as large."""
    x = torch.randn(100, weight.size(1))
    weight = torch.cat((weight, 100 * weight[:1]))
    found = {}
    for name, bits in (("a scale a row, 8 bits", 8), ("a scale a row, 7 bits", 7)):
        y = int8_linear(x, weight, bits)[:, :-1]
        found[name] = y
    integers, scale = quantize_by_hand(weight, per_channel=False)
    found["one scale for all, 8 bits"] = int8_linear(x, integers * scale)[:, :-1]
    exact = (x @ weight.T)[:, :-1]  # (100, out) of the rows as they were
    print("\n4. int8 by hand: error of a product, in a matrix with one row of large values:")
    for name, y in found.items():
        found[name] = ((y - exact).norm() / exact.norm()).item()
        print(f"  {name:42s}{found[name]:8.2%}")
    return found


def show_zeros(model: nn.Module, dev: list, inputs: list[tuple], seconds: float) -> list[dict]:
    """Accuracy over sparsity, and the time of dense and sparse models side by side."""
    pruned = {f"{amount:.0%} zeros": prune_unstructured(model, amount) for amount in (0, 0.3, 0.5, 0.7, 0.9)}
    times = benchmark(pruned, {"": inputs}, seconds)
    rows = []
    print("\n7. smallest weights set to 0, without fine-tuning:")
    for name, candidate in pruned.items():
        row = {"name": name, "accuracy": accuracy(candidate, dev), "p50_ms": times[name][""]["p50_ms"]}
        print(f"  {name:42s}accuracy {row['accuracy']:7.2%}   p50 {row['p50_ms']:6.2f} ms")
        rows.append(row)
    print("  zeros alone bring no speed; smaller matrices do:")
    return rows


def prune_and_tune(model: nn.Module, train_set: list, dev: list, seed: int) -> nn.Module:
    """The model with half of its heads and a quarter of its inner neurons, fine-tuned for an epoch."""
    heads = head_importance(model, train_set[:10])
    smaller = prune_heads(model, heads, keep=2)
    neurons = neuron_importance(smaller, train_set[:10])
    smaller = prune_neurons(smaller, neurons, keep=64)
    before = accuracy(smaller, dev)
    smaller = train(smaller, train_set, 1, 1e-3, seed)
    print(f"  half the heads, a quarter of the neurons: accuracy {before:.2%}, ", end="")
    print(f"after an epoch of fine-tuning {accuracy(smaller, dev):.2%}")
    return smaller


def main(s: Settings) -> None:
    warnings.simplefilter("ignore")  # the exporters' warnings and log lines, for this process alone
    logging.disable(logging.WARNING)
    torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    sentences = generate_sentences(6000, s.seed)
    words = sorted({word for text, _ in sentences for word in text.split()})
    vocabulary = {word: 1 + i for i, word in enumerate(words)}
    train_set = encode(sentences[:4000], vocabulary)
    dev = encode(sentences[4000:5000], vocabulary)  # all choices are made on it
    test_set = encode(sentences[5000:], vocabulary)  # read once, for what was chosen
    model = train(Classifier(1 + len(words)), train_set, epochs=3, lr=3e-3, seed=s.seed)
    print(f"trained in {time.perf_counter() - start:.1f} s, e.g. {sentences[0]}")
    control_flow = show_control_flow(out)

    (tokens,) = dev[0][0]
    metadata = {"labels": ["negative", "positive"], "max_len": 256, "vocabulary": vocabulary}
    print("\n1, 2, 3, 6. written, each once it has given the model's outputs at three sizes:")
    found = write_formats(model, tokens, out, metadata)
    by_hand = show_int8_by_hand(model.layers[0].ffn[0].weight.detach())
    print("\n5. int8 by onnxruntime:")
    calibration = [{"tokens": tokens} for (tokens,), _ in train_set[:4]]
    found.update(write_int8(out / "model.onnx", calibration))

    cases = {"1 x real": [(row[None, row != 0],) for row in tokens[:8]]}  # without their padding
    for b, t in ((1, 32), (1, 256), (8, 128), (32, 32), (32, 256)):
        cases[f"{b} x {t}"] = [(torch.randint(1, len(words), (b, t)),)]
    zeros = show_zeros(model, dev, cases["32 x 256"], s.seconds)
    smaller = prune_and_tune(model, train_set, dev, s.seed)
    found.update(write_formats(smaller, tokens, out, metadata, "pruned"))
    found.update(write_int8(out / "pruned.onnx", calibration, "pruned"))

    report = compare(model, found, dev, cases, "32 x 256", s.min_agreement, s.seconds)
    print_table(report)
    best = next(row for row in report["models"] if row["name"] == report["recommended"])
    run = model if best["name"] == "eager" else load_artefact(out / best["file"])
    report["test_accuracy"] = accuracy(run, test_set)
    print(f"  on the test set, read once: {report['test_accuracy']:.2%}")
    picture = plot_rows(report, out / "accuracy_latency.png")
    print(f"open {picture}")

    report.update(control_flow=control_flow, int8_by_hand=by_hand, unstructured=zeros)
    report.update(cpu=platform.processor() or platform.machine(), torch=torch.__version__)
    report.update(settings=asdict(s), seconds=round(time.perf_counter() - start, 1))
    (out / "report.json").write_text(json.dumps(report, indent=1))
    summary = {
        "recommended": best["name"],
        "speedup": round(report["models"][0]["p50_ms"] / best["p50_ms"], 2),
        "agreement": best["agreement"],
        "test_accuracy": report["test_accuracy"],
        "report": str(out / "report.json"),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    import tyro  # the command line from Settings: names, types, defaults; the comments are the help

    sys.stdout.reconfigure(errors="replace")  # printing never ends a run, whatever the terminal's encoding
    main(tyro.cli(Settings, description=__doc__))
