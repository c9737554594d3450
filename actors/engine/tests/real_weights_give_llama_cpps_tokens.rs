//! Gemma 3 270M with its real weights, written as floats, gives the greedy tokens that llama.cpp gives with floats.
//! Run by hand: `INGLE_TEST_GEMMA=FILE.gguf cargo test --release --workspace -- --ignored real_weights`.
//! `fixtures/make_llama_cpp_references.py` made the reference and says where the file is from.

#![allow(clippy::unwrap_used)]

use ingle_engine::model::Model;
use ingle_engine::quantize::{self, Conversion};
use ingle_engine::text::{Special, Tokenizer};
use ingle_engine::{DeviceChoice, ModelOptions, StepEngine, StepEntry};
use serde::Deserialize;
use std::sync::atomic::AtomicBool;

/// Closer to a tie than this, the reference's choice is a matter of rounding: its activation function comes from a
/// table of half precision.
const MARGIN: f32 = 0.1;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    margins: Vec<f32>,
}

#[test]
#[ignore = "needs INGLE_TEST_GEMMA"]
fn real_weights_of_gemma_3() {
    let file = std::env::var_os("INGLE_TEST_GEMMA").expect("INGLE_TEST_GEMMA is the path of the model file");
    let reference: Reference = serde_json::from_str(include_str!("fixtures/gemma3_270m_reference.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("float.gguf");
    let source = quantize::open(file.as_ref()).unwrap();
    Conversion::plan(source, "f32".parse().unwrap(), true)
        .unwrap()
        .write(&path, false, &AtomicBool::new(false), &mut |_, _| {})
        .unwrap();
    let options = ModelOptions { slots: 1, context_length: Some(1024), ..ModelOptions::default() };
    let mut model = Model::open(&path, DeviceChoice::Cpu, &options).unwrap();
    let tokenizer = Tokenizer::open(&path).unwrap();
    let (mut right, mut close) = (0, 0);
    for prompt in &reference.prompts {
        model.release(0);
        model.assign_share(0).unwrap();
        let text = tokenizer.decode(&prompt.prompt_ids);
        assert!(!text.is_empty() && tokenizer.encode(&text, Special::Parse).is_ok());
        // The reference's tokens, whatever we would have chosen: one wrong choice must not hide what follows.
        let tokens = [&prompt.prompt_ids[..], &prompt.greedy_ids].concat();
        let entries: Vec<StepEntry> =
            (0u32..).zip(&tokens).map(|(position, token)| StepEntry { token: *token, slot: 0, position }).collect();
        let first = prompt.prompt_ids.len() - 1;
        let want: Vec<usize> = (first..first + prompt.greedy_ids.len()).collect();
        let logits = model.step(&entries, &want).unwrap();
        for (step, due) in prompt.greedy_ids.iter().enumerate() {
            let best = (0u32..).zip(logits.row(step)).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
            if prompt.margins[step] > MARGIN {
                assert_eq!(best, *due, "{} token {step}, margin {}", prompt.name, prompt.margins[step]);
                right += 1;
            } else {
                close += 1;
            }
        }
    }
    println!("{right} tokens equal, {close} too close to call");
    assert!(right > 300);
}
