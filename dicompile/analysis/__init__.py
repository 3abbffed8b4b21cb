"""Analysis: captured graph -> `ModelStructure`. Reads the graph, edits nothing, knows no class or attribute names."""

from dicompile.analysis.analyse import Analysis, analyse
from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.samples import mixed_samples
from dicompile.analysis.structure import (
    WHOLE,
    Block,
    BlockId,
    ModelStructure,
    Pace,
    Probe,
    Site,
    SiteId,
    SiteKind,
    Span,
    Stream,
    StreamId,
    TokenFact,
    TokenWise,
    Trunk,
)
from dicompile.ops.cost import node_flops

__all__ = [
    "WHOLE",
    "Analysis",
    "Block",
    "BlockId",
    "Dataflow",
    "ModelStructure",
    "Pace",
    "Probe",
    "Site",
    "SiteId",
    "SiteKind",
    "Span",
    "Stream",
    "StreamId",
    "TokenFact",
    "TokenWise",
    "Trunk",
    "analyse",
    "mixed_samples",
    "node_flops",
]
