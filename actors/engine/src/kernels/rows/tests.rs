use proptest::prelude::*;

use crate::kernels::tests::{numbers, same};
use crate::kernels::{InstructionSet, Kernels};

/// erf by its Taylor series, which converges everywhere; with `f64` good to 10⁻⁹ up to 4.
fn erf(x: f64) -> f64 {
    if x.abs() > 4.0 {
        return x.signum() * (1.0 - 1.5e-8);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn gelu_is_that_of_the_error_function() {
    let x: Vec<f32> = (-12_000..=12_000).map(|n| n as f32 / 1000.0).collect();
    let mut got = x.clone();
    Kernels::new(InstructionSet::Portable, 1).gelu(&mut got);
    let mut worst = 0.0f64;
    for (x, got) in x.iter().map(|x| f64::from(*x)).zip(got) {
        let due = 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2));
        // What a number of this size can be off in its last place comes on top.
        worst = worst.max((f64::from(got) - due).abs() - x.max(0.0) * 6e-8);
    }
    println!("largest error {worst:.1e}");
    assert!(worst < 1e-6, "{worst}");
}

#[test]
fn what_is_no_number_stays_none() {
    for set in InstructionSet::available() {
        let mut x = [f32::NAN; 17];
        Kernels::new(set, 1).gelu(&mut x);
        assert!(x.iter().all(|x| x.is_nan()), "{}", set.name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn rows_are_the_same_bits_everywhere(rows in 1usize..40, width in 1usize..900, seed in 0u32..1000) {
        let x: Vec<f32> = numbers(seed, rows * width).iter().map(|x| x * 4.0 + 0.5).collect();
        let (weight, bias) = (numbers(seed + 1, width), numbers(seed + 2, width));
        let run = |set, threads, x: &[f32]| {
            let mut kernels = Kernels::new(set, threads);
            let (mut normed, mut active) = (x.to_vec(), x.to_vec());
            kernels.layer_norm(&mut normed, &weight, &bias, 1e-12);
            kernels.gelu(&mut active);
            (normed, active)
        };
        let due = run(InstructionSet::Portable, 1, &x);
        for set in InstructionSet::available() {
            let got = run(set, 2, &x);
            prop_assert!(same(&got.0, &due.0) && same(&got.1, &due.1), "{}", set.name());
        }
        // And a row alone what it gets among others.
        let last = (rows - 1) * width;
        let alone = run(InstructionSet::available()[0], 1, &x[last..]);
        prop_assert!(same(&alone.0, &due.0[last..]) && same(&alone.1, &due.1[last..]));
        if width < 8 {
            return Ok(()); // so few numbers may all be the same
        }
        for (x, got) in x.chunks(width).zip(due.0.chunks(width)) {
            let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width as f64;
            for n in 0..width {
                let due = (f64::from(x[n]) - mean) / (variance + 1e-12).sqrt() * f64::from(weight[n]);
                prop_assert!((f64::from(got[n]) - due - f64::from(bias[n])).abs() < 1e-5, "{} {due}", got[n]);
            }
        }
    }
}
