"""What every build of the private releases must pass, each check small enough for many builds."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.accounting import Ledger
from dpfa_jax.attention import charge, core, dp_attention
from dpfa_jax.core import KeyReuseError, PrivateAutodiffError
from dpfa_jax.kernels import memory_loop
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs
from dpfa_jax.kernels.blocked import BACKEND
from dpfa_jax.noise import insecure_test_key, new_noise_key
from dpfa_jax.release import ExampleRelease, RecordRelease, sensitivity

# One shape for all checks: what is compiled for one serves every build.
BATCH, ROWS, KEYS, HEADS, SIZE = 400, 3, 6, 2, 4
QUIET = 2.0**-12  # noise so small that the signal shows
EXAMPLE = ExampleRelease(0.5, QUIET, ROWS, HEADS, SIZE, insecure_test_noise=True)
SUM = RecordRelease(1.0, 1.0, QUIET, ROWS, HEADS, SIZE, insecure_test_noise=True)
RATIO = dataclasses.replace(SUM, form="ratio", relation="substitute", memory_length=KEYS)


def draw(batch=BATCH, seed=0, scale=3.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((batch, ROWS, HEADS, SIZE), *((batch, KEYS, HEADS, SIZE),) * 2)
    return tuple(jnp.asarray(scale * rng.standard_normal(s), dtype) for s in shapes)


def answer(release, arrays, seed=0, **options):
    """One release through the public function, as float64.

    Without the outer jit, whose cache would hand one build's program to another.
    """
    options = {"noise_key": insecure_test_key(seed)} | options
    with mock.patch.multiple(
        core, _softmax=core._differentiable_softmax, _memory=core._underivable_memory
    ):
        return np.asarray(dp_attention(*arrays, release=release, **options), np.float64)


def noisy(release, **options):
    """Noise alone in standard deviations, (BATCH, ROWS, HEADS, SIZE): all values are zero."""
    release = dataclasses.replace(release, noise_multiplier=1.0)
    query, key, _ = draw(seed=1)
    values = answer(release, (query, key, jnp.zeros_like(key)), **options)
    return values / np.asarray(release.noise_stddevs)[:, None]


def check_rows_are_clipped() -> None:
    """Each released row keeps the clip norm; the noise is 2^-12 of the sensitivity."""
    norms = np.linalg.norm(answer(EXAMPLE, draw()), axis=-1)
    slack = 8 * EXAMPLE.noise_stddevs[0]
    assert norms.max() <= EXAMPLE.l2_clip_norm + slack
    assert norms.min() > 0.5 * EXAMPLE.l2_clip_norm  # long rows stay at the norm, not at 0


def check_values_are_clipped() -> None:
    """An average of long values is no longer than C (ratio form)."""
    query, key, value = draw()
    out = answer(RATIO, (query, key, 100 * value))
    assert np.linalg.norm(out, axis=-1).max() <= 1.0 + 8 * RATIO.noise_stddevs[0]


def check_non_finite_rows_count_as_zero() -> None:
    """A NaN or infinite value leaves the pure noise of a row of zeros."""
    query, key, value = draw()
    expected = answer(EXAMPLE, (query, key, jnp.zeros_like(value)))
    for odd in (np.nan, np.inf):
        got = answer(EXAMPLE, (query, key, jnp.full_like(value, odd)))
        np.testing.assert_array_equal(got, expected)


def check_noise_has_the_promised_size() -> None:
    """V9: deviation of every head within 4.5 of its own standard errors; both directions."""
    for release in (EXAMPLE, RATIO):
        draws = np.moveaxis(noisy(release), 2, 0).reshape(HEADS, -1)
        error = 4.5 / np.sqrt(2 * draws.shape[1])
        assert np.all(np.abs(draws.std(axis=1) - 1) < error), draws.std(axis=1)


def check_noise_does_not_depend_on_the_data() -> None:
    """The same noise under any values and any number of live keys."""
    release = dataclasses.replace(EXAMPLE, noise_multiplier=1.0)
    query, key, value = draw()
    zeros = jnp.zeros_like(value)
    alone = answer(release, (query, key, zeros))
    mask = jnp.arange(KEYS)[None, None, None] < 2
    np.testing.assert_array_equal(alone, answer(release, (query, key, zeros), mask=mask))
    # Equal long values give rows at the clip norm exactly; what is left is the noise.
    along = np.eye(SIZE)[0]
    moved = answer(release, (query, key, zeros + 100 * along)) - release.l2_clip_norm * along
    assert np.abs(moved - alone).max() <= 1.001 * release.grids[0]


def check_noise_differs_everywhere() -> None:
    """V11: no two rows, heads, columns, batch rows, layers or release ids share their noise."""
    fields = [noisy(EXAMPLE, **o) for o in ({}, {"layer": 1}, {"release_id": 1})]
    columns = np.concatenate([x.reshape(BATCH, -1) for x in fields], axis=1)
    assert columns.std(axis=0).min() > 0.5  # examples differ
    columns = np.concatenate([columns[:-1], columns[1:]], axis=1)  # and their neighbours
    correlation = np.corrcoef(columns.T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5.5 / np.sqrt(BATCH - 1)


def check_released_values_lie_on_the_grid() -> None:
    """V12: every number is a multiple of the public grid."""
    for release in (EXAMPLE, RATIO):
        cells = answer(release, draw()) / np.asarray(release.grids)[:, None]
        np.testing.assert_array_equal(cells, np.round(cells))


def check_one_array_is_returned() -> None:
    """V24: the answer only; no log-sum-exp, maximum, weight or un-noised output."""
    for release in (EXAMPLE, SUM, RATIO):
        arrays = draw()
        out = jax.eval_shape(
            lambda k, *x, r=release: dp_attention(*x, release=r, noise_key=k),
            insecure_test_key(0),
            *arrays,
        )
        assert [leaf.shape for leaf in jax.tree.leaves(out)] == [arrays[0].shape]


def check_examples_are_apart() -> None:
    """V6: a batch row does not see another one."""
    for release in (EXAMPLE, SUM):
        arrays = draw()
        changed = tuple(x.at[1].set(2 * x[1] + 1) for x in arrays)
        np.testing.assert_array_equal(answer(release, arrays)[0], answer(release, changed)[0])


def check_hidden_keys_hold_any_bytes() -> None:
    """V6: hiding a slot, or filling it with NaN and hiding it, is the same release."""
    mask = (jnp.arange(KEYS) != 2)[None, None, None]
    for release in (EXAMPLE, SUM):
        query, key, value = draw()
        expected = answer(release, (query, key, value), mask=mask)
        filled = (query, key.at[:, 2].set(jnp.nan), value.at[:, 2].set(jnp.nan))
        np.testing.assert_array_equal(answer(release, filled, mask=mask), expected)


def check_each_key_weighs_at_most_one() -> None:
    """A key whose logit is far above B weighs 1: with equal values Z counts the keys.

    (N, Z) of n equal keys at the bound is n (v, kappa), so N / Z is v and not less.
    """
    query, key, value = draw()
    query, key = 100 * jnp.ones_like(query), 100 * jnp.ones_like(key)
    value = jnp.broadcast_to(jnp.eye(SIZE)[0], value.shape)
    out = answer(dataclasses.replace(SUM, floor=float(KEYS)), (query, key, value))
    # The floor is n keys: with a weight above 1 the quotient is v all the same, below it is less.
    np.testing.assert_allclose(out[..., 0], 1.0, atol=0.05)
    low = answer(dataclasses.replace(SUM, floor=10.0 * KEYS), (query, key, value))
    np.testing.assert_allclose(low[..., 0], 0.1, atol=0.01)


def check_numerator_and_normaliser_share_their_weights() -> None:
    """Equal values come out as they are, whatever the weights."""
    query, key, value = draw(scale=1.0)
    value = jnp.broadcast_to(0.5 * jnp.eye(SIZE)[0], value.shape)
    out = answer(dataclasses.replace(RATIO, noise_multiplier=2.0**-20), (query, key, value))
    np.testing.assert_allclose(out[..., 0], 0.5, atol=2e-5)


def check_a_record_moves_the_sums_by_its_bound() -> None:
    """V3: one of 64 keys, at the maximum B, is masked."""
    bound, n = 0.5, 64
    key = jnp.full((1, n, 1, SIZE), 0.0).at[..., 0].set(-bound).at[0, 7, 0, 0].set(bound)
    unit = jnp.zeros((1, n, 1, SIZE)).at[..., 0].set(1.0)
    readout = MemoryReadout("sum", bound, 1.0, 1.0, 1.0, (1.0,), (1.0,))
    inputs = AttentionInputs(unit[:, :1], key, unit)
    hidden = inputs._replace(mask=(jnp.arange(n) != 7)[None, None, None])
    one, other = (
        np.asarray(memory_loop.sums(AttentionSpec(1.0), readout, x).high, np.float64)
        for x in (inputs, hidden)
    )
    bound = (1 + sensitivity.ACCUMULATION_SLACK) * sensitivity.memory_sum(1.0, 1.0, 1, 1, "mask")
    assert np.linalg.norm(one - other) <= bound


def check_replacing_an_example_moves_it_by_the_sensitivity() -> None:
    """V1: opposite long rows in every head are the worst case, and the bound is tight there."""
    query, key, value = draw()
    value = jnp.full_like(value, 100.0)
    change = answer(EXAMPLE, (query, key, value)) - answer(EXAMPLE, (query, key, -value))
    found = np.linalg.norm(change.reshape(BATCH, -1), axis=1).max()
    claimed = EXAMPLE.noise_stddevs[0] / EXAMPLE.noise_multiplier
    assert 0.999 * claimed <= found <= 1.001 * claimed, found / claimed


def check_a_second_use_is_refused() -> None:
    """V11: the same key, release id and layer serve once."""
    release = dataclasses.replace(EXAMPLE, insecure_test_noise=False)
    secret = new_noise_key()
    answer(release, draw(), noise_key=secret)
    try:
        answer(release, draw(), noise_key=secret)
    except KeyReuseError:
        return
    raise AssertionError("one key served two releases")


def check_memory_refuses_autodiff() -> None:
    """V17."""
    arrays = draw()
    try:
        jax.grad(lambda q: core._underivable_memory(*_memory_call(q, *arrays[1:])).sum())(arrays[0])
    except PrivateAutodiffError:
        return
    raise AssertionError("a memory was differentiated")


def _memory_call(query, key, value):
    readout = MemoryReadout("sum", 1.0, 1.0, 1.0, 1.0, (1.0,) * HEADS, (2.0**-4,) * HEADS)
    batch = query.shape[0]
    noise = NoiseInputs(
        jnp.zeros((batch, 2), jnp.uint32),
        jnp.arange(batch, dtype=jnp.uint32),
        jnp.zeros(batch, jnp.uint32),
    )
    inputs = AttentionInputs(query, key, value, noise=noise)
    return BACKEND, AttentionSpec(1.0, readout=readout), inputs


def check_charge_comes_before_the_key() -> None:
    """Each charge is in the ledger, and each gives another key."""
    release = dataclasses.replace(EXAMPLE, insecure_test_noise=False)
    ledger, first = charge(Ledger(), release)
    ledger, second = charge(ledger, release)
    assert ledger.total_count == 2
    assert (jax.random.key_data(first) != jax.random.key_data(second)).any()
