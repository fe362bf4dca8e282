"""From a trained module to the fastest correct model: formats, quantization, pruning, and the evidence.

A classifier of IMDB (two layers, d_model 128) on one thread of an Intel Xeon with VNNI (torch 2.13.0), pruned
to one layer, one head and 128 neurons, as int8 ONNX: 5.7 times as fast as the original in eager PyTorch at
batch 32, length 256, 7.4 times at batch 1, in 0.24 of the size. The demo takes 50 s.

    python export.py                     # demo: trains a small classifier, exports it every way, compares
    python export.py --threads 2         # every setting is a flag

The functions above "Demo" take any nn.Module with example inputs. Which one, when:

    format        runs where                     what it costs
    TorchScript   libtorch, C++, no Python       deprecated; torch.export replaces it, AOTInductor in C++
    torch.export  PyTorch                        no faster by itself; what compilers and quantizers start from
    ONNX          onnxruntime, without PyTorch   an export that can fail; the fastest for single inputs
    int8, 4 bits  onnxruntime                    some accuracy; a quarter of the size and less
    bf16          PyTorch, on CPUs that have it  three digits of precision; the fastest for large batches
    pruning       anywhere                       accuracy, won back by fine-tuning; multiplies with the others

Not used here, since both need a C++ compiler: torch.compile(model) speeds up a model inside a running Python
process, after 10 to 20 s of compiling, so it pays in training and in servers; AOTInductor
(torch._inductor.aoti_compile_and_package) compiles a torch.export program ahead of time to one .pt2 with
machine code for this kind of CPU, which pays where a C++ program shall run without Python.

Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650 (importance of heads);
Molchanov et al., arXiv:1906.10771 (the same, of neurons); Jacob et al., arXiv:1712.05877 (int8).
Shapes: B batch, T tokens, C = d_model, H heads, D width of a head, N examples, K classes.
"""

import argparse
import contextlib
import copy
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

# -----------------------------------------------------------------------------
# What the exporters share


def write_atomically(path: Path, data: bytes) -> None:
    """Whoever reads path sees the old bytes or the new ones, whenever this process dies."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Dropout off inside; every submodule's own mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def quietly():
    """Without the exporters' warnings, log lines and dumps; what goes wrong is raised."""
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:  # one of onnxruntime's modules calls logging.basicConfig when it is imported
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)  # which also forgets what loggers have remembered meanwhile


def as_inputs(example_inputs) -> tuple:
    """Example inputs as the tuple of a call's arguments; one tensor alone is a tuple of one."""
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"example_inputs must be tensors, got {[type(x).__name__ for x in inputs]}")
    return inputs


def refused(what: str, error: Exception) -> ValueError:
    """The beginning of an exporter's error, of whichever of its many types, as one line."""
    return ValueError(f"{what}: {' '.join(str(error).split())[:200] or type(error).__name__}")


# -----------------------------------------------------------------------------
# Formats


def export_torchscript(model: nn.Module, example_inputs, path, method: str = "trace") -> Path:
    """TorchScript, by method "trace" (records one run) or "script" (compiles the source). Deprecated.

    What replaces it: torch.export (export_program below). A trace holds the operators of the example's run:
    sizes stay free, but an `if` on a tensor's value is frozen as the example took it, without an error. A
    script keeps the `if`, and refuses what its subset of Python lacks. Load with torch.jit.load(path).
    Raises ValueError where torch refuses the model, OSError where path can't be written.
    """
    if method not in ("trace", "script"):
        raise ValueError(f'method must be "trace" or "script", got "{method}"')
    inputs, buffer = as_inputs(example_inputs), io.BytesIO()
    with evaluating(model), torch.no_grad(), quietly():
        model(*inputs)  # the model's own complaint about wrong inputs comes before TorchScript's
        try:
            scripted = torch.jit.trace(model, inputs) if method == "trace" else torch.jit.script(model)
            torch.jit.save(torch.jit.freeze(scripted.eval()), buffer)
        except Exception as error:
            raise refused(f"TorchScript can't {method} {type(model).__name__}", error) from error
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def free_dimensions(inputs: tuple) -> tuple:
    """What stays free by default: the batch, the length of (B, T) integers, the rest if possible. A name is
    one size (to onnxruntime too), so each input has a length of its own: "length", "length_1", ..."""
    shapes, batch = [], next((len(x) for x in inputs if x.dim()), 0)
    for i, x in enumerate(inputs):
        shapes.append(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO))
        if x.dim() and len(x) == batch:
            shapes[-1][0] = "batch"
        if x.dim() == 2 and not x.is_floating_point():
            shapes[-1][1] = f"length_{i}" if i else "length"
    return tuple(shapes)


def capture(model: nn.Module, inputs: tuple, dynamic_shapes=None) -> torch.export.ExportedProgram:
    """The model's operators as a graph, with free sizes; ValueError where torch.export refuses."""
    if dynamic_shapes is None:
        free, shapes = torch.export.Dim.DYNAMIC, free_dimensions(inputs)  # AUTO would fix a size silently
        dynamic_shapes = tuple({i: free if isinstance(d, str) else d for i, d in x.items()} for x in shapes)
        if all(len(x) == 1 for x in inputs if x.dim()):  # 1 is taken for a constant: a batch of 1 is doubled
            inputs = tuple(torch.cat((x, x)) if x.dim() else x for x in inputs)
    with evaluating(model), torch.no_grad(), quietly():
        model(*inputs)  # the model's own complaint about wrong inputs comes first
        try:
            return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            raise refused(f"torch.export can't capture {type(model).__name__}", error) from error


def export_program(model: nn.Module, example_inputs, path, dynamic_shapes=None) -> Path:
    """A torch.export program (.pt2). Load with torch.export.load(path).module().

    It is whole or refused: an `if` on a tensor's value is an error, with torch.cond or torch.where as the way
    out. Speed is eager PyTorch's. dynamic_shapes as torch.export's; by default batch and length are free.
    Raises ValueError where torch refuses the model, OSError where path can't be written.
    """
    program, buffer = capture(model, as_inputs(example_inputs), dynamic_shapes), io.BytesIO()
    with quietly():
        torch.export.save(program, buffer)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


