//! Single operations of every instruction set against the plain ones, and a digest to compare processors by.

use proptest::prelude::*;

use super::scalar::Scalar;
use super::simd::{LANES, ROUND, Simd};
use super::tests::{FORMATS, numbers, packed};
use super::*;
use crate::dequantize::Format;

/// Zeros, ties, ends of the ranges of `f16` and of whole numbers, and what is no number.
const EDGES: [f32; 26] = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -126.5,
    127.0,
    -87.0,
    88.0,
    1.0,
    -1.0,
    1.000_488_3,
    65_504.0,
    65_519.996,
    65_520.0,
    -1e6,
    6.103_515_6e-5,
    5.960_464_5e-8,
    2.980_232_2e-8,
    8.940_697e-8,
    1e-42,
    f32::MAX,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

#[derive(Debug, Clone)]
struct Arguments {
    floats: [[f32; LANES]; 3],
    bytes: [[u8; 4 * LANES]; 2],
    /// Four codes.
    x: [i8; 4],
}

/// What all operations make of the arguments, as bits. What is no number is one and the same.
#[inline(always)]
unsafe fn results<S: Simd>(arguments: &Arguments) -> Vec<u32> {
    let mut results = Vec::new();
    let mut keep = |value: f32| results.push(if value.is_nan() { f32::NAN } else { value }.to_bits());
    let [a, b, c] = arguments.floats;
    let small = a.map(|a| if a.abs() <= 127.0 { a } else { 3.5 });
    // SAFETY: the caller has made sure of the instructions; all memory has the size of the vectors.
    unsafe {
        let mut floats = [0.0f32; LANES];
        let mut all = |value: S::F| {
            S::store(floats.as_mut_ptr(), value);
            floats.iter().for_each(|value| keep(*value));
        };
        let (x, y, z) = (S::load(a.as_ptr()), S::load(b.as_ptr()), S::load(c.as_ptr()));
        all(S::add(x, y));
        all(S::sub(x, y));
        all(S::mul(x, y));
        all(S::div(x, y));
        all(S::max(x, y));
        all(S::min(x, y));
        all(S::fma(x, y, z));
        all(S::keep_from(x, y, z));
        all(S::power_of_two(S::add(S::load(small.as_ptr()), S::splat(ROUND))));
        all(S::splat(S::sum(x)));
        // Of two zeros either may be the greater.
        all(S::splat(S::greatest(S::load(small.as_ptr())) + 0.0));
        let halves = arguments.bytes[0].as_ptr().cast::<u16>();
        all(S::load_f16(halves));
        all(S::load_bf16(halves));
        all(S::load_i8(halves.cast()));
        all(S::load_u8(halves.cast()));
        let mut halves = [0u16; LANES];
        S::store_f16(halves.as_mut_ptr(), x);
        all(S::load_f16(halves.as_ptr()));
        let mut codes = [0i8; LANES];
        S::store_i8(codes.as_mut_ptr(), S::load(small.as_ptr()));
        all(S::load_i8(codes.as_ptr()));
        all(S::splat(S::sum_i8(arguments.bytes[0].as_ptr().cast()) as f32));

        let (bytes, bits) = (S::load_bytes(arguments.bytes[0].as_ptr()), S::load_bytes(arguments.bytes[1].as_ptr()));
        let offset: i32 = arguments.x.iter().map(|x| i32::from(*x) * S::SIGNED_OFFSET).sum();
        all(S::to_float(S::dot_signed(
            S::splat_i32(7 - offset),
            bytes,
            i32::from_le_bytes(arguments.x.map(|x| x as u8)),
        )));
        let low = S::low_half(bytes);
        for small in [
            low,
            S::high_half(bytes),
            S::with_fifth::<0>(low, bits),
            S::with_fifth::<1>(low, bits),
            S::with_fifth::<2>(low, bits),
            S::with_fifth::<3>(low, bits),
            S::with_fifth::<4>(low, bits),
            S::with_fifth::<5>(low, bits),
            S::with_fifth::<6>(low, bits),
            S::with_fifth::<7>(low, bits),
            S::with_upper_two::<0>(low, bits),
            S::with_upper_two::<2>(low, bits),
            S::with_upper_two::<4>(low, bits),
            S::with_upper_two::<6>(low, bits),
        ] {
            // Each of the four bytes alone, then their products.
            for x in [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], arguments.x] {
                let x = i32::from_le_bytes(x.map(|x| x as u8));
                all(S::to_float(S::dot(S::splat_i32(-9), small, x)));
            }
        }
    }
    results
}

