#!/usr/bin/env python3
"""Measures Ingle's CPU engine beside llama.cpp on one model file and prints one table. docs/benchmarks.md says how.

Run it by hand on a quiet machine: llama.cpp's threads wait for each other spinning, so one busy neighbour makes it
many times slower. Every number is the best of some rounds, and the two sides take turns.

    python3 tests/compare_llama_cpp.py --ingle target/release/ingle --llama-bin FOLDER --model MODEL.gguf
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROMPT_TOKENS = 512
DECODE_TOKENS = 128
AT_ONCE = (1, 4, 16)
BATCHED_BENCH_TRIES = 5
#: Tokens that one HTTP request may need: its prompt is below 128.
REQUEST_CONTEXT = 512
START_LIMIT = 120.0
END_LIMIT = 10.0

SUBJECTS = [
    "a lighthouse keeper", "a clock on an island", "two bakers", "a lost map", "the first snow", "a night train",
    "an old violin", "a beehive", "a letter without a stamp", "a chess game", "a river in flood", "a kite",
    "the last tram", "a broken radio", "a garden wall", "a fox at the door",
]


class CompareError(Exception):
    """What went wrong and what to do next."""


def say(text: str) -> None:
    """Progress; the result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- results


@dataclass
class Measured:
    """One number of one side on one file: the best of all rounds."""

    side: str
    measure: str
    file: str
    values: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.values) if self.measure.endswith("bytes") else max(self.values)


class Results:
    def __init__(self, model: Path) -> None:
        self.model = model
        self.numbers: dict[tuple[str, str, str], Measured] = {}
        self.notes: list[str] = []

    def add(self, side: str, measure: str, file: Path, value: float) -> None:
        key = (side, measure, file.name)
        self.numbers.setdefault(key, Measured(*key)).values.append(value)

    def note(self, text: str) -> None:
        """Said once."""
        if text not in self.notes:
            self.notes.append(text)
            say(f"note: {text}")

    def rows(self) -> list[dict]:
        """Our numbers beside theirs for the same measure: on the same file, and the given file beside their Q4_0."""
        out = []
        measures = list(dict.fromkeys(number.measure for number in self.numbers.values()))
        for measure in sorted(measures, key=_order):
            of_it = [number for number in self.numbers.values() if number.measure == measure]
            ours, theirs = ([number for number in of_it if number.side == side] for side in ("ingle", "llama.cpp"))
            for our in ours or [None]:
                for their in theirs or [None]:
                    if our and their and our.file not in (their.file, self.model.name):
                        continue
                    out.append({
                        "measure": measure,
                        "ingle": our and our.best, "ingle_file": our and our.file,
                        "llama_cpp": their and their.best, "llama_cpp_file": their and their.file,
                        "ratio": our.best / their.best if our and their and their.best else None,
                    })
        return out


def _order(measure: str) -> tuple[int, int]:
    kinds = ("prompt", "decode", "http", "http_bytes")
    kind, _, count = measure.partition(" ")
    return (kinds.index(kind) if kind in kinds else len(kinds), int(count) if count.isdigit() else 0)


TITLES = {
    "prompt": f"prompt of {PROMPT_TOKENS} tokens, tokens/s",
    "decode": "decode, {} at once, tokens/s",
    "http": "HTTP, {} at once, answer tokens/s",
    "http_bytes": "HTTP server, most memory, MiB",
    "bench_bytes": "bench, memory, MiB",
}


