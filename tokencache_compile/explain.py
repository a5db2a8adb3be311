"""Explain: what the compiler finds in a model, and what a setting would cost, from the model's configuration alone.

The weights are random: structure, plan, MACs and cache sizes do not depend on them. :func:`example_inputs` knows how to call
the classes listed in :data:`CALLABLE`; every other class is explained through the Python API, where the caller has its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokencache_compile.errors import ConfigError, TokenCacheError, UnsupportedModelError
from tokencache_compile.ir import BlockProgram, Body
from tokencache_compile.passes.analysis import placeholders
from tokencache_compile.passes.budget import planned_bytes
from tokencache_compile.passes.cached_step import make_cached
from tokencache_compile.passes.capture import candidate_blocks
from tokencache_compile.passes.fold_skipped import fold_skipped
from tokencache_compile.passes.pipeline import StepPrograms, build_steps
from tokencache_compile.passes.verify import verify_step
from tokencache_compile.plan import CacheConfig, CachePlan, Context
from tokencache_compile.predictor import CachePredictor

TEXT_TOKENS = 120  # what PixArt's pipelines pad a prompt to


# -- the model and a call of it ---------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _dit_inputs(config: Any, batch: int) -> dict[str, Any]:
    size = config.sample_size
    return {
        "hidden_states": _random(batch, config.in_channels, size, size),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % config.num_embeds_ada_norm,
    }


def _pixart_inputs(config: Any, batch: int) -> dict[str, Any]:
    size = config.sample_size
    inputs: dict[str, Any] = {
        "hidden_states": _random(batch, config.in_channels, size, size),
        "encoder_hidden_states": _random(batch, TEXT_TOKENS, config.caption_channels or config.cross_attention_dim),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
    }
    conditions = config.use_additional_conditions
    if conditions or (conditions is None and size == 128):  # the model's own default
        inputs["added_cond_kwargs"] = {"resolution": torch.full((batch, 2), 8.0 * size), "aspect_ratio": torch.ones(batch, 1)}
    return inputs


CALLABLE: Mapping[str, Callable[[Any, int], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
}


def _check_callable(class_name: str) -> None:
    if class_name not in CALLABLE:
        raise UnsupportedModelError(
            class_name,
            f"example inputs are made for {' and '.join(CALLABLE)} only",
            "Use the Python API with your own: transform(model, example_inputs={...}), then print(model.plan).",
        )


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments of one call of ``model``, of the sizes its configuration names.

    Args:
        model: a diffusers transformer of a class in :data:`CALLABLE`.
        batch: rows; 2 are one image with guidance.

    Raises:
        UnsupportedModelError: the class is another one.
    """
    name = type(model).__name__
    _check_callable(name)
    return CALLABLE[name](model.config, batch)


def load_config(target: str) -> dict[str, Any]:
    """The configuration in a diffusers folder, a pipeline's folder, a ``config.json`` or a repository of the hub.

    Raises:
        ConfigError: there is none, or it names no class.
    """
    from diffusers import DiTTransformer2DModel  # any model class: all of them load configurations alike
    from huggingface_hub.errors import LocalEntryNotFoundError

    failures = []
    for subfolder in (None,) if Path(target).is_file() else ("transformer", None):
        try:
            config: dict[str, Any] = DiTTransformer2DModel.load_config(target, subfolder=subfolder)
        except OSError as error:
            failures.append(str(error).splitlines()[0])
            if isinstance(error.__context__, LocalEntryNotFoundError):
                failures = ["the hub cannot be reached, and no copy is in its cache"]
                break
        else:
            if not isinstance(config, dict) or "_class_name" not in config:
                raise ConfigError(f"the configuration of {target} names no _class_name, so it is not one that diffusers wrote.")
            return config
    raise ConfigError(f"no configuration was found in {target!r}: {failures[-1]} Pass a model's folder, its config.json, or a hub id.")


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The model of ``config`` with random weights, in eval mode; the caller's random state stays as it is.

    Raises:
        ConfigError: diffusers refuses the configuration.
        UnsupportedModelError: example inputs cannot be made for its class. Nothing is built then.
    """
    import diffusers

    name = str(config["_class_name"])
    _check_callable(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = getattr(diffusers, name).from_config(dict(config))
        # What diffusers' constructors raise for a configuration they refuse: NotImplementedError for norms DiT does not have.
        except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
            raise ConfigError(f"diffusers cannot build a {name} from this configuration: {error}") from error
    return model.eval()


def _new_predictor(model: nn.Module) -> CachePredictor:
    """An untrained predictor: its cost is that of a trained one."""
    blocks = list(candidate_blocks(model).values())
    if not blocks:
        raise UnsupportedModelError(type(model).__name__, "it has no blocks, and a predictor is a copy of the first", "Use another scorer.")
    config: Any = model.config
    return CachePredictor(blocks[0], config.num_attention_heads * config.attention_head_dim, len(blocks))


# -- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a context would cost, or why the model cannot have it.

    Attributes:
        macs_cached: MACs of a P-step of each keep profile.
        macs_run: MACs of a whole run.
        cache_bytes: of one guidance branch at this batch.
    """

    macs_cached: tuple[int, ...] = ()
    macs_run: int = 0
    cache_bytes: int = 0
    refusal: str = ""


