"""Generated problems have the distributions and the constants they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jfed import algorithms, clients, data, local, run, sampling
from jfed.data.synthetic import quadratic_loss, quadratics, synthetic, synthetic_iid

SETS = {
    "synthetic(0, 0)": lambda key, **options: synthetic(key, 0.0, 0.0, **options),
    "synthetic(1, 1)": lambda key, **options: synthetic(key, 1.0, 1.0, **options),
    "synthetic_iid": lambda key, **options: synthetic_iid(key, **options),
}
sets = pytest.mark.parametrize("name", SETS)
MANY = {alpha_beta: synthetic(jax.random.key(1), *alpha_beta, num_clients=300)[0] for alpha_beta in ((0, 0), (0.5, 2))}


def means_of(population):
    """Mean row of each client, [N, 60]."""
    x, start = np.asarray(population.examples["x"], np.float64), np.asarray(population.start)
    return np.add.reduceat(x, start) / np.asarray(population.size)[:, None]


# Synthetic(alpha, beta)


@sets
def test_a_set_is_a_function_of_its_key(name):
    one, same, other = (SETS[name](jax.random.key(k))[0] for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert one.examples["x"].shape != other.examples["x"].shape


@sets
def test_nine_tenths_of_each_client_are_to_train_on(name):
    train, test = SETS[name](jax.random.key(3))
    whole = np.asarray(train.size) + np.asarray(test.size)
    np.testing.assert_array_equal(train.size, [int(0.9 * n) for n in whole])
    assert whole.min() >= 50 and len(whole) == 30
    for part in (train, test):
        data.check(part, num_classes=10)
        assert part.examples["x"].dtype == jnp.float32 and part.examples["y"].dtype == jnp.int32
        assert part.examples["x"].shape == (int(part.size.sum()), 60)


def test_sizes_are_lognormal_past_fifty():
    train, test = synthetic(jax.random.key(0), 0.0, 0.0, num_clients=400)
    past = np.asarray(train.size) + np.asarray(test.size) - 50
    assert stats.kstest(past + 0.5, stats.lognorm(2.0, scale=np.exp(4.0)).cdf).pvalue > 1e-3
    assert stats.kstest(past + 0.5, stats.lognorm(1.4, scale=np.exp(4.0)).cdf).pvalue < 1e-3


def test_pfedmes_sizes_are_five_times_as_large():
    (train, test), (five, rest) = (synthetic(jax.random.key(0), 0.5, 0.5, size_factor=f, num_clients=9) for f in (1, 5))
    np.testing.assert_array_equal(five.size + rest.size, 5 * (train.size + test.size))


@pytest.mark.parametrize("alpha_beta", MANY)
def test_rows_vary_as_j_to_the_minus_1_2_around_their_clients_mean(alpha_beta):
    population = MANY[alpha_beta]
    x = np.asarray(population.examples["x"], np.float64)
    who = data.owner(population)
    variance = ((x - means_of(population)[who]) ** 2).sum(0) / (len(x) - len(population.size))
    expected = np.arange(1, 61) ** -1.2
    error = expected * np.sqrt(2 / len(x))
    assert np.all(np.abs(variance - expected) < 5 * error)
    assert np.any(np.abs(variance - np.arange(1, 61) ** -1.0) > 5 * error)


@pytest.mark.parametrize(("alpha_beta", "beta"), [((0, 0), 0.0), ((0.5, 2), 2.0)])
def test_beta_is_the_standard_deviation_of_clients_means_and_no_variance(alpha_beta, beta):
    centre = means_of(MANY[alpha_beta]).mean(1)  # B_k and the mean of 60 numbers N(0, 1)
    variance = beta**2 + 1 / 60
    found = centre.var(ddof=1)
    error = variance * np.sqrt(2 / 299)
    assert abs(found - variance) < 4 * error
    assert beta == 0 or abs(found - beta - 1 / 60) > 4 * error


def test_coordinates_of_a_clients_mean_have_variance_one_around_it():
    means = means_of(MANY[0, 0])
    within = means.var(axis=1, ddof=1).mean()
    noise = (np.arange(1, 61) ** -1.2).mean() * (1 / np.asarray(MANY[0, 0].size)).mean()
    assert abs(within - 1 - noise) < 4 * np.sqrt(2 / (300 * 59))


def test_labels_are_those_of_a_linear_model_of_the_clients_own():
    """A least-squares fit of one client's labels predicts that client, and nobody else, almost perfectly."""
    train, test = synthetic(jax.random.key(0), 0.0, 0.0, num_clients=4, size_factor=40)

    def rows(population, i):
        own = data.client(population, i)
        return np.c_[own["x"], np.ones(len(own["y"]))], own["y"]

    def fit(i):
        x, y = rows(train, i)
        return np.linalg.lstsq(x, np.eye(10)[y], rcond=None)[0]

    def accuracy(w, i):
        x, y = rows(test, i)
        return np.mean((x @ w).argmax(1) == y)

    own = [accuracy(fit(i), i) for i in range(4)]
    others = [accuracy(fit(i), (i + 1) % 4) for i in range(4)]
    assert min(own) > 0.7 and np.mean(others) < 0.5


