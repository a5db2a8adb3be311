"""Training the Cache Predictor (paper section III-C, Alg. 1, Eq. 9; SPEC section 3) on accelerate."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.deployed import DeployedBlocks
from tokencache_compile.learn.gated import GatedPass, GatedResult
from tokencache_compile.learn.loop import CHECKPOINT, Data, Feed, RunState, TrainingConfig, check_run, identity, open_log, progress
from tokencache_compile.learn.loop import Batches as _Batches
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.learn.window import Window
from tokencache_compile.plan import CacheConfig, resolve_plan
from tokencache_compile.predictor import CachePredictor

__all__ = ["CHECKPOINT", "Data", "TrainingConfig", "train_predictor"]
_COLUMNS = "cache {task.fields[cache]:.2e}  cost {task.fields[cost]:.2e}  mean α {task.fields[alpha]}"


def train_predictor(
    model: nn.Module,
    data: Data,
    scheduler: Any,
    config: CacheConfig,
    training: TrainingConfig,
    out: Path,
    null: Mapping[str, Tensor] | None = None,
    accelerator: Any = None,
) -> CachePredictor:
    """Train a predictor for the deployment that ``config`` describes; ``model`` stays as it is, bit for bit.

    Args:
        model: the transformer, float32, in eval mode and on the accelerator's device; frozen.
        data: real samples and their conditions.
        scheduler: the deployment's diffusers scheduler.
        config: ratio, K, schedule, forecast and context of the deployment.
        out: folder of the run: checkpoint (found there, the run resumes) and ``log.jsonl``.
        null: the "unconditional" conditions of label dropout, one row without batch axis each.
        accelerator: an ``accelerate.Accelerator``; made from ``training.mixed_precision`` if left out.

    Returns:
        The predictor (its weight average if there is one), on the CPU.

    Raises:
        ConfigError: the model is in training mode, not in float32 or on another device, the schedule has no P-step, the batch
            cannot be shared among the processes, the checkpoint is another run's.
        InputError: the data is empty, its items differ in conditions or shapes, or the model does not take them.
    """
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator(mixed_precision=training.mixed_precision, cpu=not torch.cuda.is_available())
    p_steps = check_run(model, config, training, null, accelerator)
    device = accelerator.device
    batches = _Batches(data, null, training, p_steps, accelerator.process_index, accelerator.num_processes)
    feed = Feed(model, batches, scheduler, device)
    stack = BlockStack(model, feed.first_call())
    num_cached = resolve_plan(config, stack.num_blocks, stack.program.known_stream.tokens, False, 2).num_cached
    blocks = DeployedBlocks(stack, config)
    window = Window(blocks, feed.scheduler, config, num_cached, training.guidance)
    predictor = stack.new_predictor().requires_grad_(True)
    average = copy.deepcopy(predictor).requires_grad_(False)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=training.lr, betas=(0.9, 0.999))
    state = RunState(0, identity(config, training))
    checkpoint = out / CHECKPOINT
    if checkpoint.exists():
        state = RunState.resumed(load_checkpoint(checkpoint, {"predictor": predictor, "average": average}, optimizer), state, checkpoint)
    gated, optimizer = accelerator.prepare(GatedPass(blocks, predictor, training.guidance, _shares_pairs(config, training)), optimizer)
    average.to(device)
    budget, cost_weight = (1.0 - config.ratio, 0.0) if training.cost_weight is None else (None, training.cost_weight)
    with open_log(out, state.step, accelerator) as log, progress(accelerator.is_main_process, _COLUMNS) as bar:
        task = bar.add_task("predictor", total=training.steps, completed=state.step, cache=math.nan, cost=math.nan, alpha="")
        while state.step < training.steps:
            clean, noise, make_call, p_step, generators = feed.batch(state.step)
            with accelerator.autocast():
                step = window.run(clean, noise, p_step, make_call, generators)
                result: GatedResult = gated(step, budget)
                loss = result.cache_loss + cost_weight * result.cost
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            alpha = accelerator.reduce(result.alpha.detach(), "mean")
            cache_loss = float(accelerator.reduce(result.cache_loss.detach(), "mean"))
            state.step += 1
            decay = min(training.ema_decay or 0.0, (1 + state.step) / (10 + state.step))
            torch._foreach_lerp_(list(average.parameters()), [p.data for p in predictor.parameters()], 1 - decay)
            cost = cost_weight * float(alpha.sum()) * stack.program.known_stream.tokens
            if accelerator.is_main_process:
                row = dict(step=state.step, p_step=p_step, cache_loss=cache_loss, cost_loss=cost)
                log.write(json.dumps(row | {"alpha": [round(a, 4) for a in alpha.tolist()]}) + "\n")
                accelerator.log(row, step=state.step)
                bar.update(task, completed=state.step, cache=cache_loss, cost=cost, alpha=f"{float(alpha.mean()):.3f}")
                if state.step % training.checkpoint_every == 0 or state.step == training.steps:
                    log.flush()
                    modules = {"predictor": predictor, "average": average}
                    save_checkpoint(checkpoint, modules, getattr(optimizer, "optimizer", optimizer), asdict(state))
    accelerator.wait_for_everyone()
    return average.cpu().eval()


def _shares_pairs(config: CacheConfig, training: TrainingConfig) -> bool:
    return config.selection == "pair" and training.guidance != 1.0
