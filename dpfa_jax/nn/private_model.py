"""A Flax model as pure functions of what is trained privately; everything else held apart."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.clipped_sum import checked_losses
from dpfa_jax.dpsgd.parameters import Groups
from dpfa_jax.nn.coverage import Coverage, covered
from dpfa_jax.nn.parts import Leaf, Parts
from dpfa_jax.noise.keys import is_threefry


@dataclasses.dataclass(frozen=True, eq=False)
class PrivateModel:
    """What `privatize` gives. Immutable; training does not change it.

    Attributes:
      params: the trainable parameters, path -> floating-point array: what `make_dp_step`'s `init`
        takes. A Variable that the model holds twice (tied embeddings) is here once.
      frozen: everything else, path -> array: frozen weights, state, constants. It must be public.
    """

    params: dict[str, Array] = dataclasses.field(repr=False)
    frozen: dict[str, Array] = dataclasses.field(repr=False)
    parts: Parts = dataclasses.field(repr=False)

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained, as a plan asks for them."""
        return sum(leaf.size for leaf in self.params.values())

    def model(
        self, params: dict[str, Array] | None = None, *, rng_key: Key[Array, ""] | None = None
    ) -> Any:
        """The Flax model with these parameters: an nnx module, or a linen module bound to them.

        Args:
          params: as `params`, for instance trained ones; the initial ones where None.
          rng_key: begins the model's random streams (dropout) anew.
        """
        params = self.params if params is None else params
        return self.parts.merged(self._values(params, self.frozen), rng_key)

    def apply(
        self,
        params: dict[str, Array],
        *args: Any,
        rng_key: Key[Array, ""] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output; pure.

        Errors: CoverageError for a model that changes its state, or draws random numbers without
        `rng_key`.
        """
        values = self._values(params, self.frozen)
        return self.parts.run(lambda model: model(*args, **kwargs), values, rng_key)

    def loss(
        self,
        fn: Callable[[Any, PyTree], Float[Array, " batch"]],
        *,
        rng_key: str | None = None,
    ) -> jax.tree_util.Partial:
        """loss_fn(params, batch) -> (B,) for `make_dp_step`.

        The frozen arrays travel with it as arguments of the compiled step, not as constants in it.

        Args:
          fn: (model, batch) -> one loss an example, shape (B,). The model is as `model` gives it.
          rng_key: name of the entry of the batch that holds one key an example, shape (B,): the
            model's random streams (dropout) begin from it. Make it of the step and the example
            alone, `jax.vmap(lambda i: jax.random.fold_in(step_key, i))(indices)` of the batch's
            indices, padding included; then `step_key` need not be secret. Keys by row
            (`jax.random.split(step_key, B)`) move on where an example is missing: one example then
            changes the masks of others, which clipping does not bound.

        Errors, once it is called: CoverageError for a model that changes its state, or draws random
        numbers without `rng_key`, by name; ArgumentError for keys that are none, or not
        threefry's, and with `rng_key` for a loss that is not one number an example.
        """

        def losses(
            frozen: dict[str, Array], params: dict[str, Array], batch: PyTree
        ) -> Float[Array, " batch"]:
            values = self._values(params, frozen)
            if rng_key is None:
                return self.parts.run(lambda model: fn(model, batch), values, None)

            def one(example: PyTree) -> Float[Array, ""]:
                alone = jax.tree.map(lambda x: x[None], example)
                own = self.parts.run(lambda model: fn(model, alone), values, example[rng_key])
                return checked_losses(own, 1)[0]

            keys = _checked_keys(batch, rng_key)
            if keys.shape[0] == 1:
                return one(jax.tree.map(lambda x: x[0], batch))[None]
            return jax.vmap(one)(batch)

        return jax.tree_util.Partial(losses, self.frozen)

    def coverage(
        self,
        loss_fn: Callable[[PyTree, PyTree], Float[Array, " batch"]],
        batch: PyTree,
        groups: Groups | None = None,
    ) -> Coverage:
        """How each parameter's per-example gradient is made, and what stays frozen. Print it.

        Runs the loss on two rows to see that they do not meet.

        Args:
          loss_fn: as `loss` gives it.
          batch: a batch of at least one example; public or made up, since an error shows its loss.
          groups: the plan's clip groups. None: each parameter is in one.

        Errors: CoverageError for a loss that couples the rows of a batch; ArgumentError for one
        that is not one number an example; those of `loss`.
        """
        return covered(loss_fn, self.params, self._frozen_leaves(), batch, groups)

    def _frozen_leaves(self) -> list[Leaf]:
        return [leaf for leaf in self.parts.leaves if leaf.path in self.frozen]

    def _values(self, params: dict[str, Array], frozen: dict[str, Array]) -> list[Array]:
        if params.keys() != self.params.keys():
            raise ArgumentError(
                "params",
                sorted(params.keys() ^ self.params.keys()),
                "missing from the trainable parameters, or not among them",
                "Pass private.params, or the params of a state that began from them.",
            )
        return [
            params[leaf.path] if leaf.path in params else frozen[leaf.path]
            for leaf in self.parts.leaves
        ]


def _checked_keys(batch: PyTree, name: str) -> Key[Array, " batch"]:
    keys = batch.get(name) if hasattr(batch, "get") else None
    dtype = getattr(keys, "dtype", np.dtype(object))
    if keys is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise ArgumentError(
            f"batch[{name!r}]",
            None if keys is None else f"array of {dtype}",
            "not one random key for each example",
            f"Put batch[{name!r}] = jax.vmap(lambda i: jax.random.fold_in(step_key, i))(indices) "
            "into a batch that is a dict.",
        )
    if not is_threefry(dtype):
        raise ArgumentError(
            f"batch[{name!r}]",
            f"array of {dtype}",
            "JAX draws for all rows from the first row's key of this kind, so that one example's "
            "key would decide the masks of others",
            'Fold the indices into jax.random.key(seed, impl="threefry2x32").',
        )
    return keys
