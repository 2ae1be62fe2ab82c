"""Tests of normality with stated strength, and the oracle of the Box-Muller sampler."""

import math

import numpy as np
from scipy import special, stats


def chi_square_normal(samples: np.ndarray, cells: int = 64) -> float:
    """p-value of `samples` against equally likely cells of the standard normal."""
    edges = special.ndtri(np.arange(1, cells) / cells)
    counts = np.bincount(np.searchsorted(edges, samples.ravel()), minlength=cells)
    return float(stats.chisquare(counts).pvalue)


def kolmogorov_normal(samples: np.ndarray) -> float:
    """p-value of the Kolmogorov-Smirnov test against the standard normal."""
    return float(stats.kstest(samples.ravel(), "norm").pvalue)


def distinct_fraction(samples: np.ndarray) -> float:
    """Distinct values over those that N continuous draws would give: 1 - O(N / resolution)."""
    return len(np.unique(samples)) / samples.size


def tail_p_value(samples: np.ndarray, threshold: float) -> float:
    """Two-sided Poisson p-value of the number of |z| > threshold."""
    expected = samples.size * 2.0 * special.ndtr(-threshold)
    seen = int((np.abs(samples) > threshold).sum())
    low, high = stats.poisson.cdf(seen, expected), stats.poisson.sf(seen - 1, expected)
    return float(min(1.0, 2.0 * min(low, high)))


def correlation_p_value(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value that two equally long fields of normals are uncorrelated."""
    first, second = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    score = abs(np.dot(first, second)) / math.sqrt(
        max(np.dot(first, first) * np.dot(second, second), 1e-300) / len(first)
    )
    return float(2.0 * special.ndtr(-score))
