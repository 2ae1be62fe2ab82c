"""V18: epsilon against closed forms, stored values and dp_accounting itself; deltas; relations."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dpfa_jax.accounting import (
    Budget,
    Ledger,
    LedgerFile,
    NonPrivateRecord,
    calibrate,
    dp_event,
    epsilon,
    record,
)
from dpfa_jax.accounting.losses import composed_epsilon, gaussian_delta_at, gaussian_epsilon
from dpfa_jax.accounting.renyi import ORDERS, renyi_curve
from dpfa_jax.core import ArgumentError, BudgetExceededError, UnsupportedEventError
from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease

DELTA = 1e-5
SUM = RecordRelease(2.0, 1.0, 1.2, 3, 4, 8)
EXAMPLE = ExampleRelease(0.5, 2.0, 16, 4, 8)


def training(noise=1.0, n=10_000, batch=100, **options):
    return TrainingRelease(1.0, noise, n, batch, 1000, **options)


def closed_form(mu, delta):
    """Root of Phi(mu/2 - e/mu) - e^e Phi(-mu/2 - e/mu) = delta, by another root finder."""

    def gap(e):
        return stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)

    return optimize.brentq(lambda e: gap(e) - delta, 0.0, 200.0, xtol=1e-13)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_v18_gaussian_closed_form(noise, delta):
    """V18: to 1e-6, and never below; answers of equal and of different kinds fold into one."""
    release = dataclasses.replace(EXAMPLE, noise_multiplier=noise)
    other = dataclasses.replace(release, noise_multiplier=3.0)
    for count in (1, 7):
        mu = math.sqrt(count) / noise
        exact = closed_form(mu, delta)
        found = composed_epsilon(((release.record(), count),), delta)
        assert found == pytest.approx(exact, abs=1e-6)
        if noise >= 1.0:  # what the noise tail costs comes on top, and is small
            whole = epsilon(record(Ledger(), release, count), delta)
            assert exact - 1e-6 <= whole <= 1.001 * exact
    both = ((release.record(), 2), (other.record(), 3))
    mu = math.sqrt(2 / noise**2 + 3 / 9)
    assert composed_epsilon(both, delta) == pytest.approx(closed_form(mu, delta), abs=1e-6)


def test_v18_closed_form_against_integration():
    """delta(epsilon) of the shifted Gaussian by numeric integration of (p - e^epsilon q)+."""
    for mu, eps in ((0.5, 0.3), (1.0, 1.0), (2.0, 4.0)):
        lower = mu / 2 - eps / mu
        value, _ = integrate.quad(
            lambda x, eps=eps, mu=mu: stats.norm.pdf(x) - math.exp(eps) * stats.norm.pdf(x - mu),
            -30.0,
            lower,
            epsabs=1e-13,
        )
        assert gaussian_delta_at(mu, eps) == pytest.approx(value, rel=1e-7)


def test_v18_gaussian_edge_cases():
    assert gaussian_epsilon(0.0, DELTA) == 0.0
    assert gaussian_epsilon(1e-6, DELTA) == 0.0
    assert epsilon(Ledger(), DELTA) == 0.0
    for mu in (1e-4, 0.1, 1.0, 30.0):
        found = gaussian_epsilon(mu, 1e-9)
        assert gaussian_delta_at(mu, found) <= 1e-9


# Stored values at delta = 1e-5, from dp_accounting's PLD accountant at interval 1e-4.
STORED = [
    (training(1.0), 1000, 1.83047),
    (training(2.0, 5485, 512), 120, 2.38037),
]


@pytest.mark.parametrize(("release", "count", "expected"), STORED)
def test_v18_stored_dpsgd_values(release, count, expected):
    """V18: 1e-3."""
    assert epsilon(record(Ledger(), release, count), DELTA) == pytest.approx(expected, abs=1e-3)


def test_v18_shuffled_is_not_charged_as_poisson():
    """The example of the privacy contract: q = 0.01, sigma = 1, 1000 steps: 1.83 against 17.9."""
    poisson = epsilon(record(Ledger(), training(), 1000), DELTA)
    shuffled = epsilon(record(Ledger(), training(sampling="shuffled"), 1000), DELTA)
    assert poisson == pytest.approx(1.83, abs=5e-3)
    assert shuffled == pytest.approx(17.9, abs=5e-2)


def test_shuffled_is_charged_by_epochs_and_full_by_steps():
    """10 examples in batches of 4: a loader that drops the last batch has two steps an epoch."""
    shuffled = training(2.0, 10, 4, sampling="shuffled").record()
    assert [dp_event(shuffled, count).count for count in (1, 2, 3, 5)] == [1, 1, 2, 3]
    full = training(2.0, 10, 4, sampling="full").record()
    assert dp_event(full, 5).count == 5
    at_once = record(Ledger(), shuffled, 6)
    assert (
        record(Ledger(), shuffled, 5)
        == at_once
        == record(record(Ledger(), shuffled, 3), shuffled, 2)
    )


def test_separate_shuffles_never_share_an_epoch():
    """k charges of less than an epoch: an example may be met k times, so k epochs are due.

    Negative control: the sum of the steps, rounded up once, is worth fewer and is found too low.
    """
    release = training(2.0, 1000, 100, sampling="shuffled")
    truth = epsilon(record(Ledger(), training(2.0, 1000, 100, sampling="full"), 7), DELTA)
    ledger = Ledger()
    for _ in range(7):
        ledger = record(ledger, release, 3)
    assert epsilon(ledger, DELTA) == pytest.approx(truth, rel=1e-12)
    assert dp_event(release.record(), 7 * 3).count == 3
    assert epsilon(record(Ledger(), release, 7 * 3), DELTA) < 0.8 * truth


def test_a_budget_counts_separate_shuffles_as_they_are_charged(tmp_path):
    """One epoch fits: a second charge within it is refused, in memory and on disk."""
    release = training(2.0, 1000, 100, sampling="shuffled")
    budget = Budget(epsilon(record(Ledger(), release, 10), DELTA) * 1.001, DELTA)
    budget.require(Ledger(), release.record(), 10)
    with pytest.raises(BudgetExceededError):
        budget.require(Ledger(), release.record(), 11)
    path = tmp_path / "ledger.jsonl"
    with LedgerFile.create(path, budget=budget) as file:
        assert file.charge(release, 3).total_count == 10
        with pytest.raises(BudgetExceededError):
            file.charge(release)
    assert LedgerFile.open(path).ledger.total_count == 10


def test_v18_events_mean_the_same_to_dp_accounting():
    """What `dp_event` returns, composed by dp_accounting's own accountant, gives our epsilon."""
    import dp_accounting
    from dp_accounting import pld

    ledger = record(record(Ledger(), training(1.3), 40), training(5.0, sampling="full"), 3)
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=5e-4
    )
    for entry in ledger.entries:
        accountant.compose(dp_event(entry.record, entry.count))
    assert epsilon(ledger, DELTA) == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-4)


