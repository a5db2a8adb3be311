"""Phase 2 of training: LoRA on the last K blocks, behind the frozen predictor (SPEC section 3) on accelerate and peft.

    I-steps                 the original model                              fill the caches
    P-steps before          cached blocks, top-k of the scores ─▶ last K blocks with LoRA
    the P-step itself       the same, with gradient from the last K blocks on
    loss                    mean (x̂^L − x^L)², x^L of the original model run in full; with guidance of the guided outputs

It learns on the step graphs that inference runs, selections and caches included, and acts where it learned: in P-steps alone.
"""

from __future__ import annotations

import copy
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from tokencache_compile.errors import ConfigError
from tokencache_compile.fingerprint import weights_digest
from tokencache_compile.ir import BlockProgram, Body, LowRankUpdate, StepProgram
from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.gated import mean_square
from tokencache_compile.learn.loop import (
    CHECKPOINT,
    Batches,
    Data,
    Feed,
    RunState,
    TrainingConfig,
    check_run,
    identity,
    open_log,
    progress,
)
from tokencache_compile.learn.stack import call_of
from tokencache_compile.learn.window import MakeCall, history_of, solve
from tokencache_compile.passes.analysis import SDPA, placeholders
from tokencache_compile.passes.pipeline import StepPrograms, analysed, steps_of
from tokencache_compile.plan import CacheConfig
from tokencache_compile.predictor import CachePredictor
from tokencache_compile.sampling import guided
from tokencache_compile.schedule import is_ints

ADAPTER = "lora"  # the adapter's folder in that of the run
_COLUMNS = "cache {task.fields[cache]:.2e}  without LoRA {task.fields[without]:.2e}"
_LINEAR = torch.ops.aten.linear.default


# -- the adapter ----------------------------------------------------------------------------------------------------------


def _token_linears(body: Body) -> list[Node]:
    """The linears of a body that work on tokens: those the stream reaches, and those that make an attention's keys and values."""
    nodes = [node for node in body.graph_module.graph.nodes if not isinstance(node.meta.get("val"), SymInt)]  # sizes carry no token
    reached = {placeholders(body)[body.known_roles.stream_input]}
    for node in nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    todo: list[Any] = [value for node in nodes if node.target is SDPA for value in node.args[1:3]]
    while todo:  # keys and values of cross-attention come from elsewhere: the nearest linears above them
        node = todo.pop()
        if node.target is _LINEAR:
            reached.add(node)
        elif node not in reached:
            todo += [n for n in node.all_input_nodes if n in nodes]
    return [node for node in nodes if node.target is _LINEAR and node in reached]


