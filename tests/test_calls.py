"""Which effects are called: s-values and calls at an expected false sign rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cradle_pyro.errors import QueryError
from cradle_pyro.queries.calls import s_values, sign_calls

LFSR = st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.5]) | st.floats(0, 1), max_size=12)


def test_s_values_of_a_hand_computed_example() -> None:
    lfsr = np.array([[0.3, 0.0], [0.1, 0.3]])
    # In order: 0, (0 + 0.1) / 2, then both of 0.3 together: (0 + 0.1 + 0.3 + 0.3) / 4.
    np.testing.assert_allclose(s_values(lfsr), [[0.175, 0.0], [0.05, 0.175]])


@given(LFSR)
def test_s_values_are_means_over_entries_at_least_as_sure(values: list[float]) -> None:
    lfsr = np.array(values, dtype=np.float64)
    expected = np.array([lfsr[lfsr <= own].mean() for own in lfsr], dtype=np.float64)
    np.testing.assert_allclose(s_values(lfsr), expected, rtol=1e-12, atol=1e-15)


@given(LFSR, st.sampled_from([0.0, 0.05, 0.1, 0.3]))
def test_calls_are_the_largest_set_within_the_rate(values: list[float], rate: float) -> None:
    lfsr = np.array(values, dtype=np.float64)
    sets = [lfsr <= bound for bound in np.unique(lfsr)]
    allowed = [chosen for chosen in sets if lfsr[chosen].mean() <= rate + 1e-12]
    largest = max(allowed, key=np.sum, default=np.zeros(len(lfsr), dtype=bool))
    np.testing.assert_array_equal(sign_calls(lfsr, rate=rate), largest)


@pytest.mark.parametrize("count", [1, 3, 10, 49])
def test_entries_exactly_at_the_rate_are_called(count: int) -> None:
    assert sign_calls(np.full(count, 0.1), rate=0.1).all()
    assert not sign_calls(np.full(count, 0.1001), rate=0.1).any()


def test_surer_entries_make_room_for_less_sure_ones() -> None:
    lfsr = np.array([0.0, 0.0, 0.0, 0.4, 0.4])
    # One alone would fit (0.4 / 4 = 0.1), but equal entries go together (0.8 / 5 = 0.16).
    np.testing.assert_array_equal(sign_calls(lfsr[:4]), [True, True, True, True])
    np.testing.assert_array_equal(sign_calls(lfsr), [True, True, True, False, False])


def test_order_does_not_matter(rng: np.random.Generator) -> None:
    lfsr = rng.choice([0.0, 0.02, 0.1, 0.3, 0.5], size=200)
    order = rng.permutation(200)
    np.testing.assert_array_equal(s_values(lfsr)[order], s_values(lfsr[order]))


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_a_wrong_lfsr_or_rate_is_an_error(bad: float) -> None:
    with pytest.raises(QueryError, match=rf"1 of 2 are not, the first is {bad}"):
        s_values(np.array([0.1, bad]))
    with pytest.raises(QueryError, match=rf"found {bad}"):
        sign_calls(np.array([0.1]), rate=bad)