def test_clients_of_the_iid_set_share_their_model_and_their_rows_have_mean_zero():
    train, _ = synthetic_iid(jax.random.key(0), num_clients=10)
    x, y = np.asarray(train.examples["x"]), np.asarray(train.examples["y"])
    assert np.all(np.abs(x.mean(0)) < 5 * np.arange(1, 61) ** -0.6 / np.sqrt(len(x)))
    share = np.array([np.bincount(data.client(train, i)["y"], minlength=10) for i in range(10)])
    whole = share.sum(0) / share.sum()
    for one in share:
        assert np.all(np.abs(one - one.sum() * whole) < 5 * np.sqrt(one.sum() * whole * (1 - whole)) + 1)
    assert y.max() < 10


def test_alpha_changes_no_label_as_it_shifts_all_logits_of_a_client_alike():
    zero, five = (synthetic(jax.random.key(0), alpha, 0.5)[0] for alpha in (0.0, 5.0))
    jax.tree.map(np.testing.assert_array_equal, zero, five)


# quadratics


QUADRATICS = {
    "plain": {"dissimilarity": 2.0},
    "alike": {"dissimilarity": 0.0},
    "one curvature": {"dissimilarity": 1.0, "hessian_dissimilarity": 0.0},
    "half": {"dissimilarity": 1.0, "hessian_dissimilarity": 0.5, "curvature": (0.01, 2.0)},
    "noisy": {"dissimilarity": 3.0, "noise": 0.7, "examples_per_client": 5},
}
D = 4


def exact(name, num_clients=6):
    """Numbers in float64, per client: A [N, D, D], b [N, n, D]; and the optimum."""
    population, optimum = quadratics(jax.random.key(2), num_clients=num_clients, dimension=D, **QUADRATICS[name])
    rows = {key: np.asarray(leaf, np.float64) for key, leaf in population.examples.items()}
    b = rows["b"].reshape(num_clients, -1, D)
    a = rows["A"].reshape(*b.shape[:2], D, D)
    assert np.all(a == a[:, :1])
    return a[:, 0], b, np.asarray(optimum, np.float64)


def settings(name):
    return {"curvature": (0.1, 1.0), "noise": 0.0, "hessian_dissimilarity": 1.0} | QUADRATICS[name]


quadratic = pytest.mark.parametrize("name", QUADRATICS)


@quadratic
def test_at_the_optimum_gradients_cancel_and_have_their_dissimilarity(name):
    a, b, x = exact(name)
    gradients = np.einsum("nij,nj->ni", a, x - b.mean(1))
    assert np.linalg.norm(gradients.mean(0)) < 1e-5
    assert np.mean(np.sum(gradients**2, 1)) == pytest.approx(settings(name)["dissimilarity"] ** 2, abs=1e-4)


@quadratic
def test_curvatures_lie_where_they_should(name):
    a, _, _ = exact(name)
    mu, smoothness = settings(name)["curvature"]
    found = np.linalg.eigvalsh(a)
    assert found.min() > mu - 1e-5 and found.max() < smoothness + 1e-5
    if settings(name)["hessian_dissimilarity"] in (0.0, 1.0):
        np.testing.assert_allclose(found, np.tile(np.geomspace(mu, smoothness, D), (6, 1)), rtol=1e-4)
    assert (np.ptp(a, axis=0).max() < 1e-6) == (settings(name)["hessian_dissimilarity"] == 0.0)


@quadratic
def test_examples_deviate_from_their_client_by_the_noise(name):
    a, b, x = exact(name)
    deviation = np.einsum("nij,nej->nei", a, b.mean(1, keepdims=True) - b)
    np.testing.assert_allclose(np.mean(np.sum(deviation**2, 2), 1), settings(name)["noise"] ** 2, atol=1e-4)


