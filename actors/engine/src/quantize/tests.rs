use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::gguf::tiny::{self, numbers};
use crate::gguf::{Gguf, Value};

const QUANTIZED: [Format; 8] =
    [Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::Q4K, Format::Q5K, Format::Q6K];

fn encoded(format: Format, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0xa5; values.len() / format.block_weights() * format.block_bytes()];
    format.quantize(values, &mut out);
    out
}

fn decoded(format: Format, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / format.block_bytes() * format.block_weights()];
    format.dequantize(bytes, &mut out);
    out
}

fn from_hex(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap()).collect()
}

/// `tests/fixtures/make_quantize_reference.py` made the reference with ggml's own encoders.
#[test]
fn encoders_give_the_bytes_of_ggml() {
    let reference: BTreeMap<String, String> =
        serde_json::from_str(include_str!("../../tests/fixtures/quantize_reference.json")).unwrap();
    let weights: Vec<f32> = from_hex(&reference["weights"])
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect();
    for format in QUANTIZED.into_iter().chain([Format::F16, Format::Bf16]) {
        let (got, expected) = (encoded(format, &weights), from_hex(&reference[&format.name()]));
        assert_eq!(got.len(), expected.len());
        let blocks = got.chunks(format.block_bytes()).zip(expected.chunks(format.block_bytes()));
        for (n, (got, expected)) in blocks.enumerate() {
            assert_eq!(got, expected, "{} block {n}", format.name());
        }
    }
}

/// The largest error of a weight in a block, as a share of the block's (or group's) range of weights.
fn bound(format: Format) -> f32 {
    match format {
        // Half a step of 255, 30, 31, 14 or 15 (the asymmetric end of the symmetric ones loses a whole one), and what
        // half-precision scales cost.
        Format::Q8_0 => 0.0045,
        Format::Q5_1 => 0.0175,
        Format::Q5_0 => 0.035,
        Format::Q4_1 => 0.035,
        Format::Q4_0 => 0.07,
        // Searched for the least squares, with scales of 6 or 8 bits over the largest of the block: no such bound
        // holds for each weight. Taken over the block's range.
        Format::Q6K => 0.04,
        Format::Q5K => 0.06,
        Format::Q4K => 0.12,
        _ => 0.0,
    }
}

/// What tiny weights lose beside: half-precision scales come in steps of 2^-24, and half of one counts as often as
/// the largest value (times the largest group scale) says; minima likewise.
fn scale_bound(format: Format) -> f32 {
    let times = match format {
        Format::Q4_0 => 8.0,
        Format::Q4_1 => 15.0 + 1.0,
        Format::Q5_0 => 16.0,
        Format::Q5_1 => 31.0 + 1.0,
        Format::Q8_0 => 127.0,
        Format::Q4K => 63.0 * 15.0 + 63.0,
        Format::Q5K => 63.0 * 31.0 + 63.0,
        Format::Q6K => 128.0 * 32.0,
        _ => 0.0,
    };
    times * 0.5f32.powi(25)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn errors_stay_in_bounds(seed: u32, exponent in -4i32..4, spread in 0.01f32..1.0) {
        let size = 10f32.powi(exponent);
        let values: Vec<f32> = numbers(seed, 512).iter().map(|x| x * size * spread).collect();
        for format in QUANTIZED {
            let back = decoded(format, &encoded(format, &values));
            for (block, back) in values.chunks(format.block_weights()).zip(back.chunks(format.block_weights())) {
                let range = 2.0 * block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (x, y) in block.iter().zip(back) {
                    let most = bound(format) * range + scale_bound(format);
                    prop_assert!((x - y).abs() <= most, "{} {x} {y} {most}", format.name());
                }
            }
        }
    }

    #[test]
    fn encoding_again_changes_nothing_in_blocks_with_plain_scales(seed: u32) {
        // Q8_0 rounds the scale to half precision: what comes back has that scale exactly.
        let values = numbers(seed, 256);
        for format in [Format::Q8_0, Format::Q4_0, Format::Q5_0, Format::F16, Format::Bf16] {
            let once = decoded(format, &encoded(format, &values));
            let twice = decoded(format, &encoded(format, &once));
            for (a, b) in once.iter().zip(&twice) {
                prop_assert!((a - b).abs() <= a.abs() * 1e-3, "{} {a} {b}", format.name());
            }
        }
    }

    #[test]
    fn any_finite_weights_encode_to_finite_ones(bits in proptest::collection::vec(any::<u32>(), 256)) {
        for format in QUANTIZED.into_iter().chain([Format::F16, Format::Bf16, Format::F32]) {
            let weights = bits.iter().map(|bits| f32::from_bits(*bits));
            let weights: Vec<f32> = weights.map(|x| if x.abs() <= format.largest() { x } else { 0.0 }).collect();
            check("t", format, &weights).unwrap();
            // ±65504 in one block: the range is twice what half precision holds, over 15 it fits.
            prop_assert!(decoded(format, &encoded(format, &weights)).iter().all(|x| x.is_finite()), "{}", format.name());
        }
    }
}

