#!/usr/bin/env python3
"""Measures what a node's usual clients notice of unusual ones. Standard library only; run by hand.

    python3 tests/measure_abuse.py --ingle target/release/ingle [--only crowd,overload] [--json]

crowd      10,000 idle connections, 1,000 that send a byte of their head each second, and bodies of 64 MB, one after the
           other at a node with an echo engine: its memory, and p50 and p99 of small requests beside them, each against
           the same without. Each of them opens a connection of its own, so it also waits for a place among the crowd.
           Wanted: p99 at most 1.2 times, memory bounded.
overload   Two echo workers of known capacity behind an ingress node get five times as much. Wanted: rejects within
           50 ms, at least 90 % of the highest goodput.
fairness   A script asks 500 times at once, a person once a second, each with a key of its own. Wanted: the person waits
           for one request of the script, not for 500; and less with `x-ingle-priority: interactive`.
"""

import asyncio
import contextlib
import json
import multiprocessing
import threading
import time
from pathlib import Path

from measuring import (Answer, Node, Stage, ask, chat, cluster, failures, machine, parser, pss_mib, quantile, say,
                       steadily, table)

PARTS = ("crowd", "overload", "fairness")
IDLE, LORIS, BODIES, BODY_BYTES = 10_000, 1_000, 4, 64_000_000
#: Bytes a second of each who sends bodies: four of them fill a network of 1 Gbit/s.
BODY_RATE = 30e6
#: Small requests a second beside the crowd, and for how long.
RATE, SECONDS = 40.0, 10.0
#: 25 tokens with 10 ms for each. Four places for each worker: 16 such answers a second.
PROMPT, ANSWER_S, PLACES, WORKERS = "repeat 4 every 10ms: hello ", 0.25, 4, 2
CAPACITY = WORKERS * PLACES / ANSWER_S
CONFIG = f"[model.parameters]\nbatch_size = {PLACES}\n"


# ---------------------------------------------------------------- crowds, each in a process of its own


async def idle(to: str, stop: float, opened) -> None:
    """A connection that says nothing; opened again when it is cut off."""
    host, port = to.rsplit(":", 1)
    while time.monotonic() < stop:
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(host, int(port))
            with opened.get_lock():
                opened.value += 1
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(max(0.1, stop - time.monotonic())):
                    await reader.read(1)
            writer.close()
            with opened.get_lock():
                opened.value -= 1
        await asyncio.sleep(0.2)


async def loris(to: str, stop: float, opened) -> None:
    """A head that comes a byte at a time and never ends."""
    host, port = to.rsplit(":", 1)
    while time.monotonic() < stop:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            with opened.get_lock():
                opened.value += 1
            with contextlib.suppress(OSError):
                writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {to}\r\nX-Slow: ".encode())
                while time.monotonic() < stop and not writer.is_closing():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(1)
            writer.close()
            with opened.get_lock():
                opened.value -= 1
        await asyncio.sleep(0.2)


