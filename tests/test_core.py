import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import POPULATION, SIZES

from jfed.core import make_cohort


def steps(size):
    return 3 * size


def test_a_cohort_points_at_its_clients_rows():
    cohort = make_cohort(POPULATION, jnp.array([4, 0]), steps=steps)
    np.testing.assert_array_equal(cohort.size, SIZES[[4, 0]])
    np.testing.assert_array_equal(cohort.start, [SIZES[:4].sum(), 0])
    np.testing.assert_array_equal(cohort.steps, 3 * SIZES[[4, 0]])
    np.testing.assert_array_equal(cohort.weight, SIZES[[4, 0]])
    assert cohort.examples is POPULATION.examples


@pytest.mark.parametrize("nobody", [12, -1, 10_000])
def test_an_id_outside_the_population_makes_an_empty_slot(nobody):
    cohort = make_cohort(POPULATION, jnp.array([nobody, 3]), steps=lambda size: size + 5, weight=jnp.array([9.0, 2.0]))
    assert [int(a[0]) for a in (cohort.ids, cohort.start, cohort.size, cohort.steps, cohort.weight)] == [12, 0, 0, 0, 0]
    assert float(cohort.weight[1]) == 2.0


def test_a_client_without_examples_takes_no_steps():
    hollow = POPULATION._replace(size=POPULATION.size.at[3].set(0))
    cohort = make_cohort(hollow, jnp.array([3]), steps=lambda size: size + 5)
    assert (int(cohort.steps[0]), float(cohort.weight[0])) == (0, 0.0)


@pytest.mark.parametrize("weight", [[0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_that_cannot_be_averaged_are_refused(weight):
    with pytest.raises(ValueError, match="finite, at least 0 and not all 0; leave weight out"):
        make_cohort(POPULATION, jnp.array([1, 2]), steps=steps, weight=jnp.array(weight))


@pytest.mark.parametrize("ids", [[], [1.7], [[1]]])
def test_ids_that_are_no_ids_are_refused(ids):
    with pytest.raises(ValueError, match="one row of at least one integer"):
        make_cohort(POPULATION, ids, steps=steps)


def test_a_population_on_the_host_serves_inside_a_compiled_program():
    host = jax.tree.map(np.asarray, POPULATION)
    sizes = jax.jit(lambda i: make_cohort(host, i, steps=steps, weight=[1.0, 2.0]).size)(jnp.array([4, 0]))
    np.testing.assert_array_equal(sizes, SIZES[[4, 0]])


def test_traced_weights_pass():
    cohort = jax.jit(lambda w: make_cohort(POPULATION, jnp.array([1, 2]), steps=steps, weight=w))(jnp.zeros(2))
    assert float(cohort.weight.sum()) == 0
