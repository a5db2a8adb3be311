"""The passes in their order: from a model and one call of it to its step programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tokencache_compile.errors import UnsupportedModelError
from tokencache_compile.ir import BlockProgram, CacheUnit, Capture, LowRankUpdate, StepProgram
from tokencache_compile.passes.analysis import analyse
from tokencache_compile.passes.budget import fit_budget
from tokencache_compile.passes.cached_step import make_cached
from tokencache_compile.passes.capture import block_lists, capture
from tokencache_compile.passes.fold_skipped import fold_skipped
from tokencache_compile.passes.full_step import make_full
from tokencache_compile.passes.groups import find_groups
from tokencache_compile.passes.low_rank import with_updates
from tokencache_compile.passes.outline import outline
from tokencache_compile.passes.samples_first import samples_first
from tokencache_compile.passes.verify import same_as_eager, verify_blocks, verify_context, verify_step
from tokencache_compile.plan import CacheConfig, resolve_plan
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.step_table import StepTable


@dataclass(frozen=True)
class StepPrograms(StepTable):
    """Everything compiled for one input signature.

    Attributes:
        full: the I-step.
        cached: a P-step for each keep profile of the plan; empty where nothing is cached.
        read_inputs: positions of the inputs whose values the steps hold for, see :class:`Capture`.
    """

    program: BlockProgram
    units: tuple[CacheUnit, ...]
    full: StepProgram
    cached: tuple[StepProgram, ...]
    output_spec: Any
    read_inputs: tuple[int, ...]


def analysed(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[BlockProgram, Capture]:
    """Capture → outline → samples first → analyse: all that does not depend on settings.

    Where a model has several lists of blocks and one of them cannot be cached (VACE's control blocks, Latte's blocks over time),
    that list becomes part of the model around the others, which runs in full on every step; the provenance tells.

    Raises:
        InputError: see :func:`capture`.
        UnsupportedModelError: the first refusal, if most blocks cannot be cached.
    """
    lists = block_lists(model)
    left_out: dict[str, UnsupportedModelError] = {}
    while True:
        try:
            captured = capture(model, kwargs, frozenset(left_out))
            program, captured = samples_first(outline(captured, model), captured)
            verify_blocks(program)
            program = analyse(program, captured)
        except UnsupportedModelError as refusal:
            blocks = refusal.where.rpartition(".")[0]
            if blocks not in lists or len(lists) - len(left_out) == 1:
                if not left_out:
                    raise
                raise next(iter(left_out.values())) from refusal
            left_out[blocks] = refusal
        else:
            if sum(len(lists[name]) for name in left_out) > len(program.blocks):
                raise next(iter(left_out.values()))
            notes = tuple(f"left out {name}: {refusal.reason}" for name, refusal in left_out.items())
            return replace(program, provenance=(*notes, *program.provenance)), captured


def steps_of(
    program: BlockProgram,
    captured: Capture,
    config: CacheConfig,
    predictor: CachePredictor | None,
    lora: Sequence[LowRankUpdate] = (),
) -> StepPrograms:
    """Plan → budget → fold → I-step and P-steps, verified after each. ``lora``: of the last K blocks, in P-steps only.

    A model on the meta device gives the same graphs and MACs; what compares values is left out, as there are none.

    Raises:
        UnsupportedModelError, ConfigError: see the passes.
    """
    program = find_groups(program)
    must_share = any(body.known_roles.needs_shared_index for body in program.bodies)
    stream = program.known_stream
    plan = resolve_plan(config, len(program.blocks), stream.tokens, must_share, stream.batch)
    if predictor is not None:
        first = program.blocks[0]
        names = program.body_of(first).weight_names
        shapes = {n: tuple(program.tensors[f"{first.fqn}.{n}"].shape) for n in names}
        predictor.check_fits(stream.channels, len(program.blocks), shapes)
    caching = plan.config.ratio > 0
    plan = fit_budget(program, plan) if caching else plan
    has_values = stream.device.type != "meta"
    if caching and plan.config.context != "kept" and has_values:
        verify_context(program, captured, plan)
    units = fold_skipped(program, plan) if caching else ()
    extras = config.extras
    full = make_full(program, plan, units, extras)
    refined = with_updates(program, lora, plan.num_cached) if lora and caching else program
    cached = tuple(make_cached(refined, plan, units, extras, number, predictor) for number in range(len(plan.profiles))) if caching else ()
    random_shape = (1, plan.num_cached, plan.tokens)
    macs_full, *macs_cached = [verify_step(step, captured.example_inputs, random_shape) for step in (full, *cached)]
    spec, read = captured.output_spec, captured.read_inputs
    steps = StepPrograms(plan, full.caches, macs_full, tuple(macs_cached), program, units, full, cached, spec, read)
    if has_values:
        initial = [torch.zeros(random_shape if name == "random_scores" else (), device=stream.device) for name in extras]
        same_as_eager(full, captured, [*initial, *steps.initial_caches(stream.device)])
    return steps


def build_steps(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    config: CacheConfig,
    predictor: CachePredictor | None,
    lora: Sequence[LowRankUpdate] = (),
) -> StepPrograms:
    """Every pass in order: :func:`analysed`, then :func:`steps_of`.

    Args:
        kwargs: keyword arguments of one call; see :func:`capture`.

    Raises:
        InputError, UnsupportedModelError, ConfigError: see the passes.
    """
    return steps_of(*analysed(model, kwargs), config, predictor, lora)
