#!/usr/bin/env python3
"""Writes a GGUF file of the shape of Llama 3.2 1B with random F16 weights, to measure speed where no such model is at
hand. It says nothing sensible. Its tokenizer is that of another file, whose tokens are fewer; the rest are never said.

    python3 tests/make_random_llama.py --tokenizer-from SMOLLM2.gguf --out random-1b.gguf

Needs Python 3.9 and nothing else, 2.5 GB of disk and some seconds.
"""

import argparse
import os
import random
import struct
from pathlib import Path

UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
#: Bytes of the plain types by their numbers in the format.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
F32, F16 = 0, 1
ALIGNMENT = 32
BLOCK = 32 << 20

LAYERS, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, HEAD = 16, 2048, 8192, 32, 8, 64
VOCABULARY, CONTEXT = 128256, 8192


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def skip(data: memoryview, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    if kind == ARRAY:
        of, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if of in WIDTHS:
            return at + WIDTHS[of] * count
        for _ in range(count):
            at = skip(data, at, of)
        return at
    return at + WIDTHS[kind]


def tokenizer_of(path: Path) -> list[bytes]:
    """All entries about the tokenizer, as they are in the file."""
    # The head of a file is far below this; the weights behind it are not needed.
    with path.open("rb") as file:
        data = memoryview(file.read(64 << 20))
    magic, version, _, count = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version < 2:
        raise SystemExit(f"{path} is no GGUF file of version 2 or 3")
    found, at = [], 24
    for _ in range(count):
        start = at
        length = struct.unpack_from("<Q", data, at)[0]
        key = bytes(data[at + 8 : at + 8 + length]).decode()
        at += 8 + length
        kind = struct.unpack_from("<I", data, at)[0]
        at = skip(data, at + 4, kind)
        if key.startswith("tokenizer."):
            found.append(bytes(data[start:at]))
    if not found:
        raise SystemExit(f"{path} has no tokenizer")
    return found


def tensors(layers: int) -> list[tuple[str, list[int]]]:
    """Names and sizes, the inputs first."""
    keys = KV_HEADS * HEAD
    all_of = [("token_embd.weight", [EMBEDDING, VOCABULARY]), ("output_norm.weight", [EMBEDDING])]
    for n in range(layers):
        for part, sizes in {
            "attn_norm": [EMBEDDING],
            "attn_q": [EMBEDDING, HEADS * HEAD],
            "attn_k": [EMBEDDING, keys],
            "attn_v": [EMBEDDING, keys],
            "attn_output": [HEADS * HEAD, EMBEDDING],
            "ffn_norm": [EMBEDDING],
            "ffn_gate": [EMBEDDING, FEED_FORWARD],
            "ffn_up": [EMBEDDING, FEED_FORWARD],
            "ffn_down": [FEED_FORWARD, EMBEDDING],
        }.items():
            all_of.append((f"blk.{n}.{part}.weight", sizes))
    return all_of


def random_halves() -> bytes:
    """A block of F16 between 1/64 and 1/32 of either sign: no infinities, and sums that stay small."""
    block = bytearray(os.urandom(BLOCK))
    block[1::2] = bytes(block[1::2]).translate(bytes(high & 0x83 | 0x24 for high in range(256)))
    return bytes(block)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--tokenizer-from", type=Path, required=True, metavar="GGUF")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--layers", type=int, default=LAYERS, help="fewer make a smaller file for a first try")
    options = options.parse_args()

    entries = [text(key) + struct.pack("<I", STRING) + text(value) for key, value in
               [("general.architecture", "llama"), ("general.name", "Random Llama 1B")]]
    entries += [text(f"llama.{key}") + struct.pack("<II", UINT32, value) for key, value in {
        "block_count": options.layers, "context_length": CONTEXT, "embedding_length": EMBEDDING,
        "feed_forward_length": FEED_FORWARD, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD, "vocab_size": VOCABULARY}.items()]
    entries += [text(f"llama.{key}") + struct.pack("<If", FLOAT32, value) for key, value in {
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500000.0}.items()]
    entries += tokenizer_of(options.tokenizer_from)

    infos, offset = [], 0
    for name, sizes in tensors(options.layers):
        norm = len(sizes) == 1
        count = sizes[0] if norm else sizes[0] * sizes[1]
        infos.append((name, sizes, norm, count, offset))
        offset += -(-count * (4 if norm else 2) // ALIGNMENT) * ALIGNMENT
    block = random_halves()
    part = options.out.with_suffix(".part")
    with part.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(entries)) + b"".join(entries))
        for name, sizes, norm, _, at in infos:
            file.write(text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
            file.write(struct.pack("<IQ", F32 if norm else F16, at))
        file.write(bytes(-file.tell() % ALIGNMENT))
        for _, _, norm, count, _ in infos:
            left = count * (4 if norm else 2)
            if norm:
                file.write(struct.pack("<f", 1.0) * count)
            while not norm and left > 0:
                # From elsewhere in the block each time, so that no two matrices are the same.
                start = random.randrange(BLOCK // 4) * 2
                piece = block[start : start + left]
                file.write(piece)
                left -= len(piece)
            file.write(bytes(-file.tell() % ALIGNMENT))
    part.replace(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
