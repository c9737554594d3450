//! Which worker answers? A pure function of what is known, the request and one random number.
//!
//! The predicted time of a request is `queue + cold load + (prompt − cached prefix) ÷ prefill rate + expected output ÷
//! decode rate`, from speeds that were measured. A prefix that an engine has read before is a saving like any other:
//! it wins where it saves more than the queue costs.

use std::time::Duration;

use serde::{Deserialize, Serialize};

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
    /// Tokens of prompts that it has before it.
    pub backlog_tokens: u32,
    /// Tokens of this request's prompt that it has probably read before.
    pub cached_tokens: u32,
    /// Tokens of prompt a second; 0 where not measured yet.
    pub prefill_rate: f32,
    /// Tokens a second of one sequence alone; 0 where not measured yet.
    pub decode_rate: f32,
    /// Tokens a second of each sequence when all slots are taken; 0 where not measured.
    pub full_decode_rate: f32,
    /// How long until it is ready; zero where it is.
    pub ready_in: Duration,
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

/// The parts of a predicted time, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Until a slot is free and the prompts ahead are read.
    pub queue_s: f64,
    /// Until the model is loaded.
    pub load_s: f64,
    /// For the part of the prompt that is not cached.
    pub prompt_s: f64,
    /// For the answer.
    pub output_s: f64,
}

impl Estimate {
    /// All of it, in seconds.
    pub fn total_s(&self) -> f64 {
        self.queue_s + self.load_s + self.prompt_s + self.output_s
    }
}

impl Candidate {
    /// Requests that are there before this one.
    fn ahead(&self) -> u32 {
        self.running.saturating_add(self.waiting).max(self.in_flight)
    }

    /// Tokens a second of each of `together` sequences. A step's time grows evenly from one sequence to all slots.
    fn decode_rate_of(&self, together: u32) -> f64 {
        let alone = 1.0 / measured(self.decode_rate, UNMEASURED_DECODE);
        if self.full_decode_rate <= 0.0 || self.slots < 2 {
            return 1.0 / alone;
        }
        let full = (1.0 / f64::from(self.full_decode_rate)).max(alone);
        let share = f64::from(together.clamp(1, self.slots) - 1) / f64::from(self.slots - 1);
        1.0 / (alone + (full - alone) * share)
    }

    /// When it would have finished the request.
    pub fn estimate(&self, demand: Demand) -> Estimate {
        let prefill = measured(self.prefill_rate, UNMEASURED_PREFILL);
        let (ahead, slots) = (self.ahead(), self.slots.max(1));
        let prompt_s = f64::from(demand.prompt_tokens.saturating_sub(self.cached_tokens)) / prefill;
        let output_s = f64::from(demand.output_tokens) / self.decode_rate_of(ahead.saturating_add(1));
        // Those ahead are taken to be like this one: a slot comes free every (time of one) ÷ slots.
        let turns = f64::from((ahead.saturating_add(1)).saturating_sub(slots)) / f64::from(slots);
        let queue_s = turns * (prompt_s + output_s) + f64::from(self.backlog_tokens) / prefill;
        Estimate { queue_s, load_s: self.ready_in.as_secs_f64(), prompt_s, output_s }
    }
}

fn measured(rate: f32, assumed: f32) -> f64 {
    f64::from(if rate.is_finite() && rate > 0.0 { rate } else { assumed })
}

/// An engine that has not measured itself and has nothing to do is taken to be as fast as the best: it must be tried to
/// be known. With a request of ours on it, it waits for what that one shows.
pub fn assume_unmeasured(candidates: &mut [Candidate]) {
    let best =
        |of: fn(&Candidate) -> f32| candidates.iter().map(of).filter(|rate| rate.is_finite()).fold(0.0, f32::max);
    let (prefill, decode) = (best(|c| c.prefill_rate), best(|c| c.decode_rate));
    for candidate in candidates.iter_mut().filter(|candidate| candidate.ahead() == 0) {
        for (rate, best) in [(&mut candidate.prefill_rate, prefill), (&mut candidate.decode_rate, decode)] {
            if *rate == 0.0 {
                *rate = best;
            }
        }
    }
}

