"""Noise: keys from OS entropy, counters, standard normals, the public grid, refused reuse."""

from dpfa_jax.noise.counters import (
    attention_counter,
    bind,
    check_attention_ranges,
    is_word,
    parameter_counter,
    word,
)
from dpfa_jax.noise.fields import attention_noise, parameter_noise
from dpfa_jax.noise.grid import snap
from dpfa_jax.noise.hazards import guard, mesh_axes, require_offsets_under_manual_mesh
from dpfa_jax.noise.keys import (
    generator_of,
    insecure_test_key,
    key_words,
    new_noise_key,
    require_key,
)
from dpfa_jax.noise.normals import normal_pair
from dpfa_jax.noise.reuse import check_no_reuse
from dpfa_jax.noise.threefry import threefry2x32

__all__ = [
    "attention_counter",
    "attention_noise",
    "bind",
    "check_attention_ranges",
    "check_no_reuse",
    "generator_of",
    "guard",
    "insecure_test_key",
    "is_word",
    "key_words",
    "mesh_axes",
    "new_noise_key",
    "normal_pair",
    "parameter_counter",
    "parameter_noise",
    "require_key",
    "require_offsets_under_manual_mesh",
    "snap",
    "threefry2x32",
    "word",
]
