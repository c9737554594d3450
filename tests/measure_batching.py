#!/usr/bin/env python3
"""Measures what continuous batching and prefix reuse are worth, through HTTP. Standard library only; run by hand.

    python3 tests/measure_batching.py --ingle target/release/ingle [--model FILE.gguf] [--json]

1. A stream of answers runs while prompts of about 2,000 tokens arrive one after the other: the gaps between its
   tokens (median, p99, and p99 as a multiple of the median; at most 3 is wanted), and the same without the prompts.
2. A conversation of about 1,500 tokens gets a second question: the time to its first token, against the time to the
   first token of the same conversation when nothing is known of it (at least 10 times sooner is wanted).
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

WORDS = "the house stands by the river and the fire in its hearth keeps everybody warm through the long winter".split()


def text(seed: int, words: int) -> str:
    """Some words in an order that the seed decides."""
    return " ".join(WORDS[(seed * 7 + n * n + n // 5) % len(WORDS)] for n in range(words))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Node:
    """`ingle up` in a folder of its own."""

    def __init__(self, ingle: str, model: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.process = subprocess.Popen(
            [ingle, "up", "--state-dir", self.folder.name, "--http", self.url[7:], "--quic", "127.0.0.1:0",
             "--no-mdns", "--model", model], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Node":
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"error: the node ended: {self.process.stderr.read()}")
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5):
                    self.model = json.load(urllib.request.urlopen(f"{self.url}/v1/models"))["data"][0]["id"]
                    return self
            except OSError:
                time.sleep(0.05)
        sys.exit("error: the node did not become ready within 120 s")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.folder.cleanup()

    def stream(self, messages: list, max_tokens: int) -> tuple[list[float], str, dict]:
        """The times of all tokens after the request, the text, and the usage."""
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        started, times, words, usage = time.perf_counter(), [], [], {}
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        times.append(time.perf_counter() - started)
                        words.append(choice["delta"]["content"])
        return times, "".join(words), usage


def gaps(times: list[float]) -> dict:
    """Milliseconds between tokens."""
    between = sorted((b - a) * 1e3 for a, b in zip(times, times[1:]))
    median, p99 = between[len(between) // 2], between[min(len(between) - 1, len(between) * 99 // 100)]
    return {"median_ms": round(median, 2), "p99_ms": round(p99, 2), "p99_by_median": round(p99 / median, 2)}


def streams_beside_prompts(node: Node) -> dict:
    """Part 1."""
    ask = [{"role": "user", "content": "Tell a long story."}]
    alone = gaps(node.stream(ask, 300)[0])
    stop = threading.Event()
    sizes: list[int] = []

    def prompts() -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            usage = node.stream([{"role": "user", "content": f"{seed}: " + text(seed, 1950)}], 1)[2]
            sizes.append(usage.get("prompt_tokens", 0))

    thread = threading.Thread(target=prompts)
    thread.start()
    time.sleep(0.2)
    beside = gaps(node.stream(ask, 600)[0])
    stop.set()
    thread.join()
    return {"alone": alone, "beside_prompts": beside, "prompts": len(sizes), "prompt_tokens": max(sizes)}


def second_questions(node: Node) -> dict:
    """Part 2; the best of three on each side."""
    fresh, second, cached = [], [], 0
    for seed in range(3):
        first = [{"role": "user", "content": f"{seed + 1000}! " + text(seed, 1450)}]
        times, words, _ = node.stream(first, 16)
        fresh.append(times[0])
        more = [*first, {"role": "assistant", "content": words}, {"role": "user", "content": "And then?"}]
        times, _, usage = node.stream(more, 16)
        second.append(times[0])
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {"first_token_ms_unknown": round(min(fresh) * 1e3, 1), "first_token_ms_known": round(min(second) * 1e3, 1),
            "times_sooner": round(min(fresh) / min(second), 1), "cached_tokens": cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ingle", required=True, help="the ingle binary, a release build")
    parser.add_argument("--model", default="default", help="a GGUF file [default: the default model]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with Node(options.ingle, options.model) as node:
        result = {"streams": streams_beside_prompts(node), "second_question": second_questions(node)}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for part, figures in result.items():
        print(part)
        for name, value in figures.items():
            print(f"  {name:<24} {value}")


if __name__ == "__main__":
    main()