def table(results: Results) -> str:
    """The rows as text."""
    def number(value: float | None, measure: str) -> str:
        if value is None:
            return "-"
        return f"{value / 2**20:.0f}" if measure.endswith("bytes") else f"{value:.1f}"

    def short(name: str | None) -> str:
        return "-" if name is None else name if len(name) <= 28 else f"{name[:10]}…{name[-17:]}"

    lines = [("measure", "Ingle", "file", "llama.cpp", "file", "Ingle / llama.cpp")]
    for row in results.rows():
        kind, _, count = row["measure"].partition(" ")
        lines.append((
            TITLES[kind].format(count), number(row["ingle"], kind), short(row["ingle_file"]),
            number(row["llama_cpp"], kind), short(row["llama_cpp_file"]),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = (1, 3, 5)
    text = [" | ".join(cell.rjust(width) if column in numeric else cell.ljust(width)
                       for column, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines]
    text.insert(1, "-|-".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in text + [f"note: {note}" for note in results.notes])


# ---------------------------------------------------------------- commands


def run(command: list, what: str, limit: float) -> str:
    """A command's standard output."""
    try:
        command = [str(part) for part in command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except FileNotFoundError:
        raise CompareError(f"{command[0]} is not there: build it, or name its folder") from None
    except subprocess.TimeoutExpired:
        raise CompareError(f"{what} took more than {limit:.0f} s: give --limit more, or a smaller model") from None
    if done.returncode != 0:
        raise CompareError(f"{what} failed ({done.returncode}): {last_lines(done.stderr or done.stdout)}")
    return done.stdout


def last_lines(text: str, count: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


def make_q4_0(args: argparse.Namespace) -> Path:
    """The model requantized to Q4_0, which llama.cpp repacks for its fastest kernels; kept in the work folder."""
    out = args.work_dir / f"{args.model.stem}.Q4_0.gguf"
    if out.exists() and out.stat().st_mtime >= args.model.stat().st_mtime:
        return out
    say(f"making {out.name} with llama-quantize")
    part = out.with_suffix(".part")
    command = [args.llama_bin / "llama-quantize", "--allow-requantize", args.model, part, "Q4_0"]
    run(command, "llama-quantize", args.limit)
    part.replace(out)
    return out


def llama_bench(args: argparse.Namespace, file: Path, results: Results) -> None:
    """llama-bench: a prompt of 512 tokens, and 128 tokens of one answer."""
    said = run([args.llama_bin / "llama-bench", "-m", file, "-t", args.threads, "-p", PROMPT_TOKENS,
                "-n", DECODE_TOKENS, "-r", 1, "-o", "json"], "llama-bench", args.limit)
    for test in json.loads(said):
        results.add("llama.cpp", "prompt" if test["n_prompt"] else "decode 1", file, test["avg_ts"])


def llama_batched_bench(args: argparse.Namespace, file: Path, results: Results) -> None:
    """llama-batched-bench: several answers at once."""
    tool = args.llama_bin / "llama-batched-bench"
    if not tool.exists():
        results.note("llama-batched-bench is not built: llama.cpp's decode at 4 and 16 at once is not measured")
        return
    missing = [count for count in AT_ONCE if count > 1]
    context = max(missing) * (128 + DECODE_TOKENS)
    # Its log thread may lose the last line when the program ends, with exit code 0: what is missing is measured again.
    for _ in range(BATCHED_BENCH_TRIES):
        said = run([tool, "-m", file, "-t", args.threads, "-c", context, "-npp", 128, "-ntg", DECODE_TOKENS, "-npl",
                    ",".join(map(str, missing)), "--output-format", "jsonl"], "llama-batched-bench", args.limit)
        for test in (json.loads(line) for line in said.splitlines() if line.startswith("{")):
            results.add("llama.cpp", f"decode {test['pl']}", file, test["speed_tg"])
            missing.remove(test["pl"])
        if not missing:
            return
    results.note(f"llama-batched-bench printed no result for {', '.join(map(str, missing))} at once with {file.name}")


def ingle_bench(args: argparse.Namespace, file: Path, results: Results) -> bool:
    """`ingle bench`; false where this ingle has none, or it cannot read the file."""
    try:
        said = run([args.ingle, "bench", "--model", file, "--json", *args.bench_option], "ingle bench", args.limit)
    except CompareError as error:
        why = str(error)
        if "unrecognized subcommand" in why:
            results.note("this ingle has no `bench` command: build a newer one; the HTTP numbers do not need it")
        else:
            results.note(f"`ingle bench` with {file.name}: {why}")
        return False
    try:
        answer = json.loads(said)
        results.add("ingle", "prompt", file, float(answer["prompt_tokens_per_second"]))
        for count, speed in answer["decode_tokens_per_second"].items():
            results.add("ingle", f"decode {count}", file, float(speed))
        if answer.get("memory_bytes"):
            results.add("ingle", "bench_bytes", file, float(answer["memory_bytes"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        results.note(f"`ingle bench --json` said something else than expected ({error!r}): {last_lines(said, 2)}")
        return False
    return True


# ---------------------------------------------------------------- servers


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def family(process: subprocess.Popen) -> dict[int, str]:
    """The process and all below it (an engine has a process group of its own), each with when it started."""
    parents, starts = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # Behind the name, which may hold anything: state, parent, ..., and the start time as the 20th.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)], starts[int(entry.name)] = int(fields[1]), fields[19]
    found = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: starts[pid] for pid in found if pid in starts}


def peak_memory(process: subprocess.Popen) -> int:
    """The most resident memory that a process and those below it have had, in bytes; 0 where /proc does not say."""
    total = 0
    for pid in family(process):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    return total


@contextlib.contextmanager
def server(command: list, port: int, ready: str, log: Path) -> Iterator[subprocess.Popen]:
    """A server, answering at `ready`; it is ended whatever happens, with all its processes."""
    with log.open("wb") as out:
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   start_new_session=True)
    try:
        wait_until_ready(process, port, ready, log)
        yield process
    finally:
        end(process)


def wait_until_ready(process: subprocess.Popen, port: int, path: str, log: Path) -> None:
    name = Path(process.args[0]).name
    end_at = time.monotonic() + START_LIMIT
    while time.monotonic() < end_at:
        if process.poll() is not None:
            raise CompareError(f"{name} ended at once: {last_lines(log.read_text(errors='replace'))}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    said = last_lines(log.read_text(errors="replace"))
    raise CompareError(f"{name} was not ready within {START_LIMIT:.0f} s: {said}")


def end(process: subprocess.Popen) -> None:
    """Asks, waits, then kills what is left of it and of the processes below it."""
    below = family(process)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_LIMIT)
    process.kill()
    process.wait()
    for pid, started in below.items():
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] == started:
                os.kill(pid, signal.SIGKILL)


def llama_server(args: argparse.Namespace, file: Path, port: int) -> list:
    return [args.llama_bin / "llama-server", "-m", file, "-t", args.threads, "-np", args.requests,
            "-c", args.requests * REQUEST_CONTEXT, "--host", "127.0.0.1", "--port", port]


def ingle_up(args: argparse.Namespace, file: Path, port: int, state: Path) -> list:
    return [args.ingle, "up", "--model", file, "--http", f"127.0.0.1:{port}",
            "--quic", "127.0.0.1:0", "--no-mdns", "--name", "compare", "--state-dir", state, *args.ingle_option]


# ---------------------------------------------------------------- requests


def ask(port: int, body: dict, limit: float) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        raise CompareError(f"a chat completion broke ({error!r}): give --limit more, or see --work-dir's logs") from None
    finally:
        connection.close()


def request(subject: str, series: str, ignore_eos: bool) -> dict:
    """A greedy request. `series` makes its prompt new, so that no server knows its beginning."""
    content = f"{series}. Write a long story about {subject}, with many details about the place and the weather."
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": DECODE_TOKENS, "temperature": 0}
    return body | {"ignore_eos": True} if ignore_eos else body


def takes_ignore_eos(port: int, side: str, args: argparse.Namespace, results: Results) -> bool:
    """Tries it, which warms the server up too."""
    status, answer = ask(port, request("a stone", "Warm up", True) | {"max_tokens": 4}, args.limit)
    if status == 200:
        return True
    if status == 400 and "ignore_eos" in json.dumps(answer):
        results.note(f"{side} refuses `ignore_eos`: its answers may end before {DECODE_TOKENS} tokens")
        ask(port, request("a stone", "Warm up", False) | {"max_tokens": 4}, args.limit)
        return False
    raise CompareError(f"{side} answered {status}: {json.dumps(answer)[:400]}")


def speed(port: int, count: int, series: str, ignore_eos: bool, limit: float) -> tuple[float, int]:
    """Answer tokens per second of `count` requests at once, prompts included in the time; and how many were refused."""
    subjects = [SUBJECTS[number % len(SUBJECTS)] for number in range(count)]
    bodies = [request(subject, f"{series}, number {number}", ignore_eos) for number, subject in enumerate(subjects)]
    answers: list = [None] * count
    start = threading.Barrier(count + 1)

    def one(number: int) -> None:
        start.wait()
        try:
            answers[number] = ask(port, bodies[number], limit)
        except CompareError as error:
            answers[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    for answer in answers:
        if isinstance(answer, CompareError):
            raise answer
    good = [answer for status, answer in answers if status == 200]
    if not good:
        status, answer = answers[0]
        raise CompareError(f"no request was answered; the first got {status}: {json.dumps(answer)[:400]}")
    return sum(answer["usage"]["completion_tokens"] for answer in good) / took, count - len(good)


def measure_http(args: argparse.Namespace, side: str, file: Path, number: int, results: Results) -> None:
    """One round with one server: starts it, asks 1, 4 and 16 at once, ends it."""
    port = free_port()
    log = args.work_dir / f"{side}.log"
    with tempfile.TemporaryDirectory(prefix="ingle-compare-") as state:
        command = ingle_up(args, file, port, Path(state)) if side == "ingle" else llama_server(args, file, port)
        with server(command, port, "/ready" if side == "ingle" else "/health", log) as process:
            ignore_eos = takes_ignore_eos(port, side, args, results)
            for count in sorted({*(c for c in AT_ONCE if c < args.requests), args.requests}):
                value, refused = speed(port, count, f"Round {number} with {count}", ignore_eos, args.limit)
                if refused:
                    results.note(f"{side} refused {refused} of {count} requests at once; the other answers are counted")
                results.add(side, f"http {count}", file, value)
                say(f"  {side} {file.name}: {count} at once {value:.1f} tokens/s")
            if memory := peak_memory(process):
                results.add(side, "http_bytes", file, memory)


# ---------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ingle", type=Path, required=True, help="the ingle binary, a release build")
    parser.add_argument("--llama-bin", type=Path, required=True,
                        help="folder with llama-quantize, llama-bench, llama-batched-bench and llama-server")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file, as a rule Q4_1")
    parser.add_argument("--requests", type=int, default=16, help="the most HTTP requests at once (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1,
                        help="llama.cpp's threads (default: all cores)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one command or request (default: 600)")
    parser.add_argument("--work-dir", type=Path, help="where the Q4_0 file is kept (default: a temporary folder)")
    parser.add_argument("--bench-option", action="append", default=[], metavar="OPTION",
                        help="one more word for `ingle bench`")
    parser.add_argument("--ingle-option", action="append", default=[], metavar="OPTION",
                        help="one more word for `ingle up`")
    parser.add_argument("--only", choices=["bench", "http"], help="one half of it")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args()
    for name in ("requests", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not args.model.is_file():
        parser.error(f"{args.model} is no file: name a GGUF file with --model")
    if not args.ingle.is_file():
        parser.error(f"{args.ingle} is no file: build it with `cargo build --release`, or name another with --ingle")
    args.ingle, args.llama_bin, args.model = args.ingle.resolve(), args.llama_bin.resolve(), args.model.resolve()
    tools = ("llama-quantize", "llama-bench", "llama-server")
    missing = [tool for tool in tools if not (args.llama_bin / tool).is_file()]
    if missing:
        parser.error(f"{args.llama_bin} has no {', '.join(missing)}: docs/benchmarks.md says how to build llama.cpp")
    return args


def compare(args: argparse.Namespace) -> Results:
    results = Results(args.model)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.3 * (os.cpu_count() or 1):
        results.note(f"the machine was busy at the start (load {busy:.1f}), which slows llama.cpp most: repeat it later")
    q4_0 = make_q4_0(args)
    files = list(dict.fromkeys([args.model, q4_0]))
    ours = list(files)
    for number in range(1, args.rounds + 1):
        if args.only != "http":
            say(f"round {number} of {args.rounds}: bench")
            for file in files:
                llama_bench(args, file, results)
                llama_batched_bench(args, file, results)
                if file in ours and not ingle_bench(args, file, results):
                    ours.remove(file)
        if args.only != "bench":
            say(f"round {number} of {args.rounds}: HTTP")
            measure_http(args, "ingle", args.model, number, results)
            measure_http(args, "llama.cpp", q4_0, number, results)
    return results


def main() -> int:
    args = arguments()
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    temporary = None
    if args.work_dir is None:
        temporary = args.work_dir = Path(tempfile.mkdtemp(prefix="ingle-compare-"))
    try:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        results = compare(args)
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    if args.json:
        print(json.dumps({
            "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
            "threads": args.threads, "rounds": args.rounds, "requests": args.requests,
            "rows": results.rows(), "rounds_of_each": [asdict(number) for number in results.numbers.values()],
            "notes": results.notes,
        }, indent=2))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
