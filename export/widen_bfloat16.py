"""Widen bfloat16: ONNX operators that have no bfloat16 compute in float32, and round where they did.

    y = Conv(x, w)  →  y = Cast(Conv(Cast(x), Cast(w)))         Conv before opset 22, Einsum in every opset

Which ones they are is read from ONNX's own schemas. Kernels add up in float32 in any case.
"""

from __future__ import annotations

from typing import Any

_BFLOAT16 = "tensor(bfloat16)"


def widen_bfloat16(model: Any, opset: int) -> None:
    """Rewrite ``model``, an ``onnx_ir.Model`` of ``opset``, in place."""
    import onnx_ir as ir

    for node in list(model.graph):
        narrow_in, narrow_out = _without_bfloat16(node, opset)
        inputs = [i for i in narrow_in if (value := node.inputs[i]) is not None and value.dtype == ir.DataType.BFLOAT16]
        outputs = [i for i in narrow_out if node.outputs[i].dtype == ir.DataType.BFLOAT16]
        for i in inputs:
            cast = ir.node("Cast", [node.inputs[i]], attributes={"to": ir.DataType.FLOAT})
            model.graph.insert_before(node, cast)
            node.replace_input_with(i, cast.outputs[0])
        for i in outputs:
            value = node.outputs[i]
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.BFLOAT16})
            rounded = cast.outputs[0]
            rounded.name, value.name = value.name, f"{value.name}_float32"
            rounded.type, rounded.shape = ir.TensorType(ir.DataType.BFLOAT16), value.shape
            value.type = ir.TensorType(ir.DataType.FLOAT)
            for user, position in list(value.uses()):
                if user is not cast:
                    user.replace_input_with(position, rounded)
            model.graph.outputs[:] = [rounded if output is value else output for output in model.graph.outputs]
            model.graph.insert_after(node, cast)


def _without_bfloat16(node: Any, opset: int) -> tuple[list[int], list[int]]:
    """Positions of a node's inputs and outputs that ONNX allows no bfloat16."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    found = []
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        kinds = [formal[min(i, len(formal) - 1)].types for i in range(len(values))]  # the last one may be variadic
        found.append([i for i, types in enumerate(kinds) if _BFLOAT16 not in types])
    return found[0], found[1]
