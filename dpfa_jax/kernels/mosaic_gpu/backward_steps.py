"""What the backward kernels share: operands, one step's arithmetic, the ring of tiles, launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, LOG2_E, visible
from dpfa_jax.kernels.mosaic_gpu.pairs import PairArrays, PairReader
from dpfa_jax.kernels.mosaic_gpu.steps import StepRange
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS


class BackwardArrays(NamedTuple):
    """Operands: query, cotangent (B, T, N, H); key, value (B, S, K, H), padded by `pad_sequence`.

    `lse2`: (B, N, rows) float32, log-sum-exp in base 2, +inf where a row sees no key or is padding.
    `delta`: (B, N, rows) float32, row sums of output times cotangent less the cotangent of lse.
    `dq_sum`: mutable float32 like query, zeros, to which the fused kernel adds. Beside it
    `dk_sum`, `dv_sum`: mutable gradients that several launches of the wide kernels fill.
    `mask`, `bias`: as `pairs.arranged` for each kernel.
    `chunk`: (3,) int32, first batch row, key head and key block of a launch; None: all zero.
    `logit_gradients`: (b, n, s, rows) of the launch's share, keys first.
    `schedule`: of `walk.Tiling`.
    """

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse2: Any
    delta: Any
    key_lengths: Any = None
    dq_sum: Any = None
    mask: Any = None
    bias: Any = None
    dk_sum: Any = None
    dv_sum: Any = None
    chunk: Any = None
    logit_gradients: Any = None
    schedule: Any = None


def key_length_of(arrays: BackwardArrays, batch: Any, keys: int) -> Any:
    """Keys of one batch row that exist."""
    if arrays.key_lengths is None:
        return keys
    return jnp.clip(arrays.key_lengths[batch], 0, keys)


def late_zeros(
    cotangent: jax.Array, *like: jax.ShapeDtypeStruct
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The cotangent, and zeros that nothing can fill before it is there.

    Constants would be: those of all layers of a model first, which then hold them all.
    """
    cotangent, zero = lax.optimization_barrier((cotangent, jnp.float32(0.0)))
    return cotangent, tuple(jnp.full(x.shape, zero, x.dtype) for x in like)


def multiply(acc: Any, lhs: jax.Array, rhs: Any, spare: Any) -> None:
    """acc += lhs @ rhs, begun and not awaited; lhs from registers, or from `spare` if simulated."""
    if spare is None:
        plgpu.wgmma(acc, lhs, rhs)
        return
    spare[...] = lhs
    plgpu.commit_smem()
    plgpu.wgmma(acc, spare, rhs)


def weights_of(
    spec: AttentionSpec,
    s: jax.Array,
    lse2: jax.Array,
    axis: int,
    seen: Any,
    shown: Any = None,
    bias: Any = None,
):
    """(p, derivative of the cap or None) from raw products and the rows' log-sum-exp.

    `seen`: by the arguments, `shown`: by a mask array.
    """
    factor, slope = spec.scale, None
    if spec.logits_soft_cap is not None:
        s = jnp.tanh(s * (factor / spec.logits_soft_cap))
        slope = 1.0 - s * s
        factor = spec.logits_soft_cap
    if bias is not None:
        s, factor = s * factor + bias, 1.0
    p = jnp.exp2(s * (factor * LOG2_E) - lax.broadcast_in_dim(lse2, s.shape, [axis]))
    for visible_pairs in (seen, shown):
        p = p if visible_pairs is None else jnp.where(visible_pairs, p, 0.0)
    return p, slope


def read(pairs: PairReader | None, count: Any, warpgroup: Any, fixed: Any) -> tuple[Any, Any]:
    """(what the mask shows, bias) of one step, or Nones."""
    return (None, None) if pairs is None else pairs.read(count, warpgroup, fixed)


def logit_gradient(p, slope, dp, delta, axis):
    """Derivative with respect to the raw products times scale, of weights p and of dp."""
    ds = p * (dp - lax.broadcast_in_dim(delta, dp.shape, [axis]))
    return ds if slope is None else ds * slope


def run_steps(
    steps: StepRange, spec: AttentionSpec, body: Any, *, descending: bool = False
) -> None:
    """Calls body(step, masked) over the range, the mask only where it is due."""

    def loop(begin, end, masked):
        if not (isinstance(begin, int) and isinstance(end, int) and begin == end):
            turned = begin + end - 1
            pl.loop(begin, end)(lambda i: body(turned - i if descending else i, masked))

    parts = [
        (steps.begin, steps.full_begin, True),
        (steps.full_begin, steps.full_end, False),
        (steps.full_end, steps.end, True),
    ]
    for part in reversed(parts) if descending else parts:
        loop(*part)