class OnnxAttention(TorchFunctionMode):
    """Inside, F.scaled_dot_product_attention is what ONNX's Attention (opset 23) computes right and fast.

    In onnxruntime a mask must have all its rows, (..., Tq, Tk), takes as long as all the rest, and leaves
    the mean of the values in a row that may attend to nothing, where torch has 0. So a mask of keys alone,
    (..., 1, Tk), becomes one more feature: 1 in every query, hugely negative in a masked key.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_attention = function is F.scaled_dot_product_attention
        return (self.attention if is_attention else function)(*args, **(kwargs or {}))

    @staticmethod
    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *args, **kwargs):
        q, k, v = query, key, value  # torch's names: a caller may use them
        attention = F.scaled_dot_product_attention
        if attn_mask is None:
            return attention(q, k, v, None, *args, **kwargs)
        if attn_mask.dtype == torch.bool and attn_mask.size(-2) == 1:
            if kwargs.get("scale") is None:
                kwargs["scale"] = q.size(-1) ** -0.5  # that of D, not of D + 1
            hidden = torch.zeros_like(attn_mask, dtype=k.dtype)  # (..., 1, Tk)
            hidden = hidden.masked_fill(~attn_mask, torch.finfo(k.dtype).min / 4).transpose(-2, -1)
            k = torch.cat((k, hidden.expand(*k.shape[:-1], 1)), -1)  # (B, H, Tk, D + 1)
            q = torch.cat((q, torch.ones_like(q[..., :1])), -1)  # (B, H, Tq, D + 1)
            y = attention(q, k, v, None, *args, **kwargs)
        else:
            rows = attn_mask.expand(*attn_mask.shape[:-2], q.size(-2), k.size(-2))  # (..., Tq, Tk)
            y = attention(q, k, v, rows, *args, **kwargs)
        is_empty = attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask == -math.inf
        return y.masked_fill(is_empty.all(-1, keepdim=True), 0.0)  # (B, H, Tq, Dv)


OPSETS = range(18, 26)  # what the exporter writes and onnxruntime 1.32 runs


def export_onnx(model: nn.Module, example_inputs, path, dynamic_shapes=None, metadata=None, opset=23) -> Path:
    """One ONNX file, batch and length free, checked, with metadata inside; runs wherever onnxruntime does.

    The inputs are named as forward's arguments are, the output "output". metadata (labels, max_len, a
    vocabulary: what a user of the file needs) is stored as JSON; to read it:
    json.loads(session.get_modelmeta().custom_metadata_map[name]). From opset 23 on, attention is one
    operator, faster than its parts in earlier ones. The file is written once it has given the example's
    output in onnxruntime. Raises ValueError for a model that is refused or differs, OSError from the disk.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset must be in {OPSETS.start} .. {OPSETS.stop - 1}, got {opset}")
    inputs, texts = as_inputs(example_inputs), {}
    for key, value in (metadata or {}).items():
        try:
            texts[key] = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata: {key} can't be written as JSON: {error}") from error
    with evaluating(model), torch.no_grad():
        expected = model(*inputs)
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        raise ValueError(f"the model must return one tensor of floats, got {type(expected).__name__}")
    with OnnxAttention() if opset >= 23 else contextlib.nullcontext():
        program = capture(model, inputs, dynamic_shapes)
    options = {"output_names": ["output"], "opset_version": opset, "dynamo": True, "verbose": False}
    options["input_names"] = list(inspect.signature(model.forward).parameters)[: len(inputs)]
    options["dynamic_shapes"] = dynamic_shapes or free_dimensions(inputs)  # for the names in it
    try:
        with quietly():
            graph = torch.onnx.export(program, **options).model_proto
    except Exception as error:
        raise refused(f"ONNX can't express {type(model).__name__}", error) from error
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.value_info):
        part.ClearField("metadata_props")  # stack traces: half of a small file, and paths of this machine
    for key, value in texts.items():
        graph.metadata_props.add(key=key, value=value)
    data = checked_bytes(graph)
    try:
        output = onnx_runner(data)(*inputs)
    except Exception as error:
        raise refused(f"onnxruntime can't run the graph of {type(model).__name__}", error) from error
    difference = (output - expected).where(output != expected, 0.0).abs().max().item()  # inf equals inf
    if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):  # also NaN
        raise ValueError(f"the ONNX graph of {type(model).__name__} differs from it by {difference:.1e}")
    write_atomically(Path(path), data)
    return Path(path)


def checked_bytes(graph) -> bytes:
    """The bytes of an ONNX graph that passed the checker, shape inference, and onnxruntime's loader."""
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)  # full: with shape inference
        data = graph.SerializeToString()
        onnx_runner(data)
    except Exception as error:
        raise refused("the ONNX graph is not valid", error) from error
    return data


def onnx_runner(model: bytes | str | Path, threads: int = 1) -> Callable[..., Tensor]:
    """An ONNX file, or its bytes, as a function of tensors on `threads` threads of the CPU.

    Without onnxruntime's one kernel for sum and norm: it takes five times as long as the two.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    model = model if isinstance(model, bytes) else str(model)
    rest = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["SkipLayerNormFusion"]}
    session = onnxruntime.InferenceSession(model, options, **rest)
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def load_artefact(path, threads: int = 1) -> Callable[..., Tensor]:
    """Whatever the functions above wrote, as a function of tensors; .onnx, .pt2 or .ts tells what it is.

    PyTorch's formats run on torch.get_num_threads() threads, whatever threads says. Raises ValueError for
    another or a damaged file, OSError where there is none.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2", ".ts"):
        raise ValueError(f"a file ends in .onnx, .pt2 or .ts, got {path}")
    data = path.read_bytes()
    try:
        with quietly():
            if path.suffix == ".onnx":
                return onnx_runner(data, threads)
            if path.suffix == ".pt2":
                return torch.export.load(io.BytesIO(data)).module()
            return torch.jit.load(io.BytesIO(data))
    except Exception as error:
        raise refused(f"{path} is damaged", error) from error


# -----------------------------------------------------------------------------
# Quantization


