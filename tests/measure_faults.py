#!/usr/bin/env python3
"""Measures what clients notice of workers that are killed, stopped and restarted. Standard library only; run by hand.

    python3 tests/measure_faults.py --ingle target/release/ingle [--model FILE.gguf] [--only killed,streams] [--json]

All parts but `streams` use the echo engine: what is measured is the path. Each request is a stream whose undisturbed
time is known, because the engine takes a given time for each token.

killed     60 requests/s on three workers behind an ingress node without a model; the busiest worker's node and engine
           get SIGKILL. Wanted: 0 failed, at most 10 requests slower than 1 s beyond their undisturbed time.
stopped    The same with SIGSTOP: of node and engine, and of the engine alone, whose node goes on answering its peers.
           Also: how long after SIGCONT until it gets requests again (at most 2 s wanted).
streams    Greedy streams of a real model, a worker's node and engine killed in the middle of each round: how many have
           the text of an undisturbed stream (all wanted), and p99 of their widest gaps (at most 2 s wanted). Only
           streams that ran on the killed worker count.
cut        Four machines on one switch (network namespaces; needs root, iproute2 and nftables): the packets of the
           busiest worker are dropped for 8 s, both ways and one way. Wanted: 0 failed, requests again within 2 s.
rolling    Three workers under load get SIGTERM and start again, one after the other. Wanted: 0 failed, 0 truncated.
ingresses  Three ingress nodes behind nginx (configs/nginx.conf) likewise. Wanted: 0 failed, 0 truncated.
"""

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from asking import Answer, ask, chat, failures, steadily
from measuring import Network, Node, Stage, cluster, free_port, machine, nginx, parser, quantile, say, send, table

RATE = 60.0
#: 24 tokens with 10 ms for each: at 60 requests/s about 15 are being answered, over three workers of 16 places.
PROMPT = "repeat 4 every 10ms: hello "
TEXT = "hello " * 4
PARTS = ("killed", "stopped", "cut", "streams", "rolling", "ingresses")
#: What an answer may take beyond its undisturbed time before it counts as slow.
SLOW = 1.0


def summary(what: str, answers: list[Answer], undisturbed: float, text: str = TEXT) -> dict:
    """Failed, wrong and slow requests."""
    good = [answer for answer in answers if answer.ok]
    return {
        "what": what, "requests": len(answers), "failed": len(answers) - len(good),
        "wrong_text": sum(answer.text != text for answer in good),
        "slow": sum(answer.took > undisturbed + SLOW for answer in good),
        "p50_s": round(quantile((answer.took for answer in good), 0.5), 3),
        "p99_s": round(quantile((answer.took for answer in good), 0.99), 3),
        "longest_s": round(max((answer.took for answer in good), default=0), 3),
        "failures": failures(answers),
    }


async def echo(to: str, limit: float = 30) -> Answer:
    return await ask(to, chat("echo", PROMPT, stream=True), limit)


async def warm(to: str) -> float:
    """Lets the routers learn the workers' speeds; the undisturbed time under this load."""
    answers = await steadily(RATE, 4, lambda _: echo(to))
    if failed := failures(answers):
        sys.exit(f"error: requests fail without any fault: {failed}")
    return quantile((answer.took for answer in answers), 0.5)


async def during(seconds: float, to: str, *happens: tuple[float, object]) -> list[Answer]:
    """The usual load, while functions are called at their times."""
    async def script() -> None:
        began = time.monotonic()
        for at, act in happens:
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            await asyncio.to_thread(act)
    acting = asyncio.create_task(script())
    answers = await steadily(RATE, seconds, lambda _: echo(to))
    await acting
    return answers


def signal_all(pids: list[int], what: signal.Signals) -> None:
    for pid in pids:
        send(pid, what)


class Victim:
    """The worker that has the most requests when its time comes; one that has none would prove nothing."""

    def __init__(self, workers: list[Node], ingress: Node) -> None:
        self.workers, self.ingress, self.node, self.at, self.pids = workers, ingress, None, 0.0, []

    def choose(self) -> None:
        """Now is its time."""
        status = self.ingress.status()
        busy = {node["name"]: sum(model["running"] for model in node["models"]) for node in status["nodes"]}
        self.node = max(self.workers, key=lambda worker: busy.get(worker.name, 0))
        self.at = time.monotonic()

    def strike(self, what: signal.Signals, chosen: slice = slice(0, None)) -> None:
        """Sends the signal to the chosen ones of its node and its engines, in this order."""
        self.choose()
        self.pids = self.node.pids()[chosen]
        signal_all(self.pids, what)

    def had(self, answers: list[Answer]) -> int:
        """How many answers it had begun and not finished."""
        return sum(answer.node == self.node.name and bool(answer.tokens) and answer.tokens[0] < self.at < answer.ended
                   for answer in answers)


