"""`flax.nnx.MultiHeadAttention` on this library's attention, plain or released with noise."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key, Num

from dpfa_jax import attention
from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.nn.attention_fn import attention_fn as plain_attention
from dpfa_jax.release import ExampleRelease, RecordRelease


class MultiHeadAttention(nnx.MultiHeadAttention):
    """Drop-in for `flax.nnx.MultiHeadAttention`: its arguments and parameters, and three more.

    Without `release` it computes what its base class computes, with this library's attention. GQA
    is `num_kv_heads`. With `release`, each call releases the attention's output under it: clipped
    and noised before the output projection, which is post-processing.

    The layer holds no noise key and no counter, because a held one repeats as soon as a functional
    caller drops the updated state. Each call takes `noise_key` (from `charge`, which pays first);
    the layer's own noise stream is that key at its `layer` number, so one key serves a whole stack
    whose numbers differ, and no two layers draw the same noise. Every layer is a release of its
    own: charge one for each (`record(ledger, release, layers)`), not one for the stack.

    Args beyond the base class:
      release: `ExampleRelease` or `RecordRelease`, or None for plain attention.
      layer: this layer's public number in its stack; required with `release`.
      is_causal: default of the call's `is_causal`.

    Errors: ArgumentError for a release without `layer`, with dropout, with decoding caches, with a
    custom `attention_fn`, or of another number of heads or head size.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        release: ExampleRelease | RecordRelease | None = None,
        layer: int | None = None,
        is_causal: bool = False,
        attention_fn: Callable[..., Array] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads,
            in_features,
            qkv_features,
            out_features,
            num_kv_heads,
            in_kv_features,
            attention_fn=plain_attention if attention_fn is None else attention_fn,
            rngs=rngs,
            **options,
        )
        self.release = release
        self.layer = layer
        self.is_causal = is_causal
        if release is not None:
            self._check_release(custom=attention_fn is not None)

    def __call__(
        self,
        inputs_q: Float[Array, "*batch T E"],
        inputs_k: Float[Array, "*batch S F"] | None = None,
        inputs_v: Float[Array, "*batch S F"] | None = None,
        *,
        mask: Num[Array, "*#batch #N #T #S"] | None = None,
        is_causal: bool | None = None,
        noise_key: Key[Array, ""] | None = None,
        release_id: int = 0,
        **options: Any,
    ) -> Float[Array, "*batch T O"]:
        """Attention of `inputs_q` over `inputs_k` and `inputs_v`; arguments as the base class.

        Args beyond the base class:
          noise_key: fresh key of this release; required with `release`, refused without.
          release_id: number of this release under the key.

        Errors: ArgumentError for a missing or superfluous key or an option that a release refuses;
        those of `dp_attention`.
        """
        causal = self.is_causal if is_causal is None else is_causal
        if self.release is None:
            if noise_key is not None:
                raise ArgumentError(
                    "noise_key",
                    "a key",
                    "this layer has no release and would add no noise",
                    "Build the layer with release=..., or leave noise_key out.",
                )
            return super().__call__(
                inputs_q, inputs_k, inputs_v, mask=mask, is_causal=causal, **options
            )
        if noise_key is None:
            raise ArgumentError(
                "noise_key",
                None,
                "a release needs a fresh noise key at every call",
                "Pass the key that charge(ledger, release) gave.",
            )
        decode = options.pop("decode", None)
        if decode or (decode is None and self.decode):
            raise _refused("decode", True, "a cache would keep private keys and values")
        options.pop("deterministic", None)  # without dropout it changes nothing
        for name, value in options.items():
            if value is not None and value is not False:
                raise _refused(name, value, "not offered under a release")
        return self._released(inputs_q, inputs_k, inputs_v, mask, causal, noise_key, release_id)

    def _released(
        self,
        inputs_q: Array,
        inputs_k: Array | None,
        inputs_v: Array | None,
        mask: Array | None,
        is_causal: bool,
        noise_key: Array,
        release_id: int,
    ) -> Array:
        if inputs_k is None and inputs_v is not None:
            raise ArgumentError(
                "inputs_k", None, "missing where inputs_v is given", "Pass inputs_k as well."
            )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        if inputs_q.ndim != 3:
            raise ArgumentError(
                "inputs_q",
                f"array of {inputs_q.ndim} axes",
                "a release counts examples on one batch axis",
                "Reshape to (batch, length, features).",
            )
        assert self.release is not None and self.layer is not None
        query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        output = attention.dp_attention(
            query,
            key,
            value,
            mask=mask if mask is None else mask != 0,
            release=self.release,
            noise_key=noise_key,
            release_id=release_id,
            layer=self.layer,
            is_causal=is_causal,
        )
        return self.out(output)

    def _check_release(self, *, custom: bool) -> None:
        if self.layer is None:
            raise ArgumentError(
                "layer",
                None,
                "a layer with a release needs its number: equal numbers draw equal noise",
                "Pass layer=0, 1, ... down the stack.",
            )
        checks.count("layer", self.layer, minimum=0)
        if custom:
            raise _refused("attention_fn", self.attention_fn, "it would bypass the release")
        if self.dropout_rate > 0.0:
            raise _refused("dropout_rate", self.dropout_rate, "dropout is not offered")
        for name, size in (("num_heads", self.num_heads), ("head_dim", self.head_dim)):
            expected = getattr(self.release, name)
            if size != expected:
                raise ArgumentError(
                    name, size, f"the release is for {expected}", "Make the two agree."
                )


def _refused(name: str, value: object, why: str) -> ArgumentError:
    return ArgumentError(name, value, why, "Leave it out where a release is set.")
