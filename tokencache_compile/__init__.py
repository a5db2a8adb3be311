"""TokenCache as a compiler: diffusion transformers that recompute only the tokens that change.

pipe = tokencache_compile.transform(pipe, ratio=0.9)
"""

from tokencache_compile.api import transform
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.errors import (
    BundleError,
    ConfigError,
    ExportError,
    InputError,
    InvariantError,
    TokenCacheError,
    UnsupportedModelError,
)
from tokencache_compile.export.load import BundleDispatcher, load
from tokencache_compile.export.tensorrt_build import TensorRTSettings
from tokencache_compile.export.write import export_onnx, export_tensorrt
from tokencache_compile.plan import CacheConfig, CachePlan
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.runtime import Dispatcher, StepReport, Summary
from tokencache_compile.schedule import Schedule

__all__ = [
    "BundleDispatcher",
    "BundleError",
    "CacheArtefact",
    "CacheConfig",
    "CachePlan",
    "CachePredictor",
    "ConfigError",
    "Dispatcher",
    "ExportError",
    "InputError",
    "InvariantError",
    "Schedule",
    "StepReport",
    "Summary",
    "TensorRTSettings",
    "TokenCacheError",
    "UnsupportedModelError",
    "export_onnx",
    "export_tensorrt",
    "load",
    "transform",
]
