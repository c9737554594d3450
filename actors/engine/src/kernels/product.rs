//! Products of packed weights with rows of activations, shared among threads.

use std::sync::Arc;

use super::columns::{Columns, Needs, Norm};
use super::pack::Shape;
use super::pool::Pool;
use super::simd::{LANES, Simd};
use super::table::{InstructionSet, Table};
use super::tile::{Group, MOST_COLUMNS, TileOut};
use crate::dequantize::Format;

/// Weights of one unit, about, so that they stay in the nearest caches while all columns pass.
const UNIT_BYTES: usize = 48 << 10;
/// Units for each thread, at least, where there are so many tiles.
const UNITS_EACH: usize = 8;
/// Rows that are worth preparing on several threads.
const MANY_ROWS: usize = 4;

/// What is done with a gate before it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Activation {
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// A packed matrix: a part of a mapping (or of memory) that others share.
#[derive(Clone)]
pub(crate) struct Packed {
    shape: Shape,
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    offset: usize,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("shape", &self.shape).field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl Packed {
    /// `None` where `bytes` are too few.
    pub fn new(shape: Shape, bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, offset: usize) -> Option<Self> {
        let end = shape.bytes()?.checked_add(offset)?;
        (end <= (*bytes).as_ref().len()).then_some(Self { shape, bytes, offset })
    }

    /// The same in memory of its own.
    #[cfg(test)]
    pub fn separate(&self) -> Self {
        Self { bytes: Arc::new((*self.bytes).as_ref().to_vec()), ..self.clone() }
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    fn tile(&self, number: usize) -> *const u8 {
        let bytes = self.shape.tile_bytes();
        (*self.bytes).as_ref()[self.offset + number * bytes..][..bytes].as_ptr()
    }
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Store,
    Add,
}

/// The kernels with their threads and their memory.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(super) table: Table,
    pub(super) pool: Pool,
    columns: Columns,
    set: InstructionSet,
}

/// A place that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub *mut T);

// SAFETY: whoever uses it gives each thread parts of its own.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// (A method, so that closures take the whole and not the pointer in it.)
    pub fn get(&self) -> *mut T {
        self.0
    }
}

impl Kernels {
    /// For an instruction set that this processor has.
    pub fn new(set: InstructionSet, threads: usize) -> Self {
        assert!(InstructionSet::available().contains(&set), "this processor has no {}", set.name());
        Self { table: set.table(), pool: Pool::new(threads), columns: Columns::default(), set }
    }