def run_macs(plan: CachePlan, macs_full: int, macs_cached: Sequence[int], steps: int) -> int:
    """MACs of ``steps`` sampling steps under the plan's schedule."""
    schedule = plan.config.schedule_of(steps)
    full = [not macs_cached or schedule.is_full(step) for step in range(steps)]
    return sum(macs_full if is_full else macs_cached[plan.profile_of(step)] for step, is_full in enumerate(full))


def cost_of(built: StepPrograms, context: Context, inputs: Sequence[Tensor], predictor: CachePredictor | None, num_steps: int) -> Cost:
    """The cost of ``built`` had its plan been made for ``context``; only the P-step is built anew."""
    plan = replace(built.plan, config=replace(built.plan.config, context=context))
    program = built.program
    try:
        units = fold_skipped(program, plan)
        cached = [make_cached(program, plan, units, plan.config.extras, number, predictor) for number in range(len(plan.profiles))]
    except TokenCacheError as error:
        return Cost(refusal=str(error))
    macs = tuple(verify_step(step, inputs, built.random_shape) for step in cached)
    return Cost(macs, run_macs(plan, built.macs_full, macs, num_steps), planned_bytes(program, plan, units))


# -- the report -------------------------------------------------------------------------------------------------------


def _gmacs(macs: int) -> str:
    """In 10⁹, to four digits or one decimal."""
    value = macs / 1e9
    return f"{value:.1f}" if value >= 100 else f"{value:.4g}"


def name_blocks(fqns: Sequence[str]) -> str:
    """Module paths with runs of one list put together: ``blocks.0 … blocks.27``."""
    runs: list[list[str]] = []
    for fqn in fqns:
        parent, _, number = fqn.rpartition(".")
        last_parent, _, last_number = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        if runs and parent == last_parent and number.isdigit() and last_number.isdigit() and int(number) == int(last_number) + 1:
            runs[-1].append(fqn)
        else:
            runs.append([fqn])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}" for run in runs)


def _gathered(body: Body) -> str:
    """What else than the stream is gathered for the kept tokens."""
    names = [placeholders(body)[side.position].name for side in body.known_roles.side_inputs]
    shared = [] if not body.known_roles.needs_shared_index else ["without a batch axis"]
    return " ".join([", ".join(names), *shared]) or "nothing but the stream: no other input has a token axis"


def _computed_in_full(body: Body) -> str:
    """The tokens that every P-step computes: other streams, and other rows of the cached one."""
    roles = body.known_roles
    found = [f"{placeholders(body)[c.input].name} {list(c.shape)}" for c in roles.companions]
    found += [f"{roles.layout.others} rows of the stream"] if roles.layout.others else []
    return ", ".join(found)


def _attention(body: Body) -> str:
    count = len(body.known_roles.attentions)
    return f"{count} self-attention{'s' if count > 1 else ''}" if count else "no self-attention, so the contexts do not differ"


