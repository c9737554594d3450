"""What the scripts `measure_*.py` share: nodes, nginx and the tools of `simulations` as processes, and tables. Python
3.11, standard library only; Linux (it reads /proc). Everything listens on loopback and ends with the script that
started it, however that ends (SIGKILL excepted).
"""

import argparse
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
            tasks = Path(f"/proc/{pid}/task").iterdir()
            exact = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
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

    def line(self, process: subprocess.Popen, log: str, pattern: str, since: int = 0,
             limit: float = START_LIMIT) -> str:
        """Waits for a line of standard output; its first group."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            found = re.search(pattern, (self.folder / f"{log}.out").read_text()[since:], re.MULTILINE)
            if found:
                return found[1]
            if process.poll() is not None:
                why = (self.folder / f"{log}.err").read_text()[-2000:]
                sys.exit(f"error: {log} ended with {process.returncode}:\n{why}")
            time.sleep(0.005)
        sys.exit(f"error: {log} did not say `{pattern}` within {limit} s")

    def tool(self, tools: Path, name: str, *arguments: object,
             cores: str | None = None) -> tuple[subprocess.Popen, str]:
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
    #: Words in front of its command: where it runs.
    within: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    started_s: float = 0.0

    @property
    def state(self) -> Path:
        return self.stage.folder / self.name

    def up(self, cores: str | None = None) -> "Node":
        """Starts it and waits until it answers HTTP. The next run has the same addresses."""
        out = self.stage.folder / f"node-{self.name}.out"
        since = len(out.read_text()) if out.exists() else 0
        words = [*self.within, self.ingle, "up", "--state-dir", self.state, "--http", self.http, "--quic", self.quic, "--no-mdns",
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
        return subprocess.run([*self.within, str(self.ingle), *map(str, words), "--state-dir", str(self.state)], capture_output=True,
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


# ---------------------------------------------------------------- machines of their own


class Network:
    """Machines with network stacks of their own on one switch, by Linux network namespaces and veth; this machine is
    on it too, as `own`. Needs root, iproute2 and nftables."""

    def __init__(self, stage: Stage, names: list[str]) -> None:
        self.switch, self.own = f"ingle{os.getpid() % 10000}", "10.177.0.1"
        self.addresses = {name: f"10.177.0.{n + 11}" for n, name in enumerate(names)}
        stage.callback(self.remove)
        self.words("ip", "link", "add", self.switch, "type", "bridge")
        self.words("ip", "address", "add", f"{self.own}/24", "dev", self.switch)
        self.words("ip", "link", "set", self.switch, "up")
        for name, address in self.addresses.items():
            space = self.space(name)
            self.words("ip", "netns", "add", space)
            self.words("ip", "link", "add", f"{space}v", "type", "veth", "peer", "name", "eth0", "netns", space)
            self.words("ip", "link", "set", f"{space}v", "master", self.switch, "up")
            self.words("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            self.words("ip", "-n", space, "link", "set", "eth0", "up")
            self.words("ip", "-n", space, "link", "set", "lo", "up")

    @staticmethod
    def words(*words: str, text: str | None = None) -> None:
        try:
            done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            sys.exit(f"error: {words[0]} is not here (apt install iproute2 nftables)")
        if done.returncode:
            sys.exit(f"error: {' '.join(words)}: {done.stderr.strip()} (it takes root, and a kernel that allows it)")

    def space(self, name: str) -> str:
        return f"{self.switch}{name}"

    def within(self, name: str) -> list[str]:
        """Words that run a command on the machine."""
        return ["ip", "netns", "exec", self.space(name)]

    def cut(self, name: str, one_way: bool = False) -> None:
        """Packets to the machine are dropped where they arrive, and, unless `one_way`, those that it sends too."""
        drop = ("add table inet cut\nadd chain inet cut input {{ type filter hook input priority 0; }}\n"
                "add rule inet cut input {} drop\n")
        self.words(*self.within(name), "nft", "-f", "-", text=drop.format('iifname "eth0"'))
        if not one_way:
            self.words("nft", "-f", "-", text=drop.format(f"ip saddr {self.addresses[name]}"))
            for other in self.addresses.keys() - {name}:
                self.words(*self.within(other), "nft", "-f", "-", text=drop.format(f"ip saddr {self.addresses[name]}"))

    def mend(self) -> None:
        """All packets arrive again."""
        for within in ([], *map(self.within, self.addresses)):
            subprocess.run([*within, "nft", "delete", "table", "inet", "cut"], capture_output=True, timeout=30)

    def remove(self) -> None:
        self.mend()
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", self.space(name)], capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "delete", self.switch], capture_output=True, timeout=30)


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