def needs_reduced_range() -> bool:
    """Whether int8 products saturate on this CPU without a word: x86 without VNNI adds pairs in 16 bits."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx2")) and not (cpu.get("avx512_vnni") or cpu.get("avx_vnni"))


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; others emulate it, several times slower than fp32."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))


MATRICES = ["MatMul", "Gemm"]  # named, since the default takes the Attention operator too, and breaks it


def int8_options(per_channel: bool, embedding_bits: int, reduce_range: bool | None) -> dict:
    """What dynamic and static quantization share, as onnxruntime's quantizers take it."""
    from onnxruntime.quantization import QuantType

    if embedding_bits not in (4, 8, 32):
        raise ValueError(f"embedding_bits must be 4, 8 or 32, got {embedding_bits}")
    return {
        "op_types_to_quantize": MATRICES + ["Gather"] * (embedding_bits < 32),
        "per_channel": per_channel,
        "reduce_range": needs_reduced_range() if reduce_range is None else reduce_range,
        "weight_type": QuantType.QInt8,
    }


def quantize_dynamic(onnx_path, path, per_channel=True, embedding_bits=32, reduce_range=None) -> Path:
    """int8 weights; activations are scaled anew in each run, so that no calibration is needed.

    What it is for: models made of matrix products (Transformers) on a CPU. Products with constant weights are
    quantized; attention, softmax and norms stay fp32. per_channel: a scale for each output instead of each
    matrix, closer and as fast. embedding_bits: 32 leaves embeddings alone, 8 makes them int8 (one scale), 4
    packs two values a byte (a scale for each 32 values; narrower tables are int8); that is for size, not
    speed. reduce_range (7 bits) is by default what needs_reduced_range() says. Metadata stays. Raises
    ValueError; OSError from the disk.
    """
    from onnxruntime.quantization import quantize_dynamic as quantize

    options = int8_options(per_channel, embedding_bits, reduce_range)
    return quantized(onnx_path, path, partial(quantize, **options), embedding_bits)


def quantize_static(
    onnx_path, path, calibration: Iterable[dict], per_channel=True, embedding_bits=32, reduce_range=None
) -> Path:
    """int8 weights, and int8 activations whose ranges are fixed beforehand, on real inputs.

    calibration: an iterable of input dicts, name -> tensor or array, as a session takes them; a hundred real
    inputs are enough, random ones are not. What it is for: devices that can't rescale. A Transformer's ranges
    differ from input to input, so dynamic quantization is closer. The rest as in quantize_dynamic. Raises
    ValueError for an empty calibration or wrong names, OSError from the disk.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    feeds = [{name: np.asarray(x) for name, x in inputs.items()} for inputs in calibration]
    if not feeds:
        raise ValueError("calibration must hold at least one dict of inputs, got none")
    expected = [x.name for x in read_graph(onnx_path).graph.input]
    for feed in feeds:
        if sorted(feed) != sorted(expected):
            raise ValueError(f"calibration must give the inputs {expected}, got {list(feed)}")

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rest = iter(feeds)

        def get_next(self):
            return next(self.rest, None)

    options = int8_options(per_channel, embedding_bits, reduce_range)
    options |= {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
    options["calibration_data_reader"] = Reader()
    return quantized(onnx_path, path, partial(quantize, **options), embedding_bits)


def read_graph(onnx_path):
    """The ONNX graph in a file; ValueError where there is none in it, OSError where there is no file."""
    import onnx

    try:
        return onnx.load(onnx_path)
    except OSError:
        raise
    except Exception as error:
        raise refused(f"{onnx_path} is not an ONNX file", error) from error


def quantized(onnx_path, path, quantize: Callable, embedding_bits: int) -> Path:
    """Packs embeddings, runs onnxruntime's quantizer, keeps the metadata, checks, only then writes path."""
    graph = read_graph(onnx_path)
    metadata = list(graph.metadata_props)
    try:
        with tempfile.TemporaryDirectory() as folder, quietly():
            source, target = Path(folder, "source.onnx"), Path(folder, "int8.onnx")
            packed = with_packed_embeddings(graph) if embedding_bits == 4 else graph
            source.write_bytes(packed.SerializeToString())
            quantize(source, target)
            graph = read_graph(target)
    except OSError:  # a full disk
        raise
    except Exception as error:
        raise refused(f"onnxruntime can't quantize {onnx_path}", error) from error
    del graph.metadata_props[:]
    graph.metadata_props.extend(metadata)
    write_atomically(Path(path), checked_bytes(graph))
    return Path(path)


BLOCK = 32  # values that share a scale and a zero point in a 4-bit table


def with_packed_embeddings(graph):
    """The ONNX graph with 4-bit embedding tables; those of fewer than BLOCK columns stay: with a scale and a
    zero point a row, one column would take 5 bytes."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    columns = {table.name: table.dims[1] for table in graph.graph.initializer if len(table.dims) == 2}
    lookups = [node for node in graph.graph.node if node.op_type == "Gather"]
    narrow = [node.name for node in lookups if columns.get(node.input[0], 0) < BLOCK]
    options = {"bits": 4, "block_size": BLOCK, "op_types_to_quantize": ("Gather",)}
    quantizer = MatMulNBitsQuantizer(graph, nodes_to_exclude=narrow, **options)
    quantizer.process()
    return quantizer.model.model


def to_bfloat16(model: nn.Module) -> nn.Module:
    """A copy in bf16: half the bytes, 8 instead of 24 bits of precision; takes integers or bf16 as inputs.

    Export it with export_program. Raises ValueError on a CPU without bf16, where it would be slow.
    """
    if not has_bf16():
        raise ValueError("this CPU has no bf16 arithmetic (avx512_bf16, amx_bf16); use int8 instead")
    return copy.deepcopy(model).bfloat16()


# -----------------------------------------------------------------------------
# Pruning


def prune_unstructured(model: nn.Module, amount: float) -> nn.Module:
    """A copy in which the smallest `amount` (0 .. 1) of all weights of Linear and Conv layers are 0.

    Magnitudes are ranked over all layers together. Zeros alone bring no speed: a dense product multiplies
    by them like by any other number, and torch's sparse product is slower still at 90% zeros.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in 0 .. 1, got {amount}")
    model = copy.deepcopy(model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv layer to prune")
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=float(amount))
    for layer in layers:
        prune.remove(layer, "weight")  # the zeros into the weight itself, without a mask beside it
    return model


# Structured: heads and neurons that are gone for real. A convention says where they are:
# - an attention is a module with n_heads, qkv_proj (Linear to q, k, v of all heads, each H * D wide) and
#   out_proj (Linear from H * D), called as attention(x, mask), with plain softmax attention between the two;
# - a feed-forward net is an nn.Sequential of Linear, functions of single elements, Linear.


