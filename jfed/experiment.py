"""What every experiment script shares: its command line, its seeds, its recorded runs.

out/config.json  out/summary.json            the experiment: means over seeds
out/seed_0/ ...                              one run folder a seed (`jfed.report`)
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jfed import _machine, _validate, checkpoint, clients, ledger, mesh, plot, report
from jfed.core import Algorithm, ClientMap, Population, Sampler, Tree
from jfed.data import Source
from jfed.run import iterate, stream

_BINS = np.linspace(0, 100, 21)  # per cent


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment; its own settings are the fields that a subclass adds."""

    out: Path | None = None
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Take up the run in the folder `out`."""
    seeds: int = 1
    """Repeat with this many seeds and report means."""
    smoke: bool = False
    """A few seconds on embedded data, to see that everything works."""


def cli(main: Callable[[Any], None], options: type[Options], *, smoke: dict[str, Any]) -> None:
    """Reads the command line into `options` and calls `main` with it.

    Compiled programs are kept in the cache folder, unless JAX is told of another, so that a second run starts sooner,
    and each CPU core is a device of its own (`jfed.mesh.use_cores`).

    A `ValueError`, a missing file or a failed download ends the script with its one line;
    JFED_TRACEBACK=1 shows where it was raised.

    Args:
      main: does the work.
      options: a frozen dataclass derived from `Options`.
      smoke: the settings that `--smoke` replaces where they were not given.
    """
    import tyro

    chosen = tyro.cli(options, description=sys.modules[options.__module__].__doc__)
    if chosen.smoke:
        untouched = {name: value for name, value in smoke.items() if getattr(chosen, name) == getattr(options, name)}
        chosen = dataclasses.replace(chosen, **untouched)
    mesh.use_cores()
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(_machine.cache_folder() / "compiled"))
    try:
        main(chosen)
    except (ValueError, OSError) as error:
        alone = not jax.distributed.is_initialized()
        if os.environ.get("JFED_TRACEBACK"):
            if alone:
                raise
            traceback.print_exc()
        elif alone:
            sys.exit(f"error: {error}")
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # on the way out JAX would wait for the others, of whom one may be gone


def over_devices(client_map: ClientMap) -> tuple[ClientMap, Callable[[Tree], Tree]]:
    """Deals clients to all devices there are, each of which runs `client_map`.

    Returns:
      `(client_map, place)`: the map over devices, and what puts a tree on each of them: state, key and
      population belong there before the first round. With a single device, the map itself.
    """
    if jax.device_count() == 1:
        return client_map, lambda tree: tree
    devices = mesh.make()
    return clients.sharded(devices, client_map), lambda tree: mesh.replicate(tree, devices)


def over_seeds(
    name: str, options: Options, one_seed: Callable[[report.Run, jax.Array], dict[str, Any]]
) -> tuple[report.Run, dict[str, Any]]:
    """Runs `one_seed` for every seed, each in a folder of its own, skipping those already finished.

    Resuming with more seeds adds them. An experiment that fails before anything was recorded leaves
    no folder behind.

    Args:
      name: of the experiment; names the default folder.
      options: of the experiment; all but `out`, `resume` and `seeds` must agree when a run is resumed.
      one_seed: given its open run folder and its key, does the work and returns its summary.

    Returns:
      `(run, summary)`: the experiment's own folder, and over seeds the mean of every number (and,
      under `<name>_std`, its sample standard deviation if there are several seeds). Hand both to
      `conclude` or `report.finish` when everything else is done.

    Raises:
      ValueError: if `seeds` is not a whole number of at least 1, if `resume` comes without `out`, or
        as in `report.open_run`.
    """
    whole, settings, new = _open(name, options, ("out", "resume", "seeds"))
    summaries = []
    try:
        for seed in range(options.seeds):
            run = report.open_run(whole.folder / f"seed_{seed}", settings | {"seed": seed}, resume=True)
            # Of many processes only the first can count on the file.
            summary = run.summary or report.finish(run, one_seed(run, jax.random.key(seed)), show=False)
            summaries.append(summary)
    except (ValueError, OSError):
        if new and whole.writer and not any(report.rows(folder) for folder in whole.folder.glob("seed_*")):
            shutil.rmtree(whole.folder)
        raise
    return whole, _mean(summaries)


def over_cells(
    name: str, options: Options, cells: Mapping[str, Callable[[], Mapping[str, Any]]]
) -> tuple[report.Run, dict[str, dict[str, Any]]]:
    """Computes the cells of a table one after another, each into a folder of its own, skipping finished ones.

    For experiments that compare: a cell is a method in a setting, over all its seeds (`run.sweep`), and what it
    returns is kept, so that a run killed half-way and resumed goes on with the next cell.

    Args:
      name: of the experiment; names the default folder.
      options: of the experiment; all but `out` and `resume` must agree when a run is resumed.
      cells: for each name of a cell, fit for a folder, what computes its numbers, words and lists of them.

    Returns:
      `(run, results)`: the experiment's own folder, and what each cell returned.

    Raises:
      ValueError: if a name of a cell cannot be a folder's, if `resume` comes without `out`, or as in `report.open_run`.
    """
    if odd := [cell for cell in cells if Path(cell).name != cell or cell in (".", "..")]:
        raise ValueError(f"over_cells(cells={odd}): each names a folder; leave out slashes.")
    whole, settings, new = _open(name, options, ("out", "resume"))
    results: dict[str, dict[str, Any]] = {}
    try:
        with report.progress(len(cells), name, unit="cells", writer=whole.writer) as advance:
            for cell, compute in cells.items():
                run = report.open_run(whole.folder / cell, settings | {"cell": cell}, resume=True)
                results[cell] = run.summary or report.finish(run, compute(), show=False)
                advance(1)
    except (ValueError, OSError):
        if new and whole.writer and not any(whole.folder.glob("*/summary.json")):
            shutil.rmtree(whole.folder)
        raise
    return whole, results


def fairness(run: report.Run, accuracies: Any, *, judged_on: str) -> dict[str, float]:
    """How evenly a seed's model serves the clients: a picture, and the entries of the summary that `conclude` shows.

    Args:
      run: the seed's folder, which gets `clients.png`, the distribution.
      accuracies: [N], between 0 and 1, as `run.evaluate_clients` has them; NaN for a client with nothing to judge.
      judged_on: what they were taken on, in words, such as `"the client's test images"`.

    Returns:
      `{"clients_mean", "clients_worst_tenth", "clients_best_tenth", "clients_variance"}`, of per cents: see
      `report.fairness`.
    """
    percent = 100 * np.asarray(accuracies, float)
    plot.plot_distribution(
        run.folder / "clients.png", percent, xlabel=f"accuracy on {judged_on}, %", title="Clients", bins=_BINS
    )
    return {f"clients_{name}": value for name, value in report.fairness(percent).items()}


def conclude(run: report.Run, title: str, shown: dict[str, str], summary: dict[str, Any]) -> None:
    """Ends an experiment: a table of what was found and how evenly, where its files are, and the line of JSON.

    Args:
      run: the experiment's folder, from `over_seeds`.
      title: of the table.
      shown: what a person wants to see, in words.
      summary: what `summary.json` shall hold, from `over_seeds`.
    """
    evenness = {
        f"{what} of clients" if what != "variance" else "variance over clients": f"{summary[name]:.1f}{unit}"
        for what, unit in (("mean", " %"), ("worst 10 %", " %"), ("best 10 %", " %"), ("variance", ""))
        if (name := f"clients_{what.replace(' 10 %', '_tenth')}") in summary
    }
    shown = shown | evenness
    shown |= {
        "sent by clients": report.human_bytes(summary["bytes_up"]),
        "sent to clients": report.human_bytes(summary["bytes_down"]),
        "training time": report.human_seconds(summary["seconds"]),
        "pictures and metrics": str(run.folder),
    }
    print(report.table(title, [{"": name, "result": value} for name, value in shown.items()]), "\n")
    report.finish(run, summary)


def record(
    run: report.Run,
    algorithm: Algorithm,
    sampler: Sampler,
    population: Population | Source,
    params: Tree,
    key: jax.Array,
    *,
    rounds: int,
    every: int = 1,
    judge: Callable[[Tree], dict[str, Any]] = lambda params: {},
    description: str = "training",
    streaming: dict[str, Any] | None = None,
) -> Iterator[tuple[dict, Tree]]:
    """Like `run.iterate`, or `run.stream`, with a progress bar, metrics, checkpoints and a ledger in a run folder.

    A run killed at any moment and called again with the same arguments takes up its last checkpoint
    and ends in the same bits. The first yield of a resumed run repeats the row it stopped at.

    A row holds `round`; the judge's results; `train_loss`, the algorithm's last `loss`; the sums since
    the row before of its `reports`, `dropped` and `steps`, where it has such metrics; `bytes_up` and
    `bytes_down`, sent by and to all clients since the run began; and `seconds` spent, resumed parts
    added up. At the end `bytes_by_client.csv` says what each client sent and was sent.

    Args:
      run: from `report.open_run(..., resume=...)`.
      algorithm: the method.
      sampler: `(population, key, t) -> Cohort`.
      population: the data of all clients, on the device or, as a `Source`, on the host.
      params: the initial model.
      key: the run's key.
      rounds: T.
      every: rounds between rows.
      judge: maps the model to numbers worth a column, such as test accuracy.
      description: a word or two for the bar.
      streaming: with a `Source`, which of `run.stream`'s `capacity`, `mesh` and `axis` to set.

    Yields:
      `(row, params)` after each stretch of `every` rounds.

    Raises:
      ValueError: if the run's last checkpoint is damaged or belongs to another run, or `streaming` is given
        for a population on the device.
      ConnectionError: if another process of the run is gone.
    """
    if streaming and not isinstance(population, Source):
        raise ValueError(
            f"record(streaming={streaming}): the population is on the device; leave it out, or pass a Source."
        )
    state, start = algorithm.init(params), 0
    sent = ledger.empty(population.size.shape[0])
    row = {"round": 0, "bytes_up": 0, "bytes_down": 0, "seconds": 0.0}
    if checkpoint.latest(run.checkpoints) is not None:
        start, saved = checkpoint.restore(run.checkpoints, {"state": state, "key": key, "ledger": sent})
        if not np.array_equal(jax.random.key_data(saved["key"]), jax.random.key_data(key)):
            raise ValueError(
                f"record({run.folder}): its checkpoint was made with another key; resume with that key, "
                "or choose another folder."
            )
        state, sent = saved["state"], saved["ledger"]
    report.rewind(run, start)
    if start:
        row = report.rows(run.folder)[-1]
        yield row, algorithm.params(state)
    if start == rounds:
        return

    how = {"rounds": rounds, "start": start, "every": every} | (streaming or {})
    runs = stream if isinstance(population, Source) else iterate
    moments = runs(algorithm, sampler, population, state, key, **how)
    began = time.monotonic() - row["seconds"]
    with _peers(run), report.progress(rounds, description, start=start, writer=run.writer) as advance:
        for moment in moments:
            done = moment.round - row["round"]
            if "traffic" in moment.metrics:
                sent = ledger.add(sent, moment.metrics["traffic"])
            row = {
                "round": moment.round,
                **{name: float(value) for name, value in judge(algorithm.params(moment.state)).items()},
                **_totals(moment.metrics),
                "bytes_up": int(sent.up.sum()),
                "bytes_down": int(sent.down.sum()),
                "seconds": round(time.monotonic() - began, 3),
            }
            report.log(run, row)
            if moment.round == rounds and run.writer:
                ledger.write(sent, run.folder)
            checkpoint.save(run.checkpoints, moment.round, {"state": moment.state, "key": key, "ledger": sent})
            shown = {name: row[name] for name in ("loss", "accuracy", "dropped") if row.get(name)}
            advance(done, **shown)
            yield row, algorithm.params(moment.state)


@contextlib.contextmanager
def _peers(run: report.Run) -> Iterator[None]:
    """Says of an error that it is another process's end, and what helps."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        if jax.process_count() == 1 or not mesh.lost_process(error):
            raise
        done = checkpoint.latest(run.checkpoints)
        raise ConnectionError(
            f"record({run.folder}): another process of this run is gone, says process {jax.process_index()} "
            f"({str(error).splitlines()[0]}); start all of them again with --resume, from round {done or 0}."
        ) from error


