"""Clip groups that are finished inside a loop over layers: one round clips one layer and adds it.

Where the parameters of all layers are stacked for `scan` and each layer has clip groups of its own,
nothing of a layer is due once the backward pass has left it: the loop stacks clipped sums, as an
ordinary one stacks gradients, and holds the inputs and cotangents of one layer at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PyTree

from dpfa_jax.dpsgd.clip_groups import clipped_groups, sets_of
from dpfa_jax.dpsgd.late_gradients import ClipNorm, late_gradients
from dpfa_jax.dpsgd.parameters import Owner
from dpfa_jax.dpsgd.released import sums_of
from dpfa_jax.dpsgd.split import Finish, Loop


def columns_of(leaf_groups: Sequence[Owner]) -> list[tuple[int, ...]]:
    """Sets of parameters whose slices i share one group, which holds nothing else, for every i."""
    found = []
    for groups, members in sets_of(leaf_groups):
        owners = {leaf_groups[i] for i in members}
        (owner,) = owners if len(owners) == 1 else (0,)
        if not isinstance(owner, int) and len(owner) == len(groups):
            found.append(members)
    return found


class Rounds(NamedTuple):
    """What one loop of a split finishes.

    Attributes:
      loop: where the head makes the gradients, a slice of each a round.
      members: their parameters.
      owners: the clip groups of the slices of each.
      paths: their names.
    """

    loop: Loop
    members: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]
    paths: tuple[str, ...]

    def columns(self) -> tuple[tuple[int, ...], ...]:
        """The groups of the rounds, a column for those parameters that share them."""
        return tuple(dict.fromkeys(self.owners))

    def counts(self, halves: Float32[Array, "rounds columns"]) -> dict[int, Float32[Array, ""]]:
        """By group."""
        columns = enumerate(self.columns())
        return {group: halves[i, j] for j, column in columns for i, group in enumerate(column)}

    def work(
        self,
        leaves: Sequence[Array],
        is_real: Bool[Array, ""],
        l2_clip_norms: Sequence[ClipNorm],
        per_example_bytes: int | None,
    ) -> tuple[Finish, PyTree]:
        """For `Split.head` under `vmap` over the examples of a micro-batch."""
        columns = self.columns()
        norms = [[l2_clip_norms[group] for group in column] for column in columns]
        # A kernel serves where a norm is known to the compiler, which one for all rounds can be.
        known = [isinstance(n[0], float) and n.count(n[0]) == len(n) for n in norms]
        traced = [jnp.stack([jnp.float32(x) for x in n]) for n in norms]

        def of_batch(
            counts: Bool[Array, " micro"],
            values: list[Array],
            mapped: list[bool],
            given: tuple[list[Array], list[Array]],
        ) -> list[Array]:
            parameters, own_norms = given
            gradients = late_gradients(
                self.loop.tails, values, mapped, counts.shape[0], self.paths, parameters
            )
            sums, halves = clipped_groups(
                gradients,
                counts,
                l2_clip_norms=[
                    n[0] if is_known else own
                    for n, is_known, own in zip(norms, known, own_norms, strict=True)
                ],
                leaf_groups=[columns.index(owner) for owner in self.owners],
                per_example_bytes=per_example_bytes,
            )
            return [*sums_of(sums), halves]

        @jax.custom_batching.custom_vmap
        def one(counts: Bool[Array, ""], values: list[Array], given: PyTree) -> list[Array]:
            return of_batch(counts[None], [x[None] for x in values], [True] * len(values), given)

        @one.def_vmap
        def _(
            axis_size: int, in_batched: list, counts: Array, values: list[Array], given: PyTree
        ) -> tuple[list[Array], list[bool]]:
            counts = jnp.broadcast_to(counts, (axis_size,))
            sums = of_batch(counts, values, in_batched[1], given)
            return sums, [False] * len(sums)

        def finish(loss: Float[Array, ""], given: PyTree, values: list[Array]) -> list[Array]:
            return one(is_real & jnp.isfinite(loss), values, given)

        return finish, ([leaves[i] for i in self.members], traced)
