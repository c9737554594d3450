//! Embeddings are those of Hugging Face transformers: tiny random BERTs always, and all-MiniLM-L6-v2 where it is there.
//! `fixtures/make_tiny_models.py` and `fixtures/make_minilm_reference.py` made the references and say how.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use ingle_engine::encoder::Pooling;
use ingle_engine::{Encoder, InstructionSet, ModelOptions};
use serde::Deserialize;

/// The largest error of a number as a part of the largest number: keys and values are kept in half precision.
const TOLERANCE: f32 = 5e-3;

#[derive(Deserialize)]
struct Tiny {
    pooling: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    tokens: Vec<u32>,
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct MiniLm {
    cosines: Vec<Vec<f64>>,
    sentences: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Sentence {
    text: String,
    ids: Vec<u32>,
    /// All numbers, or the first of them.
    embedding: Vec<f32>,
}

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name].iter().collect()
}

fn read<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn open(path: &Path, instructions: Option<InstructionSet>, threads: usize) -> Encoder {
    let options = ModelOptions { instructions, threads: Some(threads), ..ModelOptions::default() };
    Encoder::open(path, &options).unwrap()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn check(name: &str, pooling: Pooling) {
    let reference: Tiny = read(&format!("tiny/{name}.json"));
    let path = fixture(&format!("tiny/{name}.gguf"));
    let tokens: Vec<Vec<u32>> = reference.cases.iter().map(|case| case.tokens.clone()).collect();
    let mut encoder = open(&path, None, 2);
    assert_eq!((encoder.dimensions(), encoder.context_length(), encoder.pooling()), (64, 64, pooling));
    assert_eq!(reference.pooling, if pooling == Pooling::Mean { "mean" } else { "cls" });
    let got = encoder.embed_tokens(&tokens).unwrap();
    for (case, got) in reference.cases.iter().zip(&got) {
        let most = case.embedding.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let worst = got.iter().zip(&case.embedding).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs() / most));
        println!("{name} {}: largest error {worst:.1e} of the largest number", case.name);
        assert!(got.len() == case.embedding.len() && worst < TOLERANCE, "{name} {}: {worst}", case.name);
    }
    // Whatever computes it, and each text alone: the same bits.
    for set in InstructionSet::available() {
        let mut encoder = open(&path, Some(set), 1);
        for (tokens, due) in tokens.iter().zip(&got) {
            let alone = encoder.embed_tokens(std::slice::from_ref(tokens)).unwrap();
            assert!(alone == [due.clone()], "{name} {}", set.name());
        }
    }
}

#[test]
fn bert_mean() {
    check("bert_mean", Pooling::Mean);
}

#[test]
fn bert_cls() {
    check("bert_cls", Pooling::Cls);
}

/// `ingle models quantize <folder of all-MiniLM-L6-v2> --to f16` (and `--to int8`), then
/// `INGLE_TEST_MINILM=<f16.gguf>:<int8.gguf> cargo t --test embeds_what_transformers_embeds -- --ignored --nocapture`.
#[test]
#[ignore = "needs all-MiniLM-L6-v2: INGLE_TEST_MINILM names its GGUF files"]
fn all_minilm_l6_v2() {
    let files = std::env::var_os("INGLE_TEST_MINILM").expect("INGLE_TEST_MINILM names GGUF files of all-MiniLM-L6-v2");
    let reference: MiniLm = read("minilm_reference.json");
    let texts: Vec<&str> = reference.sentences.iter().map(|sentence| sentence.text.as_str()).collect();
    for path in std::env::split_paths(&files) {
        let format = ingle_engine::inspect(&path).unwrap().quantization;
        let least = if format.starts_with('F') { 0.9999 } else { 0.999 };
        let mut encoder = open(&path, None, 2);
        let started = std::time::Instant::now();
        let got = encoder.embed(&texts).unwrap();
        println!("{format} on {}: {:.1} ms", encoder.backend(), started.elapsed().as_secs_f64() * 1e3);
        for (sentence, got) in reference.sentences.iter().zip(&got) {
            assert_eq!(encoder.tokenize(&sentence.text).unwrap(), sentence.ids, "{}", sentence.text);
            let count = sentence.embedding.len();
            let same = cosine(&got[..count], &sentence.embedding);
            println!("{format}: cosine {same:.7} of {count} numbers: {}", sentence.text);
            assert!(got.len() == 384 && same > least, "{format} {}: {same}", sentence.text);
            assert!((length(got) - 1.0).abs() < 1e-5);
        }
        let mut worst = 0.0f64;
        for (a, due) in got.iter().zip(&reference.cosines) {
            for (b, due) in got.iter().zip(due) {
                worst = worst.max((cosine(a, b) - due).abs());
            }
        }
        println!("{format}: largest error of a cosine of two texts {worst:.1e}");
        assert!(worst < if least > 0.9995 { 1e-3 } else { 2e-2 }, "{format}: {worst}");
        for set in InstructionSet::available() {
            assert!(open(&path, Some(set), 1).embed(&texts).unwrap() == got, "{format} {}", set.name());
        }
    }
}

fn length(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}