class SelfAttention(nn.Module):
    """Attention with as many heads as qkv_proj has room for, H * D <= C. x (B, T, C) to (B, T, C)."""

    def __init__(self, qkv_proj: nn.Linear, out_proj: nn.Linear, n_heads: int):
        super().__init__()
        self.qkv_proj, self.out_proj, self.n_heads = qkv_proj, out_proj, n_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def attentions(model: nn.Module, needed: bool = True) -> dict[str, nn.Module]:
    """name -> attention, by the convention above. Raises ValueError where there is none that is needed, and
    for one that two modules share: it can't be replaced in one of them."""
    parts = ("n_heads", "qkv_proj", "out_proj")
    found = {name: m for name, m in model.named_modules() if all(hasattr(m, part) for part in parts)}
    if needed and not found:
        raise ValueError(f"{type(model).__name__} has no attention (a module with {', '.join(parts)})")
    places = [child for parent in model.modules() for child in parent._modules.values()]
    for name, m in found.items():
        if sum(m is child for child in places) > 1:
            raise ValueError(f"{name} stands in two places of {type(model).__name__}")
    return found


def feed_forwards(model: nn.Module, needed: bool = True) -> dict[str, nn.Sequential]:
    """name -> feed-forward net, by the convention above. Raises ValueError where there is none that is
    needed."""

    def is_one(m: nn.Module) -> bool:
        if not isinstance(m, nn.Sequential) or len(m) < 3:
            return False
        ends = isinstance(m[0], nn.Linear) and isinstance(m[-1], nn.Linear)
        between = nn.Sequential(*list(m)[1:-1])  # not m[1:-1]: a subclass may be made otherwise
        ends = ends and m[0].out_features == m[-1].in_features and not list(between.parameters())
        return ends and is_of_single_elements(between, m[0].weight)

    found = {name: m for name, m in model.named_modules() if is_one(m)}
    if needed and not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward net (Sequential: Linear, ..., Linear)")
    return found


def is_of_single_elements(function: nn.Module, weight: Tensor) -> bool:
    """Whether a neuron's value comes from that neuron alone (not of a Softmax): checked on a few numbers."""
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)  # (2, d_ff)
    with evaluating(function), torch.no_grad():
        try:
            return torch.allclose(function(x)[:, ::2], function(x[:, ::2]), rtol=1e-3, atol=1e-4)
        except (IndexError, RuntimeError):  # it makes another shape
            return False


