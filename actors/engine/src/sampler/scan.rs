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

    /// A probability relative to the greatest, from 0 to 1. This the compiler turns into vector instructions;
    /// [`Heat::weight`] it does not.
    #[inline(always)]
    fn share(self, logit: f32) -> f32 {
        exp((logit - self.greatest) * self.inverse)
    }

    /// From 0 to [`ONE`].
    #[inline(always)]
    pub fn weight(self, logit: f32) -> u32 {
        (self.share(logit) * ONE as f32) as u32
    }

    /// The shares of a block together. The order of the sum is fixed: eight columns, then across them.
    pub fn share_of_all(self, block: &[f32]) -> f32 {
        let mut lanes = [0.0; 8];
        let (chunks, rest) = block.as_chunks::<8>();
        for chunk in chunks {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane += self.share(*logit);
            }
        }
        lanes.iter().sum::<f32>() + rest.iter().map(|logit| self.share(*logit)).sum::<f32>()
    }
}

/// The weight of each block, to f32's precision. Returns the weight of all.
pub fn sums(row: &[f32], maxima: &[f32], heat: Heat, sums: &mut Vec<u64>) -> u64 {
    sums.clear();
    sums.extend(row.chunks(BLOCK).zip(maxima).map(|(block, maximum)| match heat.weight(*maximum) {
        0 => 0,
        _ => (heat.share_of_all(block) * ONE as f32) as u64,
    }));
    sums.iter().sum()
}

/// Collects the tokens that weigh more than `floor`, in the order of their ids.
pub fn heavier(row: &[f32], maxima: &[f32], heat: Heat, floor: u32, found: &mut Vec<u64>) {
    found.clear();
    let about = floor as f32 / ONE as f32;
    for ((block, maximum), start) in row.chunks(BLOCK).zip(maxima).zip((0u32..).step_by(BLOCK)) {
        if heat.weight(*maximum) <= floor {
            continue;
        }
        let mut shares = [0.0; BLOCK];
        for (share, logit) in shares.iter_mut().zip(block) {
            *share = heat.share(*logit);
        }
        for (share, id) in shares.iter().zip(start..) {
            // A first look without the conversion, which is slow; rounding `floor` excludes nothing that is above it.
            if *share >= about {
                let weight = (share * ONE as f32) as u32;
                if weight > floor {
                    found.push(key(weight, id));
                }
            }
        }
    }
}

/// The token at `place` when all tokens stand in a row, each as long as its weight. `place` is below the sum of `sums`.
pub fn at(row: &[f32], sums: &[u64], heat: Heat, mut place: u64) -> Option<u32> {
    let block = sums.iter().position(|sum| is_within(&mut place, *sum))?;
    let start = block * BLOCK;
    let weights = || row[start..].iter().take(BLOCK).map(|logit| u64::from(heat.weight(*logit)));
    // The block's weight is rounded, that of its tokens together is not: the same place within them.
    let exact: u64 = weights().sum();
    place = (u128::from(place) * u128::from(exact) / u128::from(sums[block])) as u64;
    let within = weights().position(|weight| is_within(&mut place, weight))?;
    Some((start + within) as u32)
}

/// Whether `place` is within the next `length`; where it is not, it is moved on by so much.
pub fn is_within(place: &mut u64, length: u64) -> bool {
    match place.checked_sub(length) {
        Some(rest) => {
            *place = rest;
            false
        }
        None => true,
    }
}
