"""What the scripts `measure_*.py` share: nodes, nginx and the tools of `simulations` as processes, an HTTP client that
notes when what came, and tables. Python 3.11, standard library only; Linux (it reads /proc). Everything listens on
loopback and ends with the script that started it, however that ends.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

START_LIMIT = 60.0
END_LIMIT = 30.0


def say(text: str) -> None:
    """Progress; the result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def parser(doc: str, tools: bool = True) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    options.add_argument("--ingle", type=Path, required=True, help="the ingle binary, a release build")
    if tools:
        options.add_argument("--tools", type=Path, help="the `figures` binary [default: beside ingle]")
    options.add_argument("--json", action="store_true", help="print JSON")
    return options


def machine() -> str:
    """What the figures depend on."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} at the start" + (
        " (busy: only ratios within this run mean anything)" if load > 1 else "")


# ---------------------------------------------------------------- numbers


def quantile(values: Iterable[float], q: float) -> float:
    """By nearest rank; not a number where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else float("nan")


def table(title: str, head: list[str], rows: list[list]) -> str:
    """Columns side by side, numbers to the right."""
    def text(cell: object) -> str:
        return "-" if cell is None or cell != cell else f"{cell:.2f}" if isinstance(cell, float) else str(cell)

    lines = [head, *([text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    out = [f"\n{title}"]
    for line in lines:
        cells = (cell.ljust(width) if column == 0 else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(line, widths)))
        out.append("  " + "  ".join(cells).rstrip())
    return "\n".join(out)


# ---------------------------------------------------------------- processes


def children(pid: int) -> list[int]:
    """Processes that this one started and that run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                if int(parent) == pid and state not in "ZX":
                    found.append(int(folder.name))
    return found


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def cpu_seconds(pids: Iterable[int]) -> float:
    """Time on a processor so far, of all threads. In nanoseconds where the kernel says so, else in hundredths."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            exact = sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
            # Threads that have ended count in ticks only.
            total += max(exact / 1e9, ticks - 0.02)
    return total


def pss_mib(pids: Iterable[int]) -> float:
    """Memory, with what is shared divided among those who share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total / 1024


def send(pid: int, what: signal.Signals) -> None:
    """A signal; that the process has gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Stage(contextlib.ExitStack):
    """A temporary folder and everything that runs there; all of it ends with the `with` block."""

    def __enter__(self) -> "Stage":
        super().__enter__()
        # A script that is told to end must still end what it started.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="ingle-figures-")))
        return self

    def process(self, command: list, log: str, cores: str | None = None) -> subprocess.Popen:
        """Starts a process, which is killed at the end at the latest. `cores` pins it, as `taskset -c` takes it."""
        words = [*(["taskset", "-c", cores] if cores else []), *map(str, command)]
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith("INGLE_") or name == "INGLE_MODEL_CACHE"}
        with open(self.folder / f"{log}.out", "ab") as out, open(self.folder / f"{log}.err", "ab") as err:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                                       cwd=self.folder, start_new_session=True)
        self.callback(self.kill, process)
        return process

    @staticmethod
    def kill(process: subprocess.Popen) -> None:
        """A process and all below it, stopped ones too."""
        if process.poll() is None:
            for pid in tree(process.pid):
                send(pid, signal.SIGKILL)
            process.wait(END_LIMIT)

    def line(self, process: subprocess.Popen, log: str, pattern: str, since: int = 0, limit: float = START_LIMIT) -> str:
        """Waits for a line of standard output; its first group."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = re.search(pattern, (self.folder / f"{log}.out").read_text()[since:], re.MULTILINE)
            if found:
                return found[1]
            if process.poll() is not None:
                sys.exit(f"error: {log} ended with {process.returncode}:\n{(self.folder / f'{log}.err').read_text()[-2000:]}")
            time.sleep(0.005)
        sys.exit(f"error: {log} did not say `{pattern}` within {limit} s")

    def tool(self, tools: Path, name: str, *arguments: object, cores: str | None = None) -> tuple[subprocess.Popen, str]:
        """Starts a server of the `figures` binary; the process and its address."""
        log = f"{name}-{free_port()}"
        process = self.process([tools, name, *arguments], log, cores)
        return process, self.line(process, log, r"^Listening at (\S+)$")


def load(tools: Path, to: str, *arguments: object, cores: str | None = None) -> dict:
    """Runs the load generator to its end; what it measured."""
    command = [*(["taskset", "-c", cores] if cores else []), tools, "load", "--to", to, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"error: the load generator ended with {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


# ---------------------------------------------------------------- nodes


@dataclass
class Node:
    """A node of ours, in a state directory of its own."""

    stage: Stage
    ingle: Path
    name: str
    model: str = "none"
    options: list[str] = field(default_factory=list)
    config: str = ""
    quic: str = "127.0.0.1:0"
    http: str = "127.0.0.1:0"
    process: subprocess.Popen | None = None
    started_s: float = 0.0

    @property
    def state(self) -> Path:
        return self.stage.folder / self.name

    def up(self, cores: str | None = None) -> "Node":
        """Starts it and waits until it answers HTTP. The next run has the same addresses."""
        out = self.stage.folder / f"node-{self.name}.out"
        since = len(out.read_text()) if out.exists() else 0
        words = [self.ingle, "up", "--state-dir", self.state, "--http", self.http, "--quic", self.quic, "--no-mdns",
                 "--name", self.name, "--model", self.model, *self.options]
        if self.config:
            file = self.stage.folder / f"{self.name}.toml"
            file.write_text(self.config)
            words += ["--config", file]
        began = time.monotonic()
        self.process = self.stage.process(words, f"node-{self.name}", cores)
        self.http = self.stage.line(self.process, f"node-{self.name}", r"^Ingle node .* at http://(\S+)$", since)
        self.started_s = time.monotonic() - began
        if self.quic.endswith(":0"):
            self.quic = self.own()["address"]
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    def pids(self) -> list[int]:
        """Its process and its engines'."""
        return tree(self.pid)

    def run(self, *words: object) -> subprocess.CompletedProcess:
        return subprocess.run([str(self.ingle), *map(str, words), "--state-dir", str(self.state)], capture_output=True,
                              text=True, timeout=START_LIMIT)

    def status(self) -> dict:
        """`ingle status --json`; empty while it has none."""
        done = self.run("status", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {"nodes": []}

    def own(self) -> dict:
        status = self.status()
        return next(node for node in status["nodes"] if node["id"] == status["this_node"])

    def join(self, other: "Node") -> "Node":
        """Makes it a member of the other's cluster, before it runs."""
        done = other.run("token", "--json")
        token = json.loads(done.stdout)
        done = self.run("join", other.quic, "--token", token["token"], "--name", self.name)
        if done.returncode:
            sys.exit(f"error: {self.name} cannot join: {done.stderr}")
        return self

    def until(self, what: str, is_so, limit: float = START_LIMIT) -> dict:
        """Asks for its status until it is as expected."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            status = self.status()
            if is_so(status):
                return status
            time.sleep(0.1)
        sys.exit(f"error: {self.name} waited {limit} s in vain: {what}\n{json.dumps(status, indent=1)}")

    def until_ready(self, workers: int) -> None:
        """Waits until it knows so many models, all over the cluster, as ready."""
        def is_so(status: dict) -> bool:
            alive = [node for node in status["nodes"] if node["health"]["state"] == "alive"]
            return sum(model["state"] == "ready" for node in alive for model in node["models"]) >= workers
        self.until(f"{workers} models are ready", is_so)

    def log(self) -> str:
        return (self.stage.folder / f"node-{self.name}.err").read_text()

    def terminate(self) -> None:
        """SIGTERM, and waits for its end."""
        self.process.terminate()
        self.process.wait(END_LIMIT)


def cluster(stage: Stage, ingle: Path, workers: int, model: str, ingresses: int = 1,
            options: list[str] | None = None) -> tuple[list[Node], list[Node]]:
    """Workers `w1`… with the model, and ingress nodes `in1`… without one, all of one cluster and ready."""
    ours = [Node(stage, ingle, f"w{n + 1}", model, list(options or [])) for n in range(workers)]
    ours += [Node(stage, ingle, f"in{n + 1}", "none", list(options or [])) for n in range(ingresses)]
    ours[0].up()
    for node in ours[1:]:
        node.join(ours[0]).up()
    for node in ours:
        node.until_ready(workers)
    return ours[:workers], ours[workers:]


# ---------------------------------------------------------------- nginx


def nginx(stage: Stage, name: str, config: str, cores: str | None = None) -> subprocess.Popen:
    """Debian's nginx with a configuration of ours, in the foreground."""
    file = stage.folder / f"{name}.conf"
    file.write_text(config)
    process = stage.process(["nginx", "-p", stage.folder, "-c", file, "-e", "stderr", "-g", "daemon off;"], name, cores)
    port = int(re.search(r"listen 127\.0\.0\.1:(\d+)", config)[1])
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end:
        if process.poll() is not None:
            sys.exit(f"error: nginx ended: {(stage.folder / f'{name}.err').read_text()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.005)
    sys.exit("error: nginx does not answer")


# ---------------------------------------------------------------- requests


@dataclass
class Answer:
    """What became of a request."""

    sent: float
    status: int = 0
    error: str = ""
    node: str = ""
    request_id: str = ""
    retry_after: str = ""
    text: str = ""
    done: bool = False
    tokens: list[float] = field(default_factory=list)
    ended: float = 0.0

    @property
    def ok(self) -> bool:
        """Answered, and to its end."""
        return self.status == 200 and not self.error and self.done

    @property
    def took(self) -> float:
        return self.ended - self.sent

    @property
    def widest_gap(self) -> float:
        """Between two tokens, or before the first."""
        times = [self.sent, *self.tokens]
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)

    def what(self) -> str:
        """Why it counts as failed."""
        return self.error or (f"HTTP {self.status}" if self.status != 200 else "truncated")


def chat(model: str, text: str, **more: object) -> dict:
    """The body of a request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


async def ask(to: str, body: dict, limit: float = 60.0, headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own. Never fails: what went wrong is in the answer."""
    answer = Answer(time.monotonic())
    writer = None
    try:
        async with asyncio.timeout(limit):
            host, port = to.rsplit(":", 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            payload = json.dumps(body).encode()
            more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
            writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {to}\r\nContent-Type: application/json\r\n"
                         f"Connection: close\r\n{more}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
            pieces = _pieces(reader, await _head(reader, answer))
            if answer.status == 200 and body.get("stream"):
                await _events(pieces, answer)
            else:
                content = b"".join([piece async for piece in pieces])
                answer.done = True
                if answer.status == 200:
                    answer.text = json.loads(content)["choices"][0]["message"]["content"]
                else:
                    answer.error = f"HTTP {answer.status}: {content.decode(errors='replace')[:300]}"
    except TimeoutError:
        answer.error = f"no end within {limit} s"
    except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.ended = time.monotonic()
        if writer:
            writer.close()
    return answer


async def _head(reader: asyncio.StreamReader, answer: Answer) -> dict[str, str]:
    line = await reader.readline()
    if not line:
        raise ConnectionError("closed before an answer")
    answer.status = int(line.split()[1])
    headers = {}
    while (line := (await reader.readline()).strip()):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    answer.node = headers.get("x-ingle-node", "")
    answer.request_id = headers.get("x-request-id", "")
    answer.retry_after = headers.get("retry-after", "")
    return headers


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]):
    """The body as it comes."""
    if headers.get("transfer-encoding") == "chunked":
        while (size := int((await reader.readline()).split(b";")[0] or b"x", 16)):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while (piece := await reader.read(65536)):
            yield piece


async def _events(pieces, answer: Answer) -> None:
    """Server-sent events."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                answer.done = True
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error = f"error event: {event['error'].get('code')}: {event['error'].get('message')}"
                for choice in event.get("choices", []):
                    if choice["delta"].get("content"):
                        answer.tokens.append(time.monotonic())
                        answer.text += choice["delta"]["content"]


async def steadily(rate: float, seconds: float, request) -> list[Answer]:
    """Calls `request(n)` so many times a second, whatever becomes of those before; all answers."""
    began, running = time.monotonic(), []
    for n in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + n / rate - time.monotonic()))
        running.append(asyncio.create_task(request(n)))
    return list(await asyncio.gather(*running))


def failures(answers: Iterable[Answer]) -> dict[str, int]:
    """How many failed, and why."""
    counts: dict[str, int] = {}
    for answer in answers:
        if not answer.ok:
            counts[answer.what()] = counts.get(answer.what(), 0) + 1
    return counts