async def big_body(to: str, stop: float, opened) -> None:
    """Bodies that are too long, with and without a length, one after the other."""
    host, port = to.rsplit(":", 1)
    part, chunked = b"x" * 65_536, False
    while time.monotonic() < stop:
        chunked = not chunked
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            with opened.get_lock():
                opened.value += 1
            kind = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {BODY_BYTES}"
            with contextlib.suppress(OSError):
                writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {to}\r\n{kind}\r\n\r\n".encode())
                began = time.monotonic()
                for n in range(BODY_BYTES // len(part)):
                    if time.monotonic() > stop:
                        break
                    await asyncio.sleep(max(0.0, began + n * len(part) / BODY_RATE - time.monotonic()))
                    writer.write(b"10000\r\n" + part + b"\r\n" if chunked else part)
                    await writer.drain()
            writer.close()
            with opened.get_lock():
                opened.value -= 1


CROWDS = {"idle": (idle, IDLE), "slow heads": (loris, LORIS), "64 MB bodies": (big_body, BODIES)}


def crowd(kind: str, to: str, stop: float, opened) -> None:
    """The process."""
    member, count = CROWDS[kind]

    async def all_of_them() -> None:
        async def later(n: int) -> None:
            # Not all in one moment: the system's queue of new connections is short.
            await asyncio.sleep(n / 5_000)
            await member(to, stop, opened)
        await asyncio.gather(*(later(n) for n in range(count)))
    asyncio.run(all_of_them())


# ---------------------------------------------------------------- parts


class Memory(threading.Thread):
    """The most memory of some processes, looked at five times a second."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.most, self.ended = pids, 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.most = max(self.most, pss_mib(self.pids))

    def __enter__(self) -> "Memory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def small(to: str, limit: float = 30) -> list[Answer]:
    return asyncio.run(steadily(RATE, SECONDS, lambda _: ask(to, chat("echo", "hello"), limit)))


def measure_crowd(ingle: Path) -> list[dict]:
    rows = []
    with Stage() as stage:
        node = Node(stage, ingle, "n1", "echo").up()
        node.until_ready(1)
        small(node.http)
        before = small(node.http)
        rest = pss_mib([node.pid])

        def row(what: str, answers: list[Answer], members: int, most: float) -> dict:
            times = [answer.took * 1e3 for answer in answers if answer.ok]
            return {"what": what, "members": members, "requests": len(answers), "failed": len(answers) - len(times),
                    "p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99), "memory_mib": most,
                    "failures": failures(answers)}
        rows.append(row("nobody", before, 0, rest))
        for kind, (_, count) in CROWDS.items():
            say(f"crowd: {count} × {kind}")
            opened = multiprocessing.Value("i", 0)
            stop = time.monotonic() + SECONDS + 20
            process = multiprocessing.Process(target=crowd, args=(kind, node.http, stop, opened), daemon=True)
            process.start()
            waited = time.monotonic()
            while opened.value < count * 0.99 and time.monotonic() - waited < 8:
                time.sleep(0.05)
            with Memory([node.pid]) as memory:
                answers = small(node.http)
            rows.append(row(kind, answers, opened.value, memory.most))
            process.terminate()
            process.join()
            time.sleep(1)
        rows.append(row("nobody any more", small(node.http), 0, pss_mib([node.pid])))
    for each in rows:
        each["p99_ratio"] = each["p99_ms"] / rows[0]["p99_ms"]
    return rows


def two_workers(stage: Stage, ingle: Path) -> Node:
    """An ingress node in front of two workers of known capacity."""
    workers = [Node(stage, ingle, f"w{n + 1}", "echo", config=CONFIG) for n in range(WORKERS)]
    ingress = Node(stage, ingle, "in1")
    workers[0].up()
    for node in (*workers[1:], ingress):
        node.join(workers[0]).up()
    ingress.until_ready(WORKERS)
    return ingress


def measure_overload(ingle: Path) -> dict:
    with Stage() as stage:
        to = two_workers(stage, ingle).http

        async def closed(seconds: float) -> float:
            """As many clients as there are places, and half as many again: the highest goodput."""
            end, done = time.monotonic() + seconds, 0

            async def client() -> None:
                nonlocal done
                while time.monotonic() < end:
                    answer = await ask(to, chat("echo", PROMPT))
                    done += answer.ok
            await asyncio.gather(*(client() for _ in range(WORKERS * PLACES * 3 // 2)))
            return done / seconds
        asyncio.run(closed(4))
        peak = asyncio.run(closed(10))
        seconds, settled = 24.0, 12.0
        say(f"overload: {5 * CAPACITY:.0f} requests/s for {seconds:.0f} s at a capacity of {CAPACITY:.0f}")
        began = time.monotonic()
        answers = asyncio.run(steadily(5 * CAPACITY, seconds, lambda _: ask(to, chat("echo", PROMPT), 120)))
        good = [answer for answer in answers if answer.ok]
        # While requests came, and from when on the queue was full.
        in_time = [answer for answer in good if began + settled <= answer.ended < began + seconds]
        goodput = len(in_time) / (seconds - settled)
        rejected = [answer for answer in answers if answer.status in (429, 503)]
        return {
            "capacity": CAPACITY, "peak_goodput": peak, "offered": 5 * CAPACITY, "goodput": goodput,
            "goodput_share": goodput / peak, "answered": len(good),
            "rejected_429": sum(answer.status == 429 for answer in rejected),
            "rejected_503": sum(answer.status == 503 for answer in rejected),
            "without_retry_after": sum(not answer.retry_after for answer in rejected),
            "reject_p50_ms": quantile((answer.took * 1e3 for answer in rejected), 0.5),
            "reject_p99_ms": quantile((answer.took * 1e3 for answer in rejected), 0.99),
            "reject_max_ms": max((answer.took * 1e3 for answer in rejected), default=float("nan")),
            "longest_answer_s": max((answer.took for answer in good), default=float("nan")),
            "other_failures": {
                why: count for why, count in failures(answers).items() if "HTTP 429" not in why and "HTTP 503" not in why},
        }


def measure_fairness(ingle: Path) -> list[dict]:
    rows = []
    with Stage() as stage:
        to = two_workers(stage, ingle).http

        async def person(priority: str, seconds: float) -> list[Answer]:
            headers = {"Authorization": "Bearer person", "X-Ingle-Priority": priority}
            return await steadily(1, seconds, lambda _: ask(to, chat("echo", PROMPT), 60, headers))

        async def beside(priority: str, seconds: float) -> tuple[list[Answer], list[Answer]]:
            script = [asyncio.create_task(ask(to, chat("echo", PROMPT), 120, {"Authorization": "Bearer script"}))
                      for _ in range(500)]
            await asyncio.sleep(1)
            mine = await person(priority, seconds)
            still = sum(not task.done() for task in script)
            say(f"fairness: {still} of the script's requests still ran or waited at the end")
            return mine, list(await asyncio.gather(*script))

        def row(what: str, answers: list[Answer]) -> dict:
            times = [answer.took for answer in answers if answer.ok]
            return {"what": what, "requests": len(answers), "failed": len(answers) - len(times),
                    "p50_s": quantile(times, 0.5), "max_s": max(times, default=float("nan")), "failures": failures(answers)}
        asyncio.run(person("normal", 3))
        rows.append(row("person alone", asyncio.run(person("normal", 6))))
        for priority in ("normal", "interactive"):
            mine, script = asyncio.run(beside(priority, 10))
            rows.append(row(f"person, {priority}, beside the script", mine))
            rows.append(row(f"the script beside them ({priority})", script))
    return rows


def main() -> None:
    options = parser(__doc__, tools=False)
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)} [default: all]")
    given = options.parse_args()
    ingle, chosen, on, result = given.ingle.resolve(), given.only.split(","), machine(), {}
    if unknown := set(chosen) - set(PARTS):
        options.error(f"unknown parts: {', '.join(unknown)}")
    if "crowd" in chosen:
        result["crowd"] = measure_crowd(ingle)
    if "overload" in chosen:
        result["overload"] = measure_overload(ingle)
    if "fairness" in chosen:
        result["fairness"] = measure_fairness(ingle)
    if given.json:
        print(json.dumps({"machine": on, **result}, indent=2))
        return
    print(on)
    if rows := result.get("crowd"):
        columns = ["members", "requests", "failed", "p50_ms", "p99_ms", "p99_ratio", "memory_mib"]
        print(table("Small requests beside a crowd; memory: the node's most", ["", *columns],
                    [[row["what"], *(row[column] for column in columns)] for row in rows]))
    if row := result.get("overload"):
        print("\nFive times the capacity")
        for name, value in row.items():
            print(f"  {name:<22} {value:.2f}" if isinstance(value, float) else f"  {name:<22} {value}")
    if rows := result.get("fairness"):
        columns = ["requests", "failed", "p50_s", "max_s"]
        print(table("A person beside a script's 500 requests", ["", *columns],
                    [[row["what"], *(row[column] for column in columns)] for row in rows]))
    for rows in (result.get("crowd", []), result.get("fairness", [])):
        for row in rows:
            for why, count in row["failures"].items():
                print(f"  {count} × {row['what']}: {why}")


if __name__ == "__main__":
    main()
