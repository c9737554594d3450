//! One layer's attention for all rows of a step: heads are normed and rotated, keys and values written to their
//! blocks, then every query attends.

use super::attention::{KV_BLOCK, KvLayout, Queries, WIDEST_HEAD};
use super::columns::rms_norm;
use super::product::{Kernels, Shared};
use super::simd::{LANES, Simd};

/// Rows whose queries one unit takes.
const ROWS_TOGETHER: usize = 16;
/// Rows that are worth preparing on several threads.
const MANY_ROWS: usize = 4;

/// One row of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    /// Which of the step's sequences.
    pub sequence: usize,
    /// Its place there.
    pub position: usize,
    /// The last position that it sees: its own, or the sequence's last where attention looks both ways.
    pub sees: usize,
}

/// Cosines and sines of one row's angles, one for each pair of elements `(i, i + n)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rotation<'a> {
    pub cosines: &'a [f32],
    pub sines: &'a [f32],
}

/// Norms of single heads before they are rotated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadNorms<'a> {
    pub query: &'a [f32],
    pub key: &'a [f32],
    pub epsilon: f32,
}

/// What attention of one layer works on.
#[derive(Debug)]
pub(crate) struct AttentionJob<'a> {
    pub layout: KvLayout,
    pub heads: usize,
    pub rows: &'a [Row],
    /// For each sequence of the step, the blocks of this layer.
    pub blocks: &'a [Vec<*mut u8>],
    /// `[rows][(heads + 2 · kv_heads) · size]`: queries, keys, values. Queries and keys are changed in place.
    pub qkv: &'a mut [f32],
    /// `[rows][pairs]` each.
    pub cosines: &'a [f32],
    pub sines: &'a [f32],
    pub norms: Option<HeadNorms<'a>>,
    /// Queries are multiplied by this.
    pub scale: f32,
    /// Positions that a row sees, its own included.
    pub window: usize,
    /// `[rows][heads · size]`.
    pub out: &'a mut [f32],
}

/// Blocks of sequences, shared by threads that write different places.
struct Blocks<'a>(&'a [Vec<*mut u8>]);

// SAFETY: keys and values of a row are written by one thread; reading begins when all are written.
unsafe impl Sync for Blocks<'_> {}

impl Blocks<'_> {
    fn block(&self, sequence: usize, number: usize) -> *mut u8 {
        self.0[sequence][number]
    }

    fn all(&self, sequence: usize) -> &[*mut u8] {
        &self.0[sequence]
    }
}

impl Kernels {
    /// Attention of one layer. Blocks must have room for all rows.
    pub fn attention(&mut self, job: AttentionJob<'_>) {
        let AttentionJob { layout, heads, rows, blocks, qkv, cosines, sines, norms, scale, window, out } = job;
        let (size, kv_heads, count) = (layout.size, layout.heads, rows.len());
        let (width, pairs) = ((heads + 2 * kv_heads) * size, cosines.len() / count.max(1));
        assert!(size.is_multiple_of(LANES) && size <= WIDEST_HEAD && heads.is_multiple_of(kv_heads));
        assert!(qkv.len() == count * width && out.len() == count * heads * size);
        assert!(cosines.len() == count * pairs && sines.len() == cosines.len() && 2 * pairs <= size);
        for row in rows {
            assert!(blocks[row.sequence].len() > row.position.max(row.sees) / KV_BLOCK);
        }
        let (table, blocks) = (&self.table, Blocks(blocks));
        let data = Shared(qkv.as_mut_ptr());
        let each = count.div_ceil(self.pool.threads() * 4).max(MANY_ROWS);
        self.pool.run(count.div_ceil(each), |unit| {
            for number in unit * each..((unit + 1) * each).min(count) {
                let row = rows[number];
                let rotation =
                    Rotation { cosines: &cosines[number * pairs..][..pairs], sines: &sines[number * pairs..][..pairs] };
                // SAFETY: each row is this unit's alone; sizes were checked above.
                unsafe {
                    let qkv = std::slice::from_raw_parts_mut(data.get().add(number * width), width);
                    let (queries, rest) = qkv.split_at_mut(heads * size);
                    let (keys, values) = rest.split_at_mut(kv_heads * size);
                    for query in queries.chunks_exact_mut(size) {
                        (table.prepare_head)(query, norms.map(|n| (n.query, n.epsilon)), &rotation, scale);
                    }
                    let block = blocks.block(row.sequence, row.position / KV_BLOCK);
                    for (head, key) in keys.chunks_exact_mut(size).enumerate() {
                        (table.prepare_head)(key, norms.map(|n| (n.key, n.epsilon)), &rotation, 1.0);
                        let value = values[head * size..].as_ptr();
                        (table.write)(layout, block, head, row.position % KV_BLOCK, key.as_ptr(), value);
                    }
                }
            }
        });
        // Rows of one sequence that stand together, so many at once.
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.len() < ROWS_TOGETHER && rows[run.start].sequence == row.sequence => run.end += 1,
                _ => runs.push(number..number + 1),
            }
        }
        let share = heads / kv_heads;
        // Few rows: queries that share keys are divided as well.
        let split = if runs.len() * kv_heads >= 4 * self.pool.threads() { 1 } else { share };
        let out = Shared(out.as_mut_ptr());
        self.pool.run(runs.len() * kv_heads * split, |unit| {
            let run = runs[unit / (kv_heads * split)].clone();
            let head = unit / split % kv_heads;
            let mine = if split == 1 { 0..share } else { unit % split..unit % split + 1 };
            let capacity = run.len() * mine.len();
            let (mut queries, mut outputs, mut positions) =
                (Vec::with_capacity(capacity), Vec::with_capacity(capacity), Vec::with_capacity(capacity));
            // SAFETY: each query has its own output; nobody writes queries, keys or values any more.
            unsafe {
                for number in run.clone() {
                    for query in mine.clone().map(|n| head * share + n) {
                        queries.push(data.get().add(number * width + query * size).cast_const());
                        outputs.push(out.get().add((number * heads + query) * size));
                        positions.push(rows[number].sees);
                    }
                }
                let blocks: Vec<*const u8> =
                    blocks.all(rows[run.start].sequence).iter().map(|block| block.cast_const()).collect();
                let queries = Queries {
                    queries: queries.as_ptr(),
                    outputs: outputs.as_ptr(),
                    positions: positions.as_ptr(),
                    count: capacity,
                };
                (table.attend)(layout, &blocks, head, window, queries);
            }
        });
    }
}

/// Norms one head if it is to be, rotates pairs `(i, i + n)` by their angles (Su et al. 2021) and scales it.
#[inline(always)]
pub(crate) unsafe fn prepare_head<S: Simd>(
    x: &mut [f32],
    norm: Option<(&[f32], f32)>,
    rotation: &Rotation<'_>,
    scale: f32,
) {
    if let Some((weight, epsilon)) = norm {
        let mut normed = [0.0; WIDEST_HEAD];
        // SAFETY: the caller has made sure of the instructions.
        unsafe { rms_norm::<S>(x, weight, epsilon, &mut normed[..x.len()]) };
        x.copy_from_slice(&normed[..x.len()]);
    }
    let pairs = rotation.cosines.len();
    let (first, rest) = x.split_at_mut(pairs);
    for (((a, b), cosine), sine) in first.iter_mut().zip(rest).zip(rotation.cosines).zip(rotation.sines) {
        (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
    }
    for x in x {
        *x *= scale;
    }
}
