"""Dynamo's torch-level graph -> functional pre-dispatch ATen.

Functional, because 36 of 101 surveyed models write tensors in place and dataflow along plain edges would miss it;
pre-dispatch, because attention, linear and normalisation stay single nodes there and the graph stays differentiable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dicompile.capture.autocast import drop_regions, make_autocast_explicit, share_casts
from dicompile.capture.constants import lift_constants
from dicompile.capture.functional import make_functional
from dicompile.capture.numbers import numbers_in
from dicompile.capture.parts import inline_regions, write_out_calls
from dicompile.capture.roles import NOTHING_SAID, Input, Role, Said, assign_roles
from dicompile.compat import code_on_demand, transforms_undone
from dicompile.errors import CannotCapture, DicompileError
from dicompile.text import first_line, graph_text, module_path, operator_text

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Capture:
    """One captured graph, equal to itself alone.

    Attributes:
        graph_module: functional ATen; every parameter and buffer is a placeholder; values in ``meta["val"]``.
        inputs: one `Input` per placeholder, in order.
        fake_mode: the mode that made the values; new nodes must use it too.
        constants: values of the last inputs, which are tables of numbers in the model's code.
    """

    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    fake_mode: FakeTensorMode
    constants: tuple[torch.Tensor, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.graph_module.graph

    def input_position(self, role: Role) -> int | None:
        """Position of the first input with this role, or None."""
        return next((i for i, item in enumerate(self.inputs) if item.role is role), None)

    def __str__(self) -> str:
        return graph_text(self.graph, [item.label for item in self.inputs])


def capture_graph(
    dynamo_graph: fx.GraphModule,
    names: Sequence[tuple[str, bool]],
    arguments: Sequence[object],
    said: Said = NOTHING_SAID,
) -> Capture:
    """Normalise one Dynamo graph for the shapes of `arguments`.

    Args:
        dynamo_graph: graph as handed to a ``torch.compile`` backend, parameters as inputs.
        names: name of each placeholder and whether it is a parameter, see `input_names`.
        arguments: one value per placeholder; tensors (real or fake) and ints. Shapes are taken as they are, so symbolic
            sizes of a dynamic graph become constants, and so do the values of `read_inputs`: one capture serves one of
            each.
        said: what the user says of the inputs.

    Raises:
        CannotCapture: the graph writes to its inputs, or has sizes that depend on values.
    """
    dynamo_graph = write_out_calls(inline_regions(dynamo_graph))
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    read = read_inputs(dynamo_graph.graph)
    fakes = [
        _fake(value, fake_mode, is_read=i in read) if isinstance(value, torch.Tensor) else value
        for i, value in enumerate(arguments)
    ]
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        fx.traceback.preserve_node_meta(),
        fake_mode,
        transforms_undone(),
        code_on_demand(),
    ):
        try:
            explicit = make_autocast_explicit(dynamo_graph, fakes)
            with torch._C._DisableAutocast():
                functional = make_functional(explicit, fakes, fake_mode)
        except DicompileError:
            raise
        except (RuntimeError, AssertionError) as error:
            raise _not_functional(dynamo_graph.graph, error) from error
        mutated = [names[i][0] for i in functional.mutated]
        if mutated:
            raise CannotCapture(
                f"the model writes to its inputs: {', '.join(mutated)}",
                where="capture",
                why="a step that is skipped could not repeat the write",
                fix="copy the tensor inside the model before writing to it",
            )
        graph_module = functional.graph_module
        for placeholder, value in zip(graph_module.graph.find_nodes(op="placeholder"), arguments, strict=True):
            placeholder.meta.setdefault("val", value)  # sizes of a dynamic graph, which nothing uses any more
        _refuse_open_sizes(graph_module.graph)
        drop_regions(graph_module.graph)
        if explicit is not dynamo_graph:
            share_casts(graph_module.graph)
        constants = lift_constants(graph_module, fake_mode)
    _drop_inference_noise(graph_module.graph)
    graph_module.recompile()
    inputs = assign_roles(graph_module.graph, [*names, *((f"constant_{i}", True) for i in range(len(constants)))], said)
    held = tuple(replace(item, role=Role.CONSTANT) for item in inputs[len(names) :])
    return Capture(graph_module, (*inputs[: len(names)], *held), fake_mode, constants)


def _not_functional(graph: fx.Graph, error: Exception) -> CannotCapture:
    """Names the operator, if torch says at which node it stopped."""
    stopped = re.search(r"While executing %(\w+)", str(error))
    node = next((node for node in graph.nodes if stopped and node.name == stopped[1]), None)
    path = module_path(node) if node is not None else ""
    what = "the graph" if node is None else f"{operator_text(node.target)}{f' in {path}' if path else ''}"
    return CannotCapture(
        f"{what} cannot be made functional",
        where="capture",
        why=first_line(error),
        fix="see DICOMPILE_DEBUG=folder for the graph, and report it",
    )


def _refuse_open_sizes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
            path = module_path(node)
            raise CannotCapture(
                f"the size of {operator_text(node.target)}{f' in {path}' if path else ''} depends on values",
                where="capture",
                why="plans and costs are made before the values are there",
                fix="compute it with tensors of fixed sizes, or from Python numbers",
            )


def read_inputs(dynamo_graph: fx.Graph) -> tuple[int, ...]:
    """Positions of the inputs whose value the graph reads: Python floats of a dynamic graph come as tensors."""
    read = {node.args[0] for node in numbers_in(dynamo_graph)}
    return tuple(i for i, node in enumerate(dynamo_graph.find_nodes(op="placeholder")) if node in read)


def _fake(value: torch.Tensor, mode: FakeTensorMode, *, is_read: bool) -> torch.Tensor:
    if isinstance(value, FakeTensor):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if is_read:
        return mode.fake_tensor_converter.from_real_tensor(mode, value, make_constant=True)
    return mode.from_tensor(value.detach(), static_shapes=True)  # weights of inference mode may not want gradients here


def _drop_inference_noise(graph: fx.Graph) -> None:
    """Remove nodes that do nothing when a model samples: inactive dropout, metadata assertions, dead code."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.dropout.default and not (node.args[2] and node.args[1]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    # torch counts attention as impure, for the sake of its dropout.
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
