//! Decoders on graphics cards. burn-wgpu brings the device and its runtime (wgpu: Vulkan, Metal, DX12), cubecl the
//! language of the kernels, which are our own.
//!
//! Weights keep the precision of their file ([`forms`]), and a step is a fixed number of kernels a layer, however
//! many sequences there are ([`decoder`]). No tensor of burn is used here: they would cost a copy for every place
//! where a number is changed, and their products want dense weights.

use std::sync::Mutex;

use burn_wgpu::graphics::AutoGraphicsApi;
use burn_wgpu::{RuntimeOptions, WgpuSetup, wgpu};
use cubecl::CubeElement;
use cubecl::client::Client;
use cubecl::device::WgpuDeviceKind;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::{BufferArg, CubeDim};
use cubecl::server::Handle;

use crate::gguf::Gguf;
use crate::model::Hyperparameters;
use crate::{EngineError, ModelOptions};

mod decoder;
mod forms;
mod kernels;
mod matrix;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
mod tokens;
mod tuning;

pub(crate) use decoder::Decoder;

/// The version of this arithmetic, for the numerics class; to be raised when a kernel computes otherwise.
const ARITHMETIC: &str = "1";
/// The version of CubeCL that is built in, whose compiler has a say in the arithmetic as well.
const CUBECL: &str = "0.11.3";
/// Bytes that a step needs beside weights, keys and values, and what a driver keeps for itself.
const OVERHEAD: u64 = 256 << 20;
/// Numbers of rows whose products are programs of their own; more than the last have one together.
pub(crate) const SHAPES: [u32; 6] = [1, 2, 4, 8, 16, 17];
/// Launches that are handed to the driver at once. A step has some hundreds.
const LAUNCHES: usize = 128;

/// An adapter that computes.
#[derive(Clone)]
pub(crate) struct Card {
    client: Client,
    name: String,
    /// What its driver is, in words.
    driver: String,
    /// Bytes of its own memory, where its driver says so.
    memory: Option<u64>,
    /// Its kernels know numbers of half precision.
    halves: bool,
    /// It is a driver that computes on the CPU.
    software: bool,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.driver)
    }
}

/// Some numbers on a card.
#[derive(Clone)]
struct Buffer {
    handle: Handle,
    count: usize,
}

/// Loads a decoder onto a card, with as many blocks of keys and values as `fitting` says where so many are
/// affordable; `for_one` are needed.
pub(crate) fn load(
    card: Card,
    gguf: &Gguf,
    model: &Hyperparameters,
    (for_one, fitting): (u32, impl Fn(u64) -> u32),
    options: &ModelOptions,
) -> Result<(Decoder, u32), EngineError> {
    let path = || gguf.path().to_path_buf();
    let weights = Decoder::weight_bytes_of(gguf, model).map_err(|why| EngineError::Gguf { path: path(), why })?;
    let block = Decoder::block_bytes(&card, model).max(1);
    // Where the driver does not say what the card has, its memory is the machine's.
    let memory = card.memory.or_else(crate::memory::available);
    let most = Decoder::most_blocks(&card, model);
    let left = memory.map(|bytes| bytes.saturating_sub(weights + OVERHEAD) / 10 * 9);
    let budget = options.kv_memory.or(left).map_or(u64::MAX, |bytes| bytes / block);
    let blocks = fitting(budget.min(most));
    let kv = block.saturating_mul(blocks.into());
    let needed = weights.saturating_add(kv).saturating_add(OVERHEAD);
    if let Some(free) = memory.filter(|memory| needed > *memory) {
        return Err(EngineError::CardMemory { path: path(), card: card.name, needed, weights, kv, has: free });
    }
    if most < for_one.into() {
        let largest = card.largest_buffer() >> 20;
        return Err(EngineError::Unsupported {
            path: path(),
            what: format!("a context of {} tokens", for_one as usize * crate::kernels::KV_BLOCK),
            hint: format!(
                "on {} one buffer has {largest} MiB at most, which is enough for {} tokens: lower the context length",
                card.name,
                most.saturating_mul(crate::kernels::KV_BLOCK as u64)
            ),
        });
    }
    let mut decoder = Decoder::load(card, gguf, model, blocks as usize)?;
    // Where nothing is kept, every start would take the time again. On software it would be time lost in any case.
    if let Some(cache) = options.packed_cache.as_ref().filter(|_| !decoder.card().software) {
        tuning::tune(&mut decoder, &cache.folder, tuning::BUDGET);
    }
    Ok((decoder, blocks))
}

impl Buffer {
    /// `count` of its numbers, of 32 bits, from `first` on.
    fn part(&self, first: usize, count: usize) -> Self {
        let behind = self.handle.size() - (first + count) as u64 * 4;
        Self { handle: self.handle.clone().offset_start(first as u64 * 4).offset_end(behind), count }
    }

    /// As an argument of a kernel.
    fn arg(&self) -> BufferArg {
        // SAFETY: it has so many numbers, or more.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.count) }
    }
}

impl Card {
    /// The first adapter that is a card; with `software_too` also a driver that computes on the CPU, which is slow but
    /// shows that the kernels are right.
    pub fn find(software_too: bool) -> Option<Self> {
        // An adapter is set up once a process.
        static FOUND: Mutex<Option<Card>> = Mutex::new(None);
        let mut found = FOUND.lock().ok()?;
        if found.is_none() {
            // A driver that is half installed panics somewhere in there; then there is no card.
            *found = std::panic::catch_unwind(Self::set_up).ok().flatten();
        }
        found.as_ref().filter(|card| software_too || !card.software).cloned()
    }

