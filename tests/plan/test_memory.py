"""Cache options as users write them, and the bytes of slots that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dicompile.errors import InvalidSetting
from dicompile.plan import CacheOptions, SlotKind, TimestepSchedule, What, check_can_compile, make_plan, needs_scale
from dicompile.plan.memory import slot_bytes
from dicompile.policies import FORA, TaylorSeer, ToCa
from tests.capture.captured import structure
from tests.plan.toys import TOKENS, toy

TOY = toy([("self-attention", "mlp"), ("self-attention", "mlp")], spans=True)
VALUE = 2 * TOKENS * 8
ROWS = 2 * TOKENS


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (0, 0), (4096, 4096), ("4096", 4096), ("12 b", 12), ("1KiB", 1024), ("1.5k", 1500), ("3MB", 3_000_000),
        (".5MiB", 2**19), ("2GiB", 2 * 2**30), (" 2 gib ", 2 * 2**30), ("1TB", 10**12), (None, None),
    ],
)  # fmt: skip
def test_a_budget_is_a_number_or_text_with_a_unit(given: int | str | None, size: int | None) -> None:
    assert CacheOptions.of(given).max_bytes == size


@pytest.mark.parametrize(
    "given", [-1, True, 1.5, "", "GiB", "2 gallons", "-1MB", "1e9", "1,5GiB", "2GiB or so", "1.2.3MB", [1], 2.0]
)
def test_anything_else_is_no_budget(given: object) -> None:
    with pytest.raises(InvalidSetting, match="max_cache_bytes cannot be") as caught:
        CacheOptions.of(given)  # type: ignore[arg-type]
    assert "2GiB" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"over_budget": "shrink"},
            "over_budget cannot be 'shrink'\n  where: here\n  fix:   use one of: refuse, degrade",
        ),
        ({"cache_device": "cuda"}, "cache_device cannot be 'cuda'\n  where: here\n  fix:   use one of: cpu"),
        (
            {"cache_dtype": torch.int8},
            "cache_dtype cannot be 'int8'\n  where: here\n  fix:   use one of: bfloat16, float16, float8_e4m3fn",
        ),
    ],
)
def test_an_option_outside_its_values_names_them(options: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        CacheOptions.of(**options, where="here")  # type: ignore[arg-type]
    assert str(caught.value) == text


def test_a_dtype_goes_by_its_name_or_as_torch_has_it() -> None:
    assert CacheOptions.of(cache_dtype="bfloat16") == CacheOptions.of(cache_dtype=torch.bfloat16)
    assert CacheOptions.of(cache_device="cpu") == CacheOptions.of(cache_device=torch.device("cpu"))


def test_a_dtype_with_the_range_of_float32_needs_no_scales() -> None:
    assert not needs_scale(torch.bfloat16)
    assert not needs_scale(torch.float32)
    assert not needs_scale(None)
    assert needs_scale(torch.float16)
    assert needs_scale(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("dtype", "itemsize", "size", "scales"),
    [
        (None, 4, 4, 0), ("bfloat16", 4, 2, 0), ("float16", 4, 2, 4), ("float8_e4m3fn", 4, 1, 4),
        ("bfloat16", 2, 2, 0), ("float16", 2, 2, 0), ("float8_e4m3fn", 2, 1, 4),
    ],
)  # fmt: skip
def test_values_take_the_narrower_of_the_two_dtypes(dtype: str | None, itemsize: int, size: int, scales: int) -> None:
    plan = make_plan(
        replace(TOY, sites=tuple(replace(site, itemsize=itemsize) for site in TOY.sites)),
        FORA(interval=3),
        TimestepSchedule(10),
        CacheOptions(dtype=dtype),
    )
    assert plan.cache_bytes == len(TOY.sites) * (VALUE * size + ROWS * scales)
    kinds = {slot.kind for slot in plan.slots}
    assert kinds == {SlotKind.VALUE, SlotKind.VALUE_SCALE} if scales else {SlotKind.VALUE}


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_eight_bits_need_a_device_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    fp8, devices = CacheOptions(dtype="float8_e4m3fn"), [torch.device("cpu"), torch.device("cuda:1")]
    check_can_compile(CacheOptions(dtype="bfloat16"), devices)
    check_can_compile(fp8, devices[:1])
    if not refused:
        check_can_compile(fp8, devices)
        return
    with pytest.raises(InvalidSetting) as caught:
        check_can_compile(fp8, devices)
    assert str(caught.value) == (
        "cuda:1 has no 8-bit floats\n"
        "  where: cache_dtype\n"
        "  why:   Triton compiles them from compute capability 8.9 on, this is 8.0\n"
        "  fix:   cache_dtype='bfloat16'"
    )


def test_scores_and_stamps_keep_their_dtypes() -> None:
    plans = [make_plan(TOY, ToCa(grid_cell=0), TimestepSchedule(50), CacheOptions(dtype=d)) for d in (None, "bfloat16")]
    own, narrow = ({s: size for s, size in plan.slot_bytes.items() if s.kind is not SlotKind.VALUE} for plan in plans)
    assert own == narrow
    assert {slot.kind for slot in own} == {SlotKind.STAMP, SlotKind.SCORE}


def test_every_value_of_a_history_has_scales_of_its_own() -> None:
    policy = TaylorSeer(interval=3, order=2)
    plan = make_plan(TOY, policy, TimestepSchedule(20), CacheOptions(dtype="float8_e4m3fn"))
    for step in plan.steps:
        values = {(slot.site, slot.age) for slot in step.live if slot.kind is SlotKind.VALUE}
        assert values == {(slot.site, slot.age) for slot in step.live if slot.kind is SlotKind.VALUE_SCALE}
    assert max(slot.age for slot in plan.slots) == 2


def test_an_update_counts_with_its_own_dtype() -> None:
    site = replace(TOY.sites[0], itemsize=2, update_itemsize=4)
    assert slot_bytes(site, SlotKind.VALUE, What.CORE, CacheOptions()) == 2 * VALUE
    assert slot_bytes(site, SlotKind.VALUE, What.UPDATE, CacheOptions()) == 4 * VALUE
    assert slot_bytes(site, SlotKind.VALUE, What.UPDATE, CacheOptions(dtype="bfloat16")) == 2 * VALUE


def test_attention_has_a_scale_per_head_and_token() -> None:
    site = next(site for site in structure("flux").sites if site.kind.value == "parallel")
    batch, heads, tokens, width = site.attention_shape
    fp8 = CacheOptions(dtype="float8_e4m3fn")
    assert slot_bytes(site, SlotKind.ATTENTION, What.CORE, CacheOptions()) == batch * heads * tokens * width * 4
    assert slot_bytes(site, SlotKind.ATTENTION, What.CORE, fp8) == batch * heads * tokens * width
    assert slot_bytes(site, SlotKind.ATTENTION_SCALE, What.CORE, fp8) == batch * heads * tokens * 4


def test_the_plan_says_how_values_are_stored() -> None:
    cache = CacheOptions.of(cache_dtype="bfloat16", cache_device="cpu")
    plan = make_plan(TOY, FORA(interval=3), TimestepSchedule(10), cache)
    assert plan.summary().endswith("in 4 slots (bfloat16, in host memory)")
    assert plan.cache is cache