#[test]
fn what_a_format_holds_exactly_stays_as_it_is() {
    let exact = |format: Format, values: Vec<f32>| assert_eq!(decoded(format, &encoded(format, &values)), values);
    exact(Format::Q8_0, (0..32).map(|n| if n == 0 { -127.0 } else { n as f32 * 8.0 - 128.0 } * 0.25).collect());
    exact(Format::Q4_0, (0..32).map(|n| (n % 16) as f32 * 0.5 - 4.0).collect());
    exact(Format::Q4_1, (0..32).map(|n| (n % 16) as f32 * 0.5 + 3.0).collect());
    exact(Format::Q5_0, (0..32).map(|n| n as f32 * 0.5 - 8.0).collect());
    exact(Format::Q5_1, (0..32).map(|n| n as f32 * 0.5 + 3.0).collect());
    exact(Format::F16, vec![0.5, -65504.0, 0.000_061_035_156]);
    exact(Format::Bf16, vec![0.5, -1.0]);
    for format in QUANTIZED {
        exact(format, vec![0.0; 256]);
    }
    // The K formats: whole blocks whose scales are full 6 or 8 bits.
    exact(Format::Q6K, (0..256).map(|n| (n % 16) as f32 * 4.0 - 32.0).collect());
    exact(Format::Q4K, (0..256).map(|n| 63.0 * ((n % 16) as f32) - 63.0).collect());
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let values = numbers(7, 256 * 300);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for format in [Format::Q4K, Format::Q8_0, Format::F16] {
        assert_eq!(pool(1).install(|| encoded(format, &values)), pool(5).install(|| encoded(format, &values)));
    }
}

#[test]
fn targets_are_named_and_unknown_ones_listed() {
    assert_eq!("INT8".parse::<Target>().unwrap().to_string(), "Q8_0");
    assert_eq!("q4_k".parse::<Target>().unwrap().file_type(), 14);
    assert!("q3_k".parse::<Target>().unwrap_err().contains("int8, q8_0, q4_0"));
}

#[test]
fn the_mixture_is_as_documented() {
    let of = |target: &str, name: &str, row: u64, has_output: bool| {
        let target: Target = target.parse().unwrap();
        let (format, fallback) = target.format_for(name, &[row, 4], has_output);
        (format, fallback.map(|fallback| (fallback.wanted, fallback.got)))
    };
    let named = |a: &str, b: &str| Some((a.to_string(), b.to_string()));
    assert_eq!(of("int8", "blk.0.attn_q.weight", 64, true), (Format::Q8_0, None));
    assert_eq!(of("int8", "token_embd.weight", 64, false), (Format::Q8_0, None));
    assert_eq!(of("q4_k", "blk.0.attn_q.weight", 256, true), (Format::Q4K, None));
    assert_eq!(of("q4_k", "blk.0.attn_q.weight", 576, true), (Format::Q4_1, named("Q4_K", "Q4_1")));
    assert_eq!(of("q4_k", "token_embd.weight", 256, true), (Format::Q6K, None));
    assert_eq!(of("q4_k", "token_embd.weight", 576, false), (Format::Q8_0, named("Q6_K", "Q8_0")));
    assert_eq!(of("q4_0", "token_embd.weight", 256, true), (Format::Q4_0, None));
    assert_eq!(of("q4_0", "token_embd.weight", 256, false), (Format::Q6K, None));
    assert_eq!(of("q5_1", "output.weight", 256, true), (Format::Q6K, None));
    assert_eq!(of("int8", "blk.0.attn_q.weight", 40, true), (Format::F16, named("Q8_0", "F16")));
    for kept in ["blk.0.attn_norm.weight", "blk.0.attn_q.bias", "position_embd.weight", "token_types.weight"] {
        assert_eq!(of("q4_0", kept, 256, true).0, Format::F32, "{kept}");
    }
    assert_eq!("f16".parse::<Target>().unwrap().format_for("output_norm.weight", &[64], true).0, Format::F32);
}

fn model() -> tiny::Tiny {
    tiny::llama(tiny::Sizes { layers: 1, own_output: true, ..Default::default() })
}

