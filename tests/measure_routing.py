#!/usr/bin/env python3
"""Measures how well requests are spread over machines of different speed. Standard library only; run by hand.

    cargo build --release --workspace
    python3 tests/measure_routing.py --ingle target/release/ingle [--seconds 60] [--seed 1] [--json]

Three scripted OpenAI-compatible servers take 100, 200 and 800 ms for an answer and give eight at a time; more wait there.
Requests come as of many independent people (Poisson) at 70 % of what the three can do together, 91 a second:

nginx-round-robin  Debian's nginx in front of the three, each in turn
nginx-least-conn   the same, to the one with the fewest connections
ingle              an ingress node, and a worker node for each server; first as it starts, then with what it has learnt
earliest end       computed: somebody who knows all service times and queues sends each request to where it ends first.
                   Short in the tail, not the best in the mean: who joins a queue makes those behind it wait as well

Wanted: p99 at most 350 ms, nothing refused. To beat (Traefik's leasttime, measured elsewhere): mean 141, p99 646 ms.
The service times are the servers', so a busy machine disturbs this less than other figures, but it does.
"""

import json
import random

from measuring import Node, Stage, free_port, load, machine, nginx, parser, quantile, say, table

SERVICE_MS, SLOTS = (100, 200, 800), 8
CAPACITY = sum(SLOTS * 1e3 / ms for ms in SERVICE_MS)
RATE = 0.7 * CAPACITY
WARM_UP_SECONDS = 20

NGINX = """
worker_processes 1;
pid {folder}/{name}.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    upstream servers {{ {policy} {servers} keepalive 64; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
    }}
}}
"""


def earliest_end(seconds: float, seed: int) -> list[float]:
    """Times in milliseconds where each request goes to the server that will have answered it first."""
    chance, now, times = random.Random(seed), 0.0, []
    free = [[0.0] * SLOTS for _ in SERVICE_MS]
    while (now := now + chance.expovariate(RATE / 1e3)) < seconds * 1e3:
        ends = [max(now, min(slots)) + ms for slots, ms in zip(free, SERVICE_MS)]
        best = ends.index(min(ends))
        free[best][free[best].index(min(free[best]))] = ends[best]
        times.append(ends[best] - now)
    return times


def row(what: str, result: dict, names: list[str]) -> dict:
    ms = result["ms"] or {}
    shares = [result["by_node"].get(name, 0) / max(1, result["ok"]) for name in names]
    return {"what": what, "requests": result["sent"], "refused": result["sent"] - result["ok"] + result["not_sent"],
            "mean_ms": ms.get("mean"), "p50_ms": ms.get("p50"), "p90_ms": ms.get("p90"), "p99_ms": ms.get("p99"),
            "max_ms": ms.get("max"), **{f"to_{ms}": share for ms, share in zip(SERVICE_MS, shares)},
            "failures": result["failures"]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=60, help="how long each measurement takes [default: 60]")
    options.add_argument("--seed", type=int, default=1, help="the seed of the arrivals [default: 1]")
    given = options.parse_args()
    ingle = given.ingle.resolve()
    tools = (given.tools or ingle.parent / "figures").resolve()
    on, rows = machine(), []

    def arrivals(seconds: float, seed: int) -> tuple:
        return "--rate", RATE, "--poisson", "--seed", seed, "--seconds", seconds, "--limit", 60

    with Stage() as stage:
        servers = [stage.tool(tools, "upstream", "--slots", SLOTS, "--service-ms", ms)[1] for ms in SERVICE_MS]
        for name, policy in (("round-robin", ""), ("least-conn", "least_conn;")):
            say(f"routing: nginx, {name}")
            port = free_port()
            nginx(stage, name, NGINX.format(folder=stage.folder, name=name, policy=policy, port=port, servers=" ".join(
                f"server {server} max_fails=0;" for server in servers)))
            result = load(tools, f"127.0.0.1:{port}", *arrivals(given.seconds, given.seed))
            rows.append(row(f"nginx-{name}", result, []))

        def worker(n: int) -> Node:
            config = f'[[endpoints]]\nurl = "http://{servers[n]}"\nname = "scripted"\nslots = {SLOTS}\n'
            return Node(stage, ingle, f"takes-{SERVICE_MS[n]}", "none", config=config)
        workers = [worker(0).up()]
        workers += [worker(n).join(workers[0]).up() for n in (1, 2)]
        ingress = Node(stage, ingle, "ingress").join(workers[0]).up()
        ingress.until_ready(3)
        names = [node.name for node in workers]
        say("routing: ingle")
        result = load(tools, ingress.http, *arrivals(WARM_UP_SECONDS, given.seed + 1_000))
        rows.append(row(f"ingle, first {WARM_UP_SECONDS} s", result, names))
        result = load(tools, ingress.http, *arrivals(given.seconds, given.seed))
        rows.append(row("ingle", result, names))
        explained = ingress.run("explain", "last").stdout
    times = earliest_end(given.seconds, given.seed)
    rows.append({"what": "earliest end (computed)", "requests": len(times), "refused": 0, "mean_ms": sum(times) / len(times),
                 "p50_ms": quantile(times, 0.5), "p90_ms": quantile(times, 0.9), "p99_ms": quantile(times, 0.99),
                 "max_ms": max(times), "failures": {}})
    if given.json:
        print(json.dumps({"machine": on, "rate": RATE, "routing": rows, "explain": explained}, indent=2))
        return
    print(on)
    columns = ["requests", "refused", "mean_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms", *(f"to_{ms}" for ms in SERVICE_MS)]
    print(table(f"{RATE:.0f} requests/s at servers of {', '.join(map(str, SERVICE_MS))} ms; to_…: share of each",
                ["", *columns], [[each["what"], *(each.get(column) for column in columns)] for each in rows]))
    for each in rows:
        for why, count in each["failures"].items():
            print(f"  {count} × {each['what']}: {why}")
    print(f"\nThe last request, as `ingle explain` tells it:\n{explained}")


if __name__ == "__main__":
    main()