def test_v18_renyi_curve_against_dp_accounting():
    """Integer orders agree where truncation is absent; in between, ours lies above the truth."""
    import dp_accounting
    from dp_accounting import rdp

    release = training(1.1, 1000, 20, truncated_batch_size=1000).record()
    ours = renyi_curve(release, 50) / (ORDERS - 1.0)
    event = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.1))
    for order in (2.0, 3.0, 8.0, 64.0, 2.5, 7.35):
        accountant = rdp.RdpAccountant([order])
        accountant.compose(event, 50)
        theirs = float(accountant._rdp[0])
        found = float(ours[np.searchsorted(ORDERS, order)])
        if order == int(order):
            assert found == pytest.approx(theirs, rel=1e-9)
        else:
            assert theirs <= found <= 1.15 * theirs


def test_v18_truncation_only_adds_to_the_renyi_curve():
    """Tight capacity costs more than wide capacity, and exact moments of a small case agree."""
    wide = renyi_curve(training(1.0, 1000, 20, truncated_batch_size=1000).record())
    usual = renyi_curve(training(1.0, 1000, 20).record())
    tight = renyi_curve(training(1.0, 1000, 20, truncated_batch_size=20).record())
    assert np.all(usual >= wide)
    assert np.all(tight[ORDERS <= 8] > 1.05 * wide[ORDERS <= 8])
    # The truth for one example opposite to n - 1 = 3 others of equal gradients, cap 2, q = 1/2.
    n, cap, q, noise, order = 4, 2, 0.5, 2.0, 4.0
    release = training(noise, n, 2, truncated_batch_size=cap).record()

    def density(x, with_example):
        total = np.zeros_like(x)
        for others in range(n):
            chance = stats.binom.pmf(others, n - 1, q)
            kept = min(others, cap)
            without = stats.norm.pdf(x, kept, noise)
            if not with_example:
                total += chance * without
                continue
            stays = min(1.0, cap / (others + 1))
            moved = stats.norm.pdf(x, (kept if others < cap else kept - 1) - 1.0, noise)
            total += chance * ((1 - q * stays) * without + q * stays * moved)
        return total

    x = np.linspace(-30, 30, 100_001)
    with_it, without = density(x, True), density(x, False)
    bound = renyi_curve(release)[np.searchsorted(ORDERS, order)]
    for top, bottom in ((with_it, without), (without, with_it)):
        found = math.log(integrate.trapezoid(top**order * bottom ** (1 - order), x))
        assert 0.0 < found <= bound