def lora_targets(model: nn.Module, program: BlockProgram, last_k: int) -> tuple[str, ...]:
    """Module paths of the ``nn.Linear`` s of the last ``last_k`` blocks that work on tokens: attention (self and cross) and MLP.

    What works on the conditioning (adaLN, timestep embedding) is left out.

    Raises:
        ConfigError: ``last_k`` is 0, or there is no such linear.
    """
    if last_k == 0:
        raise ConfigError("last_k=0 was asked for; LoRA refines the last K blocks, which run in full on every step. Pass last_k=1 or more.")
    targets = []
    for block in program.blocks[-last_k:]:
        body = program.body_of(block)
        weights = {n.name: name for n, name in zip(body.graph_module.graph.nodes, body.weight_names, strict=False)}
        found = [weights.get(node.args[1].name, "") for node in _token_linears(body) if isinstance(node.args[1], Node)]
        names = [f"{block.fqn}.{name.removesuffix('.weight')}" for name in found if name.endswith(".weight")]
        targets += [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    if not targets:
        blocks = ", ".join(block.fqn for block in program.blocks[-last_k:])
        raise ConfigError(f"no torch.nn.Linear works on the tokens in {blocks}; LoRA has nothing to refine there.")
    return tuple(targets)


@contextmanager
def added_lora(model: nn.Module, targets: Sequence[str], rank: int = 16, seed: int = 0) -> Iterator[Any]:
    """Within this context ``model`` has LoRA layers at ``targets``; afterwards, whatever happens, it is what it was.

    Args:
        model: changed in place; only the adapter's weights require gradients. At first it gives what it gave: B is 0.
        targets: module paths, see :func:`lora_targets`.
        rank: of the update B·A, whose scale is 1.
        seed: of A.

    Yields:
        The ``peft.PeftModel`` around ``model``.

    Raises:
        ConfigError: peft is not installed, the rank is no positive integer, the model carries an adapter already.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is not installed: pip install 'tokencache-compile[train]'.") from error
    if not is_ints((rank,)) or rank < 1:
        raise ConfigError(f"rank={rank!r} was asked for; the rank of a LoRA update is 1 or more.")
    carried = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if carried is not None:
        raise ConfigError(f"the model carries an adapter already, at {carried}; merge it or unload it, or load the model anew.")
    children = [(module, dict(module._modules)) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.train(model.training)
        yield adapted
    finally:
        for module, own in children:
            module._modules.update(own)
        model.__dict__.pop("peft_config", None)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def low_rank_updates(model: nn.Module, targets: Sequence[str]) -> tuple[LowRankUpdate, ...]:
    """Within :func:`added_lora`: what P-steps add, in the adapter's own parameters."""
    layers = [(target, model.get_submodule(target)) for target in targets]
    return tuple(
        LowRankUpdate(target, layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight"))
        for target, layer in layers
    )


# -- the hard path --------------------------------------------------------------------------------------------------------


class Judged:
    """What the error of a step is taken on: a function of the inputs of ``step``, whose last block must not be cached.

    Args:
        guidance: 1 gives the stream after the last block, x^L [B, N, C]. Else rows are guidance pairs, and it is the guided output
            [B, C, …], a learned variance left aside: errors that both halves share cancel in it, others are multiplied.
    """

    def __init__(self, step: StepProgram, program: BlockProgram, guidance: float) -> None:
        self.guidance = guidance
        graph = Graph()
        copies: dict[Node, Node] = {}
        outputs: Any = graph.graph_copy(step.module.graph, copies)
        last = copies[list(step.module.graph.find_nodes(op="call_module"))[-1]]
        stream = graph.call_function(operator.getitem, (last, program.body_of(program.blocks[-1]).known_roles.stream_output))
        graph.output(stream if guidance == 1.0 else outputs[0])
        self.module = GraphModule(step.module, graph)
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        result: Tensor = self.module(*inputs)
        return result if self.guidance == 1.0 else guided(result[:, : inputs[0].shape[1]], self.guidance)


@dataclass(frozen=True)
class HardStep:
    """One P-step to learn from, as inference meets it.

    Attributes:
        profile: which of the plan's P-graphs serves it.
        inputs: that graph's inputs: the model's, the step, random scores if any, the caches.
        target: what the original model gives, see :class:`Judged`.
        without_lora: the loss of the same P-step without LoRA, a scalar.
    """

    profile: int
    inputs: Sequence[Tensor]
    target: Tensor
    without_lora: Tensor


class HardWindow:
    """Runs a stretch of sampling, from real data, that ends in a P-step.

    It begins at the oldest I-step that P-step depends on. I-steps run ``original``, P-steps ``adapted``, on caches of their own.

    Args:
        model: whose calls are made, with or without its LoRA layers.
        original, adapted: the step programs without and with LoRA in their P-steps, of one plan.
        scheduler: the deployment's solver, its timesteps set.
        guidance: of the deployment; other than 1, calls have the conditional rows and then the null ones.
    """

    def __init__(self, model: nn.Module, original: StepPrograms, adapted: StepPrograms, scheduler: Any, guidance: float = 1.0) -> None:
        self.model, self.original, self.adapted, self.scheduler = model, original, adapted, scheduler
        self.config, self.guidance = original.plan.config, guidance
        self._full = Judged(original.full, original.program, guidance)
        self._cached = [Judged(cached, original.program, guidance) for cached in original.cached]

    @torch.no_grad()
    def run(self, clean: Tensor, noise: Tensor, step: int, make_call: MakeCall, generators: list[torch.Generator]) -> HardStep:
        """The hard step at P-step ``step`` of samples ``clean`` [B, C, …] noised by ``noise``. ``generators``: the solver's, one a row."""
        plan, device = self.original.plan, clean.device
        schedule = self.config.schedule_of(len(self.scheduler.timesteps))
        # The score "change" compares two updates, whatever the forecast needs.
        depends_on = replace(self.config, forecast=max(self.config.forecast, 1)) if self.config.scorer == "change" else self.config
        caches = self.original.initial_caches(device)

        def inputs(index: int, call: Mapping[str, Any]) -> list[Tensor]:
            leaves = pytree.tree_leaves(call_of(self.model, call))
            tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
            return [*tensors, *self.original.step_inputs(index, device), *caches]

        def predict(index: int, call: Mapping[str, Any]) -> Tensor:
            full = schedule.is_full(index)
            program = self.original.full if full else self.adapted.cached[plan.profile_of(index)]
            results: list[Tensor] = list(program.module(*inputs(index, call)))
            caches[:] = results[program.num_outputs :]
            return results[0]

        start = history_of(depends_on, step, len(self.scheduler.timesteps))[-1]
        call = solve(self.scheduler, clean, noise, range(start, step), make_call, predict, generators, self.guidance)
        given, profile = inputs(step, call), plan.profile_of(step)
        target = self._full(given)
        return HardStep(profile, given, target, mean_square(self._cached[profile](given) - target))


class HardPass(nn.Module):
    """The trainable module: the adapter's ``weights``, and a forward that gives the cache loss of a P-step of ``adapted``."""

    def __init__(self, weights: Sequence[nn.Parameter], adapted: StepPrograms, guidance: float = 1.0) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        # In a tuple they are no submodules: the base model is no part of what is trained, saved or sent to other processes.
        self._judged = tuple(Judged(step, adapted.program, guidance) for step in adapted.cached)

    def forward(self, step: HardStep) -> Tensor:
        """Mean squared error of what is judged; gradients reach the adapter through the last K blocks alone."""
        return mean_square(self._judged[step.profile](step.inputs) - step.target)


# -- the run --------------------------------------------------------------------------------------------------------------


def refine(
    model: nn.Module,
    predictor: CachePredictor | None,
    data: Data,
    scheduler: Any,
    config: CacheConfig,
    training: TrainingConfig,
    out: Path,
    rank: int = 16,
    null: Mapping[str, Tensor] | None = None,
    accelerator: Any = None,
) -> Path:
    """Train LoRA on the last K blocks for the deployment that ``config`` describes; ``model`` is afterwards what it was.

    Args:
        model: the transformer, float32, in eval mode and on the accelerator's device.
        predictor: scores the tokens, frozen; None for a training-free scorer.
        data: real samples and their conditions.
        scheduler: the deployment's diffusers scheduler.
        config: the deployment. With a predictor its scorer is ``predictor``; without guidance ``selection="pair"`` is taken as
            ``sample``, because the rows of a training batch are no guidance pairs then.
        training: hyper-parameters; SPEC section 3 has ``lr=1e-4`` here. With ``guidance`` other than 1 it learns on guidance pairs from
            the guided output's error, as phase 1 does. There is no cost term; with ``cost_weight=None`` each step's loss is taken as a
            share of what it is without LoRA, so that every step counts alike.
        out: folder of the run: checkpoint (found there, the run resumes), ``log.jsonl`` and at the end the adapter.
        rank: of the LoRA updates.
        null: the "unconditional" conditions of label dropout, one row without batch axis each.
        accelerator: an ``accelerate.Accelerator``; made from ``training.mixed_precision`` if left out.

    Returns:
        The adapter's folder, as peft's own ``save_pretrained`` writes it.

    Raises:
        ConfigError: last_k or the ratio is 0, the rank is no positive integer, the scorer needs a predictor, the model carries an
            adapter, peft is missing; and as for ``train_predictor``.
        InputError: as for ``train_predictor``.
    """
    from accelerate import Accelerator

    if predictor is not None:
        config = replace(config, scorer="predictor")
        predictor = copy.deepcopy(predictor).requires_grad_(False)
    elif config.scorer == "predictor":
        raise ConfigError('scorer="predictor" was asked for without a predictor; pass the one that train_predictor returned.')
    if config.ratio == 0:
        raise ConfigError("ratio=0 was asked for, which caches nothing; there is no error for LoRA to correct.")
    if config.selection == "pair" and training.guidance == 1.0:
        config = replace(config, selection="sample")
    accelerator = accelerator or Accelerator(mixed_precision=training.mixed_precision, cpu=not torch.cuda.is_available())
    p_steps = check_run(model, config, training, null, accelerator)
    device = accelerator.device
    if predictor is not None:
        predictor.to(device)
    batches = Batches(data, null, training, p_steps, accelerator.process_index, accelerator.num_processes)
    feed = Feed(model, batches, scheduler, device)
    call = call_of(model, feed.first_call())
    with accelerator.autocast():
        program, captured = analysed(model, call)
        original = steps_of(program, captured, config, predictor)
    targets = lora_targets(model, program, original.plan.last_k)
    with added_lora(model, targets, rank, seed=training.seed) as adapter:
        with accelerator.autocast():
            adapted = steps_of(program, captured, config, predictor, low_rank_updates(model, targets))
        window = HardWindow(model, original, adapted, feed.scheduler, training.guidance)
        hard = HardPass([p for p in model.parameters() if p.requires_grad], adapted, training.guidance)
        scores = None if predictor is None else weights_digest(predictor)
        _train(hard, window, feed, config, training, out, accelerator, rank=rank, predictor=scores)
        if accelerator.is_main_process:
            # No card: peft writes where the model came from into it, a Path as a Python object, and cannot read that again.
            adapter.create_or_update_model_card = lambda _: None
            adapter.save_pretrained(out / ADAPTER, safe_serialization=True, save_embedding_layers=False)
        accelerator.wait_for_everyone()
    return out / ADAPTER


def _train(
    hard: HardPass, window: HardWindow, feed: Feed, config: CacheConfig, training: TrainingConfig, out: Path, accelerator: Any, **more: Any
) -> None:
    """The optimizer steps; ``hard.weights`` end as the trained ones, or as their average if there is one."""
    weights = hard.weights
    average = copy.deepcopy(weights).requires_grad_(False)
    modules = {"lora": weights, "average": average}
    optimizer: Any = torch.optim.AdamW(weights.parameters(), lr=training.lr, betas=(0.9, 0.999))
    state = RunState(0, identity(config, training, **more))
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        state = RunState.resumed(load_checkpoint(checkpoint, modules, optimizer), state, checkpoint)
    prepared, optimizer = accelerator.prepare(hard, optimizer)
    with open_log(out, state.step, accelerator) as log, progress(accelerator.is_main_process, _COLUMNS) as bar:
        task = bar.add_task("LoRA", total=training.steps, completed=state.step, cache=math.nan, without=math.nan)
        while state.step < training.steps:
            clean, noise, make_call, p_step, generators = feed.batch(state.step)
            with accelerator.autocast():
                step = window.run(clean, noise, p_step, make_call, generators)
            loss = prepared(step)
            cache_loss, without = accelerator.reduce(torch.stack([loss.detach(), step.without_lora]), "mean").tolist()
            accelerator.backward(loss / max(without, 1e-12) if training.cost_weight is None else loss)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            decay = min(training.ema_decay or 0.0, (1 + state.step) / (10 + state.step))
            torch._foreach_lerp_(list(average.parameters()), [p.data for p in weights.parameters()], 1 - decay)
            if accelerator.is_main_process:
                row = dict(step=state.step, p_step=p_step, cache_loss=cache_loss, without_lora=without)
                log.write(json.dumps(row) + "\n")
                accelerator.log(row, step=state.step)
                bar.update(task, completed=state.step, cache=cache_loss, without=without)
                if state.step % training.checkpoint_every == 0 or state.step == training.steps:
                    log.flush()
                    save_checkpoint(checkpoint, modules, getattr(optimizer, "optimizer", optimizer), asdict(state))
    with torch.no_grad():
        torch._foreach_copy_(list(weights.parameters()), list(average.parameters()))
