"""What the passes make: the structure of the graphs, folded blocks, shared weights, costs, and programs that must not pass."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from by_hand import dit_macs
from plain_loop import PlainLoop
from plain_run import assert_close, make_predictor
from tiny import LAST_K, LAYERS, ROWS, TOKENS, build, call_of, conditions, ddim, inputs, sample, transformed
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from tokencache_compile import InvariantError, UnsupportedModelError
from tokencache_compile.ir import CacheUnit, StepProgram
from tokencache_compile.macs import MacCounter
from tokencache_compile.passes.capture import capture
from tokencache_compile.passes.narrow_linears import narrow_linears
from tokencache_compile.passes.pipeline import StepPrograms
from tokencache_compile.passes.regions import Region
from tokencache_compile.passes.selection import below_one
from tokencache_compile.passes.verify import same_as_eager, verify_blocks, verify_step

CACHED = LAYERS - LAST_K
CONTEXTS = ("kept", "full", "cached", "reuse")


def programs(kind: str = "dit", layers: int = LAYERS, **settings: Any) -> StepPrograms:
    given = inputs(kind)
    steps: StepPrograms = transformed(build(kind, layers), example_inputs=given, **settings).steps
    return steps


def operations(step: StepProgram) -> Counter[str]:
    """How often each operation runs in a step, those of the regions once a call."""
    counts: Counter[str] = Counter()
    for node in step.module.graph.nodes:
        if node.op == "call_module":
            region: Any = getattr(step.module, node.target)
            counts += Counter(_name(inner) for inner in region.graph_module.graph.nodes)
            counts["region"] += 1
        else:
            counts[_name(node)] += 1
    return counts


def _name(node: torch.fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target)).split(".")[0]


# --- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize(("scorer", "forecast"), [("change", 0), ("norm", 1), ("random", 2)])
@pytest.mark.parametrize(("kind", "context"), [("dit", "cached"), ("dit", "reuse"), ("pixart_masked", "kept"), ("pixart_masked", "full")])
def test_selections_gathers_and_scatters(kind: str, context: Any, forecast: int, scorer: Any, history: Any) -> None:
    """As many as the settings imply in every cached block of a P-step, and none in an I-step."""
    steps = programs(kind, context=context, forecast=forecast, scorer=scorer, history=history)
    computed, scored = history == "computed", scorer != "random"
    copies = 1 + 2 * (context == "cached")  # the stream; keys and values
    gathers = 1 + (context in ("kept", "reuse"))  # the stream; among kept tokens its mask, or the attention's output
    if computed:
        copies += forecast + 1 + (forecast > 0) + scored  # updates, stamps, score
        gathers += forecast + 1 if forecast else scorer == "change"  # older updates and stamps; the previous update
    elif context == "reuse":
        gathers += forecast  # the attention's older outputs
    for step, blocks in ((steps.full, 0), (steps.cached[0], CACHED)):
        found = operations(step)
        assert (found["topk"], found["index_copy"], found["index_select"]) == (blocks, blocks * copies, blocks * gathers)
        assert found["region"] == LAYERS
        assert found["index_put"] == found["scatter"] == found["gather"] == 0


@pytest.mark.parametrize("history", ["full_steps", "computed"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_caches(context: Any, history: Any) -> None:
    """Their names, shapes, types and first values; the same list for every step of a plan."""
    steps = programs(context=context, forecast=2, keep=((3, 3, 3), (5, 0, 2)), groups=(0, 1), scorer="change", history=history)
    grid = (ROWS, TOKENS)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype, float]] = {}
    for block in range(CACHED):
        expected |= {f"update_{block:02d}_{order}": ((*grid, 32), torch.float32, 0.0) for order in range(3)}
        stamps, of = (f"stamps_{block:02d}", grid) if history == "computed" else ("stamps", (1, 1))  # of each token, or one for all
        expected[stamps] = ((*of, 3), torch.float32, -1.0)
        expected[f"score_{block:02d}"] = (grid, torch.float32, 0.0)
        if context == "cached":
            expected |= {f"{name}_{block:02d}": ((*grid, 2, 16), torch.float32, 0.0) for name in ("key", "value")}
        if context == "reuse":
            depth = 3 if history == "full_steps" else 1
            expected |= {f"attention_{block:02d}_{order}": ((*grid, 32), torch.float32, 0.0) for order in range(depth)}
    assert {spec.name: (spec.shape, spec.dtype, spec.fill) for spec in steps.full.caches} == expected
    assert all(step.caches == steps.full.caches for step in steps.cached) and len(steps.cached) == 2
    assert sum(c.numel() * c.element_size() for c in steps.initial_caches(torch.device("cpu"))) == sum(s.nbytes for s in steps.full.caches)


@pytest.mark.parametrize(("kind", "bodies", "sides", "tokens"), [("dit", 1, [], 16), ("pixart", 1, [], 16), ("pixart_masked", 1, [2], 16)])
def test_roles(kind: str, bodies: int, sides: list[int], tokens: int) -> None:
    """One structure for all blocks; the stream; one self-attention, the cross-attention left alone; masks that gather along."""
    program = programs(kind).program
    assert len(program.bodies) == bodies and [block.body for block in program.blocks] == [0] * LAYERS
    assert [block.fqn for block in program.blocks] == [f"transformer_blocks.{index}" for index in range(LAYERS)]
    roles = program.bodies[0].known_roles
    assert (program.known_stream.batch, program.known_stream.tokens, program.known_stream.channels) == (ROWS, tokens, 32)
    assert roles.stream_input == 0 and [side.token_dim for side in roles.side_inputs] == sides
    assert len(roles.attentions) == 1 and not roles.needs_shared_index


def test_weights_are_shared() -> None:
    """Every weight a graph reads is the model's own parameter; a step adds no storage to speak of."""
    model = build("dit")
    predictor = make_predictor(model)
    steps = transformed(model, predictor=predictor, example_inputs=inputs("dit")).steps
    own: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    own |= {f"predictor.{name}": parameter for name, parameter in predictor.named_parameters()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    read: set[str] = set()
    for step in (steps.full, *steps.cached):
        for node in step.module.graph.find_nodes(op="get_attr"):
            if node.target in own:
                assert _attribute(step.module, node.target) is own[node.target]
                read.add(node.target)
        tensors = [*step.module.parameters(), *step.module.buffers()]
        assert sum(t.numel() for t in tensors if t.untyped_storage().data_ptr() not in storages) < 300  # sinusoids, scalars
    unused = {name for name in own if name not in read}
    assert all("norm3" not in name and "ff." not in name and "attn1" not in name for name in unused), unused
    assert steps.program.shares_weights_of(model) and not steps.program.shares_weights_of(build("dit"))


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_description() -> None:
    """Which passes made a program, with their findings, and its graph as code."""
    steps = programs("pixart_masked", keep=((3, 0, 5),), forecast=1)
    text = steps.cached[0].describe()
    for line in (
        "P-step, keep (3, 0, 5)",
        "capture: 4 block calls",
        "outline: 4 blocks of 1 structure(s)",
        f"analyse: stream [{ROWS}, 16, 32] torch.float32, body_0: 1 self-attention(s), 1 per-token side input(s)",
        "make_cached: keep [3, 0, 5], context cached, forecast 1",
        "def forward(self, hidden_states",
        "torch.topk",
    ):
        assert line in text
    assert "make_full" not in text and "make_full" in steps.full.describe()


# --- folded blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forecast", [0, 1, 2])
def test_a_run_of_skipped_blocks_is_one_unit(forecast: int) -> None:
    """Their summed update does what theirs did one by one: the plain loop, which folds nothing, says the same."""
    keep, given = (3, 0, 0, 0, 2, 0), conditions("dit")
    model = build("dit", layers=7)
    dispatcher = transformed(model, keep=(keep,), forecast=forecast, scorer="norm", example_inputs=inputs("dit"))
    steps = dispatcher.steps
    assert steps.units == (CacheUnit(0, 0, False), CacheUnit(1, 3, True), CacheUnit(4, 4, False), CacheUnit(5, 5, True))
    updates = [spec.name for spec in steps.full.caches if spec.name.startswith("update")]
    assert updates == [f"update_{unit}_{order}" for unit in ("00", "01_03", "04", "05") for order in range(forecast + 1)]
    assert operations(steps.cached[0])["region"] == 3
    loop = PlainLoop(model, keep, 1, "cached", forecast, "norm")
    expected = ddim(lambda s, x, t: loop.step(s, s % 4 == 0, hidden_states=x, timestep=t, **given), sample())
    assert_close(ddim(call_of(dispatcher, given), sample()), expected)


@pytest.mark.parametrize("kind", ["dit", "pixart_masked"])
@pytest.mark.parametrize("forecast", [0, 2])
def test_ratio_one_recomputes_nothing(kind: str, forecast: int) -> None:
    """The whole run is the plain loop's with nothing kept; a P-step has no cached block's body, nor anything to select by."""
    model, given = build(kind), conditions(kind)
    dispatcher = transformed(model, ratio=1.0, forecast=forecast, example_inputs=inputs(kind))
    steps = dispatcher.steps
    (cached,) = steps.cached
    assert steps.units == (CacheUnit(0, CACHED - 1, True),)
    found = operations(cached)
    assert found["region"] == LAST_K and found["topk"] == found["index_copy"] == found["index_select"] == 0
    assert [name for name, module in cached.module.named_children() if isinstance(module, Region)] == ["body_0"]
    assert len(steps.full.caches) == forecast + 1 + (forecast > 0)
    loop = PlainLoop(model, (0,) * CACHED, LAST_K, "kept", forecast, "norm")
    expected = ddim(lambda s, x, t: loop.step(s, s % 4 == 0, hidden_states=x, timestep=t, **given), sample())
    assert_close(ddim(call_of(dispatcher, given), sample()), expected)


def test_ratio_one_does_not_ask_the_predictor() -> None:
    model = build("dit")
    steps = transformed(model, ratio=1.0, predictor=make_predictor(model), example_inputs=inputs("dit")).steps
    assert steps.macs_cached == (ROWS * dit_macs(model.config, [0] * CACHED + [None]),)


def test_scores_order_as_alpha_does_without_its_ties() -> None:
    """Against float64: logits up to 30, whose α all round to 1 in float32 from 17 on; single tokens, and sums of pairs."""
    logits = torch.linspace(-10, 30, 4001)
    scores, exact = below_one(logits), -torch.sigmoid(-logits.double())
    assert bool((scores.diff() > 0).all()) and int((torch.sigmoid(logits).diff() == 0).sum()) > 500
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=0)
    first, second = (torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    pairs = (exact[first] + exact[second])[(scores[first] + scores[second]).argsort()]
    assert float(pairs.diff().min()) > -1e-6
    assert float((exact[first] + exact[second])[(logits[first] + logits[second]).argsort()].diff().min()) < -0.1  # the logits' own order


def test_blocks_skipped_in_one_profile_only_stay_apart() -> None:
    steps = programs(keep=((3, 0, 0), (3, 2, 0)), groups=(0, 1))
    assert steps.units == (CacheUnit(0, 0, False), CacheUnit(1, 1, False), CacheUnit(2, 2, True))


class LongSkip(toy.ToyModel):
    """Adds an early block's stream at the end, so that stream must exist in a P-step too."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, condition = self.inner(x), self.embed(t)
        early = x
        for index, block in enumerate(self.blocks):
            x = block(x, condition)
            if index == 1:
                early = x
        result: Tensor = self.outer(x + 2 * early)
        return result


def test_a_stream_that_is_used_elsewhere_ends_a_unit() -> None:
    model = LongSkip(layers=5)
    steps = transformed(model, ratio=1.0, forecast=0, example_inputs=toy.toy_inputs()).steps
    assert steps.units == (CacheUnit(0, 1, True), CacheUnit(2, 3, True))
    dispatcher = transformed(model, ratio=1.0, forecast=0)
    with torch.no_grad():
        expected = dispatcher(**toy.toy_inputs())
        again = dispatcher(**toy.toy_inputs(t=499) | {"x": toy.toy_inputs()["x"]})
        own = model(**toy.toy_inputs(t=499))
    assert dispatcher.summary().cached_steps == 1
    # the time moved by 1 of 500: what is cached is nearly right, and would be far off without the early stream
    torch.testing.assert_close(again, own, atol=0.3, rtol=0.1)
    assert float((again - expected).abs().max()) < 0.3


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(5, 0, 11), (TOKENS, TOKENS, TOKENS), (1, 2, 3)])
@pytest.mark.parametrize("context", CONTEXTS)
def test_macs_are_those_of_the_formula(context: Any, keep: tuple[int, ...]) -> None:
    """To the last multiplication: for the I-step, and for a P-step under every context."""
    model = build("dit")
    steps = transformed(model, keep=(keep,), context=context, example_inputs=inputs("dit")).steps
    assert steps.macs_full == ROWS * dit_macs(model.config, [None] * LAYERS)
    assert steps.macs_cached == (ROWS * dit_macs(model.config, [*keep, None], context),)


def test_macs_of_the_predictor_count() -> None:
    model = build("dit")
    steps = transformed(model, ratio=0.9, predictor=make_predictor(model), example_inputs=inputs("dit")).steps
    assert steps.macs_full == ROWS * dit_macs(model.config, [None] * LAYERS)
    assert steps.macs_cached == (ROWS * dit_macs(model.config, [2, 2, 2, None], "cached", predictor=True),)


def test_summary_adds_up() -> None:
    """Counts of the current run, in its middle and at its end, over both branches."""
    model = build("dit")
    dispatcher = transformed(model, keep=((3, 0, 5),))
    full, cached = (ROWS * dit_macs(model.config, keep, "cached") for keep in ([None] * LAYERS, [3, 0, 5, None]))
    for step in range(6):
        for _ in range(2):
            with torch.no_grad():
                dispatcher(**inputs("dit", timestep=900 - step))
        summary = dispatcher.summary()
        number_full = 2 * (1 + (step >= 4))
        number_cached = 2 * (step + 1) - number_full
        assert (summary.full_steps, summary.cached_steps) == (number_full, number_cached)
        assert summary.macs == number_full * full + number_cached * cached
        assert summary.macs_uncached == (number_full + number_cached) * full
        assert summary.tokens_recomputed == (() if not number_cached else (3 * number_cached, 0, 5 * number_cached))
    assert summary.macs_saved == pytest.approx(1 - summary.macs / summary.macs_uncached) and summary.tokens_total == TOKENS
    assert summary.cache_bytes == 2 * sum(spec.nbytes for spec in dispatcher.steps.full.caches)
    assert "4 I-steps, 8 P-steps" in str(summary)


# --- programs that must not pass ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps() -> StepPrograms:
    return programs(keep=((3, 0, 5),), context="cached", history="computed")


def checked(step: StepProgram) -> int:
    macs: int = verify_step(step, tuple(inputs("dit")[name] for name in step.input_names), (CACHED, TOKENS))
    return macs


def test_a_region_is_run_on_shapes_once_for_inputs_of_a_kind_and_counted_for_every_block(
    steps: StepPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Region] = []
    forward = Region.forward

    def watched(region: Region, *args: Any) -> Any:
        ran.append(region)
        return forward(region, *args)

    monkeypatch.setattr(Region, "forward", watched)
    macs = checked(steps.full)
    regions = {name: one for name, one in steps.full.module.named_children() if isinstance(one, Region)}
    called = [node.target for node in steps.full.module.graph.nodes if node.target in regions]
    assert set(map(id, ran)) == set(map(id, regions.values()))
    assert len(called) == LAYERS and len(ran) == len(regions) + 1, "each once, and the first block's once more: its input has other strides"

    given = [inputs("dit")[name] for name in steps.full.input_names]
    with MacCounter() as counter:
        steps.full.module(*given, *steps.step_inputs(0, given[0].device), *steps.initial_caches(given[0].device))
    assert counter.macs == macs and len(ran) == len(regions) + 1 + LAYERS


def with_outputs(step: StepProgram, change: Any) -> StepProgram:
    """The step with its graph's outputs changed."""
    module = GraphModule(step.module, step.module.graph.__deepcopy__())
    output = module.graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(change(list(results))),)
    module.recompile()
    return replace(step, module=module)


