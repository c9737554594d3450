#!/usr/bin/env python3
"""Measures copies of a model file between nodes, and what answers feel of them. Standard library only; run by hand.

    cargo build --release --workspace
    INGLE_MODEL_CACHE=/path/to/models python3 tests/measure_copies.py --ingle target/release/ingle [--rounds 5] [--json]

The folder must have the default model's file. One node has the file and an echo engine; a client asks that engine
through another node, a token each 10 ms, so that every token crosses the connection between the two. Turn by turn
nothing else happens, or a third node copies the file again and again, from both: they share the model folder. (What
gives answers gives files at 60 MB/s at most, so the greater part comes from the node in between.)

throughput   bytes of the file over the time from the first chunk to the checked file, MB/s
gaps         time between two tokens at the client, p50 and p99, with copies beside them and without; the ratio

On a busy machine only ratios within one run mean anything.
"""

import asyncio
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from asking import ask, chat
from measuring import Node, Stage, machine, parser, quantile, say, table

FILE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53.gguf"
STREAMS = 4
TOKENS = 400


async def gaps(to: str) -> list[float]:
    """Milliseconds between tokens of some streams at once."""
    body = chat("echo", f"repeat {TOKENS} every 10ms: hello ", stream=True)
    answers = await asyncio.gather(*(ask(to, body) for _ in range(STREAMS)))
    for answer in answers:
        if not answer.ok:
            sys.exit(f"error: a stream failed: {answer.what()}")
    return [1000 * (b - a) for answer in answers for a, b in zip(answer.tokens, answer.tokens[1:])]


class Copying(threading.Thread):
    """A node that copies the file, forgets it, and copies it again."""

    def __init__(self, stage: Stage, ingle: Path, giver: Node) -> None:
        super().__init__(daemon=True)
        self.stage, self.ingle, self.giver = stage, ingle, giver
        self.ending = threading.Event()
        self.rates: list[float] = []
        # The model folder of the environment is the giver's.
        program = stage.folder / "ingle-taker"
        program.write_text(f"#!/bin/sh\nINGLE_MODEL_CACHE='{stage.folder}/copies' exec '{ingle}' \"$@\"\n")
        program.chmod(0o755)
        self.node = Node(stage, program, "taker")

    def run(self) -> None:
        while not self.ending.is_set():
            shutil.rmtree(self.stage.folder / "copies", ignore_errors=True)
            rate = copy_once(self.stage, self.node, self.ending)
            if rate:
                self.rates.append(rate)


def copy_once(stage: Stage, node: Node, ending: threading.Event) -> float | None:
    """Starts the node with the default model and ends it when its file is there; MB/s."""
    node.model = "default"
    folder = stage.folder / "copies"
    part, whole = folder / FILE.replace(".gguf", ".part"), folder / FILE
    node.up()
    began = None
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and not ending.is_set():
            now = time.monotonic()
            if began is None and part.exists():
                began = now
            if whole.exists():
                size = whole.stat().st_size
                if "from giver" not in node.log():
                    sys.exit("error: the file did not come from the giver")
                return size / 1e6 / (now - (began or now - 0.002))
            time.sleep(0.002)
        return None
    finally:
        Stage.kill(node.process)


def main() -> None:
    options = parser(__doc__, tools=False)
    options.add_argument("--rounds", type=int, default=5, help="turns of each kind")
    given = options.parse_args()
    models = os.environ.get("INGLE_MODEL_CACHE", "")
    if not (Path(models) / FILE).exists():
        sys.exit("error: set INGLE_MODEL_CACHE to a folder that has the default model's file")
    ingle, where = given.ingle.resolve(), machine()
    with Stage() as stage:
        giver = Node(stage, ingle, "giver", "echo").up()
        ingress = Node(stage, ingle, "ingress").join(giver).up()
        for node in (giver, ingress):
            node.until_ready(1)
        # Once: it joins here, and what is hashed once is hashed.
        copying = Copying(stage, ingle, giver)
        copying.node.join(giver)
        if copy_once(stage, copying.node, threading.Event()) is None:
            sys.exit(f"error: no copy came about:\n{copying.node.log()[-2000:]}")
        alone, beside, rates = [], [], []
        for turn in range(given.rounds):
            say(f"round {turn + 1} of {given.rounds}")
            alone += asyncio.run(gaps(ingress.http))
            copying = Copying(stage, ingle, giver)
            copying.start()
            beside += asyncio.run(gaps(ingress.http))
            copying.ending.set()
            copying.join(60)
            rates += copying.rates
    result = {
        "machine": where, "copies": len(rates), "mb_per_s": quantile(rates, 0.5),
        "gap_ms": {name: {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}
                   for name, values in (("alone", alone), ("beside", beside))},
    }
    gap = result["gap_ms"]
    result["ratio"] = {q: gap["beside"][q] / gap["alone"][q] for q in ("p50", "p99")}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    print(where)
    print(f"{len(rates)} copies, {result['mb_per_s']:.0f} MB/s in the middle")
    rows = [[name, gap[name]["p50"], gap[name]["p99"]] for name in ("alone", "beside")]
    print(table("time between tokens, ms", ["", "p50", "p99"], [*rows, ["ratio", *result["ratio"].values()]]))


if __name__ == "__main__":
    main()
