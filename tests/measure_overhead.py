#!/usr/bin/env python3
"""Measures what two hops through Ingle cost, beside floors and nginx. Standard library only; run by hand.

    cargo build --release --workspace
    python3 tests/measure_overhead.py --ingle target/release/ingle [--seconds 10] [--only rate,streams] [--json]

The same questions go to the same scripted OpenAI-compatible server on six paths, which take turns:

direct       no hop: what the others are compared with
tcp          two relays of TCP bytes
quic         HTTP → QUIC with mutual TLS, one stream of frames for each request → HTTP, and nothing else: our floor
nginx        nginx → nginx → server
nginx-tls    the same with TLS (certificates of both sides checked) between the two
ingle        ingress node → QUIC → worker node → server: the path that users get

rate     200 requests/s: added p50 and p99, and processor time of 10,000 requests
core     all processes of a path on one core, as many requests as they answer
streams  1, 64 and 512 streams of tokens at once: time to the first token, processor time for each token, memory
start    time until a path's processes listen, and idle memory

Processor time is that of the path's processes, without server and load generator. nginx is Debian's (`apt install
nginx-light`); openssl makes its certificates. On a busy machine only ratios within one run mean anything.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from measuring import Node, Stage, cpu_seconds, free_port, load, machine, nginx, parser, pss_mib, say, table, tree

PARTS = ("start", "rate", "core", "streams")
PATHS = ("direct", "tcp", "quic", "nginx", "nginx-tls", "ingle")
STREAMS = (1, 64, 512)
#: Milliseconds between two tokens of a stream, so that the machine has time for all of them.
EVERY = {1: 10, 64: 100, 512: 200}


@dataclass
class Way:
    """A path that runs: where it begins, and its processes."""

    name: str
    to: str
    model: str
    first_pids: list[int]
    start_ms: float

    def pids(self) -> list[int]:
        return [pid for first in self.first_pids for pid in tree(first)]


NGINX = """
worker_processes auto;
pid {folder}/{name}.pid;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/{name}-body; proxy_temp_path {folder}/{name}-proxy;
    fastcgi_temp_path {folder}/{name}-1; uwsgi_temp_path {folder}/{name}-2; scgi_temp_path {folder}/{name}-3;
    keepalive_requests 1000000;
    upstream next {{ server {to}; keepalive 1024; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port}{listen};
        {server}
        location / {{
            proxy_pass {scheme}://next;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 10m;
            {client}
        }}
    }}
}}
"""


def certificate(folder: Path) -> None:
    """One certificate for both sides of the TLS between the two nginx."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                    "-subj", "/CN=relay", "-addext", "subjectAltName=DNS:relay", "-keyout", "nginx.key", "-out", "nginx.crt"],
                   cwd=folder, check=True, capture_output=True)


def two_nginx(stage: Stage, upstream: str, tls: bool, cores: str | None) -> tuple[str, list[int]]:
    folder, near, far = stage.folder, free_port(), free_port()
    key = f"{folder}/nginx.crt; {{}}_certificate_key {folder}/nginx.key;"
    server = (f"ssl_certificate {key.format('ssl')} ssl_client_certificate {folder}/nginx.crt; ssl_verify_client on; "
              "ssl_session_cache shared:s:1m;") if tls else ""
    client = (f"proxy_ssl_certificate {key.format('proxy_ssl')} proxy_ssl_trusted_certificate {folder}/nginx.crt; "
              "proxy_ssl_verify on; proxy_ssl_name relay;") if tls else ""
    name = "nginx-tls" if tls else "nginx"
    if tls:
        certificate(folder)
    processes = [nginx(stage, f"{name}-{side}", NGINX.format(folder=folder, name=f"{name}-{side}", **values), cores)
                 for side, values in (
        ("far", {"to": upstream, "port": far, "listen": " ssl" if tls else "", "server": server, "scheme": "http", "client": ""}),
        ("near", {"to": f"127.0.0.1:{far}", "port": near, "listen": "", "server": "", "scheme": "https" if tls else "http",
                  "client": client}))]
    return f"127.0.0.1:{near}", [process.pid for process in processes]


def two_relays(stage: Stage, tools: Path, upstream: str, cores: str | None) -> tuple[str, list[int]]:
    far, address = stage.tool(tools, "tcp-relay", "--to", upstream, cores=cores)
    near, address = stage.tool(tools, "tcp-relay", "--to", address, cores=cores)
    return address, [near.pid, far.pid]