def head_importance(model: nn.Module, batches: Iterable, loss: Callable | None = None) -> dict[str, Tensor]:
    """What the loss would lose without each head: |sum of x * dloss/dx| over it, mean over examples (Michel).

    batches: an iterable of (inputs, targets). loss(outputs, targets): a sum over examples; default the summed
    cross-entropy. Returns attention's name -> (H,).
    """
    found = attentions(model)
    widths = {name: m.out_proj.in_features // m.n_heads for name, m in found.items()}
    return importance(model, {name: m.out_proj for name, m in found.items()}, widths, batches, loss)


def neuron_importance(model: nn.Module, batches: Iterable, loss: Callable | None = None) -> dict[str, Tensor]:
    """The same for each neuron of the feed-forward nets (Molchanov). Returns net's name -> (d_ff,)."""
    readers = {name: net[-1] for name, net in feed_forwards(model).items()}
    return importance(model, readers, dict.fromkeys(readers, 1), batches, loss)


def importance(model: nn.Module, readers: dict[str, nn.Linear], widths: dict, batches, loss) -> dict:
    """First-order change of the loss if a group of `width` inputs of a Linear were 0: name -> (groups,)."""
    loss = loss or partial(F.cross_entropy, reduction="sum")
    seen: dict[str, list[Tensor]] = {name: [] for name in readers}
    n_examples, totals = 0, {name: torch.zeros(m.in_features // widths[name]) for name, m in readers.items()}

    def keep_input(name: str, _module, inputs: tuple) -> None:  # a module may be called several times
        seen[name].append(inputs[0].requires_grad_())  # which it has, unless all weights are frozen

    hooks = [m.register_forward_pre_hook(partial(keep_input, name)) for name, m in readers.items()]
    try:
        with evaluating(model), torch.enable_grad():
            for inputs, targets in batches:
                value = loss(model(*as_inputs(inputs)), targets)
                gradients = iter(torch.autograd.grad(value, sum(seen.values(), []), materialize_grads=True))
                for name, xs in seen.items():
                    groups = torch.zeros(())
                    for x in xs:
                        change = x.detach() * next(gradients)  # (B, features) or (B, ..., features)
                        change = change.reshape(len(x), -1, x.size(-1)).sum(1)  # (B, features)
                        groups = groups + change.unflatten(1, (-1, widths[name])).sum(2).cpu()  # (B, groups)
                    totals[name] += groups.abs().sum(0)
                    xs.clear()
                n_examples += len(targets)
    finally:
        for hook in hooks:
            hook.remove()
    if not n_examples:
        raise ValueError("batches must hold at least one (inputs, targets), got none")
    return {name: total / n_examples for name, total in totals.items()}


def prune_heads(model: nn.Module, importance: dict[str, Tensor], keep: int) -> nn.Module:
    """A copy whose attentions have their `keep` most important heads alone, and smaller matrices.

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
    """A copy whose feed-forward nets have their `keep` most important inner neurons alone. As prune_heads."""
    model = copy.deepcopy(model)
    for name, net in feed_forwards(model).items():
        scores = importance.get(name, ())
        shrink(net, most_important(f"neurons of {name}", scores, net[0].out_features, keep))
    return model


def load_pruned(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """An unpruned model's copy with sizes and weights of a pruned one's state dict, or ValueError."""
    model = copy.deepcopy(model)
    try:
        for name, attention in attentions(model, needed=False).items():
            width = attention.out_proj.in_features // attention.n_heads
            kept = torch.arange(state[f"{name}.out_proj.weight"].size(1) // width)
            model.set_submodule(name, smaller_attention(attention, kept))
        for name, net in feed_forwards(model, needed=False).items():
            shrink(net, torch.arange(state[f"{name}.0.weight".removeprefix(".")].size(0)))  # "": the model
        model.load_state_dict(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise refused(f"this is no state dict of a pruned {type(model).__name__}", error) from error
    return model


def most_important(what: str, scores: Tensor, n: int, keep: int) -> Tensor:
    """Indices (keep,) of the largest scores (n,), in ascending order."""
    if len(scores) != n or not 1 <= keep <= n:
        got = f"{keep}, {len(scores)} scores"
        raise ValueError(f"{what}: keep must be in 1 .. {n}, with {n} scores, got {got}")
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def smaller_attention(attention: nn.Module, kept: Tensor) -> SelfAttention:
    """The attention with these heads (kept,) alone; ValueError if it does more than SelfAttention does."""
    n_heads, width = attention.n_heads, attention.out_proj.in_features // attention.n_heads
    smaller = SelfAttention(attention.qkv_proj, attention.out_proj, n_heads).train(attention.training)
    weight = attention.qkv_proj.weight
    x = torch.randn(2, 5, weight.size(1), generator=torch.Generator().manual_seed(0)).to(weight)  # (B, T, C)
    mask = torch.tensor([5, 3], device=x.device)[:, None, None, None] > torch.arange(5, device=x.device)
    with evaluating(attention), evaluating(smaller), torch.no_grad():
        try:
            same = torch.allclose(attention(x, mask), smaller(x, mask), rtol=1e-3, atol=1e-4)
        except (TypeError, RuntimeError):
            same = False
    if not same:
        raise ValueError(f"{type(attention).__name__} is not plain softmax attention of (x, mask)")
    columns = (kept[:, None] * width + torch.arange(width)).flatten()  # (H' * D,) of out_proj's inputs
    keep_outputs(smaller.qkv_proj, torch.cat([columns + part * n_heads * width for part in range(3)]))
    keep_inputs(smaller.out_proj, columns)
    smaller.n_heads = len(kept)
    return smaller


def shrink(net: nn.Sequential, kept: Tensor) -> None:
    """Keep these neurons between the first and the last layer of net."""
    keep_outputs(net[0], kept)
    keep_inputs(net[-1], kept)


def keep_outputs(linear: nn.Linear, rows: Tensor) -> None:
    """Keep these rows of the weight and the bias."""
    linear.weight = nn.Parameter(linear.weight.detach()[rows])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[rows])
    linear.out_features = len(rows)


def keep_inputs(linear: nn.Linear, columns: Tensor) -> None:
    """Keep these columns of the weight."""
    linear.weight = nn.Parameter(linear.weight.detach()[:, columns].contiguous())
    linear.in_features = len(columns)


# -----------------------------------------------------------------------------
# The evidence: latency, size, memory, accuracy, side by side


def benchmark(
    runners: dict[str, Callable], cases: dict[str, list[tuple]], seconds: float = 1.0, threads: int = 1
) -> dict[str, dict[str, dict]]:
    """Latency of every runner on every case, in alternating rounds, so that a busy moment hits all of them.

    runners: name -> function of tensors. cases: name -> list of inputs; a case of several inputs (real texts
    of several lengths) is timed input by input. A case has one round to warm up, then rounds until `seconds`
    a runner are spent, 5 at least; in a round, of an order drawn anew, each runner takes each input once,
    after a call that isn't timed (the others have filled the caches, and a server runs one model). PyTorch is
    held to `threads` threads; give the same number to load_artefact. Returns runner -> case -> {rounds,
    p50_ms, p90_ms, p99_ms of a call, throughput in examples a second}.
    """
    draw, before, results = random.Random(0), torch.get_num_threads(), {name: {} for name in runners}
    torch.set_num_threads(threads)
    try:
        for case, batches in cases.items():
            order, times = list(runners), {name: [] for name in runners}
            rounds, until = -1, math.inf  # round -1 is the warm-up
            while rounds < 5 or time.perf_counter() < until:
                draw.shuffle(order)
                for name in order:
                    timed(runners[name], batches[0])
                    times[name] += [timed(runners[name], inputs) for inputs in batches]
                rounds += 1
                if rounds == 0:
                    times = {name: [] for name in runners}
                    until = time.perf_counter() + seconds * len(runners)
            n_examples = rounds * sum(len(inputs[0]) for inputs in batches)
            for name in runners:
                results[name][case] = {"rounds": rounds} | latency(times[name], n_examples)
    finally:
        torch.set_num_threads(before)
    return results


@torch.no_grad()
def timed(run: Callable, inputs: tuple) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run(*inputs)
    return time.perf_counter() - start


def latency(seconds: list[float], n_examples: int) -> dict[str, float]:
    """Percentiles of the seconds of many calls, in ms, and examples a second."""
    p50, p90, p99 = (round(1000 * float(p), 3) for p in np.percentile(seconds, (50, 90, 99)))
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "throughput": round(n_examples / sum(seconds), 1)}


@torch.no_grad()
def outputs_on(run: Callable, evaluation: list) -> Tensor:
    """Logits (N, K) for evaluation, a list of (inputs, labels)."""
    return torch.cat([run(*as_inputs(inputs)).float() for inputs, _ in evaluation])


# What a deployment does: load the file and answer, in a process that has none of the project's code. VmHWM is
# the process's own peak; Linux's ru_maxrss would be its parent's where that was larger.
FRESH = """
import json, sys, time
import numpy as np
path, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
inputs = list(np.load(folder + "/inputs.npz").values())
if path.endswith(".onnx"):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    names = [x.name for x in session.get_inputs()]
    output = session.run(None, dict(zip(names, inputs)))[0]
else:
    import warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(threads)
    inputs = [torch.from_numpy(x) for x in inputs]
    start = time.perf_counter()
    model = torch.jit.load(path) if path.endswith(".ts") else torch.export.load(path).module()
    loaded = time.perf_counter()
    with torch.no_grad():
        output = model(*inputs).float().numpy()
np.save(folder + "/output.npy", output)
try:
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
except OSError:  # macOS, in bytes
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"load_seconds": round(loaded - start, 3), "peak_mb": round(peak)}))
"""


def in_a_fresh_process(path, inputs: tuple, threads: int = 1) -> tuple[dict, Tensor]:
    """({load_seconds, peak_mb}, output) of the artefact in a process without the project's files on its path.

    load_seconds: the file alone, not the import of its runtime; peak_mb: with the runtime, after one call.
    Raises RuntimeError where it fails there.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "inputs.npz"), *(x.numpy() for x in inputs))
        command = [sys.executable, "-c", FRESH, str(Path(path).resolve()), folder, str(threads)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if result.returncode:
            why = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise RuntimeError(f"{path} fails in a fresh process: {why}")
        return json.loads(result.stdout), torch.from_numpy(np.load(Path(folder, "output.npy")))


def export_all(
    models: dict[str, nn.Module],
    example_inputs,
    evaluation: list,
    cases: dict[str, list[tuple]],
    calibration: list[dict],
    out,
    metadata: dict | None = None,
    threads: int = 1,
    seconds: float = 1.0,
    max_loss: float = 0.005,
) -> dict:
    """Writes every format of the models into the folder `out`, measures them side by side, recommends one.

    models: name -> classifier; the first is the original, which all rows are compared with and which is
    exported every way; the others (pruned ones) in bf16 and as ONNX, fp32 and int8. evaluation: a list of
    (inputs, labels). cases: as benchmark takes them; the one with the largest input gives the rows' headline.
    calibration: as quantize_static takes it. max_loss: what accuracy the recommended model may lose.
    Returns {"models": rows, "refused": name -> why, "recommended": name, "threads", "headline", "max_loss"}.
    """
    if not (models and evaluation and cases and 0 <= max_loss <= 1):
        raise ValueError(f"models, evaluation and cases must hold something, max_loss (0 .. 1) is {max_loss}")
    Path(out).mkdir(parents=True, exist_ok=True)
    original = next(iter(models.values()))
    files, refusals = write_artefacts(models, example_inputs, calibration, Path(out), metadata)
    labels = torch.cat([labels for _, labels in evaluation])
    headline = max(cases, key=lambda case: max(inputs[0].numel() for inputs in cases[case]))
    with evaluating(original):
        runners = {"eager": original} | {n: load_artefact(files[n], threads) for n in files if n != "eager"}
        expected, timings = outputs_on(original, evaluation), benchmark(runners, cases, seconds, threads)
        rows = []
        for name, run in runners.items():
            outputs = outputs_on(run, evaluation)
            row = {"name": name, "file": files[name].name, "size_bytes": files[name].stat().st_size}
            row["accuracy"] = share(outputs.argmax(-1) == labels)
            row["agreement"] = share(outputs.argmax(-1) == expected.argmax(-1))
            row["max_abs_diff"] = float(f"{(outputs - expected).abs().max().item():.2g}")
            row["batch"], row["seq_len"], *_ = (*cases[headline][0][0].shape, None)  # None: of vectors
            row |= timings[name][headline] | {"latency": timings[name]}
            if name != "eager":
                row |= in_a_fresh_process(files[name], cases[headline][0], threads)[0]
            rows.append(row)
    report = {"models": rows, "refused": refusals, "threads": threads, "headline": headline}
    return report | {"recommended": recommended(rows, max_loss)["name"], "max_loss": max_loss}


def write_artefacts(models: dict, example_inputs, calibration, out: Path, metadata) -> tuple[dict, dict]:
    """(name -> file, name -> why not) of every format that takes the models."""
    original, files, refusals = next(iter(models.values())), {}, {}
    stems = {label: "model" if i == 0 else label.replace(" ", "_") for i, label in enumerate(models)}
    if len(set(stems.values())) < len(stems):
        raise ValueError(f"models: these labels would share a file: {', '.join(models)}")

    def attempt(name: str, write: Callable, *arguments, **options) -> bool:
        try:
            files[name] = write(*arguments, **options)
        except ValueError as error:
            refusals[name] = str(error)
        return name in files

    attempt("eager", save_weights, original, out / "weights.pt")
    for method in ("trace", "script"):
        path = out / f"{method}.ts"
        attempt(f"TorchScript, {method}", export_torchscript, original, example_inputs, path, method)
    attempt("torch.export", export_program, original, example_inputs, out / "program.pt2")
    for label, model in models.items():
        prefix = "" if model is original else f"{label}, "
        stem = stems[label]
        attempt(
            f"{prefix}torch.export, bf16", export_bfloat16, model, example_inputs, out / f"{stem}.bf16.pt2"
        )
        fp32 = out / f"{stem}.onnx"
        if not attempt(f"{prefix}ONNX", export_onnx, model, example_inputs, fp32, metadata=metadata):
            continue
        attempt(f"{prefix}ONNX int8", quantize_dynamic, fp32, out / f"{stem}.int8.onnx")
        for bits in (8, 4):
            name, path = f"{prefix}ONNX int8, embeddings {bits} bits", out / f"{stem}.int8.e{bits}.onnx"
            attempt(name, quantize_dynamic, fp32, path, embedding_bits=bits)
        if model is original:
            attempt("ONNX int8, static", quantize_static, fp32, out / f"{stem}.static.onnx", calibration)
    return files, refusals


def export_bfloat16(model: nn.Module, example_inputs, path) -> Path:
    """to_bfloat16's copy as a torch.export program. Raises ValueError for inputs of floats: float32 ones."""
    if any(x.is_floating_point() for x in as_inputs(example_inputs)):
        raise ValueError("inputs of floats: call to_bfloat16 and convert them, too")
    return export_program(to_bfloat16(model), example_inputs, path)


def save_weights(model: nn.Module, path: Path) -> Path:
    """The state dict alone, written atomically."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    write_atomically(path, buffer.getvalue())
    return path


def share(right: Tensor) -> float:
    """Mean of booleans, five digits."""
    return round(right.double().mean().item(), 5)


def recommended(rows: list[dict], max_loss: float) -> dict:
    """The fastest row, by p50 at the headline, whose accuracy is at most max_loss below the first row's."""
    accurate = [row for row in rows if row["accuracy"] >= round(rows[0]["accuracy"] - max_loss, 9)]
    return min(accurate, key=lambda row: row["p50_ms"])


def print_table(report: dict) -> None:
    """The rows of export_all's report, and the recommendation in words."""
    rows, cases = report["models"], list(report["models"][0]["latency"])
    width = max(len(row["name"]) for row in rows)
    print(f"\n{'':{width}s}   size kB  accuracy  same label  max |dlogit|   load s  peak MB")
    for row in rows:
        load, peak = row.get("load_seconds", "-"), row.get("peak_mb", "-")
        print(
            f"{row['name']:{width}s}{row['size_bytes'] / 1000:10,.0f}{row['accuracy']:10.2%}"
            f"{row['agreement']:12.2%}{row['max_abs_diff']:14.1e}{load:>9}{peak:>9}"
        )
    print(f"\np50 of a call in ms, {report['threads']} thread(s), alternating; batch x tokens:")
    print(f"{'':{width}s}" + "".join(f"{case:>10s}" for case in cases))
    for row in rows:
        times = "".join(f"{row['latency'][case]['p50_ms']:10.2f}" for case in cases)
        print(f"{row['name']:{width}s}{times}")
    for name, why in report["refused"].items():
        print(f"not possible: {name}: {why}")
    best = next(row for row in rows if row["name"] == report["recommended"])
    speed, size = rows[0]["p50_ms"] / best["p50_ms"], best["size_bytes"] / rows[0]["size_bytes"]
    points = 100 * (best["accuracy"] - rows[0]["accuracy"])
    print(f"recommended: {best['name']}: {speed:.1f} times as fast as eager PyTorch at {report['headline']},")
    print(f"  {size:.2f} of its size, accuracy {points:+.2f} points (may lose {100 * report['max_loss']:g})")


def plot_rows(report: dict, path: str | Path) -> Path:
    """Accuracy against latency, a point a model, its area the size of the file."""
    from matplotlib import colormaps  # only the picture needs it
    from matplotlib.figure import Figure

    rows, fig, png = report["models"], Figure(figsize=(9, 4.2), layout="constrained"), io.BytesIO()
    axes = fig.subplots()
    largest = max(row["size_bytes"] for row in rows)
    for i, row in enumerate(rows):
        area, color = 500 * row["size_bytes"] / largest, colormaps["tab20"](i)
        point = (row["p50_ms"], 100 * row["accuracy"])
        label = f"{i + 1}  {row['name']}, {row['size_bytes'] / 1000:,.0f} kB"
        axes.scatter(*point, s=area, color=color, alpha=0.7, edgecolors="k", linewidths=0.5, label=label)
        offset = (0, (12, -20, 24, -32)[i % 4])  # by turns, so that neighbours' numbers stay apart
        axes.annotate(str(i + 1), point, offset, textcoords="offset points", ha="center", fontsize=8)
    low, high = (100 * f(row["accuracy"] for row in rows) for f in (min, max))
    axes.set_xlim(left=0)
    axes.set_ylim(low - 0.5, high + 0.5)
    axes.set(xlabel=f"p50 latency of a batch, {report['headline']} (ms)", ylabel="accuracy (%)")
    axes.set_title(f"Accuracy against latency, {report['threads']} thread(s); area: size of the file")
    axes.grid(alpha=0.3)
    fig.legend(loc="outside right upper", fontsize=8, markerscale=0.5)
    fig.savefig(png, format="png", dpi=110)
    write_atomically(Path(path), png.getvalue())
    return Path(path)


# -----------------------------------------------------------------------------
# Demo: a small classifier of generated sentences, in which "but" decides which half counts and "not" turns it


def setting(default, reason: str):
    return field(default=default, metadata={"help": reason})


@dataclass
class Settings:
    n_train: int = setting(4000, "generated sentences to learn from")
    n_test: int = setting(1000, "other sentences, on which all formats are compared")
    epochs: int = setting(3, "passes over the training sentences; fine-tuning after pruning: one")
    threads: int = setting(1, "threads of every model compared")
    seconds: float = setting(0.08, "benchmark time a model and size; p99 needs more than a demo's")
    max_loss: float = setting(0.005, "share of accuracy that the recommended model may lose")
    out: str = setting("out/export", "artefacts, picture and report.json go here")
    seed: int = setting(0, "same seed, same sentences and weights")


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + ffn(norm(x)). x (B, T, C)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int):
        super().__init__()
        self.self_attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        projections = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.self_attention = SelfAttention(*projections, n_heads)
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
        self.register_buffer("positions", positions, persistent=False)
        self.layers = nn.ModuleList(Layer(d_model, n_heads, d_ff) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0  # (B, T)
        x = self.embedding(tokens) + self.positions[: tokens.size(1)]  # (B, T, C)
        for layer in self.layers:
            x = layer(x, real[:, None, None, :])
        x = self.norm(x) * real[:, :, None]
        return self.head(x.sum(1) / real.sum(1, keepdim=True).clamp(min=1))  # padding alone: the head's bias


GOOD, BAD = "clever gripping fresh superb warm".split(), "dull lifeless stale awful tedious".split()
NOUNS = "plot acting music script ending cast".split()
ASIDES = ["on a rainy evening", "as my neighbour said", "whatever the poster says", "to be fair"]
ASIDES += ["late at night"]


def generate_sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """n (sentence, label), 1 = positive; no sentence twice."""
    rng, sentences = random.Random(seed), {}
    while len(sentences) < n:
        clauses, labels = [], []
        for _ in range(rng.choice((1, 2, 2, 2))):
            label, negated = rng.randrange(2), rng.randrange(2)
            words = [f"the {rng.choice(NOUNS)} was", *["not"] * negated, rng.choice(GOOD if label else BAD)]
            asides = rng.sample(ASIDES, rng.randrange(3))
            clauses.append(" ".join(asides + words))
            labels.append(label ^ negated)
        sentences[" but ".join(clauses)] = labels[-1]  # what comes after "but" is what is meant
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
    order, steps = random.Random(seed), epochs * len(batches)
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


def accuracy(model: nn.Module, batches: list) -> float:
    """Share of right labels, over batches of ((tokens,), labels)."""
    return share(outputs_on(model.eval(), batches).argmax(-1) == torch.cat([labels for _, labels in batches]))


class Gate(nn.Module):
    """Control flow that depends on data: doubles x where its sum is positive, else negates it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return 2 * x
        return -x


class GateWithoutIf(nn.Module):
    """The same for torch.export: both sides are computed, and one is chosen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum() > 0, 2 * x, -x)


