//! Our ids against those of the models' own tokenizers. `tests/fixtures/make_tokenizer_references.py` made the
//! references and says how.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::words::Words;
use super::*;

#[derive(Deserialize)]
struct References {
    texts: Vec<String>,
    /// Vocabulary → the ids of each text, by sentencepiece.
    sentence_piece: BTreeMap<String, Vec<Vec<u32>>>,
    /// Variant → the words of each text.
    words: BTreeMap<String, Vec<Vec<String>>>,
}

fn references() -> References {
    serde_json::from_str(include_str!("../../../tests/fixtures/tokenizer_references.json")).unwrap()
}

fn archive() -> zip::ZipArchive<std::fs::File> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vocabularies.zip");
    zip::ZipArchive::new(std::fs::File::open(path).unwrap()).unwrap()
}

/// A file that is too big to be kept here.
fn given(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} says where it is")).into()
}

fn tokenizer(gguf: Vec<u8>) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::from_bytes(gguf).unwrap()).unwrap()
}

/// The ids are sentencepiece's, and give the text again.
fn check_sentence_piece(name: &str, tokenizer: &Tokenizer) {
    let references = references();
    let mut wrong = Vec::new();
    for (text, expected) in references.texts.iter().zip(&references.sentence_piece[name]) {
        let ids = tokenizer.encode(text, Special::AsText).unwrap();
        // Gemma has pieces for several spaces, which llama.cpp does not find where the text itself has U+2581.
        if ids != *expected && !(name == "gemma-3" && text.contains('\u{2581}')) {
            wrong.push(format!("{text:?}: {ids:?} instead of {expected:?}"));
        }
        assert_eq!(tokenizer.decode(&ids), text.replace('\u{2581}', " "), "{name}");
    }
    assert!(wrong.is_empty(), "{name}: {wrong:#?}");
    assert!(references.texts.len() >= 40);
}

fn member(archive: &mut zip::ZipArchive<std::fs::File>, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    archive.by_name(name).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Texts with the ids that they should have, as llama.cpp keeps them beside its vocabularies.
fn cases(texts: &[u8], ids: &[u8]) -> Vec<(String, Vec<u32>)> {
    let (texts, ids) = (str::from_utf8(texts).unwrap(), str::from_utf8(ids).unwrap());
    let mut texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    if texts.last() == Some(&"") {
        texts.pop();
    }
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect());
    let cases: Vec<_> = texts.into_iter().map(String::from).zip(ids).collect();
    assert!(cases.len() >= 40);
    cases
}

fn check(name: &str, gguf: Vec<u8>, texts: &[u8], ids: &[u8]) {
    let tokenizer = tokenizer(gguf);
    for (text, expected) in cases(texts, ids) {
        let ids = tokenizer.encode(&text, Special::AsText).unwrap();
        assert_eq!(ids, expected, "{name}: {text:?}");
        if name != "bert-bge" {
            assert_eq!(tokenizer.decode(&ids), text, "{name}");
        }
    }
}

#[test]
fn the_ids_are_those_of_llama_cpps_reference_lists() {
    let mut archive = archive();
    for name in ["llama-spm", "phi-3", "bert-bge", "gpt-2", "qwen2"] {
        let file = format!("ggml-vocab-{name}.gguf");
        let gguf = member(&mut archive, &file);
        let [texts, ids] = ["inp", "out"].map(|end| member(&mut archive, &format!("{file}.{end}")));
        check(name, gguf, &texts, &ids);
    }
}

#[test]
#[ignore = "needs INGLE_LLAMA_CPP_MODELS: the folder `models` of a llama.cpp checkout"]
fn the_ids_are_those_of_a_llama_cpp_checkout() {
    let folder = given("INGLE_LLAMA_CPP_MODELS");
    for name in ["llama-spm", "phi-3", "bert-bge", "gpt-2", "qwen2", "llama-bpe", "qwen35"] {
        let read = |end: &str| std::fs::read(folder.join(format!("ggml-vocab-{name}.gguf{end}"))).unwrap();
        check(name, read(""), &read(".inp"), &read(".out"));
    }
}