def _open(name: str, options: Options, left_out: tuple[str, ...]) -> tuple[report.Run, dict[str, Any], bool]:
    """The experiment's folder, its settings but for those `left_out`, and whether the folder is new."""
    _validate.at_least_one(name, "seeds", options.seeds, "1 runs once")
    if options.resume and options.out is None:
        raise ValueError(f"{name}(resume=True, out=None): there is nothing to resume; give the run's folder as --out.")
    out = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if options.out is None else options.out
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    new = not out.exists()
    return report.open_run(out, settings, resume=options.resume), settings, new


def _mean(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    if len(summaries) == 1:
        return summaries[0]
    mean: dict[str, Any] = {"seeds": len(summaries)}
    for name in summaries[0]:
        values = [s[name] for s in summaries]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            mean |= report.spread(name, values)
        else:  # a word, or a number that some seed did not reach
            mean[name] = values[0] if all(v == values[0] for v in values) else None
    return mean


def _totals(metrics: dict) -> dict[str, Any]:
    """A row's share of the metrics of the rounds since the row before, on the host."""
    metrics = {name: np.asarray(metrics[name]) for name in ("loss", "reports", "dropped", "steps") if name in metrics}
    totals: dict[str, Any] = {}
    if "loss" in metrics:
        totals["train_loss"] = float(metrics.pop("loss")[-1])
    return totals | {name: int(values.sum()) for name, values in metrics.items()}
