"""What a step refuses before it runs: optimizer, mask and split of the batch that do not fit."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels import manual_axes


def check_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Refuses one that cannot move parameters by a gradient alone. Errors: ArgumentError."""

    def update(params: PyTree) -> PyTree:
        gradient = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return optimizer.update(gradient, optimizer.init(params), params)

    try:
        jax.eval_shape(
            update, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        )
    except (TypeError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise ArgumentError(
            "optimizer",
            optimizer,
            f"it fails with a float32 gradient, state and parameters ({problem})",
            "The loss is private: pass an optimizer that needs no more, e.g. optax.adam(1e-3).",
        ) from error


def check_rows(
    is_real: Bool[Array, " capacity"], capacity: int, axis_name: str | tuple[str, ...] | None
) -> None:
    """Refuses a mask that is not one boolean for each row of the capacity. Errors: ArgumentError.

    And shards that were not named, each of which would noise its own part of the sum.
    """
    if getattr(is_real, "dtype", None) != jnp.bool_ or is_real.ndim != 1:
        raise ArgumentError(
            "is_real",
            getattr(is_real, "dtype", type(is_real)),
            "not a vector of booleans",
            "Pass indices >= 0, as take_batch returns it.",
        )
    shards = 1
    if axis_name is not None:
        shards = jax.lax.axis_size(axis_name)
    elif jax.sharding.get_abstract_mesh().manual_axes:
        raise ArgumentError(
            "axis_name",
            None,
            "inside shard_map each shard would noise its own part of the sum",
            "Name the mesh axes over which the batch is split.",
        )
    if is_real.shape[0] * shards != capacity:
        raise ArgumentError(
            "is_real",
            is_real.shape,
            f"{shards} x {is_real.shape[0]} rows are not the plan's capacity {capacity}",
            "Pad each batch to the capacity, as plan.index_batches does.",
        )


def check_alike(arrays: PyTree) -> None:
    """Inside `shard_map`, refuses to release what differs from shard to shard.

    Each shard draws the noise of its own element indices from one key: their answers would differ
    by what the noise hides, or be parts of which each was clipped alone.

    Errors: ArgumentError that names the array and the mesh axis, also where types tell nothing.
    """
    axes = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    blind = [axis for axis in axes if axis not in manual_axes.varying_axes(_index(axis))]
    if blind:
        raise ArgumentError(
            "updates",
            f"<inside shard_map over {sorted(axes)}>",
            "nothing tells here whether shards hold the same sums; those that differ would be "
            "released with the same noise",
            "Use jax.shard_map without check_vma=False; or plain jit with the batch sharded.",
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        varying = manual_axes.varying_axes(leaf)
        if varying:
            raise ArgumentError(
                jax.tree_util.keystr(path, simple=True, separator="/"),
                f"<not the same on every shard of {min(varying)!r}>",
                "each shard would clip and release its own, all with the same noise",
                "Add the sums over every mesh axis that the batch is split over (axis_name of "
                "make_dp_step; jax.lax.psum), and keep parameters, state and key whole on every "
                "shard. Parameters in pieces: plain jit with sharded arrays.",
            )


def _index(axis: str) -> Array:
    return jax.lax.axis_index(axis)


def check_split(
    batch: PyTree, is_real: Bool[Array, " capacity"], axis_name: str | tuple[str, ...] | None
) -> None:
    """Refuses examples that every shard holds: each would be added once a shard.

    Only types tell: equal rows of two shards may be one example, or two that look alike.

    Errors: ArgumentError, also where types tell nothing.
    """
    for axis in (
        () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    ):
        if axis not in manual_axes.varying_axes(jax.lax.axis_index(axis)):
            raise ArgumentError(
                "axis_name",
                axis_name,
                f"nothing tells here whether shards of {axis!r} hold different examples; those "
                "that all of them hold would be added once a shard, beyond their clip norm",
                "Use jax.shard_map without check_vma=False; or plain jit with the batch sharded, "
                "and no axis_name.",
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path({"batch": batch, "is_real": is_real}):
            if axis not in manual_axes.varying_axes(leaf):
                raise ArgumentError(
                    jax.tree_util.keystr(path, simple=True, separator="/"),
                    f"<the same on every shard of {axis!r}>",
                    "each example would be added once a shard, beyond its clip norm",
                    f"Split the batch over {axis!r}: in_specs=PartitionSpec({axis!r}) for it.",
                )
