//! Whole models on an adapter (a software one if there is no other) and on the CPU, the same steps on both.
//!
//! The CPU gets the **same weights as 32-bit floats**, with which it multiplies floats: what differs is then the order
//! of sums, the precision of keys and values (half on the CPU and on cards that have it, else 32 bits), and nothing
//! of the quantization. Half precision has an error of 2⁻¹¹ a number, layers add theirs up, and the largest logit of a
//! random model is a few standard deviations: so the tolerance of 5·10⁻³ of the largest logit, which is that of the
//! comparison with transformers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::Card;
use super::tests::card;
use crate::device::{Place, Placement};
use crate::gguf::Gguf;
use crate::gguf::tiny::{Sizes, VOCABULARY, llama, numbers};
use crate::model::Model;
use crate::quantize::{Conversion, Target};
use crate::{ModelOptions, StepEngine, StepEntry};

/// The largest error of a logit, as a part of the largest logit.
const TOLERANCE: f32 = 5e-3;
/// Of the fixtures.
const FAMILIES: [&str; 9] =
    ["llama3", "llama_linear", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_linear", "phi3", "phi3_longrope"];
const FORMATS: [&str; 8] = ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q4_k", "q6_k"];

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/tiny", &format!("{name}.gguf")].iter().collect()
}

/// The same model in another format.
fn converted(from: &Path, folder: &Path, format: &str) -> PathBuf {
    let to = folder.join(format!("{}.{format}.gguf", from.file_stem().unwrap().display()));
    let target: Target = format.parse().unwrap();
    let conversion = Conversion::plan(crate::quantize::open(from).unwrap(), target, true).unwrap();
    conversion.write(&to, false, &AtomicBool::new(false), &mut |_, _| {}).unwrap();
    to
}

fn entries(slot: u32, from: usize, tokens: &[u32]) -> Vec<StepEntry> {
    tokens.iter().zip(from as u32..).map(|(token, position)| StepEntry { token: *token, slot, position }).collect()
}

fn tokens(count: usize, vocabulary: u32) -> Vec<u32> {
    numbers(9, count).iter().map(|number| ((number + 1.0) * 127.0) as u32 % vocabulary).collect()
}

/// A card and the CPU with the same model, the same steps and the same blocks.
struct Pair {
    name: String,
    gpu: Model,
    cpu: Model,
    worst: f32,
}

impl Pair {
    fn open(name: &str, on_card: Gguf, on_cpu: Gguf) -> Option<Self> {
        Some(Self::open_on(card()?, name, on_card, on_cpu))
    }

    fn open_on(card: Card, name: &str, on_card: Gguf, on_cpu: Gguf) -> Self {
        let options = ModelOptions { slots: 4, context_length: Some(512), ..ModelOptions::default() };
        let open = |gguf, place| {
            let placement = Placement { place, backend: String::new(), numerics: String::new() };
            Model::load(Arc::new(gguf), placement, &options).unwrap()
        };
        let (gpu, cpu) = (open(on_card, Place::Gpu(card)), open(on_cpu, Place::Cpu));
        Self { name: name.into(), gpu, cpu, worst: 0.0 }
    }

    fn assign(&mut self, slot: u32, blocks: &[u32], length: u32) {
        self.gpu.assign(slot, blocks, length).unwrap();
        self.cpu.assign(slot, blocks, length).unwrap();
    }

    fn compare(&mut self, entries: &[StepEntry]) {
        let want: Vec<usize> = (0..entries.len()).collect();
        self.compare_some(entries, &want);
    }

    fn compare_some(&mut self, entries: &[StepEntry], want: &[usize]) {
        let (got, due) = (self.gpu.step(entries, want).unwrap(), self.cpu.step(entries, want).unwrap());
        assert_eq!(got.rows(), want.len());
        for row in 0..want.len() {
            let most = due.row(row).iter().fold(0.0f32, |most, x| most.max(x.abs()));
            for (got, due) in got.row(row).iter().zip(due.row(row)) {
                let error = (got - due).abs() / most;
                assert!(error < TOLERANCE, "{}: row {row} of {}: {got} {due}", self.name, entries.len());
                self.worst = self.worst.max(error);
            }
        }
    }
}

