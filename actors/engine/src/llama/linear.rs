//! A matrix of weights, applied so that each row of the result is summed in the same order whatever else is
//! computed beside it.

use burn::tensor::{Device, Tensor, TensorData};

/// On the CPU, products of at most this many rows and columns take a path of their own; rows beyond it would sum
/// in another order.
const SMALL: usize = 64;
/// The CPU's matrix product sums up to so many inputs at once, then adds the parts.
const PART: usize = 512;

/// Weights `[in, out]`.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor<2>,
    lone: Lone,
}

/// What to do with a single row. The product of a vector and a matrix is twice as fast as that of two rows, but
/// sums in another order, unless its inputs are cut where the matrix product cuts them.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lone {
    /// Cut the inputs into parts of this size.
    Parts(usize),
    /// Give it a companion.
    Companion,
    /// Nothing: this device promises no order of summation anyway.
    AsIs,
}

impl Linear {
    /// `exact`: the device (the CPU) sums in a fixed order that is worth keeping.
    pub fn new(weight: Tensor<2>, exact: bool, device: &Device) -> Self {
        let mut linear = Self { weight, lone: if exact { Lone::Companion } else { Lone::AsIs } };
        if exact {
            let [inputs, _] = linear.weight.dims();
            // Where the cuts are depends on the processor's caches: they are tried, not believed.
            let parts = Lone::Parts(inputs.div_ceil(inputs.div_ceil(PART)));
            let probe: Vec<f32> = (0..inputs).map(|n| ((n * 7919 % 1013) as f32 - 506.0) / 311.0).collect();
            let probe = Tensor::from_data(TensorData::new(probe, [1, inputs]), device);
            let due = linear.apply(probe.clone()).into_data();
            linear.lone = parts;
            if linear.apply(probe).into_data() != due {
                linear.lone = Lone::Companion;
            }
        }
        linear
    }

    /// `x · weight` for `x` `[rows, in]`.
    pub fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        let ([rows, inputs], [_, outputs]) = (x.dims(), self.weight.dims());
        match self.lone {
            Lone::AsIs => x.matmul(self.weight.clone()),
            Lone::Parts(size) if rows == 1 => {
                let part = |from: usize| {
                    let part = from..(from + size).min(inputs);
                    x.clone().slice([0..1, part.clone()]).matmul(self.weight.clone().slice([part]))
                };
                (size..inputs).step_by(size).fold(part(0), |sum, from| sum + part(from))
            }
            _ if rows == 1 => x.repeat_dim(0, 2).matmul(self.weight.clone()).slice_dim(0, 0..1),
            _ if rows > SMALL && outputs <= SMALL => {
                let few = |from: usize| self.apply(x.clone().slice_dim(0, from..(from + SMALL).min(rows)));
                Tensor::cat((0..rows).step_by(SMALL).map(few).collect(), 0)
            }
            _ => x.matmul(self.weight.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tiny::numbers;

    fn matrix(rows: usize, columns: usize) -> Tensor<2> {
        let values = numbers((rows * 31 + columns) as u32, rows * columns);
        Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::flex())
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_into_vec().unwrap()
    }

    #[test]
    fn rows_do_not_depend_on_their_number() {
        let sizes =
            [(64, 64), (64, 259), (160, 48), (576, 64), (576, 960), (576, 3072), (1700, 64), (1536, 576), (3000, 130)];
        for (inputs, outputs) in sizes {
            let x = matrix(70, inputs);
            let linear = Linear::new(matrix(inputs, outputs), true, &Device::flex());
            let whole = values(linear.apply(x.clone()));
            for (from, rows) in (1..=70).map(|rows| (0, rows)).chain([(5, 1), (5, 3), (64, 6), (69, 1)]) {
                let part = values(linear.apply(x.clone().slice_dim(0, from..from + rows)));
                assert!(
                    part == whole[from * outputs..(from + rows) * outputs],
                    "{inputs} x {outputs}, {rows} rows from {from}"
                );
            }
        }
    }
}
