//! Rotary positions. The file holds the rows of queries and keys such that neighbours form a pair; when they are
//! loaded they are put in order so that the pairs are (i, i + half), which needs no shuffling here.

use burn::tensor::{Device, Tensor, TensorData};

use super::Hyperparameters;
use crate::EngineError;
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError};

/// The frequencies of the pairs.
#[derive(Debug)]
pub(super) struct Rotary {
    frequencies: Vec<f64>,
}

impl Rotary {
    pub fn new(gguf: &Gguf, model: &Hyperparameters) -> Result<Self, EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        let half = model.head_size / 2;
        let mut divisors = vec![1.0f32; half];
        if let Some(info) = gguf.find_tensor("rope_freqs.weight") {
            if info.elements != half as u64 {
                let why = format!("it has {} elements, where {half} are due", info.elements);
                return Err(damaged(GgufError::Invalid { what: "tensor rope_freqs.weight".into(), why }));
            }
            let format = Format::of(info).map_err(damaged)?;
            format.dequantize(gguf.tensor_bytes(info).map_err(damaged)?, &mut divisors);
        }
        let base = f64::from(model.rope_base);
        let frequency = |(pair, divisor): (usize, &f32)| {
            base.powf(-(pair as f64) / half as f64) / f64::from(*divisor) / f64::from(model.rope_factor)
        };
        Ok(Self { frequencies: divisors.iter().enumerate().map(frequency).collect() })
    }

    /// Cosines and sines `[rows, 1, half]` for some positions.
    pub fn at(&self, positions: impl ExactSizeIterator<Item = u32>, device: &Device) -> (Tensor<3>, Tensor<3>) {
        let shape = [positions.len(), 1, self.frequencies.len()];
        let angles: Vec<f64> = positions
            .flat_map(|position| self.frequencies.iter().map(move |frequency| f64::from(position) * frequency))
            .collect();
        let tensor = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| function(*angle) as f32).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        (tensor(f64::cos), tensor(f64::sin))
    }
}

/// Turns each pair (i, i + half) of `[rows, heads, size]`.
pub(super) fn rotate(x: Tensor<3>, (cos, sin): &(Tensor<3>, Tensor<3>)) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let first = x.clone().slice_dim(2, 0..half);
    let second = x.slice_dim(2, half..2 * half);
    let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
    let turned_second = second * cos.clone() + first * sin.clone();
    Tensor::cat(vec![turned_first, turned_second], 2)
}
