"""FetchSGD: clients send sketches, and the server keeps momentum and error in the sketch."""

import jax
import jax.numpy as jnp
import optax

from jfed.algorithms._work import specialised
from jfed.compress import count_sketch, fetch_sgd, over_tree, undecoded
from jfed.core import Algorithm, ClientWork


def fetchsgd(
    work: ClientWork,
    *,
    rows: int = 5,
    columns: int,
    fraction: float,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    seed: int = 0,
    **options,
) -> Algorithm:
    """FetchSGD (Rothchild et al. 2020, arXiv:2007.07682, Algorithm 1): clients without memory that send 4 r c bytes.

    Args:
      work: see `jfed.local`; one gradient, `local.gradient`, in the paper.
      rows: r of the sketch.
      columns: c of the sketch; r c must be below the numbers of the model.
      fraction: of the model's numbers that change in a round, in (0, 1].
      learning_rate: 1 applies what clients trained.
      momentum: in [0, 1].
      seed: of the sketch.
      **options: of `federated`, but for `uplink`, `server` and `aggregator`.

    Raises:
      ValueError: as `compress.count_sketch` and `compress.fetch_sgd`; if an option is one the method sets; at `init`,
        if the sketch is no smaller than the model.
    """
    sketch = over_tree(count_sketch(rows, columns, seed=seed))
    inner = specialised(
        "fetchsgd",
        work,
        options,
        uplink=optax.chain(sketch, undecoded()),
        server=fetch_sgd(sketch, learning_rate=learning_rate, fraction=fraction, momentum=momentum),
        aggregator=None,
    )

    def init_fn(params):
        numbers = sum(jnp.size(x) for x in jax.tree.leaves(params))
        if rows * columns >= numbers:
            raise ValueError(
                f"fetchsgd(rows={rows}, columns={columns}): the model's {numbers} numbers are no more than those of "
                "the sketch; lower columns."
            )
        return inner.init(params)

    return inner._replace(init=init_fn)
