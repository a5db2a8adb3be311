"""The checks of one family: I exact, P that keeps all tokens, P at ratio 0.9 against the independent reference; P in ONNX Runtime."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from families import Family, later
from plain_blocks import PlainBlocks
from torch import Tensor, nn

from tokencache_compile import CacheConfig, TokenCacheError
from tokencache_compile.calls import bind_call
from tokencache_compile.export.graphs import write_graphs
from tokencache_compile.export.onnxruntime import OnnxSession
from tokencache_compile.export.session import SessionEngine
from tokencache_compile.passes.engine_graph import engine_graphs
from tokencache_compile.passes.pipeline import StepPrograms, analysed, steps_of

CONTEXTS = ("kept", "cached", "full", "reuse")
TOLERANCE = 1e-5
ENGINE_TOLERANCE = 1e-4  # another runtime sums in another order


@dataclass
class ContextResult:
    """Of one context: largest errors relative to the output's largest value, or why it is refused."""

    i_exact: bool = False
    all_kept: float = float("inf")
    reference: float = float("inf")
    changed: float = 0.0  # how far the P-step at 0.9 is from the model's own: an error of 0 must not come from caching nothing
    refusal: str = ""
    failure: str = ""  # an error that is no refusal: a bug, here or in the reference

    @property
    def ok(self) -> bool:
        return self.i_exact and self.all_kept <= TOLERANCE and self.reference <= TOLERANCE and self.changed > 10 * TOLERANCE


@dataclass
class OnnxResult:
    """The P-step in ONNX Runtime: its largest difference from eager's, relative to the output's largest value, or why there is none."""

    context: str = ""
    error: float = float("inf")
    refusal: str = ""
    failure: str = ""  # as of a context

    @property
    def ok(self) -> bool:
        return self.error <= ENGINE_TOLERANCE

    def note(self) -> str:
        return self.refusal or self.failure or f"{self.context}, {self.error:.0e} from eager's"


@dataclass
class Result:
    """Of one family, over all contexts."""

    name: str
    key: str
    blocks: str = ""
    streams: str = ""
    contexts: dict[str, ContextResult] = field(default_factory=dict)
    onnx: OnnxResult | None = None

    @property
    def supported(self) -> bool:
        return any(context.ok for context in self.contexts.values())

    @property
    def worst(self) -> float:
        return max((max(c.all_kept, c.reference) for c in self.contexts.values() if c.ok), default=float("inf"))

    def line(self) -> str:
        notes = {name: "ok" if c.ok else c.refusal or c.failure or str(c) for name, c in self.contexts.items()}
        if len(set(notes.values())) == 1:
            notes = {"all": next(iter(notes.values()))}
        if self.onnx is not None:
            notes["ONNX"] = self.onnx.note()
        parts = [f"{name} {note[:400]}" for name, note in notes.items()]
        return f"{self.key}: {self.blocks}; {self.streams}; {'; '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def settings(**changes: Any) -> CacheConfig:
    return CacheConfig(**{"ratio": 0.9, "last_k": 1, "forecast": 0, "history": "computed", "scorer": "random", **changes})


def call_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    call = bind_call(model, inspect.signature(model.forward), (), inputs)
    call.pop("return_dict", None)
    return call


