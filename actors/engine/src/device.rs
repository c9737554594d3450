//! Which device computes, and what runs on it.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::echo::{Echo, EchoCodec};
use crate::gguf::Gguf;
use crate::llama::Llama;
use crate::text::{Codec, Tokenizer};
use crate::{DeviceChoice, EngineError, EngineSpec, ModelSource, StepEngine};

/// The version of burn that is built in, for the numerics class.
const BURN: &str = "0.22.1";

/// A model that is ready to compute.
pub(crate) struct Loaded {
    pub engine: Box<dyn StepEngine>,
    pub codec: Arc<dyn Codec>,
}

/// Loads what the spec names.
pub(crate) fn load(spec: &EngineSpec) -> Result<Loaded, EngineError> {
    match &spec.source {
        ModelSource::Echo => {
            let echo = Echo::new(spec.slots, spec.context_length);
            Ok(Loaded { engine: Box::new(echo), codec: Arc::new(EchoCodec::default()) })
        }
        ModelSource::Gguf(path) => {
            let gguf = Arc::new(Gguf::open(path)?);
            let (device, words) = choose(spec.device)?;
            // Two threads, as each takes a part of the time to the first answer.
            let (llama, tokenizer) = rayon::join(
                || Llama::load(Arc::clone(&gguf), &device, spec.slots, spec.context_length, words),
                || Tokenizer::from_gguf(&gguf),
            );
            let (llama, tokenizer) = (llama?, tokenizer?);
            if tokenizer.vocabulary() > llama.capabilities().vocabulary {
                return Err(EngineError::Tokenizer {
                    path: path.clone(),
                    why: format!(
                        "it has {} tokens, the model only {}",
                        tokenizer.vocabulary(),
                        llama.capabilities().vocabulary
                    ),
                });
            }
            Ok(Loaded { engine: Box::new(llama), codec: Arc::new(tokenizer) })
        }
    }
}

/// The device, what it is in words, and its numerics class.
pub(crate) fn choose(choice: DeviceChoice) -> Result<(Device, (String, String)), EngineError> {
    let found = match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => gpu(false),
        DeviceChoice::Gpu => {
            let why = if cfg!(feature = "gpu") {
                "no graphics adapter was found (is its Vulkan or Metal driver installed?)"
            } else {
                "this build has no GPU support: build it with `--features gpu`"
            };
            Some(gpu(true).ok_or_else(|| EngineError::Device(why.into()))?)
        }
    };
    Ok(found.unwrap_or_else(|| {
        let device = Device::flex();
        let numerics = format!("flex-{BURN}-f32-{}-{:08x}", std::env::consts::ARCH, fingerprint(&device));
        (device, ("cpu (burn flex, f32)".into(), numerics))
    }))
}

#[cfg(not(feature = "gpu"))]
fn gpu(_software_too: bool) -> Option<(Device, (String, String))> {
    None
}

/// The first adapter that is a card; with `software_too` also a driver that computes on the CPU, which is slow but
/// shows that the GPU's code is right.
#[cfg(feature = "gpu")]
fn gpu(software_too: bool) -> Option<(Device, (String, String))> {
    let look = || {
        let devices = Device::enumerate(burn::tensor::DeviceType::Wgpu);
        let mut identified: Vec<_> =
            devices.into_iter().filter_map(|d| d.identity().map(|identity| (d, identity))).collect();
        identified.sort_by_key(|(_, identity)| identity.physical.is_none());
        identified.into_iter().find(|(_, identity)| software_too || identity.physical.is_some())
    };
    // A driver that is half installed panics somewhere in there; then there is no GPU.
    let (device, identity) = std::panic::catch_unwind(look).ok().flatten()?;
    let numerics = format!("wgpu-{BURN}-f32-{}-{}", identity.name, identity.fingerprint).replace(' ', "_");
    Some((device, (format!("gpu ({}, burn wgpu, f32)", identity.name), numerics)))
}

/// A hash over the bits of a small computation in the shapes that a model has. Which kernels run and in which
/// order they sum depends on the processor's instructions and cache sizes; machines with the same bits here give
/// the same answers.
fn fingerprint(device: &Device) -> u32 {
    let mut state = 1u32;
    let mut numbers = |rows: usize, columns: usize| -> Tensor<2> {
        let values = (0..rows * columns).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), [rows, columns]), device)
    };
    let mut hash = 0x811c_9dc5u32;
    for (rows, inputs, outputs) in [(2, 4096, 96), (70, 1536, 96), (3, 1024, 64), (2, 64, 640)] {
        let product = numbers(rows, inputs).matmul(numbers(inputs, outputs));
        let squeezed = burn::tensor::activation::softmax(burn::tensor::activation::silu(product), 1);
        let mean = squeezed.clone().square().mean_dim(1);
        let values = (squeezed / (mean + 1e-5).sqrt()).into_data().try_into_vec::<f32>().unwrap_or_default();
        for byte in values.iter().flat_map(|value| value.to_le_bytes()) {
            hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }
    hash
}
