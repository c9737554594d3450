//! Passes over one row of logits. Rows are long (50,000 to 262,000), so each is read in blocks whose greatest
//! logit is known: most blocks need no second look. Whatever is no number counts as −∞.

use super::numbers::{ONE, exp};

/// Logits in a block.
pub const BLOCK: usize = 64;

/// The greatest logit of each block. Returns the greatest of all; −∞ where there is none.
pub fn maxima(row: &[f32], maxima: &mut Vec<f32>) -> f32 {
    maxima.clear();
    maxima.extend(row.chunks(BLOCK).map(greatest));
    greatest(maxima)
}

fn greatest(values: &[f32]) -> f32 {
    // A comparison with what is no number is false.
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*value, *lane);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |best, value| greater(*value, best))
}

/// The first token with the greatest logit.
pub fn first(row: &[f32], maxima: &[f32], greatest: f32) -> u32 {
    let block = maxima.iter().position(|maximum| *maximum == greatest).unwrap_or(0);
    let within = row.iter().skip(block * BLOCK).position(|logit| *logit == greatest);
    (block * BLOCK + within.unwrap_or(0)) as u32
}

/// Tokens with a number each, as one number: greater numbers first, lower ids first among equals.
pub fn key(number: u32, id: u32) -> u64 {
    u64::from(number) << 32 | u64::from(!id)
}

/// The number of a [`key`].
pub fn number_of(key: u64) -> u32 {
    (key >> 32) as u32
}

/// The token of a [`key`].
pub fn id_of(key: u64) -> u32 {
    !(key as u32)
}

/// A number that is ordered as the logit is.
fn ordered(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits(); // −0 becomes 0
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// Collects the `k` tokens with the greatest logits (lower ids first among equals), in the order of their ids.
/// Fewer where fewer logits are above −∞. Their keys carry [`ordered`] logits.
pub fn top(row: &[f32], maxima: &[f32], k: usize, found: &mut Vec<u64>, scratch: &mut Vec<u64>) {
    found.clear();
    if k == 0 {
        return;
    }
    // The k-th of the blocks' maxima: k tokens are at least as great.
    let bound = if maxima.len() >= k {
        scratch.clear();
        scratch.extend(maxima.iter().zip(0..).map(|(maximum, block)| key(ordered(*maximum), block)));
        let (_, kth, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        maxima[id_of(*kth) as usize]
    } else {
        f32::NEG_INFINITY
    };
    for ((block, maximum), start) in row.chunks(BLOCK).zip(maxima).zip((0u32..).step_by(BLOCK)) {
        if *maximum >= bound {
            let numbers =
                block.iter().zip(start..).filter(|(logit, _)| **logit >= bound && **logit > f32::NEG_INFINITY);
            found.extend(numbers.map(|(logit, id)| key(ordered(*logit), id)));
        }
    }
    if found.len() > k {
        scratch.clear();
        scratch.extend_from_slice(found);
        let (_, last, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        let last = *last;
        found.retain(|key| *key >= last);
    }
}

/// Turns logits into weights, see [`ONE`].
#[derive(Debug, Clone, Copy)]
pub struct Heat {
    greatest: f32,
    inverse: f32,
}

impl Heat {
    /// `greatest` is finite and `temperature` not close to 0.
    pub fn new(greatest: f32, temperature: f32) -> Self {
        Self { greatest, inverse: 1.0 / temperature }
    }

    /// From 0 to [`ONE`].
    #[inline(always)]
    pub fn weight(self, logit: f32) -> u32 {
        // Signed, because that is one instruction where unsigned is several.
        (exp((logit - self.greatest) * self.inverse) * ONE as f32) as i32 as u32
    }
}

/// The weights of each block together. Returns the weight of all.
pub fn sums(row: &[f32], maxima: &[f32], heat: Heat, sums: &mut Vec<u64>) -> u64 {
    sums.clear();
    sums.extend(row.chunks(BLOCK).zip(maxima).map(|(block, maximum)| match heat.weight(*maximum) {
        0 => 0,
        _ => block.iter().map(|logit| u64::from(heat.weight(*logit))).sum(),
    }));
    sums.iter().sum()
}

/// Collects the tokens that weigh more than `floor`, in the order of their ids.
pub fn heavier(row: &[f32], maxima: &[f32], heat: Heat, floor: u32, found: &mut Vec<u64>) {
    found.clear();
    for ((block, maximum), start) in row.chunks(BLOCK).zip(maxima).zip((0u32..).step_by(BLOCK)) {
        if heat.weight(*maximum) > floor {
            let mut weights = [0; BLOCK];
            for (weight, logit) in weights.iter_mut().zip(block) {
                *weight = heat.weight(*logit);
            }
            let heavy = weights.into_iter().zip(start..).filter(|(weight, _)| *weight > floor);
            found.extend(heavy.map(|(weight, id)| key(weight, id)));
        }
    }
}

/// The token at `place` when all tokens stand in a row, each as long as its weight. `place` is below the sum of `sums`.
pub fn at(row: &[f32], sums: &[u64], heat: Heat, mut place: u64) -> Option<u32> {
    let block = sums.iter().position(|sum| match place.checked_sub(*sum) {
        Some(rest) => {
            place = rest;
            false
        }
        None => true,
    })?;
    let start = block * BLOCK;
    let within =
        row[start..].iter().take(BLOCK).position(|logit| match place.checked_sub(heat.weight(*logit).into()) {
            Some(rest) => {
                place = rest;
                false
            }
            None => true,
        })?;
    Some((start + within) as u32)
}
