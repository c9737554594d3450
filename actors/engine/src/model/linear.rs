//! The parts that a layer is made of, each in two kinds: **packed** weights of the file's precision for the CPU's
//! own kernels, which norm, multiply, activate and add in one pass; and **dense** tensors for burn's devices.

use burn::tensor::activation::{gelu_approximate, silu};
use burn::tensor::{Device, Tensor, TensorData};

use crate::kernels::{Activation, Kernels, Norm, Packed};

/// A norm by the root of the mean square.
#[derive(Debug)]
pub(super) struct RmsNorm {
    pub values: Vec<f32>,
    pub epsilon: f32,
    /// `[1, width]`; on the CPU nobody asks for it.
    weight: Option<Tensor<2>>,
}

impl RmsNorm {
    pub fn new(values: Vec<f32>, epsilon: f32, device: &Device) -> Self {
        let weight = (*device != Device::flex()).then(|| {
            let width = values.len();
            Tensor::from_data(TensorData::new(values.clone(), [1, width]), device)
        });
        Self { values, epsilon, weight }
    }

    fn kernel(&self) -> Norm<'_> {
        Norm::Rms { weight: &self.values, epsilon: self.epsilon }
    }

    /// `x / √(mean(x²) + ε) · weight` along the last dimension.
    pub fn apply<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let device = x.device();
        let weight = self.weight.clone().unwrap_or_else(|| {
            Tensor::from_data(TensorData::new(self.values.clone(), [1, self.values.len()]), &device)
        });
        let mut shape = [1; D];
        shape[D - 1] = self.values.len();
        let mean = x.clone().square().mean_dim(D - 1);
        x / (mean + self.epsilon).sqrt() * weight.reshape(shape)
    }
}

/// A product with weights.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // some dozen of them live in a model, and never move
pub(super) enum Linear {
    /// `[in, out]` and `[1, out]`.
    Dense { weight: Tensor<2>, bias: Option<Tensor<2>> },
    /// Matrices side by side.
    Packed { parts: Vec<Packed>, bias: Option<Vec<f32>> },
}

/// Two products of the same input, one activated, multiplied with each other.
#[derive(Debug)]
pub(super) enum Gated {
    /// `[in, 2 · width]`: gate, then up.
    Dense {
        weight: Tensor<2>,
        width: usize,
    },
    Packed {
        gate: Packed,
        up: Packed,
    },
}

/// What computes beside burn, if this model is on the CPU.
pub(super) type Cpu = Option<Kernels>;

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

const NO_KERNELS: &str = "packed weights come with kernels";

impl Linear {
    fn outputs(parts: &[Packed]) -> usize {
        parts.iter().map(|part| part.shape().outputs).sum()
    }

    /// `norm(x) · weights + bias`, `x` `[rows, in]`.
    pub fn apply(&self, x: &mut Tensor<2>, norm: Option<&RmsNorm>, cpu: &mut Cpu) -> Tensor<2> {
        match self {
            Self::Dense { weight, bias } => {
                let x = norm.map_or_else(|| x.clone(), |norm| norm.apply(x.clone()));
                let product = x.matmul(weight.clone());
                bias.iter().fold(product, |product, bias| product + bias.clone())
            }
            Self::Packed { parts, bias } => {
                let kernels = cpu.as_mut().expect(NO_KERNELS);
                let rows = x.dims()[0];
                let mut out = vec![0.0; rows * Self::outputs(parts)];
                let norm = norm.map_or(Norm::None, RmsNorm::kernel);
                lend(x, |x| kernels.linear(parts, bias.as_deref(), x, norm, &mut out));
                tensor(out, rows)
            }
        }
    }

    /// `x += norm(input · weights + bias)`.
    pub fn add_to(&self, x: &mut Tensor<2>, mut input: Tensor<2>, norm: Option<&RmsNorm>, cpu: &mut Cpu) {
        match (self, norm) {
            (Self::Packed { parts, bias }, None) if parts.len() == 1 => {
                let kernels = cpu.as_mut().expect(NO_KERNELS);
                let input = host(input);
                lend(x, |x| kernels.linear_add(&parts[0], bias.as_deref(), &input, x));
            }
            (Self::Packed { .. }, Some(norm)) => {
                let mut product = host(self.apply(&mut input, None, cpu));
                cpu.as_ref().expect(NO_KERNELS).norm(&mut product, &norm.values, norm.epsilon);
                lend(x, |x| x.iter_mut().zip(product).for_each(|(x, y)| *x += y));
            }
            _ => {
                let product = self.apply(&mut input, None, cpu);
                let product = norm.map_or_else(|| product.clone(), |norm| norm.apply(product.clone()));
                *x = x.clone() + product;
            }
        }
    }
}

impl Gated {
    /// `activation(norm(x) · gate) · (norm(x) · up)`.
    pub fn apply(&self, x: &mut Tensor<2>, norm: &RmsNorm, activation: Activation, cpu: &mut Cpu) -> Tensor<2> {
        let rows = x.dims()[0];
        match self {
            Self::Dense { weight, width } => {
                let both = norm.apply(x.clone()).matmul(weight.clone());
                let gate = both.clone().slice([0..rows, 0..*width]);
                let up = both.slice([0..rows, *width..2 * width]);
                let gate = match activation {
                    Activation::Silu => silu(gate),
                    Activation::GeluTanh => gelu_approximate(gate),
                };
                gate * up
            }
            Self::Packed { gate, up } => {
                let kernels = cpu.as_mut().expect(NO_KERNELS);
                let mut out = vec![0.0; rows * gate.shape().outputs];
                lend(x, |x| kernels.gated(gate, up, activation, x, norm.kernel(), &mut out));
                tensor(out, rows)
            }
        }
    }
}
