//! The engine computes what Hugging Face transformers computes: same chat template, same tokens, same logits.
//! `fixtures/make_smollm2_reference.py` made the reference and says how.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use ingle_engine::model::Model;
use ingle_engine::quantize::{self, Conversion};
use ingle_engine::text::{Codec, Special, Tokenizer};
use ingle_engine::{DeviceChoice, ModelOptions, StepEngine, StepEntry};
use ingle_protocol::wire::v2::{Message, Role};
use serde::Deserialize;

mod support;

#[derive(Deserialize)]
struct Reference {
    model: BTreeMap<String, String>,
    chat_template: String,
    prompts: Vec<Prompt>,
    tokenizer_cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    messages: Vec<BTreeMap<String, String>>,
    rendered: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
    top_ids: Vec<Vec<u32>>,
    top_logits: Vec<Vec<f32>>,
    margins: Vec<f32>,
}

impl Prompt {
    fn messages(&self) -> Vec<Message> {
        let role = |name: &str| [Role::System, Role::User, Role::Assistant].into_iter().find(|r| r.as_str() == name);
        let message = |m: &BTreeMap<String, String>| Message {
            role: role(&m["role"]).unwrap(),
            content: m["content"].clone(),
            extra: vec![],
        };
        self.messages.iter().map(message).collect()
    }
}

#[derive(Deserialize)]
struct Case {
    text: String,
    note: String,
    ids: Vec<u32>,
    ids_special_as_text: Vec<u32>,
    drops_bytes: bool,
}

fn reference() -> Reference {
    let json = include_str!("fixtures/smollm2_reference.json");
    let reference: Reference = serde_json::from_str(json).unwrap();
    assert_eq!(reference.model["sha256"], support::SHA256);
    reference
}

#[test]
fn templates_and_tokens_are_equal() {
    let (reference, model) = (reference(), support::model());
    let gguf = ingle_engine::gguf::Gguf::open(&model).unwrap();
    assert_eq!(gguf.text("tokenizer.chat_template").unwrap(), Some(reference.chat_template.as_str()));
    let tokenizer = Tokenizer::open(&model).unwrap();
    assert_eq!(reference.prompts.len(), 20);
    for prompt in &reference.prompts {
        assert_eq!(tokenizer.render(&prompt.messages(), b"").unwrap(), prompt.rendered, "{}", prompt.name);
        assert_eq!(tokenizer.prompt(&prompt.messages(), b"").unwrap(), prompt.prompt_ids, "{}", prompt.name);
    }
    for case in &reference.tokenizer_cases {
        let note = &case.note;
        assert_eq!(tokenizer.encode(&case.text, Special::Parse).unwrap(), case.ids, "{note}");
        assert_eq!(tokenizer.encode(&case.text, Special::AsText).unwrap(), case.ids_special_as_text, "{note}");
        if !case.drops_bytes {
            assert_eq!(tokenizer.decode(&case.ids_special_as_text), case.text, "{note}");
        }
    }
    // Control tokens are no text; between them the texts are equal.
    for prompt in &reference.prompts {
        let words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"];
        let text = words.iter().fold(prompt.greedy_text.clone(), |text, word| text.replace(word, ""));
        assert_eq!(tokenizer.decode(&prompt.greedy_ids), text, "{}", prompt.name);
    }
}

/// What the logits may be off, and where the reference is too close to a tie for its choice to count.
struct Bounds {
    margin: f32,
    largest: f32,
    mean: f64,
}

/// As in use: weights as in the file, activations of 8 bits, keys and values in half precision.
#[test]
fn logits_are_near() {
    compare(&support::model(), &Bounds { margin: 1.0, largest: 2.5, mean: 0.2 });
}

/// The same weights written as floats: nothing is rounded but keys and values.
#[test]
fn logits_of_floats_are_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("float.gguf");
    let source = quantize::open(&support::model()).unwrap();
    let conversion = Conversion::plan(source, "f32".parse().unwrap(), true).unwrap();
    conversion.write(&path, false, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
    compare(&path, &Bounds { margin: 0.05, largest: 0.05, mean: 0.005 });
}

fn compare(path: &Path, bounds: &Bounds) {
    let reference = reference();
    let mut model = Model::open(path, DeviceChoice::Cpu, &ModelOptions::default()).unwrap();
    let (mut positions, mut exempt, mut worst, mut sum) = (0u32, 0u32, 0.0f32, 0.0f64);
    for prompt in &reference.prompts {
        model.assign_share(0).unwrap();
        let tokens = [&prompt.prompt_ids[..], &prompt.greedy_ids[..]].concat();
        let first = prompt.prompt_ids.len() - 1;
        // The reference's tokens, whatever we would have chosen: one wrong choice must not hide what follows.
        let entries: Vec<StepEntry> =
            (0u32..).zip(&tokens).map(|(position, token)| StepEntry { token: *token, slot: 0, position }).collect();
        let entries = &entries[..entries.len() - 1];
        for (number, chunk) in entries.chunks(64).enumerate() {
            let from = number * 64;
            let want: Vec<usize> = (0..chunk.len()).filter(|index| from + index >= first).collect();
            let logits = model.step(chunk, &want).unwrap();
            for (row, index) in want.iter().enumerate() {
                let (step, logits) = (from + index - first, logits.row(row));
                for (id, expected) in prompt.top_ids[step].iter().zip(&prompt.top_logits[step]) {
                    let error = (logits[*id as usize] - expected).abs();
                    assert!(error <= bounds.largest, "{} step {step} token {id}: off by {error}", prompt.name);
                    worst = worst.max(error);
                    sum += f64::from(error);
                }
                let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
                positions += 1;
                if prompt.margins[step] > bounds.margin {
                    assert_eq!(best, prompt.top_ids[step][0], "{} step {step}", prompt.name);
                } else {
                    exempt += 1;
                }
            }
        }
        model.release(0);
    }
    let mean = sum / f64::from(positions * 5);
    println!("{positions} positions, {exempt} too close to call, errors of top-5 logits: largest {worst}, mean {mean}");
    assert_eq!(positions, 20 * 64);
    assert!(mean < bounds.mean, "{mean}");
}
