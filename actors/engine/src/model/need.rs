//! What a model needs of this machine's memory, said before anything of it is loaded.

use std::path::Path;

use super::architecture::{Hyperparameters, embeds};
use super::kv::KvStore;
use crate::gguf::Gguf;
use crate::kernels::{KV_BLOCK, KvLayout};
use crate::memory::OVERHEAD;
use crate::{EngineError, ModelOptions};

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// The weights.
    pub weights: u64,
    /// Keys and values of one conversation of full length: it does not work with less.
    pub kv_least: u64,
    /// Keys and values of all slots at full length, or what the options allow for them: more is of no use.
    pub kv_most: u64,
    /// Everything else.
    pub other: u64,
}

/// How long a sequence can be, and the blocks for one of full length and for all slots.
pub(super) struct Lengths {
    pub context: u32,
    pub for_one: u32,
    pub for_all: u64,
}

impl Lengths {
    pub fn of(model: &Hyperparameters, options: &ModelOptions) -> Self {
        let own = model.context_length;
        let context = options.context_length.unwrap_or(own).min(own).max(2);
        let for_one = context.div_ceil(KV_BLOCK as u32);
        let for_all = u64::from(for_one).saturating_mul(options.slots.max(1).into()).min(u32::MAX.into());
        Self { context, for_one, for_all }
    }
}

/// Reads the head of a model file and says what an engine on the CPU needs for it with these options.
pub fn memory_need(path: &Path, options: &ModelOptions) -> Result<MemoryNeed, EngineError> {
    let gguf = Gguf::open(path)?;
    if embeds(&gguf) {
        return crate::encoder::memory_need(&gguf, options);
    }
    let model = Hyperparameters::from_gguf(&gguf)?;
    let Lengths { for_one, for_all, .. } = Lengths::of(&model, options);
    let layout = KvLayout { kind: options.kv_type, heads: model.kv_heads, size: model.head_size };
    let block = KvStore::block_bytes(layout, model.layers);
    let kv_least = block.saturating_mul(for_one.into());
    let kv_most = block.saturating_mul(for_all).min(options.kv_memory.unwrap_or(u64::MAX)).max(kv_least);
    Ok(MemoryNeed { weights: gguf.file_bytes(), kv_least, kv_most, other: OVERHEAD })
}

/// What an engine without weights needs.
pub fn memory_need_of_echo() -> MemoryNeed {
    MemoryNeed { weights: 0, kv_least: 0, kv_most: 0, other: OVERHEAD }
}
