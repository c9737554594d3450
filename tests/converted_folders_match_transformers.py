"""Model folders that `ingle models quantize` converts compute in llama.cpp what they compute in transformers.

    python tests/converted_folders_match_transformers.py --ingle target/release/ingle [--llama-cpp SOURCE]

Run by hand. Makes a tiny random model with a tokenizer of each family, converts it to f32, and compares: the logits of
llama.cpp on the new file to those of transformers on the folder, and the ids of a text. With the source of llama.cpp
(its `convert_hf_to_gguf.py` of autumn 2026 was used), also all tensors and metadata to what its converter writes.
Needs torch, transformers, gguf and llama-cpp-python; ends with 1 where something differs.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "The cat sat on the mat, and 1234 dogs didn't care. Ünïcödé  too!"
CORPUS = [TEXT, "the quick brown fox jumps over the lazy dog", "hello world, hello cluster", "12 34 56 7890"] * 4
COMMON = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160,
              max_position_embeddings=512, attention_dropout=0.0)
GQA = dict(num_key_value_heads=2, **COMMON)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LONG = dict(type="longrope", long_factor=[1.0 + 0.5 * n for n in range(8)], short_factor=[1.0 + 0.1 * n for n in range(8)])

FAMILIES = {
    "llama": (transformers.LlamaConfig, "byte_level", dict(**GQA, tie_word_embeddings=True)),
    "llama-3": (transformers.LlamaConfig, "llama3", dict(**GQA, rope_scaling=LLAMA3, rope_theta=5e5)),
    "llama-2": (transformers.LlamaConfig, "sentence_piece", dict(**COMMON)),
    "mistral": (transformers.MistralConfig, "sentence_piece", dict(**GQA, head_dim=32, sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, "qwen2", dict(**GQA)),
    "qwen3": (transformers.Qwen3Config, "qwen2", dict(**GQA, head_dim=32, tie_word_embeddings=True)),
    "gemma3": (transformers.Gemma3TextConfig, "gemma", dict(**GQA, head_dim=32, sliding_window=16,
                                                           query_pre_attn_scalar=32)),
    "phi3": (transformers.Phi3Config, "sentence_piece", dict(**GQA, sliding_window=None, pad_token_id=None)),
    "phi3-long": (transformers.Phi3Config, "sentence_piece", dict(
        **{**GQA, "max_position_embeddings": 1024}, rope_scaling=LONG, original_max_position_embeddings=256,
        sliding_window=None, pad_token_id=None)),
    "bert": (transformers.BertConfig, "word_piece", dict(**{k: v for k, v in COMMON.items() if k != "attention_dropout"})),
}
LLAMA_3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(kind: str, folder: pathlib.Path) -> int:
    """Trains a tokenizer of this kind, writes its files and returns the number of its tokens."""
    from tokenizers import Regex
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: dict = {}
    if kind == "word_piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        settings = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special))
        settings["tokenizer_class"] = "BertTokenizer"
    elif kind in ("sentence_piece", "gemma"):
        special = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind == "gemma" else ["<unk>", "<s>", "</s>", "<|endoftext|>"]
        bytes_ = [f"<0x{n:02X}>" for n in range(256)]
        trained = Tokenizer(models.BPE())
        trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160))
        model = json.loads(trained.to_str())["model"]
        # As files from SentencePiece have them: control tokens, bytes, merged pieces by score, then characters.
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
        merged = list(dict.fromkeys(a + b for a, b in merges))
        characters = [t for t in model["vocab"] if t not in merged]
        vocabulary = {t: n for n, t in enumerate(special + bytes_ + merged + characters)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁") if kind == "gemma" else trained.normalizer
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        begin = "<bos>" if kind == "gemma" else "<s>"
        tokenizer.add_special_tokens(special)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])])
        settings = dict(bos_token=begin, eos_token="<eos>" if kind == "gemma" else "</s>", unk_token="<unk>",
                        add_bos_token=True, add_eos_token=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        if kind == "byte_level":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            pattern = LLAMA_3_SPLIT if kind == "llama3" else LLAMA_3_SPLIT.replace("{1,3}", "")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            if kind == "qwen2":
                tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|im_start|>", "<|im_end|>"]
        tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=special))
        settings = dict(eos_token="<|im_end|>", chat_template="{{ messages[0].content }}")
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def make_model(name: str, folder: pathlib.Path):
    """Writes a random model with its tokenizer; returns it."""
    kind, tokenizer, options = FAMILIES[name]
    folder.mkdir()
    # Some ids more than there are tokens, as in many real models.
    size = make_tokenizer(tokenizer, folder) + (0 if name in ("gemma3", "bert") else 5)
    for key in ("bos_token_id", "eos_token_id"):
        options.setdefault(key, None)
    config = kind(vocab_size=size, **options)
    config._attn_implementation = "eager"
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModel.from_config(config) if name == "bert" else \
        transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15)
                            + (1.0 if parameter.dim() == 1 and name != "gemma3" else 0.0))
    model.save_pretrained(folder)
    return model.eval()


def values(field) -> object:
    return field.contents()


def compare_files(ours: pathlib.Path, theirs: pathlib.Path, is_sentence_piece: bool) -> list[str]:
    """What differs between two GGUF files, names of tensors and keys included."""
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    problems = []
    tensors_a, tensors_b = ({t.name: t for t in r.tensors} for r in (a, b))
    for name in sorted(tensors_a.keys() ^ tensors_b.keys()):
        problems.append(f"tensor {name} is in one file only")
    for name in sorted(tensors_a.keys() & tensors_b.keys()):
        x, y = tensors_a[name], tensors_b[name]
        if x.data.shape != y.data.shape or not np.allclose(x.data, y.data, rtol=1e-6, atol=0):
            problems.append(f"tensor {name} differs")
    # Names, sizes and what only describes.
    ignored = ("GGUF.", "general.name", "general.size_label", "general.basename", "general.finetune", "general.version",
               "general.file_type",
               # Written by us always, by the other converter only where a settings file says so.
               "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_sep_token",
               # No longer written there.
               "tokenizer.ggml.cls_token_id")
    if is_sentence_piece:
        # The other converter has these from tokenizer.model, which a trained tokenizer.json does not come with: it
        # then writes other ones. The ids of a text are what counts.
        ignored += tuple(f"tokenizer.ggml.{key}" for key in
                         ["model", "tokens", "scores", "token_type", "merges", "add_space_prefix"])
    keys_a, keys_b = ({k: f for k, f in r.fields.items() if not k.startswith(ignored)} for r in (a, b))
    for key in sorted(keys_a.keys() ^ keys_b.keys()):
        problems.append(f"key {key} is in {'ours' if key in keys_a else 'theirs'} only: "
                        f"{str(values((keys_a.get(key) or keys_b.get(key))))[:80]}")
    for key in sorted(keys_a.keys() & keys_b.keys()):
        x, y = values(keys_a[key]), values(keys_b[key])
        if keys_a[key].types != keys_b[key].types or x != y and not (isinstance(x, float) and np.isclose(x, y)):
            problems.append(f"key {key}: {str(x)[:100]} and {str(y)[:100]}")
    return problems


def convert_theirs(source: pathlib.Path, folder: pathlib.Path, out: pathlib.Path, pre: str) -> str | None:
    """Runs llama.cpp's converter, told which pre-tokenizer this is: it knows those of published models only."""
    code = f"""
import sys; sys.path[:0] = [{str(source)!r}, {str(source / "gguf-py")!r}]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
sys.argv = ["convert", {str(folder)!r}, "--outtype", "f32", "--outfile", {str(out)!r}]
import runpy; runpy.run_path({str(source / "convert_hf_to_gguf.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def logits_of(path: pathlib.Path, ids: list[int], embedding: bool) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, embedding=embedding, n_batch=256,
                            n_ubatch=256, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE if embedding else -1)
    if embedding:
        return np.array(model.embed(TEXT, normalize=False))
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ingle", type=pathlib.Path, required=True)
    parser.add_argument("--llama-cpp", type=pathlib.Path)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for name in options.families:
            folder, out = pathlib.Path(work) / name, pathlib.Path(work) / f"{name}.gguf"
            model = make_model(name, folder)
            subprocess.run([options.ingle, "models", "quantize", folder, "--to", "f32", "--output", out], check=True,
                           stdout=subprocess.DEVNULL)
            problems = []
            reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
            expected_ids = reference.encode(TEXT).ids
            vocabulary = llama_cpp.Llama(str(out), vocab_only=True, verbose=bool(options.verbose))
            ids = vocabulary.tokenize(TEXT.encode(), add_bos=True, special=True)
            if ids != expected_ids:
                problems.append(f"ids {ids[:12]} where {expected_ids[:12]} were expected")
            with torch.no_grad():
                output = model(torch.tensor([expected_ids]))
            expected = (output.last_hidden_state if name == "bert" else output.logits)[0].numpy()
            got = logits_of(out, expected_ids, name == "bert")
            error = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("inf")
            if not error < 2e-2 * float(np.abs(expected).max()):
                problems.append(f"logits differ by {error} (largest {np.abs(expected).max()}; {got.shape})")
            is_sentence_piece = FAMILIES[name][1] in ("sentence_piece", "gemma")
            # There Phi-3 is not converted without tokenizer.model.
            if options.llama_cpp and not name.startswith("phi3"):
                theirs = pathlib.Path(work) / f"{name}.theirs.gguf"
                pre = gguf.GGUFReader(out).fields["tokenizer.ggml.pre"].contents()
                why = convert_theirs(options.llama_cpp, folder, theirs, pre)
                problems += [f"llama.cpp's converter: {why}"] if why else compare_files(out, theirs, is_sentence_piece)
            failed |= bool(problems)
            print(f"{name}: {'; '.join(problems) or 'equal'} (largest logit error {error:.2g})", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