def two_floors(stage: Stage, tools: Path, upstream: str, cores: str | None) -> tuple[str, list[int]]:
    far, address = stage.tool(tools, "quic-worker", "--to", upstream, "--folder", stage.folder, cores=cores)
    near, address = stage.tool(tools, "quic-ingress", "--to", address, "--folder", stage.folder, cores=cores)
    return address, [near.pid, far.pid]


def two_nodes(stage: Stage, ingle: Path, upstream: str, cores: str | None) -> tuple[str, list[int]]:
    # As many at a time as the server takes; without that a server of unknown kind is trusted with eight.
    config = f'[[endpoints]]\nurl = "http://{upstream}"\nname = "scripted"\nslots = 1024\n'
    worker = Node(stage, ingle, "worker", "none", config=config).up(cores)
    ingress = Node(stage, ingle, "ingress", "none").join(worker).up(cores)
    ingress.until_ready(1)
    return ingress.http, [ingress.pid, worker.pid]


def started(name: str, stage: Stage, given, upstream: str, cores: str | None = None) -> Way:
    """Starts a path. The time is that of all that is typed, with the join and its waits for Ingle."""
    makers: dict[str, Callable[[], tuple[str, list[int]]]] = {
        "direct": lambda: (upstream, []),
        "tcp": lambda: two_relays(stage, given.tools, upstream, cores),
        "quic": lambda: two_floors(stage, given.tools, upstream, cores),
        "nginx": lambda: two_nginx(stage, upstream, False, cores),
        "nginx-tls": lambda: two_nginx(stage, upstream, True, cores),
        "ingle": lambda: two_nodes(stage, given.ingle, upstream, cores),
    }
    began = time.monotonic()
    to, pids = makers[name]()
    way = Way(name, to, "scripted", pids, (time.monotonic() - began) * 1e3)
    load(given.tools, way.to, "--seconds", 2, "--clients", 4, "--each", 200)
    return way


def measured(way: Way, given, *arguments: object) -> dict:
    """One run of the load generator, with the path's processor time and most memory of its end."""
    before = cpu_seconds(way.pids())
    result = load(given.tools, way.to, *arguments)
    result["cpu_s"] = cpu_seconds(way.pids()) - before
    if result["failures"] or result["not_sent"]:
        say(f"{way.name}: {result['failures']}, {result['not_sent']} not sent")
    return result


