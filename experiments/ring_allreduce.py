"""Every step of a ring all-reduce as a picture, chunk by chunk, from the values that moved.

Claim: n - 1 hops of the reduce-scatter leave each device with one chunk of the vector summed over all, and n - 1 of
the all-gather with all of them; each device has then sent 2 (n - 1) / n of the vector, in 2 (n - 1) rounds.

| devices | rounds | of the vector sent by each | bytes, counted | bytes by theory |
|---------|--------|----------------------------|----------------|-----------------|
|       2 |      2 |                          1 |             16 |              16 |
|       4 |      6 |                        1.5 |             48 |              48 |
|       8 |     14 |                       1.75 |            112 |             112 |

A chunk is two numbers. Device i puts in 2^i, so that the bits of a sum say whose parts are in it, and c 2^i, so that
the quotient says which chunk c it is: what a picture shows is read off the messages and the results. The script ends
in an error unless every message and result is one that the claim foresees, and the result equals `jax.lax.psum`.

Source: Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69, pp. 117-124.

Command: python experiments/ring_allreduce.py
Expected: the table above; pictures 2.png, 4.png and 8.png in the run's folder.
Time: a quarter of a minute on two CPU cores, beside other work.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfed import experiment, plot, report
from jfed.collectives import cost, ring_all_gather, ring_all_reduce, ring_reduce_scatter
from jfed.collectives.ring import plainly


@dataclasses.dataclass(frozen=True)
class Config(experiment.Options):
    """Settings."""

    seeds: int = 3  # random vectors that are summed too, and compared
    devices: tuple[int, ...] = (2, 4, 8)  # n of each picture


SMOKE = {"devices": (2, 3)}


NAMES = {"ring_reduce_scatter": "reduce-scatter", "ring_all_gather": "all-gather"}


def main(config: Config) -> None:
    """Runs a ring of each size, then shows its pictures and a table."""
    if odd := [n for n in config.devices if not 2 <= n <= 8]:
        raise ValueError(f"ring_allreduce(devices={odd}): a picture has room for 2 to 8; choose among them.")
    cells = {f"{n}_devices": lambda n=n: around(n, config.seeds) for n in config.devices}
    whole, results = experiment.over_cells("ring_allreduce", config, cells)
    rows, summary = [], {"seeds": config.seeds}
    for n in config.devices:
        found = results[f"{n}_devices"]
        theory = cost.of(ring_all_reduce, n, found["numbers"])
        if (found["rounds"], found["sent"]) != (theory.rounds, [theory.sent] * n):
            raise RuntimeError(f"{n} devices sent {found['sent']} bytes in {found['rounds']} rounds, not {theory}")
        plot.plot_chunks(whole.folder / f"{n}.png", pictured(found), title=f"A ring of {n} devices, step by step")
        rows.append(
            {
                "devices": n,
                "rounds": found["rounds"],
                "of the vector sent by each": f"{found['sent'][0] / (4 * found['numbers']):g}",
                "bytes, counted": found["sent"][0],
                "bytes by theory": theory.sent,
            }
        )
        summary |= {f"{n}_rounds": found["rounds"], f"{n}_sent": found["sent"][0]}
        print(report.table(f"What arrives at each of {n} devices, as chunk: whose parts", arrivals(found)), "\n")
    print(report.table("What each device sends", rows), "\n")
    print(f"pictures and metrics: {whole.folder}\n")
    report.finish(whole, summary)


def around(n: int, seeds: int) -> dict[str, Any]:
    """What a ring of n devices moved: every message, the bytes and rounds of all, and the results."""
    device, chunk = jnp.arange(n)[:, None], jnp.arange(n)
    parts = jnp.stack([2**device + 0 * chunk, 2**device * chunk], axis=2)  # [devices, chunks, 2]
    scattered, first = recorded(ring_reduce_scatter, parts)  # [n, 2]
    whole, second = recorded(ring_all_gather, scattered)  # [n, n, 2]
    same("the two halves of the ring", whole, over(ring_all_reduce, parts), over(jax.lax.psum, parts))
    for seed in range(seeds):
        x = jax.random.randint(jax.random.key(seed), (n, 10 * n + 1), -1000, 1000)
        same(f"random vector {seed}", over(ring_all_reduce, x), over(jax.lax.psum, x))
    messages = first + second
    return {
        "devices": n,
        "numbers": parts[0].size,
        "rounds": len({(m["phase"], m["hop"]) for m in messages}),
        "sent": [sum(m["bytes"] for m in messages if m["sender"] == i) for i in range(n)],
        "messages": messages,
        "scattered": scattered.tolist(),
        "whole": whole.tolist(),
    }


def arrivals(found: dict[str, Any]) -> list[dict[str, str]]:
    """The messages, a row for each round."""
    rows: dict[tuple, dict[str, str]] = {}
    for m in found["messages"]:
        name = f"{NAMES[m['phase']]}, hop {m['hop'] + 1}"
        chunk, who = read(m["value"])
        rows.setdefault((m["phase"], m["hop"]), {"": name})[f"at {m['receiver']}"] = f"{chunk}: {who}"
    return list(rows.values())


def pictured(found: dict[str, Any]) -> dict[str, dict[str, plot.Chunks]]:
    """What devices hold after every hop, read off the messages and the results."""
    n, everybody = found["devices"], "".join(map(str, range(found["devices"])))
    by_hop = {
        phase: [[m for m in found["messages"] if (m["phase"], m["hop"]) == (phase, hop)] for hop in range(n - 1)]
        for phase in NAMES
    }
    own = [[str(i)] * n for i in range(n)]
    scatter = {"start": chunks(own, [])}
    for hop, messages in enumerate(by_hop["ring_reduce_scatter"]):
        held = [row.copy() for row in own]
        following = by_hop["ring_reduce_scatter"][hop + 1] if hop + 2 < n else []
        sums = {m["sender"]: m["value"] for m in following} or dict(enumerate(found["scattered"]))
        for m in messages:
            (chunk, before), (at, now), i = read(m["value"]), read(sums[m["receiver"]]), m["receiver"]
            if at != chunk or set(now) != {*before, str(i)} or len(before) != hop + 1:
                raise RuntimeError(f"device {i} got {before} of chunk {chunk}, and has {now} of chunk {at}")
            held[i][at] = now
        scatter[f"hop {hop + 1}"] = chunks(held, messages)
    held = [[""] * n for _ in range(n)]
    for i, value in enumerate(found["scattered"]):
        chunk, held[i][i] = read(value)
        if chunk != i:
            raise RuntimeError(f"device {i} was left with chunk {chunk}")
    gather = {"start": chunks(held, [])}
    for hop, messages in enumerate(by_hop["ring_all_gather"]):
        held = [row.copy() for row in held]
        for m in messages:
            chunk, held[m["receiver"]][chunk] = read(m["value"])
        gather[f"hop {hop + 1}"] = chunks(held, messages)
    results = [[read(value) for value in row] for row in found["whole"]]
    if held != [[everybody] * n] * n or results != [[(chunk, everybody) for chunk in range(n)]] * n:
        raise RuntimeError(f"the all-gather ended with {held}, and returned {results}")
    return {"reduce-scatter": scatter, "all-gather": gather}


def chunks(held: list[list[str]], messages: list[dict[str, Any]]) -> plot.Chunks:
    """One panel."""
    moved = [(m["sender"], m["receiver"], read(m["value"])[0]) for m in messages]
    words = [[who if len(who) < max(5, len(held)) else "all" for who in row] for row in held]
    return plot.Chunks([[len(who) for who in row] for row in held], words, moved)


def over(f, x):
    """`f` on devices that hold a row of x each."""
    return jax.jit(jax.vmap(lambda row: f(row, "devices"), axis_name="devices"))(x)


def recorded(collective, x: jax.Array) -> tuple[jax.Array, list[dict[str, Any]]]:
    """The result of a half of the ring, and every message: its hop, sender, receiver, bytes, and what arrived."""
    messages = []

    def send(x, axis_name, pairs, hop):
        arrived = plainly(x, axis_name, pairs, hop)
        sender_of = {receiver: sender for sender, receiver in pairs}

        def write(receiver, hop, value):
            receiver, hop = int(receiver), int(hop)
            message = {"phase": collective.__name__, "hop": hop, "sender": sender_of[receiver], "receiver": receiver}
            messages.append(message | {"bytes": value.nbytes, "value": value.tolist()})

        jax.debug.callback(write, jax.lax.axis_index(axis_name), hop, arrived)
        return arrived

    result = jax.block_until_ready(over(lambda row, axis_name: collective(row, axis_name, send=send), x))
    jax.effects_barrier()
    return result, sorted(messages, key=lambda m: (m["hop"], m["receiver"]))


def same(what: str, *results: jax.Array) -> None:
    """Ends the script if results are not the same numbers."""
    if not all(np.array_equal(results[0], result) for result in results[1:]):
        raise RuntimeError(f"{what}: the ring and jax.lax.psum differ: {[r.tolist() for r in results]}")


def read(value: list[int]) -> tuple[int, str]:
    """Which chunk two numbers are a sum of, and of which devices' parts."""
    who, times = value
    chunk, rest = divmod(times, who)
    if rest:
        raise RuntimeError(f"{value} is no sum of parts of one chunk")
    return chunk, "".join(str(i) for i in range(who.bit_length()) if who >> i & 1)


if __name__ == "__main__":
    experiment.cli(main, Config, smoke=SMOKE)
