"""Numbers that must not change between versions of JAX, Python or the kit, to 1e-5.

Made with `python tests/test_golden.py` on Python 3.11, jax 0.10.2, CPU; that prints them anew. They
stand for everything a run draws: sampling, order of batches, the key of each client.
"""

import jax
import numpy as np
import optax
import problem

from jfed import data, local, models, run, sampling
from jfed.algorithms import fedadam, fedavg
from jfed.clients import lanes

GOLDEN = {
    "w": [
        [0.723950982093811, -0.19394299387931824, -0.08030100166797638],
        [0.12758199870586395, 0.3588100075721741, -0.35303300619125366],
        [0.3004780113697052, -0.4207499921321869, 0.5563769936561584],
        [0.07916700094938278, 0.5478469729423523, -0.3711310029029846],
    ],
    "b": [-0.09823200106620789, 0.2591699957847595, -0.22953100502490997],
    "loss": [
        1.1000100374221802,
        1.1011489629745483,
        1.0215740203857422,
        0.9772509932518005,
        0.9206529855728149,
        0.9671800136566162,
        0.7931010127067566,
        0.9078850150108337,
        0.9603080153465271,
        0.9186819791793823,
    ],
    "steps": [16, 24, 18, 14, 18, 18, 16, 18, 20, 14],
    "cnn": [2.695094108581543, 4.0310139656066895],
    "gru": [2.279803991317749, 2.276777982711792],
    "sizes": [11, 26, 16, 15, 29, 10, 26, 27, 26, 14],
}


def one_network(model, x):
    """Mean loss of a network as it starts, and after a round of three clients: [2]."""
    shape = x.shape[:1] if x.ndim == 4 else x.shape  # a label an image, or a label a token
    y = np.arange(np.prod(shape)).reshape(shape) % 10
    population = data.population({"x": x, "y": y.astype(np.int32)}, [1, 3, 2])
    work = local.sgd(models.cross_entropy(model), optax.sgd(0.1), batch_size=2)
    method = fedavg(work, client_map=lanes(2))
    state = method.init(model.init(jax.random.key(1)))
    trained, _ = run.scan_rounds(
        method, sampling.full(steps=work.steps), population, state, jax.random.key(2), rounds=1
    )
    metrics = models.metrics(model)
    losses = [run.evaluate(metrics, s.params, population.examples)["loss"] for s in (state, trained)]
    return np.asarray(losses).round(6).tolist()


def measured():
    rng = np.random.default_rng(0)
    work = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4, epochs=2)
    method = fedadam(work, learning_rate=0.05, client_map=lanes(3))
    sampler = sampling.uniform(5, steps=work.steps)
    state, metrics = run.scan_rounds(
        method, sampler, problem.POPULATION, method.init(problem.PARAMS), jax.random.key(42), rounds=10
    )
    networks = {
        name: one_network(model, x)
        for name, model, x in (
            ("cnn", models.lenet_gn(), rng.uniform(size=(6, 28, 28, 1)).astype(np.float32)),
            ("gru", models.char_gru(10, hidden=8), rng.integers(0, 10, (6, 5))),
        )
    }
    owner = data.partition.dirichlet(jax.random.key(42), np.arange(200) % 10, num_clients=10, alpha=0.3)
    return {
        "w": np.asarray(state.params["w"]).round(6).tolist(),
        "b": np.asarray(state.params["b"]).round(6).tolist(),
        "loss": np.asarray(metrics["loss"]).round(6).tolist(),
        "steps": np.asarray(metrics["steps"]).tolist(),
        **networks,
        "sizes": np.bincount(owner, minlength=10).tolist(),
    }


def test_a_run_gives_the_numbers_it_always_gave():
    found = measured()
    for name, expected in GOLDEN.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    assert set(GOLDEN) == set(found)


if __name__ == "__main__":
    for name, value in measured().items():
        print(f"    {name!r}: {value},")
