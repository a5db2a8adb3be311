"""The frame of a step graph: the skeleton copied, with something put in the place of every block call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tokencache_compile.ir import Block, BlockProgram, CacheSpec, StepKind, StepProgram
from tokencache_compile.passes.capture import BLOCK_OP
from tokencache_compile.passes.inner_tensors import Access, take_apart, taken
from tokencache_compile.passes.outline import block_call_index
from tokencache_compile.passes.regions import Region, plain_region

VisitBlock = Callable[[Block, list[Node]], list[Node]]


class StepGraph:
    """Builds one :class:`StepProgram`: inputs first, then ``extras``, then caches; outputs, then the same caches."""

    def __init__(self, program: BlockProgram, caches: Sequence[CacheSpec], extras: Sequence[str]) -> None:
        self.program, self.caches = program, tuple(caches)
        self.graph = Graph()
        self.tracer = GraphAppendingTracer(self.graph)
        self.root: dict[str, Any] = {}
        self._weights: dict[str, Node] = {}
        self._accesses: dict[str, tuple[Access, ...]] = {}
        self._inputs = {name: self.graph.placeholder(name) for name in program.input_names}
        self.extras = {name: self.proxy(self.graph.placeholder(name)) for name in extras}
        self.cache_in = {spec.name: self.proxy(self.graph.placeholder(spec.name)) for spec in caches}
        self.cache_out: dict[str, Any] = dict(self.cache_in)

    def proxy(self, node: Node) -> Any:
        return Proxy(node, self.tracer)

    def weight(self, fqn: str, tensor: Tensor) -> Node:
        """The tensor read from the graph's root; shared with the model, once a name."""
        if fqn not in self._weights:
            self.root[fqn] = tensor
            self._weights[fqn] = self.graph.get_attr(fqn)
        return self._weights[fqn]

    def call(self, name: str, make: Callable[[], Region], arguments: Sequence[Node], num_outputs: int) -> list[Node]:
        """Call the region ``name``, made at its first use."""
        if name not in self.root:
            module, self._accesses[name] = take_apart(make().graph_module)
            self.root[name] = Region(module)
        result = self.proxy(self.graph.call_module(name, tuple(taken(self.graph, arguments, self._accesses[name]))))
        return [result[i].node for i in range(num_outputs)]

    def block_weights(self, block: Block) -> list[Node]:
        names = block.weight_fqns(self.program.body_of(block))
        return [self.weight(name, self.program.tensors[name]) for name in names]

    def plain_block(self, block: Block, inputs: list[Node]) -> list[Node]:
        """The block as the model has it."""
        body = self.program.body_of(block)
        return self.call(body.name, lambda: plain_region(body), [*self.block_weights(block), *inputs], body.num_outputs)

    def finish(self, kind: StepKind, keep: tuple[int, ...], visit: VisitBlock, note: str) -> StepProgram:
        """Copy the skeleton, asking ``visit`` for the outputs of every block, and close the graph."""
        env: dict[Node, Any] = {}
        num_outputs = 0
        for node in self.program.skeleton.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._inputs[node.name]
            elif node.op == "get_attr":
                env[node] = self.weight(node.target, _attribute(self.program.skeleton, node.target))
            elif node.target is BLOCK_OP:
                inputs = [env[n] for n in node.args[0]]
                env[node] = visit(self.program.blocks[block_call_index(node)], inputs)
            elif node.op == "output":
                outputs = [env[value] for value in node.args[0]]
                num_outputs = len(outputs)
                self.graph.output((*outputs, *(self.cache_out[spec.name].node for spec in self.caches)))
            elif node.all_input_nodes and isinstance(env[node.all_input_nodes[0]], list):
                env[node] = env[node.args[0]][node.args[1]]
            else:
                env[node] = self.graph.node_copy(node, lambda n: env[n])
        module = GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return StepProgram(kind, keep, module, self.program.input_names, num_outputs, self.caches, (*self.program.provenance, note))


def extra_inputs(step: StepProgram) -> tuple[str, ...]:
    """Names of the graph's inputs between the model's own and the caches: step number, random scores."""
    names = tuple(n.target for n in step.module.graph.nodes if n.op == "placeholder")
    return tuple(str(name) for name in names[len(step.input_names) : len(names) - len(step.caches)])


def _attribute(module: GraphModule, path: str) -> Tensor:
    *parents, name = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    tensor: Tensor = getattr(owner, name)
    return tensor
