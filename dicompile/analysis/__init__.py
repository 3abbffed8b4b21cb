"""Analysis: captured graph -> `ModelStructure`. Reads the graph, edits nothing, knows no class or attribute names."""

from dicompile.analysis.analyse import analyse
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.structure import (
    Block,
    BlockId,
    ModelStructure,
    Pace,
    Site,
    SiteId,
    SiteKind,
    Span,
    Stream,
    StreamId,
    TokenFact,
    TokenWise,
)
from dicompile.ops.cost import node_flops

__all__ = [
    "Block",
    "BlockId",
    "Dataflow",
    "ModelStructure",
    "Pace",
    "Site",
    "SiteId",
    "SiteKind",
    "Span",
    "Stream",
    "StreamId",
    "TokenFact",
    "TokenWise",
    "analyse",
    "node_flops",
]
