//! How fast this machine is with a model, and how far that is from what the machine could do.
//!
//! Decoding reads every weight once for each step, so its limit is memory bandwidth over bytes of weights; reading a
//! prompt multiplies every weight with every token, so its limit is the rate of multiplications. Both rates are
//! measured here, in the same run and on the same threads.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::kernels::Kernels;
use crate::model::Model;
use crate::{DeviceChoice, EngineError, ModelOptions, StepEngine, StepEntry};

/// Tokens of the measured prompt.
pub const PROMPT: u32 = 512;
/// Numbers of sequences that are decoded at once.
pub const BATCHES: [u32; 3] = [1, 4, 16];
/// Tokens that stand before those that are decoded.
const CONTEXT: u32 = 128;
/// Tokens decoded for one measurement.
const DECODED: u32 = 48;
/// Each measurement is taken so many times; the best counts, as the others were disturbed.
const ROUNDS: u32 = 3;
/// Larger than the caches of any home computer.
const SWEPT_BYTES: usize = 256 << 20;

/// On a card the same so many times, so that waiting for the last does not count.
#[cfg(feature = "gpu")]
const CARD_SWEEPS: usize = 8;

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// The file.
    pub model: String,
    /// What computed.
    pub backend: String,
    /// Threads that computed; 0 where it was not the CPU.
    pub threads: usize,
    /// Bytes of the model file.
    pub file_bytes: u64,
    /// Bytes of weights that one step of decoding reads.
    pub weight_bytes: u64,
    /// From the opening of the file to the first token of an answer, in seconds.
    pub first_token_seconds: f64,
    /// Reading a prompt of [`PROMPT`] tokens.
    pub prompt_tokens_per_second: f64,
    /// Decoding, by the number of sequences at once: tokens of all of them.
    pub decode_tokens_per_second: std::collections::BTreeMap<u32, f64>,
    /// Resident memory of this process with the model loaded and used; `None` where the system does not say.
    pub memory_bytes: Option<u64>,
    /// What of it is not shared with other processes that have the same model.
    pub private_memory_bytes: Option<u64>,
    /// Sequential reading on all threads; on a card reading and writing at once.
    pub memory_bandwidth_bytes_per_second: Option<f64>,
    /// Multiplications of 8-bit numbers on all threads.
    pub multiplications_per_second: Option<f64>,
    /// Bandwidth over bytes of weights.
    pub decode_limit_tokens_per_second: Option<f64>,
    /// Multiplications a second over weights.
    pub prompt_limit_tokens_per_second: Option<f64>,
    /// Decoding one sequence, as a part of its limit.
    pub decode_share_of_limit: Option<f64>,
    /// Reading a prompt, as a part of its limit.
    pub prompt_share_of_limit: Option<f64>,
}

