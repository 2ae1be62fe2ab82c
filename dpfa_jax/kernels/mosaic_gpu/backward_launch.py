"""How the backward kernels that walk over tiles are launched."""

from collections.abc import Callable
from typing import Any

import jax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import BackwardArrays, launch
from dpfa_jax.kernels.mosaic_gpu.backward_walk import Owned, loops_of, slots_that_fit
from dpfa_jax.kernels.mosaic_gpu.layouts import tiled_shared
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, BackwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Tiling


def walked(
    body: Callable[..., None],
    spec: AttentionSpec,
    arrays: BackwardArrays,
    pairs: pair_tiles.PairArrays,
    tile: BackwardTiles,
    tiling: Tiling,
    owned_of: Callable[[int], dict[str, Any]],
    others: dict[str, Any],
    barriers: dict[str, Any],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    name: str,
    interpret: Any,
    **static: Any,
) -> list[jax.Array]:
    """`outputs` of a kernel, one program for each row of `arrays.schedule`.

    Args:
      body: of the kernel, as `launch`.
      spec, arrays, pairs: of the call.
      tile, tiling: sizes of a tile, and all tiles.
      owned_of: shared memory of what tiles own, by the slots for it.
      others: the rest of it.
      barriers: but those of what tiles own.
      outputs: shapes and dtypes.
      name: of the kernel.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
      **static: more of the body's.
    """
    step = tiling.tile.block_kv
    pair_shared, _ = pair_tiles.scratch(pairs, tile.stages, step)
    slots = slots_that_fit(owned_of, others | pair_shared)
    owned = owned_of(slots)
    simulated = {}
    if interpret is not None:
        block = tiling.tile.rows // COMPUTE_WARPGROUPS
        shape = (COMPUTE_WARPGROUPS, block, step)
        simulated["spare"] = tiled_shared(shape, arrays.query.dtype)
    return launch(
        body,
        arrays,
        outputs,
        owned | others | simulated,
        Owned.barriers_of(slots, len(owned)) | barriers,
        arrays.schedule.shape[:1],
        (axes.PROGRAM,),
        name,
        interpret,
        pairs=pairs,
        step=step,
        spec=spec,
        tile=tile,
        tiling=tiling,
        loops=loops_of(tiling),
        slots=slots,
        **static,
    )
