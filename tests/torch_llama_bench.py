#!/usr/bin/env python3
"""Times a Llama of the shape of 3.2 1B in PyTorch, by `transformers`, as `ingle bench` times it: tests/gpu_bench.sh puts
the two beside each other. Random weights; needs torch and transformers, and says so if they are not there.

    python3 tests/torch_llama_bench.py [--device cuda] [--dtype float32] [--layers 16]
"""

import argparse
import sys
import time

PROMPT, CONTEXT, DECODED, ROUNDS, BATCHES = 512, 128, 16, 3, (1, 4, 16)

try:
    import torch
    import transformers
except ImportError as why:
    sys.exit(f"no PyTorch beside it: {why}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--device", default="mps" if torch.backends.mps.is_available() else "cuda")
    options.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    options.add_argument("--layers", type=int, default=16)
    options = options.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no PyTorch beside it: this one sees no GPU")

    def wait() -> None:
        if options.device != "cpu":
            getattr(torch, options.device).synchronize()

    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True)
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()

    def read(batch: int, tokens: int) -> tuple[object, float]:
        ids = torch.randint(1000, (batch, tokens), device=options.device)
        wait()
        started = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        out.logits.argmax().item()
        return out.past_key_values, time.perf_counter() - started

    with torch.inference_mode():
        best = min(read(1, PROMPT)[1] for _ in range(ROUNDS))
        print(f"PyTorch {torch.__version__}, {options.device}, {options.dtype}")
        print(f"prompt, {PROMPT} tokens{PROMPT / best:>20.1f} tok/s")
        for batch in BATCHES:
            cache, _ = read(batch, CONTEXT)
            best = float("inf")
            for _ in range(ROUNDS):
                wait()
                started = time.perf_counter()
                for _ in range(DECODED):
                    ids = torch.randint(1000, (batch, 1), device=options.device)
                    # Scores go to the host each time, as Ingle's do.
                    model(ids, past_key_values=cache, use_cache=True).logits.float().cpu()
                best = min(best, (time.perf_counter() - started) / DECODED)
            print(f"decode, {batch} at once{batch / best:>20.1f} tok/s")


if __name__ == "__main__":
    main()
