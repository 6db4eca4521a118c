"""The dense product against `@`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jfed import models
from jfed._fusion import DIVISIONS_STAY
from jfed.models import dense, linear


def draw(rows, *axes, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(0))
    return jax.random.normal(a, (*axes, rows, 7), dtype), jax.random.normal(b, (*axes, 7, 3), dtype)


def value(product):
    return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))


def assert_same(of, x, kernel, rtol=1e-5):
    found, expected = of(value(linear))(x, kernel), of(value(jnp.matmul))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), found, expected)


@pytest.mark.parametrize("rows", [0, 1, 10, dense.FEW, dense.FEW + 1])
def test_gradients_are_those_of_the_product(rows):
    assert_same(lambda f: jax.value_and_grad(f, (0, 1)), *draw(rows))


@pytest.mark.parametrize("more", [(), (2,)])
def test_a_row_or_more_axes_too(more):
    x, kernel = draw(4)
    assert_same(lambda f: jax.grad(f, (0, 1)), x[0] if not more else jnp.stack([x, -x]), kernel)


@pytest.mark.parametrize("mode", [jax.hessian, lambda f, i: jax.jacrev(jax.grad(f, i), i), jax.jacfwd])
def test_derivatives_of_every_order_and_mode(mode):
    assert_same(lambda f: mode(f, (0, 1)), *draw(5))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_many_clients(axes):
    x, kernel = draw(5, 4)
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True))
    assert_same(lambda f: jax.jit(jax.vmap(jax.grad(f, (0, 1)), axes)), x, kernel)


@pytest.mark.parametrize("outer", [(0, 0), (0, None), (None, 0)])
def test_clients_of_many_settings(outer):
    x, kernel = draw(3, 2, 4)
    x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), outer, strict=True))
    assert_same(lambda f: jax.jit(jax.vmap(jax.vmap(jax.grad(f, (0, 1))), outer)), x, kernel)


def test_without_jit():
    with jax.disable_jit():
        assert_same(lambda f: jax.grad(f, (0, 1)), *draw(3))


def test_a_weakly_typed_argument_leaves_the_result_strong():
    x, kernel = jnp.broadcast_to(1.0, (2, 7)), draw(2)[1]
    assert (linear(x, kernel) + jnp.zeros((), jnp.bfloat16)).dtype == jnp.float32
    assert (jax.jit(linear)(x, kernel) + jnp.zeros((), jnp.bfloat16)).dtype == jnp.float32


def test_half_precision_sums_as_the_product_does():
    x, kernel = draw(16, dtype=jnp.bfloat16)
    got, want = (jax.grad(value(product), 1)(x, kernel) for product in (linear, jnp.matmul))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("spec", [P(), P("clients")])
def test_inside_shard_map_with_a_kernel_for_all_devices_or_one_for_each(spec):
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    x, kernel = draw(8)
    kernel = jnp.concatenate([kernel] * 2) if spec else kernel
    specs = (P("clients"), spec)

    def of(f):
        return jax.jit(jax.shard_map(jax.grad(f, (0, 1)), mesh=mesh, in_specs=specs, out_specs=specs))

    assert_same(of, x, kernel)


@pytest.mark.parametrize("spec", [(P("a"), P()), (P(), P(None, "a"))])
def test_axes_sharded_explicitly_stay_so(spec):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, kernel = draw(8)
    kernel = kernel[:, :2]
    with jax.set_mesh(mesh):
        x, kernel = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, kernel), spec, strict=True))
        found, expected = (jax.jit(jax.value_and_grad(value(f), (0, 1)))(x, kernel) for f in (linear, jnp.matmul))
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_one_kernel_for_many_clients_is_not_copied():
    x, kernel = draw(5)
    text = jax.jit(jax.vmap(jax.value_and_grad(value(linear)), (0, None))).lower(jnp.stack([x] * 11), kernel).as_text()
    assert "11x5x7xf32" in text and "11x7x3xf32" not in text


def test_a_precision_asked_for_around_it_holds():
    def f(x, kernel):
        with jax.default_matmul_precision("highest"):
            return linear(x, kernel)

    assert "precision = [HIGHEST, HIGHEST]" in jax.jit(f).lower(*draw(5)).as_text()


@pytest.mark.parametrize(("rows", "products"), [(10, 1 if DIVISIONS_STAY else 2), (40, 2)])
def test_a_small_batch_has_no_product_for_the_kernel_in_a_step_of_a_flax_model(rows, products):
    model = models.from_nnx(lambda rngs: nnx.Linear(7, 3, rngs=rngs))
    params = model.init(jax.random.key(0))

    @jax.jit
    def step(params, x):
        updates = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, x))))(params)
        return optax.apply_updates(params, updates)

    assert step.lower(params, jnp.ones((rows, 7))).as_text().count("dot_general") == products


def test_a_layer_with_a_product_of_its_own_keeps_it():
    def halved(*args, **rest):
        return 0.5 * jax.lax.dot_general(*args, **{k: v for k, v in rest.items() if k == "precision"})

    x = jnp.ones((2, 3))
    plain, own = (
        models.from_nnx(lambda rngs, kind=kind: nnx.Linear(3, 2, rngs=rngs, **kind))
        for kind in ({}, {"dot_general": halved})
    )
    params = plain.init(jax.random.key(0))
    np.testing.assert_allclose(own.apply(params, x), 0.5 * plain.apply(params, x), rtol=1e-6)


def test_a_layer_that_asks_for_another_product_gets_it():
    class Tied(nnx.Linear):
        def __call__(self, x):
            return self.dot_general(x, self.kernel[...], (((1,), (1,)), ((), ())))

    class Wide(nnx.Linear):
        def __call__(self, x):
            numbers = (((1,), (0,)), ((), ()))
            return self.dot_general(x, self.kernel[...].astype(x.dtype), numbers, preferred_element_type=jnp.float32)

    x = jax.random.normal(jax.random.key(0), (2, 3))
    tied, wide = (models.from_nnx(lambda rngs, kind=kind: kind(3, 3, rngs=rngs)) for kind in (Tied, Wide))
    params = tied.init(jax.random.key(0))
    np.testing.assert_allclose(tied.apply(params, x), x @ params["kernel"].T, rtol=1e-6)
    assert wide.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_what_is_not_finite_stays_so():
    x, kernel = draw(3)
    gradient = jax.grad(lambda k: jnp.sum(linear(x.at[0, 0].set(jnp.nan), k)))(kernel)
    assert np.isnan(gradient[0]).all() and np.isfinite(gradient[1:]).all()
