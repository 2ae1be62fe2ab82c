"""V16 for attention: each broken build is caught by a named check, which the real build passes.

The checks are in `helpers.attention_cases`. A mutant replaces one function of the library.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from helpers import attention_cases as cases

from dpfa_jax.attention import charging, core, private
from dpfa_jax.kernels import compensated, epilogue, masks, memory_loop
from dpfa_jax.kernels.blocked import Blocked
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import sensitivity

pytestmark = pytest.mark.quickly_compiled

CHECKS = [value for name, value in vars(cases).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_build_passes(check):
    check()


def no_clip(original):
    return lambda x, norm: original(x, 1e6)


def looser_clip(original):
    return lambda x, norm: original(x, 1.1 * norm)


def nan_passes(original):
    return lambda x, norm: jnp.where(jnp.isfinite(x), original(x, norm), x)


def infinite_rows_dropped(original):
    """A zero that costs no noise: the row says that it was not finite."""
    return lambda x, norm: jnp.where(jnp.isfinite(x), original(x, norm), norm)


def clip_after_noise(original):
    def build(readout, normalised, noise):
        drawn = epilogue._scaled_noise(readout, normalised, noise)
        return epilogue.clipped(readout, normalised + drawn)

    return build


def noise_scale_from_the_values(original):
    def build(readout, normalised, noise):
        size = jnp.linalg.norm(normalised, axis=-1).max() / readout.l2_clip_norm
        clean = epilogue.clipped(readout, normalised)
        return clean + jnp.minimum(1.0, size) * (original(readout, normalised, noise) - clean)

    return build


def noise_scale_from_the_live_keys(original):
    def build(self, spec, inputs, **options):
        share = 1.0 if inputs.mask is None else jnp.mean(inputs.mask)
        stddevs = tuple(share * s for s in spec.readout.noise_stddevs)
        readout = dataclasses.replace(spec.readout, noise_stddevs=stddevs)
        return original(self, dataclasses.replace(spec, readout=readout), inputs, **options)

    return build


def quieter_noise(original):
    return lambda *args: 0.8 * original(*args)


def noise_on_one_head(original):
    return lambda *args: original(*args).at[:, :, 1:].set(0.0)


def one_draw_for_all_rows(original):
    return lambda *a, **k: jnp.broadcast_to((z := original(*a, **k))[:, :1], z.shape)


def one_draw_for_all_heads(original):
    return lambda *a, **k: jnp.broadcast_to((z := original(*a, **k))[:, :, :1], z.shape)


def cosine_twice(original):
    return lambda *a, **k: jnp.repeat(original(*a, **k)[..., ::2], 2, axis=-1)


def one_draw_for_all_examples(original):
    def build(*args):
        noise = original(*args)
        return noise._replace(batch_index=jnp.zeros_like(noise.batch_index))

    return build


def layers_share_noise(original):
    return lambda words, release_id, layer: original(words, release_id, 0)


def releases_share_noise(original):
    return lambda words, release_id, layer: original(words, 0, layer)


def key_may_serve_again(original):
    return lambda noise_key, *witnesses, **options: noise_key


def unsnapped(original):
    return lambda x, grid: x


def unsnapped_memory(original):
    return lambda x, grid: x.high + x.low


def log_sum_exp_returned(original):
    return lambda *a, **k: (original(*a, **k), jnp.zeros(a[0].shape[:-1]))


def examples_meet(original):
    return lambda readout, x: original(readout, x - x.mean(axis=0))


def hidden_keys_are_seen(original):
    return lambda spec, inputs, mask_tile, rows, columns: None


def values_unclipped(original):
    return lambda x, norm: x


def logits_unclamped(original):
    def build(readout, logits, bias, seen, dtype):
        wide = dataclasses.replace(readout, logit_bound=80.0)
        return original(wide, logits, bias, seen, dtype) * jnp.exp(80.0 - readout.logit_bound)

    return build


def running_maximum(original):
    def build(readout, logits, bias, seen, dtype):
        logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
        return jnp.exp(logits - logits.max(-1, keepdims=True))

    return build


def rounded_again_in_the_numerator(original):
    def build(weights, values):
        total = original(weights, values)
        coarse = original(weights.astype(jnp.bfloat16).astype(jnp.float32), values)
        return total.at[..., :-1].set(coarse[..., :-1])

    return build


def missing_sqrt_of_rows(original):
    return lambda norm, rows: original(norm, 1)


def one_norm_for_two(original):
    return lambda norm, rows: original(norm, rows) / 2


def missing_sqrt_of_heads(original):
    return lambda sigma, sensitivities, shares: tuple(sigma * d for d in sensitivities)


def derivative_of_a_memory(original):
    return lambda backend, spec, inputs: backend.forward(spec, inputs).output


def uncharged(original):
    return lambda ledger, release, count: ledger


def one_key_for_all(original):
    return lambda shape: insecure_test_key(0, shape)


def _mutants():
    clipping = cases.check_rows_are_clipped
    non_finite = cases.check_non_finite_rows_count_as_zero
    size, data = (
        cases.check_noise_has_the_promised_size,
        cases.check_noise_does_not_depend_on_the_data,
    )
    apart, grid = cases.check_noise_differs_everywhere, cases.check_released_values_lie_on_the_grid
    bound = cases.check_replacing_an_example_moves_it_by_the_sensitivity
    charged = cases.check_charge_comes_before_the_key
    yield clipping, epilogue, "clip_rows", no_clip
    yield clipping, epilogue, "clip_rows", looser_clip
    yield non_finite, epilogue, "clip_rows", nan_passes
    yield non_finite, epilogue, "clip_rows", infinite_rows_dropped
    yield size, epilogue, "example", clip_after_noise
    yield size, epilogue, "_scaled_noise", quieter_noise
    yield size, epilogue, "_scaled_noise", noise_on_one_head
    yield data, epilogue, "example", noise_scale_from_the_values
    yield data, Blocked, "forward", noise_scale_from_the_live_keys
    yield apart, epilogue, "attention_noise", one_draw_for_all_rows
    yield apart, epilogue, "attention_noise", one_draw_for_all_heads
    yield apart, epilogue, "attention_noise", cosine_twice
    yield apart, private, "_noise_inputs", one_draw_for_all_examples
    yield apart, private, "bind", layers_share_noise
    yield apart, private, "bind", releases_share_noise
    yield cases.check_a_second_use_is_refused, private, "guard", key_may_serve_again
    yield grid, epilogue, "snap_once", unsnapped
    yield grid, compensated, "snap_once", unsnapped_memory
    yield cases.check_one_array_is_returned, cases, "dp_attention", log_sum_exp_returned
    yield cases.check_examples_are_apart, epilogue, "clipped", examples_meet
    yield cases.check_hidden_keys_hold_any_bytes, masks, "visible", hidden_keys_are_seen
    yield cases.check_values_are_clipped, memory_loop, "clip_rows_stored", values_unclipped
    yield cases.check_each_key_weighs_at_most_one, memory_loop, "weights", logits_unclamped
    yield cases.check_a_record_moves_the_sums_by_its_bound, memory_loop, "weights", running_maximum
    yield (
        cases.check_numerator_and_normaliser_share_their_weights,
        memory_loop,
        "block_sums",
        rounded_again_in_the_numerator,
    )
    yield bound, sensitivity, "example_rows", missing_sqrt_of_rows
    yield bound, sensitivity, "example_rows", one_norm_for_two
    yield bound, sensitivity, "stddevs_for", missing_sqrt_of_heads
    yield (
        cases.check_memory_refuses_autodiff,
        core,
        "_underivable_memory",
        derivative_of_a_memory,
    )
    yield charged, charging, "record", uncharged
    yield charged, charging, "new_noise_key", one_key_for_all


@pytest.mark.parametrize(
    ("check", "where", "attribute", "build"),
    [pytest.param(*mutant, id=mutant[-1].__name__) for mutant in _mutants()],
)
def test_the_mutant_is_caught(check, where, attribute, build, monkeypatch):
    monkeypatch.setattr(where, attribute, build(getattr(where, attribute)))
    with pytest.raises(AssertionError):
        check()
