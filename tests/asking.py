"""Chat completions over HTTP, as the scripts `measure_*.py` ask for them: what became of each, and when what came.
Python 3.11, standard library only.
"""

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field


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