/// Picks the candidate that is predicted to finish first; among near-equals the less loaded of two drawn by
/// `random` (power of two choices), so that many gateways with the same news do not all run to one worker.
/// `excluded` nodes were tried before. Returns an index into `candidates`.
pub fn pick(candidates: &[Candidate], excluded: &[NodeId], demand: Demand, random: u64) -> Option<usize> {
    let timed: Vec<(usize, f64)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| !excluded.contains(&c.engine.node))
        .map(|(index, c)| (index, c.estimate(demand).total_s()))
        .collect();
    let best = timed.iter().map(|(_, time)| *time).min_by(f64::total_cmp)?;
    let near: Vec<(usize, f64)> = timed.into_iter().filter(|(_, time)| *time <= best * NEAR_EQUAL).collect();
    let count = near.len() as u64;
    let first = near[(random % count) as usize];
    let second = near[((random >> 32) % count) as usize];
    let load = |index: usize| {
        let c = &candidates[index];
        (u64::from(c.ahead()) * 1_000 / u64::from(c.slots.max(1)), !c.local)
    };
    Some(if load(second.0) < load(first.0) { second.0 } else { first.0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(node: u8, decode_rate: f32, running: u32) -> Candidate {
        Candidate {
            engine: EngineId { node: NodeId([node; 16]), index: 0, generation: 1 },
            local: false,
            in_flight: 0,
            running,
            waiting: 0,
            slots: 4,
            backlog_tokens: 0,
            cached_tokens: 0,
            prefill_rate: decode_rate * 5.0,
            decode_rate,
            full_decode_rate: 0.0,
            ready_in: Duration::ZERO,
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
    fn a_cached_prefix_is_worth_what_it_saves() {
        let long = Demand { prompt_tokens: 2_000, output_tokens: 10 };
        let mut knows = candidate(1, 50.0, 0);
        knows.cached_tokens = 1_900;
        assert_eq!(pick(&[knows.clone(), candidate(2, 50.0, 0)], &[], long, 0), Some(0));
        // Behind a long queue it is faster to read the prompt again elsewhere.
        knows.running = 40;
        knows.backlog_tokens = 20_000;
        assert_eq!(pick(&[knows, candidate(2, 50.0, 0)], &[], long, 0), Some(1));
    }

    #[test]
    fn company_costs_what_was_measured() {
        let mut gpu = candidate(1, 100.0, 0);
        (gpu.slots, gpu.full_decode_rate) = (16, 50.0);
        assert_eq!(gpu.decode_rate_of(1), 100.0);
        assert_eq!(gpu.decode_rate_of(16), 50.0);
        assert_eq!(gpu.decode_rate_of(99), 50.0);
        let free = candidate(1, 100.0, 3).estimate(DEMAND);
        assert_eq!((free.queue_s, free.load_s), (0.0, 0.0));
        assert!((free.total_s() - 1.2).abs() < 1e-6, "{free:?}");
        let full = candidate(1, 100.0, 4).estimate(DEMAND);
        assert!((full.queue_s - 0.3).abs() < 1e-6, "a slot comes free in a quarter of the time: {full:?}");
    }

    #[test]
    fn an_engine_that_nobody_knows_is_tried_by_one_request() {
        let mut two = [candidate(1, 100.0, 0), candidate(2, 0.0, 0)];
        assert_eq!(pick(&two, &[], DEMAND, 0), Some(0));
        assume_unmeasured(&mut two);
        assert_eq!((two[1].prefill_rate, two[1].decode_rate), (500.0, 100.0));
        let mut tried = [candidate(1, 100.0, 0), candidate(2, 0.0, 0)];
        tried[1].in_flight = 1;
        assume_unmeasured(&mut tried);
        assert_eq!(tried[1].decode_rate, 0.0);
    }

    #[test]
    fn a_model_that_must_be_loaded_first_loses_time() {
        let mut cold = candidate(1, 100.0, 0);
        cold.ready_in = Duration::from_secs(20);
        assert_eq!(pick(&[cold, candidate(2, 20.0, 0)], &[], DEMAND, 0), Some(1));
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

    fn any_candidate() -> impl Strategy<Value = Candidate> {
        let counts = (0..1_000u32, 0..1_000u32, 0..1_000u32, 0..64u32, any::<u32>(), any::<u32>());
        let rates = (any::<f32>(), any::<f32>(), any::<f32>(), 0..600_000u64);
        (0..5u8, counts, rates).prop_map(|(node, counts, rates)| Candidate {
            in_flight: counts.0,
            waiting: counts.2,
            slots: counts.3,
            backlog_tokens: counts.4,
            cached_tokens: counts.5,
            prefill_rate: rates.0,
            full_decode_rate: rates.2,
            ready_in: Duration::from_millis(rates.3),
            ..candidate(node, rates.1, counts.1)
        })
    }

    proptest! {
        #[test]
        fn whatever_engines_say_of_themselves_somebody_is_picked_who_was_not_tried(
            candidates in proptest::collection::vec(any_candidate(), 0..6),
            excluded in proptest::collection::vec(0..5u8, 0..3),
            prompt_tokens: u32, output_tokens: u32, random: u64,
        ) {
            let excluded: Vec<NodeId> = excluded.into_iter().map(|n| NodeId([n; 16])).collect();
            let demand = Demand { prompt_tokens, output_tokens };
            let picked = pick(&candidates, &excluded, demand, random);
            let able = candidates.iter().filter(|c| !excluded.contains(&c.engine.node)).count();
            prop_assert_eq!(picked.is_some(), able > 0);
            if let Some(index) = picked {
                prop_assert!(!excluded.contains(&candidates[index].engine.node));
                let time = candidates[index].estimate(demand).total_s();
                prop_assert!(!time.is_nan() && time >= 0.0);
                let best = candidates.iter().filter(|c| !excluded.contains(&c.engine.node))
                    .map(|c| c.estimate(demand).total_s()).min_by(f64::total_cmp).unwrap();
                prop_assert!(time <= best * NEAR_EQUAL);
            }
        }

        #[test]
        fn more_work_never_shortens_the_prediction(mut c in any_candidate(), more in 1..500u32) {
            c.slots = c.slots.max(1);
            let before = c.estimate(DEMAND).total_s();
            c.running = c.running.saturating_add(more);
            c.in_flight = c.in_flight.saturating_add(more);
            prop_assert!(c.estimate(DEMAND).total_s() >= before * 0.999_999);
        }
    }
}
