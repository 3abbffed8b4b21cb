"""Lower: rewritten segments -> compiled functions, deduplicated, and programs that call them in order."""

from dicompile.lower.hoist import CHUNK, Hoist, Invariant, Invariants
from dicompile.lower.inductor import INDUCTOR, SIZES, Backend, compile_plainly, compile_segment
from dicompile.lower.pieces import Piece, Pieces
from dicompile.lower.predictor import network_predictor, table_predictor
from dicompile.lower.program import Call, Constant, IntRef, NoiseRead, Program, ProgramBuilder
from dicompile.lower.variants import VARIANTS, Variant, VariantCache

__all__ = [
    "CHUNK",
    "INDUCTOR",
    "SIZES",
    "VARIANTS",
    "Backend",
    "Call",
    "Constant",
    "Hoist",
    "IntRef",
    "Invariant",
    "Invariants",
    "NoiseRead",
    "Piece",
    "Pieces",
    "Program",
    "ProgramBuilder",
    "Variant",
    "VariantCache",
    "compile_plainly",
    "compile_segment",
    "network_predictor",
    "table_predictor",
]