def show_control_flow(out: Path) -> dict[str, str]:
    """Captured with a positive example, asked about a negative one: who is right?"""
    positive, negative, found = torch.ones(2, 3), -torch.ones(2, 3), {}
    for name, module, write, arguments in (
        ("TorchScript, trace", Gate(), export_torchscript, (out / "gate_trace.ts", "trace")),
        ("TorchScript, script", Gate(), export_torchscript, (out / "gate_script.ts", "script")),
        ("torch.export", Gate(), export_program, (out / "gate.pt2",)),
        ("torch.export, torch.where", GateWithoutIf(), export_program, (out / "gate.pt2",)),
    ):
        try:
            run = load_artefact(write(module, (positive,), *arguments))
            found[name] = "right" if torch.equal(run(negative), Gate()(negative)) else "wrong, without a word"
        except ValueError:
            found[name] = "refused"
    print("\nan `if` on a tensor's value, seen by the formats (TorchScript is deprecated for torch.export):")
    for name, what in found.items():
        print(f"  {name:27s}{what}")
    return found


def show_unstructured(model: nn.Module, test_set: list, case: list, s: Settings) -> list[dict]:
    """Accuracy over sparsity, and the time of dense and sparse models side by side."""
    pruned = {f"{amount:.0%} zeros": prune_unstructured(model, amount) for amount in (0, 0.3, 0.5, 0.7, 0.9)}
    times, rows = benchmark(pruned, {"": case}, s.seconds, s.threads), []
    print("\nsmallest weights set to 0, without fine-tuning:")
    for name, candidate in pruned.items():
        row = {"name": name, "accuracy": accuracy(candidate, test_set), "p50_ms": times[name][""]["p50_ms"]}
        print(f"  {name:10s} accuracy {row['accuracy']:7.2%}   p50 {row['p50_ms']:6.2f} ms")
        rows.append(row)
    print("  zeros alone bring no speed; smaller matrices do:")
    return rows


