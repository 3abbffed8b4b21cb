"""What kind of operator each is: the lists that stages go by."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from dicompile.ops.registry import Flops, HeadsFirst, is_unknown, said_of
from dicompile.ops.ulysses import ULYSSES
from dicompile.ops.wrapped import WRAPPED_LINEAR

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
LINEAR = aten.linear.default
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
PADDED_CONVOLUTIONS = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
TRANSPOSED_CONVOLUTIONS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
ADDED_PRODUCTS = (aten.addmm.default, aten.baddbmm.default)
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, *ADDED_PRODUCTS)
LINEARS = (LINEAR, WRAPPED_LINEAR)
HEAVY = (ATTENTION, *LINEARS, *CONVOLUTIONS, *PADDED_CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *PRODUCTS)
# Picking rows of a table is a product with rows of zeros and a one.
CONTRACTIONS = (ATTENTION, *LINEARS, aten.conv2d.default, aten.embedding.default)

ELEMENTWISE = frozenset({
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.reciprocal.default, aten.neg.default, aten.abs.default,
    aten.square.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.sqrt.default,
    aten.rsqrt.default, aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.tanh.default,
    aten.erf.default, aten.sigmoid.default, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.leaky_relu.default, aten.elu.default, aten.softplus.default, aten.mish.default, aten.hardswish.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten._conj.default, aten.nan_to_num.default,
    aten.isnan.default, aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.lt.Scalar,
    aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.bitwise_not.default,
    aten.__and__.Tensor, aten.__or__.Tensor, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default,
})  # fmt: skip
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
SINUSOIDS = (aten.sin.default, aten.cos.default)
ADDS = (aten.add.Tensor,)
GATES = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
)
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
FILLS = (aten.full.default, aten.empty.memory_format, aten.zeros.default, aten.ones.default)

VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.detach.default,
    aten.alias.default,
    aten.unbind.int,
)
CARRIERS = frozenset((*VIEWS, *GATES, aten.select.int))
"""What passes a value on as it is, or with a factor."""
TRANSPORT = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.clone.default,
    aten.contiguous.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.pad.default,
    aten.expand.default,
)


def is_attention(node: fx.Node) -> bool:
    """True for attention as one operator: torch's, that among several ranks, or a registered one."""
    target = node.target.operator if isinstance(node.target, HeadsFirst) else node.target
    if target in (ATTENTION, ULYSSES):
        return True
    said = said_of(target)
    return said is not None and said.tokens == "attention"


def is_heavy(node: fx.Node) -> bool:
    """True if the node multiplies matrices, or is not known not to."""
    return node.target in HEAVY or is_attention(node) or is_unknown(node) or flop_formula(node) is not None


def flop_formula(node: fx.Node) -> Flops | None:
    """What a user told dicompile of an operator's cost, and else what torch knows of it, or was told."""
    said = said_of(node.target)
    if said is not None and said.flops is not None:
        return said.flops
    return flop_registry.get(getattr(node.target, "overloadpacket", None))


def is_transport(node: fx.Node) -> bool:
    """True for casts, splits and joins, which move a stream without computing with it."""
    return node.target in TRANSPORT or node.target is operator.getitem
