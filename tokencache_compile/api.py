"""The public calls. :func:`transform` wraps a model; the stages it sets off are listed in ``passes/pipeline.py``."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from tokencache_compile.artefact import CacheArtefact, load_lora
from tokencache_compile.engine import check_backend
from tokencache_compile.errors import ConfigError
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.requests import SchedulerWatch
from tokencache_compile.runtime import Dispatcher
from tokencache_compile.samplers import default_config

Plan = float | CacheConfig | CacheArtefact | str | os.PathLike[str] | None
COMPONENTS = ("transformer", "transformer_2")  # of a pipeline; Wan 2.2 has a second one, for low noise


def transform(
    model: Any,
    plan: Plan | Mapping[str, Plan] = None,
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
        model: a transformer (``nn.Module`` with a ``timestep`` argument), or a diffusers pipeline with a ``transformer``, a
            ``transformer_2`` or both; each is transformed by itself and begins its own part of a run with an I-step.
        plan: the ratio, all settings at once, or what calibration made: a :class:`CacheArtefact`, its directory or its hub id.
            An artefact brings its settings, predictor and adapter (LoRA, which acts in P-steps); ``ratio`` and ``settings`` still change
            single settings.
            For a pipeline also one plan a component, ``{"transformer": 0.9, "transformer_2": CacheConfig(...)}``; a component
            that is left out stays as it is. Steps count over the whole run of the sampler in every plan.
        ratio: share of the cached blocks' tokens that a P-step does not recompute, in [0, 1].
        config: all settings at once; see :class:`CacheConfig`. ``ratio`` and ``settings`` change single ones.
        predictor: scores tokens instead of the training-free scorer.
        backend: "inductor" (``torch.compile``, one frame a graph, no break) or "eager".
        example_inputs: keyword arguments of one call, to capture and compile now and not at the first call.
        scheduler: the sampler's scheduler, whose ``set_timesteps`` then marks each request's begin. Taken from a pipeline.
        settings: fields of :class:`CacheConfig`, such as ``last_k=2`` or ``schedule=Schedule(every=3)``. With a scheduler that adds fresh
            noise at every step (DDPM, ancestral, SDE), and neither config nor artefact, ``forecast`` is 0 unless it is named.

    Returns:
        For a model a :class:`Dispatcher` to use in its place; for a pipeline the same pipeline, its transformer replaced.

    Raises:
        ConfigError: a setting is out of range or given twice, the model has no ``timestep`` argument, one model's artefact,
            predictor or inputs are given for two, or an artefact is refused (see :meth:`CacheArtefact.from_pretrained`, which takes
            a hub token or revision).
        InputError, UnsupportedModelError: with ``example_inputs``, as at a first call.
    """
    check_backend(backend)
    known = CacheConfig.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
    if ratio is not None:
        settings["ratio"] = ratio
    make = partial(_transformed, config=config, predictor=predictor, settings=settings, backend=backend, example_inputs=example_inputs)
    if isinstance(model, nn.Module):
        if isinstance(plan, Mapping):
            raise ConfigError(f"plans of {', '.join(plan)} were given with a {type(model).__name__}; components are a pipeline's.")
        return make(model, plan, scheduler=scheduler)
    plans = _plans_of(model, plan)
    given_for_one = predictor is not None or example_inputs is not None or isinstance(plan, CacheArtefact | str | os.PathLike)
    if given_for_one and len(plans) > 1:
        raise ConfigError(
            f"an artefact, a predictor or example inputs were given, which belong to one transformer, and this {type(model).__name__} has "
            f'{" and ".join(plans)}. Transform one at a time, plan={{"transformer": ...}}, or give each its own artefact.'
        )
    scheduler = scheduler or getattr(model, "scheduler", None)
    dispatchers = {name: make(_original(getattr(model, name)), one, scheduler=scheduler) for name, one in plans.items()}
    for name, dispatcher in dispatchers.items():
        _install(model, name, dispatcher)
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    return model


def _transformed(
    transformer: nn.Module,
    plan: Plan,
    *,
    config: CacheConfig | None,
    predictor: CachePredictor | None,
    settings: Mapping[str, Any],
    backend: str,
    example_inputs: Mapping[str, Any] | None,
    scheduler: Any,
) -> Dispatcher:
    """The dispatcher of one transformer, with all settings made one."""
    if isinstance(transformer, Dispatcher):
        raise ConfigError(
            "this model is transformed already; transform its .model, or set its plan anew with another transform of the original."
        )
    settings = dict(settings)
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
    settings_now = replace(config or default_config(scheduler), **settings)
    if (settings_now.scorer == "predictor") != (predictor is not None):
        raise ConfigError(
            f"scorer={settings_now.scorer!r} and {'a' if predictor is not None else 'no'} predictor were given. "
            'Pass predictor=CachePredictor(...) together with scorer="predictor", or neither.'
        )
    lora = load_lora(transformer, artefact.lora_path) if artefact is not None and artefact.lora_path is not None else ()
    watch = SchedulerWatch()
    if scheduler is not None:
        watch.attach(scheduler)
    dispatcher = Dispatcher(transformer, settings_now, backend, predictor, watch, lora)
    if example_inputs is not None:
        dispatcher.prepare(example_inputs)
    return dispatcher


def _plans_of(pipeline: Any, plan: Plan | Mapping[str, Plan]) -> dict[str, Plan]:
    """The plan of each component of a pipeline that is to be transformed."""
    present = [name for name in COMPONENTS if isinstance(getattr(pipeline, name, None), nn.Module)]
    if not present:
        raise ConfigError(
            f"a {type(pipeline).__name__} was given; a torch.nn.Module or a diffusers pipeline with a .transformer is needed."
        )
    if not isinstance(plan, Mapping):
        return dict.fromkeys(present, plan)
    if not plan or set(plan) - set(present):
        given = ", ".join(plan) or "no component"
        raise ConfigError(f"plans of {given} were given; the transformers of this {type(pipeline).__name__} are {', '.join(present)}.")
    return dict(plan)


def _original(transformer: nn.Module) -> nn.Module:
    return transformer.model if isinstance(transformer, Dispatcher) else transformer


def _load(plan: CacheArtefact | str | os.PathLike[str], transformer: nn.Module) -> CacheArtefact:
    """The artefact, checked to be made for this transformer."""
    if not isinstance(plan, CacheArtefact):
        return CacheArtefact.from_pretrained(plan, transformer)
    plan.check_base(transformer)
    return plan


def _install(pipeline: Any, name: str, transformer: nn.Module) -> None:
    """Make ``transformer`` the pipeline's component; the configuration goes on naming the model's own class."""
    saved_as = pipeline.config[name]
    setattr(pipeline, name, transformer)
    pipeline.register_to_config(**{name: saved_as})


def _save_pretrained(pipeline: Any, *args: Any, **kwargs: Any) -> None:
    """The pipeline's own ``save_pretrained``, of the original models: diffusers leaves out classes it does not know."""
    dispatchers = {name: one for name in COMPONENTS if isinstance(one := getattr(pipeline, name, None), Dispatcher)}
    try:
        for name, dispatcher in dispatchers.items():
            setattr(pipeline, name, dispatcher.model)
        type(pipeline).save_pretrained(pipeline, *args, **kwargs)
    finally:
        for name, dispatcher in dispatchers.items():
            _install(pipeline, name, dispatcher)
