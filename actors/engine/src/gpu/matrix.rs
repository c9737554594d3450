//! Matrices on a card, in pieces that one buffer can hold.

use cubecl::prelude::*;
use rayon::prelude::*;

use super::forms::Form;
use super::kernels::{self, Cut, Ending};
use super::{Buffer, Card};
use crate::dequantize::Format;
use crate::gguf::{Gguf, GgufError};
use crate::model::weights::{Part, piece};

/// Some outputs, all of one form.
pub(super) struct Piece {
    codes: Buffer,
    scales: Buffer,
    pub form: Form,
    pub inputs: usize,
    pub outputs: usize,
    /// The place of the first of them among all.
    first: usize,
    /// How workgroups are cut for each of [`COLUMNS`].
    pub cuts: [Cut; COLUMNS.len()],
}

/// Rows that few ones are rounded up to.
pub(super) const COLUMNS: [usize; 5] = [1, 2, 4, 8, kernels::FEW];

/// Where a product of few rows goes.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub out: &'a Buffer,
    /// Of a row of `out`.
    pub width: usize,
    /// The place of the first output in it.
    pub first: usize,
    pub bias: Option<&'a Buffer>,
    /// Adds to what is there.
    pub add: bool,
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
        let (inputs, first, cuts) = (self.inputs, self.outputs, COLUMNS.map(Cut::usual));
        self.pieces.push(Piece { codes, scales, form, inputs, outputs, first, cuts });
        self.outputs += outputs;
    }

    /// Bytes on the card.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(Piece::bytes).sum()
    }

    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub fn pieces_mut(&mut self) -> &mut [Piece] {
        &mut self.pieces
    }

    /// `out = weights · x (+ bias)`, or added to `out`, for the first `rows` rows of `x` and `out`. Where they are few,
    /// `x` and `out` have room for the next power of two.
    pub fn apply(&self, card: &Card, x: &Buffer, rows: usize, out: &Buffer, add: bool) {
        let bias = self.bias.as_ref();
        let ending = Ending { bias: bias.is_some(), add };
        for piece in &self.pieces {
            if rows <= kernels::FEW {
                let which = rows.next_power_of_two().trailing_zeros() as usize;
                let target = Target { out, width: self.outputs, first: piece.first, bias, add };
                piece.few(card, x, COLUMNS[which], target, piece.cuts[which]);
                continue;
            }
            let (outputs, chunks) = (piece.outputs as u32, (self.inputs / super::forms::CHUNK) as u32);
            let (width, first) = (self.outputs as u32, piece.first as u32);
            let (across, down) = (piece.outputs.div_ceil(kernels::TILE), rows.div_ceil(kernels::TILE));
            // SAFETY: the buffers are as long as the sizes say.
            unsafe {
                kernels::tiled_product::launch_unchecked(
                    &card.client,
                    CubeCount::Static(across as u32, down as u32, 1),
                    CubeDim::new_1d(kernels::TILE_THREADS),
                    piece.codes.arg(),
                    piece.scales.arg(),
                    bias.unwrap_or(x).arg(),
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

impl Piece {
    /// Bytes on the card.
    pub fn bytes(&self) -> u64 {
        (self.codes.count + self.scales.count) as u64 * 4
    }

    /// The product with `columns` rows of `x`, which are one of [`COLUMNS`].
    pub fn few(&self, card: &Card, x: &Buffer, columns: usize, target: Target<'_>, cut: Cut) {
        let Target { out, width, first, bias, add } = target;
        let cubes = self.outputs.div_ceil(cut.outputs as usize);
        // SAFETY: the buffers are as long as the sizes say.
        unsafe {
            kernels::product::launch_unchecked(
                &card.client,
                grid(cubes),
                CubeDim::new_1d(cut.threads),
                self.codes.arg(),
                self.scales.arg(),
                bias.unwrap_or(x).arg(),
                x.arg(),
                out.arg(),
                self.outputs as u32,
                (self.inputs / super::forms::CHUNK) as u32,
                width as u32,
                first as u32,
                self.form,
                columns,
                Ending { bias: bias.is_some(), add },
                cut,
            );
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
