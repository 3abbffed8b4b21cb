"""Which steps are full: the published patterns, and the decision rule written out block by block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicompile.plan import Cadence, Magnitudes, Window
from dicompile.policies import FORA, PAB, MagCache, Spectrum, TaylorSeer, ToCa, ToCaPixArt
from dicompile.policies.magcache import RATIOS


def letters(cadence: Cadence, steps: int) -> str:
    """One letter per step: F full, o only the first block, . neither."""
    names = {(True, True): "F", (True, False): "o", (False, False): "."}
    return "".join(names[moment.first, moment.others] for moment in cadence.moments(steps))


def indices(cadence: Cadence, steps: int, letter: str = "F") -> list[int]:
    return [cadence.index(step, steps) for step, kind in enumerate(letters(cadence, steps)) if kind == letter]


def test_toca_on_dit_with_50_steps_repeats_the_reference_code() -> None:
    cadence = ToCa(interval=3, decide="block").cadence
    pattern = letters(cadence, 50)
    assert (pattern.count("F"), pattern.count("."), pattern.count("o")) == (18, 30, 2)
    assert indices(cadence, 50, "o") == [45, 32]
    assert pattern.startswith("F...oF")
    assert pattern[50 - 20 :] == ".F" * 10  # s <= 19 alternates


def test_toca_on_dit_with_250_steps_repeats_the_reference_code() -> None:
    pattern = letters(ToCa(interval=4, schedule="ddpm250", decide="block").cadence, 250)
    assert (pattern.count("F"), pattern.count("."), pattern.count("o")) == (72, 176, 2)


def test_toca_on_pixart_with_20_steps_repeats_the_reference_code() -> None:
    cadence = ToCaPixArt(interval=3, decide="block").cadence
    assert indices(cadence, 20) == [0, 6, 9, 12, 15, 18]
    assert indices(cadence, 20, "o") == [4]


def test_deciding_once_per_step_makes_the_half_full_steps_full() -> None:
    for quirky, clean, steps in [
        (ToCa(decide="block"), ToCa(), 50),
        (ToCa(interval=4, schedule="ddpm250", decide="block"), ToCa(interval=4, schedule="ddpm250"), 250),
        (ToCaPixArt(decide="block"), ToCaPixArt(), 20),
    ]:
        assert letters(clean.cadence, steps) == letters(quirky.cadence, steps).replace("o", "F")


@pytest.mark.parametrize(
    ("steps", "interval", "full"),
    [
        (10, 4, [9, 8, 4, 0]),
        (11, 3, [10, 9, 6, 3, 0]),
        (5, 1, [4, 3, 2, 1, 0]),
        (4, 9, [3, 0]),
        (1, 3, [0]),
    ],
)
def test_fora_is_full_at_the_first_step_and_at_multiples_counted_down(
    steps: int, interval: int, full: list[int]
) -> None:
    assert indices(FORA(interval=interval).cadence, steps) == full


def test_toca_without_refreshed_tokens_is_fora() -> None:
    cadence = ToCa(interval=3, ratio=0.0).cadence
    assert indices(cadence, 50) == [49, *range(48, -1, -3)]
    assert letters(cadence, 50) == letters(FORA(interval=3).cadence, 50)
    assert (letters(cadence, 50).count("F"), letters(cadence, 50).count(".")) == (18, 32)


def test_warm_up_steps_are_full_and_counting_up_starts_at_zero() -> None:
    assert letters(Cadence(interval=4, warmup=3, counting="up"), 10) == "FFF.F...F."


@pytest.mark.parametrize(
    ("steps", "interval", "full"),
    [
        (10, 3, [9, 8, 5, 2]),
        (20, 4, [19, 18, 14, 10, 6, 2]),
        (50, 4, [49, *range(48, -1, -4)]),
    ],
)
def test_taylorseer_counts_from_the_last_full_step_and_does_not_force_the_last(
    steps: int, interval: int, full: list[int]
) -> None:
    cadence = TaylorSeer(interval=interval).cadence
    assert indices(cadence, steps) == full
    assert len(indices(cadence, 50)) == {3: 18, 4: 14}[interval]


def test_listed_steps_and_the_first_one_are_full_and_no_others() -> None:
    assert letters(Cadence(interval=2, warmup=3, at=(4, 5, 99)), 8) == "F...FF.."


def test_the_residue_counts_within_the_current_interval() -> None:
    by_index = Cadence(interval=3).moments(8)
    assert [moment.residue for moment in by_index] == [1, 0, 2, 1, 0, 2, 1, 0]
    since_last = Cadence(interval=3, anchor="last", warmup=2).moments(8)
    assert [moment.residue for moment in since_last] == [0, 0, 1, 2, 0, 1, 2, 0]


def test_no_cadence_given_computes_always() -> None:
    assert letters(Cadence(), 7) == "F" * 7


def test_the_window_sets_its_own_interval_by_the_index_of_the_full_step() -> None:
    """Counting down over 20 steps the window is s = 4 .. 7; outside it the interval is 5."""
    cadence = Cadence(interval=5, dense=Window(start=0.2, end=0.4, interval=2))
    assert indices(cadence, 20) == [19, 15, 10, 5, 4, 2, 0]


def naive(cadence: Cadence, steps: int, blocks: int = 3) -> list[list[bool]]:
    """The rule as the reference code runs it: every block decides, the first one rewrites the interval."""
    stored, result = cadence.interval, []
    for step in range(steps):
        s = steps - 1 - step if cadence.counting == "down" else step
        row: list[bool] = []
        for block in range(blocks):
            if cadence.decide == "step" and block:
                row.append(row[0])
                continue
            full = step < cadence.warmup or s % stored == 0
            row.append(full)
            if full and block == 0:
                f = 1 + cadence.stretch * (1 - 2 * s / steps)
                stored = max(1, int(np.rint(np.float32(cadence.interval / f))))
                w = cadence.dense
                if w is not None and int(w.start * steps) <= s < int(w.end * steps):
                    stored = w.interval
        result.append(row)
    return result


windows = st.builds(Window, start=st.floats(0, 1), end=st.floats(0, 1), interval=st.integers(1, 5))
cadences = st.builds(
    Cadence,
    interval=st.integers(1, 7),
    counting=st.sampled_from(["up", "down"]),
    warmup=st.integers(1, 4),
    stretch=st.sampled_from([-0.2, 0.0, 0.4, 0.9]),
    dense=st.none() | windows,
    decide=st.sampled_from(["step", "block"]),
)


@settings(deadline=None)
@given(cadences, st.integers(1, 40))
def test_the_decision_is_the_one_of_the_reference_code(cadence: Cadence, steps: int) -> None:
    expected = naive(cadence, steps)
    assert [[moment.first, moment.others] for moment in cadence.moments(steps)] == [row[:2] for row in expected]
    assert all(len(set(row[1:])) == 1 for row in expected)


@settings(deadline=None)
@given(cadences, st.integers(1, 40))
def test_the_first_steps_are_always_full(cadence: Cadence, steps: int) -> None:
    assert all(moment.first and moment.others for moment in cadence.moments(steps)[: cadence.warmup])


def test_magnitudes_add_up_until_a_step_is_full() -> None:
    def pattern(threshold: float, longest: int = 9, retention: float = 0.0) -> str:
        ratios = (1.0, 1.1, 1.1, 1.1, 1.0, 0.9)
        table = Magnitudes(ratios=ratios, threshold=threshold, longest=longest, retention=retention)
        return letters(Cadence(magnitudes=table), 6)

    # the errors are 0.1, then 0.1 + 0.21, then those and 0.331
    assert pattern(threshold=0.3) == "F.F..."
    assert pattern(threshold=0.32) == "F..F.."
    assert pattern(threshold=9.0) == "F....."
    assert pattern(threshold=9.0, longest=2) == "F..F.."
    assert pattern(threshold=0.0) == "FFFF.F"  # a ratio of 1 is no error
    assert pattern(threshold=9.0, retention=0.5) == "FFF..."


def test_a_table_of_magnitudes_is_read_at_the_nearest_place() -> None:
    table = Magnitudes(ratios=(1.0, 1.0, 2.0), threshold=0.5, longest=9, retention=0.0)
    assert letters(Cadence(magnitudes=table), 5) == "F..FF"  # places 0, 0.5, 1, 1.5 and 2: halves go to the even one
    assert letters(Cadence(magnitudes=table), 1) == "F"


def test_some_entries_of_a_table_are_full_whatever_they_say() -> None:
    table = Magnitudes(ratios=(1.0,) * 28, threshold=9.0, longest=4, retention=0.1, always=(11,))
    assert letters(Cadence(magnitudes=table), 28) == "FFF....F...F....F....F....F."
    assert letters(Cadence(magnitudes=table), 14) == "F....F....F..."  # no step's nearest entry is that one
    assert MagCache("flux").cadence.magnitudes == Magnitudes(
        ratios=RATIOS["flux"], threshold=0.24, longest=5, retention=0.1, always=(11,)
    )
    assert MagCache(RATIOS["flux"]).cadence.magnitudes.always == ()


def test_a_run_that_begins_late_accumulates_from_its_first_step() -> None:
    cadence = MagCache(RATIOS["flux"], threshold=0.12, longest=2, retention=0.1).cadence
    late = cadence.moments(28, 9)
    assert [moment.step for moment in late if moment.first][:3] == [9, 12, 15]
    assert not {9, 12} <= {moment.step for moment in cadence.moments(28) if moment.first}


def test_outside_of_its_timesteps_a_cadence_is_full() -> None:
    timesteps = [1000.0 - 100 * step for step in range(10)]  # strictly between 200 and 800 are steps 3 to 7
    moments = Cadence(interval=4, counting="up", timesteps=(800, 200)).moments(10, timesteps=timesteps)
    assert "".join("F" if moment.others else "." for moment in moments) == "FFF.F...FF"
    rest = PAB(4, timesteps=(200, 800)).rules[0].cadence
    assert rest is not None
    assert [m.others for m in rest.moments(10, 3, timesteps[3:])] == [m == "F" for m in "FF...FF"]


def spectrum_as_it_runs(steps: int, warmup: int, window: float, flex: float) -> list[int]:
    """The counters of Spectrum's code: steps in a row that were cached, and a window that grows with full steps."""
    cached, full = 0, []
    for step in range(steps):
        is_full = True
        if step >= warmup:
            is_full = (cached + 1) % int(window) == 0
            if is_full:
                window = round(window + flex, 3)
        cached = 0 if is_full else cached + 1
        full += [step] if is_full else []
    return full


@pytest.mark.parametrize(
    ("interval", "growth", "warmup"), [(2, 0.75, 5), (2, 3.0, 5), (3, 0.1, 1), (1, 0.25, 2), (4, 0, 3)]
)
@pytest.mark.parametrize("steps", [12, 50])
def test_intervals_that_grow_are_those_of_spectrum(steps: int, interval: int, growth: float, warmup: int) -> None:
    made = Spectrum(interval=interval, growth=growth, warmup=warmup).cadence
    full = [moment.step for moment in made.moments(steps) if moment.first]
    assert full == spectrum_as_it_runs(steps, warmup, interval, growth)
