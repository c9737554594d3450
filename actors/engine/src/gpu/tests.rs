//! Kernels against plain arithmetic, on whatever adapter there is.

use cubecl::prelude::*;
use half::f16;

use super::forms::Form;
use super::kernels;
use super::matrix::Matrix;
use super::*;
use crate::dequantize::Format;
use crate::gguf::tiny::{Tiny, TinyTensor};
use crate::model::weights::{Order, Part};

const FORMATS: [Format; 11] = [
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

/// The adapter; a word where there is none.
pub(super) fn card() -> Option<Card> {
    let card = Card::find(true);
    match &card {
        Some(card) => println!("on {card:?}"),
        None => println!("skipped: no graphics adapter, not even a software one"),
    }
    card
}

/// Numbers that are not in order (SplitMix64).
pub(super) fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// From -1 to 1.
pub(super) fn floats(seed: u64, count: usize) -> Vec<f32> {
    let mut next = random(seed);
    (0..count).map(|_| (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
}

/// Blocks of any codes. Scales have all signs and sizes, of which some are subnormal.
fn blocks(format: Format, seed: u64, weights: usize) -> Vec<u8> {
    let mut next = random(seed);
    let count = weights / format.block_weights();
    let mut bytes: Vec<u8> = (0..count * format.block_bytes()).map(|_| next() as u8).collect();
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 | Format::F16 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q6K => &[208],
        Format::F32 | Format::Bf16 => &[],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for at in halves {
            let value = match next() % 4 {
                0 => f16::from_bits((next() & 0x83ff) as u16),
                _ => f16::from_f32((next() % 2001) as f32 / 1000.0 - 1.0),
            };
            block[*at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        let value = (next() % 2001) as f32 / 1000.0 - 1.0;
        match format {
            Format::F32 => block.copy_from_slice(&value.to_le_bytes()),
            Format::Bf16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            _ => {}
        }
    }
    bytes
}

/// A file with one matrix, the rows of its weights as numbers, and the part of it.
pub(super) fn matrix(format: Format, inputs: usize, outputs: usize) -> (Gguf, Vec<f32>, Part) {
    let bytes = blocks(format, inputs as u64, inputs * outputs);
    let mut values = vec![0.0; inputs * outputs];
    format.dequantize(&bytes, &mut values);
    let mut tiny = Tiny::default();
    let dimensions = vec![inputs as u64, outputs as u64];
    tiny.tensors.push(TinyTensor { name: "m.weight".into(), dimensions, format: format.number(), bytes });
    (Gguf::from_bytes(tiny.bytes()).unwrap(), values, Part::whole("m".into(), inputs, outputs))
}

/// The sum of some products, and of their sizes.
pub(super) fn sum_and_size(weights: &[f32], x: &[f32]) -> (f64, f64) {
    let products = || weights.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b));
    (products().sum(), products().map(f64::abs).sum())
}

/// Nothing is rounded on the way to a card and out of its words, subnormal scales included.
#[test]
fn a_cards_weights_are_the_files_bit_for_bit() {
    let Some(card) = card() else { return };
    for format in FORMATS {
        let (inputs, rows) = (512, 3);
        let stored = blocks(format, 7, inputs * rows);
        let mut due = vec![0.0f32; inputs * rows];
        format.dequantize(&stored, &mut due);
        let form = Form::of(format);
        let (words, scales) = form.words(inputs);
        let (mut of_codes, mut of_scales) = (vec![0u32; words * rows], vec![0u32; scales * rows]);
        for (n, row) in stored.chunks_exact(stored.len() / rows).enumerate() {
            form.pack(format, row, &mut of_codes[n * words..][..words], &mut of_scales[n * scales..][..scales]);
        }
        let (codes, scales, out) = (card.words(&of_codes), card.words(&of_scales), card.room(inputs * rows));
        let count = inputs * rows / 8;
        // SAFETY: the buffers have the sizes that the form says.
        unsafe {
            kernels::unpack_rows::launch_unchecked(
                &card.client,
                CubeCount::Static(count.div_ceil(64) as u32, 1, 1),
                CubeDim::new_1d(64),
                codes.arg(),
                scales.arg(),
                out.arg(),
                (inputs / 8) as u32,
                count as u32,
                form,
            );
        }
        let got = card.read(&out).unwrap();
        for (n, (got, due)) in got.iter().zip(&due).enumerate() {
            assert_eq!(got, due, "{} weight {n}", format.name());
        }
    }
}

/// Products with few rows and with many, of every form, with a bias and added to what is there; the largest error is
/// that of adding up so many numbers of 32 bits.
#[test]
fn products_are_those_of_plain_arithmetic() {
    let Some(card) = card() else { return };
    for format in FORMATS {
        // No multiple of a workgroup's outputs, or of a tile.
        let (inputs, outputs) = (if format.block_weights() == 1 { 88 } else { 768 }, 131);
        let (gguf, weights, part) = matrix(format, inputs, outputs);
        let bias = floats(3, outputs);
        let plain = Matrix::load(&card, &gguf, std::slice::from_ref(&part), None).unwrap();
        let biased = Matrix::load(&card, &gguf, &[part], Some(bias.clone())).unwrap();
        let mut worst = 0.0f64;
        for rows in [1usize, 2, 3, 7, 16, 17, 70] {
            let room = rows.next_power_of_two();
            let x = floats(rows as u64, room * inputs);
            let before = floats(5, room * outputs);
            let (on_card, out) = (card.floats(&x), card.floats(&before));
            biased.apply(&card, &on_card, rows, &out, false);
            let first = card.read(&out).unwrap();
            plain.apply(&card, &on_card, rows, &out, true);
            let second = card.read(&out).unwrap();
            for row in 0..rows {
                for output in 0..outputs {
                    let (weights, x) = (&weights[output * inputs..][..inputs], &x[row * inputs..][..inputs]);
                    let (sum, size) = sum_and_size(weights, x);
                    let at = row * outputs + output;
                    let bound = (inputs as f64 + 8.0) * 2f64.powi(-24) * (size + 2.0);
                    let once = f64::from(bias[output]) + sum;
                    let error = (f64::from(first[at]) - once).abs().max((f64::from(second[at]) - once - sum).abs());
                    assert!(error <= 2.0 * bound, "{} row {row} of {rows}, output {output}: {error}", format.name());
                    worst = worst.max(error / size.max(1e-9));
                }
            }
            // Few rows are computed in powers of two, many are cut off.
            if rows > kernels::FEW {
                assert_eq!(second[rows * outputs..], before[rows * outputs..], "{}: behind {rows} rows", format.name());
            }
        }
        println!("{}: largest error {worst:.1e} of the sum of the products' sizes", format.name());
    }
}

/// Parts of several formats, turned and cut out of larger ones, stand side by side.
#[test]
fn a_matrix_of_several_formats_and_orders_is_one() {
    let Some(card) = card() else { return };
    let (inputs, outputs) = (64, 48);
    let mut tiny = Tiny::default();
    let mut all = Vec::new();
    for (name, format) in [("a", Format::Q8_0), ("b", Format::F16), ("c", Format::F16)] {
        let bytes = blocks(format, name.as_bytes()[0].into(), inputs * outputs);
        let mut values = vec![0.0; inputs * outputs];
        format.dequantize(&bytes, &mut values);
        let (name, dimensions) = (format!("{name}.weight"), vec![inputs as u64, outputs as u64]);
        tiny.tensors.push(TinyTensor { name, dimensions, format: format.number(), bytes });
        all.push(values);
    }
    let gguf = Gguf::from_bytes(tiny.bytes()).unwrap();
    let pairs = Order::Pairs { head_size: 16 };
    let parts = [
        Part { order: pairs, ..Part::whole("a".into(), inputs, outputs) },
        Part { first: 8, outputs: 16, ..Part::whole("b".into(), inputs, outputs) },
        Part::whole("c".into(), inputs, outputs),
    ];
    let joined = Matrix::load(&card, &gguf, &parts, None).unwrap();
    let x = floats(1, inputs);
    let out = card.room(112);
    joined.apply(&card, &card.floats(&x), 1, &out, false);
    let got = card.read(&out).unwrap();
    let rows = (0..48).map(|n| (0, pairs.row(n))).chain((8..24).map(|n| (1, n))).chain((0..48).map(|n| (2, n)));
    for (n, (which, row)) in rows.enumerate() {
        let due: f32 = all[which][row * inputs..][..inputs].iter().zip(&x).map(|(a, b)| a * b).sum();
        assert!((got[n] - due).abs() < 1e-3 * due.abs().max(1.0), "output {n}: {} {due}", got[n]);
    }
}

/// Tokens chosen on the card are those that the sampler chooses from the same scores. The card adds up weights as
/// 32-bit floats and draws with 24 bits, the sampler with whole numbers: a draw may fall to the other side where two
/// tokens meet, which is once in some thousands (allowed: one in a hundred).
#[test]
fn a_card_chooses_what_the_sampler_chooses() {
    use ingle_protocol::wire::v2::Sampling;

    use crate::sampler::{Place, Sampler, draw_of};

    let Some(card) = card() else { return };
    let (width, rows) = (5_000, 16);
    let (mut drawn, mut others, mut left) = (0, 0, 0);
    let settings = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 40, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (0.8, 40, 0.95, 0.05),
        (1.3, 0, 1.0, 0.1),
        (1.0, 1, 1.0, 0.0),
        (0.6, 3, 0.5, 0.0),
    ];
    for (number, (temperature, top_k, top_p, min_p)) in settings.into_iter().enumerate() {
        // Some far above the rest, as models have it; two of one score; one that is no number.
        let mut scores: Vec<f32> = floats(number as u64, width * rows).into_iter().map(|x| x.powi(5) * 14.0).collect();
        for row in scores.chunks_exact_mut(width) {
            (row[7], row[4_000]) = (13.9, 13.9);
            row[100] = f32::NAN;
        }
        let buffer = card.floats(&scores);
        for round in 0..8u32 {
            let of = |row: usize| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                seed: number as u64 * 1_000 + row as u64,
                ..Sampling::default()
            };
            let draws: Vec<_> = (0..rows).map(|row| draw_of(&of(row), round, false)).collect();
            let got = super::tokens::choose(&card, &buffer, width, &draws).unwrap();
            let mut sampler = Sampler::new(&crate::echo::EchoCodec::default());
            let answer = vec![1; round as usize];
            for (row, got) in got.into_iter().enumerate() {
                let logits = &scores[row * width..][..width];
                let sampling = of(row);
                let place = Place { logits, sampling: &sampling, tokens: &answer, prompt: 0, mask: None };
                let due = sampler.choose(place).unwrap().id;
                drawn += 1;
                match got {
                    None => left += 1,
                    Some(id) if id != due => {
                        assert!(temperature > 0.0 && top_k != 1, "the likeliest is {due}, not {id}");
                        others += 1;
                    }
                    Some(_) => {}
                }
            }
        }
    }
    println!("of {drawn} tokens {others} were others than the sampler's, {left} were left to it");
    assert!(others * 100 <= drawn && left * 4 <= drawn, "{others} and {left} of {drawn}");
}

