"""An attacker who knows all but one example, and wrote that one: what each turn shows of it."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.dpsgd_cases import plan_of

from dpfa_jax import dpsgd
from dpfa_jax.dpsgd import adaptive_clipping
from dpfa_jax.noise.keys import insecure_test_key
from dpfa_jax.release import AdaptiveClipping

# The canary's gradient before clipping, leaf by leaf, in each leaf far beyond any clip norm.
GRADIENTS = {"a": np.array([3.0, -1.0, 0.5, 0.0, 2.0, 1.0]), "b": np.array([-1.0, 0.5, 2.0, 1.0])}
CANARY = 0  # its place among the examples; all others have a gradient of zero
_SIZE = 1e6

# How a plan clips and noises; each is to give away the same.
KINDS = {
    "flat": {},
    "groups": {
        "l2_clip_norm": (1.0, 4.0), "groups": (("a",), ("b",)), "noise_shares": (1.0, 3.0),
    },
    "adaptive": {
        "l2_clip_norm": (1.0, 4.0), "groups": (("a",), ("b",)), "noise_shares": (1.0, 3.0),
        "adaptive_clipping": AdaptiveClipping(quantile=0.47, learning_rate=0.02, budget_share=0.5),
    },
    "correlated": {"noise_strategy": (0.75, 0.5, 0.375, 0.25)},
}  # fmt: skip


def canary_plan(kind: str, **changes) -> dpsgd.DPSGDPlan:
    return plan_of(num_parameters=10, **KINDS[kind], **changes)


def batches_with_the_canary(plan, is_present: bool) -> tuple[np.ndarray, np.ndarray]:
    """(sizes, is_real), both (steps, capacity): the canary's, on each of its turns."""
    mine = np.arange(plan.steps) % len(plan.release.noise_strategy) == CANARY
    is_real = np.zeros((plan.steps, plan.capacity), bool)
    is_real[:, 3] = is_present & mine
    return _SIZE * is_real.astype(np.float32), is_real


def rows_of_the_canary(
    plan: dpsgd.DPSGDPlan, batches: Iterable[np.ndarray], is_present: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(sizes, is_real) of batches of example indices: the canary's row, and the others' zeros."""
    sizes = np.zeros(plan.release.dataset_size, np.float32)
    sizes[CANARY] = _SIZE * is_present
    taken = [dpsgd.take_batch(sizes, indices) for indices in batches]
    return np.stack([rows for rows, _ in taken]), np.stack([is_real for _, is_real in taken])


def scores(
    plan: dpsgd.DPSGDPlan, runs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int
) -> list[np.ndarray]:
    """For each of `runs`, one score a turn: normal with deviation sigma, mean 1 or 0.

    1 where the canary took part. It is the likelihood ratio's own statistic: correlated noise is
    made independent, then each release is projected on the canary's clipped gradient, every group
    weighed by its precision; with adaptive clipping the released counts are weighed in too.
    """
    release = plan.release
    strategy, whole = release.noise_strategy, len(release.noise_strategy)
    found = []
    for sums, norms, stddevs, counts in _released(plan, runs, seed):
        score = np.zeros(plan.steps)
        for group, direction in enumerate(_directions(plan)):
            independent = np.convolve(sums @ direction, strategy)[: plan.steps]
            score += norms[:, group] / stddevs[:, group] ** 2 * independent
        if counts is not None:
            score -= 0.5 / release.noise_stddevs[-1] ** 2 * counts.sum(axis=1)
        turns = score[: plan.steps // whole * whole].reshape(-1, whole)
        found.append(release.noise_multiplier**2 * turns @ np.asarray(strategy))
    return found


def _directions(plan: dpsgd.DPSGDPlan) -> list[np.ndarray]:
    """Of each clip group, where the canary's gradient points."""
    groups = plan.groups or (tuple(GRADIENTS),)
    found = [
        np.concatenate([(name in group) * leaf for name, leaf in GRADIENTS.items()])
        for group in groups
    ]
    return [direction / np.linalg.norm(direction) for direction in found]


def _released(plan, runs, seed):
    """Of each run: sums (steps, 10); clip norms and noise of each step and group; counts or None.

    Everything here is read off the published iterates and the clip norms in the state.
    """
    release = plan.release
    adaptive = release.adaptive_clipping

    def loss(params, size):
        return size * sum(params[name] @ leaf for name, leaf in GRADIENTS.items())

    dp = dpsgd.make_dp_step(loss, optax.sgd(-float(release.expected_batch_size)), plan)
    zero = {name: jnp.zeros(leaf.shape) for name, leaf in GRADIENTS.items()}

    @jax.jit
    def run(state, sizes, is_real, noise_keys):
        def body(state, inputs):
            after = dp.step(state._replace(params=zero), *inputs)
            sums = jnp.concatenate([after.params[name] for name in GRADIENTS])
            return after, (sums, state.l2_clip_norms, after.l2_clip_norms)

        return jax.lax.scan(body, state, (sizes, is_real, noise_keys))[1]

    groups = len(release.l2_clip_norms)
    for place, arrays in enumerate(runs):
        keys = insecure_test_key(seed + place, (plan.steps,))
        sums, before, after = run(dp.init(zero), *arrays, keys)
        counts = None
        norms = np.tile(release.l2_clip_norms, (plan.steps, 1))
        stddevs = np.tile(release.noise_stddevs[:groups], (plan.steps, 1))
        if adaptive is not None:
            norms = np.asarray(before, np.float64)
            stddevs, _ = jax.vmap(lambda now: adaptive_clipping.noise_for(release, now))(before)
            moves = np.log(np.asarray(after, np.float64) / norms)
            shares = adaptive.quantile - moves / adaptive.learning_rate
            counts = release.expected_batch_size * (shares - 0.5)
        yield np.asarray(sums, np.float64), norms, np.asarray(stddevs, np.float64), counts
