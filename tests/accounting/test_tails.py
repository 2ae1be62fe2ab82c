"""The delta that a finite noise tail costs: the bound against numeric integration, and its use."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import integrate

from dpfa_jax.accounting import Ledger, epsilon, record
from dpfa_jax.accounting.losses import composed_epsilon, gaussian_delta_at
from dpfa_jax.accounting.tails import (
    TailCost,
    gaussian_delta,
    record_tail_cost,
    unreachable_bound,
)
from dpfa_jax.core import ArgumentError
from dpfa_jax.core.generators import BOX_MULLER_TAIL, LONG_TAIL
from dpfa_jax.release import ExampleRelease, TrainingRelease


def disc(tail, points=1201):
    """A grid over the disc: coordinates, cell area, truncated normal density."""
    axis = np.linspace(-tail, tail, points)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    inside = x**2 + y**2 <= tail**2
    density = np.exp(-0.5 * (x**2 + y**2)) / (2 * math.pi) / -math.expm1(-0.5 * tail**2)
    return x[inside], y[inside], (axis[1] - axis[0]) ** 2, density[inside]


def exact_unreachable(shift, tail):
    """h(t) by integrating the flux through the circle, written out in the module's text."""
    value, _ = integrate.dblquad(
        lambda w, s: math.cos(w) * math.exp(s * tail * math.cos(w) - 0.5 * (tail**2 + s**2)),
        0.0,
        shift,
        0.0,
        lambda s: math.acos(s / (2 * tail)),
        epsabs=0.0,
        epsrel=1e-9,
    )
    return tail / math.pi * value / -math.expm1(-0.5 * tail**2)


@pytest.mark.parametrize("tail", [2.5, 3.0])
@pytest.mark.parametrize("shift", [0.3, 1.0, 1.7])
def test_flux_formula_is_the_probability_out_of_reach(tail, shift):
    x, y, area, density = disc(tail)
    outside = (x - shift) ** 2 + y**2 > tail**2
    counted = float(np.sum(density[outside]) * area)
    assert exact_unreachable(shift, tail) == pytest.approx(counted, rel=2e-2)


def test_noise_of_a_large_model_is_not_limited_by_the_tail():
    """1.3e9 parameters, 1e5 steps, little noise: 40 bits of radius would cost more than delta."""
    release = TrainingRelease(
        l2_clip_norm=1.0,
        noise_multiplier=0.5,
        dataset_size=10**6,
        expected_batch_size=2048,
        num_parameters=1_300_000_000,
    )
    long = release.record()
    cost = 1e5 * record_tail_cost(long).delta
    assert cost < 1e-10
    assert 1e5 * record_tail_cost(dataclasses.replace(long, tail=BOX_MULLER_TAIL)).delta > 1e-5


