import sys
import threading

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import problem
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problem import PARAMS, POPULATION, SIZES, examples_of

from jfed import data, ledger, local, mesh, run, sampling
from jfed.algorithms import fedavgm, federated
from jfed.clients import dealt, lanes, vectorised
from jfed.core import Algorithm

KEY = jax.random.key(2)
EXAMPLES = jax.tree.map(np.asarray, POPULATION.examples)
SOURCE = data.on_host(EXAMPLES, SIZES)
DEVICES = mesh.make((4,))
SGD = local.sgd(problem.loss, optax.sgd(0.2), batch_size=4)
METHOD = fedavgm(SGD, client_map=vectorised())
SAMPLER = sampling.uniform(5, steps=SGD.steps)
# Where training is beside the point: one gradient step a client, which compiles sooner.
QUICK_WORK = local.gradient(problem.loss)
QUICK = fedavgm(QUICK_WORK, client_map=vectorised())


def schedule(*rows):
    return sampling.schedule(np.array(rows), steps=QUICK_WORK.steps)


THREE = schedule([0, 1, 2])


def stream(method=QUICK, sampler=THREE, source=SOURCE, state=None, rounds=3, **options):
    state = method.init(PARAMS) if state is None else state
    return run.stream(method, sampler, source, state, KEY, rounds=rounds, **options)


def on_device(method, sampler, *, rounds, **options):
    return run.iterate(method, sampler, POPULATION, method.init(PARAMS), KEY, rounds=rounds, **options)


def counted(method):
    """The method, and a list that grows each time its round is traced."""
    traces = []

    def round_fn(*args):
        traces.append(1)
        return method.round(*args)

    return Algorithm(method.init, round_fn, method.params), traces


def by_client(moments):
    """The moments, with a ledger of each stretch for its slots, which lie otherwise where clients are dealt."""
    return [
        m._replace(metrics=m.metrics | {"traffic": ledger.add(ledger.empty(problem.CLIENTS), m.metrics["traffic"])})
        for m in moments
    ]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("jfed-stream")]


def test_a_streamed_run_is_the_run_on_the_device():
    expected = list(on_device(METHOD, SAMPLER, rounds=4, every=2))
    problem.close(list(stream(METHOD, SAMPLER, rounds=4, every=2)), expected, tolerance=1e-6)


def test_cohorts_go_to_the_device_that_is_the_default_where_the_run_is(monkeypatch):
    module, sent = sys.modules["jfed.run.stream"], []
    monkeypatch.setattr(module, "send", lambda *args, send=module.send: sent.append(send(*args)) or sent[-1])
    with jax.default_device(jax.devices()[3]):
        list(stream(rounds=2))
    assert {device for cohort in sent for device in cohort.ids.devices()} == {jax.devices()[3]}


def test_a_streamed_run_may_be_cut_and_taken_up_anywhere():
    whole = list(stream(METHOD, SAMPLER, rounds=5, every=2))
    half = list(stream(METHOD, SAMPLER, rounds=3, every=2))
    rest = list(stream(METHOD, SAMPLER, state=half[-1].state, rounds=5, start=3, every=2))
    assert [m.round for m in rest] == [4, 5]
    jax.tree.map(np.testing.assert_array_equal, rest[-1], whole[-1])


@pytest.mark.parametrize(
    ("shape", "names"),
    [((4,), ("clients",)), pytest.param((2, 3), ("copies", "clients"), marks=pytest.mark.slow)],
    ids=["one axis", "two axes"],
)
def test_a_run_dealt_over_devices_is_the_run_on_one(shape, names):
    devices = mesh.make(shape, names)
    method = fedavgm(QUICK_WORK, client_map=dealt(devices, lanes(2)))
    problem.close(by_client(stream(method, SAMPLER, mesh=devices)), by_client(stream(QUICK, SAMPLER)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "mime", "ifca", "fedbuff", "fedmd", "fedper", "aggregator of the stack"])
def test_methods_that_remember_broadcast_or_stack_run_dealt_over_devices(name):
    """Each sees clients or messages in another way than a plain mean does."""
    sampler = sampling.uniform(5, steps=methods.METHODS[name][0].steps)
    together, alone = methods.make(name, dealt(DEVICES, lanes(2))), methods.make(name, vectorised())
    problem.close(
        by_client(stream(together, sampler, rounds=2, every=2, mesh=DEVICES)),
        by_client(stream(alone, sampler, rounds=2, every=2)),
    )


