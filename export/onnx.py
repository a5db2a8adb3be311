"""ONNX: an engine graph as an ONNX model whose weights lie in one file beside it, shared by all graphs of a bundle.

    EngineGraph ──torch.export──▶ ──torch.onnx──▶ onnx_ir.Model ──fold constants──▶ weights named, not copied ──▶ full.onnx

Nothing that reads a weight is folded: a transposed copy would belong to one graph alone, and I- and P-graphs could share nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.errors import ExportError
from tokencache_compile.export.weights import Region
from tokencache_compile.export.widen_bfloat16 import widen_bfloat16
from tokencache_compile.ir import EngineGraph

OPSET = 20
_NOISY = "torch.onnx._internal.exporter._registration"  # warns that torchvision, which nothing here needs, is missing


def weights_of(graph: EngineGraph) -> dict[str, Tensor]:
    """Every parameter and buffer the graph reads, by the name it has in the model."""
    module = graph.module
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def to_onnx(graph: EngineGraph) -> Any:
    """``graph`` as an ``onnx_ir.Model`` of opset :data:`OPSET`, input and output names those of ``graph.io``.

    Weights are initialisers by their names in the model, and still in memory.

    Raises:
        ExportError: onnx or onnxscript is missing, or torch.onnx has no translation for an operator.
    """
    try:
        from onnxscript.optimizer import optimize_ir
    except ImportError as error:
        raise ExportError("exporting to ONNX needs onnx and onnxscript: pip install 'tokencache-compile[onnx]'.") from error
    device = next((t.device for t in weights_of(graph).values()), torch.device("cpu"))
    example = tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in graph.io.inputs)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(graph.module, example, strict=False)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[spec.name for spec in graph.io.inputs],
                output_names=[spec.name for spec in graph.io.outputs],
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__  # the exporter's own report names no operator; its first cause does
            reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise ExportError(f"torch.onnx cannot export the {graph.io.kind}-step (keep {list(graph.io.keep)}): {reason}") from error
    model: Any = program.model  # type: ignore[union-attr]
    weights = weights_of(graph).keys()
    optimize_ir(model, should_fold=lambda node: False if any(v is not None and v.name in weights for v in node.inputs) else None)
    widen_bfloat16(model, OPSET)
    model.graph.metadata_props.clear()  # the signature once more
    for node in model.graph:  # stack traces of this machine
        node.metadata_props.clear()
    return model


def read_weights(model: Any) -> set[str]:
    """Names of the initialisers that ``model`` reads."""
    return set(model.graph.initializers)


def save_onnx(model: Any, path: Path, weights: Mapping[str, Tensor], regions: Mapping[str, Region], weights_file: str) -> None:
    """Write ``model``, its weights left where ``regions`` says they lie in ``weights_file``, a file in the same folder.

    Raises:
        ExportError: onnx's own checker refuses the file.
    """
    import onnx
    import onnx_ir

    for name, value in model.graph.initializers.items():
        if name not in weights:
            continue  # a small constant of this graph alone
        held = value.const_value
        if tuple(held.shape.numpy()) != tuple(weights[name].shape):
            raise ExportError(f"{path.name}: the initialiser {name} is {held.shape} and the weight {tuple(weights[name].shape)}")
        region = regions[name]
        value.const_value = onnx_ir.ExternalTensor(
            weights_file, region.offset, region.length, dtype=held.dtype, shape=held.shape, name=name, base_dir=path.parent
        )
    onnx_ir.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx's checker refuses {path.name}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed."""
    logger = logging.getLogger(_NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
