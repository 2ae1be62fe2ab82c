"""Ways to use one noise key twice, each refused: the difference of two such answers is noise-free.

The guard is an identity on the key. As a JAX primitive it meets vmap wherever vmap is applied,
outside a jit too; what needs no rule of its own (closed-over keys, second eager use) is seen when
it is called. What only the whole program shows is found by `check_no_reuse`.
"""

import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive, find_top_trace
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Key

from dpfa_jax.core import INSECURE_TEST, ArgumentError, KeyReuseError
from dpfa_jax.noise import promises, reuse, tracing
from dpfa_jax.noise.keys import generator_of
from dpfa_jax.noise.origins import Use
from dpfa_jax.noise.varying import varying_axes

guard_p = Primitive(reuse.GUARD)

# (key, uses) -> the boxes of indices, one (start, stop) a span, that have been drawn.
_Box = tuple[tuple[int, int], ...]
_used: dict[tuple[bytes, tuple[int, ...]], list[_Box]] = {}
_used_lock = threading.Lock()
_programs: weakref.WeakKeyDictionary[Any, tracing.Program] = weakref.WeakKeyDictionary()


def guard(
    noise_key: Key[Array, "..."],
    *witnesses: Array | np.ndarray | None,
    uses: tuple[int | Array | np.ndarray, ...] = (),
    spans: tuple[tuple[int | Array | np.ndarray, int], ...] = (),
    names: tuple[str, ...] = (),
    promise: Hashable = None,
    is_answer: bool = True,
) -> Key[Array, "..."]:
    """`noise_key`, once it is sure that this use of it is not a repeated one.

    Args:
      noise_key: the key of this release.
      witnesses: every array the noisy answer is computed from; None is skipped.
      uses: what else tells this use from others of the same key, e.g. (release_id, layer).
      spans: (start, size) of each range of counters that this use draws, e.g. batch rows and heads;
        uses of one key may share all of `uses` where they are disjoint in one span.
      names: what to call `uses` and starts in errors.
      promise: the record of the release that is answered; None where a caller has asked already.

      is_answer: False where a function within, traced apart, guards the key for the answer itself.

    Errors: ArgumentError where an eager key of `charge` was charged for another promise.
    KeyReuseError
      - under vmap, where a witness has the mapped axis and the key has not;
      - where the key is closed over by jit, scan, while, cond, checkpoint or shard_map, or made
        inside from what is: only as an argument is it new in each call (or derive one inside from
        an argument: `jax.random.fold_in(key, step)`). Test keys may be made inside;
      - where the keys of a vmap repeat one, as far as the traced function shows it;
      - at a second use of the same (key, uses) whose spans overlap those of the first, or, traced,
        may do so: eager ones in this process, staged ones in one traced function. Test keys are
        exempt.

    Not seen from inside: a function, or a loop's body, that is traced apart and gets one key twice
    (`check_no_reuse` finds this in one program); keys picked from an array, or folded, by computed
    numbers that turn out equal. Take keys from `charge`, which gives each once.
    """
    generator = generator_of(noise_key)
    if tracing.scope_of_value(noise_key) is not tracing.scope_of_trace(find_top_trace(())):
        raise KeyReuseError(
            "noise_key is closed over by a traced function (jit, scan, while_loop, cond, "
            "checkpoint, shard_map), which may run more than once with it. Pass it as an argument "
            "(a scan: keys as xs), or derive one inside: jax.random.fold_in(noise_key, step)."
        )
    if generator is not INSECURE_TEST and not tracing.is_new_in_each_call(noise_key):
        raise KeyReuseError(
            "noise_key is made inside a traced function (jit, scan, ...) from values that are "
            "closed over or constant, so every run of it would draw the same noise. Pass the key, "
            "or the array of keys and the number that picks one, as arguments (a scan: as xs)."
        )
    concrete = tracing.concrete(noise_key)
    if concrete is not None and promise is not None and generator is not INSECURE_TEST:
        promises.require(np.asarray(jax.random.key_data(concrete)), promise)
    uses = (*uses, *(start for start, _ in spans))
    numbers = [number for use in uses if (number := tracing.concrete(use)) is not None]
    staged = concrete is None or len(numbers) < len(uses)
    if generator is not INSECURE_TEST and not staged:
        _register(concrete, numbers, [size for _, size in spans])
    sizes = (1,) * (len(uses) - len(spans)) + tuple(size for _, size in spans)
    if generator is not INSECURE_TEST and staged:
        _register_staged(noise_key, uses, sizes, names)
    # As many axes as the key has, so that vmap can keep them in line with it.
    operands = [_with_axes(jax.numpy.asarray(use, np.uint32), noise_key.ndim) for use in uses]
    operands += [jax.lax.stop_gradient(w) for leaf in witnesses for w in jax.tree.leaves(leaf)]
    return guard_p.bind(noise_key, *operands, sizes=sizes, names=names, is_answer=is_answer)


