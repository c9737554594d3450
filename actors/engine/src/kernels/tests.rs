use std::sync::Arc;

use half::f16;
use proptest::prelude::*;

use super::heads::Row;
use super::pool::Pool;
use super::*;
use crate::dequantize::Format;

pub(crate) const FORMATS: [Format; 11] = [
    Format::F32,
    Format::F16,
    Format::Bf16,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q4K,
    Format::Q5K,
    Format::Q6K,
];

/// Numbers within ±1 from a seed.
pub(super) fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A stored row of a format: any codes, moderate scales.
fn stored_row(format: Format, inputs: usize, seed: u32) -> Vec<u8> {
    let random = numbers(seed, inputs * 4);
    let mut bytes: Vec<u8> = random.iter().map(|x| (x * 1e4).to_bits() as u8).collect();
    bytes.truncate(inputs / format.block_weights() * format.block_bytes());
    for (n, block) in bytes.chunks_exact_mut(format.block_bytes()).enumerate() {
        let mut half = |at: usize, value: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        let value = random[n];
        match format {
            Format::F32 => block.copy_from_slice(&value.to_le_bytes()),
            Format::F16 => half(0, value),
            Format::Bf16 => block.copy_from_slice(&((value.to_bits() >> 16) as u16).to_le_bytes()),
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => half(0, value / 50.0),
            Format::Q6K => half(208, value / 900.0),
            _ => {
                half(0, value / 50.0);
                half(2, random[n + 1]);
            }
        }
    }
    bytes
}

pub(super) fn packed(format: Format, inputs: usize, outputs: usize, seed: u32) -> (Packed, Vec<Vec<f32>>) {
    let shape = Shape { format, inputs, outputs };
    let rows: Vec<Vec<u8>> = (0..outputs).map(|n| stored_row(format, inputs, seed + n as u32)).collect();
    let mut bytes = vec![0u8; shape.bytes().unwrap()];
    for (rows, tile) in rows.chunks(LANES).zip(bytes.chunks_exact_mut(shape.tile_bytes())) {
        pack_tile(shape, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), tile);
    }
    let floats = rows.iter().map(|row| {
        let mut floats = vec![0.0; inputs];
        format.dequantize(row, &mut floats);
        floats
    });
    let floats = floats.collect();
    (Packed::new(shape, Arc::new(bytes), 0).unwrap(), floats)
}

/// What the int8 path makes of a row of activations.
fn rounded(x: &[f32], format: Format) -> Vec<f32> {
    if matches!(format, Format::F32 | Format::F16 | Format::Bf16) {
        return x.to_vec();
    }
    let block = |x: &[f32]| {
        let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        x.iter().map(|x| (x * 127.0 / most).round() * most / 127.0).collect::<Vec<_>>()
    };
    x.chunks(32).flat_map(block).collect()
}

fn linear(set: InstructionSet, threads: usize, parts: &[Packed], x: &[f32], rows: usize) -> Vec<f32> {
    let outputs: usize = parts.iter().map(|part| part.shape().outputs).sum();
    let mut out = vec![0.0; rows * outputs];
    Kernels::new(set, threads).linear(parts, None, x, Norm::None, &mut out);
    out
}

