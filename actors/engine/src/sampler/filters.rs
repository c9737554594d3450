//! Which tokens may be drawn, and the draw. Works on a list of [`scan::key`]s with weights, in the order of ids.

use ingle_protocol::wire::v2::Sampling;

use super::numbers::{ONE, below, random};
use super::scan::{self, Heat};

/// Buffers that are used again at each step.
#[derive(Debug, Default)]
pub struct Buffers {
    pub sums: Vec<u64>,
    pub candidates: Vec<u64>,
    pub scratch: Vec<u64>,
}

/// Temperature → top-k → top-p → min-p → draw. `greatest` is finite; `None` cannot be where it is the row's.
pub fn draw(
    row: &[f32],
    maxima: &[f32],
    heat: Heat,
    sampling: &Sampling,
    position: u32,
    buffers: &mut Buffers,
) -> Option<u32> {
    let Buffers { sums, candidates, scratch } = buffers;
    let random = random(sampling.seed, position);
    let top_p = f64::from(sampling.top_p);
    let least = (f64::from(sampling.min_p) * f64::from(ONE)).ceil().max(1.0) as u32;
    let k = sampling.top_k as usize;
    let total = if k > 0 && k < row.len() {
        scan::top(row, maxima, k, candidates, scratch);
        for key in candidates.iter_mut() {
            let id = scan::id_of(*key);
            *key = scan::key(heat.weight(row[id as usize]), id);
        }
        sum(candidates)
    } else {
        let total = scan::sums(row, maxima, heat, sums);
        if top_p >= 1.0 && least == 1 {
            return scan::at(row, sums, heat, below(random, total));
        }
        // Nothing up to this can be among the fewest that reach `top_p`: all such tokens together do not make up
        // what is left over. So only a few have to be looked at.
        let idle = if top_p < 1.0 { total as f64 * (1.0 - top_p) / row.len() as f64 } else { 0.0 };
        scan::heavier(row, maxima, heat, (idle as u32).max(least - 1), candidates);
        total
    };
    if top_p < 1.0 {
        keep_heaviest(candidates, (top_p * total as f64).ceil() as u64, scratch);
    }
    candidates.retain(|key| scan::number_of(*key) >= least);
    let mut place = below(random, sum(candidates));
    let drawn = candidates.iter().find(|key| scan::is_within(&mut place, scan::number_of(**key).into()));
    drawn.map(|key| scan::id_of(*key))
}

fn sum(keys: &[u64]) -> u64 {
    keys.iter().map(|key| u64::from(scan::number_of(*key))).sum()
}

/// Keeps the fewest of the heaviest that together weigh `target`: at least one, all where all weigh less. Halves
/// what is in question again and again instead of sorting it.
fn keep_heaviest(keys: &mut Vec<u64>, target: u64, scratch: &mut Vec<u64>) {
    scratch.clear();
    scratch.extend_from_slice(keys);
    let mut rest = &mut scratch[..];
    let mut missing = target;
    let last = loop {
        if rest.is_empty() {
            return;
        }
        let middle = rest.len() / 2;
        let (heavier, key, lighter) = rest.select_nth_unstable_by(middle, |a, b| b.cmp(a));
        let above = sum(heavier);
        if above >= missing && !heavier.is_empty() {
            rest = heavier;
            continue;
        }
        missing = missing.saturating_sub(above);
        let weight = u64::from(scan::number_of(*key));
        if weight >= missing {
            break *key;
        }
        missing -= weight;
        rest = lighter;
    };
    keys.retain(|key| *key >= last);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_heaviest_are_those_of_a_sort(weights in proptest::collection::vec(0u32..50, 1..200), share in 0.0f64..1.1) {
            let mut keys: Vec<u64> = weights.iter().zip(0..).map(|(weight, id)| scan::key(*weight, id)).collect();
            let target = (share * sum(&keys) as f64) as u64;
            let mut sorted = keys.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            let mut reached = 0;
            let enough = sorted.iter().position(|key| {
                reached += u64::from(scan::number_of(*key));
                reached >= target
            });
            sorted.truncate(enough.map_or(sorted.len(), |at| at + 1));
            keep_heaviest(&mut keys, target, &mut Vec::new());
            prop_assert!(keys.is_sorted_by_key(|key| scan::id_of(*key)), "in the order of ids");
            keys.sort_unstable_by(|a, b| b.cmp(a));
            prop_assert_eq!(keys, sorted);
        }
    }
}