#[test]
fn llama_2s_ids_are_sentencepieces() {
    check_sentence_piece("llama-spm", &tokenizer(member(&mut archive(), "ggml-vocab-llama-spm.gguf")));
}

#[test]
#[ignore = "needs INGLE_TEST_GEMMA: a Gemma 3 model"]
fn gemma_3s_ids_are_sentencepieces() {
    let tokenizer = Tokenizer::open(&given("INGLE_TEST_GEMMA")).unwrap();
    check_sentence_piece("gemma-3", &tokenizer);
    let ids = tokenizer.encode("<bos><start_of_turn>user\nHi<end_of_turn>\n", Special::Parse).unwrap();
    assert_eq!(ids, [2, 105, 2364, 107, 10979, 106, 107]);
    assert!(tokenizer.is_end(1) && tokenizer.is_end(106));
    assert_eq!(tokenizer.passage("Hi").unwrap(), [2, 10979]);
}

#[test]
fn words_end_where_the_models_own_patterns_end_them() {
    let References { texts, words, .. } = references();
    assert_eq!(words.len(), 7);
    for (pre, expected) in words {
        let ours = Words::named(&pre).unwrap().unwrap();
        for (text, expected) in texts.iter().zip(expected) {
            let mut words = Vec::new();
            ours.cut(text, &mut |word| words.push(word.to_string()));
            assert_eq!(words, expected, "{pre}: {text:?}");
        }
    }
}

#[test]
fn phi_3s_special_tokens_swallow_the_space_behind_them() {
    let tokenizer = tokenizer(member(&mut archive(), "ggml-vocab-phi-3.gguf"));
    let [user, assistant, end] = [32010, 32001, 32007];
    let hi = tokenizer.encode("Hi", Special::AsText).unwrap();
    let ids = tokenizer.encode("<|user|>\n Hi<|end|>\n<|assistant|>\n", Special::Parse).unwrap();
    assert_eq!(ids, [&[user], &hi[..], &[end, assistant]].concat());
    assert!(tokenizer.is_end(end) && tokenizer.is_end(32000) && !tokenizer.is_end(user));
}

#[test]
fn a_passage_stands_between_what_the_model_wants_around_it() {
    let mut archive = archive();
    let mut of = |name: &str| tokenizer(member(&mut archive, &format!("ggml-vocab-{name}.gguf")));
    let bert = of("bert-bge");
    assert_eq!(bert.passage("Hello, wörld!").unwrap(), [101, 7592, 1010, 2088, 999, 102]);
    assert_eq!(bert.decode(&bert.passage("Embeddings [SEP]").unwrap()), "embeddings [ sep ]");
    assert_eq!(of("llama-spm").passage("Hello").unwrap(), [1, 15043]);
    assert_eq!(of("qwen2").passage("Hello").unwrap(), [9707]);
}

/// Far below a second each where nothing else runs; quadratic time would be minutes.
#[test]
fn hostile_texts_take_linear_time() {
    let mut archive = archive();
    for name in ["llama-spm", "bert-bge", "qwen2"] {
        let tokenizer = tokenizer(member(&mut archive, &format!("ggml-vocab-{name}.gguf")));
        for pattern in ["a", " ", "\n", "<", "<|im_", " \n", "é", "aA", "1", "\u{301}", "字", "'", "\u{fdd0}x"] {
            let text = pattern.repeat((1 << 18) / pattern.len());
            let begun = std::time::Instant::now();
            tokenizer.encode(&text, Special::Parse).unwrap();
            let took = begun.elapsed();
            assert!(took < std::time::Duration::from_secs(20), "{name}: {pattern:?} took {took:?}");
            println!("{name}: {pattern:?} took {took:?}");
        }
    }
}