def tensors_of(call: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def run(steps: StepPrograms, cached: bool, call: dict[str, Any], caches: Sequence[Tensor], number: int) -> tuple[Tensor, list[Tensor]]:
    """One step: the model's first output, and the caches after it."""
    step = steps.cached[0] if cached else steps.full
    tensors = tensors_of(call)
    with torch.no_grad():
        results = step.module(*tensors, *steps.step_inputs(number, tensors[0].device), *caches)
    return results[0], list(results[step.num_outputs :])


def own(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


class Checked:
    """One family, captured once."""

    def __init__(self, entry: Family) -> None:
        self.entry = entry
        self.model, self.first = entry.build()
        self.second = later(self.first)
        self.now, self.then = call_of(self.model, self.first), call_of(self.model, self.second)
        self.program, self.captured = analysed(self.model, self.now)

    def steps(self, **changes: Any) -> StepPrograms:
        return steps_of(self.program, self.captured, settings(**changes), None)

    def describe(self, result: Result) -> None:
        roles = [self.program.body_of(block).known_roles for block in self.program.blocks]
        others = sorted({role.layout.others for role in roles} - {0})
        result.blocks = f"{len(roles) - 1} of {len(roles)}"
        result.streams = f"{1 + max(len(role.companions) for role in roles)}" + "".join(f" (text +{n})" for n in others)

    def context(self, context: str) -> ContextResult:
        """The three checks in one context."""
        found = ContextResult()
        steps = self.steps(context=context)
        tokens, cached = steps.plan.tokens, steps.plan.num_cached
        names = [block.fqn for block in self.program.blocks[:cached]]

        output, caches = run(steps, False, self.now, steps.initial_caches(torch.device("cpu")), 0)
        expected = own(self.model, self.first)
        found.i_exact = torch.equal(output, expected)

        everything = self.steps(context=context, keep=((tokens,) * cached,))
        # Under reuse the attention is the I-step's by definition, so the same input must give the same step.
        again, result_of = (self.now, expected) if context == "reuse" else (self.then, own(self.model, self.second))
        _, filled = run(everything, False, self.now, everything.initial_caches(torch.device("cpu")), 0)
        found.all_kept = error(run(everything, True, again, filled, 1)[0], result_of)

        entry = self.entry
        how = {name: getattr(entry, name) for name in ("text_first", "reuse_module", "history", "mixer", "grid")}
        plain = PlainBlocks(self.model, names, tokens, context, **how)
        plain.full_step(self.first)
        scores = steps.step_inputs(1, torch.device("cpu"))[1][0]
        kept = {name: scores[i].topk(steps.plan.profiles[0][i]).indices for i, name in enumerate(names)}
        partly = run(steps, True, self.then, caches, 1)[0]
        found.reference = error(partly, plain.cached_step(self.second, kept))
        found.changed = error(partly, own(self.model, self.second))
        return found

    def onnx(self, context: str) -> OnnxResult:
        """The P-step at 0.9 in ONNX Runtime, beside the same in eager."""
        steps = self.steps(context=context)
        _, caches = run(steps, False, self.now, steps.initial_caches(torch.device("cpu")), 0)
        expected, _ = run(steps, True, self.then, caches, 1)
        names = [f"output_{i}" for i in range(steps.full.num_outputs)]
        with TemporaryDirectory() as folder:
            try:
                (entry,) = write_graphs(engine_graphs(steps, names)[1:], Path(folder))
                io = entry.graph.io
                engine = SessionEngine(io, OnnxSession(Path(folder, f"{entry.graph.name}.onnx"), io))
            except TokenCacheError as refused:
                return OnnxResult(context, refusal=str(refused))
            (got, *_), _ = engine(tensors_of(self.then), steps.step_inputs(1, torch.device("cpu")), caches)
        return OnnxResult(context, error(got, expected))


def check(entry: Family, contexts: Sequence[str] = CONTEXTS, engines: bool = False) -> Result:
    """All contexts of a family, and where asked for ``engines`` its P-step in ONNX Runtime; no error ends it."""
    result = Result(entry.name, entry.key)
    try:
        checked = Checked(entry)
    except Exception as error:
        result.contexts = {context: _failed(error) for context in contexts}
        return result
    checked.describe(result)
    for context in contexts:
        try:
            result.contexts[context] = checked.context(context)
        except Exception as error:
            result.contexts[context] = _failed(error)
    if engines and result.supported:
        right = [context for context, found in result.contexts.items() if found.ok]
        context = "reuse" if "reuse" in right else right[0]
        try:
            result.onnx = checked.onnx(context)
        except Exception as error:
            result.onnx = OnnxResult(context, failure=f"{type(error).__name__}: {error}")
    return result


def _failed(error: Exception) -> ContextResult:
    refused = isinstance(error, TokenCacheError)
    return ContextResult(refusal=str(error)) if refused else ContextResult(failure=f"{type(error).__name__}: {error}")