def test_sound_programs_pass(steps: StepPrograms) -> None:
    assert checked(steps.full) == steps.macs_full and (checked(steps.cached[0]),) == steps.macs_cached
    assert checked(with_outputs(steps.cached[0], lambda outputs: outputs)) == steps.macs_cached[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: outputs[:-1], "returned"),  # a cache is dropped
        (lambda outputs: [*outputs, outputs[-1]], "returned"),
        (lambda outputs: [outputs[0], outputs[4], *outputs[2:]], "came out as"),  # stamps where an update belongs
        (lambda outputs: [*outputs[:5], outputs[1], *outputs[6:]], "came out as"),  # an update where the score belongs
    ],
)
def test_wrong_caches(steps: StepPrograms, change: Any, message: str) -> None:
    for step in (steps.full, steps.cached[0]):
        with pytest.raises(InvariantError, match=message):
            checked(with_outputs(step, change))


def test_a_block_call_left_in_a_step(steps: StepPrograms) -> None:
    left = replace(steps.full, module=steps.program.skeleton, caches=())
    with pytest.raises(InvariantError, match="block call"):
        checked(left)
    with pytest.raises(RuntimeError, match="not meant to run"), torch.no_grad():
        steps.program.skeleton(*(inputs("dit")[name] for name in steps.full.input_names))


