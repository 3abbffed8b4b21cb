"""Kernels written by hand, in Triton, for operators that torch has none for; each has a form in `dicompile.ops`.

They are there where Triton is, under names that end on ``_cuda_triton``; `dicompile.ops.attention_scores`
and `dicompile.ops.select_tokens` find them.
"""

from importlib.util import find_spec

if find_spec("triton") is not None:
    from dicompile.runtime.kernels import attention_scores as attention_scores
    from dicompile.runtime.kernels import select_tokens as select_tokens