def require_offsets_under_manual_mesh(
    noise_key: Key[Array, "..."],
    *witnesses: Array | None,
    **offsets: int | Array | str | tuple[str, ...] | None,
) -> None:
    """Inside shard_map, refuses indices by which two shards could draw the same noise.

    A number that differs between shards may overlap with the next shard's, which no shard can see.
    So what tells shards apart is named, and counted by the caller of this function.

    Args:
      noise_key: the key of this release.
      witnesses: the sharded arrays of the call; None is skipped.
      offsets: `batch_start=..., head_start=...`, as the caller gave them: mesh axes by name, a
        number that is the same on each shard; None: not given.

    Errors: ArgumentError for a name that is no manual mesh axis here, or an axis along which all
    shards hold the same data, which each would answer. KeyReuseError under a manual mesh axis
      - for an offset that was not given, unless the key differs wherever the data do;
      - for a number that may differ between shards of one key: any traced one without `check_vma`;
      - where a witness may differ over a mesh axis over which neither the key does nor an offset
        is named. Without `check_vma` no type tells: each manual axis is due.
    """
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    named = {axis: name for name, offset in offsets.items() for axis in (mesh_axes(offset) or ())}
    for axis, name in named.items():
        if axis not in manual:
            raise ArgumentError(
                name, axis, "no mesh axis of a shard_map around this call", "Pass a number."
            )
    if not manual:
        return
    has_types = bool(varying_axes(jax.lax.axis_index(min(manual))))
    own, differing = frozenset[object](), manual
    if has_types:
        own = _differs_over(noise_key)
        differing = manual & varying_axes(*jax.tree.leaves(witnesses))
    for name, offset in offsets.items():
        if offset is None and differing - own:
            raise KeyReuseError(
                f"{name} is missing inside shard_map or pmap over {sorted(manual)}: every shard "
                f"would count from 0 and draw the same noise. {_NAME_THE_AXIS}"
            )
        if isinstance(offset, jax.core.Tracer) and (
            not has_types or varying_axes(offset) & manual - own
        ):
            raise KeyReuseError(
                f"{name} is computed inside shard_map over {sorted(manual)}: whether shards "
                f"overlap, and draw the same noise, cannot be seen. {_NAME_THE_AXIS}"
            )
    repeated = differing - own - set(named)
    if repeated:
        raise KeyReuseError(
            f"the data may differ over mesh axes {sorted(repeated)}, but neither noise_key nor "
            f"{', '.join(offsets)} does: shards would draw the same noise. {_NAME_THE_AXIS}"
        )
    for axis in set(named) - differing:
        raise ArgumentError(
            named[axis],
            axis,
            "the data are the same on all shards of this axis: each would be one more answer",
            "Leave it out: all its shards then draw the same noise for the same answer.",
        )


_NAME_THE_AXIS = (
    'Pass the mesh axis along which the batch, or the heads, are cut: batch_start="data"; 0 for '
    "what is whole on each shard. Or pass different keys, charge(ledger, release, count=shards), "
    "cut along that axis by jax.shard_map; pmap and check_vma=False hide that they differ."
)


def _differs_over(noise_key: object) -> frozenset[object]:
    """Mesh axes over which a key differs: its type says so, and it is not only marked as such."""
    program = _program_of(noise_key)
    return varying_axes(noise_key) & program.origin(noise_key).varies if program else frozenset()


def mesh_axes(offset: object) -> tuple[str, ...] | None:
    """The mesh axes that an offset names, the outermost first; None where it is a number."""
    if isinstance(offset, str):
        return (offset,)
    return tuple(offset) if isinstance(offset, tuple) else None


