//! The choice of the next token. Randomness is a function of (seed, position) alone, so that an answer that goes
//! on elsewhere draws the numbers that it would have drawn here.

use ingle_protocol::wire::v1::Sampling;

/// Chooses from one row of logits. `position` is the token's place in the answer. `None` where no logit is a
/// number.
pub fn sample(logits: &[f32], sampling: &Sampling, position: u32) -> Option<u32> {
    let best = greedy(logits)?;
    let temperature = f64::from(sampling.temperature);
    let greatest = f64::from(logits[best as usize]);
    if temperature <= 0.0 || greatest.is_infinite() {
        return Some(best);
    }
    let weight = |logit: f32| ((f64::from(logit) - greatest) / temperature).exp();
    let total: f64 = logits.iter().copied().filter(|logit| !logit.is_nan()).map(weight).sum();
    let top_p = f64::from(sampling.top_p);
    // Nothing below this can be among the fewest tokens that reach `top_p`: all such tokens together do not make
    // up what is left over. So only a few have to be sorted.
    let floor = if top_p < 1.0 { total * (1.0 - top_p) / logits.len() as f64 } else { 0.0 };
    let mut candidates: Vec<(u32, f64)> = (0u32..)
        .zip(logits)
        .filter(|(_, logit)| !logit.is_nan())
        .map(|(id, logit)| (id, weight(*logit)))
        .filter(|(_, weight)| *weight > floor)
        .collect();
    let mut sum = total;
    if top_p < 1.0 {
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sum = 0.0;
        let mut kept = 0;
        for (_, weight) in &candidates {
            sum += weight;
            kept += 1;
            if sum >= top_p * total {
                break;
            }
        }
        candidates.truncate(kept);
    }
    let mut left = uniform(sampling.seed, position) * sum;
    for (id, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return Some(*id);
        }
    }
    // Rounding left a little over: the last that could have been meant.
    candidates.last().map(|(id, _)| *id).or(Some(best))
}

/// The token with the greatest logit, the lowest id among equals.
fn greedy(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, logit) in (0u32..).zip(logits.iter().copied()) {
        if !logit.is_nan() && best.is_none_or(|(_, greatest)| logit > greatest) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id)
}

/// A number in [0, 1) from (seed, position): two rounds of SplitMix64's finalizer, which spreads every bit.
fn uniform(seed: u64, position: u32) -> f64 {
    let mixed = mix(mix(seed) ^ (u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_p: f32, seed: u64) -> Sampling {
        Sampling { temperature, top_p, seed, max_tokens: None, stop: vec![] }
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest() {
        assert_eq!(sample(&[0.0, 2.0, 2.0, f32::NAN], &sampling(0.0, 1.0, 1), 0), Some(1));
        assert_eq!(sample(&[f32::NAN], &sampling(0.0, 1.0, 1), 0), None);
        assert_eq!(sample(&[f32::NEG_INFINITY, 0.0], &sampling(5.0, 1.0, 1), 0), Some(1));
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        let mut counts = [0u32; 3];
        for position in 0..20_000 {
            counts[sample(&logits, &sampling(1.0, 1.0, 42), position).unwrap() as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([0.6, 0.3, 0.1]) {
            let share = f64::from(count) / 20_000.0;
            assert!((share - expected).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let drawn = |top_p| {
            let mut ids: Vec<u32> = (0..2_000).map(|p| sample(&logits, &sampling(1.0, top_p, 7), p).unwrap()).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(drawn(0.5), [1]);
        assert_eq!(drawn(0.85), [1, 2]);
        assert_eq!(drawn(0.95), [0, 1, 2]);
        assert_eq!(drawn(1e-6), [1]);
    }

    #[test]
    fn the_same_seed_and_position_draw_the_same() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
        let draw = |seed| (0..50).map(|p| sample(&logits, &sampling(1.0, 0.9, seed), p)).collect::<Vec<_>>();
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
