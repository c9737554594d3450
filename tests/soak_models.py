"""Loads, switches and unloads models again and again, and looks whether anything grows: memory, files, processes.

One node with an echo engine of its own. In each cycle a small model is loaded by command, asked, replaced by another
version under the same name, asked, unloaded, and loaded again by a request. After the first fifth of the cycles the
node's memory, open files, threads, processes and files in its state directory are compared with those at the end; the
command fails where they have grown by more than noise.

    python3 tests/soak_models.py --ingle target/release/ingle --cycles 200
"""

import json
import os
import statistics
import sys
import time
import urllib.request
from pathlib import Path

from measuring import Node, Stage, children, machine, parser, say, table

# A node remembers so many requests for `ingle explain`: memory that is taken once.
REMEMBERED = 520
FIXTURES = Path(__file__).parent.parent / "actors/engine/tests/fixtures/tiny"


def ask(node: Node, model: str) -> str:
    """A short answer; an error ends the command."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(f"http://{node.http}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def command(node: Node, *words: object) -> None:
    done = node.run(*words)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, words))}: {done.stderr}")


def look(node: Node) -> dict:
    """What could grow. The node's own engine is the only child while nothing else is loaded."""
    status = Path(f"/proc/{node.pid}/status").read_text()
    number = lambda name: int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])
    files = [path for path in node.state.rglob("*") if not path.is_dir()]
    return {
        "rss_mib": round(number("VmRSS:") / 1024, 2),
        "anon_mib": round(number("RssAnon:") / 1024, 2),
        "open_files": len(os.listdir(f"/proc/{node.pid}/fd")),
        "threads": number("Threads:"),
        "engines": len(children(node.pid)),
        "files": len(files),
    }


def main() -> None:
    options = parser(__doc__, tools=False)
    options.add_argument("--cycles", type=int, default=200)
    options.add_argument("--first", type=Path, default=FIXTURES / "llama3.gguf", help="the model")
    options.add_argument("--second", type=Path, default=FIXTURES / "qwen2.gguf", help="its other version")
    given = options.parse_args()
    with Stage() as stage:
        node = Node(stage, given.ingle.resolve(), "soak", "echo").up()
        node.until_ready(1)
        for _ in range(REMEMBERED):
            ask(node, "echo")
        seen, load_s, unload_s = [], [], []
        began = time.monotonic()
        for cycle in range(given.cycles):
            at = time.monotonic()
            command(node, "models", "load", given.first.resolve(), "--name", "soak")
            load_s.append(time.monotonic() - at)
            first = ask(node, "soak")
            command(node, "models", "load", given.second.resolve(), "--name", "soak")
            if ask(node, "soak") == first:
                sys.exit("error: the other version gives the same answer: nothing was switched")
            at = time.monotonic()
            command(node, "models", "unload", "soak")
            unload_s.append(time.monotonic() - at)
            ask(node, "soak")
            command(node, "models", "unload", "soak")
            end = time.monotonic() + 10
            while len(children(node.pid)) > 1 and time.monotonic() < end:
                time.sleep(0.02)
            seen.append(look(node))
            if cycle % 20 == 19:
                say(f"{cycle + 1} cycles: {seen[-1]}")
        took = time.monotonic() - began
    warm = max(1, given.cycles // 5)
    before = {name: statistics.median(row[name] for row in seen[warm - 1:warm + 4]) for name in seen[0]}
    after = {name: statistics.median(row[name] for row in seen[-5:]) for name in seen[0]}
    # Allocators keep what they had once; a leak of 10 KiB a cycle is 1.6 MiB in 160 cycles.
    noise = {"rss_mib": 1.5, "anon_mib": 1.5, "open_files": 3, "threads": 2, "engines": 0, "files": 0}
    grown = [name for name in before if after[name] > before[name] + noise[name]]
    figures = {"machine": machine(), "cycles": given.cycles, "seconds": round(took, 1), "before": before,
               "after": after, "load_s_p50": round(statistics.median(load_s), 2),
               "unload_s_p50": round(statistics.median(unload_s), 2), "grown": grown}
    if given.json:
        print(json.dumps(figures, indent=1))
    else:
        rows = [[name, before[name], after[name]] for name in before]
        print(table(f"{given.cycles} cycles of load, switch, unload, reload in {took:.0f} s",
                    ["", f"after {warm}", f"after {given.cycles}"], rows))
        print(f"a load takes {figures['load_s_p50']} s, an unload {figures['unload_s_p50']} s (p50)")
    if grown:
        sys.exit(f"error: grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