@pytest.mark.parametrize("tail", [4.0, 6.66, BOX_MULLER_TAIL, LONG_TAIL])
@pytest.mark.parametrize("shift", [1e-3, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("pairs", [1, 2, 10, 1000])
def test_bound_covers_every_split_and_is_not_idle(tail, shift, pairs):
    """Equal splits over any number of pairs, and one pair with the rest; within a factor of 8."""
    bound = unreachable_bound(shift, pairs, tail)
    splits = [
        used * exact_unreachable(shift / math.sqrt(used), tail)
        for used in {1, 2, min(5, pairs), pairs}
        if used <= pairs
    ]
    half = shift / math.sqrt(2.0)
    if pairs > 1:
        splits.append(
            exact_unreachable(half, tail)
            + (pairs - 1) * exact_unreachable(half / math.sqrt(pairs - 1), tail)
        )
    slack = 1.0 / -math.expm1(-0.5 * tail**2)  # the normalisation, charged by log_factor
    assert max(splits) <= bound * slack
    assert bound <= 8.0 * max(splits)


@pytest.mark.parametrize("probability", [1.0, 0.2])
@pytest.mark.parametrize(("tail", "shift"), [(2.5, 0.7), (3.0, 1.0)])
def test_truncated_mechanism_obeys_the_claim(tail, shift, probability):
    """Hockey-stick of the truncated pair, both directions, against Gaussian + tail; and the tail
    term is needed: without it the claim fails where epsilon is large."""
    span = np.linspace(-tail, tail + shift, 1501)
    x, y = np.meshgrid(span, np.linspace(-tail, tail, 801), indexing="ij")
    area = (span[1] - span[0]) * (2 * tail / 800)

    def truncated(centre):
        inside = (x - centre) ** 2 + y**2 <= tail**2
        normal = np.exp(-0.5 * ((x - centre) ** 2 + y**2)) / (2 * math.pi)
        return normal * inside / -math.expm1(-0.5 * tail**2)

    without = truncated(0.0)
    with_it = (1 - probability) * without + probability * truncated(shift)
    cost = probability * unreachable_bound(shift, 1, tail)
    factor = math.exp(-math.log1p(-math.exp(-0.5 * tail**2)))
    line = np.linspace(-40, 40, 80_001)
    base = np.exp(-0.5 * line**2) / math.sqrt(2 * math.pi)
    mixed = (1 - probability) * base + probability * np.exp(-0.5 * (line - shift) ** 2) / math.sqrt(
        2 * math.pi
    )
    needed = False
    for eps in (0.0, 0.3, 1.0, 2.0, 4.0):
        for (top, bottom), (gauss_top, gauss_bottom) in (
            ((with_it, without), (mixed, base)),
            ((without, with_it), (base, mixed)),
        ):
            found = float(np.sum(np.maximum(top - math.exp(eps) * bottom, 0.0)) * area)
            gaussian = float(
                np.sum(np.maximum(gauss_top - math.exp(eps) * gauss_bottom, 0.0)) * 1e-3
            )
            assert found <= (factor * gaussian + cost) * (1 + 5e-3) + 1e-6
            needed |= found > factor * gaussian * 1.05 + 1e-6
    assert needed


def test_scale_of_known_samplers():
    """The figures of the contract count coordinates, we count pairs: within a factor of 8."""
    for tail, known in ((5.42, 1.7e-4), (6.66, 9.3e-8)):
        assert known <= unreachable_bound(1.0, 10**6, tail) <= 8.0 * known


def test_longer_tail_fewer_numbers_more_noise_cost_less():
    base = unreachable_bound(1.0, 1000, 6.0)
    assert unreachable_bound(1.0, 1000, 6.5) < base
    assert unreachable_bound(1.0, 100, 6.0) < base
    assert unreachable_bound(0.5, 1000, 6.0) < base
    assert unreachable_bound(10.0, 1000, 6.0) == 1.0


def test_delta_is_reduced_by_the_tail_and_must_be_a_hundred_times_it():
    release = ExampleRelease(1.0, 1.0, 4096, 32, 128)
    cost = record_tail_cost(release.record())
    ledger = record(Ledger(), release, 4)
    delta = 100.5 * 4 * cost.delta
    remaining = (delta - 4 * cost.delta) * math.exp(-4 * cost.log_factor)
    assert epsilon(ledger, delta) == composed_epsilon(((release.record(), 4),), remaining)
    assert gaussian_delta_at(2.0, epsilon(ledger, delta)) < delta
    with pytest.raises(ArgumentError, match=r"delta = .* 100 times") as caught:
        epsilon(ledger, 99.0 * 4 * cost.delta)
    assert "more noise" in caught.value.advice


def test_sampling_scales_the_tail():
    record_full = TrainingRelease(1.0, 1.0, 10_000, 100, 1000, sampling="full").record()
    poisson = TrainingRelease(1.0, 1.0, 10_000, 100, 1000).record()
    ratio = record_tail_cost(poisson).delta / record_tail_cost(record_full).delta
    assert ratio == pytest.approx(0.01, rel=1e-2)
    assert record_tail_cost(dataclasses.replace(poisson, dimension=10**6)).delta > 0.0


def test_costs_add_up():
    cost = TailCost(1e-9, 1e-4)
    assert gaussian_delta(1e-5, ((cost, 10), (cost, 5))) == pytest.approx(
        (1e-5 - 15e-9) * math.exp(-15e-4), rel=1e-14
    )