    pub fn instruction_set(&self) -> InstructionSet {
        self.set
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Computes on so many threads from now on. Results do not depend on how many there are.
    pub fn set_threads(&mut self, threads: usize) {
        if threads.max(1) != self.pool.threads() {
            self.pool = Pool::new(threads);
        }
    }

    /// `out = norm(x) · weights (+ bias)`, the parts' outputs side by side. `x` is `[rows, inputs]`, `out`
    /// `[rows, outputs]`; all parts have the same inputs.
    pub fn linear(&mut self, parts: &[Packed], bias: Option<&[f32]>, x: &[f32], norm: Norm<'_>, out: &mut [f32]) {
        self.multiply(parts, bias, x, norm, out, Target::Store);
    }

    /// `out += x · weights (+ bias)`.
    pub fn linear_add(&mut self, weights: &Packed, bias: Option<&[f32]>, x: &[f32], out: &mut [f32]) {
        self.multiply(std::slice::from_ref(weights), bias, x, Norm::None, out, Target::Add);
    }

    fn multiply(
        &mut self,
        parts: &[Packed],
        bias: Option<&[f32]>,
        x: &[f32],
        norm: Norm<'_>,
        out: &mut [f32],
        target: Target,
    ) {
        let Some(first) = parts.first() else { return };
        let rows = x.len() / first.shape.inputs;
        let outputs: usize = parts.iter().map(|part| part.shape.outputs).sum();
        assert!(parts.iter().all(|part| part.shape.inputs == first.shape.inputs));
        assert!(x.len() == rows * first.shape.inputs && out.len() == rows * outputs);
        assert!(bias.is_none_or(|bias| bias.len() == outputs));
        self.prepare(parts, x, rows, norm);
        let units = Units::of(parts, self.pool.threads());
        let (table, columns, out) = (&self.table, &self.columns, Shared(out.as_mut_ptr()));
        self.pool.run(units.count(), |unit| {
            let (part, from, tiles) = units.get(unit);
            let weights = &parts[part];
            let start: usize = parts[..part].iter().map(|part| part.shape.outputs).sum();
            let mut results: TileOut = [[0.0; LANES]; MOST_COLUMNS];
            for (first, group) in columns.groups() {
                for number in tiles.clone() {
                    run_tile(table, weights, number, &group, &mut results);
                    let at = number * LANES;
                    let lanes = LANES.min(weights.shape.outputs - at);
                    let bias = bias.map(|bias| &bias[start + at..][..lanes]);
                    for (row, result) in results.iter_mut().enumerate().take(group.width) {
                        for (value, bias) in result.iter_mut().zip(bias.into_iter().flatten()) {
                            *value += bias;
                        }
                        // SAFETY: within `rows · outputs`, and no other unit has these outputs.
                        let out = unsafe {
                            let at = out.get().add((first + row) * outputs + from + at);
                            std::slice::from_raw_parts_mut(at, lanes)
                        };
                        match target {
                            Target::Store => out.copy_from_slice(&result[..lanes]),
                            Target::Add => out.iter_mut().zip(result).for_each(|(out, value)| *out += *value),
                        }
                    }
                }
            }
        });
    }

    /// `out = activation(norm(x) · gate) · (norm(x) · up)`; gate and up have the same sizes, `out` is
    /// `[rows, outputs]`.
    pub fn gated(
        &mut self,
        gate: &Packed,
        up: &Packed,
        activation: Activation,
        x: &[f32],
        norm: Norm<'_>,
        out: &mut [f32],
    ) {
        let Shape { inputs, outputs, .. } = gate.shape;
        let rows = x.len() / inputs;
        assert!((up.shape.inputs, up.shape.outputs) == (inputs, outputs));
        assert!(x.len() == rows * inputs && out.len() == rows * outputs);
        let parts = [gate.clone(), up.clone()];
        self.prepare(&parts, x, rows, norm);
        // Units of both at once: a tile of the gate is wanted with the same tile of the other.
        let units = Units::of(&parts[..1], self.pool.threads());
        let (table, columns, out) = (&self.table, &self.columns, Shared(out.as_mut_ptr()));
        self.pool.run(units.count(), |unit| {
            let (_, _, tiles) = units.get(unit);
            let mut gates: TileOut = [[0.0; LANES]; MOST_COLUMNS];
            let mut ups: TileOut = [[0.0; LANES]; MOST_COLUMNS];
            for (first, group) in columns.groups() {
                for number in tiles.clone() {
                    run_tile(table, gate, number, &group, &mut gates);
                    run_tile(table, up, number, &group, &mut ups);
                    let lanes = LANES.min(outputs - number * LANES);
                    // SAFETY: the instruction set is there; places as above.
                    unsafe {
                        (table.gate)(activation, &mut gates, &ups, group.width);
                        for (row, result) in gates.iter().enumerate().take(group.width) {
                            let at = out.get().add((first + row) * outputs + number * LANES);
                            std::slice::from_raw_parts_mut(at, lanes).copy_from_slice(&result[..lanes]);
                        }
                    }
                }
            }
        });
    }

    /// Norms each row of `x` `[rows, weight]` in place.
    pub fn norm(&self, x: &mut [f32], weight: &[f32], epsilon: f32) {
        let mut normed = vec![0.0; weight.len()];
        for row in x.chunks_exact_mut(weight.len()) {
            // SAFETY: the instruction set is there.
            unsafe {
                (self.table.rms_norm)(row, weight, epsilon, &mut normed);
            }
            row.copy_from_slice(&normed);
        }
    }

    fn prepare(&mut self, parts: &[Packed], x: &[f32], rows: usize, norm: Norm<'_>) {
        let inputs = parts[0].shape.inputs;
        let is_float = |part: &Packed| matches!(part.shape.format, Format::F32 | Format::F16 | Format::Bf16);
        let needs = Needs { codes: parts.iter().any(|part| !is_float(part)), floats: parts.iter().any(is_float) };
        self.columns.reset(rows, inputs, self.table.columns, needs);
        let (table, sink) = (&self.table, self.columns.sink());
        let each = rows.div_ceil(self.pool.threads() * 4).max(MANY_ROWS);
        self.pool.run(rows.div_ceil(each), |unit| {
            let mut scratch = vec![0.0; inputs];
            for row in unit * each..((unit + 1) * each).min(rows) {
                // SAFETY: the instruction set is there; each row is filled once.
                unsafe {
                    (table.fill_row)(&sink, row, &x[row * inputs..][..inputs], norm, &mut scratch);
                }
            }
        });
    }
}

fn run_tile(table: &Table, weights: &Packed, number: usize, group: &Group, results: &mut TileOut) {
    // SAFETY: the instruction set is there; tile and group have the sizes of the shape.
    unsafe {
        (table.tile)(weights.shape, weights.tile(number), group, results);
    }
}

/// The tiles of some matrices in units of about equal work.
struct Units {
    /// For each matrix: tiles of a unit, tiles, outputs before it, units before it.
    parts: Vec<(usize, usize, usize, usize)>,
    count: usize,
}

impl Units {
    fn of(parts: &[Packed], threads: usize) -> Self {
        let all: usize = parts.iter().map(|part| part.shape.tiles()).sum();
        let (mut outputs, mut count) = (0, 0);
        let parts = parts.iter().map(|part| {
            let fitting = UNIT_BYTES / part.shape.tile_bytes().max(1);
            let size = fitting.min(all / (threads * UNITS_EACH)).max(1);
            let entry = (size, part.shape.tiles(), outputs, count);
            outputs += part.shape.outputs;
            count += part.shape.tiles().div_ceil(size);
            entry
        });
        let parts = parts.collect();
        Self { parts, count }
    }

    fn count(&self) -> usize {
        self.count
    }

    /// The matrix, the outputs before it, and the tiles of a unit.
    fn get(&self, unit: usize) -> (usize, usize, std::ops::Range<usize>) {
        let part = self.parts.iter().rposition(|(_, _, _, before)| *before <= unit).unwrap_or(0);
        let (size, tiles, outputs, before) = self.parts[part];
        let from = (unit - before) * size;
        (part, outputs, from..(from + size).min(tiles))
    }
}

/// `gate = activation(gate) · up`, for `width` columns.
#[inline(always)]
pub(crate) unsafe fn gate<S: Simd>(activation: Activation, gate: &mut TileOut, up: &TileOut, width: usize) {
    // SAFETY: rows have sixteen places; the caller has made sure of the instructions.
    unsafe {
        for (gate, up) in gate.iter_mut().zip(up).take(width) {
            let x = S::load(gate.as_ptr());
            let x = match activation {
                Activation::Silu => super::float::silu::<S>(x),
                Activation::GeluTanh => super::float::gelu_tanh::<S>(x),
            };
            S::store(gate.as_mut_ptr(), S::mul(x, S::load(up.as_ptr())));
        }
    }
}
