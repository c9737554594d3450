"""Holds endpoints against a real server of another make: llama.cpp's `llama-server`, with real weights.

Starts two of them, nodes that pass on to them, and looks at streaming, fields, tools, usage, stops, cancelling, more
requests than slots, errors, kill -9 and return, answers that move from one to the other, and --discover. Prints a table
of what is as it should be and ends with 1 where something is not.

    python3 tests/endpoint_servers.py --ingle target/release/ingle --llama-bin DIR --model FILE.gguf
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from measuring import Node, Stage, free_port, parser, say

STORY = "Tell me a long story about a lighthouse keeper and her cat."
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}}}

# ChatML with tools as Hermes and Qwen have them, for models whose own template has none.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
For each function call, return a json object with function name and arguments within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == 'assistant' and message.tool_calls %}<|im_start|>assistant
{% for call in message.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Failed(Exception):
    """Something is not as it should be."""


def check(condition: object, what: object) -> None:
    if not condition:
        raise Failed(what)


class Server:
    """A llama-server at a port that stays the same."""

    def __init__(self, options: object, log: Path, slots: int) -> None:
        self.folder, self.model, self.log, self.slots = options.llama_bin, options.model, log, slots
        self.port = free_port()
        self.process = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder)}
        template = self.log.parent / "template.jinja"
        template.write_text(TEMPLATE)
        arguments = [self.folder / "llama-server", "--jinja", "--chat-template-file", template, "-m", self.model, "--host", "127.0.0.1", "--port", self.port,
                     "-np", self.slots, "-c", 1024 * self.slots, "-t", 2, "--metrics", "--slots", "--no-webui"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([str(word) for word in arguments], env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                sys.exit(f"error: llama-server ended; see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        sys.exit(f"error: llama-server is not ready; see {self.log}")

    def kill(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def busy(self) -> int:
        """Slots in which it computes."""
        with urllib.request.urlopen(f"{self.url}/slots", timeout=30) as answer:
            return sum(slot["is_processing"] for slot in json.load(answer))


class Reply:
    """An answer, streamed or whole."""

    def __init__(self, node: Node, body: dict, limit: float = 120) -> None:
        host, port = node.http.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=limit)
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        self.response = self.connection.getresponse()
        self.status = self.response.status
        self.id = self.response.headers.get("x-request-id", "")
        self.text, self.reason, self.usage, self.error, self.done = "", None, None, None, False
        self.calls, self.chunks, self.times = [], [], []
        self.body = None if self.status == 200 and body.get("stream") else json.load(self.response)

    def more(self) -> bool:
        """One more event; false at the end."""
        line = self.response.readline()
        if not line:
            return False
        if not line.startswith(b"data: "):
            return True
        data = line[6:].strip()
        if data == b"[DONE]":
            self.done = True
            return True
        chunk = json.loads(data)
        self.chunks.append(chunk)
        if "error" in chunk:
            self.error = chunk["error"]
            return True
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.reason = choice.get("finish_reason") or self.reason
            self.calls += choice["delta"].get("tool_calls") or []
            if choice["delta"].get("content"):
                self.text += choice["delta"]["content"]
                self.times.append(time.monotonic())
        return True

    def until(self, length: int) -> "Reply":
        while len(self.text) < length and self.more():
            pass
        return self

    def rest(self) -> "Reply":
        while self.more():
            pass
        return self

    def leave(self) -> None:
        self.connection.close()
        self.response.close()


def question(model: str, text: str, **more: object) -> dict:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "seed": 1, **more}


def streamed(node: Node, model: str, text: str, **more: object) -> Reply:
    return Reply(node, question(model, text, stream=True, stream_options={"include_usage": True}, **more))


def until(what: str, ask: object, limit: float = 40) -> object:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        value = ask()
        if value:
            return value
        time.sleep(0.1)
    raise Failed(f"waited {limit} s in vain: {what}")


def model_of(node: Node, name: str) -> dict:
    for known in node.status()["nodes"]:
        for model in known["models"]:
            if model["name"] == name:
                return model
    return {}


def register(node: Node, name: str, server: Server) -> None:
    done = node.run("models", "add", "--name", name, "--endpoint", server.url)
    if done.returncode:
        sys.exit(f"error: {done.stderr}")


class Checks:
    """What is looked at. Each method is a line of the table."""

    def __init__(self, node: Node, one: Server, two: Server) -> None:
        self.node, self.one, self.two = node, one, two

    def the_server_is_known_for_what_it_is(self) -> str:
        model = model_of(self.node, "first")
        check("llama.cpp" in model["backend"], model)
        check(model["slots"] == self.one.slots, model)
        check(model["context_length"] == 1024, model)
        return model["backend"]

    def streamed_and_whole_are_the_same_as_there(self) -> str:
        there = json.dumps({**question("x", STORY, max_tokens=40), "top_p": 0.9}).encode()
        request = urllib.request.Request(f"{self.one.url}/v1/chat/completions", there, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            expected = json.load(answer)["choices"][0]["message"]["content"]
        whole = Reply(self.node, question("first", STORY, max_tokens=40)).body["choices"][0]["message"]["content"]
        stream = streamed(self.node, "first", STORY, max_tokens=40).rest()
        check(stream.done and stream.error is None, stream.error)
        check(expected == whole == stream.text, (expected, whole, stream.text))
        check(len(stream.times) > 20, f"{len(stream.times)} pieces")
        return f"{len(stream.times)} pieces"

    def usage_and_timings_come_through(self) -> str:
        stream = streamed(self.node, "first", "Say hello.", max_tokens=8).rest()
        check(stream.usage and stream.usage["completion_tokens"] in range(1, 9), stream.usage)
        check(stream.usage["prompt_tokens"] > 5, stream.usage)
        check(any("timings" in chunk for chunk in stream.chunks), stream.chunks[-1])
        return json.dumps(stream.usage)

    def limits_and_stops_hold(self) -> str:
        stream = streamed(self.node, "first", STORY, max_tokens=7).rest()
        check(stream.reason == "length" and stream.usage["completion_tokens"] == 7, (stream.reason, stream.usage))
        whole = streamed(self.node, "first", STORY, max_tokens=40).rest().text
        stop = whole.split()[6]
        cut = streamed(self.node, "first", STORY, max_tokens=40, stop=[stop]).rest()
        check(cut.reason == "stop" and cut.text == whole.split(stop)[0], (stop, cut.text))
        return f"stopped in front of `{stop}`"

    def fields_that_only_it_knows_reach_it(self) -> str:
        grammar = 'root ::= "yes" | "no"'
        answer = Reply(self.node, question("first", "Is the sky blue?", grammar=grammar, max_tokens=4)).body
        text = answer["choices"][0]["message"]["content"]
        check(text in ("yes", "no"), answer)
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {
            "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}}}
        answer = Reply(self.node, question("first", "Give me a number.", response_format=form, max_tokens=30)).body
        check("n" in json.loads(answer["choices"][0]["message"]["content"]), answer)
        return f"grammar: {text}"

    def logprobs_come_through(self) -> str:
        answer = Reply(self.node, question("first", "Hi", logprobs=True, top_logprobs=2, max_tokens=3)).body
        entries = answer["choices"][0]["logprobs"]["content"]
        check(len(entries) == 3 and len(entries[0]["top_logprobs"]) == 2, answer)
        return f"{len(entries)} entries"

    def tools_reach_it_and_what_it_says_comes_back(self) -> str:
        more = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60, "top_p": 0.9}
        ask = "What is the weather in Oslo?"
        request = urllib.request.Request(f"{self.one.url}/v1/chat/completions", json.dumps(question("x", ask, **more)).encode(),
                                         {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            there = json.load(answer)
        whole = Reply(self.node, question("first", ask, **more))
        check(whole.status == 200, whole.body)
        # The template puts the tools into the prompt.
        prompt = whole.body["usage"]["prompt_tokens"]
        check(prompt == there["usage"]["prompt_tokens"] and prompt > 100, (whole.body["usage"], there["usage"]))
        message, expected = (body["choices"][0]["message"] for body in (whole.body, there))
        plain = lambda message: [call["function"] for call in message.get("tool_calls") or []]
        check((message["content"], plain(message)) == (expected["content"], plain(expected)), (message, expected))
        # And so do calls of before, and their results.
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": call["id"], "content": "It rains."}]
        after = Reply(self.node, {"model": "first", "messages": messages, "tools": [TOOL], "max_tokens": 8})
        check(after.status == 200 and after.body["usage"]["prompt_tokens"] > prompt, after.body)
        calls = len(plain(message))
        return f"{prompt} tokens of prompt, {calls} calls" + ("" if calls else " (this model makes none, there either)")

    def its_errors_are_typed(self) -> str:
        bad = Reply(self.node, question("first", "x", grammar="root ::= ((("))
        check(bad.status == 400 and bad.body["error"]["message"], bad.body)
        long = Reply(self.node, question("first", "word " * 3000, max_tokens=4))
        check((long.status, long.body["error"]["code"]) == (400, "context_length_exceeded"), long.body)
        two = Reply(self.node, question("first", "x", n=2))
        check(two.status == 400 and two.body["error"]["param"] == "n", two.body)
        return bad.body["error"]["message"][:60]

    def a_client_that_leaves_frees_its_slot(self) -> str:
        stream = streamed(self.node, "first", STORY, max_tokens=900).until(40)
        check(self.one.busy() == 1, "it computes")
        left = time.monotonic()
        stream.leave()
        until("the slot is free", lambda: self.one.busy() == 0, 10)
        return f"after {time.monotonic() - left:.2f} s"

    def more_requests_than_slots_are_all_answered(self) -> str:
        replies, threads = [], []
        for number in range(4 * self.one.slots):
            text = f"Count from {number} to {number + 9}."
            thread = threading.Thread(target=lambda text=text: replies.append(
                streamed(self.node, "first", text, max_tokens=12).rest()))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join()
        check(all(reply.done and reply.text for reply in replies), [reply.error for reply in replies])
        check(len(replies) == 4 * self.one.slots, len(replies))
        return f"{len(replies)} at {self.one.slots} slots"

    def an_answer_moves_when_its_server_is_killed(self) -> str:
        undisturbed = streamed(self.node, "first", STORY, max_tokens=80).rest().text
        # Of the same model there: requests go to either of the two.
        register(self.node, "second", self.two)
        stream = streamed(self.node, "first", STORY, max_tokens=80).until(60)
        broken, other = (self.one, self.two) if self.one.busy() else (self.two, self.one)
        check(broken.busy() == 1 and other.busy() == 0, "one of them has it")
        broken.kill()
        stream.rest()
        check(stream.done and stream.error is None, stream.error)
        explained = json.loads(self.node.run("explain", stream.id, "--json").stdout)
        check(len(explained["attempts"]) == 2, explained)
        check(stream.usage["completion_tokens"] in range(70, 91), stream.usage)
        check(stream.text.count(stream.text[:50]) == 1, f"nothing is said twice: {stream.text}")
        check("  " not in stream.text, stream.text)
        same = stream.text == undisturbed
        broken.start()
        until("it is followed", lambda: all(model_of(self.node, name)["state"] == "ready" for name in ("first", "second")))
        return "word for word as undisturbed" if same else f"another text: …{stream.text[40:140]!r}"

    def a_server_that_was_killed_is_followed(self) -> str:
        self.one.kill()
        until("it is seen", lambda: model_of(self.node, "first")["state"].startswith("failed"))
        gone = Reply(self.node, question("first", "x", max_tokens=2))
        check((gone.status, gone.body["error"]["code"]) == (503, "no_worker"), gone.body)
        self.one.start()
        began = time.monotonic()
        until("it is back", lambda: model_of(self.node, "first")["state"] == "ready")
        return f"back after {time.monotonic() - began:.1f} s"

    def discover_finds_it_and_knows_that_it_is_known(self) -> str:
        found = self.node.run("models", "add", "--discover", "--json", "--port", self.one.port, "--port", self.two.port)
        offers = json.loads(found.stdout)
        check([offer["known_as"] for offer in offers] == ["first", "second"], found.stdout)
        check(all(offer["server"].startswith("llama.cpp") for offer in offers), found.stdout)
        return offers[0]["server"]


def main() -> None:
    options = parser(__doc__, tools=False)
    options.add_argument("--llama-bin", type=Path, required=True, help="the folder that has llama-server and its libraries")
    options.add_argument("--model", type=Path, required=True, help="a GGUF file that chats")
    options.add_argument("--only", help="the checks whose names have this in them")
    options = options.parse_args()
    failed = 0
    with Stage() as stage:
        one, two = (Server(options, stage.folder / f"llama-{number}.log", 2) for number in (1, 2))
        try:
            one.start()
            two.start()
            node = Node(stage, options.ingle.resolve(), "tower").up()
            register(node, "first", one)
            checks = Checks(node, one, two)
            names = [name for name in vars(Checks) if not name.startswith("_")]
            for name in names:
                if options.only and options.only not in name:
                    continue
                try:
                    outcome, what = "ok", getattr(checks, name)()
                except (Failed, KeyError, IndexError, TypeError, OSError, ValueError, http.client.HTTPException) as error:
                    outcome, what = "FAILED", f"{type(error).__name__}: {error}"
                    failed += 1
                say(f"{outcome:7} {name.replace('_', ' '):55} {what}")
        finally:
            one.kill()
            two.kill()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