@quadratic
def test_the_loss_is_the_formula(name):
    a, b, _ = exact(name)
    x = np.array([0.3, -1.0, 2.0, 0.5])
    population, _ = quadratics(jax.random.key(2), num_clients=6, dimension=D, **QUADRATICS[name])
    expected = np.einsum("nei,nij,nej->ne", x - b, a, x - b).ravel() / 2
    found = quadratic_loss(jnp.asarray(x, jnp.float32), population.examples, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_curvature_and_optimum_do_not_depend_on_dissimilarity_or_noise():
    small, large = (
        quadratics(jax.random.key(0), num_clients=3, dimension=D, dissimilarity=g, noise=g, examples_per_client=2)
        for g in (0.1, 5.0)
    )
    np.testing.assert_array_equal(small[0].examples["A"], large[0].examples["A"])
    np.testing.assert_allclose(small[1], large[1], atol=1e-4)


def test_quadratics_are_a_function_of_their_key():
    one, same, other = (quadratics(jax.random.key(k), num_clients=3, dimension=D, dissimilarity=1.0) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.abs(one[1] - other[1]).max() > 0.1


def test_quadratics_favour_no_direction():
    population, _ = quadratics(
        jax.random.key(5), num_clients=3000, dimension=3, dissimilarity=1.0, curvature=(1.0, 4.0)
    )
    diagonal = np.diagonal(np.asarray(population.examples["A"]), axis1=1, axis2=2)
    assert np.all(np.abs(diagonal.mean(0) - 7 / 3) < 4 * diagonal.std(0) / np.sqrt(3000))


def fixed_point(**options):
    """How far from the optimum FedAvg of ten local steps comes to rest."""
    population, optimum = quadratics(jax.random.key(0), num_clients=6, dimension=D, **options)
    work = local.sgd(quadratic_loss, optax.sgd(0.5), batch_size=1, epochs=10)
    method = algorithms.fedavg(work, client_map=clients.vectorised(max_steps=10))
    state, _ = run.scan_rounds(
        method, sampling.full(steps=work.steps), population, method.init(jnp.zeros(D)), jax.random.key(0), rounds=300
    )
    return float(jnp.linalg.norm(state.params - optimum))


def test_fedavg_comes_to_rest_away_from_the_optimum_in_proportion_to_the_dissimilarity():
    one, three = fixed_point(dissimilarity=1.0), fixed_point(dissimilarity=3.0)
    assert one > 0.05 and three == pytest.approx(3 * one, rel=1e-3)
    assert fixed_point(dissimilarity=0.0) < 1e-4
    assert fixed_point(dissimilarity=3.0, hessian_dissimilarity=0.0) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: synthetic(key, -1, 0), r"synthetic\(alpha=-1\): alpha must be a finite number of at least 0"),
        (lambda key: synthetic(key, 0, np.inf), r"synthetic\(beta=inf\)"),
        (lambda key: synthetic(key, 0, 0, num_clients=0), r"synthetic\(num_clients=0\)"),
        (lambda key: synthetic_iid(key, size_factor=0.5), r"synthetic_iid\(size_factor=0.5\)"),
        (lambda key: synthetic(0, 0, 0), r"synthetic\(key=0\): key must be a single new-style key"),
    ]
    + [
        (
            lambda key, o=options: quadratics(key, **{"num_clients": 2, "dimension": 2, "dissimilarity": 1.0} | o),
            message,
        )
        for options, message in [
            ({"num_clients": 0}, r"quadratics\(num_clients=0\)"),
            ({"num_clients": 1}, r"quadratics\(dissimilarity=1.0\): what sums to 0 takes two; raise num_clients"),
            ({"dimension": 0}, r"quadratics\(dimension=0\)"),
            ({"dissimilarity": -1}, r"quadratics\(dissimilarity=-1\)"),
            ({"curvature": (0, 1)}, r"quadratics\(curvature=\(0, 1\)\): needs 0 < mu <= L"),
            ({"hessian_dissimilarity": 2}, r"quadratics\(hessian_dissimilarity=2\)"),
            ({"noise": 1.0}, r"quadratics\(noise=1.0\): what sums to 0 takes two; raise examples_per_client"),
        ]
    ],
)
def test_what_cannot_be_generated_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(jax.random.key(0))


def test_sizes_spread_by_the_sigma_asked_for():
    train, test = synthetic(jax.random.key(0), 1.0, 1.0, num_clients=400, size_sigma=0.8)
    size = np.asarray(train.size + test.size, float)
    assert size.mean() == pytest.approx(50 + np.exp(4 + 0.8**2 / 2), rel=0.1)
    assert size.std() == pytest.approx(np.exp(4 + 0.8**2 / 2) * np.sqrt(np.exp(0.8**2) - 1), rel=0.2)
    alike, rest = synthetic(jax.random.key(0), 1.0, 1.0, size_sigma=0.0)
    assert set(np.asarray(alike.size + rest.size).tolist()) <= {103, 104}
    with pytest.raises(ValueError, match=r"synthetic\(size_sigma=-1\)"):
        synthetic(jax.random.key(0), 1.0, 1.0, size_sigma=-1)
