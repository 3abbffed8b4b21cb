"""What hooks of diffusers look up at their first call, they are told before."""

from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelSplitHook, ModuleForwardMetadata
from diffusers.hooks.layer_skip import TransformerBlockSkipHook

from dicompile.parallel import settle_hooks
from tests.pipelines.pipes import flux_transformer


def test_hooks_that_split_tokens_know_what_they_would_have_looked_up() -> None:
    model = flux_transformer()
    hook = ContextParallelSplitHook({"hidden_states": None}, None)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "split")
    own = ModuleForwardMetadata(_cls=type(model))
    own._get_parameter_from_args_kwargs("hidden_states", range(100))
    settle_hooks(model)
    assert hook.module_forward_metadata.cached_parameter_indices == own.cached_parameter_indices
    known = hook.module_forward_metadata.cached_parameter_indices
    settle_hooks(model)
    assert hook.module_forward_metadata.cached_parameter_indices is known


def test_hooks_that_skip_a_block_know_what_they_would_have_looked_up() -> None:
    (block,) = flux_transformer().transformer_blocks
    hook = TransformerBlockSkipHook(dropout=1.0)
    HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "skip")
    metadata = hook._metadata  # of all blocks of the class, and known already where one has run
    metadata._cached_parameter_indices = None
    metadata._get_parameter_from_args_kwargs("hidden_states", range(100))
    own, metadata._cached_parameter_indices = metadata._cached_parameter_indices, None
    settle_hooks(block)
    assert metadata._cached_parameter_indices == own