#[test]
fn products_are_those_of_the_stored_weights() {
    for format in FORMATS {
        let (inputs, outputs, rows) = (512, 37, 5);
        let (weights, floats) = packed(format, inputs, outputs, 7);
        let x = numbers(1, rows * inputs);
        let got = linear(InstructionSet::Portable, 1, &[weights], &x, rows);
        for (row, x) in x.chunks(inputs).enumerate() {
            let x = rounded(x, format);
            for (n, weights) in floats.iter().enumerate() {
                let due: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let size: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(w * x).abs()).sum();
                let got = f64::from(got[row * outputs + n]);
                // One code may be rounded the other way at a tie, which is worth 1/127 of one product.
                assert!((got - due).abs() < 3e-4 * size, "{format:?} {row} {n}: {got} {due} of {size}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_instruction_set_gives_the_reference_bits(
        format in 0..FORMATS.len(), spans in 1usize..4, outputs in 1usize..70, rows in 1usize..19, seed in 0u32..1000,
        threads in 1usize..4,
    ) {
        let format = FORMATS[format];
        let inputs = spans * 256;
        let (first, _) = packed(format, inputs, outputs, seed);
        let (second, _) = packed(Format::Q4_1, inputs, 20, seed + 99);
        let parts = [first, second];
        let x = numbers(seed + 5, rows * inputs);
        let due = linear(InstructionSet::Portable, 1, &parts, &x, rows);
        for set in InstructionSet::available() {
            let got = linear(set, threads, &parts, &x, rows);
            prop_assert!(same(&got, &due), "{set:?} {format:?}");
        }
        // And a row alone what it gets among others.
        let row = seed as usize % rows;
        let width = outputs + 20;
        let alone = linear(InstructionSet::available()[0], 1, &parts, &x[row * inputs..][..inputs], 1);
        prop_assert!(same(&alone, &due[row * width..][..width]));
    }

    #[test]
    fn gates_and_norms_are_the_same_bits_everywhere(
        rows in 1usize..12, outputs in 1usize..50, seed in 0u32..1000, gelu in any::<bool>(),
    ) {
        let inputs = 96;
        let (gate, gates) = packed(Format::Q8_0, inputs, outputs, seed);
        let (up, ups) = packed(Format::Q5_1, inputs, outputs, seed + 77);
        let x = numbers(seed, rows * inputs);
        let weight = numbers(seed + 3, inputs);
        let norm = Norm::Rms { weight: &weight, epsilon: 1e-5 };
        let activation = if gelu { Activation::GeluTanh } else { Activation::Silu };
        let run = |set, threads| {
            let mut out = vec![0.0; rows * outputs];
            Kernels::new(set, threads).gated(&gate, &up, activation, &x, norm, &mut out);
            out
        };
        let due = run(InstructionSet::Portable, 1);
        for set in InstructionSet::available() {
            prop_assert!(same(&run(set, 2), &due), "{set:?}");
        }
        for (x, due) in x.chunks(inputs).zip(due.chunks(outputs)) {
            let mean = x.iter().map(|x| x * x).sum::<f32>() / inputs as f32;
            let x: Vec<f32> = x.iter().zip(&weight).map(|(x, w)| x / (mean + 1e-5).sqrt() * w).collect();
            let x = rounded(&x, Format::Q8_0);
            for (n, due) in due.iter().enumerate() {
                let dot = |w: &[f32]| w.iter().zip(&x).map(|(w, x)| f64::from(w * x)).sum::<f64>();
                let (g, u) = (dot(&gates[n]), dot(&ups[n]));
                let cubed = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                let active = if gelu { 0.5 * g * (1.0 + cubed.tanh()) } else { g / (1.0 + (-g).exp()) };
                let got = f64::from(*due);
                prop_assert!((got - active * u).abs() < 2e-2 * (1.0 + (active * u).abs()), "{got} {}", active * u);
            }
        }
    }

    #[test]
    fn attention_is_softmax_over_what_came_before(
        kv_heads in 1usize..4, share in 1usize..4, vectors in 1usize..5, length in 1usize..200, seed in 0u32..1000,
        windowed in any::<bool>(), int8 in any::<bool>(), cut in 1usize..200,
    ) {
        let (size, heads) = (vectors * 16, kv_heads * share);
        let window = if windowed { 37 } else { usize::MAX };
        let kind = if int8 { KvType::Int8 } else { KvType::F16 };
        let layout = KvLayout { kind, heads: kv_heads, size };
        let width = (heads + 2 * kv_heads) * size;
        let qkv = numbers(seed, length * width);
        let scale = 1.0 / (size as f32).sqrt();
        let run = |set, threads, chunk: usize| {
            let mut kernels = Kernels::new(set, threads);
            let mut memory = vec![0xabu8; layout.block_bytes() * length.div_ceil(KV_BLOCK)];
            let blocks = vec![memory.chunks_exact_mut(layout.block_bytes()).map(|block| block.as_mut_ptr()).collect()];
            let mut out = vec![0.0; length * heads * size];
            let mut qkv = qkv.clone();
            for from in (0..length).step_by(chunk) {
                let count = chunk.min(length - from);
                let rows: Vec<Row> =
                    (from..from + count).map(|position| Row { sequence: 0, position, sees: position }).collect();
                kernels.attention(AttentionJob {
                    layout, heads, rows: &rows, blocks: &blocks, qkv: &mut qkv[from * width..][..count * width],
                    cosines: &[], sines: &[], norms: None, scale, window,
                    out: &mut out[from * heads * size..][..count * heads * size],
                });
            }
            out
        };
        let due = run(InstructionSet::Portable, 1, length);
        for set in InstructionSet::available() {
            prop_assert!(same(&run(set, 2, length), &due), "{set:?}");
            prop_assert!(same(&run(set, 2, cut), &due), "{set:?} in chunks of {cut}");
        }
        let at = |position: usize, part: usize| &qkv[position * width + part * size..][..size];
        for position in [0, length / 2, length - 1] {
            for head in 0..heads {
                let from = (position + 1).saturating_sub(window);
                let score = |p: usize| {
                    let key = at(p, heads + head / share);
                    at(position, head).iter().zip(key).map(|(q, k)| f64::from(q * k * scale)).sum::<f64>()
                };
                let scores: Vec<f64> = (from..=position).map(|p| score(p).exp()).collect();
                let total: f64 = scores.iter().sum();
                for i in 0..size {
                    let value = |p: usize| f64::from(at(p, heads + kv_heads + head / share)[i]);
                    let due_here: f64 =
                        scores.iter().zip(from..).map(|(score, p)| score * value(p)).sum::<f64>() / total;
                    let got = f64::from(due[(position * heads + head) * size + i]);
                    let tolerance = if int8 { 0.03 } else { 2e-3 };
                    prop_assert!((got - due_here).abs() < tolerance, "{position} {head} {i}: {got} {due_here}");
                }
            }
        }
    }
}

/// The same bits; zeros may differ in their sign.
pub(super) fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || a.to_bits() == b.to_bits())
}