def killed(ingle: Path) -> list[dict]:
    with Stage() as stage:
        workers, [ingress] = cluster(stage, ingle, 3, "echo")
        undisturbed = asyncio.run(warm(ingress.http))
        say("killed: SIGKILL of the busiest worker after 4 s")
        victim = Victim(workers, ingress)
        answers = asyncio.run(during(12, ingress.http, (4, lambda: victim.strike(signal.SIGKILL))))
        row = summary("worker's node and engine killed", answers, undisturbed)
        return [{**row, "hit": victim.had(answers)}]


def stopped(ingle: Path) -> list[dict]:
    rows = []
    for what, chosen in (("node and engine stopped", slice(0, None)), ("engine stopped", slice(1, None))):
        with Stage() as stage:
            workers, [ingress] = cluster(stage, ingle, 3, "echo")
            undisturbed = asyncio.run(warm(ingress.http))
            say(f"stopped: {what} after 4 s, for 8 s")
            victim, resumed = Victim(workers, ingress), []

            def resume() -> None:
                resumed.append(time.monotonic())
                signal_all(victim.pids, signal.SIGCONT)

            stop = (4, lambda: victim.strike(signal.SIGSTOP, chosen))
            answers = asyncio.run(during(22, ingress.http, stop, (12, resume)))
            back = [answer.sent for answer in answers
                    if answer.ok and answer.node == victim.node.name and answer.sent > resumed[0]]
            row = summary(what, answers, undisturbed)
            row |= {"hit": victim.had(answers), "back_after_s": round(min(back) - resumed[0], 2) if back else None}
            rows.append(row)
    return rows


def cut(ingle: Path) -> list[dict]:
    rows = []
    for one_way in (False, True):
        with Stage() as stage:
            names = ["w1", "w2", "w3"]
            network = Network(stage, names)
            workers = [Node(stage, ingle, name, "echo", quic=f"{network.addresses[name]}:0", within=network.within(name))
                       for name in names]
            ingress = Node(stage, ingle, "in1", quic=f"{network.own}:0")
            workers[0].up()
            for node in (*workers[1:], ingress):
                node.join(workers[0]).up()
            ingress.until_ready(3)
            undisturbed = asyncio.run(warm(ingress.http))
            what = "packets to the worker dropped" if one_way else "packets from and to the worker dropped"
            say(f"cut: {what} after 4 s, for 8 s")
            victim, mended = Victim(workers, ingress), []

            def mend() -> None:
                network.mend()
                mended.append(time.monotonic())

            def strike() -> None:
                victim.choose()
                network.cut(victim.node.name, one_way)

            answers = asyncio.run(during(22, ingress.http, (4, strike), (12, mend)))
            back = [answer.sent for answer in answers
                    if answer.ok and answer.node == victim.node.name and answer.sent > mended[0]]
            row = summary(what, answers, undisturbed)
            row |= {"hit": victim.had(answers), "back_after_s": round(min(back) - mended[0], 2) if back else None}
            rows.append(row)
    return rows


def streams(ingle: Path, model: str, total: int) -> list[dict]:
    """Greedy streams of the real model; in each round a worker is killed while all of them run."""
    at_once, tokens = 5, 48
    questions = [f"Write {n + 1} short sentences about {subject}." for n, subject in enumerate(
        ("a river", "a lighthouse", "two bakers", "the first snow", "a night train"))]

    with Stage() as stage:
        workers, [ingress] = cluster(stage, ingle, 3, model)
        name = ingress.status()["nodes"]
        name = next(model["name"] for node in name for model in node["models"] if model["state"] == "ready")

        def body(question: str) -> dict:
            return chat(name, question, stream=True, temperature=0, max_tokens=tokens, ignore_eos=True)

        async def all_of_them() -> list[Answer]:
            return list(await asyncio.gather(*(ask(ingress.http, body(question), 300) for question in questions)))

        undisturbed = asyncio.run(all_of_them())
        if failed := failures(undisturbed):
            sys.exit(f"error: requests fail without any fault: {failed}")
        expected = [answer.text for answer in undisturbed]
        middle = quantile((answer.took for answer in undisturbed), 0.5) / 2
        say(f"streams: {at_once} take {2 * middle:.1f} s undisturbed; killing a worker in the middle of each round")

        async def one_round() -> tuple[Node, float, list[Answer]]:
            running = asyncio.create_task(all_of_them())
            await asyncio.sleep(middle)
            status = await asyncio.to_thread(ingress.status)
            busy = {node["name"]: sum(model["running"] for model in node["models"]) for node in status["nodes"]}
            victim = max(workers, key=lambda worker: busy.get(worker.name, 0))
            at = time.monotonic()
            signal_all(victim.pids(), signal.SIGKILL)
            return victim, at, await running

        # Only streams that ran on the victim count, so there are more rounds than the number of streams needs.
        hit, others = [], []
        for _ in range(3 * total):
            if len(hit) >= total:
                break
            victim, at, answers = asyncio.run(one_round())
            for answer, text in zip(answers, expected):
                was_there = answer.node == victim.name and answer.tokens and answer.tokens[0] < at < answer.ended
                (hit if was_there else others).append((answer, text))
            victim.process.wait(10)
            victim.up()
            ingress.until_ready(3)
        gaps = [answer.widest_gap for answer, _ in hit if answer.ok]

        def counts(of: list[tuple[Answer, str]]) -> tuple[int, int]:
            return sum(not answer.ok for answer, _ in of), sum(answer.ok and answer.text == text for answer, text in of)
        return [{
            "what": "greedy streams, kill -9 in the middle", "hit": len(hit), "failed": counts(hit)[0],
            "identical": counts(hit)[1], "gap_p50_s": round(quantile(gaps, 0.5), 3),
            "gap_p99_s": round(quantile(gaps, 0.99), 3), "not_hit": len(others), "not_hit_failed": counts(others)[0],
            "not_hit_identical": counts(others)[1],
            "undisturbed_gap_s": round(max(answer.widest_gap for answer in undisturbed), 3),
            "failures": failures(answer for answer, _ in hit + others),
        }]


