//! Which worker answers? A pure function of what is known, the request and one random number.

use std::time::Duration;

use crate::{EngineId, NodeId};

/// What the router knows of one engine that could answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The engine.
    pub engine: EngineId,
    /// It runs on the node that decides.
    pub local: bool,
    /// Requests that this router has there now and that the engine's own numbers may not show yet.
    pub in_flight: u32,
    /// Sequences that it decodes now, by its last word.
    pub running: u32,
    /// Sequences that wait there, by its last word.
    pub waiting: u32,
    /// Sequences that it can decode together.
    pub slots: u32,
    /// Tokens of prompt a second; 0 where not measured yet.
    pub prefill_rate: f32,
    /// Tokens a second of one sequence; 0 where not measured yet.
    pub decode_rate: f32,
}

/// What the choice needs to know of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Estimated tokens of prompt (a gateway has no tokenizer).
    pub prompt_tokens: u32,
    /// Expected tokens of answer.
    pub output_tokens: u32,
}

/// Rates assumed for an engine that has not measured itself yet: a slow CPU, so that it is tried but not preferred.
const UNMEASURED_PREFILL: f32 = 100.0;
const UNMEASURED_DECODE: f32 = 10.0;
/// Candidates within this share of the best predicted time count as equal.
const NEAR_EQUAL: f64 = 1.15;

/// Predicted time until `candidate` has finished the request:
/// `queue + prompt / prefill rate + output / decode rate`, the queue being the rounds of requests ahead of it.
pub fn predicted_time(candidate: &Candidate, demand: Demand) -> Duration {
    let or = |measured: f32, assumed: f32| f64::from(if measured > 0.0 { measured } else { assumed });
    let own = f64::from(demand.prompt_tokens) / or(candidate.prefill_rate, UNMEASURED_PREFILL)
        + f64::from(demand.output_tokens) / or(candidate.decode_rate, UNMEASURED_DECODE);
    let ahead = candidate.running.saturating_add(candidate.waiting).max(candidate.in_flight);
    let rounds = f64::from(ahead) / f64::from(candidate.slots.max(1));
    Duration::try_from_secs_f64(own * (1.0 + rounds)).unwrap_or(Duration::MAX)
}

/// Picks the candidate that is predicted to finish first; among near-equals the less loaded of two drawn by
/// `random` (power of two choices), so that many gateways with the same news do not all run to one worker.
/// `excluded` nodes were tried before. Returns an index into `candidates`.
pub fn pick(candidates: &[Candidate], excluded: &[NodeId], demand: Demand, random: u64) -> Option<usize> {
    let timed: Vec<(usize, f64)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| !excluded.contains(&c.engine.node))
        .map(|(index, c)| (index, predicted_time(c, demand).as_secs_f64()))
        .collect();
    let best = timed.iter().map(|(_, time)| *time).min_by(f64::total_cmp)?;
    let near: Vec<(usize, f64)> = timed.into_iter().filter(|(_, time)| *time <= best * NEAR_EQUAL).collect();
    let count = near.len() as u64;
    let first = near[(random % count) as usize];
    let second = near[((random >> 32) % count) as usize];
    let load = |index: usize| {
        let c = &candidates[index];
        (c.running.saturating_add(c.waiting).max(c.in_flight), !c.local)
    };
    Some(if load(second.0) < load(first.0) { second.0 } else { first.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(node: u8, decode_rate: f32, running: u32) -> Candidate {
        Candidate {
            engine: EngineId { node: NodeId([node; 16]), index: 0, generation: 1 },
            local: false,
            in_flight: 0,
            running,
            waiting: 0,
            slots: 4,
            prefill_rate: decode_rate * 5.0,
            decode_rate,
        }
    }

    const DEMAND: Demand = Demand { prompt_tokens: 100, output_tokens: 100 };

    #[test]
    fn the_faster_machine_wins_until_its_queue_eats_the_lead() {
        let idle = [candidate(1, 10.0, 0), candidate(2, 100.0, 0)];
        let busy = [candidate(1, 10.0, 0), candidate(2, 100.0, 60)];
        for random in 0..64u64 {
            assert_eq!(pick(&idle, &[], DEMAND, random << 32 | random), Some(1));
            assert_eq!(pick(&busy, &[], DEMAND, random << 32 | random), Some(0));
        }
    }

    #[test]
    fn tried_nodes_are_left_out_and_nobody_is_an_answer() {
        let two = [candidate(1, 10.0, 0), candidate(2, 100.0, 0)];
        assert_eq!(pick(&two, &[NodeId([2; 16])], DEMAND, 7), Some(0));
        assert_eq!(pick(&two, &[NodeId([2; 16]), NodeId([1; 16])], DEMAND, 7), None);
        assert_eq!(pick(&[], &[], DEMAND, 7), None);
    }

    #[test]
    fn equals_share_the_work() {
        let equals = [candidate(1, 50.0, 0), candidate(2, 50.0, 0), candidate(3, 50.0, 0)];
        let mut picked = [0; 3];
        for random in 0..300u64 {
            let spread = random.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            picked[pick(&equals, &[], DEMAND, spread).unwrap()] += 1;
        }
        assert!(picked.iter().all(|n| *n > 50), "{picked:?}");
    }

    #[test]
    fn unmeasured_engines_are_finite() {
        let fresh = candidate(1, 0.0, 0);
        assert!(predicted_time(&fresh, DEMAND) < Duration::from_secs(60));
    }
}