/// What nobody computed is no token; what is too even for a workgroup's memory is the host's.
#[test]
fn rows_that_a_card_cannot_choose_from_are_told() {
    let Some(card) = card() else { return };
    let draw = crate::Draw { inverse_temperature: 1.0, top_k: 0, top_p: 0.99, min_p: 0.0, random: 1 << 63 };
    let even: Vec<f32> = floats(1, 4_000).into_iter().map(|x| x / 100.0).collect();
    assert_eq!(super::tokens::choose(&card, &card.floats(&even), 4_000, &[Some(draw)]), Ok(vec![None]));
    for lost in [0.0, f32::NAN] {
        let row = card.floats(&vec![lost; 4_000]);
        assert!(super::tokens::choose(&card, &row, 4_000, &[Some(draw)]).is_err(), "{lost}");
    }
}

/// What a card has no memory for is refused with the numbers, before anything is sent there.
#[test]
fn a_model_that_a_card_has_no_memory_for_is_refused() {
    let Some(card) = card() else { return };
    let small = Card { memory: Some(1 << 20), ..card };
    let gguf = Gguf::from_bytes(crate::gguf::tiny::llama(crate::gguf::tiny::Sizes::default()).bytes()).unwrap();
    let model = Hyperparameters::from_gguf(&gguf).unwrap();
    let refused = load(small, &gguf, &model, (1, |_| 1), &ModelOptions::default()).map(|_| ());
    match refused {
        Err(EngineError::CardMemory { needed, weights, kv, has, .. }) => {
            assert!(weights > 0 && kv > 0 && has == 1 << 20, "{weights} {kv} {has}");
            assert_eq!(needed, weights + kv + OVERHEAD);
        }
        other => panic!("{other:?}"),
    }
}