class Ring:
    """Slots of a ring of tiles that one producer fills and both compute warpgroups free."""

    def __init__(self, barriers: dict[str, Any], stages: int) -> None:
        self._barriers, self._stages = barriers, stages

    def slot(self, count: Any) -> Any:
        """Where the `count`-th tile lies."""
        return lax.rem(jnp.int32(count), jnp.int32(self._stages))

    def await_full(self, name: str, count: Any) -> None:
        """Consumer: the `count`-th tile is there."""
        plgpu.barrier_wait(self._barriers[name].at[self.slot(count)])

    def free(self, name: str, count: Any) -> None:
        """Consumer: has read the `count`-th tile."""
        plgpu.barrier_arrive(self._barriers[name + "_free"].at[self.slot(count)])

    def skip(self, names: tuple[str, ...], count: Any) -> None:
        """Consumer: needs nothing of the `count`-th tiles."""
        for name in names:
            self.await_full(name, count)
            self.free(name, count)

    def await_free(self, name: str, count: Any) -> None:
        """Producer: the slot of the `count`-th tile may be filled."""

        @pl.when(count >= self._stages)
        def _():
            plgpu.barrier_wait(self._barriers[name + "_free"].at[self.slot(count)])

    def drain(self, names: tuple[str, ...], total: Any) -> None:
        """Sees the last arrivals, so that no barrier ends in an unobserved phase."""

        @pl.loop(jnp.maximum(0, total - self._stages), total)
        def _(count):
            for name in names:
                plgpu.barrier_wait(self._barriers[name + "_free"].at[self.slot(count)])


def ring_barriers(names: dict[str, int], stages: int) -> dict[str, Any]:
    """Barriers of a ring: name -> copies that fill one slot."""
    full = {n: plgpu.Barrier(num_arrivals=c, num_barriers=stages) for n, c in names.items()}
    freed = plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages)
    return full | {name + "_free": freed for name in names}


def add_key_gradients(
    spec: AttentionSpec,
    shared: Any,
    ring: Ring,
    done: Any,
    place: Any,
    dk_acc: Any,
    dv_acc: Any,
    step: Any,
    key_begin: Any,
    key_length: Any,
    spare: Any,
    *,
    masked: bool,
    pairs: PairReader | None = None,
    warpgroup: Any = None,
    fixed: Any = None,
    lse2_waits: bool = False,
) -> jax.Array:
    """Consumer: begins dK and dV of one step, and returns its logit gradients, keys by queries.

    The two products are begun in the order dV, dK, and neither is awaited.

    Args:
      spec: the forward's.
      shared: keys and values of a warpgroup at `place`, and of the `done`-th tile in its slot of
        `ring` queries, cotangents, `lse2` and minus `delta`.
      dk_acc, dv_acc: accumulators.
      step: number of the tile of queries.
      key_begin, key_length: first key of this warpgroup; keys that exist.
      spare: as `multiply`.
      masked: whether the arguments of the call may hide a pair of this step.
      pairs, warpgroup, fixed: as `read`.
      lse2_waits: it is loaded after the logits have been awaited, else before: the one kernel is
        3 % faster so, the two are 2 % slower.
    """
    slot = ring.slot(done)
    k_shared, v_shared = shared["key"].at[place], shared["value"].at[place]
    q_shared, do_shared = shared["query"].at[slot], shared["cotangent"].at[slot]
    dtype, keys, queries = q_shared.dtype, shared["key"].shape[1], shared["query"].shape[1]
    shape = (keys, queries)
    ring.await_full("query", done)

    def load_lse2() -> jax.Array:
        return plgpu.load(shared["lse2"].at[slot], layout=COLUMN)

    def weights_and_products(s_acc: Any, dp_acc: Any) -> jax.Array:
        minus_delta = plgpu.load(shared["delta"].at[slot], layout=COLUMN)
        minus_delta = lax.broadcast_in_dim(minus_delta, shape, [1])
        if spare is None:
            # The sums begin there: no register keeps it through the softmax.
            dp_acc[...] = minus_delta
        plgpu.wgmma(s_acc, k_shared, q_shared.T)
        ring.await_full("cotangent", done)
        plgpu.wgmma(dp_acc, v_shared, do_shared.T)
        lse2 = None if lse2_waits else load_lse2()
        seen = None
        if masked:
            seen = visible(
                spec, shape, step * queries, key_begin, key_length, None, transposed=True
            )
        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
        lse2 = load_lse2() if lse2 is None else lse2
        shown, bias = read(pairs, done, warpgroup, fixed)
        p, slope = weights_of(spec, s, lse2, 1, seen, shown, bias)
        if pairs is not None:
            pairs.free(done)
        multiply(dv_acc, p.astype(dtype), do_shared, spare)
        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
        if spare is not None:  # simulated, where no accumulator can be set
            dp += minus_delta
        return p * dp if slope is None else p * dp * slope

    acc = plgpu.ACC(shape, jnp.float32)
    ds = pl.run_scoped(weights_and_products, acc, acc).astype(dtype)
    multiply(dk_acc, ds, q_shared, spare)
    return ds


