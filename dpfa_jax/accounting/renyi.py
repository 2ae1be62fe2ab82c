"""Renyi divergences of records, and their conversion to (epsilon, delta). Plain numpy.

A curve holds log-moments (alpha - 1) D_alpha at `ORDERS`; curves of composed answers add up.

Sources: Mironov, "Renyi differential privacy" (2017); Mironov, Talwar and Zhang, "Renyi
differential privacy of the sampled Gaussian mechanism" (2019), whose closed form for integer orders
bounds both neighbouring directions; Canonne, Kamath and Steinke, "The discrete Gaussian for
differential privacy" (2020) for the conversion.
"""

import functools
import math

import numpy as np

from dpfa_jax.accounting.events import charged_count, is_amplified
from dpfa_jax.accounting.truncation import batch_truncation
from dpfa_jax.release import GaussianRecord

_INTEGERS = np.array(
    [*range(1, 129), *range(136, 257, 8), *range(288, 513, 32), 640, 768, 896, 1024], dtype=float
)
ORDERS = np.unique(np.concatenate([np.arange(1.05, 16.0, 0.05).round(2), _INTEGERS[1:]]))


@functools.lru_cache(maxsize=1024)
def _answer_curve(record: GaussianRecord) -> np.ndarray:
    sigma = record.noise_multiplier
    if not is_amplified(record):
        return ORDERS * (ORDERS - 1.0) / (2.0 * sigma**2)
    assert record.sampling is not None
    truncation = batch_truncation(record.sampling)
    log_moments = _sampled_log_moments(record.sampling.probability, sigma)
    if truncation.probability > 0.0:
        # Whether the others fill the batch does not depend on the example, so moments mix linearly.
        swapped = _sampled_log_moments(truncation.conditional_probability, sigma / 2.0)
        log_moments = np.logaddexp(
            math.log1p(-truncation.probability) + log_moments,
            math.log(truncation.probability) + swapped,
        )
    # Log-moments are convex in the order and 0 at order 1, so a chord bounds what lies between.
    return np.interp(ORDERS, _INTEGERS, np.maximum(log_moments, 0.0))


def _sampled_log_moments(probability: float, sigma: float) -> np.ndarray:
    """log sum_k binom(a, k) (1-q)^(a-k) q^k e^(k(k-1)/(2 sigma^2)) at the integer orders a."""
    from scipy import special

    terms = np.arange(_INTEGERS[-1] + 1.0)
    orders = _INTEGERS[:, None]
    rest = orders - terms[None, :]
    inside = rest >= 0.0
    log_choose = (
        special.gammaln(orders + 1.0)
        - special.gammaln(terms + 1.0)[None, :]
        - special.gammaln(np.where(inside, rest, 0.0) + 1.0)
    )
    log_terms = (
        log_choose
        + special.xlog1py(np.where(inside, rest, 0.0), -probability)
        + special.xlogy(terms, probability)[None, :]
        + (terms * (terms - 1.0) / (2.0 * sigma**2))[None, :]
    )
    return special.logsumexp(np.where(inside, log_terms, -np.inf), axis=1)


def renyi_curve(record: GaussianRecord, count: int = 1) -> np.ndarray:
    """Log-moments (alpha - 1) D_alpha of `count` answers under `record`, float64, at `ORDERS`.

    Errors: UnsupportedEventError for sampling that does not go with the relation.
    """
    return charged_count(record, count) * _answer_curve(record)


def curve_epsilon(curve: np.ndarray, delta: float) -> float:
    """The least epsilon that the curve proves at `delta`."""
    return max(0.0, float(np.min(curve / (ORDERS - 1.0) - conversion_credit(delta))))


def conversion_credit(delta: float) -> np.ndarray:
    """What comes off D_alpha: (log delta + log alpha) / (alpha - 1) - log(1 - 1/alpha)."""
    return (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1.0) - np.log1p(-1.0 / ORDERS)