@pytest.mark.parametrize("devices", [None, DEVICES], ids=["one device", "four devices"])
def test_no_round_but_the_first_is_traced(devices):
    """Whoever comes, few or many, and whatever state the clients keep on the mesh."""
    client_map = vectorised() if devices is None else dealt(devices, vectorised())
    method, traces = counted(
        federated(QUICK_WORK, uplink=optax.trace(0.5), num_clients=problem.CLIENTS, client_map=client_map)
    )
    sampler = schedule([0, 1, 2, 3, 4], [-1, -1, -1, -1, -1], [5, -1, 5, -1, 11], [2, 2, 2, 2, 2])
    state = method.init(PARAMS)
    if devices is not None:
        rows_apart = NamedSharding(devices, P("clients"))
        state = state._replace(uplink=jax.device_put(state.uplink, rows_apart))
    *_, last = stream(method, sampler, state=state, rounds=8, mesh=devices)
    assert len(traces) == 1
    if devices is not None:
        assert last.state.uplink.trace["w"].sharding == rows_apart
        assert last.state.params["w"].sharding == NamedSharding(devices, P())
    alone = federated(QUICK_WORK, uplink=optax.trace(0.5), num_clients=problem.CLIENTS, client_map=vectorised())
    problem.close(last.state, list(on_device(alone, sampler, rounds=8))[-1].state)


def test_a_model_that_was_a_python_number_is_traced_once_too():
    work = local.gradient(lambda w, x, key: (w - x) ** 2)
    method, traces = counted(fedavgm(work, client_map=vectorised()))
    source = data.on_host(np.arange(3, dtype=np.float32), [1, 2])
    state = method.init(0.0)
    assert len(list(stream(method, sampling.full(steps=work.steps), source, state))) == 3
    assert len(traces) == 1


def test_a_client_drawn_twice_needs_its_rows_once():
    sampler = schedule([3, 3, 3], [3, 0, 3])
    rows = int(SIZES[3] + SIZES[0])
    problem.close(list(stream(sampler=sampler, capacity=rows)), list(stream(sampler=sampler)), tolerance=1e-6)


def test_a_client_without_rows_is_not_loaded():
    size = SIZES.copy()
    size[1] = 0
    loaded = []
    source = data.from_loader(size, lambda i: loaded.append(i) or examples_of(i))
    for moment in stream(source=source):
        assert moment.metrics["reports"] == 2
    assert set(loaded) == {0, 2}


def test_sixty_four_bit_rows_become_what_jax_holds():
    wide = {"x": EXAMPLES["x"].astype(np.float64), "y": EXAMPLES["y"].astype(np.int64)}
    problem.close(list(stream(source=data.on_host(wide, SIZES))), list(stream()), tolerance=1e-6)
    wide["y"][0] += 2**32
    with pytest.raises(ValueError, match=r"stream\(client 0\): it holds int64 values beyond int32"):
        next(stream(source=data.on_host(wide, SIZES)))


def test_the_next_cohort_is_loaded_while_the_caller_has_the_turn():
    second = threading.Event()
    source = data.from_loader(SIZES, lambda i: (second.set() if i == 7 else None, examples_of(i))[1])
    moments = stream(sampler=schedule([0, 1, 2], [7, 1, 2]), source=source)
    next(moments)
    assert second.wait(timeout=60)
    moments.close()


def test_there_are_never_more_than_two_cohorts(monkeypatch):
    """While one is made, at most one of the rounds begun is still under way."""
    begun, unfinished = [], []
    module = sys.modules["jfed.run.stream"]  # the function of that name hides it
    one_round = module._one_round

    def watched(*args, **options):
        state, metrics = one_round(*args, **options)
        begun.append(metrics["waste"])
        return state, metrics

    def round_fn(state, cohort, key):
        state, metrics = QUICK.round(state, cohort, key)
        # Long enough for a caller that does not wait to get rounds ahead. Only what has products does XLA:CPU run
        # while the caller goes on.
        waste = jax.lax.fori_loop(0, 100, lambda i, x: jnp.tanh(x @ x), jnp.full((100, 100), metrics["loss"]))
        return state, metrics | {"waste": waste}

    def load(i):
        unfinished.append(sum(not waste.is_ready() for waste in begun))
        return examples_of(i)

    monkeypatch.setattr(module, "_one_round", watched)
    slow = Algorithm(QUICK.init, round_fn, QUICK.params)
    list(stream(slow, source=data.Source(SOURCE.size, SOURCE.row, load), rounds=9, every=9))
    assert max(unfinished) == 1


def test_the_thread_ends_with_the_run_or_when_it_is_closed():
    moments = stream(rounds=9)
    next(moments)
    assert threads()
    moments.close()
    assert not threads()
    list(stream(rounds=2))
    assert not threads()


def test_an_error_of_the_loader_is_its_own_and_names_the_client():
    def load(i):
        if i == 9:
            raise ConnectionError("no route")
        return examples_of(i)

    moments = stream(sampler=schedule([0, 1, 2], [3, 9, 4]), source=data.from_loader(SIZES, load))
    next(moments)
    with pytest.raises(ConnectionError, match="no route") as caught:
        next(moments)
    assert caught.value.__notes__ == ["This was raised while loading client 9."]
    assert not threads()


