"""Statistics of an ablation: the formula of the paired t test, planted gains, false claims."""

import numpy as np
import pytest
from scipy import stats

from scripts.ablate.statistics import difference, mean_interval, summary


def by_seed(values):
    return dict(enumerate(values))


def test_mean_and_sample_standard_deviation_equal_those_of_numpy():
    values = np.random.default_rng(0).normal(80, 3, 7)
    found = summary(by_seed(values))
    assert found.n == 7
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.std == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert summary({3: 1.5}).std is None
    assert summary({}) is None


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_interval_is_that_of_the_formula_with_the_quantile_of_t(n):
    generator = np.random.default_rng(n)
    reference, values = generator.normal(0, 1, n), generator.normal(1, 2, n)
    found = difference(by_seed(values), by_seed(reference), lower_is_better=False)
    pairs = values - reference
    half = stats.t.ppf(0.975, n - 1) * pairs.std(ddof=1) / np.sqrt(n)
    assert found.n == n
    assert found.mean == pytest.approx(pairs.mean(), rel=1e-12)
    assert found.interval == pytest.approx((pairs.mean() - half, pairs.mean() + half), rel=1e-9)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert mean_interval(by_seed(values)) == pytest.approx(expected, rel=1e-9)


def test_pairs_are_the_seeds_of_both():
    values, reference = {0: 5.0, 1: 7.0, 3: 9.5}, {3: 8.0, 2: -100.0, 0: 4.0}
    found = difference(values, reference, lower_is_better=False)
    assert (found.n, found.mean) == (2, 1.25)
    assert difference({0: 1.0}, {1: 1.0}, lower_is_better=False) is None


def test_pairing_finds_a_gain_that_is_small_beside_the_spread_of_seeds():
    spread = np.array([0, 10, -20, 5, 12.0])
    gain = np.array([1.0, 1.1, 0.9, 1.05, 0.95])
    found = difference(by_seed(spread + gain), by_seed(spread), lower_is_better=False)
    assert found.verdict == "better"
    low, high = stats.ttest_ind(spread + gain, spread).confidence_interval()
    assert low < 0 < high


@pytest.mark.parametrize(
    ("gain", "lower_is_better", "expected"),
    [(1, False, "better"), (-1, False, "worse"), (-1, True, "better"), (1, True, "worse")],
)
def test_the_direction_of_the_metric_decides(gain, lower_is_better, expected):
    noise = np.array([0.0, 0.1, -0.1, 0.05])
    found = difference(by_seed(gain + noise), by_seed([0.0] * 4), lower_is_better=lower_is_better)
    assert found.verdict == expected


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.3, 2.2]], ids=["one", "two", "rounded"])
def test_equal_differences_and_single_seeds_show_nothing(values):
    reference = [value - 1.0 for value in values]
    found = difference(by_seed(values), by_seed(reference), lower_is_better=False)
    assert (found.interval, found.verdict) == (None, "not shown")
    assert found.mean == pytest.approx(1.0)


def test_planted_gains_are_found_and_absent_ones_are_claimed_in_five_percent():
    generator = np.random.default_rng(1)
    draws = 400
    claims = {0.0: 0, 2.0: 0}
    for gain in claims:
        for _ in range(draws):
            reference, values = generator.normal(0, 1, (2, 5))
            # Both are independent, so their difference has a standard deviation of √2.
            found = difference(by_seed(values + gain), by_seed(reference), lower_is_better=False)
            claims[gain] += found.verdict != "not shown"
            if gain and found.verdict != "not shown":
                assert found.verdict == "better"
    # 400 draws with probability 0.05 have a standard deviation of 1.1 %.
    assert 0.02 < claims[0.0] / draws < 0.08
    # The power of the test at a gain of √2 standard deviations of a difference, n = 5.
    power = 1 - stats.nct.cdf(stats.t.ppf(0.975, 4), 4, 2 / np.sqrt(2) * np.sqrt(5))
    assert claims[2.0] / draws == pytest.approx(power, abs=0.08)


def test_a_gain_of_two_standard_deviations_of_the_differences_is_found():
    noise = np.random.default_rng(4).normal(0, 1, 5)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    reference = np.array([70.0, 72.0, 69.5, 71.0, 70.2])
    planted = difference(by_seed(reference + 2 + noise), by_seed(reference), lower_is_better=False)
    without = difference(by_seed(reference + noise), by_seed(reference), lower_is_better=False)
    assert (planted.verdict, without.verdict) == ("better", "not shown")