def show_structured(model: nn.Module, train_set: list, test_set: list, seed: int) -> nn.Module:
    """The model with half of its heads and a quarter of its inner neurons, fine-tuned for an epoch."""
    heads = head_importance(model, train_set[:10])
    smaller = prune_heads(model, heads, keep=model.layers[0].self_attention.n_heads // 2)
    neurons = neuron_importance(smaller, train_set[:10])
    smaller = prune_neurons(smaller, neurons, keep=len(neurons["layers.0.ffn"]) // 4)
    before = accuracy(smaller, test_set)
    smaller = train(smaller, train_set, 1, 1e-3, seed)
    print(f"  half the heads, a quarter of the neurons: accuracy {before:.2%}, ", end="")
    print(f"after an epoch of fine-tuning {accuracy(smaller, test_set):.2%}")
    return smaller


def demo(s: Settings) -> dict:
    """Trains, prunes, exports, compares; returns the report."""
    need("onnx", "onnxruntime", "onnxscript", "matplotlib")
    out, start = Path(s.out), time.perf_counter()
    sentences = generate_sentences(s.n_train + s.n_test, s.seed)
    words = sorted({word for text, _ in sentences for word in text.split()})
    vocabulary = {word: 1 + i for i, word in enumerate(words)}
    train_set = encode(sentences[: s.n_train], vocabulary)
    test_set = encode(sentences[s.n_train :], vocabulary)
    torch.manual_seed(s.seed)
    model = train(Classifier(1 + len(words)), train_set, s.epochs, 3e-3, s.seed)
    print(f"trained in {time.perf_counter() - start:.1f} s, e.g. {sentences[0]}")
    control_flow = show_control_flow(out)

    sizes = [(b, t) for b in (1, 8, 32) for t in (32, 128, 256)]
    cases = {f"{b} x {t}": [(torch.randint(1, len(words), (b, t)),)] for b, t in sizes}
    unstructured = show_unstructured(model, test_set, cases["32 x 256"], s)
    smaller = show_structured(model, train_set, test_set, s.seed)
    (tokens,) = test_set[0][0]
    cases["1 x real"] = [(row[None, row != 0],) for row in tokens[:8]]  # without their padding
    calibration = [{"tokens": tokens} for (tokens,), _ in train_set[:4]]
    metadata = {"labels": ["negative", "positive"], "max_len": 256, "vocabulary": vocabulary}
    models, measure = {"original": model, "pruned": smaller}, (s.threads, s.seconds, s.max_loss)
    report = export_all(models, tokens, test_set, cases, calibration, out, metadata, *measure)
    print_table(report)
    report |= {"control_flow": control_flow, "unstructured": unstructured}
    return report | {"picture": str(plot_rows(report, out / "accuracy_latency.png"))}


# -----------------------------------------------------------------------------


def need(*modules: str) -> None:
    """Raises ValueError that names the libraries which the demo needs and this Python lacks."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the demo needs {' '.join(missing)}: pip install {' '.join(missing)}")


def settings_from_command_line(argv: list[str] | None = None) -> Settings:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for f in fields(Settings):
        reason = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default, help=reason)
    s = Settings(**vars(parser.parse_args(argv)))
    for name in ("epochs", "threads", "seconds"):
        if getattr(s, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(s, name)}")
    if not 0 <= s.max_loss <= 1:
        raise ValueError(f"max_loss must be in 0 .. 1, got {s.max_loss}")
    for name in ("n_train", "n_test"):
        if not 200 <= getattr(s, name) <= 100_000:
            raise ValueError(f"{name} must be in 200 .. 100000, got {getattr(s, name)}")
    return s


def hardware(threads: int) -> dict:
    """What a time means little without: CPU, threads, GFLOP/s of an fp32 matmul of 1024^3 (median), torch."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux, where platform knows the architecture alone
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    a, b, seconds = torch.rand(1024, 1024), torch.rand(1024, 1024), []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    gflops = round(2 * 1024**3 / statistics.median(seconds[2:]) / 1e9)  # the first two warm up
    machine = {"cpu": cpu, "threads": threads, "gemm_gflops": gflops, "torch": torch.__version__}
    return machine | {"int8_saturates": needs_reduced_range(), "bf16": has_bf16()}


def main(argv: list[str] | None = None) -> None:
    s = settings_from_command_line(argv)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=s.out).close()  # a place that can't be written is known before the work
    torch.set_num_threads(s.threads)
    machine = hardware(s.threads)
    print(" ".join(f"{k}={v}" for k, v in (asdict(s) | machine).items()), "device=cpu dtype=float32")
    start = time.perf_counter()
    report = demo(s) | {"settings": asdict(s), "seconds": round(time.perf_counter() - start, 1)} | machine
    write_atomically(Path(s.out, "report.json"), json.dumps(report, indent=1).encode())
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what a user can mend: one line, no traceback
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
