"""The clipped sum against jax_privacy's, an implementation that shares no line with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.dpsgd_cases import (
    PARAMETERS,
    batch_of,
    flat,
    loss_fn,
    params_of,
    plan_of,
    release_once,
)

from dpfa_jax.clipping.trees import CLIP_MARGIN

pytestmark = pytest.mark.quickly_compiled


def theirs(batch, real, l2_clip_norm):
    """jax_privacy 2.0: examples that are not real are left out; those not finite count as zero."""
    from jax_privacy import clipping

    def loss(params, batch):
        return jnp.sum(loss_fn(params, batch))

    summed = clipping.clipped_grad(loss, l2_clip_norm=l2_clip_norm)
    return flat(summed(params_of(), jax.tree.map(lambda x: jnp.asarray(x[real]), batch)))


# jax_privacy 2.0 calls a name that optax has renamed.
@pytest.mark.filterwarnings("ignore:optax.global_norm:DeprecationWarning")
@pytest.mark.parametrize("l2_clip_norm", [0.05, pytest.param(1.0, marks=pytest.mark.slow), 1e4])
def test_the_released_sum_is_jax_privacys(l2_clip_norm):
    """V8: the built step, its noise 2^-20 of the clip norm; a clip norm 1 % off is caught."""
    batch, real = batch_of(16, scale=2.0), np.arange(16) < 13
    batch["x"][2, 1] = np.nan
    plan = plan_of(l2_clip_norm=l2_clip_norm, noise_multiplier=2.0**-20)
    ours = release_once(plan, batch, real).vector
    effective = l2_clip_norm * (1.0 - CLIP_MARGIN)
    # Noise within 8 deviations on each number, and both sums' roundings.
    tolerance = np.sqrt(PARAMETERS) * 9 * plan.release.noise_stddevs[0]
    expected = theirs(batch, real, effective)
    tolerance += 2.0**-19 * max(1.0, np.linalg.norm(expected))
    assert np.linalg.norm(ours - expected) <= tolerance
    if l2_clip_norm < 1e4:  # at 1e4 nobody is clipped
        assert np.linalg.norm(ours - theirs(batch, real, 1.01 * effective)) > 10 * tolerance
