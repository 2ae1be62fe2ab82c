"""Split the gradient of one example into a head and the large last products, to be made later.

The gradient of a weight matrix is one product of its layer's inputs with the cotangents of its
outputs; everything before that product also exists in ordinary training. `defer` walks back from
each gradient to a cheap cut, so that the head, mapped over a batch, holds inputs and cotangents
(which a batch has in any case) instead of one weight gradient an example, and each gradient's
`tail` makes it from the cut: for a few examples at a time, once, exactly as `jax.grad` would.

It reads a program and rewrites it; nothing is assumed about layers. What it cannot walk through
(a gradient that a loop accumulates, an unknown operation) simply stays in the head.

Source: the split is that of "book-keeping", Bu et al. (2023), found in the program instead of
declared by layers.
"""

from collections.abc import Sequence, Set

from jax.extend import core as jex
from jaxtyping import Array, PyTree

from dpfa_jax.dpsgd.equations import inlined
from dpfa_jax.dpsgd.scopes import Scope
from dpfa_jax.dpsgd.split import Finish, Loop, Split


def defer(
    program: jex.ClosedJaxpr,
    varies: Sequence[bool],
    *,
    recompute: bool = False,
    columns: Sequence[Sequence[int]] = (),
    divided: Set[int] = frozenset(),
) -> Split:
    """Splits `program`, whose outputs are the loss and the gradients of one example.

    Args:
      program: as `jax.make_jaxpr` gives it.
      varies: for each input, whether it differs from example to example.
      recompute: whether the tails may make an operand anew (normalised inputs), elementwise, from
        what the backward pass keeps in any case, rather than keep it too. Its bits may then depend
        on where it is compiled: not for gradients that are made twice.
      columns: sets of outputs to be finished in the loop that makes a slice of each a round. Where
        no one loop does, they get tails.
      divided: outputs that are measured slice by slice: their tails make them whole.
    """
    jaxpr = inlined(program.jaxpr)
    scope = Scope(jaxpr, program.consts, varies, has_loss=True, recompute=recompute)
    for column in columns:
        scope.finish_in_loop(column)
    finished = {place for body in scope.finishing for place in body.finished}
    late = tuple(place for place in range(len(jaxpr.outvars)) if place not in finished)
    cut, tails = scope.tails_of({place: jaxpr.outvars[place] for place in late}, divided)
    wanted = list(cut)
    loops = []
    for body in scope.finishing:
        results = tuple(range(len(wanted), len(wanted) + len(body.results)))
        wanted += body.results
        loops.append(Loop(tuple(body.finished), body.tails, results))

    def head(inputs: Sequence[Array], work: Sequence[tuple[Finish, PyTree]]) -> list[Array]:
        return scope.values(inputs, wanted, work)

    return Split(head, tuple(scope.varies(var) for var in wanted), late, tails, tuple(loops))
