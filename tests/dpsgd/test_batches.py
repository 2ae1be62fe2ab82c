"""Poisson batches are what is accounted (V19)."""

import dataclasses

import numpy as np
import pytest
from helpers.dpsgd_cases import plan_of
from scipy import stats

from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd import take_batch

EXAMPLES, EXPECTED = 30, 6


def memberships(capacity: int, steps: int, seed: int = 0) -> np.ndarray:
    """(steps, EXAMPLES) booleans: who was in which batch."""
    plan = plan_of(
        dataset_size=EXAMPLES,
        expected_batch_size=EXPECTED,
        truncated_batch_size=capacity,
        micro_batch_size=1,
        steps=steps,
        delta=1e-3,
    )
    drawn = np.stack(list(plan.index_batches(np.random.default_rng(seed))))
    assert drawn.shape == (steps, capacity)
    member = np.zeros((steps, EXAMPLES + 1), np.int32)
    np.add.at(member, (np.arange(steps)[:, None], drawn), 1)
    assert member[:, :EXAMPLES].max() <= 1, "an example twice in one batch"
    return member[:, :EXAMPLES].astype(bool)


def poisson_violations(member: np.ndarray) -> list[str]:
    """Which of the laws of independent inclusion are broken, at alpha = 1e-3 each."""
    steps, examples = member.shape
    probability = EXPECTED / EXAMPLES
    spread = np.sqrt(probability * (1.0 - probability))
    broken = []
    rates = (member.mean(axis=0) - probability) / (spread / np.sqrt(steps))
    if np.abs(rates).max() > stats.norm.isf(0.5e-3 / examples):
        broken.append("inclusion rate")
    correlation = np.corrcoef(member.T.astype(np.float64))
    pairs = np.abs(correlation[np.triu_indices(examples, 1)])
    if pairs.max() * np.sqrt(steps) > stats.norm.isf(0.5e-3 / pairs.size):
        broken.append("pairwise independence")
    sizes = member.sum(axis=1)
    chi2 = steps * sizes.var() / (examples * spread**2)
    if not abs(chi2 - steps) < stats.norm.isf(0.5e-3) * np.sqrt(2.0 * steps):
        broken.append("batch variance")
    serial = np.corrcoef(sizes[:-1], sizes[1:])[0, 1] if sizes.std() > 0 else 0.0
    if abs(serial) * np.sqrt(steps) > stats.norm.isf(0.5e-3):
        broken.append("steps depend on each other")
    return broken


