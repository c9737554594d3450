//! Matrices on a card, in pieces that one buffer can hold.

use cubecl::prelude::*;
use rayon::prelude::*;

use super::forms::Form;
use super::kernels::{self, Ending};
use super::{Buffer, Card};
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError};
use crate::model::weights::{Part, piece};

/// Some outputs, all of one form.
struct Piece {
    codes: Buffer,
    scales: Buffer,
    form: Form,
    outputs: usize,
    /// The place of the first of them among all.
    first: usize,
}

/// Matrices with the same inputs, side by side.
pub(super) struct Matrix {
    pieces: Vec<Piece>,
    bias: Option<Buffer>,
    inputs: usize,
    outputs: usize,
}

/// Bytes of some parts on a card.
pub(super) fn bytes_of(gguf: &Gguf, parts: &[Part]) -> Result<u64, GgufError> {
    let of_part = |part: &Part| {
        let format = piece(gguf, part.clone())?.shape.format;
        let (words, scales) = Form::of(format).words(part.inputs);
        Ok((words + scales) as u64 * 4 * part.outputs as u64)
    };
    parts.iter().map(of_part).sum()
}

impl Matrix {
    /// `bias`: of all outputs.
    pub fn load(card: &Card, gguf: &Gguf, parts: &[Part], bias: Option<Vec<f32>>) -> Result<Self, GgufError> {
        let mut matrix = Self {
            pieces: Vec::new(),
            bias: bias.map(|bias| card.floats(&bias)),
            inputs: parts.first().map_or(0, |part| part.inputs),
            outputs: 0,
        };
        // Parts of one format that stand side by side become one piece: one launch instead of several.
        let formats = parts.iter().map(|part| Ok(piece(gguf, part.clone())?.shape.format));
        let formats = formats.collect::<Result<Vec<Format>, GgufError>>()?;
        let parts: Vec<(Format, &Part)> = formats.into_iter().zip(parts).collect();
        for same in parts.chunk_by(|(a, _), (b, _)| a == b) {
            let rows = same.iter().map(|(format, part)| stored_rows(gguf, *format, part));
            let rows: Vec<&[u8]> = rows.collect::<Result<Vec<_>, _>>()?.concat();
            let form = Form::of(same[0].0);
            let (words, _) = form.words(matrix.inputs);
            let most = (card.largest_buffer() as usize / (words * 4).max(1)).max(1);
            for rows in rows.chunks(most) {
                matrix.push(card, same[0].0, form, rows);
            }
        }
        Ok(matrix)
    }

    fn push(&mut self, card: &Card, format: Format, form: Form, rows: &[&[u8]]) {
        let (words, scales) = form.words(self.inputs);
        let (mut of_codes, mut of_scales) = (vec![0u32; words * rows.len()], vec![0u32; scales * rows.len()]);
        // Rows without scales have no chunks of them either.
        let mut lines: Vec<&mut [u32]> = of_scales.chunks_exact_mut(scales.max(1)).collect();
        lines.resize_with(rows.len(), Default::default);
        of_codes
            .par_chunks_exact_mut(words)
            .zip(lines)
            .zip(rows)
            .for_each(|((codes, scales), row)| form.pack(format, row, codes, scales));
        let outputs = rows.len();
        let (codes, scales) = (card.words(&of_codes), card.words(&of_scales));
        self.pieces.push(Piece { codes, scales, form, outputs, first: self.outputs });
        self.outputs += outputs;
    }

    /// Bytes on the card.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| (piece.codes.count + piece.scales.count) as u64 * 4).sum()
    }

    /// `out = weights · x (+ bias)`, or added to `out`, for the first `rows` rows of `x` and `out`. Where they are few,
    /// `x` and `out` have room for the next power of two.
    pub fn apply(&self, card: &Card, x: &Buffer, rows: usize, out: &Buffer, add: bool) {
        let bias = self.bias.as_ref().unwrap_or(x);
        let ending = Ending { bias: self.bias.is_some(), add };
        for piece in &self.pieces {
            let (outputs, chunks) = (piece.outputs as u32, (self.inputs / super::forms::CHUNK) as u32);
            let (width, first) = (self.outputs as u32, piece.first as u32);
            // SAFETY: the buffers are as long as the sizes say.
            unsafe {
                if rows <= kernels::FEW {
                    let columns = rows.next_power_of_two();
                    let cubes = piece.outputs.div_ceil(kernels::outputs_at_once(columns));
                    kernels::product::launch_unchecked(
                        &card.client,
                        grid(cubes),
                        CubeDim::new_1d(kernels::THREADS),
                        piece.codes.arg(),
                        piece.scales.arg(),
                        bias.arg(),
                        x.arg(),
                        out.arg(),
                        outputs,
                        chunks,
                        width,
                        first,
                        piece.form,
                        columns,
                        ending,
                    );
                } else {
                    let (across, down) = (piece.outputs.div_ceil(kernels::TILE), rows.div_ceil(kernels::TILE));
                    kernels::tiled_product::launch_unchecked(
                        &card.client,
                        CubeCount::Static(across as u32, down as u32, 1),
                        CubeDim::new_1d(kernels::TILE_THREADS),
                        piece.codes.arg(),
                        piece.scales.arg(),
                        bias.arg(),
                        x.arg(),
                        out.arg(),
                        outputs,
                        chunks,
                        rows as u32,
                        width,
                        first,
                        piece.form,
                        ending,
                    );
                }
            }
        }
    }
}

/// So many workgroups, in two dimensions where one cannot count them.
pub(super) fn grid(cubes: usize) -> CubeCount {
    const MOST: usize = 65_535;
    let down = cubes.div_ceil(MOST).max(1);
    CubeCount::Static(cubes.div_ceil(down) as u32, down as u32, 1)
}

/// The bytes of a part's outputs, in their order.
fn stored_rows<'a>(gguf: &'a Gguf, format: Format, part: &Part) -> Result<Vec<&'a [u8]>, GgufError> {
    let info = gguf.tensor(&format!("{}.weight", part.name))?;
    if !part.inputs.is_multiple_of(super::forms::CHUNK) {
        let why = format!("its rows of {} weights are no multiple of {}", part.inputs, super::forms::CHUNK);
        return Err(GgufError::Invalid { what: format!("tensor {} for a GPU", info.name), why });
    }
    let bytes = gguf.tensor_bytes(info)?;
    let each = part.inputs / format.block_weights() * format.block_bytes();
    Ok((0..part.outputs).map(|n| &bytes[(part.first + part.order.row(n)) * each..][..each]).collect())
}