@pytest.mark.parametrize(
    ("release", "count"),
    [
        (EXAMPLE, 1),
        (SUM, 30),
        (training(1.0), 1000),
        (training(2.0, 5485, 512), 120),
        (training(4.0, 200, 20), 10),
        (training(8.0, sampling="full"), 40),
        (training(3.0, sampling="shuffled"), 400),
    ],
)
@pytest.mark.parametrize("delta", [1e-4, 1e-6])
def test_v18_renyi_is_never_below_the_loss_distribution(release, count, delta):
    if getattr(release, "dataset_size", 1) * delta >= 1:
        delta = 1e-5
    ledger = record(Ledger(), release, count)
    tight, loose = epsilon(ledger, delta), epsilon(ledger, delta, accountant="rdp")
    assert tight <= loose <= 2.0 * tight + 0.3


def test_epsilon_falls_with_delta_and_grows_with_answers():
    ledgers = [record(Ledger(), training(1.5), count) for count in (10, 40)]
    for accountant in ("pld", "rdp"):
        few, many = (epsilon(ledger, DELTA, accountant=accountant) for ledger in ledgers)
        assert few < many
        assert epsilon(ledgers[1], 1e-6, accountant=accountant) > many


def test_un_noised_and_test_noise_are_infinite():
    """Nobody quotes an epsilon of test noise by accident: it must be asked for by name."""
    insecure = dataclasses.replace(EXAMPLE, insecure_test_noise=True)
    ledger = record(record(Ledger(), EXAMPLE), insecure)
    assert epsilon(ledger, DELTA) == math.inf == epsilon(ledger, DELTA, accountant="rdp")
    assert not ledger.is_private
    assert epsilon(ledger, DELTA, nominal=True) == epsilon(record(Ledger(), EXAMPLE, 2), DELTA)
    bare = NonPrivateRecord(EXAMPLE.unit, EXAMPLE.relation, "attention map")
    ledger = record(record(Ledger(), EXAMPLE), bare)
    assert epsilon(ledger, DELTA) == math.inf == epsilon(ledger, DELTA, nominal=True)
    import dp_accounting

    assert isinstance(dp_event(bare), dp_accounting.NonPrivateDpEvent)


@pytest.mark.parametrize("bad", [0.0, -1e-5, 1.0, math.nan, math.inf, None, "1e-5", True, 1e-4])
def test_v23_delta_out_of_range(bad):
    """delta >= 1/n among them: n = 10000 is in the record."""
    with pytest.raises(ArgumentError, match="delta") as caught:
        epsilon(record(Ledger(), training()), bad)
    assert caught.value.advice


def test_v23_unknown_accountant_and_release():
    with pytest.raises(ArgumentError, match="accountant = 'gdp'"):
        epsilon(Ledger(), DELTA, accountant="gdp")
    with pytest.raises(ArgumentError, match="release = 3"):
        record(Ledger(), 3)
    with pytest.raises(ArgumentError, match="count = 0"):
        record(Ledger(), EXAMPLE, 0)