def restart(node: Node) -> None:
    node.terminate()
    node.up()


def rolling(ingle: Path) -> list[dict]:
    with Stage() as stage:
        workers, [ingress] = cluster(stage, ingle, 3, "echo")
        undisturbed = asyncio.run(warm(ingress.http))
        say("rolling: three workers restart, one after the other")

        def one(worker: Node):
            def act() -> None:
                restart(worker)
                ingress.until_ready(3)
            return act
        answers = asyncio.run(during(25, ingress.http, *((3 + 7 * n, one(worker)) for n, worker in enumerate(workers))))
        return [summary("three workers restarted by SIGTERM", answers, undisturbed)]


def ingresses(ingle: Path) -> list[dict]:
    with Stage() as stage:
        # One alone would be full at this rate.
        _, gates = cluster(stage, ingle, 2, "echo", 3)
        port = free_port()
        config = (Path(__file__).parent.parent / "configs" / "nginx.conf").read_text()
        for n, gate in enumerate(gates):
            config = config.replace(f"127.0.0.1:{11435 + n}", gate.http)
        config = config.replace("127.0.0.1:8080", f"127.0.0.1:{port}").replace("/run/", f"{stage.folder}/")
        nginx(stage, "nginx", config)
        to = f"127.0.0.1:{port}"
        undisturbed = asyncio.run(warm(to))
        say("ingresses: three ingress nodes behind nginx restart, one after the other")

        def one(gate: Node):
            def act() -> None:
                restart(gate)
                gate.until_ready(2)
            return act
        answers = asyncio.run(during(25, to, *((3 + 7 * n, one(gate)) for n, gate in enumerate(gates))))
        return [summary("three ingress nodes behind nginx restarted by SIGTERM", answers, undisturbed)]


def main() -> None:
    options = parser(__doc__, tools=False)
    options.add_argument("--model", default="default", help="the model of `streams`: a GGUF file [default: the default]")
    options.add_argument("--streams", type=int, default=100, help="how many streams [default: 100]")
    options.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)} [default: all]")
    given = options.parse_args()
    given.ingle = given.ingle.resolve()
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        options.error(f"unknown parts: {', '.join(unknown)}")
    on, rows = machine(), []
    for part, measure in (("killed", killed), ("stopped", stopped), ("cut", cut), ("rolling", rolling), ("ingresses", ingresses)):
        if part in chosen:
            rows += measure(given.ingle)
    greedy = streams(given.ingle, given.model, given.streams) if "streams" in chosen else []
    if given.json:
        print(json.dumps({"machine": on, "faults": rows, "streams": greedy}, indent=2))
        return
    print(on)
    if rows:
        columns = ["requests", "hit", "failed", "wrong_text", "slow", "p50_s", "p99_s", "longest_s", "back_after_s"]
        print(table(f"{RATE:.0f} requests/s; slow: more than {SLOW:.0f} s beyond the undisturbed time", ["", *columns],
                    [[row["what"], *(row.get(column) for column in columns)] for row in rows]))
    for row in greedy:
        print(f"\n{row['what']}")
        for name, value in row.items():
            if name not in ("what", "failures"):
                print(f"  {name:<24} {value}")
    for row in rows + greedy:
        for why, count in row["failures"].items():
            print(f"  {count} × {row['what']}: {why}")


if __name__ == "__main__":
    main()