def _register(noise_key: Any, numbers: list[Array | np.ndarray], sizes: list[int]) -> None:
    """Notes each eager (key, uses, box) once; the last numbers are the starts of the box.

    Errors: KeyReuseError at the second time.
    """
    words = np.asarray(jax.random.key_data(noise_key)).reshape(-1, 2)
    if any(np.size(number) not in (1, len(words)) for number in numbers):
        raise KeyReuseError(
            "one noise key serves several (release_id, layer) at once under vmap. Map over "
            "different keys too: charge(ledger, release, count=size) pays for and gives that many."
        )
    columns = [np.broadcast_to(np.ravel(number), len(words)).tolist() for number in numbers]
    plain = len(numbers) - len(sizes)
    with _used_lock:
        new: dict[tuple[bytes, tuple[int, ...]], list[_Box]] = {}
        for row, word in enumerate(words):
            values = [column[row] for column in columns]
            use = (word.tobytes(), tuple(values[:plain]))
            starts = zip(values[plain:], sizes, strict=True)
            box = tuple((start, start + size) for start, size in starts)
            if any(_overlap(box, drawn) for drawn in (*_used.get(use, ()), *new.get(use, ()))):
                raise KeyReuseError(
                    "noise_key has served this release already, or an overlapping part of it. Take "
                    "a fresh one: charge(ledger, release) gives one each time. Parts of one answer "
                    "must not share batch rows and heads; release_id and layer tell charged uses "
                    "of one key apart."
                )
            new.setdefault(use, []).append(box)
        for use, boxes in new.items():
            _used.setdefault(use, []).extend(boxes)


def _register_staged(
    noise_key: object, uses: Sequence[Any], sizes: Sequence[int], names: tuple[str, ...]
) -> None:
    """Notes each use in the program that is being traced.

    Errors: KeyReuseError at the second time, and where it may be one.
    """
    program = _program_of(noise_key)
    if program is not None:
        numbers = tuple(program.origin(use) for use in uses)
        with _used_lock:
            program.draw(Use(program.origin(noise_key), numbers, tuple(sizes)), names)


def _program_of(value: object) -> tracing.Program | None:
    trace = tracing.scope_of_value(value)
    if trace is None:
        return None
    with _used_lock:
        return _programs.setdefault(trace, tracing.Program())


def _overlap(one: _Box, other: _Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


@guard_p.def_impl
def _impl(noise_key: Array, *operands: Array, **params: object) -> Array:
    del operands, params
    return noise_key


@guard_p.def_abstract_eval
def _abstract_eval(noise_key: Any, *operands: Any, **params: object) -> Any:
    del operands, params
    return noise_key


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    del tangents  # keys have no tangent
    out = guard_p.bind(*primals, **params)
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())


def _batch(operands: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[Any, int]:
    noise_key, axis, count = operands[0], axes[0], len(params["sizes"])
    if axis is None:
        raise KeyReuseError(
            "vmap maps the data but not noise_key: every element would get the same noise. Map "
            "over different keys (one key repeated would not do): charge(ledger, release, "
            "count=size) pays for and gives that many; where every element is another individual, "
            "jax.random.split(noise_key, size) of one charge will do. Or keep the batch axis and "
            "call once without vmap."
        )
    pairs = list(zip(operands[1:], axes[1:], strict=True))
    numbers = [
        jax.numpy.expand_dims(x, axis) if at is None else jax.numpy.moveaxis(x, at, axis)
        for x, at in pairs[:count]
    ]
    program = _program_of(noise_key)
    if program is not None and generator_of(noise_key) is not INSECURE_TEST:
        known = tuple(program.origin(number) for number in numbers)
        use = Use(program.origin(noise_key), known, params["sizes"])
        reuse.require_distinct(use, [noise_key.shape, *(number.shape for number in numbers)])
    # The mapped axis of the witnesses is not needed below; index 0 stands for all of it.
    witnesses = [
        x if at is None else jax.lax.index_in_dim(x, 0, at, False) for x, at in pairs[count:]
    ]
    return guard_p.bind(noise_key, *numbers, *witnesses, **params), axis


def _with_axes(number: Array, count: int) -> Array:
    return number.reshape((1,) * (count - number.ndim) + number.shape)


ad.primitive_jvps[guard_p] = _jvp
batching.primitive_batchers[guard_p] = _batch
mlir.register_lowering(guard_p, lambda ctx, noise_key, *operands, **params: [noise_key])