def test_v18_unsupported_pairs_are_refused_by_name():
    """Sampling under a relation that no event describes; units and relations that do not mix."""
    odd = dataclasses.replace(training().record(), relation="replace")
    for call in (
        lambda: dp_event(odd),
        lambda: epsilon(record(Ledger(), odd), DELTA),
        lambda: epsilon(record(Ledger(), odd), DELTA, accountant="rdp"),
    ):
        with pytest.raises(UnsupportedEventError, match=r"relation = 'replace'"):
            call()
    with pytest.raises(UnsupportedEventError, match="unit = "):
        record(record(Ledger(), EXAMPLE), training())
    with pytest.raises(UnsupportedEventError, match="relation = 'substitute'"):
        record(record(Ledger(), SUM), dataclasses.replace(SUM, relation="substitute"))


def test_ledger_is_a_value():
    empty = Ledger()
    one = record(empty, EXAMPLE)
    assert empty == Ledger() and empty.unit is None
    assert record(one, EXAMPLE, 4) == record(empty, EXAMPLE, 5)
    assert record(one, EXAMPLE, 4).count_of(EXAMPLE) == 5
    other = dataclasses.replace(EXAMPLE, noise_multiplier=9.0)
    two = record(one, other)
    assert [entry.count for entry in two.entries] == [1, 1] and two.total_count == 2
    assert (two.unit, two.relation) == (EXAMPLE.unit, "replace")
    with pytest.raises(ArgumentError, match="twice"):
        Ledger((*one.entries, *one.entries))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.entries = ()


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("release", "count"),
    [(SUM, 10), pytest.param(training(9.9, 2000, 100), 60, marks=pytest.mark.slow)],
)
def test_calibration_finds_the_third_number(release, count, accountant):
    """The noise keeps the budget within 0.1 %, 0.5 % less noise breaks it, and so back again."""
    found = calibrate(release, delta=DELTA, epsilon=2.0, count=count, accountant=accountant)
    assert 2.0 * 0.996 <= found.epsilon <= 2.0
    assert found.epsilon == epsilon(
        record(Ledger(), found.release, count), DELTA, accountant=accountant
    )
    noise = found.release.noise_multiplier
    less = dataclasses.replace(found.release, noise_multiplier=0.995 * noise)
    assert epsilon(record(Ledger(), less, count), DELTA, accountant=accountant) > 2.0
    most = calibrate(found.release, delta=DELTA, epsilon=2.0, accountant=accountant)
    assert most.count == count
    spent = calibrate(found.release, delta=DELTA, count=count, accountant=accountant)
    assert spent.epsilon == found.epsilon
    over = record(Ledger(), found.release, most.count + 1)
    assert epsilon(over, DELTA, accountant=accountant) > 2.0


def test_calibration_of_test_noise_is_that_of_secret_noise():
    insecure = dataclasses.replace(SUM, insecure_test_noise=True)
    assert (
        calibrate(insecure, delta=DELTA, count=3).epsilon
        == calibrate(SUM, delta=DELTA, count=3).epsilon
    )


def test_v23_calibration_refuses():
    with pytest.raises(ArgumentError, match="epsilon = None"):
        calibrate(SUM, delta=DELTA)
    with pytest.raises(ArgumentError, match="epsilon = -1"):
        calibrate(SUM, delta=DELTA, epsilon=-1.0, count=3)
    with pytest.raises(ArgumentError, match=r"epsilon = Array\(3.*float\(x\)"):
        calibrate(SUM, delta=DELTA, epsilon=jnp.float32(3), count=3)
    with pytest.raises(ArgumentError, match=r"delta = 0\.001"):
        calibrate(training(), delta=1e-3, epsilon=1.0, count=3)
    with pytest.raises(BudgetExceededError, match="one answer alone"):
        calibrate(SUM, delta=DELTA, epsilon=0.1)


def test_accounting_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, dpfa_jax.accounting;"
        "print([m for m in ('jax', 'dp_accounting', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "dp_accounting" not in shown and "scipy" not in shown


def test_v23_a_ledger_file_or_a_path_is_no_ledger(tmp_path):
    """The message says which part of it is."""
    with LedgerFile.create(tmp_path / "ledger.jsonl") as file:
        for other in (file, file.path, None):
            for call in (
                lambda other=other: epsilon(other, DELTA),
                lambda other=other: record(other, SUM),
                lambda other=other: Budget(1.0, DELTA).require(other, SUM.record(), 1),
            ):
                with pytest.raises(ArgumentError, match=r"ledger = .* `\.ledger`"):
                    call()
        assert epsilon(file.ledger, DELTA) == 0.0