def _rows() -> Table:
    """A two-column list; the first column is as wide in every list."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(min_width=11)
    rows.add_column()
    return rows


def describe_model(model: nn.Module) -> Table:
    """Class and size: what is known before anything is captured."""
    parameters = sum(p.numel() for p in model.parameters())
    rows = _rows()
    rows.add_row("class", Text(type(model).__name__))
    rows.add_row("parameters", f"{parameters / 1e6:.2f} M")
    return rows


def describe_program(program: BlockProgram, plan: CachePlan) -> Table:
    """Blocks, stream and what the analysis found in each structure."""
    stream = program.known_stream
    rows = _rows()
    structures = f"{len(program.blocks)} of {len(program.bodies)} structure{'s' if len(program.bodies) > 1 else ''}"
    rows.add_row("blocks", structures)
    shape = f"[{stream.batch}, {stream.tokens}, {stream.channels}]"
    rows.add_row("stream", Text(f"{shape} (batch, tokens, channels), {str(stream.dtype).removeprefix('torch.')}"))
    for index, body in enumerate(program.bodies):
        of = f"structure {index}" if len(program.bodies) > 1 else "each block"
        rows.add_row(of, Text(name_blocks([block.fqn for block in program.blocks if block.body == index])))
        rows.add_row("  attention", Text(_attention(body)))
        rows.add_row("  gathers", Text(_gathered(body)))
        if not body.known_roles.is_alone:
            rows.add_row("  in full", Text(_computed_in_full(body)))
    shared = any(body.known_roles.needs_shared_index for body in program.bodies)
    reason = " (a per-token input has no batch axis, so all rows must share it)" if shared else ""
    rows.add_row("index set", Text(f"one per {plan.config.selection}{reason}"))
    return rows


def describe_costs(built: StepPrograms, costs: Mapping[Context, Cost], num_steps: int) -> RenderableType:
    """MACs of the steps and of a run, and a table of all contexts, the plan's own marked."""
    uncached = built.macs_full * num_steps
    plan, batch = built.plan, built.program.known_stream.batch
    rows = _rows()
    rows.add_row("I-step", f"{_gmacs(built.macs_full)} GMACs at batch {batch}")
    if not built.cached:
        rows.add_row(f"{num_steps} steps", f"{_gmacs(uncached)} GMACs; a ratio of 0 caches nothing")
        return rows
    own = costs[plan.config.context]
    each = ", ".join(map(_gmacs, built.macs_cached))
    rows.add_row("P-step", f"{each} GMACs, {built.macs_cached[0] / built.macs_full:.1%} of an I-step")
    saved = 1 - own.macs_run / uncached
    rows.add_row(f"{num_steps} steps", f"{_gmacs(own.macs_run)} of {_gmacs(uncached)} GMACs uncached ({saved:.1%} saved)")
    rows.add_row("caches", f"{built.cache_bytes / 2**20:.2f} MiB at batch {batch}")
    table = Table(title="Contexts: what a kept token attends to", title_justify="left")
    table.add_column("context")
    for heading in ("P-step GMACs", f"{num_steps} steps GMACs", "saved", "cache MiB"):
        table.add_column(heading, justify="right")
    for context, cost in costs.items():
        name = Text(f"{context} (chosen)" if context == plan.config.context else context)
        if cost.refusal:
            table.add_row(name, Text(f"not possible: {cost.refusal}"))
            continue
        macs = ", ".join(map(_gmacs, cost.macs_cached))
        table.add_row(name, macs, _gmacs(cost.macs_run), f"{1 - cost.macs_run / uncached:.1%}", f"{cost.cache_bytes / 2**20:.2f}")
    return Group(rows, table)


def explain(target: str, config: CacheConfig, console: Console, num_steps: int = 50, batch: int = 2) -> None:
    """Print what the compiler finds in the model of ``target`` and what ``config`` would cost.

    Args:
        target: see :func:`load_config`.
        num_steps: sampling steps of the run whose MACs are printed.
        batch: rows of the example call; 2 are one image with guidance.

    Raises:
        ConfigError: no configuration was found, or a setting does not fit the model.
        UnsupportedModelError: the model cannot be cached; says where, why, and what to do.
    """
    for name, value in (("steps", num_steps), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"{name}={value} was asked for; at least 1 is needed.")
    model_config = load_config(target)
    with console.status(f"building {model_config['_class_name']} with random weights"):
        model = build_model(model_config)
    console.print(describe_model(model))
    with console.status("capturing: two calls of the model and an export of each structure"):
        predictor = _new_predictor(model) if config.scorer == "predictor" else None
        inputs = example_inputs(model, batch)
        built = build_steps(model, inputs, config, predictor)
    console.print(describe_program(built.program, built.plan))
    console.print(Text(f"\n{built.plan}\n"))
    with console.status("counting"):
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        contexts = get_args(Context) if built.cached else ()
        costs = {context: cost_of(built, context, tensors, predictor, num_steps) for context in contexts}
    console.print(describe_costs(built, costs, num_steps))
