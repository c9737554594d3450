//! Rotary positions (Su et al. 2021). Pairs are `(i, i + half)`; where a file pairs neighbours, the rows of queries
//! and keys are put in that order when they are loaded, so that nothing needs shuffling here.

use super::Hyperparameters;
use super::architecture::Family;
use crate::EngineError;
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError};

/// The frequencies of the pairs.
#[derive(Debug)]
pub(super) struct Rotary {
    frequencies: Vec<f64>,
    magnitude: f64,
}

/// Cosines and sines `[rows, pairs]`.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    pub cosines: Vec<f32>,
    pub sines: Vec<f32>,
}

impl Rotary {
    /// Those of layers that see everything, and those of windowed layers. `context_length`: tokens of a sequence at
    /// most, which decides between the two sets of factors that some models have.
    pub fn pair(gguf: &Gguf, model: &Hyperparameters, context_length: u32) -> Result<(Self, Self), EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        let stretched = model.original_context.is_some_and(|original| context_length > original);
        let name = match (model.family, stretched) {
            (Family::Phi3, true) => "rope_factors_long.weight",
            (Family::Phi3, false) => "rope_factors_short.weight",
            _ => "rope_freqs.weight",
        };
        let half = model.rotated / 2;
        let mut divisors = vec![1.0f32; half];
        if let Some(info) = gguf.find_tensor(name) {
            if info.elements != half as u64 {
                let why = format!("it has {} elements, where {half} are due", info.elements);
                return Err(damaged(GgufError::Invalid { what: format!("tensor {name}"), why }));
            }
            let format = Format::of(info).map_err(damaged)?;
            format.dequantize(gguf.tensor_bytes(info).map_err(damaged)?, &mut divisors);
        }
        let magnitude = f64::from(model.rope_magnitude);
        let of = |base: f32, factor: f32| {
            let frequency = |(pair, divisor): (usize, &f32)| {
                f64::from(base).powf(-(pair as f64) / half as f64) / f64::from(*divisor) / f64::from(factor)
            };
            Self { frequencies: divisors.iter().enumerate().map(frequency).collect(), magnitude }
        };
        let global = of(model.rope_base, model.rope_factor);
        Ok((global, of(model.local_rope_base.unwrap_or(model.rope_base), 1.0)))
    }

    /// For some positions.
    pub fn at(&self, positions: impl Iterator<Item = u32>) -> Angles {
        let mut angles = Angles::default();
        for position in positions {
            for frequency in &self.frequencies {
                let (sine, cosine) = (f64::from(position) * frequency).sin_cos();
                angles.cosines.push((cosine * self.magnitude) as f32);
                angles.sines.push((sine * self.magnitude) as f32);
            }
        }
        angles
    }
}
