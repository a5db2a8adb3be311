"""ONNX Runtime: sessions on torch's own memory. Inputs and outputs are bound by address, so caches stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencache_compile.errors import BundleError, ConfigError, ExportError
from tokencache_compile.ir import StepIO, TensorSpec

# Names as users say them; each falls back to the CPU for what it cannot run.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


# Names as ONNX Runtime says them; in capitals they are ONNX's own.
_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}
_TYPES |= {torch.int64: "int64", torch.int32: "int32", torch.bool: "bool", torch.uint8: "uint8"}


class OnnxSession:
    """An ONNX file in ONNX Runtime, as a :class:`tokencache_compile.export.session.Session`.

    Args:
        path: of the file; its weights file lies beside it and is mapped, not read.
        io: the graph's inputs and outputs.
        provider: "cpu", "cuda" or "tensorrt".
        device: where the tensors are; a GPU for all providers but "cpu".

    Raises:
        ExportError: the package or the provider is missing, or ONNX Runtime refuses the file.
        ConfigError: there is no such provider.
        BundleError: the file's inputs or outputs are not those of ``io``.
    """

    def __init__(self, path: Path, io: StepIO, provider: str = "cpu", device: torch.device | None = None) -> None:
        runtime = _import_runtime()
        wanted = _providers(runtime, provider)
        self.path, self.io = path, io
        self.device = device or torch.device("cpu" if provider == "cpu" else "cuda")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors: what it says of initialisers that share a file is no news
        if provider == "cpu":
            options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=[(name, self._options(name)) for name in wanted])
        except Exception as error:
            raise ExportError(f"ONNX Runtime {runtime.__version__} refuses {path.name}: {str(error).strip()}") from error
        if (started := self._session.get_providers()[0]) != wanted[0]:
            raise ExportError(
                f'provider="{provider}" was asked for and ONNX Runtime started {started}: the libraries of {wanted[0]} did not load. '
                "Install the CUDA (and TensorRT) version that onnxruntime-gpu names, or take another provider."
            )
        for nodes, specs in ((self._session.get_inputs(), io.inputs), (self._session.get_outputs(), io.outputs)):
            found = {node.name: (tuple(node.shape), node.type) for node in nodes}
            needed = {spec.name: (spec.shape, f"tensor({_TYPES[spec.dtype]})") for spec in specs if spec.dtype in _TYPES}
            if found != needed:  # tensors are bound by address: ONNX Runtime would read or write beyond their ends
                name = next(name for name in (*found, *needed) if found.get(name) != needed.get(name))
                raise BundleError(f"{path.name} has {name} as {found.get(name)}, where {needed.get(name)} was to be. Export again.")

    def _options(self, provider: str) -> dict[str, Any]:
        """Of one of the providers; float32 products are TF32's where torch's own are."""
        if provider == "CPUExecutionProvider":
            return {}
        index = {"device_id": self.device.index or 0}
        return index | {"use_tf32": int(torch.backends.cuda.matmul.allow_tf32)} if provider == "CUDAExecutionProvider" else index

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Session`."""
        binding = self._session.io_binding()
        results = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in self.io.outputs}
        held = [values[spec.name].contiguous() for spec in self.io.inputs]
        for spec, tensor in zip(self.io.inputs, held, strict=True):
            self._bind(binding.bind_input, spec, tensor)
        for spec in self.io.outputs:
            self._bind(binding.bind_output, spec, results[spec.name])
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime runs on a stream of its own
        self._session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        return results

    def _bind(self, bind: Any, spec: TensorSpec, tensor: Tensor) -> None:
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype or tensor.device.type != self.device.type:
            raise ExportError(
                f"{spec.name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; the graph takes {spec.shape} {spec.dtype} "
                f"on {self.device}."
            )
        bind(spec.name, self.device.type, self.device.index or 0, _element_type(spec.dtype), spec.shape, tensor.data_ptr())


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("this needs ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu for a GPU.") from error
    return onnxruntime


def _providers(runtime: Any, provider: str) -> Sequence[str]:
    if provider not in PROVIDERS:
        raise ConfigError(f"provider={provider!r} was asked for; it is one of {', '.join(map(repr, PROVIDERS))}.")
    there = runtime.get_available_providers()
    if PROVIDERS[provider][0] not in there:
        raise ExportError(
            f"provider={provider!r} was asked for, and this ONNX Runtime {runtime.__version__} has {', '.join(there)}. "
            "pip install onnxruntime-gpu brings the others."
        )
    return [name for name in PROVIDERS[provider] if name in there]


def _element_type(dtype: torch.dtype) -> int:
    """ONNX's number for ``dtype``: numpy, which ONNX Runtime takes otherwise, has no bfloat16."""
    import onnx

    number: int = onnx.TensorProto.DataType.Value(_TYPES[dtype].upper())
    return number