def load_queries(
    arrays: BackwardArrays,
    shared: Any,
    barriers: Any,
    ring: Ring,
    done: Any,
    batch: Any,
    head: Any,
    block: Any,
    rows: int,
    load_pairs: Callable[[], None] = lambda: None,
    *,
    parts: int = 1,
    cotangents: Ring | None = None,
) -> None:
    """Producer: the `block`-th tile of queries, with what belongs to its rows, into slot `done`.

    With `parts`, columns lie in so many parts, which are the first axis of a slot. `cotangents`:
    their ring where it has another number of slots.
    """
    cotangents = cotangents or ring
    begin = pl.ds(block * rows, rows)
    slot = ring.slot(done)

    def load(source, target, name, slot):
        plgpu.copy_gmem_to_smem(source, target, barriers[name].at[slot])

    def load_rows(name, array, slot):
        source, target = array.at[batch, begin, head], shared[name].at[slot]
        if parts == 1:
            load(source, target, name, slot)
            return
        size = array.shape[3] // parts
        for part in range(parts):
            load(source.at[:, pl.ds(part * size, size)], target.at[part], name, slot)

    ring.await_free("query", done)
    load_rows("query", arrays.query, slot)
    load(arrays.lse2.at[batch, head, begin], shared["lse2"].at[slot], "query", slot)
    load(arrays.delta.at[batch, head, begin], shared["delta"].at[slot], "query", slot)
    load_pairs()
    cotangents.await_free("cotangent", done)
    load_rows("cotangent", arrays.cotangent, cotangents.slot(done))


def launch(
    body,
    arrays,
    out_type,
    shared,
    barriers,
    grid,
    names,
    name,
    interpret,
    *,
    pairs: PairArrays | None = None,
    step: int = 0,
    pair_stages: int | None = None,
    readers: int = COMPUTE_WARPGROUPS,
    warpgroups: int = COMPUTE_WARPGROUPS + 1,
    **static,
):
    """Runs `body(arrays, *outputs, shared, barriers, simulate=..., **static)` on each program.

    With `pairs`, streamed in steps of `step` columns, the body's next argument is their reader, or
    None where there are none. `pair_stages`: slots of its ring, None: as many as of the tiles.
    `readers`: as `PairReader`. `warpgroups`: of a program.
    """
    if pairs is not None:
        stages = pair_stages or static["tile"].stages
        arrays = arrays._replace(mask=pairs.mask, bias=pairs.bias)
        pair_shared, pair_barriers = pair_tiles.scratch(pairs, stages, step, readers)
        shared, barriers = shared | pair_shared, barriers | pair_barriers
    present = [x is not None for x in arrays]
    outputs = len(out_type)

    def kernel(*refs):
        operands = iter(refs[: sum(present)])
        rest = list(refs[sum(present) :])
        in_refs = BackwardArrays(*(next(operands) if there else None for there in present))
        if pairs is not None:
            reader = None
            if pairs.is_there:
                shown = pairs._replace(mask=in_refs.mask, bias=in_refs.bias)
                shared_refs, barrier_refs = rest[outputs:]
                reader = PairReader(shown, shared_refs, barrier_refs, stages, step, readers)
            rest.append(reader)
        body(in_refs, *rest, simulate=interpret is not None, **static)

    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=(shared, barriers),
        grid=grid,
        grid_names=names,
        num_threads=warpgroups,
        thread_name=axes.WARPGROUP,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=interpret,
    )(*(x for x in arrays if x is not None))
