"""The public calls. :func:`transform` wraps a model; the stages it sets off are listed in ``passes/pipeline.py``."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from tokencache_compile.artefact import CacheArtefact, load_lora
from tokencache_compile.engine import check_backend
from tokencache_compile.errors import ConfigError
from tokencache_compile.ir import LowRankUpdate
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.requests import SchedulerWatch
from tokencache_compile.runtime import Dispatcher


def transform(
    model: Any,
    plan: float | CacheConfig | CacheArtefact | str | os.PathLike[str] | None = None,
    *,
    ratio: float | None = None,
    config: CacheConfig | None = None,
    predictor: CachePredictor | None = None,
    backend: str = "inductor",
    example_inputs: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    **settings: Any,
) -> Any:
    """Make a diffusion transformer cache its tokens between sampling steps.

        pipe = tokencache_compile.transform(DiTPipeline.from_pretrained("facebook/DiT-XL-2-256"), ratio=0.9)
        images = pipe(class_labels=[207]).images

    Args:
        model: a transformer (``nn.Module`` with a ``timestep`` argument), or a diffusers pipeline that has one.
        plan: the ratio, all settings at once, or what calibration made: a :class:`CacheArtefact`, its directory or its hub id.
            An artefact brings its settings, predictor and adapter (LoRA, which acts in P-steps); ``ratio`` and ``settings`` still change
            single settings.
        ratio: share of the cached blocks' tokens that a P-step does not recompute, in [0, 1].
        config: all settings at once; see :class:`CacheConfig`. ``ratio`` and ``settings`` change single ones.
        predictor: scores tokens instead of the training-free scorer.
        backend: "inductor" (``torch.compile``, one frame a graph, no break) or "eager".
        example_inputs: keyword arguments of one call, to capture and compile now and not at the first call.
        scheduler: the sampler's scheduler, whose ``set_timesteps`` then marks each request's begin. Taken from a pipeline.
        settings: fields of :class:`CacheConfig`, such as ``last_k=2`` or ``schedule=Schedule(every=3)``.

    Returns:
        For a model a :class:`Dispatcher` to use in its place; for a pipeline the same pipeline, its transformer replaced.

    Raises:
        ConfigError: a setting is out of range or given twice, the model has no ``timestep`` argument, or an artefact is refused
            (see :meth:`CacheArtefact.from_pretrained`, which takes a hub token or revision).
        InputError, UnsupportedModelError: with ``example_inputs``, as at a first call.
    """
    check_backend(backend)
    known = CacheConfig.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
    if ratio is not None:
        settings["ratio"] = ratio
    transformer = _transformer_of(model)
    artefact: CacheArtefact | None = None
    if isinstance(plan, CacheArtefact | str | os.PathLike):
        if config is not None or predictor is not None:
            raise ConfigError(
                "an artefact brings its own config and predictor, and one was given beside it. Pass single settings to change."
            )
        artefact = _load(plan, transformer)
        config, predictor = artefact.config, artefact.predictor
        if settings.get("scorer", "predictor") != "predictor":
            predictor = None
        if config.keep is not None and "ratio" in settings and "keep" not in settings:
            raise ConfigError(
                f"ratio={settings['ratio']!r} was asked for, and the artefact lists calibrated token counts, which no ratio changes. "
                "Leave the ratio out, or pass keep=None, groups=() too for equal counts."
            )
    elif isinstance(plan, CacheConfig):
        if config is not None:
            raise ConfigError("two configs were given; pass one.")
        config = plan
    elif plan is not None:
        if "ratio" in settings:
            raise ConfigError(f"two ratios were given, {plan!r} and {settings['ratio']!r}; pass one.")
        settings["ratio"] = plan
    if predictor is not None:
        settings.setdefault("scorer", "predictor")
    settings_now = replace(config or CacheConfig(), **settings)
    if (settings_now.scorer == "predictor") != (predictor is not None):
        raise ConfigError(
            f"scorer={settings_now.scorer!r} and {'a' if predictor is not None else 'no'} predictor were given. "
            'Pass predictor=CachePredictor(...) together with scorer="predictor", or neither.'
        )
    lora = load_lora(transformer, artefact.lora_path) if artefact is not None and artefact.lora_path is not None else ()
    if model is transformer:
        return _dispatcher(transformer, settings_now, backend, predictor, scheduler, example_inputs, lora)
    scheduler = scheduler or getattr(model, "scheduler", None)
    dispatcher = _dispatcher(transformer, settings_now, backend, predictor, scheduler, example_inputs, lora)
    _install(model, dispatcher)
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    return model


def _transformer_of(model: Any) -> nn.Module:
    """The module to transform: ``model`` itself, or a pipeline's original transformer."""
    if isinstance(model, Dispatcher):
        raise ConfigError(
            "this model is transformed already; transform its .model, or set its plan anew with another transform of the original."
        )
    if isinstance(model, nn.Module):
        return model
    transformer = getattr(model, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(f"a {type(model).__name__} was given; a torch.nn.Module or a diffusers pipeline with a .transformer is needed.")
    return transformer.model if isinstance(transformer, Dispatcher) else transformer


def _load(plan: CacheArtefact | str | os.PathLike[str], transformer: nn.Module) -> CacheArtefact:
    """The artefact, checked to be made for this transformer."""
    if not isinstance(plan, CacheArtefact):
        return CacheArtefact.from_pretrained(plan, transformer)
    plan.check_base(transformer)
    return plan


def _install(pipeline: Any, dispatcher: Dispatcher) -> None:
    """Make ``dispatcher`` the pipeline's transformer; its configuration goes on naming the model's own class."""
    saved_as = pipeline.config["transformer"]
    pipeline.transformer = dispatcher
    pipeline.register_to_config(transformer=saved_as)


def _save_pretrained(pipeline: Any, *args: Any, **kwargs: Any) -> None:
    """The pipeline's own ``save_pretrained``, of the original model: diffusers leaves out classes it does not know."""
    dispatcher = pipeline.transformer
    try:
        if isinstance(dispatcher, Dispatcher):
            pipeline.transformer = dispatcher.model
        type(pipeline).save_pretrained(pipeline, *args, **kwargs)
    finally:
        if isinstance(dispatcher, Dispatcher):
            _install(pipeline, dispatcher)


def _dispatcher(
    model: nn.Module,
    config: CacheConfig,
    backend: str,
    predictor: CachePredictor | None,
    scheduler: Any,
    example_inputs: Mapping[str, Any] | None,
    lora: Sequence[LowRankUpdate],
) -> Dispatcher:
    watch = SchedulerWatch()
    if scheduler is not None:
        watch.attach(scheduler)
    dispatcher = Dispatcher(model, config, backend, predictor, watch, lora)
    if example_inputs is not None:
        dispatcher.prepare(example_inputs)
    return dispatcher
