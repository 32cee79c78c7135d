"""The number of examples that a fraction of a data set is."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.dataset.plan import budget


@settings(max_examples=100, deadline=None)
@given(n_examples=st.integers(1, 10**6), hundredths=st.integers(0, 100))
def test_budget_rounds_half_up_in_decimals(n_examples, hundredths):
    exact = Fraction(hundredths, 100) * n_examples
    assert budget(n_examples, hundredths / 100) == math.floor(exact + Fraction(1, 2))
    assert budget(n_examples, 1 / n_examples) == 1
    assert budget(n_examples, 1.0) == n_examples


def test_budget_takes_the_fraction_as_it_is_written():
    # As binary floats 0.145 and 0.285 lie below what is written; half an example decides.
    assert budget(100, 0.145) == 15
    assert budget(1000, 0.2855) == 286
    assert budget(200, 0.0025) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_budget_of_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        budget(10, fraction)
