"""How long does a whole generation of a full-size model take: plain, cached by this package, and cached by peers?

    pip install --no-deps cache-dit==1.5.3
    python benchmarks/generation_latency.py --device cuda --out benchmarks/results/generation_latency_cuda.json
    python benchmarks/generation_latency.py --models "DiT-XL/2 256" --out /tmp/cpu.json          # hours on a CPU

Random weights in bfloat16: no figure of quality. Every method has a process of its own, which compiles beside the others'; once all have,
they are timed one at a time, each in turn with the uncached model under torch.compile, on a GPU in the mode that runs CUDA graphs
(reduce-overhead). Seconds are medians over the rounds, on a GPU by CUDA events, and hold the sampler.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, DiTTransformer2DModel, PixArtTransformer2DModel
from judged import save
from peers import cache_dit, taylorseer, uncached_by_torch
from torch import nn

from tokencache_compile import CacheConfig, CachePredictor, Schedule
from tokencache_compile.api import transform
from tokencache_compile.demo import machine
from tokencache_compile.evidence.methods import Method, cached
from tokencache_compile.evidence.subject import Subject
from tokencache_compile.runtime import Dispatcher
from tokencache_compile.sampling import Conditions, sample
from tokencache_compile.step_times import seconds

COMMON: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28, "patch_size": 2,
    "activation_fn": "gelu-approximate",
}  # fmt: skip
PIXART: dict[str, Any] = COMMON | {
    "sample_size": 128, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "cross_attention_dim": 1152,
    "caption_channels": 4096, "use_additional_conditions": True,
}  # fmt: skip


@dataclass(frozen=True)
class FullSize:
    """A model of the paper at full size, and how many images of it are made at once."""

    model_class: Any
    config: dict[str, Any]
    batch: int
    steps: int


MODELS = {
    "DiT-XL/2 256": FullSize(DiTTransformer2DModel, COMMON | {"sample_size": 32, "num_embeds_ada_norm": 1000}, 8, 50),
    "DiT-XL/2 512": FullSize(DiTTransformer2DModel, COMMON | {"sample_size": 64, "num_embeds_ada_norm": 1000}, 4, 50),
    "PixArt-α 1024": FullSize(PixArtTransformer2DModel, PIXART, 2, 20),
}


def random_weights(of: FullSize, device: str) -> nn.Module:
    """The model with every weight drawn on ``device``, large enough that no block is close to the identity."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = of.model_class(**of.config)
    draw = torch.Generator(device=device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(parameter.shape, device=device).normal_(0.0, 0.02, generator=draw)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    return model.to(device, torch.bfloat16).eval()


def conditions_of(of: FullSize, device: str) -> Conditions:
    """A class or a caption for each image, guided."""
    if of.model_class is DiTTransformer2DModel:
        return Conditions.of_labels(torch.arange(of.batch, device=device) * 100, 1000, 4.0)
    draw = torch.Generator().manual_seed(2)

    def given(count: int) -> dict[str, Any]:
        size = torch.tensor([[1024.0, 1024.0]]).expand(count, 2)
        ratio = torch.ones(count, 1)
        return {
            "encoder_hidden_states": torch.randn(count, 120, 4096, generator=draw).to(device, torch.bfloat16),
            "added_cond_kwargs": {"resolution": size.to(device, torch.bfloat16), "aspect_ratio": ratio.to(device, torch.bfloat16)},
        }

    return Conditions(given(of.batch), given(1), 4.0)


def subject_of(name: str, device: str) -> Subject:
    """One of :data:`MODELS` as a subject of the bench."""
    of = MODELS[name]
    size = of.config["sample_size"]
    noise = torch.randn(of.batch, 4, size, size, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    drawn = noise, conditions_of(of, device)
    return Subject(name, lambda: random_weights(of, device), DDIMScheduler, lambda start, count: drawn, of.steps, pixels=False)


def with_predictor(subject: Subject) -> Method:
    """The paper's settings at about a quarter of the steps, with an untrained predictor: what it costs, not what it knows."""
    config = CacheConfig.paper(steps=subject.steps, full_steps=round(0.26 * subject.steps))

    def start(net: Any, scheduler: Any, backend: str) -> Any:
        blocks = net.transformer_blocks
        predictor = CachePredictor(blocks[0], net.config.num_attention_heads * net.config.attention_head_dim, len(blocks))
        torch.nn.init.normal_(predictor.head.weight, std=0.02)
        return transform(net, config=config, predictor=predictor, backend=backend, scheduler=scheduler)

    return Method("the paper's", "the paper's settings", start)


def one_liner(net: Any, scheduler: Any, backend: str) -> Any:
    """What the README begins with."""
    return transform(net, ratio=0.9, backend=backend, scheduler=scheduler)


def full_steps_only(net: Any, scheduler: Any, backend: str) -> Any:
    """The I-step at every step."""
    return transform(net, ratio=0.0, backend=backend, scheduler=scheduler)


def cache_dit_taylorseer(subject: Subject) -> Method:
    """cache-dit's block-level forecast: what this package has with nothing recomputed."""
    return cache_dit("order 2, every 4", "cache-dit TaylorSeer", subject, 4, 2)


# Of a subject, and how its compiled form is asked for; peers have the I-steps of "every 4" and the same order of forecast.
METHODS: dict[str, tuple[Callable[[Subject], Method], str]] = {
    "uncached, eager": (lambda _: uncached_by_torch(), "eager"),
    "uncached, torch.compile": (lambda _: uncached_by_torch(), "inductor"),
    "uncached, I-steps": (lambda _: Method("I-steps", "uncached", full_steps_only), "inductor"),
    "transform(model, ratio=0.9)": (lambda _: Method("one-liner", "ours", one_liner), "inductor"),
    "ratio 0.9, every 4": (lambda _: cached("ratio 0.9", CacheConfig(ratio=0.9, schedule=Schedule(4))), "inductor"),
    "nothing recomputed, every 4": (lambda _: cached("nothing recomputed", CacheConfig(ratio=1.0, schedule=Schedule(4))), "inductor"),
    "the paper's settings, predictor": (with_predictor, "inductor"),
    "cache-dit TaylorSeer, order 2, every 4": (cache_dit_taylorseer, "inductor"),
    "cache-dit TaylorSeer, order 2, every 4, CUDA graphs": (cache_dit_taylorseer, "cudagraphs"),
    "diffusers TaylorSeer, order 2, every 4": (lambda subject: taylorseer(subject, 4, 2), "inductor"),
}


@dataclass(frozen=True)
class Prepared:
    """A method compiled and warm: its run, that of the model under torch.compile, and what the method put in the model's place."""

    own: Callable[[], float]
    compared: Callable[[], float]
    net: Any
    seconds: float


def prepare(subject: Subject, method: Method, backend: str) -> Prepared:
    """Compile both sides and run each three times."""
    noise, conditions = subject.draw(0, 0)

    def run_of(net: Any, scheduler: Any) -> Callable[[], float]:
        return lambda: seconds(lambda: sample(net, scheduler, noise, subject.steps, conditions), noise.device)

    plain = uncached_by_torch().start
    assert method.start is not None and plain is not None
    graphs = "cudagraphs" if noise.is_cuda else "inductor"
    compared = run_of(plain(subject.load(), None, graphs), subject.scheduler())
    for _ in range(3):
        compared()
    began, scheduler = time.perf_counter(), subject.scheduler()
    net = method.start(subject.load(), scheduler, backend)
    own = run_of(net, scheduler)
    for _ in range(3):
        own()
    return Prepared(own, compared, net, time.perf_counter() - began)


def timed(prepared: Prepared, rounds: int) -> dict[str, Any]:
    """The figures of a method; the first round is not counted."""
    turns = [(prepared.compared(), prepared.own()) for _ in range(rounds + 1)][1:]
    found = {
        "seconds": statistics.median(own for _, own in turns),
        "compiled_seconds": statistics.median(other for other, _ in turns),
        "speed_up": statistics.median(other / own for other, own in turns),
        "each": turns,
        "prepare_seconds": prepared.seconds,
    }
    if isinstance(prepared.net, Dispatcher):
        summary = prepared.net.summary()
        found |= {"full_steps": summary.full_steps, "cached_steps": summary.cached_steps, "macs_share": 1.0 - summary.macs_saved}
    return found


def work(name: str, method: str, device: str, rounds: int, parent: Connection) -> None:
    """The process of one method: says that it is ready, waits for its turn, and sends figures; or why it failed."""
    try:
        subject = subject_of(name, device)
        make, backend = METHODS[method]
        prepared = prepare(subject, make(subject), backend)
        parent.send(None)
        parent.recv()
        parent.send(timed(prepared, rounds))
    except Exception as error:  # a method of others may raise anything
        parent.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})


