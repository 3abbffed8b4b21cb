"""What every test gets: fixed seed, few threads, reads of the cache checked, reasons of skips."""

import gc
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dicompile

SHARED = Path(__file__).resolve().parents[2] / "shared"
SPREAD = {
    "tests/passes/test_refresh_zoo.py",
    "tests/pipelines/test_every_pipeline.py",
    "tests/test_coverage.py",
    "tests/test_examples.py",
    "tests/test_golden.py",
}
"""Modules of long tests that share nothing: whichever worker is free takes the next one, after all other modules."""

THINNED = {
    "tests/analysis/test_spans.py::test_spans_are_runs_of_sites_on_one_stream",
    "tests/capture/test_autocast.py::test_a_model_with_attention_under_autocast_computes_the_same",
    "tests/capture/test_autocast.py::test_an_optimized_model_follows_autocast_from_call_to_call",
    "tests/capture/test_autocast.py::test_every_operator_gives_bitwise_what_it_gives_under_autocast",
    "tests/capture/test_captured.py::test_a_result_is_packed_as_the_model_packs_it",
    "tests/capture/test_guards.py::test_a_global_that_changes_is_followed",
    "tests/capture/test_guards.py::test_no_path_is_walked_at_an_ordinary_call",
    "tests/capture/test_guards.py::test_what_changes_is_followed",
    "tests/capture/test_members.py::test_an_edit_of_any_block_is_seen",
    "tests/capture/test_members.py::test_it_computes_what_the_model_computes",
    "tests/capture/test_members.py::test_it_is_the_graph_of_the_whole_forward",
    "tests/capture/test_normalise.py::test_the_graph_computes_bitwise_what_the_model_computes",
    "tests/capture/test_numbers.py::test_every_number_gives_what_the_module_gives",
    "tests/capture/test_parts.py::test_regions_are_what_is_in_them",
    "tests/capture/test_reads.py::test_a_counter_is_refused_by_its_name",
    "tests/capture/test_stored.py::test_edited_code_is_captured_anew",
    "tests/capture/test_trace.py::test_other_values_of_what_was_read_are_captured_anew_and_equal_ones_are_not",
    "tests/learn/test_graph.py::test_all_fresh_is_the_model_itself",
    "tests/learn/test_graph.py::test_all_stored_gives_the_recorded_output_back",
    "tests/lower/test_program.py::test_every_variant_gets_and_gives_values_of_the_layout_it_was_compiled_for",
    "tests/lower/test_program.py::test_the_number_of_variants_does_not_grow_with_steps",
    "tests/lower/test_sizes.py::test_dynamic_sizes_are_symbols_at_once",
    "tests/lower/test_sizes.py::test_symbols_of_dynamo_are_symbols_at_once",
    "tests/lower/test_triton.py::test_a_variant_is_so_many_triton_kernels_around_library_products",
    "tests/ops/test_registry.py::test_registered_attention_is_attention",
    "tests/parallel/test_sharded.py::test_every_rank_gets_the_bits_of_the_whole_model",
    "tests/passes/test_adapt_linears.py::test_of_the_last_blocks_every_layer_on_the_way_of_text_and_picture",
    "tests/passes/test_narrow.py::test_inductor_takes_sizes_that_are_sums_and_products",
    "tests/passes/test_refresh_zoo.py::test_chosen_tokens_of_a_real_branch_come_out_as_if_all_were_computed",
    "tests/passes/test_score_tokens.py::test_each_stream_gets_the_score_of_its_own_tokens",
    "tests/pipelines/test_changes.py::test_weights_cast_layer_by_layer_compute_as_they_do_untouched",
    "tests/pipelines/test_every_pipeline.py::test_a_pipeline_follows_its_plan_and_is_restored",
    "tests/pipelines/test_guidance.py::test_perturbed_attention_compiles_and_caches",
    "tests/pipelines/test_offload.py::test_the_same_plan_and_bits_in_either_order",
    "tests/pipelines/test_offload.py::test_weights_that_change_between_runs_are_those_that_are_brought",
    "tests/pipelines/test_order.py::test_the_order_of_two_changes_nothing",
    "tests/policies/test_clusca.py::test_clusters_tokens_and_outputs_are_those_of_the_published_rule",
    "tests/policies/test_per_sample.py::test_a_batch_gives_what_single_runs_give",
    "tests/policies/test_teacache.py::test_it_decides_and_computes_as_the_rule_on_the_models_own_modules",
    "tests/runtime/test_invariants.py::test_results_are_those_of_steps_that_compute_everything",
    "tests/runtime/test_invariants.py::test_what_changes_in_the_middle_of_a_generation_counts_from_then_on",
    "tests/serve/test_batcher.py::test_every_request_gets_what_it_gets_by_itself",
    "tests/serve/test_gates.py::test_every_request_decides_for_itself_and_gets_what_it_gets_alone",
    "tests/state/test_promises.py::test_a_run_that_was_left_at_any_call_leaves_no_trace_on_another_prompt",
    "tests/test_api.py::test_a_run_follows_its_plan",
    "tests/test_api.py::test_caching_changes_the_steps_that_reuse_and_no_others",
    "tests/test_api.py::test_compiled_runs_are_close_to_the_rewritten_graphs",
    "tests/test_api.py::test_two_runs_with_one_seed_are_equal_bit_by_bit",
    "tests/test_backend.py::test_every_batch_size_gets_what_it_gets_alone",
    "tests/test_backend.py::test_it_does_what_optimize_does",
    "tests/test_forecasts_and_spans.py::test_a_second_run_is_equal_bit_by_bit",
    "tests/test_forecasts_and_spans.py::test_full_steps_equal_the_model_and_others_do_not",
    "tests/test_forecasts_and_spans.py::test_steps_execute_what_the_plan_says_and_a_skip_leaves_no_block",
    "tests/test_memory.py::test_every_method_runs_when_degraded",
    "tests/test_programs.py::test_a_timestep_may_be_a_number",
    "tests/zoo/test_published.py::test_what_makes_it_up_is_found",
}
"""Tests with several parameters that take long: `make test` runs every fifth one, `make nightly` the others."""

