"""TokenCache as a compiler: diffusion transformers that recompute only the tokens that change.

pipe = tokencache_compile.transform(pipe, ratio=0.9)
"""

from tokencache_compile.api import transform
from tokencache_compile.artefact import CacheArtefact
from tokencache_compile.errors import ConfigError, InputError, InvariantError, TokenCacheError, UnsupportedModelError
from tokencache_compile.plan import CacheConfig, CachePlan
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.runtime import Dispatcher, StepReport, Summary
from tokencache_compile.schedule import Schedule

__all__ = [
    "CacheArtefact",
    "CacheConfig",
    "CachePlan",
    "CachePredictor",
    "ConfigError",
    "Dispatcher",
    "InputError",
    "InvariantError",
    "Schedule",
    "StepReport",
    "Summary",
    "TokenCacheError",
    "UnsupportedModelError",
    "transform",
]
