"""V23: bad inputs, each a typed error that names the parameter and says what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.attention import charge, dot_product_attention, dp_attention
from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.noise import insecure_test_key, new_noise_key
from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease

X = jnp.ones((2, 3, 4, 8))
EXAMPLE = ExampleRelease(1.0, 1.0, 3, 4, 8, insecure_test_noise=True)
SUM = RecordRelease(1.0, 1.0, 1.0, 3, 4, 8, insecure_test_noise=True)
RATIO = dataclasses.replace(SUM, form="ratio", relation="substitute", memory_length=3)
KEY = insecure_test_key(0)
HALF = (X.astype(jnp.float16),) * 3


def plain(parameter, query=X, key=X, value=X, **options):
    return parameter, lambda: dot_product_attention(query, key, value, **options)


def private(parameter, query=X, key=X, value=X, release=EXAMPLE, noise_key=KEY, **options):
    return parameter, lambda: dp_attention(
        query, key, value, release=release, noise_key=noise_key, **options
    )


BAD = {
    "rank 2": plain("query", query=X[0, 0]),
    "integer query": plain("query", query=X.astype(int)),
    "key dtype": plain("key", key=X.astype(jnp.bfloat16)),
    "value dtype": plain("value", value=X.astype(jnp.float16)),
    "batch": plain("key", key=X[:1], value=X[:1]),
    "head size": plain("key", key=X[..., :4], value=X[..., :4]),
    "value shape": plain("value", value=X[:, :2]),
    "heads not divisible": plain("key", key=X[:, :, :3], value=X[:, :, :3]),
    "missing value": plain("value", value=None),
    "mask of floats": plain("mask", mask=jnp.ones((1, 1, 3, 3))),
    "mask shape": plain("mask", mask=jnp.ones((2, 3, 3, 3), bool)),
    "mask rank": plain("mask", mask=jnp.ones((1, 1, 1, 3, 3), bool)),
    "boolean bias": plain("bias", bias=jnp.ones((3, 3), bool)),
    "bias shape": plain("bias", bias=jnp.ones((2, 3))),
    "float lengths": plain("query_seq_lengths", query_seq_lengths=jnp.ones(2)),
    "lengths shape": plain("key_value_seq_lengths", key_value_seq_lengths=jnp.ones(3, int)),
    "window of floats": plain("local_window_size", local_window_size=1.5),
    "window of three": plain("local_window_size", local_window_size=(1, 2, 3)),
    "causal int": plain("is_causal", is_causal=1),
    "NaN scale": plain("scale", scale=float("nan")),
    "cap 0": plain("logits_soft_cap", logits_soft_cap=0.0),
    "deterministic 1": plain("deterministic", deterministic=1),
    "bound 0": plain("logits_bound", logits_bound=0.0),
    "traced bound": plain("logits_bound", logits_bound=jnp.ones(())),
    "bound of a record": private("logits_bound", release=SUM, logits_bound=1.0),
    "query and key norm": (
        "query_key_clip_norm",
        lambda: dataclasses.replace(EXAMPLE, query_key_clip_norm=-1.0),
    ),
    "unknown backend": plain("implementation", implementation="flash"),
    "cudnn": plain("implementation", implementation="cudnn"),
    "no release": private("release", release=None),
    "training release": private("release", release=TrainingRelease(1.0, 1.0, 100, 10, 5)),
    "key None": private("noise_key", noise_key=None),
    "seed for a key": private("noise_key", noise_key=0),
    "jax key": private("noise_key", noise_key=jax.random.key(0)),
    "raw words": private("noise_key", noise_key=jax.random.key_data(KEY)),
    "secret key, test release": private("noise_key", noise_key=new_noise_key()),
    "two keys": private("noise_key", noise_key=insecure_test_key(0, (2,))),
    "head size of the release": private("query", *(X[..., :4],) * 3),
    "query heads of the release": private("query", *(X[:, :, :2],) * 3),
    "rows of the release": private("query", query=X[:, :2]),
    "rows of a memory": private("query", query=X[:, :2], release=SUM),
    "traced scale": private("scale", scale=None),
    "memory length": private("key", key=X[:, :2], value=X[:, :2], release=RATIO),
    "mask in ratio": private("mask", mask=jnp.ones((3, 3), bool), release=RATIO),
    "lengths in ratio": private(
        "key_value_seq_lengths", key_value_seq_lengths=jnp.ones(2, int), release=RATIO
    ),
    "causal in ratio": private("is_causal", is_causal=True, release=RATIO),
    "window in ratio": private("local_window_size", local_window_size=3, release=RATIO),
    "bound beyond the dtype": private(
        "release.logit_bound",
        *(X.astype(jnp.float16),) * 3,
        release=dataclasses.replace(RATIO, logit_bound=6.0),
    ),
    "string for an array": plain("query", query="abc"),
    "object for an array": plain("value", value=object()),
    "ragged mask": plain("mask", mask=[[True], [True, False]]),
    "string for a bias": plain("bias", bias="abc"),
    "string for lengths": plain("query_seq_lengths", query_seq_lengths="abc"),
    "no query heads": plain("query", X[:, :, :0], X[:, :, :1], X[:, :, :1]),
    "complex bias": plain("bias", bias=jnp.ones((3, 3), complex)),
    "two scales": plain("scale", scale=jnp.ones(2)),
    "complex scale": plain("scale", scale=jnp.asarray(1j)),
    "boolean scale": plain("scale", scale=jnp.asarray(True)),
    "residual 1": plain("return_residual", return_residual=1),
    "release_id negative": private("release_id", release_id=-1),
    "layer of 33 bits": private("layer", layer=2**32),
    "layer of 33 bits, numpy": private("layer", layer=np.int64(2**32)),
    "layer negative, an array": private("layer", layer=jnp.int32(-1)),
    "release_id bool": private("release_id", release_id=True),
    "layers": private("layer", layer=jnp.arange(2)),
    "noise beyond float16": private(
        "query", *HALF, release=dataclasses.replace(EXAMPLE, l2_clip_norm=2e3)
    ),
    "noise of a memory beyond float16": private(
        "query", *HALF, release=dataclasses.replace(SUM, floor=1e-4)
    ),
    "batch_start object": private("batch_start", batch_start=object()),
    "batch_start float": private("batch_start", batch_start=1.0),
    "batch_start negative": private("batch_start", batch_start=-1),
    "batch_start too large": private("batches", batch_start=2**20),
    "heads past the end": private("head_start", head_start=4),
    "heads of a memory past the end": private("head_start", release=SUM, head_start=1),
    "a part of the heads past the end": private("head_start", *(X[:, :, :2],) * 3, head_start=3),
    "joint clip of a part of the heads": private(
        "release.clip",
        *(X[:, :, :2],) * 3,
        release=dataclasses.replace(EXAMPLE, clip="example"),
        head_start=2,
    ),
    "unequal heads in part": private(
        "release.noise_shares",
        *(X[:, :, :2],) * 3,
        release=dataclasses.replace(EXAMPLE, noise_shares=(1.0, 1.0, 2.0, 2.0)),
        head_start=2,
    ),
    "charge of test noise": ("release", lambda: charge(None, EXAMPLE)),
    "charge of no ledger": (
        "ledger",
        lambda: charge({}, dataclasses.replace(EXAMPLE, insecure_test_noise=False)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    """Each error names the parameter, shows a value and advises."""
    parameter, call = BAD[name]
    if name == "traced scale":
        call = lambda: jax.jit(lambda s: private("", scale=s)[1]())(1.0)  # noqa: E731
    with pytest.raises(ArgumentError) as caught:
        call()
    error = caught.value
    assert error.parameter == parameter
    assert str(error).startswith(f"{parameter} = ")
    assert error.advice and str(error).endswith(error.advice)


@pytest.mark.parametrize("scale", [1j, True, np.ones(2, np.float32)])
def test_a_traced_scale_is_one_real_number(scale):
    with pytest.raises(ArgumentError) as caught:
        jax.jit(lambda s: dot_product_attention(X, X, X, scale=s))(scale)
    assert caught.value.parameter == "scale"


def test_float64_is_refused_in_private():
    """Noise is float32; a float64 answer would carry the data in its low bits."""
    with jax.enable_x64(True):
        wide = jnp.ones((2, 3, 4, 8), jnp.float64)
        with pytest.raises(ArgumentError, match="float64"):
            dp_attention(wide, wide, wide, release=EXAMPLE, noise_key=KEY)
        assert dot_product_attention(wide, wide, wide).dtype == jnp.float64


def test_a_forced_backend_says_why_it_cannot():
    """`implementation=` raises that backend's reason."""
    with pytest.raises(UnsupportedBackendError, match="mosaic_gpu"):
        dot_product_attention(X, X, X, implementation="mosaic_gpu")
