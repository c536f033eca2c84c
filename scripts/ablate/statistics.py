"""Means over seeds, and differences that are paired by seed.

A difference uses the seeds that both variants have. Its interval is that of the paired t test,
mean ± t(0.975, n - 1) · s / √n with the sample standard deviation s of the n differences. Intervals
are per comparison; they are not corrected for the number of comparisons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["LEVEL", "Difference", "Summary", "difference", "mean_interval", "summary"]

LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True)
class Summary:
    """Values of one variant over seeds.

    Attributes:
        n: Number of seeds.
        mean: Mean of the values.
        std: Sample standard deviation; None for one value.
    """

    n: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Difference of a variant to the reference, paired by seed.

    Attributes:
        n: Number of seeds that both have.
        mean: Mean of the differences.
        interval: Its interval; None for one seed, and for equal differences, which give no
            estimate of their variance.
        verdict: `better`, `worse`, or `not shown` if there is no interval or it contains zero.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    verdict: str


def summary(values: Mapping[int, float]) -> Summary | None:
    """Return the mean and the standard deviation over seeds; None without values."""
    if not values:
        return None
    numbers = list(values.values())
    return Summary(len(numbers), fmean(numbers), stdev(numbers) if len(numbers) > 1 else None)


def difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, lower_is_better: bool
) -> Difference | None:
    """Return the difference of a variant to the reference; None without a common seed.

    Args:
        values: Metric of the variant by seed.
        reference: Metric of the reference by seed.
        lower_is_better: Whether a smaller metric is better.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    pairs = [values[seed] - reference[seed] for seed in seeds]
    mean = fmean(pairs)
    interval, verdict = None, "not shown"
    # Rounded sums, such as 0.3 - 0.1 and 0.2, are not different values.
    if max(pairs) - min(pairs) > 1e-9 * max(map(abs, (*values.values(), *reference.values()))):
        from scipy.stats import ttest_rel

        test = ttest_rel([values[seed] for seed in seeds], [reference[seed] for seed in seeds])
        low, high = test.confidence_interval(LEVEL)
        interval = (float(low), float(high))
        if not low <= 0 <= high:
            verdict = "better" if (mean < 0) == lower_is_better else "worse"
    return Difference(len(seeds), mean, interval, verdict)


def mean_interval(values: Mapping[int, float]) -> tuple[float, float] | None:
    """Return the interval of the mean of one variant; None if its variance is not known."""
    found = summary(values)
    if found is None or not found.std:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, found.n - 1)) * found.std / found.n**0.5
    return found.mean - half, found.mean + half