def rates(ways: list[Way], given) -> list[dict]:
    """Rounds in which the paths take turns; of each figure the middle one of all rounds."""
    rounds: dict[str, list[dict]] = {way.name: [] for way in ways}
    for n in range(given.rounds):
        for way in ways:
            say(f"rate: {way.name}, round {n + 1}")
            rounds[way.name].append(measured(way, given, "--rate", given.rate, "--seconds", given.seconds, "--prompt", "tokens=8"))

    def middle(name: str, value: Callable[[dict], float]) -> float:
        values = sorted(value(result) for result in rounds[name] if result["ok"])
        return values[len(values) // 2] if values else float("nan")
    rows = []
    for way in ways:
        p50, p99 = (middle(way.name, lambda result, q=q: result["ms"][q]) for q in ("p50", "p99"))
        base50, base99 = (middle("direct", lambda result, q=q: result["ms"][q]) for q in ("p50", "p99"))
        rows.append({
            "path": way.name, "requests": sum(result["sent"] for result in rounds[way.name]),
            "failed": sum(result["sent"] - result["ok"] for result in rounds[way.name]), "p50_us": p50 * 1e3,
            "p99_us": p99 * 1e3, "added_p50_us": (p50 - base50) * 1e3, "added_p99_us": (p99 - base99) * 1e3,
            "cpu_s_per_10k": middle(way.name, lambda result: result["cpu_s"] * 1e4 / result["ok"]),
            "late_p99_ms": middle(way.name, lambda result: result["late_ms"]["p99"]),
        })
    return rows


def one_core(given, upstream: str) -> list[dict]:
    """Each path alone, pinned to the first core; server and load generator have the others."""
    cores = sorted(os.sched_getaffinity(0))
    mine, others = str(cores[0]), ",".join(map(str, cores[1:] or cores))
    rows = []
    for name in given.paths:
        if name == "direct":
            continue
        with Stage() as stage:
            say(f"core: {name}")
            way = started(name, stage, given, upstream, mine)
            before = cpu_seconds(way.pids())
            result = load(given.tools, way.to, "--seconds", given.seconds, "--clients", 32, cores=others)
            cpu = cpu_seconds(way.pids()) - before
            # Where something else kept the core, or the generator could not keep up, the path got less than the core:
            # what it would answer with all of it is what it answered for the time that it got.
            rows.append({"path": name, "per_second": result["per_second"], "core_share": cpu / result["seconds"],
                         "per_core_second": result["ok"] / cpu if cpu else float("nan"),
                         "failed": result["sent"] - result["ok"], "p50_ms": result["ms"] and result["ms"]["p50"],
                         "failures": result["failures"]})
    return rows


def streams(ways: list[Way], given) -> list[dict]:
    rows = []
    for count in STREAMS:
        for way in ways:
            say(f"streams: {way.name}, {count}")
            tokens = max(1, int(given.seconds * 1e3 / EVERY[count]))
            process = subprocess.Popen(list(map(str, (
                given.tools, "load", "--to", way.to, "--clients", count, "--each", 1, "--stream", "--limit", 120,
                "--prompt", f"tokens={tokens} every={EVERY[count]}"))), stdout=subprocess.PIPE, text=True)
            before, most = cpu_seconds(way.pids()), 0.0
            while process.poll() is None:
                time.sleep(0.5)
                most = max(most, pss_mib(way.pids()))
            result = json.loads(process.stdout.read())
            cpu = cpu_seconds(way.pids()) - before
            first = result["first_token_ms"] or {}
            rows.append({
                "streams": count, "path": way.name, "ok": result["ok"], "failed": result["sent"] - result["ok"],
                "first_p50_ms": first.get("p50"), "first_p99_ms": first.get("p99"),
                "gap_p99_ms": (result["gap_ms"] or {}).get("p99"),
                "us_per_token": cpu * 1e6 / result["tokens"] if result["tokens"] else None, "memory_mib": most,
                "failures": result["failures"],
            })
            time.sleep(1)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)} [default: all]")
    options.add_argument("--paths", default=",".join(PATHS), help=f"paths, of {', '.join(PATHS)} [default: all]")
    options.add_argument("--seconds", type=float, default=10, help="how long each measurement takes [default: 10]")
    options.add_argument("--rounds", type=int, default=3, help="rounds of `rate` [default: 3]")
    options.add_argument("--rate", type=float, default=200, help="requests a second of `rate` [default: 200]")
    given = options.parse_args()
    given.ingle = given.ingle.resolve()
    given.tools = (given.tools or given.ingle.parent / "figures").resolve()
    given.paths, chosen = given.paths.split(","), given.only.split(",")
    for kind, names, known in (("parts", chosen, PARTS), ("paths", given.paths, PATHS)):
        if unknown := set(names) - set(known):
            options.error(f"unknown {kind}: {', '.join(unknown)}")
    if "direct" not in given.paths:
        given.paths.insert(0, "direct")
    result: dict = {"machine": machine()}
    with Stage() as stage:
        _, upstream = stage.tool(given.tools, "upstream")
        if {"start", "rate", "streams"} & set(chosen):
            ways = [started(name, stage, given, upstream) for name in given.paths]
            time.sleep(2)
            result["start"] = [{"path": way.name, "start_ms": way.start_ms, "idle_mib": pss_mib(way.pids()),
                                "processes": len(way.pids())} for way in ways if way.first_pids]
            if "rate" in chosen:
                result["rate"] = rates(ways, given)
            if "streams" in chosen:
                result["streams"] = streams(ways, given)
            for way in ways:
                for pid in way.first_pids:
                    os.kill(pid, 15)
        if "core" in chosen:
            result["core"] = one_core(given, upstream)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    print(result["machine"])
    titles = {"start": "Start of both hops (Ingle: with join and the wait for the endpoint) and idle memory",
              "rate": f"{given.rate:.0f} requests/s", "core": "All processes of the path on one core, 32 clients",
              "streams": "Streams of tokens"}
    for part, title in titles.items():
        if rows := result.get(part):
            columns = [name for name in rows[0] if name != "failures"]
            print(table(title, columns, [[row[column] for column in columns] for row in rows]))
            for row in rows:
                for why, count in row.get("failures", {}).items():
                    print(f"  {count} × {row['path']}: {why}")


if __name__ == "__main__":
    main()
