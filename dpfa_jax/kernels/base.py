"""What every attention backend takes and gives: numbers, never privacy objects.

Letters as in jax.nn: B batch, T query rows, S keys, N query heads, K key heads, H head size.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class Plain:
    """Ordinary attention: softmax(scale q.k + bias) v."""


@dataclasses.dataclass(frozen=True)
class ExampleReadout:
    """Attention output, clipped, noised and snapped.

    Attributes:
      l2_clip_norm: norm of each output row of each head (`clip="row"`) or of the example's whole
        output (`clip="example"`).
      noise_stddevs: standard deviation of the noise, one for each query head.
      grids: power-of-two grid of the released values, one for each query head.
      clip: "row" or "example".
    """

    l2_clip_norm: float
    noise_stddevs: tuple[float, ...]
    grids: tuple[float, ...]
    clip: str = "row"


@dataclasses.dataclass(frozen=True)
class MemoryReadout:
    """Attention over private keys and values with a public maximum.

    `form="sum"`: e = round(exp(min(s, logit_bound) - logit_bound)) in the storage type of value;
    (N, Z) = sum_j e_j (v_j, weight_scale) + noise, snapped;
    output N / max(Z / weight_scale, floor).
    `form="ratio"`: s clamped to [-logit_bound, logit_bound]; output N / Z + noise, snapped.
    Value rows are clipped to `value_clip_norm` as stored.
    """

    form: str
    logit_bound: float
    value_clip_norm: float
    weight_scale: float
    floor: float
    noise_stddevs: tuple[float, ...]
    grids: tuple[float, ...]


Readout = Plain | ExampleReadout | MemoryReadout


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of one attention call; hashable, so that it can key a compiled kernel.

    Attributes:
      scale: factor on q.k.
      is_causal: query row t sees keys s <= t (no shift where T != S), as in jax.nn.
      local_window: (left, right): row t sees keys t - left <= s <= t + right; None: all.
      logits_soft_cap: c: logits become c tanh(logits / c) before bias and mask; None: none.
      largest_logit: what |scale q.k| is said not to exceed. It defines nothing: a kernel may do
        without a running maximum where it is small enough. None: nothing is said.
      deterministic: gradients have the same bits on each run; a kernel may not add in whatever
        order its programs come.
      readout: what becomes of the normalised output.
    """

    scale: float
    is_causal: bool = False
    local_window: tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    largest_logit: float | None = None
    deterministic: bool = True
    readout: Readout = Plain()


class NoiseInputs(NamedTuple):
    """Where the noise of one call comes from; a row of each array serves one batch row.

    Attributes:
      key_words: threefry key of the release, already bound to its id and layer.
      batch_index: global index of each batch row.
      head_start: global index of the first query head.
    """

    key_words: UInt32[Array, "B 2"]
    batch_index: UInt32[Array, " B"]
    head_start: UInt32[Array, " B"]


class AttentionInputs(NamedTuple):
    """The traced part of one attention call. Absent parts are None.

    `bias` and `mask` broadcast to (B, N, T, S); each of their axes is full or 1.
    """

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    bias: Float[Array, "b n t s"] | None = None
    mask: Bool[Array, "b n t s"] | None = None
    query_lengths: Int[Array, " B"] | None = None
    key_lengths: Int[Array, " B"] | None = None
    noise: NoiseInputs | None = None


class SoftmaxRows(NamedTuple):
    """What turns a logit back into its softmax weight: exp(logit - maximum) / total.

    Both are finite, also for a row that sees no key. exp(logit - lse) would round as coarsely as
    the log-sum-exp itself, and all weights of a row alike.
    """

    maximum: Float[Array, "B T N"]
    total: Float[Array, "B T N"]


class AttentionOutputs(NamedTuple):
    """What a forward pass keeps.

    Attributes:
      output: the answer, in the query's dtype, private where the readout is.
      unclipped: the normalised output before clip and noise (inside custom_vjp only, never
        returned to a caller). None under `MemoryReadout`, and under `Plain` where `output` serves
        the backward pass as well.
      lse: log-sum-exp of each row's logits in float32, natural logarithm; -inf for a row that sees
        no key. None under `MemoryReadout`.
      weights: the softmax weights, where a backend found the matrix small enough to keep; as
        `unclipped`, never returned to a caller. Their layout is the backend's own.
      rows: maximum and sum of each row, where a backend recomputes weights from them; as
        `unclipped`, never returned to a caller.
    """

    output: Float[Array, "B T N H"]
    unclipped: Float[Array, "B T N H"] | None
    lse: Float[Array, "B T N"] | None
    weights: Float[Array, "..."] | None = None
    rows: SoftmaxRows | None = None


class AttentionGradients(NamedTuple):
    """Gradients in the dtypes of their primals; `bias` is None where the call had none."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    bias: Float[Array, "b n t s"] | None


class Backend(Protocol):
    """One way to compute attention. Forward and backward are pure and jit."""

    name: str

    def cannot(self, spec: AttentionSpec, inputs: AttentionInputs, platform: str) -> str | None:
        """None if this backend serves the call on `platform`, else the reason in one sentence.

        Reads shapes and dtypes of `inputs` only. `platform` is "cpu", "gpu" (any), "tpu".
        """
        ...

    def forward(
        self, spec: AttentionSpec, inputs: AttentionInputs, *, residuals: bool = True
    ) -> AttentionOutputs:
        """The readout and its residuals; only `output` and `lse` are due without `residuals`.

        A kernel then writes nothing else. XLA drops what nobody reads by itself.
        """
        ...

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
    ) -> AttentionGradients:
        """Gradients of plain attention. `cotangent` has already passed the clip's derivative."""
        ...


def group_size(inputs: AttentionInputs) -> int:
    """Query heads that share one key head (GQA)."""
    return inputs.query.shape[2] // inputs.key.shape[2]


def static_platform(array: jax.Array) -> str:
    """Platform on which a call with `array` runs: where it is committed, else the default device's.

    A trace does not say where its program will run, nor whether an array lies behind it: there it
    is `jax.default_device`, and the first platform of JAX where that is not set.
    """
    if not isinstance(array, jax.core.Tracer) and array.committed:
        return next(iter(array.devices())).platform
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    if isinstance(device, str):  # a platform, by any of its names
        device = jax.local_devices(backend=device)[0]
    return device.platform