fn source(tiny: &tiny::Tiny) -> Box<dyn Source> {
    Box::new(GgufSource::new(Gguf::from_bytes(tiny.bytes()).unwrap()).unwrap())
}

#[test]
fn a_whole_model_keeps_its_metadata_bit_for_bit_and_its_weights_nearly() {
    let mut tiny = model();
    tiny.meta("some.large", tiny::Meta::U64(u64::MAX)).meta("general.file_type", tiny::Meta::U32(0));
    let before = Gguf::from_bytes(tiny.bytes()).unwrap();
    let after = Gguf::from_bytes(convert(source(&tiny), "int8".parse().unwrap()).unwrap()).unwrap();
    let raw = |gguf: &Gguf| -> BTreeMap<String, Vec<u8>> {
        gguf.raw_metadata().map(|(key, bytes)| (key.into(), bytes.into())).collect()
    };
    let (mut old, mut new) = (raw(&before), raw(&after));
    old.remove("general.file_type");
    new.remove("general.file_type");
    new.remove("general.quantization_version");
    assert_eq!(old, new);
    assert_eq!(after.number("general.file_type").unwrap(), Some(7));
    assert_eq!(after.number("general.quantization_version").unwrap(), Some(2));
    assert_eq!(after.find("some.large"), Some(&Value::Unsigned(u64::MAX)));
    for info in before.tensors() {
        let new = after.tensor(&info.name).unwrap();
        let weights = |gguf: &Gguf, info| decoded(Format::of(info).unwrap(), gguf.tensor_bytes(info).unwrap());
        let (a, b) = (weights(&before, info), weights(&after, new));
        assert_eq!(new.dimensions, info.dimensions);
        assert_eq!(Format::of(new).unwrap().is_quantized(), info.dimensions.len() == 2, "{}", info.name);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 0.005), "{}", info.name);
    }
    // Back to f32: no further change, as every f32 holds what Q8_0 does.
    let again = GgufSource::new(after).unwrap();
    let float = Gguf::from_bytes(convert(Box::new(again), "f32".parse().unwrap()).unwrap()).unwrap();
    assert_eq!(float.number("general.file_type").unwrap(), Some(0));
    let twice = convert(Box::new(GgufSource::new(float).unwrap()), "int8".parse().unwrap()).unwrap();
    assert_eq!(twice.len(), convert(source(&tiny), "int8".parse().unwrap()).unwrap().len());
}

#[test]
fn rounding_twice_is_refused_unless_asked_for() {
    let int8 = convert(source(&model()), "int8".parse().unwrap()).unwrap();
    let source = || Box::new(GgufSource::new(Gguf::from_bytes(int8.clone()).unwrap()).unwrap());
    let error = Conversion::plan(source(), "q4_0".parse().unwrap(), false).unwrap_err().to_string();
    assert!(error.contains("quantized already") && error.contains("--requantize"), "{error}");
    assert!(Conversion::plan(source(), "q4_0".parse().unwrap(), true).unwrap().is_requantization());
    // The same format is a copy.
    let copy = Conversion::plan(source(), "q8_0".parse().unwrap(), false).unwrap();
    assert!(!copy.is_requantization());
    assert_eq!(convert(source(), "q8_0".parse().unwrap()).unwrap(), int8);
}

#[test]
fn a_weight_that_is_none_is_refused_with_its_tensor() {
    for (weight, words) in [(f32::NAN, "the model itself is damaged"), (1e6, "use bf16 or f32")] {
        let mut tiny = model();
        tiny.without("blk.0.attn_q.weight");
        let mut values = vec![0.5; 64 * 64];
        values[70] = weight;
        tiny.tensor_f32("blk.0.attn_q.weight", &[64, 64], &values);
        let error = convert(source(&tiny), "int8".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("tensor blk.0.attn_q.weight") && error.contains(words), "{error}");
        assert_eq!(convert(source(&tiny), "bf16".parse().unwrap()).is_ok(), weight.is_finite());
    }
}

#[test]
fn a_cancelled_conversion_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let conversion = Conversion::plan(source(&model()), "int8".parse().unwrap(), false).unwrap();
    let cancelled = AtomicBool::new(false);
    let path = folder.path().join("out.gguf");
    let mut seen = 0;
    let result = conversion.write(&path, false, &cancelled, &mut |done, all| {
        seen += 1;
        assert!(done <= all);
        cancelled.store(true, Ordering::Relaxed);
    });
    assert!(matches!(result, Err(ConvertError::Cancelled)));
    assert_eq!(seen, 1);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    assert_eq!(conversion.file_bytes(), convert(source(&model()), "int8".parse().unwrap()).unwrap().len() as u64);
}