def test_blocks_that_do_not_fit_the_skeleton(steps: StepPrograms) -> None:
    program = steps.program
    verify_blocks(program)
    with pytest.raises(InvariantError, match="the skeleton calls blocks"):
        verify_blocks(replace(program, blocks=program.blocks[:-1]))
    with pytest.raises(InvariantError, match="the skeleton calls blocks"):
        verify_blocks(replace(program, blocks=program.blocks[::-1]))
    with pytest.raises(InvariantError, match=r"transformer_blocks.2 lacks the weights \['transformer_blocks.2"):
        verify_blocks(
            replace(program, tensors={name: t for name, t in program.tensors.items() if name != "transformer_blocks.2.ff.net.2.bias"})
        )


def test_a_graph_that_computes_something_else(steps: StepPrograms) -> None:
    """Weights bound to the wrong block: every shape is right, the values are not."""
    model, given = build("dit"), inputs("dit")
    captured = capture(model, given)
    initial = [torch.zeros(()), *steps.initial_caches(torch.device("cpu"))]
    sound = transformed(model, keep=((3, 0, 5),), history="computed", example_inputs=given).steps.full
    same_as_eager(sound, captured, initial)
    module = GraphModule(sound.module, sound.module.graph.__deepcopy__())
    first, second = (
        next(node for node in module.graph.find_nodes(op="get_attr") if node.target == f"transformer_blocks.{block}.ff.net.2.bias")
        for block in (0, 1)
    )
    first.target = second.target
    module.recompile()
    wrong = replace(sound, module=module)
    assert checked(wrong) == steps.macs_full
    with pytest.raises(UnsupportedModelError, match="differs from an eager run"):
        same_as_eager(wrong, captured, initial)


