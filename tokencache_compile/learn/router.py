"""Learning-to-Cache's router (SPEC section 7): one gate for each module of each block on every second step, learned by mixing.

    module output = β · computed + (1 − β) · the last full step's           β = σ(router)
    loss = mean (output − the uncached model's output)² + λ · Σ β
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from tokencache_compile.ir import Block, Body
from tokencache_compile.learn.checkpoint import load_checkpoint, save_checkpoint
from tokencache_compile.learn.gated import mean_square
from tokencache_compile.learn.loop import CHECKPOINT, Batches, Data, Feed, RunState, TrainingConfig, check_run, identity, open_log, progress
from tokencache_compile.learn.stack import BlockStack
from tokencache_compile.learn.window import solve
from tokencache_compile.passes.modules import module_outputs
from tokencache_compile.plan import CacheConfig
from tokencache_compile.sampling import guided
from tokencache_compile.schedule import Schedule

EVERY_SECOND = CacheConfig(forecast=0, granularity="module", schedule=Schedule(2))


class _Modules(Interpreter):
    """Runs one body and notes what its modules, ``names`` of nodes, give; with ``gates`` [M], mixes that with what they ``held``."""

    def __init__(self, body: Body, names: Sequence[str], gates: Tensor | None, held: Sequence[Tensor]) -> None:
        super().__init__(body.graph_module)
        self.numbers = {name: number for number, name in enumerate(names)}
        self.gates, self.held = gates, held
        self.seen: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        number = self.numbers.get(n.name)
        if number is None:
            return value
        self.seen.append(value)
        return value if self.gates is None else self.gates[number] * value + (1 - self.gates[number]) * self.held[number]


class Router(nn.Module):
    """Logits [step pairs, blocks, modules of a block]; the gates of pair p hold on step 2p + 1."""

    def __init__(self, pairs: int, blocks: int, modules: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(pairs, blocks, modules))

    def forward(self, step: int) -> Tensor:
        """The gates of P-step ``step``, [blocks, modules]."""
        return self.logits[step // 2].sigmoid()


class RoutedStack:
    """The blocks of ``stack``, each cut at its modules.

    Raises:
        UnsupportedModelError: the blocks' modules do not stand apart.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack
        stream = stack.program.known_stream
        self.names = [tuple(part.node for part in module_outputs(body, stream)) for body in stack.program.bodies]

    def run(
        self, call: Mapping[str, Any], gates: Tensor | None = None, held: Sequence[Sequence[Tensor]] = ()
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """One forward pass, its modules mixed with what they ``held`` if there are ``gates``; the output, and what every module gave."""
        found: list[list[Tensor]] = []

        def visit(block: Block, inputs: list[Tensor]) -> Tensor:
            body = self.stack.program.body_of(block)
            own = (None, ()) if gates is None else (gates[block.index], held[block.index])
            modules = _Modules(body, self.names[block.body], *own)
            outputs = modules.run(*self.stack.weights_of(block), *inputs)
            found.append(modules.seen)
            result: Tensor = outputs[body.known_roles.stream_output]
            return result

        return self.stack.run(call, visit), found


def train_router(
    model: nn.Module,
    data: Data,
    scheduler: Any,
    training: TrainingConfig,
    out: Path,
    null: Mapping[str, Tensor] | None = None,
    accelerator: Any = None,
) -> Tensor:
    """Train a router for ``training.sampling_steps`` steps of ``scheduler``; ``model`` stays as it is, bit for bit.

    Args: as of :func:`train_predictor`. ``training.lr`` is 1e-3 in the method's paper and ``training.cost_weight``, its λ, 1e-6.

    Returns:
        Logits [step pairs, blocks, modules], on the CPU: what :func:`tokencache_compile.baselines.learning_to_cache` takes.

    Raises:
        ConfigError, InputError: as :func:`train_predictor`.
        UnsupportedModelError: the blocks' modules do not stand apart.
    """
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator(mixed_precision=training.mixed_precision, cpu=not torch.cuda.is_available())
    p_steps = check_run(model, EVERY_SECOND, training, null, accelerator)
    batches = Batches(data, null, training, p_steps, accelerator.process_index, accelerator.num_processes)
    feed = Feed(model, batches, scheduler, accelerator.device)
    routed = RoutedStack(BlockStack(model, feed.first_call()))
    router = Router(math.ceil(training.sampling_steps / 2), routed.stack.num_blocks, len(routed.names[0])).to(accelerator.device)
    optimizer = torch.optim.AdamW(router.parameters(), lr=training.lr)
    state, checkpoint = RunState(0, identity(EVERY_SECOND, training, router=True)), out / CHECKPOINT
    if checkpoint.exists():
        state = RunState.resumed(load_checkpoint(checkpoint, {"router": router}, optimizer), state, checkpoint)
    wrapped, optimizer = accelerator.prepare(router, optimizer)
    with open_log(out, state.step, accelerator) as log, progress(accelerator.is_main_process, "loss {task.fields[loss]:.2e}") as bar:
        task = bar.add_task("router", total=training.steps, completed=state.step, loss=math.nan)
        while state.step < training.steps:
            clean, noise, make_call, p_step, generators = feed.batch(state.step)
            held: list[list[Tensor]] = []

            def predict(_: int, call: Mapping[str, Any], held: list[list[Tensor]] = held) -> Tensor:
                output, values = routed.run(call)
                held[:] = values
                return output

            def shown(output: Tensor, channels: int = clean.shape[1]) -> Tensor:
                part = output[:, :channels]
                return part if training.guidance == 1.0 else guided(part, training.guidance)

            with accelerator.autocast():
                with torch.no_grad():
                    steps = range(p_step - 1, p_step)
                    call = solve(feed.scheduler, clean, noise, steps, make_call, predict, generators, training.guidance)
                    target = shown(routed.run(call)[0])
                gates = wrapped(p_step)
                error = mean_square(shown(routed.run(call, gates, held)[0]) - target)
                loss = error + (training.cost_weight or 0.0) * gates.sum()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            value = float(accelerator.reduce(error.detach(), "mean"))
            if accelerator.is_main_process:
                row = {"step": state.step, "p_step": p_step, "error": value, "mean_gate": float(gates.detach().mean())}
                log.write(json.dumps(row) + "\n")
                bar.update(task, completed=state.step, loss=value)
                if state.step % training.checkpoint_every == 0 or state.step == training.steps:
                    log.flush()
                    save_checkpoint(checkpoint, {"router": router}, getattr(optimizer, "optimizer", optimizer), asdict(state))
    accelerator.wait_for_everyone()
    return router.logits.detach().cpu()