def test_a_loader_that_breaks_its_word_is_told_so():
    source = data.from_loader(SIZES, lambda i: examples_of(i) if i < 2 else examples_of(5))
    with pytest.raises(
        ValueError, match=r"client 2 of the source: leaf \['x'\] is float32\[9, 4\], expected .*\[5, 4\]"
    ):
        next(stream(source=source))


@pytest.mark.parametrize("devices", [None, DEVICES], ids=["one device", "four devices"])
def test_a_cohort_beyond_the_capacity_is_refused_by_name(devices):
    moments = stream(sampler=schedule([0, 1], [3, 10]), capacity=8, mesh=devices)
    next(moments)
    with pytest.raises(ValueError, match=r"stream\(capacity=8\): the cohort of round 1 needs 1[23] rows on one device"):
        next(moments)


def arriving(count):
    return (examples_of(i) for i in range(count))


OF_THREE = {"cohort_size": 3, "capacity": 31, "steps": QUICK_WORK.steps}


def test_clients_that_arrive_are_the_cohorts_of_a_schedule():
    """Eleven clients: the last of four cohorts has an empty slot."""
    in_turn = np.append(np.arange(11), -1).reshape(4, 3)
    expected = list(on_device(QUICK, sampling.schedule(in_turn, steps=QUICK_WORK.steps), rounds=4, every=4))
    state = QUICK.init(PARAMS)
    method, traces = counted(QUICK)
    moments = list(run.stream_clients(method, arriving(11), state, KEY, every=4, **OF_THREE))
    problem.close(by_client(moments), by_client(expected), tolerance=1e-6)
    assert len(traces) == 1


def test_a_run_over_arriving_clients_goes_on_where_it_ended():
    whole = list(run.stream_clients(QUICK, arriving(9), QUICK.init(PARAMS), KEY, **OF_THREE))
    clients = (examples_of(i) for i in range(6, 9))
    rest = list(run.stream_clients(QUICK, clients, whole[1].state, KEY, start=2, **OF_THREE))
    jax.tree.map(np.testing.assert_array_equal, rest, whole[2:])


def test_no_client_at_all_is_a_run_of_no_rounds():
    assert list(run.stream_clients(QUICK, [], QUICK.init(PARAMS), KEY, **OF_THREE)) == []


def test_no_more_than_two_cohorts_of_arriving_clients_are_taken():
    taken = []
    clients = (taken.append(i) or examples_of(i) for i in range(12))
    moments = run.stream_clients(QUICK, clients, QUICK.init(PARAMS), KEY, **OF_THREE)
    next(moments)
    moments.close()
    assert len(taken) == 6


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([examples_of(3), examples_of(3), examples_of(5)], r"capacity=31\): the cohort of round 0 has 33 rows"),
        ([examples_of(0), {"x": np.ones((2, 4))}], r"stream_clients\(client 1\): its structure"),
        ([examples_of(0), {"x": np.ones((2, 4)), "y": np.ones(2)}], r"client 1\): leaf \['x'\] is float64\[2, 4\]"),
        ([{}], r"stream_clients\(client 0\): a client must be a tree of arrays"),
    ],
)
def test_arriving_clients_that_do_not_fit_are_refused(clients, message):
    with pytest.raises(ValueError, match=message):
        next(run.stream_clients(QUICK, clients, QUICK.init(PARAMS), KEY, **OF_THREE))


def stream_clients(**options):
    return run.stream_clients(QUICK, [], None, KEY, **OF_THREE | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream(rounds=0), r"stream\(rounds=0\): rounds must be"),
        (lambda: stream(every=0), r"stream\(every=0\)"),
        (lambda: stream(start=4), r"stream\(start=4\): start must lie in \[0, 3\]"),
        (lambda: stream(capacity=0), r"stream\(capacity=0\): .* at least 1; 31 is enough for any cohort"),
        (lambda: stream(capacity=2**31), r"stream\(capacity=2147483648\): 1 buffers of that many rows are more"),
        (lambda: stream(mesh=DEVICES, axis="x"), r"stream\(axis='x'\): the mesh has axes \('clients',\)"),
        (lambda: stream(source=POPULATION), r"stream\(source=Population\): must be a Source"),
        (lambda: stream(sampler=sampling.uniform(13, steps=QUICK_WORK.steps)), r"uniform\(cohort_size=13\)"),
        (lambda: stream_clients(cohort_size=0), r"stream_clients\(cohort_size=0\)"),
        (lambda: stream_clients(capacity=0), r"stream_clients\(capacity=0\)"),
        (lambda: stream_clients(every=0), r"stream_clients\(every=0\)"),
        (lambda: stream_clients(start=-1), r"stream_clients\(start=-1\)"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(call, message):
    with pytest.raises(ValueError, match=message):
        call()