def answer(child: Connection, process: BaseProcess, until: float) -> dict[str, Any] | None:
    """What a method's process sends next; it may have died, and is ended where it says nothing ``until`` a time of the clock."""
    try:
        if child.poll(max(0.0, until - time.perf_counter())):
            said: dict[str, Any] | None = child.recv()
            return said
    except EOFError:
        return {"failed": "its process ended"}
    process.kill()
    return {"failed": "it took too long"}


def main(
    out: Annotated[Path, typer.Option(help="JSON file; what it holds is not measured again.")],
    device: str = "cpu",
    models: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(MODELS),
    rounds: int = 5,
    patience: Annotated[int, typer.Option(help="Seconds in which methods are to be ready, and again each of them done.")] = 3600,
) -> None:
    """Measure and write the JSON."""
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"models": {}}
    processes = multiprocessing.get_context("spawn")
    children: dict[tuple[str, str], tuple[Connection, BaseProcess]] = {}
    for name, method in itertools.product(models.split(","), METHODS):
        if method in result["models"].get(name, {"rows": {}})["rows"]:
            continue
        child, parent = processes.Pipe()
        process = processes.Process(target=work, args=(name, method, device, rounds, parent))
        process.start()
        parent.close()
        children[name, method] = child, process
    until = time.perf_counter() + patience
    said = {key: answer(child, process, until) for key, (child, process) in children.items()}
    for (name, method), (child, process) in children.items():
        if (figures := said[name, method]) is None:
            child.send("your turn")
            figures = answer(child, process, time.perf_counter() + patience)
        print(name, method, {k: v for k, v in (figures or {}).items() if k != "each"}, flush=True)
        of = MODELS[name]
        new = {"images": of.batch, "steps": of.steps, "dtype": "bfloat16", "guided": True, "rounds": rounds, "rows": {}}
        result["models"].setdefault(name, new)["rows"][method] = figures
        result["machine"] = machine()
        save(result, out)


if __name__ == "__main__":
    typer.run(main)
