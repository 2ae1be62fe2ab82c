"""V1 and V2: adversarial search in float64 against every sensitivity, and planted wrong bounds.

A case draws a pair of neighbours from free parameters, answers with the un-noised release in
float64 and returns the L2 distance. Parameters are improved by random restarts and hill climbing
from random starts and from starts that are extremal by construction.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from dpfa_jax.release import sensitivity

RTOL = 1e-9


def clip(x, norm):
    """Rows of `x` (last axis) scaled into the ball of radius `norm`."""
    return x * np.minimum(1.0, norm / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300))


@dataclasses.dataclass(frozen=True)
class Case:
    """`change(parameters)` is the L2 change of the whole answer, all heads; `bound` its Delta."""

    shapes: tuple[tuple[int, ...], ...]
    change: Callable[..., float]
    bound: float
    starts: tuple[Callable[[np.random.Generator], list[np.ndarray]], ...] = ()


def attack(case: Case, seed: int = 0, restarts: int = 6, steps: int = 250) -> float:
    """The largest change / bound that the search finds."""
    rng = np.random.default_rng(seed)
    best = 0.0
    starts = [*case.starts, *[None] * restarts]
    for start in starts:
        point = (
            start(rng)
            if start is not None
            else [rng.normal(size=shape) * 10.0 ** rng.uniform(-1, 2) for shape in case.shapes]
        )
        value = case.change(*point)
        step = 1.0
        for _ in range(steps):
            index = rng.integers(len(point))
            trial = list(point)
            trial[index] = point[index] + step * rng.normal(size=point[index].shape)
            found = case.change(*trial)
            if found > value:
                point, value, step = trial, found, min(step * 1.5, 20.0)
            else:
                step = max(step * 0.93, 1e-4)
        best = max(best, value / case.bound)
    return best


# --- the three releases, un-noised, in float64 -------------------------------------------------


def rows_case(c, m, heads, d, bound=None):
    """(F) clip="row": attention output (H, m, d) of one example replaced by another."""

    def change(a, b):
        return float(np.linalg.norm(clip(a, c) - clip(b, c)))

    def opposite(rng):
        a = rng.normal(size=(heads, m, d)) * 100.0
        return [a, -a]

    total = math.sqrt(heads) * sensitivity.example_rows(c, m) if bound is None else bound
    return Case(((heads, m, d),) * 2, change, total, (opposite,))


def whole_case(c, m, heads, d, bound=None):
    """(F) clip="example"."""

    def change(a, b):
        return float(np.linalg.norm(clip(a.ravel(), c) - clip(b.ravel(), c)))

    def opposite(rng):
        a = rng.normal(size=(heads, m, d)) * 100.0
        return [a, -a]

    total = sensitivity.example_whole(c) if bound is None else bound
    return Case(((heads, m, d),) * 2, change, total, (opposite,))


def memory_answer(form, q, k, v, live, big_b, c, kappa):
    """Un-noised readout. q (H, m, d), k (G, n, d), v (G, n, d), live (n,) bool; GQA where H > G."""
    repeat = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, repeat, axis=0), np.repeat(clip(v, c), repeat, axis=0)
    logits = np.einsum("hmd,hnd->hmn", q, k)
    if form == "ratio":
        weights = np.exp(np.clip(logits, -big_b, big_b))
        return np.einsum("hmn,hnd->hmd", weights / weights.sum(-1, keepdims=True), v)
    weights = np.exp(np.minimum(logits, big_b) - big_b) * live
    numerator = np.einsum("hmn,hnd->hmd", weights, v)
    return np.concatenate([numerator, kappa * weights.sum(-1, keepdims=True)], axis=-1)


def memory_case(
    form,
    *,
    m=3,
    heads=2,
    groups=2,
    n=5,
    g=1,
    d=3,
    big_b=1.0,
    c=1.0,
    kappa=1.0,
    relation="mask",
    bound=None,
):
    """(M): the first g slots are masked, or take other keys and values."""

    def change(q, k, v, k_new, v_new):
        live = np.ones(n, bool)
        before = memory_answer(form, q, k, v, live, big_b, c, kappa)
        if relation == "mask":
            live = np.arange(n) >= g
            return float(
                np.linalg.norm(memory_answer(form, q, k, v, live, big_b, c, kappa) - before)
            )
        k_two, v_two = k.copy(), v.copy()
        k_two[:, :g], v_two[:, :g] = k_new, v_new
        return float(
            np.linalg.norm(memory_answer(form, q, k_two, v_two, live, big_b, c, kappa) - before)
        )

    shapes = ((heads, m, d), (groups, n, d), (groups, n, d), (groups, g, d), (groups, g, d))

    def extremal(sign_new_key, others):
        def start(rng):
            direction = np.zeros(d)
            direction[0] = 1.0
            q = np.broadcast_to(100.0 * direction, shapes[0]).copy()
            k = np.broadcast_to(-direction, shapes[1]).copy()
            k[:, :g] = direction
            v = np.broadcast_to(others * 100.0 * direction, shapes[2]).copy()
            v[:, :g] = 100.0 * direction
            k_new = np.broadcast_to(sign_new_key * direction, shapes[3]).copy()
            return [q, k, v, k_new, np.broadcast_to(-100.0 * direction, shapes[4]).copy()]

        return start

    if bound is None:
        one_head = (
            sensitivity.memory_ratio(c, big_b, m, n, g)
            if form == "ratio"
            else sensitivity.memory_sum(c, kappa, m, g, relation)
        )
        bound = math.sqrt(heads) * one_head
    starts = tuple(extremal(sign, others) for sign in (1.0, -1.0) for others in (1.0, -1.0))
    return Case(shapes, change, bound, starts)


CASES = {
    "training": Case(
        ((7,), (7,)),
        # add or remove one example: the other gradients cancel
        lambda gradient, rest: float(np.linalg.norm((rest + clip(gradient, 2.0)) - rest)),
        sensitivity.training_group(2.0),
        (lambda rng: [100.0 * rng.normal(size=7), np.zeros(7)],),
    ),
    "F rows": rows_case(0.7, 5, 3, 4),
    "F rows, one row": rows_case(3.0, 1, 1, 1),
    "F whole": whole_case(0.7, 5, 3, 4),
    "M sum mask": memory_case("sum"),
    "M sum mask, kappa 3": memory_case("sum", kappa=3.0),
    "M sum mask, kappa .1, C 2": memory_case("sum", kappa=0.1, c=2.0),
    "M sum mask, group tokens": memory_case("sum", g=3),
    "M sum mask, GQA": memory_case("sum", heads=4, groups=2),
    "M sum mask, cross, one query": memory_case("sum", m=1, n=9, big_b=0.3),
    "M sum mask, only key": memory_case("sum", n=1),
    "M sum substitute, kappa < sqrt 3 C": memory_case("sum", relation="substitute"),
    "M sum substitute, kappa > sqrt 3 C": memory_case("sum", relation="substitute", kappa=2.5),
    "M sum substitute, GQA, g=2": memory_case(
        "sum", relation="substitute", heads=4, groups=1, g=2, big_b=2.0
    ),
    "M ratio": memory_case("ratio", relation="substitute"),
    "M ratio, B=.3": memory_case("ratio", relation="substitute", big_b=0.3, n=16),
    "M ratio, GQA": memory_case("ratio", relation="substitute", heads=4, groups=2),
    "M ratio, group tokens": memory_case("ratio", relation="substitute", g=2, n=7, big_b=0.5),
    "M ratio, all keys": memory_case("ratio", relation="substitute", g=5, n=5),
    "M ratio, MQA, B=2": memory_case("ratio", relation="substitute", heads=3, groups=1, big_b=2.0),
}


@pytest.mark.parametrize("name", CASES)
def test_v1_bound_is_respected_and_reached(name):
    """V1: found / bound <= 1 + 1e-9, and >= 0.999: every one of these bounds is attained."""
    found = attack(CASES[name])
    assert found <= 1.0 + RTOL
    assert found >= 0.999


@pytest.mark.parametrize("name", CASES)
def test_v1_random_starts_alone_respect_the_bound(name):
    """V1: no constructed start; the climber must come close by itself, and never pass."""
    case = dataclasses.replace(CASES[name], starts=())
    found = attack(case, seed=1, restarts=4, steps=300)
    assert 0.5 <= found <= 1.0 + RTOL


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_v1_many_restarts(name):
    """V1, long: 24 random restarts of 2000 steps."""
    assert 0.999 <= attack(CASES[name], seed=2, restarts=24, steps=2000) <= 1.0 + RTOL


def joint_head_clip_case():
    """Values clipped over all heads together, and one head's bound claimed for the whole row.

    Each head attends to another key, whose whole norm may lie in that head, so the others that the
    record displaces do not share one norm.
    """
    heads, big_b, c = 36, 3.0, 1.0
    n = heads + 1

    def answer(k, v):
        joint = clip(v.T, c).T
        weights = np.exp(np.clip(k, -big_b, big_b))
        return np.sum(weights / weights.sum(-1, keepdims=True) * joint, axis=-1)

    def change(k, v, k_new, v_new):
        k_two, v_two = k.copy(), v.copy()
        k_two[:, :1], v_two[:, :1] = k_new, v_new
        return float(np.linalg.norm(answer(k_two, v_two) - answer(k, v)))

    def start(rng):
        k = np.full((heads, n), -100.0)
        k[:, 0] = 100.0
        k[:, 1:][np.eye(heads, dtype=bool)] = 100.0
        v = np.zeros((heads, n))
        v[:, 1:] = np.eye(heads)
        return [k, v, np.full((heads, 1), -100.0), np.zeros((heads, 1))]

    shapes = ((heads, n), (heads, n), (heads, 1), (heads, 1))
    return Case(shapes, change, sensitivity.memory_ratio(c, big_b, 1, n, 1), (start,))


WRONG = {
    "F rows, sqrt(m) missing": rows_case(0.7, 5, 3, 4, math.sqrt(3) * 2 * 0.7),
    "F rows, sqrt(H) missing": rows_case(0.7, 5, 3, 4, sensitivity.example_rows(0.7, 5)),
    "F rows, c for 2c": rows_case(0.7, 5, 3, 4, math.sqrt(15) * 0.7),
    "F whole, C for 2C": whole_case(0.7, 5, 3, 4, 0.7),
    "M sum, sqrt(m) missing": memory_case("sum", bound=math.sqrt(2) * math.sqrt(2)),
    "M sum, sqrt(H) missing": memory_case("sum", bound=sensitivity.memory_sum(1, 1, 3, 1, "mask")),
    "M sum, GQA counts key heads": memory_case(
        "sum", heads=4, groups=2, bound=math.sqrt(2) * sensitivity.memory_sum(1, 1, 3, 1, "mask")
    ),
    "M sum, kappa forgotten": memory_case("sum", bound=math.sqrt(6)),
    "M sum, g forgotten": memory_case(
        "sum", g=2, bound=math.sqrt(2) * sensitivity.memory_sum(1, 1, 3, 1, "mask")
    ),
    "M sum substitute, mask's bound": memory_case(
        "sum",
        relation="substitute",
        bound=math.sqrt(2) * sensitivity.memory_sum(1, 1, 3, 1, "mask"),
    ),
    "M sum substitute, 2C where kappa > sqrt 3 C": memory_case(
        "sum", relation="substitute", kappa=2.5, bound=2.0 * math.sqrt(6)
    ),
    "M ratio, sqrt(m) missing": memory_case(
        "ratio",
        relation="substitute",
        bound=math.sqrt(2) * sensitivity.memory_ratio(1, 1, 1, 5, 1),
    ),
    "M ratio, sqrt(H) missing": memory_case(
        "ratio", relation="substitute", bound=sensitivity.memory_ratio(1, 1, 3, 5, 1)
    ),
    "M ratio, B/2": memory_case(
        "ratio",
        relation="substitute",
        bound=math.sqrt(2) * sensitivity.memory_ratio(1, 0.5, 3, 5, 1),
    ),
    "M ratio, C for 2C": memory_case(
        "ratio",
        relation="substitute",
        bound=math.sqrt(2) * sensitivity.memory_ratio(0.5, 1, 3, 5, 1),
    ),
    "M ratio, one token's weight for g = 2": memory_case(
        "ratio",
        relation="substitute",
        g=2,
        bound=math.sqrt(2) * sensitivity.memory_ratio(1, 1, 3, 5, 1),
    ),
    "M ratio, joint-head clip with the per-head bound": joint_head_clip_case(),
}


@pytest.mark.parametrize("name", WRONG)
def test_v2_planted_wrong_bound_is_refuted(name):
    """V2: found / bound > 1.01 for every planted wrong bound."""
    assert attack(WRONG[name], restarts=1, steps=50) > 1.01


def test_noise_of_several_groups_folds_into_one_gaussian():
    sigmas, deltas = (2.0, 5.0, 1.0), (1.0, 3.0, 0.5)
    folded = sensitivity.effective_noise_multiplier(deltas, sigmas)
    assert folded == pytest.approx((0.25 + 0.36 + 0.25) ** -0.5, rel=1e-15)
    shared = sensitivity.stddevs_for(1.7, deltas, (1.0, 2.0, 4.0))
    assert sensitivity.effective_noise_multiplier(deltas, shared) == pytest.approx(1.7, rel=1e-14)
    assert shared[2] == pytest.approx(4.0 * shared[0])