# --- narrow linears -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("read", "narrow"), [((2, 3, 4, 5), 4), ((0, 1), 2), ((1, 4), 4), ((-1,), 1), ((0, 5), 6)])
def test_linears_compute_only_the_chunks_that_are_read(read: tuple[int, ...], narrow: int) -> None:
    """From the first chunk read to the last, with the same numbers and a view of the weight; none without both ends idle."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 5), torch.randn(48), torch.randn(3, 5)
    graph = Graph()
    given = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    linear = graph.call_function(torch.ops.aten.linear.default, tuple(given))
    linear.meta["val"] = torch.empty(3, 48)
    chunk = graph.call_function(torch.ops.aten.chunk.default, (linear, 6, 1))
    graph.output(tuple(graph.call_function(operator.getitem, (chunk, position)) for position in read))
    narrow_linears(graph)
    graph.lint()
    rows: list[int] = []

    class Widths(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.aten.linear.default:
                rows.append(value.shape[1])
            return value

    got = Widths(GraphModule({}, graph)).run(x, weight, bias)
    expected = torch.nn.functional.linear(x, weight, bias).chunk(6, 1)
    assert rows == [8 * narrow]
    for value, position in zip(got, read, strict=True):
        torch.testing.assert_close(value, expected[position])


@pytest.mark.parametrize("obstacle", ["other reader", "other axis", "tokens"])
def test_linears_stay_whole_where_something_else_reads_them(obstacle: str) -> None:
    """Another reader of the linear, a split of another axis, or a linear on tokens, whose shape is not known."""
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    linear = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    if obstacle != "tokens":
        linear.meta["val"] = torch.empty(6, 6)
    chunk = graph.call_function(torch.ops.aten.chunk.default, (linear, 6, 0 if obstacle == "other axis" else 1))
    first = graph.call_function(operator.getitem, (chunk, 0))
    graph.output((first, linear) if obstacle == "other reader" else (first,))
    before = str(graph)
    narrow_linears(graph)
    assert str(graph) == before
