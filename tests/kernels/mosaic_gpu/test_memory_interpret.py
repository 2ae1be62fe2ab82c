"""The memory kernel in the Mosaic GPU simulator, on a CPU: values, not layouts or instructions."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import memory_kernel

from dpfa_jax.kernels.base import AttentionInputs
from dpfa_jax.kernels.mosaic_gpu import memory_call
from dpfa_jax.noise.fields import attention_noise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=memory_kernel.CASES)
def run(request, tmp_path_factory):
    """A case and what it saved; the simulator fails where a barrier is not awaited as it should."""
    path = tmp_path_factory.mktemp("memory") / "kernel.npz"
    environment = {
        **os.environ,
        "NPROC": "64",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = [sys.executable, str(Path(memory_kernel.__file__)), request.param, str(path)]
    subprocess.run(program, env=environment, check=True, timeout=600)
    with np.load(path) as saved:
        return memory_kernel.CASES[request.param], dict(saved)


def numbers(case):
    return memory_call._numbers(memory_kernel.READOUT, memory_kernel.inputs(case))


def sums(case, saved, prefix=""):
    normalisers = saved[prefix + "normalisers"].swapaxes(1, 2)[..., None]
    both = np.concatenate([saved[prefix + "numerators"], normalisers], axis=-1)
    return both.astype(np.float64) * numbers(case).unit


def exact(case, inputs: AttentionInputs):
    """(N, Z) in float64 of weights rounded once."""
    spec, readout = case.spec, memory_kernel.READOUT
    arrays = memory_call._arrays(readout, numbers(case), inputs)
    query, key, value = (
        np.asarray(x.astype(jnp.float32), np.float64)[0]
        for x in (inputs.query, inputs.key, arrays.value)
    )
    s = spec.scale * np.einsum("tnh,sh->tns", query, key[:, 0])
    if spec.logits_soft_cap is not None:
        s = spec.logits_soft_cap * np.tanh(s / spec.logits_soft_cap)
    e = jnp.asarray(np.exp(np.minimum(s, readout.logit_bound) - readout.logit_bound), jnp.bfloat16)
    row, column = np.arange(case.rows)[:, None], np.arange(case.keys)
    seen = np.ones((case.rows, case.keys), bool)
    if spec.is_causal:
        seen &= row >= column
    if spec.local_window is not None:
        left, right = spec.local_window
        seen &= (column >= row - left) & (column <= row + right)
    if case.lengths is not None:
        seen &= row < case.lengths[0]
    e = np.asarray(e.astype(jnp.float32), np.float64) * seen[:, None]
    kappa = np.asarray(arrays.normaliser.astype(jnp.float32), np.float64)[0]
    n = np.einsum("tns,sh->tnh", e, value[:, 0])
    return np.concatenate([n, (e * kappa).sum(-1)[..., None]], axis=-1)[None]


def test_sums_are_those_of_float64(run):
    """V7, V8: ragged sizes, GQA, causal, window, cap, slot mask, lengths; the same weights."""
    case, saved = run
    found, expected = sums(case, saved), exact(case, memory_kernel.inputs(case))
    # Next to a tie a weight may be rounded the other way, by 2^-8 of itself.
    assert np.abs(found - expected).max() <= 2.0**-8
    assert np.linalg.norm(found - expected) <= 3e-4 * np.linalg.norm(expected)
    if case.lengths is not None:
        assert not np.any(found[:, case.lengths[0] :])


def test_parts_of_the_columns_have_the_same_weights(run):
    """V3: equal columns have equal sums, unit for unit, whichever tile makes them."""
    case, saved = run
    if case.size <= memory_kernel.COLUMNS:
        pytest.skip("one part")
    numerators = saved["numerators"]
    more = case.size - memory_kernel.COLUMNS
    assert np.array_equal(
        numerators[..., memory_kernel.COLUMNS :], numerators[..., :more][..., ::-1]
    )


def test_hidden_slots_hold_any_bytes(run):
    """V6: NaN in every hidden slot changes no bit of sums and answer."""
    _, saved = run
    for name in ("output", "numerators", "normalisers"):
        assert np.array_equal(saved[name], saved["nan_" + name])


def test_noise_is_the_field(run):
    """V10, V12: snapped sums with XLA's noise, the normaliser's in the column after the last."""
    case, saved = run
    readout, noise = memory_kernel.READOUT, memory_kernel.inputs(case).noise
    drawn = attention_noise(*noise, heads=2, row_start=0, rows=case.rows, columns=case.size + 1)
    grids = np.asarray(readout.grids)[:, None]
    scaled = np.asarray(drawn, np.float64) * np.asarray(readout.noise_stddevs)[:, None]
    steps = (sums(case, saved) + scaled) / grids
    snapped = np.round(steps) * grids
    divisor = np.maximum(snapped[..., -1:] / numbers(case).weight_scale, readout.floor)
    expected = snapped[..., :-1] / divisor
    is_tie = np.abs(np.abs(steps - np.round(steps)) - 0.5) < 1e-4
    is_tie = is_tie[..., :-1] | is_tie[..., -1:]
    assert is_tie.mean() < 0.01
    error = np.abs(saved["output"] - expected)
    assert np.all(error[~is_tie] <= np.abs(expected[~is_tie]) * 2.0**-8)
    # Negative control: the words of another column are seen.
    assert np.abs(drawn[..., -2] - drawn[..., -1]).max() > 1.0
