//! How likely tokens are, as the model has it.

use super::numbers::ln;
use super::scan::{self, BLOCK, Heat};

/// Stands for "impossible": JSON has no infinity.
const IMPOSSIBLE: f32 = -9_999.0;

/// How likely one token and the likeliest of all were.
#[derive(Debug, Clone, PartialEq)]
pub struct Likelihood {
    /// Natural logarithm of the chosen token's probability.
    pub chosen: f32,
    /// Tokens and theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// The probabilities of one row.
#[derive(Debug, Clone, Copy)]
pub struct Distribution {
    greatest: f32,
    /// Logarithm of the sum of all probabilities relative to the greatest.
    log_sum: f64,
}

impl Distribution {
    /// `greatest` is the greatest of the row.
    pub fn new(row: &[f32], greatest: f32) -> Self {
        let heat = Heat::new(greatest, 1.0);
        // Blocks in f32, their sums in f64: exact to about a millionth, in an order that is fixed.
        let sum: f64 = row.chunks(BLOCK).map(|block| f64::from(heat.share_of_all(block))).sum();
        Self { greatest, log_sum: ln(sum.max(1.0)) }
    }

    /// The logarithm of the probability of a token with this logit.
    pub fn of(&self, logit: f32) -> f32 {
        if logit == self.greatest && logit.is_infinite() {
            return 0.0;
        }
        let log = (f64::from(logit) - f64::from(self.greatest) - self.log_sum) as f32;
        if log >= IMPOSSIBLE { log } else { IMPOSSIBLE }
    }

    /// The `count` likeliest tokens.
    pub fn top(
        &self,
        row: &[f32],
        maxima: &[f32],
        count: u8,
        found: &mut Vec<u64>,
        scratch: &mut Vec<u64>,
    ) -> Vec<(u32, f32)> {
        scan::top(row, maxima, count.into(), found, scratch);
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.iter().map(|key| scan::id_of(*key)).map(|id| (id, self.of(row[id as usize]))).collect()
    }
}
