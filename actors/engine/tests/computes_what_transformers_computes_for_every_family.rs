//! Tiny random models of every family give the logits and the greedy tokens that Hugging Face transformers gives.
//! `fixtures/make_tiny_models.py` made them and says how.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use ingle_engine::model::Model;
use ingle_engine::{DeviceChoice, InstructionSet, KvType, ModelOptions, StepEngine, StepEntry};
use serde::Deserialize;

/// The largest error of a logit as a part of the largest logit: keys and values are kept in half precision.
const TOLERANCE: f32 = 5e-3;
/// The same with keys and values of 8 bits.
const INT8_TOLERANCE: f32 = 5e-2;

#[derive(Deserialize)]
struct Reference {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    context: u32,
    tokens: Vec<u32>,
    /// Of the last positions.
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", "tiny", name].iter().collect()
}

fn entries(tokens: &[u32], from: usize) -> Vec<StepEntry> {
    tokens.iter().zip(from as u32..).map(|(token, position)| StepEntry { token: *token, slot: 0, position }).collect()
}

/// The logits of all of the case's last positions, its prompt being read in chunks.
fn prompt(model: &mut Model, case: &Case, chunk: usize) -> Vec<Vec<f32>> {
    model.release(0);
    model.assign_share(0).unwrap();
    let wanted = case.tokens.len() - case.logits.len();
    let mut rows = Vec::new();
    for (number, tokens) in case.tokens.chunks(chunk).enumerate() {
        let from = number * chunk;
        let want: Vec<usize> = (0..tokens.len()).filter(|n| from + n >= wanted).collect();
        let logits = model.step(&entries(tokens, from), &want).unwrap();
        rows.extend((0..logits.rows()).map(|n| logits.row(n).to_vec()));
    }
    rows
}

fn largest(logits: &[f32]) -> u32 {
    (0u32..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
}

fn check(family: &str) {
    let json = std::fs::read(fixture(&format!("{family}.json"))).unwrap();
    let reference: Reference = serde_json::from_slice(&json).unwrap();
    for case in &reference.cases {
        for kv_type in [KvType::F16, KvType::Int8] {
            let tolerance = if kv_type == KvType::F16 { TOLERANCE } else { INT8_TOLERANCE };
            let open = |instructions: Option<InstructionSet>| {
                let options = ModelOptions {
                    slots: 1,
                    context_length: Some(case.context),
                    kv_type,
                    instructions,
                    threads: Some(2),
                    ..ModelOptions::default()
                };
                Model::open(&fixture(&format!("{family}.gguf")), DeviceChoice::Cpu, &options).unwrap()
            };
            let mut model = open(None);
            let rows = prompt(&mut model, case, usize::MAX);
            let most = case.logits.iter().flatten().fold(0.0f32, |most, x| most.max(x.abs()));
            let mut worst = 0.0f32;
            for (got, due) in rows.iter().zip(&case.logits) {
                got.iter().zip(due).for_each(|(got, due)| worst = worst.max((got - due).abs() / most));
            }
            println!("{family} {} {kv_type:?}: largest error {worst:.1e} of the largest logit", case.name);
            assert!(worst < tolerance, "{family} {} {kv_type:?}: {worst}", case.name);
            if kv_type == KvType::F16 {
                let mut next = largest(rows.last().unwrap());
                for (n, due) in case.greedy.iter().enumerate() {
                    assert_eq!(next, *due, "{family} {} token {n}", case.name);
                    let logits = model.step(&entries(&[next], case.tokens.len() + n), &[0]).unwrap();
                    next = largest(logits.row(0));
                }
            }
            // However it is cut, and whatever instructions compute it: the same bits.
            assert!(prompt(&mut model, case, 7) == rows, "{family} {} in chunks", case.name);
            for set in InstructionSet::available() {
                assert!(prompt(&mut open(Some(set)), case, 50) == rows, "{family} {} {}", case.name, set.name());
            }
        }
    }
}

macro_rules! families {
    ($($name:ident)*) => { $(#[test] fn $name() { check(stringify!($name)); })* };
}

families! { llama3 llama_linear mistral qwen2 qwen3 gemma3 gemma3_linear phi3 phi3_longrope }
