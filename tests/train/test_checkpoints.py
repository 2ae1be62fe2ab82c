"""What a checkpoint brings back, for every kind of plan."""

import jax
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import loss_fn, params_of, plan_of

from dpfa_jax import dpsgd
from dpfa_jax.release import AdaptiveClipping
from dpfa_jax.train.checkpoints import CheckpointNote, Checkpoints
from dpfa_jax.train.loop import LoopState


@pytest.mark.parametrize(
    "changes",
    [{}, {"adaptive_clipping": AdaptiveClipping()}, {"noise_strategy": (0.8, 0.6)}],
    ids=["fixed", "adaptive", "correlated"],
)
def test_every_field_of_the_private_state_comes_back(tmp_path, changes):
    """Clip norms that have moved, and noise that is still to be taken back, bit for bit."""
    dp = dpsgd.make_dp_step(loss_fn, optax.adam(0.1), plan_of(**changes))
    first = dp.init(params_of())
    later = jax.tree.map(lambda x: np.asarray(x) + np.asarray(7, x.dtype), first)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(LoopState(later, later.params), CheckpointNote(7, "head", 1.0, []))
    checkpoints.wait()
    restored, note = checkpoints.latest(LoopState(first, first.params))
    checkpoints.close()
    assert note.step == 7 and int(restored.private.step) == 7
    assert jax.tree.structure(restored.private) == jax.tree.structure(first)
    for found, expected in zip(
        jax.tree.leaves(restored.private), jax.tree.leaves(later), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
