"""A server and workers in processes of their own: they train what the simulation does, and none waits for the dead."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jfed import run
from jfed.core import Population
from jfed.parallel import _joining, _wire
from jfed.parallel.arrivals import recorded
from jfed.parallel.asynchronous import asynchronous
from jfed.parallel.corrections import delay_compensation
from jfed.parallel.parameter_server import serve, work

pytestmark = pytest.mark.slow  # of JAX it uses what the engine does
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import served  # noqa: E402

sys.path.pop(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(role, port, argument):
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "served.py"), role, str(port), str(argument)]
    one = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield one
    finally:
        one.kill()
        one.communicate()


def serve_here(port, *, params=None, optimizer=None, **options):
    settings = {"workers": 2, "rounds": 200, "key": served.KEY, "authkey": served.AUTHKEY, "timeout": 60.0} | options
    start = served.params() if params is None else params
    return serve(optimizer or optax.sgd(0.1), start, address=("127.0.0.1", port), **settings)


def work_here(port, *, params=None, **options):
    settings = {"batch": served.BATCH, "worker": 0, "authkey": served.AUTHKEY, "timeout": 60.0} | options
    start = served.params() if params is None else params
    return work(served.loss, start, served.examples(), address=("127.0.0.1", port), **settings)


def beside(function, *arguments, **options):
    """Runs a function in a thread; returns what waits for its result or its exception."""
    results = []

    def target():
        try:
            results.append(function(*arguments, **options))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def result():
        thread.join(90)
        assert not thread.is_alive(), "it hangs"
        return results[0]

    return result


OPTIONS = {
    "plain": {},
    "bounded, compensated, buffered": {"bound": 1, "correction": delay_compensation(0.5), "buffer": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_simulation_replays_what_real_processes_did(name):
    options, port, rows = OPTIONS[name], free_port(), []
    optimizer = optax.chain(optax.sgd(0.01, momentum=0.9), optax.contrib.reduce_on_plateau(factor=0.9, patience=10))
    with process("worker", port, 0) as one, process("slow", port, 1) as two:
        result = serve_here(port, optimizer=optimizer, report=lambda t, row, params: rows.append((t, row)), **options)
        counts = [int(worker.communicate(timeout=60)[0]) for worker in (one, two)]
    trace = result.trace
    assert sum(counts) == 200 and np.array_equal(np.bincount(trace.worker), counts) and min(counts) > 0
    assert result.lost == () and [t for t, _ in rows] == list(range(1, 201))

    engine = {name: options[name] for name in ("correction", "buffer") if name in options}
    method = asynchronous(served.loss, optimizer, workers=2, arrivals=recorded(trace), batch=served.BATCH, **engine)
    population = Population(served.examples(), jnp.array([0]), jnp.array([200]))
    state, metrics = run.scan_rounds(
        method, lambda p, key, t: p.examples, population, method.init(served.params()), served.KEY, rounds=200
    )
    np.testing.assert_allclose(result.losses, metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result.params, method.params(state)
    )
    assert optax.tree.get(state.server.optimizer, "scale") < 1  # so that it was told the losses
    np.testing.assert_array_equal([row["staleness"] for _, row in rows], metrics["staleness"])
    assert result.losses[-50:].mean() < 0.7 * result.losses[:50].mean()
    if "bound" in options:
        sent = np.cumsum(trace.worker[:, None] == np.arange(2), axis=0)
        ahead = sent - sent.min(1, keepdims=True)
        assert ahead[trace.fetched].max() <= options["bound"] and (~trace.fetched.any(1)).any()


def test_the_others_go_on_without_a_killed_worker():
    port, when = free_port(), {}
    with process("worker", port, 0) as one, process("worker", port, 1) as two:

        def report(t, row, params):
            if t == 30:
                two.kill()
                when["killed"] = time.monotonic()
            if row["worker"] == 1:
                when["last"] = t

        with pytest.warns(UserWarning, match=r"worker 1 was lost after \d+ of 4000 gradients; going on with 1 of 2"):
            # In lockstep, so that the living would wait for the dead.
            result = serve_here(port, rounds=4000, bound=0, report=report)
        assert time.monotonic() - when["killed"] < 30
        assert result.lost == (1,) and when["last"] < 40 and result.trace.worker.size == 4000
        assert one.wait(30) == 0


def test_without_its_last_worker_the_server_says_so_in_seconds():
    port, killed = free_port(), []
    with process("worker", port, 0) as one:

        def report(t, row, params):
            if t == 10:
                one.kill()
                killed.append(time.monotonic())

        with pytest.raises(
            ConnectionError, match=r"worker 0 was lost after \d+ of 1000000 gradients, and was the last"
        ):
            serve_here(port, workers=1, rounds=10**6, report=report)
        assert time.monotonic() - killed[0] < 5


def test_a_worker_says_in_seconds_that_the_server_is_gone():
    port = free_port()
    with process("server", port, 10**7) as server:
        result = beside(work_here, port)
        assert server.stdout.readline() == "busy\n"
        server.kill()
        killed = time.monotonic()
        error = result()
        assert time.monotonic() - killed < 5
    assert isinstance(error, ConnectionError) and "the server was lost after" in str(error)


def test_a_silent_worker_is_given_up():
    port = free_port()
    with process("worker", port, 0) as one:

        def report(t, row, params):
            if t == 10:
                one.send_signal(signal.SIGSTOP)  # neither dead nor working

        with pytest.raises(ConnectionError, match="worker 0 has been silent for 6 s after"):
            serve_here(port, workers=1, rounds=10**6, report=report, timeout=6.0)


def test_a_long_report_costs_no_worker_and_is_given_the_model():
    port, seen = free_port(), []

    def report(t, row, params):
        seen.append(params())
        if t == 5:
            time.sleep(8)  # longer than anybody's patience

    workers = [beside(work_here, port, worker=worker, timeout=5.0) for worker in range(2)]
    result = serve_here(port, rounds=20, timeout=6.0, report=report)
    assert result.lost == () and sum(worker() for worker in workers) == 20
    jax.tree.map(np.testing.assert_array_equal, seen[-1], result.params)
    assert len({float(params["out"][0]) for params in seen}) == 20


def test_a_gradient_that_takes_longer_than_news_does_is_still_sent():
    port = free_port()
    worker = beside(work_here, port, batch=served.slowly(1.5))
    assert serve_here(port, workers=1, rounds=2).losses.shape == (2,) and worker() == 2


def test_who_computes_when_the_server_has_enough_and_leaves_is_told_so(monkeypatch):
    port, wide = free_port(), served.params(2**18)  # more than the kernel takes off a sender's hands
    monkeypatch.setattr(_joining, "_GOODBYE", 0.1)
    fast = beside(work_here, port, params=wide)
    slow = beside(work_here, port, params=wide, worker=1, batch=served.slowly(2.5))
    result = serve_here(port, params=wide, rounds=5)
    assert result.lost == () and fast() == 5 and slow() == 0


MODELS = {
    "nothing": ({}, lambda p, x, key: x),
    "bfloat16, and a part without numbers": (
        {"w": jnp.ones(3, jnp.bfloat16), "none": None, "empty": jnp.zeros((0, 2))},
        lambda p, x, key: jnp.mean(p["w"]) * x,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_any_leaves_are_served(name):
    (params, loss), port = MODELS[name], free_port()
    place = {"address": ("127.0.0.1", port), "authkey": b"x"}
    options = place | {"batch": lambda x, key, worker: x, "worker": 0}
    worker = beside(work, loss, params, jnp.ones(2), **options)
    result = serve(optax.sgd(0.75), params, workers=1, rounds=2, buffer=2, key=served.KEY, **place)
    assert worker() == 2
    np.testing.assert_array_equal(result.losses, [1, 1])
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    if params:
        assert result.params["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(result.params["w"].astype(float), 0.75)


def test_a_loss_of_any_size_fits_a_message():
    here, there = multiprocessing.Pipe()
    with here, there:
        _wire.send(here, _wire.GRADIENT, 3, 1e300)
        assert _wire.receive(there).value == 1e300


def test_models_that_differ_after_what_a_message_holds_are_told_apart():
    def described(width):
        return _wire.describe([np.zeros(3)] * 9000 + [np.zeros(width)])

    assert len(described(1)) == 2**16 and described(1)[32:] == described(2)[32:]
    assert _wire.difference(described(1), described(1)) == ""
    assert "too many to name" in _wire.difference(described(1), described(2))


def test_the_wrong_are_turned_away_with_reasons_and_the_right_worker_joins():
    port = free_port()
    with pytest.warns(UserWarning, match="turned away|did not speak") as warned:
        server = beside(serve_here, port, workers=1, rounds=3)
        with pytest.raises(ConnectionError, match="has another authkey; give both the same"):
            work_here(port, authkey=b"wrong")
        with pytest.raises(
            ConnectionError, match=r"params have \['in'\] float32\[10, 16\] and not \['in'\] float32\[10, 8\]"
        ):
            work_here(port, params=served.params(8))
        with pytest.raises(ConnectionError, match="the server has workers 0 to 0"):
            work_here(port, worker=1)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert work_here(port) == 3
        assert server().losses.shape == (3,)
    messages = [str(one.message) for one in warned]
    assert len(messages) == 4 and all("\n" not in message for message in messages)


def test_nobody_waits_for_ever_to_meet():
    port = free_port()
    with pytest.raises(ConnectionError, match="no parameter server answers there .*; start serve"):
        work_here(port, timeout=0.5)
    with pytest.raises(ConnectionError, match=r"workers \[0, 1\] did not join within 0.5 s"):
        serve_here(port, timeout=0.5)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(ConnectionError, match="cannot listen there"):
            serve_here(port, timeout=0.5)
        with pytest.raises(ConnectionError, match="no parameter server answers"):  # one that listens and says nothing
            work_here(port, timeout=0.5)
    with pytest.raises(ConnectionError, match="no parameter server answers"):
        work(
            served.loss,
            served.params(),
            served.examples(),
            batch=served.BATCH,
            address=("no.such.host.invalid", 5005),
            authkey=b"x",
            worker=0,
            timeout=5.0,
        )


CALLS = {
    "workers=0": lambda: serve_here(5005, workers=0),
    "rounds=0": lambda: serve_here(5005, rounds=0),
    "buffer=0": lambda: serve_here(5005, buffer=0),
    "serve(rounds=200, buffer=3): the last 2 gradients would make no step; take rounds=201": lambda: serve_here(
        5005, buffer=3
    ),
    "serve(optimizer='sgd')": lambda: serve_here(5005, optimizer="sgd"),
    "bound=-1": lambda: serve_here(5005, bound=-1),
    "serve(timeout=0": lambda: serve_here(5005, timeout=0),
    "serve(address=('127.0.0.1', 0)": lambda: serve_here(0),
    "serve(authkey=...)": lambda: serve_here(5005, authkey=""),
    "work(address=('127.0.0.1', 99999)": lambda: work_here(99999),
    "work(worker=-1)": lambda: work_here(5005, worker=-1),
    "work(timeout=-1": lambda: work_here(5005, timeout=-1),
}


@pytest.mark.parametrize("words", CALLS)
def test_bad_input_is_an_error_of_one_line(words):
    with pytest.raises(ValueError) as error:
        CALLS[words]()
    assert words in str(error.value) and "\n" not in str(error.value)
