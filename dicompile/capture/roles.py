"""What each input of a captured graph is: a parameter, the latent, the timestep, or conditioning."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from dicompile.errors import InvalidSetting
from dicompile.names import sounds_like_another, sounds_like_latent, sounds_like_time
from dicompile.nodes import results_of, tensor_of, walk
from dicompile.ops.kinds import CARRIERS, CONTRACTIONS, SINUSOIDS
from dicompile.text import clean_path

# How Dynamo spells the root module's own tensors; those of its children are spelled without __dict__.
_OWN_TENSORS = re.compile(r"\.__dict__\['(_parameters|_buffers)'\]")


NO_TIMESTEP = "none"
"""What a user says of a model that takes no timestep."""


class Role(enum.Enum):
    """What an input means to the sampling loop."""

    PARAMETER = "parameter"
    LATENT = "latent"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"
    CONSTANT = "constant"
    """A table of numbers in the model's code."""

    @property
    def is_given(self) -> bool:
        """True for what a call of the model passes."""
        return self in (Role.LATENT, Role.TIMESTEP, Role.CONDITIONING)


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
        return self.name if self.role.is_given else f"@{self.name}"


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says of a model's inputs, where it should not be found out.

    Attributes:
        timestep: the argument that is the timestep; "none" for a model that takes none, whose every call is a step.
        latent: the argument that is denoised.
    """

    timestep: str | None = None
    latent: str | None = None


NOTHING_SAID = Said()


def check_names(module: nn.Module, said: Said) -> None:
    """Check that the arguments which the user named are there.

    Raises:
        InvalidSetting: the module's forward has none of that name.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for role, name in (("timestep", said.timestep), ("latent", said.latent)):
        if name is not None and name.split(".")[0] not in known and (role, name) != ("timestep", NO_TIMESTEP):
            raise InvalidSetting(
                f"{type(module).__name__} has no argument {name!r} that could be its {role}",
                where=f"{role}={name!r}",
                fix=f"its arguments are: {', '.join(known)}",
            )


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


def assign_roles(graph: fx.Graph, names: Sequence[tuple[str, bool]], said: Said) -> tuple[Input, ...]:
    """Tell parameters, latent, timestep and conditioning apart.

    What the user says goes first, then the names that latents usually have, and then the shape: the latent is the
    floating input shaped most like the model's output. The timestep is the input that reaches a sinusoidal embedding;
    of several, such as FLUX's guidance beside its timestep, the one whose argument is called after time or sigma, and
    then the smallest: one value per sample goes before one per frame or token.

    Args:
        graph: functional ATen graph with ``meta["val"]``.
        names: name of each placeholder, and whether it is a parameter.
        said: by the user.

    Raises:
        InvalidSetting: the user named an input that is not there.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    arguments = [
        node for node, (_, owned) in zip(placeholders, names, strict=True)
        if not owned and isinstance(node.meta["val"], torch.Tensor)
    ]  # fmt: skip
    label = {node: name for node, (name, _) in zip(placeholders, names, strict=True)}
    inputs = [node for node, (_, owned) in zip(placeholders, names, strict=True) if not owned]
    latent = _named(said.latent, inputs, label, "latent") or _find_latent(graph, arguments, label)
    if said.timestep == NO_TIMESTEP:
        timestep = None
    else:
        timestep = _named(said.timestep, inputs, label, "timestep")
        timestep = timestep or _find_timestep([node for node in arguments if node is not latent], label)
    if timestep is None and said.timestep is None:  # a whole number, of which Dynamo made a symbol
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


def _named(name: str | None, inputs: Sequence[fx.Node], label: dict[fx.Node, str], role: str) -> fx.Node | None:
    """The input that the user named."""
    if name is None:
        return None
    found = [node for node in inputs if label[node] == name or label[node].split(".")[0] == name]
    if not found:
        raise InvalidSetting(
            f"the model reads no tensor from an argument {name!r}, which is said to be its {role}",
            where=f"{role}={name!r}",
            fix=f"its inputs are: {', '.join(dict.fromkeys(label[node] for node in inputs))}",
        )
    return found[0]


def _find_latent(graph: fx.Graph, arguments: Sequence[fx.Node], label: dict[fx.Node, str]) -> fx.Node | None:
    """The input that is called like a latent, and then the one that is shaped most like the output."""
    shapes = [tuple(node.meta["val"].shape) for node in results_of(graph) if isinstance(node, fx.Node)]
    target = next((shape for shape in shapes if len(shape) >= 2), ())

    def likeness(node: fx.Node) -> tuple[bool, bool, int, bool]:
        shape = tuple(node.meta["val"].shape)
        # A picture or a film may come with more channels than it leaves with, and a condition with as many.
        ignored = 1 if len(shape) >= 4 else None
        equal = [a == b for i, (a, b) in enumerate(zip(shape, target, strict=False)) if i != ignored]
        is_alike = len(shape) == len(target)
        is_other = sounds_like_another(label[node])
        return sounds_like_latent(label[node]), is_alike, sum(equal) if is_alike else 0, not is_other

    floating = [node for node in arguments if node.meta["val"].is_floating_point() and node.meta["val"].ndim >= 2]
    return max(floating, key=likeness, default=None)


def _whole_batch(latent: fx.Node | None, label: dict[fx.Node, str]) -> list[fx.Node]:
    """The latent, and where a model takes the samples of a batch as a list, the other ones."""
    batch, _, index = label[latent].rpartition(".") if latent is not None else ("", "", "")
    if not (batch and index.isdigit()):
        return [] if latent is None else [latent]
    return [node for node, name in label.items() if name.rpartition(".")[0] == batch]


def _find_timestep(arguments: Sequence[fx.Node], label: dict[fx.Node, str]) -> fx.Node | None:
    """The input that reaches a sinusoid and is called after time; without such a name the only small one that does."""
    embedded = [node for node in arguments if _reaches_sinusoid(node)]
    named = [node for node in embedded if sounds_like_time(label[node])]
    # A learned table of timesteps has no sinusoid.
    named = named or [node for node in arguments if tensor_of(node).ndim <= 1 and sounds_like_time(label[node])]
    small = [
        node for node in embedded
        if tensor_of(node).ndim <= 2 and not _is_position_table(node) and not sounds_like_another(label[node])
    ]  # fmt: skip
    return min(named or small, key=lambda node: tensor_of(node).ndim, default=None)


def _reaches_sinusoid(node: fx.Node) -> bool:
    """True if the input reaches sin or cos with only element-wise arithmetic and views between."""
    reached = walk([node], lambda node: (user for user in node.users if not _contracts(user)))
    return any(user.target in SINUSOIDS for user in reached)


def _contracts(node: fx.Node) -> bool:
    return node.op != "call_function" or node.target in CONTRACTIONS


def _is_position_table(node: fx.Node) -> bool:
    value = tensor_of(node)
    return value.ndim == 2 and value.shape[-1] <= 4
