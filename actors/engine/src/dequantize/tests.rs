use super::*;
use crate::gguf::tiny::numbers;

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect()
}

fn dequantized(format: Format, bytes: &[u8]) -> Vec<f32> {
    let blocks = bytes.len() / format.block_bytes();
    assert_eq!(blocks * format.block_bytes(), bytes.len());
    let mut out = vec![f32::NAN; blocks * format.block_weights()];
    format.dequantize(bytes, &mut out);
    out
}

#[test]
fn floats_are_taken_as_they_are() {
    let values = [0.0, -1.5, 0.333_251_95, 65504.0];
    let f32s: Vec<u8> = values.iter().flat_map(|value: &f32| value.to_le_bytes()).collect();
    assert_eq!(dequantized(Format::F32, &f32s), values);
    assert_eq!(dequantized(Format::F16, &halves(&values)), values);
    assert_eq!(dequantized(Format::Bf16, &[0x80, 0x3f, 0x00, 0xc0]), [1.0, -2.0]);
}

#[test]
fn blocks_of_32_follow_their_definitions() {
    // The byte at 1 holds value 1 in its lower and value 17 in its upper half.
    let mut packed = [0u8; 16];
    packed[1] = 0xa3;
    let block = |head: &[f32], middle: &[u8]| [&halves(head), middle, &packed[..]].concat();

    let q4_0 = dequantized(Format::Q4_0, &block(&[0.5], &[]));
    assert_eq!((q4_0[0], q4_0[1], q4_0[17]), (-4.0, -2.5, 1.0));
    let q4_1 = dequantized(Format::Q4_1, &block(&[0.5, 2.0], &[]));
    assert_eq!((q4_1[0], q4_1[1], q4_1[17]), (2.0, 3.5, 7.0));
    // Fifth bits: of values 1 and 31.
    let fifth = (1u32 << 1 | 1 << 31).to_le_bytes();
    let q5_0 = dequantized(Format::Q5_0, &block(&[0.5], &fifth));
    assert_eq!((q5_0[0], q5_0[1], q5_0[17], q5_0[31]), (-8.0, 1.5, -3.0, 0.0));
    let q5_1 = dequantized(Format::Q5_1, &block(&[0.5, 2.0], &fifth));
    assert_eq!((q5_1[0], q5_1[1], q5_1[17], q5_1[31]), (2.0, 11.5, 7.0, 10.0));
    let mut q8_0 = halves(&[0.25]);
    q8_0.extend((0..32).map(|value: i8| (value * 4 - 64) as u8));
    let q8_0 = dequantized(Format::Q8_0, &q8_0);
    assert_eq!((q8_0[0], q8_0[16], q8_0[31]), (-16.0, 0.0, 15.0));
}

/// Packs as ggml does, from the values' meaning; independent of how they are unpacked.
#[test]
fn blocks_of_256_follow_their_definitions() {
    let random: Vec<u32> = numbers(1, 256).iter().map(|value| ((value + 1.0) * 1e6) as u32).collect();
    let (scales, minima): (Vec<u8>, Vec<u8>) =
        (0..8).map(|group| ((group * 8 + 7) as u8, (63 - group * 5) as u8)).unzip();
    let mut packed_scales = [0u8; 12];
    for group in 0..4 {
        packed_scales[group] = scales[group] | (scales[group + 4] >> 4) << 6;
        packed_scales[group + 4] = minima[group] | (minima[group + 4] >> 4) << 6;
        packed_scales[group + 8] = scales[group + 4] & 15 | (minima[group + 4] & 15) << 4;
    }
    for (format, bits) in [(Format::Q4K, 4), (Format::Q5K, 5)] {
        let values: Vec<u32> = random.iter().map(|value| value % (1 << bits)).collect();
        let mut low = [0u8; 128];
        let mut high = [0u8; 32];
        for (n, value) in values.iter().enumerate() {
            let (group, i) = (n / 32, n % 32);
            low[group / 2 * 32 + i] |= ((value & 15) << (group % 2 * 4)) as u8;
            high[i] |= ((value >> 4) << group) as u8;
        }
        let mut block = halves(&[0.5, 0.25]);
        block.extend(packed_scales);
        if bits == 5 {
            block.extend(high);
        }
        block.extend(low);
        let out = dequantized(format, &block);
        for (n, value) in values.iter().enumerate() {
            let expected = 0.5 * f32::from(scales[n / 32]) * *value as f32 - 0.25 * f32::from(minima[n / 32]);
            assert_eq!(out[n], expected, "{format:?} {n}");
        }
    }
    let values: Vec<i32> = random.iter().map(|value| (value % 64) as i32 - 32).collect();
    let scales: Vec<i8> = (0..16).map(|group| group * 7 - 50).collect();
    let (mut low, mut high) = ([0u8; 128], [0u8; 64]);
    for (n, value) in values.iter().enumerate() {
        let raw = (value + 32) as u8;
        let (half, within) = (n / 128, n % 128);
        low[half * 64 + within % 64] |= (raw & 15) << (within / 64 * 4);
        high[half * 32 + within % 32] |= (raw >> 4) << (within / 32 * 2);
    }
    let mut block = [&low[..], &high[..]].concat();
    block.extend(scales.iter().map(|scale| *scale as u8));
    block.extend(halves(&[0.5]));
    let out = dequantized(Format::Q6K, &block);
    for (n, value) in values.iter().enumerate() {
        assert_eq!(out[n], 0.5 * f32::from(scales[n / 16]) * *value as f32, "{n}");
    }
}

#[test]
fn formats_have_their_names() {
    assert_eq!(format_name(3), "Q4_1");
    assert_eq!(format_name(30), "BF16");
    assert_eq!(format_name(99), "of the unknown format 99");
    for format in ALL {
        assert!(!format_name(format.number()).contains("unknown"));
    }
}
