"""TensorRT and TensorRT-RTX share their Python API: one importer picks, and says what the flavour at hand offers."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tokencache_compile.errors import ExportError

FlavourName = Literal["tensorrt", "tensorrt_rtx"]
TOPK_LIMIT = 3840
_PIP_NAMES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_OLDEST = {"tensorrt": (10, 1), "tensorrt_rtx": (1, 2)}  # before: no device_memory_size_v2; no REQUIRE_USER_ALLOCATION
_BELOW = {"tensorrt": (12, 0), "tensorrt_rtx": (2, 0)}


@dataclass(frozen=True)
class EngineTarget:
    """What an engine was built with and for: it runs nowhere else.

    Attributes:
        flavour, version: of the package; engines are not portable across releases.
        compute_capabilities: such as "SM89".
    """

    flavour: FlavourName
    version: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Flavour:
    """An imported TensorRT; ``module`` is the package itself."""

    name: FlavourName
    module: Any
    version: str

    @property
    def pip_name(self) -> str:
        return _PIP_NAMES[self.name]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The GPUs that engines can be built for without having them ("SM80", …); none where the GPU must be at hand."""
        if not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return ()
        return tuple(name for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))

    @property
    def has_timing_cache(self) -> bool:
        """Whether building times kernels, which a file can keep; TensorRT-RTX times nothing."""
        return self.name == "tensorrt"

    @property
    def has_runtime_cache(self) -> bool:
        """Whether kernels are compiled when an engine is loaded, which a file can keep."""
        return hasattr(self.module, "IRuntimeCache")

    def dtype(self, value: Any) -> torch.dtype | None:
        """torch's name for one of the module's data types; None where it has none."""
        names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
        found = getattr(torch, names.get(value.name, value.name.lower()), None)
        return found if found in IO_DTYPES else None


IO_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def load_flavour(name: str | None = None) -> Flavour:
    """Import ``"tensorrt"`` or ``"tensorrt_rtx"``; None takes the first of them that is installed.

    Raises:
        ExportError: it is not installed, does not load, or is a release this package does not know.
    """
    names = get_args(FlavourName)
    if name is None:
        for candidate in names:
            if importlib.util.find_spec(candidate) is not None:
                return load_flavour(candidate)
        raise ExportError("neither tensorrt nor tensorrt_rtx is installed: pip install tensorrt-rtx (builds without a GPU), or tensorrt.")
    if name not in names:
        raise ExportError(f"flavour={name!r} was asked for; it is one of {', '.join(map(repr, names))}.")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(f"{name} is not installed ({error}): pip install {_PIP_NAMES[name]}") from error
    except (ImportError, OSError) as error:
        raise ExportError(f"{name} is installed and does not load: {error}") from error
    version = str(module.__version__)
    release = tuple(int(part) for part in version.split(".")[:2])
    if not _OLDEST[name] <= release < _BELOW[name]:
        oldest, below = (".".join(map(str, found[name])) for found in (_OLDEST, _BELOW))
        raise ExportError(f"{name} {version} was found; {oldest} or newer, and older than {below}, is needed.")
    return Flavour(name, module, version)  # type: ignore[arg-type]


def current_capability(device: torch.device | None = None) -> str:
    """The compute capability of ``device``, or else of the current CUDA device, such as "SM89".

    Raises:
        ExportError: there is none.
    """
    if not torch.cuda.is_available():
        raise ExportError(f"torch {torch.__version__} finds no CUDA device here.")
    if device is not None and device.index is not None and device.index >= torch.cuda.device_count():
        raise ExportError(f"device={str(device)!r} was asked for; there are {torch.cuda.device_count()} CUDA devices here.")
    major, minor = torch.cuda.get_device_capability(device)
    return f"SM{major}{minor}"