COUNTING = (
    "tests/capture/",
    "tests/gpu/",
    "tests/lower/test_inductor.py",
    "tests/lower/test_program.py",
    "tests/lower/test_sizes.py",
    "tests/lower/test_variants.py",
    "tests/pipelines/test_offload.py::test_a_call_waits_while_another_thread_captures",
    "tests/runtime/test_release.py",
    "tests/test_api.py::test_a_second_policy_compiles_only_what_no_earlier_one_had",
    "tests/test_garbage.py",
    "tests/test_progress.py",
    "tests/test_warmup.py",
)
"""Where tests count captures or compilations, wait for one, or look at what is said of them: they share neither."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)
    os.environ.setdefault("DICOMPILE_CHECK", "1")
    if not hasattr(config, "workerinput"):  # what tests compile is no business of the user's; workers share it
        folder = tempfile.TemporaryDirectory(prefix="dicompile-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["DICOMPILE_CACHE_DIR"] = folder.name
    # pytest listens to every logger that does not propagate; torch would make text of every graph for this one.
    logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Modules go to workers whole: what their tests make once (captures, fixtures) would be made once per worker.

    Marks cannot say so: with pytest 9.2, pytest-xdist 3.8 ignores xdist_group (pytest-dev/pytest-xdist#1386, open).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::", maxsplit=1)[0]
            return nodeid if module in SPREAD else module

    return ByModule(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(tryfirst=True)  # before marks are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen = Counter[str]()
    for item in items:
        family = item.nodeid.partition("[")[0]
        if family in THINNED and seen[family] % 5:
            item.add_marker(pytest.mark.nightly)
        seen[family] += 1
    if "nightly" not in config.getoption("markexpr"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


def pytest_collection_finish() -> None:
    """What is imported lives on: looking at it whenever garbage is collected was a sixth of the suite's CPU time.

    Nor need garbage be looked for after every 700 new objects, of which one graph makes many times as many.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_session() -> Iterator[None]:
    """What a test leaves in the middle of a run is remembered by no other one."""
    with dicompile.session():
        yield


@pytest.fixture(scope="module", autouse=True)
def modules_are_like_processes(request: pytest.FixtureRequest) -> None:
    """Tests of one module share captures and compiled code, as everything in a user's process does.

    What modules share lies in the cache folder of the run.
    """
    if request.node.nodeid not in SPREAD:
        dicompile.reset()


@pytest.fixture(autouse=True)
def counting_starts_at_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests count captures or compilations they share none."""
    if request.node.nodeid.startswith(COUNTING):
        dicompile.reset()
        monkeypatch.setenv("DICOMPILE_CACHE_DIR", "off")


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """A test that leaves a transform or a profile function behind fails itself, and not whichever comes after it."""
    yield
    left = torch._C._functorch.peek_interpreter_stack(), sys.getprofile()
    while torch._C._functorch.peek_interpreter_stack() is not None:
        torch._C._functorch.pop_dynamic_layer_stack()
    sys.setprofile(None)
    assert left == (None, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference traces and routers beside the repository, which is not part of it."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder beside the repository")
    return SHARED