/// How fast products are: `cargo test --release -- --ignored --nocapture speed_of_products`.
#[test]
#[ignore = "a measurement"]
fn speed_of_products() {
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    for set in InstructionSet::available() {
        if set == InstructionSet::Portable {
            continue;
        }
        for format in FORMATS {
            let (inputs, outputs) = (1536, 4096);
            let (weights, _) = packed(format, inputs, outputs, 3);
            let bytes = weights.shape().bytes().unwrap();
            for rows in [1, 4, 16, 256] {
                let x = numbers(1, rows * inputs);
                let mut out = vec![0.0; rows * outputs];
                let mut kernels = Kernels::new(set, threads);
                let mut best = f64::MAX;
                for _ in 0..(1000 / rows).clamp(5, 30) {
                    let started = std::time::Instant::now();
                    kernels.linear(std::slice::from_ref(&weights), None, &x, Norm::None, &mut out);
                    best = best.min(started.elapsed().as_secs_f64());
                }
                let rate = (inputs * outputs * rows) as f64 / best / 1e9;
                println!(
                    "{:12} {format:?} {rows:4} rows: {rate:7.1} G/s, {:6.1} GB/s",
                    set.name(),
                    bytes as f64 / best / 1e9
                );
            }
        }
    }
}

/// How fast weights come from memory: `… -- --ignored --nocapture speed_of_memory`.
#[test]
#[ignore = "a measurement"]
fn speed_of_memory() {
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    for (format, rows) in [(Format::Q4_1, 1536), (Format::Q4_1, 16 * 400), (Format::Q8_0, 1536), (Format::F16, 1536)] {
        let inputs = 576usize.next_multiple_of(format.block_weights());
        let (one, _) = packed(format, inputs, rows, 3);
        let many: Vec<Packed> = (0..(120 << 20) / one.shape().bytes().unwrap()).map(|_| one.separate()).collect();
        let bytes: usize = many.iter().map(|part| part.shape().bytes().unwrap()).sum();
        let x = numbers(1, inputs);
        let mut out = vec![0.0; rows];
        for threads in [1, threads] {
            let mut kernels = Kernels::new(InstructionSet::available()[0], threads);
            let mut best = f64::MAX;
            for _ in 0..20 {
                let started = std::time::Instant::now();
                for part in &many {
                    kernels.linear(std::slice::from_ref(part), None, &x, Norm::None, &mut out);
                }
                best = best.min(started.elapsed().as_secs_f64());
            }
            let memory = vec![1u64; 120 << 17];
            let mut swept = f64::MAX;
            for _ in 0..10 {
                let started = std::time::Instant::now();
                kernels.sweep(&memory);
                swept = swept.min(started.elapsed().as_secs_f64());
            }
            let sweep = memory.len() as f64 * 8.0 / swept / 1e9;
            println!(
                "{threads} threads, {format:?}: {:.1} GB/s of {sweep:.1} GB/s, {:.2} us a product",
                bytes as f64 / best / 1e9,
                best / many.len() as f64 * 1e6
            );
        }
    }
}

#[test]
fn pools_may_be_of_any_size() {
    assert_eq!(Pool::new(0).threads(), 1);
    assert_eq!(Pool::new(3).threads(), 3);
}

/// What sharing costs: `… -- --ignored --nocapture speed_of_sharing`.
#[test]
#[ignore = "a measurement"]
fn speed_of_sharing() {
    for threads in [1, 2] {
        let mut pool = Pool::new(threads);
        for units in [1, 2, 16] {
            for pause in [0u64, 2, 20] {
                let mut total = 0.0;
                for _ in 0..20 {
                    let started = std::time::Instant::now();
                    while started.elapsed().as_micros() < u128::from(pause) {}
                    let started = std::time::Instant::now();
                    pool.run(units, |unit| {
                        std::hint::black_box(unit);
                    });
                    total += started.elapsed().as_secs_f64();
                }
                println!("{threads} threads, {units} units, after {pause} us: {:.2} us", total / 20_000.0 * 1e6);
            }
        }
    }
    for threads in [1, 2] {
        for outputs in [16, 64, 256, 576] {
            let (weights, _) = packed(Format::Q4_1, 576, outputs, 3);
            let x = numbers(1, 576);
            let mut out = vec![0.0; outputs];
            let mut kernels = Kernels::new(InstructionSet::available()[0], threads);
            let started = std::time::Instant::now();
            for _ in 0..20_000 {
                kernels.linear(std::slice::from_ref(&weights), None, &x, Norm::None, &mut out);
            }
            let each = started.elapsed().as_secs_f64() / 20_000.0 * 1e6;
            println!(
                "{threads} threads, 576 x {outputs}: {each:.2} us, {:.1} GB/s",
                weights.shape().bytes().unwrap() as f64 / each / 1e3
            );
        }
    }
}