def shuffled_memberships(steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    member = np.zeros((steps, EXAMPLES), bool)
    for epoch in range(steps // (EXAMPLES // EXPECTED)):
        for part, indices in enumerate(np.split(rng.permutation(EXAMPLES), EXAMPLES // EXPECTED)):
            member[epoch * (EXAMPLES // EXPECTED) + part, indices] = True
    return member


def test_examples_enter_independently_at_the_accounted_rate():
    """V19: 1e5 draws; a shuffled loader, and a rate 3 % too high, are caught."""
    member = memberships(EXAMPLES, 100_000)
    assert poisson_violations(member) == []
    assert not member.any(axis=1).all(), "an empty batch must occur: 0.8^30 of 1e5"
    assert "batch variance" in poisson_violations(shuffled_memberships(10_000))
    assert "pairwise independence" in poisson_violations(shuffled_memberships(10_000))
    more = member | (np.random.default_rng(1).random(member.shape) < 0.0075)
    assert "inclusion rate" in poisson_violations(more)


def test_beyond_the_capacity_a_random_subset_remains():
    """V19: sizes follow the truncated binomial, and truncation favours nobody."""
    capacity, steps = 8, 20_000
    member = memberships(capacity, steps)
    counts = np.bincount(member.sum(axis=1), minlength=capacity + 1)
    law = stats.binom.pmf(np.arange(capacity + 1), EXAMPLES, EXPECTED / EXAMPLES)
    law[capacity] = stats.binom.sf(capacity - 1, EXAMPLES, EXPECTED / EXAMPLES)
    keep = law * steps > 5
    expected = np.append(law[keep], 1.0 - law[keep].sum()) * steps
    found = np.append(counts[keep], steps - counts[keep].sum())
    cells = expected > 5
    assert (
        stats.chisquare(
            found[cells], expected[cells] * found[cells].sum() / expected[cells].sum()
        ).pvalue
        > 1e-3
    )
    full = member[member.sum(axis=1) == capacity]
    rates = full.mean(axis=0)
    share = capacity / EXAMPLES
    errors = np.abs(rates - share) / np.sqrt(share * (1.0 - share) / len(full))
    assert errors.max() < stats.norm.isf(0.5e-3 / EXAMPLES)
    cut = np.sort(np.argsort(~full, axis=1, kind="stable")[:, : capacity - 1], axis=1)
    biased = np.zeros_like(full)
    np.put_along_axis(biased, cut, True, axis=1)  # control: drops the last one, not a random one
    assert np.abs(biased.mean(axis=0) - (capacity - 1) / EXAMPLES).max() > 4.5 * np.sqrt(
        share / len(full)
    )


def test_batches_need_a_generator_and_keep_to_the_plan():
    """V23: a seed, None, or more steps than planned are refused by name."""
    plan = plan_of(steps=3)
    for rng in (0, None, np.random.RandomState(0)):
        with pytest.raises(ArgumentError, match="rng"):
            plan.index_batches(rng)
    with pytest.raises(ArgumentError, match="steps = 4"):
        plan.index_batches(np.random.default_rng(), 4)
    assert len(list(plan.index_batches(np.random.default_rng(), 2))) == 2


def test_padding_rows_hold_no_data():
    data = {"x": np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2), "y": np.array([7, 8, 9])}
    batch, is_real = take_batch(data, np.array([2, 0, -1, -1]))
    np.testing.assert_array_equal(is_real, [True, True, False, False])
    np.testing.assert_array_equal(batch["x"], [[5, 6], [1, 2], [0, 0], [0, 0]])
    np.testing.assert_array_equal(batch["y"], [9, 7, 0, 0])
    for bad in ([3], [-2]):
        with pytest.raises(ArgumentError, match="indices"):
            take_batch(data, np.array(bad))


def test_an_example_twice_in_a_batch_is_refused():
    """V23: it would count beyond its clip norm. Padding may repeat; so may equal examples."""
    data = np.zeros((5, 2), np.float32)
    for twice in ([3, 3], [3, 0, 3, -1, -1], [4, 3, 2, 1, 3, 3]):
        with pytest.raises(ArgumentError, match=r"indices = 3: .*more than once"):
            take_batch(data, np.array(twice))
    assert take_batch(data, np.array([4, 3, 2, 1, 0, -1, -1]))[1].sum() == 5
    assert take_batch(data, np.array([-1, -1]))[1].sum() == 0


@pytest.mark.parametrize(
    ("examples", "name"),
    [
        ({"x": np.zeros((3, 2)), "t": np.float32(3.0)}, r"examples\['t'\]"),
        ({"x": [1.0, 2.0, 3.0]}, r"examples\['x'\]\[0\]"),
        ({"x": np.zeros((3, 2)), "n": 3}, r"examples\['n'\]"),
    ],
    ids=["scalar", "list", "number"],
)
def test_examples_that_are_no_rows_are_refused(examples, name):
    with pytest.raises(ArgumentError, match=f"{name} = .*not an array with one row an example"):
        take_batch(examples, np.array([0, -1]))


@pytest.mark.parametrize(
    "indices",
    [[0.5, 1.0], [True, False, True], [[0, 1]], 0, ["0"], [None, 0]],
    ids=["floats", "booleans", "matrix", "number", "text", "objects"],
)
def test_indices_that_are_no_vector_of_integers_are_refused(indices):
    """A boolean mask would be read as indices 1, 0, 1."""
    with pytest.raises(ArgumentError, match=r"indices = .*not a vector of integers"):
        take_batch({"x": np.zeros((3, 2))}, np.array(indices))


@pytest.mark.parametrize("rows", [4, 6])
def test_data_of_another_size_than_the_plan_are_refused(rows):
    """V23: more rows would never be drawn, fewer be missing once they are."""
    indices = np.array([0, 3, -1])
    take_batch({"x": np.zeros((5, 2))}, indices, 5)
    with pytest.raises(ArgumentError, match=f"dataset_size = 5: the examples have {rows} rows"):
        take_batch({"x": np.zeros((5, 2)), "y": np.zeros(rows)}, indices, 5)


def test_plans_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of().steps = 5