    fn set_up() -> Option<Self> {
        let wgpu = |device| match device {
            cubecl::Device::Wgpu(device) => Some(device),
            _ => None,
        };
        let devices = cubecl::Device::enumerate_all().into_iter().filter_map(wgpu);
        let device = devices.min_by_key(|device| device.kind == WgpuDeviceKind::Cpu)?;
        let options = RuntimeOptions { tasks_max: LAUNCHES, ..RuntimeOptions::default() };
        let setup = burn_wgpu::try_init_setup::<AutoGraphicsApi>(&device, options).ok()?;
        let client = cubecl::Device::Wgpu(device).client();
        let info = setup.adapter.get_info();
        let halves = client.properties().supports_type(ElemType::Float(FloatKind::F16));
        Some(Self {
            client,
            name: info.name.clone(),
            driver: format!("{:?} {} {}", info.backend, info.driver, info.driver_info).trim().to_lowercase(),
            memory: memory_of(&setup),
            halves,
            software: info.device_type == wgpu::DeviceType::Cpu,
        })
    }

    /// What it is, in words.
    pub fn backend(&self) -> String {
        format!("gpu ({}, {})", self.name, if self.halves { "keys and values in f16" } else { "f32" })
    }

    /// The numerics class, but for how kernels are tuned to the card, which [`Decoder::tuning`] says.
    pub fn numerics(&self) -> String {
        let kv = if self.halves { "f16" } else { "f32" };
        format!("gpu-{ARITHMETIC}-cubecl-{CUBECL}-{kv}-{}-{}", self.name, self.driver).replace(' ', "_")
    }

    /// Bytes of one number of a key or value.
    fn kv_bytes(&self) -> usize {
        if self.halves { 2 } else { 4 }
    }

    /// Bytes of one buffer at most.
    pub fn largest_buffer(&self) -> u64 {
        self.client.properties().memory.max_page_size
    }

    fn buffer(&self, count: usize, bytes: &[u8]) -> Buffer {
        Buffer { handle: self.client.create_from_slice(bytes), count }
    }

    fn floats(&self, values: &[f32]) -> Buffer {
        // A buffer of nothing is none.
        let values = if values.is_empty() { &[0.0] } else { values };
        self.buffer(values.len(), f32::as_bytes(values))
    }

    fn words(&self, values: &[u32]) -> Buffer {
        let values = if values.is_empty() { &[0] } else { values };
        self.buffer(values.len(), u32::as_bytes(values))
    }

    /// Room for so many numbers of 32 bits; what stands there is not known.
    fn room(&self, count: usize) -> Buffer {
        Buffer { handle: self.client.empty(count.max(1) * 4), count: count.max(1) }
    }

    /// Waits until everything is done.
    pub fn sync(&self) -> Result<(), String> {
        cubecl::future::block_on(self.client.sync()).map_err(|why| why.to_string())
    }

    fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, String> {
        let bytes = self.client.read_one(buffer.handle.clone()).map_err(|why| why.to_string())?;
        let values = bytes.chunks_exact(4).take(buffer.count);
        Ok(values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    /// Bytes a second that it reads and writes, copying so many in several parts and several times.
    pub fn bandwidth(&self, bytes: usize, sweeps: usize, rounds: u32) -> Result<f64, String> {
        // Some, as adapters limit how large one may be.
        let part = (self.largest_buffer() as usize).min(bytes / 4) / 16 * 4;
        let pairs: Vec<(Buffer, Buffer)> =
            (0..bytes / 4 / part).map(|_| (self.floats(&vec![1.0; part]), self.room(part))).collect();
        let mut best = f64::MAX;
        // The first round compiles the kernel.
        for _ in 0..=rounds {
            self.sync()?;
            let started = std::time::Instant::now();
            for _ in 0..sweeps {
                for (from, to) in &pairs {
                    let cubes = matrix::grid((part / 4).div_ceil(256));
                    // SAFETY: both are so long.
                    unsafe {
                        kernels::copy::launch_unchecked(
                            &self.client,
                            cubes,
                            CubeDim::new_1d(256),
                            from.arg(),
                            to.arg(),
                            (part / 4) as u32,
                        );
                    }
                }
            }
            self.sync()?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        Ok((2 * 4 * part * pairs.len() * sweeps) as f64 / best)
    }
}

/// Bytes of the largest memory that belongs to the card alone. wgpu does not tell; the drivers below it do.
#[cfg(any(target_os = "linux", windows))]
fn memory_of(setup: &WgpuSetup) -> Option<u64> {
    // Of a heap that is the card's own (VK_MEMORY_HEAP_DEVICE_LOCAL_BIT).
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the adapter lives while it is borrowed, and is only asked.
    let memory = unsafe {
        let adapter = setup.adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = adapter.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(adapter.raw_physical_device())
    };
    let heaps = memory.memory_heaps.iter().take(memory.memory_heap_count as usize);
    heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0).map(|heap| heap.size).max()
}

/// Elsewhere the card's memory is the machine's, whose free part is asked for as it is for the CPU.
#[cfg(not(any(target_os = "linux", windows)))]
fn memory_of(_setup: &WgpuSetup) -> Option<u64> {
    None
}
