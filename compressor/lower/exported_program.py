"""Conversion of a graph to an `ExportedProgram` without tracing it again.

`torch.export.export` runs a module to record its operators, which a `Graph` already holds with the shapes of their
values. Only its form differs: weights are inputs of an exported program, and its signature says which.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from passes.graph.graph import Graph, GraphError, attribute, value_of
from passes.torch_internals import fake_mode, is_mutable, size_ranges, tree_structure


def exported_program(graph: Graph) -> ExportedProgram:
    """Return a program that computes the same as the graph; its weights are those of the graph, not copies.

    The inputs and outputs are in the order of the graph. The program has no example inputs, so torch adds no checks of
    the sizes to it.

    Raises:
        GraphError: the graph calls a module or writes into a tensor, or an output is no tensor.
    """
    nodes = copy.deepcopy(graph.module.graph)
    nodes.set_codegen(fx.graph.CodeGen())
    inputs = [node for node in nodes.nodes if node.op == "placeholder"]
    weights = _lift_weights(graph, nodes, inputs[0])
    (output,) = [node for node in nodes.nodes if node.op == "output"]
    outputs: list[fx.Node] = []
    fx.node.map_arg(output.args, outputs.append)
    output.args = (tuple(outputs),)
    _check(nodes, outputs)
    given = [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs]
    returned = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs]
    arguments = tree_structure(((0,) * len(inputs), {}))
    results = tree_structure((0,) * len(outputs))
    return ExportedProgram(
        fx.GraphModule({}, nodes),
        nodes,
        ExportGraphSignature([*(spec for spec, _ in weights), *given], returned),
        {str(spec.target): tensor for spec, tensor in weights},
        size_ranges([value_of(node) for node in inputs]),
        [ModuleCallEntry("", ModuleCallSignature([], [], arguments, results))],
    )


def _lift_weights(graph: Graph, nodes: fx.Graph, first: fx.Node) -> list[tuple[InputSpec, torch.Tensor]]:
    """Replace every weight by an input before `first`; return the specification and the tensor of each."""
    parameters = dict(graph.module.named_parameters(remove_duplicate=False))
    lifted: dict[int, fx.Node] = {}  # by identity: tied weights are one input
    found: list[tuple[InputSpec, torch.Tensor]] = []
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        path, tensor = str(node.target), attribute(graph, node)
        if id(tensor) not in lifted:
            with nodes.inserting_before(first):
                weight = nodes.placeholder(f"weight_{path.replace('.', '_')}")
            weight.meta["val"] = _fake(node, tensor, first)
            lifted[id(tensor)] = weight
            kind = InputKind.PARAMETER if path in parameters else InputKind.BUFFER
            persistent = None if kind is InputKind.PARAMETER else True
            spec = InputSpec(kind, TensorArgument(weight.name), path, persistent=persistent)
            found.append((spec, tensor))
        node.replace_all_uses_with(lifted[id(tensor)])
        nodes.erase_node(node)
    return found


def _fake(node: fx.Node, tensor: torch.Tensor, first: fx.Node) -> Any:
    mode = fake_mode(value_of(first))
    if fake_mode(value_of(node)) is mode or mode is None:
        return value_of(node)
    return mode.from_tensor(tensor, static_shapes=True)


def _check(nodes: fx.Graph, outputs: list[fx.Node]) -> None:
    module = next((node for node in nodes.nodes if node.op == "call_module"), None)
    if module is not None:
        raise GraphError(f"found a call of the module {module.target}; expected calls of operators only.")
    writing = next((node for node in nodes.nodes if is_mutable(node.target)), None)
    if writing is not None:
        raise GraphError(
            f"{writing.name} ({writing.target}) writes into a tensor; expected operators that return values."
        )
    for node in outputs:
        if not isinstance(value_of(node), torch.Tensor):
            raise GraphError(f"found an output that is no tensor: {node.name}.")