/// Loads a model and measures it. `progress` is told what is being done.
pub fn bench(
    path: &Path,
    device: DeviceChoice,
    options: &ModelOptions,
    mut progress: impl FnMut(&str),
) -> Result<BenchReport, EngineError> {
    let slots = BATCHES.into_iter().max().unwrap_or(1);
    let needed = PROMPT.max(CONTEXT + DECODED) + 1;
    let options = ModelOptions {
        slots,
        context_length: Some(options.context_length.unwrap_or(needed).max(needed)),
        ..options.clone()
    };
    progress("loading");
    if options.packed_cache.is_some() {
        // The weights are packed once and then mapped, which is what every later start does.
        drop(Model::open(path, device, &options)?);
    }
    let started = Instant::now();
    let mut model = Model::open(path, device, &options)?;
    model.assign_share(0)?;
    model.step(&entries(0, 0, 16), &[15])?;
    let first_token_seconds = started.elapsed().as_secs_f64();
    let capabilities = model.capabilities().clone();
    let length = PROMPT.min(capabilities.context_length - 1);
    progress("reading a prompt");
    let mut prompt = f64::MAX;
    for _ in 0..ROUNDS {
        prompt = prompt.min(read_prompt(&mut model, 0, length)?.as_secs_f64());
    }
    let mut decode = std::collections::BTreeMap::new();
    let context = CONTEXT.min(capabilities.context_length - DECODED - 1);
    for batch in BATCHES {
        progress(&format!("decoding {batch} at once"));
        for slot in 0..batch {
            read_prompt(&mut model, slot, context)?;
        }
        let want: Vec<usize> = (0..batch as usize).collect();
        let mut best = f64::MAX;
        let mut position = context;
        // Single steps are compared, so that one disturbance does not count for all.
        let each = DECODED / ROUNDS;
        for _ in 0..ROUNDS {
            let started = Instant::now();
            for _ in 0..each {
                let step: Vec<StepEntry> = (0..batch).flat_map(|slot| entries(slot, position, 1)).collect();
                model.step(&step, &want)?;
                position += 1;
            }
            best = best.min(started.elapsed().as_secs_f64() / f64::from(each));
        }
        decode.insert(batch, f64::from(batch) / best);
    }
    let (memory_bytes, private_memory_bytes) = crate::memory::of_this_process().unzip();
    let prompt_rate = f64::from(length) / prompt;
    let mut report = BenchReport {
        model: path.display().to_string(),
        backend: capabilities.backend,
        threads: 0,
        file_bytes: std::fs::metadata(path).map_or(0, |data| data.len()),
        weight_bytes: model.weight_bytes(),
        first_token_seconds,
        prompt_tokens_per_second: prompt_rate,
        decode_tokens_per_second: decode,
        memory_bytes,
        private_memory_bytes,
        memory_bandwidth_bytes_per_second: None,
        multiplications_per_second: None,
        decode_limit_tokens_per_second: None,
        prompt_limit_tokens_per_second: None,
        decode_share_of_limit: None,
        prompt_share_of_limit: None,
    };
    let weights = model.weights_per_token() as f64;
    if let Some(kernels) = model.kernels() {
        progress("measuring the machine's limits");
        report.threads = kernels.threads();
        let bandwidth = bandwidth(kernels);
        let multiplications = kernels.multiplication_rate();
        let decode_limit = bandwidth / report.weight_bytes as f64;
        let prompt_limit = multiplications / weights;
        report.memory_bandwidth_bytes_per_second = Some(bandwidth);
        report.multiplications_per_second = Some(multiplications);
        report.decode_limit_tokens_per_second = Some(decode_limit);
        report.prompt_limit_tokens_per_second = Some(prompt_limit);
        report.decode_share_of_limit = report.decode_tokens_per_second.get(&1).map(|rate| rate / decode_limit);
        report.prompt_share_of_limit = Some(prompt_rate / prompt_limit);
    }
    #[cfg(feature = "gpu")]
    if let Some(card) = model.card() {
        progress("measuring the card's memory");
        let bandwidth = card
            .bandwidth(SWEPT_BYTES, CARD_SWEEPS, ROUNDS)
            .map_err(|why| EngineError::Step(format!("the device: {why}")))?;
        let limit = bandwidth / report.weight_bytes as f64;
        report.memory_bandwidth_bytes_per_second = Some(bandwidth);
        report.decode_limit_tokens_per_second = Some(limit);
        report.decode_share_of_limit = report.decode_tokens_per_second.get(&1).map(|rate| rate / limit);
    }
    Ok(report)
}

fn entries(slot: u32, from: u32, count: u32) -> Vec<StepEntry> {
    (from..from + count).map(|position| StepEntry { token: position % 251, slot, position }).collect()
}

/// Reads a prompt anew, with the logits of its last token as an answer would need them.
fn read_prompt(model: &mut Model, slot: u32, length: u32) -> Result<Duration, EngineError> {
    model.release(slot);
    model.assign_share(slot)?;
    let chunk = model.capabilities().chunk;
    let started = Instant::now();
    for from in (0..length).step_by(chunk as usize) {
        let count = chunk.min(length - from);
        let want = if from + count == length { vec![count as usize - 1] } else { Vec::new() };
        model.step(&entries(slot, from, count), &want)?;
    }
    Ok(started.elapsed())
}

/// Bytes a second that all threads together read from memory.
fn bandwidth(kernels: &mut Kernels) -> f64 {
    let memory = vec![1u64; SWEPT_BYTES / 8];
    let mut best = f64::MAX;
    for _ in 0..ROUNDS + 1 {
        let started = Instant::now();
        kernels.sweep(&memory);
        best = best.min(started.elapsed().as_secs_f64());
    }
    SWEPT_BYTES as f64 / best
}

#[cfg(all(test, feature = "gpu"))]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_measured_against_its_own_memory() {
        if let Err(why) = crate::device::choose(DeviceChoice::Gpu) {
            return println!("skipped: {why}");
        }
        let path: std::path::PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/fixtures/tiny/qwen2.gguf"].iter().collect();
        let report = bench(&path, DeviceChoice::Gpu, &ModelOptions::default(), |_| {}).unwrap();
        println!("{report:#?}");
        assert!(report.backend.starts_with("gpu") && report.threads == 0);
        assert_eq!(report.decode_tokens_per_second.len(), BATCHES.len());
        let bandwidth = report.memory_bandwidth_bytes_per_second.unwrap();
        assert!(bandwidth > 1e6, "{bandwidth}");
        let share = report.decode_tokens_per_second[&1] * report.weight_bytes as f64 / bandwidth;
        assert!((report.decode_share_of_limit.unwrap() - share).abs() < 1e-9 * share.max(1.0));
    }
}
