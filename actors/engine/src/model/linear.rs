//! The parts that a layer is made of on the CPU, whose kernels norm, multiply, activate and add in one pass.

use burn::tensor::{Device, Tensor, TensorData};

use crate::kernels::{Activation, Kernels, Norm, Packed};

/// A norm by the root of the mean square: `x / √(mean(x²) + ε) · weight`.
#[derive(Debug)]
pub(super) struct RmsNorm {
    pub values: Vec<f32>,
    pub epsilon: f32,
}

impl RmsNorm {
    fn kernel(&self) -> Norm<'_> {
        Norm::Rms { weight: &self.values, epsilon: self.epsilon }
    }
}

/// A product with weights: matrices side by side.
#[derive(Debug)]
pub(super) struct Linear {
    pub parts: Vec<Packed>,
    pub bias: Option<Vec<f32>>,
}

/// Two products of the same input, one activated, multiplied with each other.
#[derive(Debug)]
pub(super) struct Gated {
    pub gate: Packed,
    pub up: Packed,
}

/// Lends a CPU tensor's numbers without copying them.
pub(super) fn lend<R>(x: &mut Tensor<2>, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let shape = x.dims();
    let taken = std::mem::replace(x, Tensor::empty([1, 1], &Device::flex()));
    let mut values = host(taken);
    let result = work(&mut values);
    *x = Tensor::from_data(TensorData::new(values, shape), &Device::flex());
    result
}

/// A tensor's numbers; on the CPU without a copy if nobody else has the tensor.
pub(super) fn host<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    // Every tensor of a model is of f32.
    x.into_data().try_into_vec().expect("a tensor of f32")
}

fn tensor(values: Vec<f32>, rows: usize) -> Tensor<2> {
    let width = values.len() / rows.max(1);
    Tensor::from_data(TensorData::new(values, [rows, width]), &Device::flex())
}

impl Linear {
    fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.shape().outputs).sum()
    }

    /// `norm(x) · weights + bias`, `x` `[rows, in]`.
    pub fn apply(&self, x: &mut Tensor<2>, norm: Option<&RmsNorm>, kernels: &mut Kernels) -> Tensor<2> {
        let rows = x.dims()[0];
        let mut out = vec![0.0; rows * self.outputs()];
        let norm = norm.map_or(Norm::None, RmsNorm::kernel);
        lend(x, |x| kernels.linear(&self.parts, self.bias.as_deref(), x, norm, &mut out));
        tensor(out, rows)
    }

    /// `x += norm(input · weights + bias)`.
    pub fn add_to(&self, x: &mut Tensor<2>, mut input: Tensor<2>, norm: Option<&RmsNorm>, kernels: &mut Kernels) {
        match (norm, self.parts.as_slice()) {
            (None, [part]) => {
                let input = host(input);
                lend(x, |x| kernels.linear_add(part, self.bias.as_deref(), &input, x));
            }
            _ => {
                let mut product = host(self.apply(&mut input, None, kernels));
                if let Some(norm) = norm {
                    kernels.norm(&mut product, &norm.values, norm.epsilon);
                }
                lend(x, |x| x.iter_mut().zip(product).for_each(|(x, y)| *x += y));
            }
        }
    }
}

impl Gated {
    /// `activation(norm(x) · gate) · (norm(x) · up)`.
    pub fn apply(&self, x: &mut Tensor<2>, norm: &RmsNorm, activation: Activation, kernels: &mut Kernels) -> Tensor<2> {
        let rows = x.dims()[0];
        let mut out = vec![0.0; rows * self.gate.shape().outputs];
        lend(x, |x| kernels.gated(&self.gate, &self.up, activation, x, norm.kernel(), &mut out));
        tensor(out, rows)
    }
}
