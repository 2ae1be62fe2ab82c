"""V6: bytes of keys that no row sees, on the backends that XLA compiles."""

import jax.numpy as jnp
import pytest
from helpers import hidden_bytes

from dpfa_jax.kernels.blocked import BACKEND as BLOCKED
from dpfa_jax.kernels.reference import BACKEND as REFERENCE

pytestmark = pytest.mark.quickly_compiled


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", hidden_bytes.CASES)
@pytest.mark.parametrize("backend", [BLOCKED, REFERENCE], ids=lambda backend: backend.name)
def test_hidden_keys_hold_any_bytes(backend, name, has_bias):
    hidden_bytes.check(backend, name, jnp.nan, has_bias=has_bias)