macro_rules! results_with {
    ($set:ty, $features:literal) => {{
        #[target_feature(enable = $features)]
        unsafe fn with_features(arguments: &Arguments) -> Vec<u32> {
            // SAFETY: as the caller's.
            unsafe { results::<$set>(arguments) }
        }
        with_features as unsafe fn(&Arguments) -> Vec<u32>
    }};
}

fn results_of(set: InstructionSet, arguments: &Arguments) -> Vec<u32> {
    let results: unsafe fn(&Arguments) -> Vec<u32> = match set {
        InstructionSet::Portable => results::<Scalar>,
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => results_with!(avx2::Avx2, "avx2,fma,f16c"),
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512Vnni => results_with!(avx512::Avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c"),
        #[cfg(target_arch = "aarch64")]
        InstructionSet::NeonDotprod => results_with!(neon::Neon, "neon,dotprod"),
    };
    // SAFETY: the set is one of those that are there.
    unsafe { results(arguments) }
}

fn arguments() -> impl Strategy<Value = Arguments> {
    let float = prop_oneof![
        any::<u32>().prop_map(f32::from_bits),
        prop::sample::select(EDGES.as_slice()),
        (-254i16..=254).prop_map(|twice| f32::from(twice) / 2.0),
        -1e5f32..1e5,
    ];
    let floats = prop::collection::vec(float, 3 * LANES);
    let bytes = prop::collection::vec(any::<u8>(), 8 * LANES);
    (floats, bytes, prop::array::uniform4(-127i8..=127)).prop_map(|(floats, bytes, x)| Arguments {
        floats: std::array::from_fn(|n| std::array::from_fn(|lane| floats[n * LANES + lane])),
        bytes: std::array::from_fn(|n| std::array::from_fn(|byte| bytes[n * 4 * LANES + byte])),
        x,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn every_operation_is_the_plain_one(arguments in arguments()) {
        let due = results_of(InstructionSet::Portable, &arguments);
        for set in InstructionSet::available() {
            let got = results_of(set, &arguments);
            let differs = got.iter().zip(&due).position(|(got, due)| got != due);
            prop_assert!(got.len() == due.len() && differs.is_none(), "{set:?}: vector {:?}", differs.map(|n| n / LANES));
        }
    }
}

/// One number of all bits of products, gates and attention, for each instruction set. It is the same on every
/// processor: `… -- --ignored --nocapture digest_of_results`.
#[test]
#[ignore = "for comparing machines"]
fn digest_of_results() {
    for set in InstructionSet::available() {
        let mut kernels = Kernels::new(set, 2);
        let mut digest = 0xcbf2_9ce4_8422_2325u64;
        let mut take = |values: &[f32]| {
            for value in values {
                // Zeros have one sign.
                digest = (digest ^ u64::from((value + 0.0).to_bits())).wrapping_mul(0x100_0000_01b3);
            }
        };
        let (inputs, outputs, rows) = (768, 37, 11);
        let (x, norm) = (numbers(1, rows * inputs), numbers(2, inputs));
        let mut out = vec![0.0; rows * outputs];
        for format in FORMATS {
            let (weights, _) = packed(format, inputs, outputs, 7);
            kernels.linear(&[weights], None, &x, Norm::None, &mut out);
            take(&out);
        }
        let (gate, up) = (packed(Format::Q4K, inputs, outputs, 8).0, packed(Format::Q6K, inputs, outputs, 9).0);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            kernels.gated(&gate, &up, activation, &x, Norm::Rms { weight: &norm, epsilon: 1e-5 }, &mut out);
            take(&out);
        }
        for kind in [KvType::F16, KvType::Int8] {
            let (size, heads, length) = (64, 6, 150usize);
            let layout = KvLayout { kind, heads: 2, size };
            let mut memory = vec![0u8; layout.block_bytes() * length.div_ceil(KV_BLOCK)];
            let blocks = vec![memory.chunks_exact_mut(layout.block_bytes()).map(|block| block.as_mut_ptr()).collect()];
            let rows: Vec<Row> = (0..length).map(|position| Row { sequence: 0, position, sees: position }).collect();
            let mut out = vec![0.0; length * heads * size];
            kernels.attention(AttentionJob {
                layout,
                heads,
                rows: &rows,
                blocks: &blocks,
                qkv: &mut numbers(3, length * (heads + 4) * size),
                cosines: &numbers(4, length * size / 2),
                sines: &numbers(5, length * size / 2),
                norms: Some(HeadNorms { query: &norm[..size], key: &norm[size..2 * size], epsilon: 1e-6 }),
                scale: 0.125,
                window: 100,
                out: &mut out,
            });
            take(&out);
        }
        println!("digest {digest:016x} of {} on {}", set.name(), std::env::consts::ARCH);
    }
}
