"""Lower: rewritten segments -> compiled functions, deduplicated, and programs that call them in order."""

from dicompile.lower.hoist import CHUNK, PLAIN_TENSORS, Hoist, Invariant, Invariants
from dicompile.lower.inductor import (
    INDUCTOR,
    SIZES,
    Backend,
    Code,
    ask_workers,
    compile_plainly,
    compile_segment,
    note_sizes,
    requests_of,
)
from dicompile.lower.pieces import Piece, Pieces
from dicompile.lower.predictor import lora_weights, network_predictor, table_predictor
from dicompile.lower.program import (
    NO_RANKS,
    Call,
    Constant,
    GatedProgram,
    IntRef,
    NoiseRead,
    Program,
    ProgramBuilder,
    Verification,
)
from dicompile.lower.recordable import check_can_record
from dicompile.lower.variants import VARIANTS, Variant, VariantCache
from dicompile.lower.workers import Request, count_workers

__all__ = [
    "CHUNK",
    "INDUCTOR",
    "NO_RANKS",
    "PLAIN_TENSORS",
    "SIZES",
    "VARIANTS",
    "Backend",
    "Call",
    "Code",
    "Constant",
    "GatedProgram",
    "Hoist",
    "IntRef",
    "Invariant",
    "Invariants",
    "NoiseRead",
    "Piece",
    "Pieces",
    "Program",
    "ProgramBuilder",
    "Request",
    "Variant",
    "VariantCache",
    "Verification",
    "ask_workers",
    "check_can_record",
    "compile_plainly",
    "compile_segment",
    "count_workers",
    "lora_weights",
    "network_predictor",
    "note_sizes",
    "requests_of",
    "table_predictor",
]
