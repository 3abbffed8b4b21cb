"""What each input of a captured graph is: a parameter, the latent, the timestep, or conditioning."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from dicompile.nodes import tensor_of, walk
from dicompile.ops.kinds import CARRIERS, CONTRACTIONS, SINUSOIDS
from dicompile.text import clean_path

# How Dynamo spells the root module's own tensors; those of its children are spelled without __dict__.
_OWN_TENSORS = re.compile(r"\.__dict__\['(_parameters|_buffers)'\]")


class Role(enum.Enum):
    """What an input means to the sampling loop."""

    PARAMETER = "parameter"
    LATENT = "latent"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a captured graph.

    Attributes:
        name: dotted parameter path, or the name of the forward argument.
        role: see `Role`.
        is_signal: conditioning that may be another at every step for everybody, and so tells no guidance partners
            apart: what is added to the stream as it comes (the residuals of a ControlNet), and second timesteps.
    """

    name: str
    role: Role
    is_signal: bool = False

    @property
    def label(self) -> str:
        """Name in graph text; parameters start with ``@``."""
        return f"@{self.name}" if self.role is Role.PARAMETER else self.name


def input_names(dynamo_graph: fx.Graph) -> list[tuple[str, bool]]:
    """Name of each placeholder, and whether it is a parameter or buffer of a module.

    Call it inside the ``torch.compile`` backend: Dynamo forgets the sources afterwards.
    """
    return [_source_name(node) for node in dynamo_graph.nodes if node.op == "placeholder"]


def _source_name(placeholder: fx.Node) -> tuple[str, bool]:
    source = getattr(placeholder.meta.get("grapharg"), "source", None) or placeholder.meta.get("_dynamo_source")
    if source is None:
        return placeholder.name, False
    name = source.name if isinstance(source.name, str) else source.name()
    name = _OWN_TENSORS.sub(r".\1", name)
    owned = "_parameters[" in name or "_buffers[" in name or name.startswith(("L['self'].", "G["))
    return clean_path(name), owned


def assign_roles(graph: fx.Graph, names: Sequence[tuple[str, bool]]) -> tuple[Input, ...]:
    """Tell parameters, latent, timestep and conditioning apart.

    The latent is the floating input shaped most like the model's output. The timestep is the input that reaches a
    sinusoidal embedding; of several, such as FLUX's guidance beside its timestep, the one whose argument is called
    after time or sigma, and then the smallest: one value per sample goes before one per frame or token.

    Args:
        graph: functional ATen graph with ``meta["val"]``.
        names: name of each placeholder, and whether it is a parameter.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    arguments = [
        node for node, (_, owned) in zip(placeholders, names, strict=True)
        if not owned and isinstance(node.meta["val"], torch.Tensor)
    ]  # fmt: skip
    label = {node: name for node, (name, _) in zip(placeholders, names, strict=True)}
    latent = _find_latent(graph, arguments)
    timestep = _find_timestep([node for node in arguments if node is not latent], label)
    if timestep is None:  # a whole number, of which Dynamo made a symbol
        numbers = [node for node in placeholders if isinstance(node.meta["val"], int) and sounds_like_time(label[node])]
        timestep = next(iter(numbers), None)
    roles: dict[fx.Node | None, Role] = {
        **dict.fromkeys(_whole_batch(latent, label), Role.LATENT),
        timestep: Role.TIMESTEP,
    }
    signals = {node for node in arguments if node not in roles and _is_signal(node, label[node], latent)}
    return tuple(
        Input(name, Role.PARAMETER if owned else roles.get(node, Role.CONDITIONING), node in signals)
        for node, (name, owned) in zip(placeholders, names, strict=True)
    )


def _is_signal(node: fx.Node, name: str, latent: fx.Node | None) -> bool:
    """True for a second timestep, and for what joins a stream of the latent with nothing but a factor before.

    A text that is a stream itself is also added to, by branches; but those depend on it.
    """
    if sounds_like_time(name.rpartition(".")[2]) and tensor_of(node).ndim <= 2:
        return True
    if latent is None or tensor_of(node).ndim < 3:
        return False
    carried = set(walk([node], lambda found: (user for user in found.users if user.target in CARRIERS)))
    adds = {user for found in carried for user in found.users if user.target is torch.ops.aten.add.Tensor}
    others = [set(walk([parent])) for add in adds for parent in add.all_input_nodes if parent not in carried]
    return any(latent in ancestors and node not in ancestors for ancestors in others)


def _find_latent(graph: fx.Graph, arguments: Sequence[fx.Node]) -> fx.Node | None:
    results = graph.output_node().args[0]
    shapes = [tuple(node.meta["val"].shape) for node in results if isinstance(node, fx.Node)]
    target = next((shape for shape in shapes if len(shape) >= 2), ())

    def likeness(node: fx.Node) -> tuple[bool, int]:
        shape = tuple(node.meta["val"].shape)
        # A picture or a film may come with more channels than it leaves with, and a condition with as many.
        ignored = 1 if len(shape) >= 4 else None
        equal = [a == b for i, (a, b) in enumerate(zip(shape, target, strict=False)) if i != ignored]
        return len(shape) == len(target), sum(equal) if len(shape) == len(target) else 0

    floating = [node for node in arguments if node.meta["val"].is_floating_point() and node.meta["val"].ndim >= 2]
    return max(floating, key=likeness, default=None)


def _whole_batch(latent: fx.Node | None, label: dict[fx.Node, str]) -> list[fx.Node]:
    """The latent, and where a model takes the samples of a batch as a list, the other ones."""
    batch, _, index = label[latent].rpartition(".") if latent is not None else ("", "", "")
    if not (batch and index.isdigit()):
        return [] if latent is None else [latent]
    return [node for node, name in label.items() if name.rpartition(".")[0] == batch]


def _find_timestep(arguments: Sequence[fx.Node], label: dict[fx.Node, str]) -> fx.Node | None:
    """The input that reaches a sinusoid and is called after time; without such a name the smallest that does."""
    embedded = [node for node in arguments if _reaches_sinusoid(node)]
    named = [node for node in embedded if sounds_like_time(label[node])]
    # A learned table of timesteps has no sinusoid.
    named = named or [n for n in arguments if n.meta["val"].ndim <= 1 and sounds_like_time(label[n])]
    small = [node for node in embedded if node.meta["val"].ndim <= 2 and not _is_position_table(node)]
    return min(named or small, key=lambda node: node.meta["val"].ndim, default=None)


def _reaches_sinusoid(node: fx.Node) -> bool:
    """True if the input reaches sin or cos with only element-wise arithmetic and views between."""
    reached = walk([node], lambda node: (user for user in node.users if not _contracts(user)))
    return any(user.target in SINUSOIDS for user in reached)


def _contracts(node: fx.Node) -> bool:
    return node.op != "call_function" or node.target in CONTRACTIONS


def _is_position_table(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value.ndim == 2 and value.shape[-1] <= 4


def sounds_like_time(name: str) -> bool:
    """True for the names that models give to timesteps."""
    return "time" in name or "sigma" in name or name in ("t", "ts")
