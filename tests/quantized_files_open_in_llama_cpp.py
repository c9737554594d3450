"""Files that `ingle models quantize` writes open in llama.cpp and say the same there as in Ingle.

    python tests/quantized_files_open_in_llama_cpp.py --ingle target/release/ingle MODEL

Run by hand; needs llama-cpp-python. MODEL is a GGUF file or a model's name. It is dequantized to f32, that file is
quantized to every format, and each result is opened: its 24 greedy tokens are shown and compared to those of the f32
file, of which a coarser format may differ after some (0 is the first token that differs). Ends with 1 where a file
does not open, or where a format of 8 bits or more differs in its first 8 tokens.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import llama_cpp

FORMATS = ["f32", "bf16", "f16", "int8", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"]
FINE = {"bf16", "f16", "int8"}
PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
COUNT = 24


def greedy(path: pathlib.Path) -> tuple[list[int], str]:
    """The first tokens of an answer and their text."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
    ids = model.tokenize(PROMPT.encode(), add_bos=False, special=True)
    found = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == COUNT:
            break
    return found, model.detokenize(found).decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ingle", type=pathlib.Path, required=True)
    parser.add_argument("model")
    options = parser.parse_args()
    failed, reference = False, []
    with tempfile.TemporaryDirectory() as work:
        whole = pathlib.Path(work) / "whole.gguf"

        def convert(source: str | pathlib.Path, to: str, output: pathlib.Path) -> None:
            command = [options.ingle, "models", "quantize", source, "--to", to, "--output", output, "--requantize"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        convert(options.model, "f32", whole)
        for to in FORMATS:
            path = whole if to == "f32" else pathlib.Path(work) / f"{to}.gguf"
            if to != "f32":
                convert(whole, to, path)
            try:
                found, text = greedy(path)
            except ValueError as why:
                print(f"{to:5} does not open: {why}")
                failed = True
                continue
            reference = reference or found
            same = next((n for n, (a, b) in enumerate(zip(reference, found)) if a != b), COUNT)
            failed |= to in FINE and same < 8
            print(f"{to:5} {path.stat().st_size / 1e6:6.1f} MB  {same:2} of {COUNT} as f32: {text!r}", flush=True)
            if to != "f32":
                path.unlink()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