/// Steps of every shape: chunks that start and end within blocks, single tokens together and beside chunks, blocks out
/// of order, shared and used before, contexts of very different length, positions that are split and joined.
fn walk(mut pair: Pair, vocabulary: u32) {
    let tokens = tokens(400, vocabulary);
    pair.assign(0, &[9, 2, 30, 5, 17, 1], 0);
    pair.assign(1, &[12, 4], 0);
    pair.assign(2, &[31], 0);
    pair.compare(&entries(0, 0, &tokens[..100]));
    pair.compare(&[entries(1, 0, &tokens[5..8]), entries(0, 100, &tokens[100..131])].concat());
    pair.compare(&entries(2, 0, &tokens[..1]));
    pair.compare(&[entries(2, 1, &[7]), entries(0, 131, &[9]), entries(1, 3, &[11])].concat());
    // Nobody wants the logits of most of it, and of the rest not all in a row.
    pair.compare_some(&entries(0, 132, &tokens[132..330]), &[]);
    pair.compare_some(&entries(0, 330, &tokens[330..340]), &[1, 4, 9]);
    pair.compare(&[entries(0, 340, &[3]), entries(1, 4, &[3]), entries(2, 2, &[3])].concat());
    for position in 5..70 {
        pair.compare(&entries(1, position, &tokens[position..position + 1]));
    }
    // Another sequence goes on behind the first block of the first, in blocks that had others' tokens.
    pair.gpu.release(2);
    pair.cpu.release(2);
    pair.assign(3, &[9, 31, 4], 64);
    pair.compare(&[entries(0, 341, &[5]), entries(3, 64, &tokens[..70])].concat());
    pair.compare(&[entries(3, 134, &[6]), entries(0, 342, &[6])].concat());
    println!("{}: largest error {:.1e} of the largest logit", pair.name, pair.worst);
}

#[test]
fn steps_of_every_shape_give_what_the_cpu_gives() {
    let sizes = Sizes { heads: 5, kv_heads: 1, context_length: 512, ..Sizes::default() };
    let gguf = || Gguf::from_bytes(llama(sizes).bytes()).unwrap();
    if let Some(pair) = Pair::open("llama of 5 heads", gguf(), gguf()) {
        walk(pair, VOCABULARY as u32);
    }
    // As on a card that knows no half precision.
    if let Some(card) = card() {
        let card = Card { halves: false, ..card };
        walk(Pair::open_on(card, "llama with 32-bit keys", gguf(), gguf()), VOCABULARY as u32);
    }
    let folder = tempfile::tempdir().unwrap();
    // Biases; norms of heads; windows, two bases and norms behind; joined weights and windows everywhere.
    for name in ["qwen2", "qwen3", "gemma3", "phi3"] {
        let plain = converted(&fixture(name), folder.path(), "f32");
        let pair = Pair::open(name, Gguf::open(&fixture(name)).unwrap(), Gguf::open(&plain).unwrap());
        if let Some(pair) = pair {
            walk(pair, 100);
        }
    }
}

/// Every family in every format: a prompt, then single tokens.
#[test]
fn every_family_in_every_format_gives_what_its_weights_give_as_floats() {
    let folder = tempfile::tempdir().unwrap();
    let mut worst = [0.0f32; FORMATS.len()];
    for name in FAMILIES {
        for (format, worst) in FORMATS.iter().zip(&mut worst) {
            let quantized = converted(&fixture(name), folder.path(), format);
            let plain = converted(&quantized, folder.path(), "f32");
            let (quantized, plain) = (Gguf::open(&quantized).unwrap(), Gguf::open(&plain).unwrap());
            let Some(mut pair) = Pair::open(&format!("{name} {format}"), quantized, plain) else { return };
            let tokens = tokens(24, 100);
            pair.assign(0, &[3, 1], 0);
            pair.compare(&entries(0, 0, &tokens[..20]));
            pair.compare(&entries(0, 20, &tokens[20..21]));
            pair.compare(&entries(0, 21, &tokens[21..24]));
            *worst = worst.max(pair.worst);
        }
    }
    for (format, worst) in FORMATS.iter().zip(worst) {
        println!("{format}: largest error {worst:.1e} of the largest logit, in all families");
    }
}
