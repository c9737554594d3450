//! One gateway and its workers in simulated time: pulses, suspicion and routing as the product does them.

use std::time::Duration;

use ingle_protocol::liveness::{Health, PULSE_INTERVAL, PeerWatch};
use ingle_protocol::routing::{Candidate, Demand, pick};
use ingle_protocol::{EngineId, NodeId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::scenario::{Scenario, Worker};

/// What came of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Requests sent to each worker.
    pub sent: Vec<u32>,
    /// Requests sent to a worker while it was silent.
    pub sent_into_silence: u32,
    /// Requests for which no worker was there.
    pub refused: u32,
}

impl Outcome {
    /// Does the run hold what the scenario promises?
    pub fn check(&self, scenario: &Scenario) -> Result<(), String> {
        let total: u32 = self.sent.iter().sum();
        if scenario.expect.share.len() != self.sent.len() {
            return Err("`expect.share` needs one entry for each worker".into());
        }
        for (worker, (sent, [least, most])) in self.sent.iter().zip(&scenario.expect.share).enumerate() {
            let share = f64::from(*sent) / f64::from(total.max(1));
            if share < *least || share > *most {
                return Err(format!("worker {worker} got {share:.3} of {total} requests, not {least} to {most}"));
            }
        }
        if self.sent_into_silence > scenario.expect.most_sent_into_silence {
            return Err(format!("{} requests were sent to a silent worker", self.sent_into_silence));
        }
        Ok(())
    }
}

struct Peer<'a> {
    spec: &'a Worker,
    watch: PeerWatch,
    /// When each of its requests ends.
    busy_until: Vec<Duration>,
    /// What its last pulse said.
    running: u32,
}

impl Peer<'_> {
    fn is_silent(&self, now: Duration) -> bool {
        let from = self.spec.silent_from_ms.map(Duration::from_millis);
        let until = self.spec.silent_until_ms.map(Duration::from_millis);
        from.is_some_and(|from| now >= from) && until.is_none_or(|until| now < until)
    }
}

/// Runs a scenario once.
pub fn run(scenario: &Scenario, seed: u64) -> Outcome {
    let mut random = StdRng::seed_from_u64(seed);
    let mut peers: Vec<Peer<'_>> = scenario
        .workers
        .iter()
        .map(|spec| {
            let mut watch = PeerWatch::default();
            watch.connected(Duration::ZERO);
            Peer { spec, watch, busy_until: Vec::new(), running: 0 }
        })
        .collect();
    let mut outcome = Outcome { sent: vec![0; peers.len()], sent_into_silence: 0, refused: 0 };
    let demand = Demand { prompt_tokens: scenario.prompt_tokens, output_tokens: scenario.output_tokens };
    let end = Duration::from_millis(scenario.duration_ms);
    let (mut now, mut next_pulse) = (Duration::ZERO, Duration::ZERO);
    loop {
        let gap = -random.random_range(f64::MIN_POSITIVE..1.0).ln() / scenario.requests_per_second;
        let arrival = now + Duration::from_secs_f64(gap);
        while next_pulse <= arrival {
            for peer in &mut peers {
                peer.busy_until.retain(|until| *until > next_pulse);
                if !peer.is_silent(next_pulse) {
                    peer.running = peer.busy_until.len() as u32;
                    peer.watch.pulse(next_pulse);
                }
            }
            next_pulse += PULSE_INTERVAL;
        }
        now = arrival;
        if now >= end {
            return outcome;
        }
        let alive: Vec<usize> =
            (0..peers.len()).filter(|index| peers[*index].watch.health(now) == Health::Alive).collect();
        let candidates: Vec<Candidate> = alive.iter().map(|index| candidate(*index, &peers[*index], now)).collect();
        match pick(&candidates, &[], demand, random.random()) {
            Some(chosen) => {
                let index = alive[chosen];
                let peer = &mut peers[index];
                outcome.sent[index] += 1;
                outcome.sent_into_silence += u32::from(peer.is_silent(now));
                let service = f64::from(scenario.prompt_tokens) / f64::from(peer.spec.prefill_rate)
                    + f64::from(scenario.output_tokens) / f64::from(peer.spec.decode_rate);
                peer.busy_until.push(now + Duration::from_secs_f64(service));
            }
            None => outcome.refused += 1,
        }
    }
}

fn candidate(index: usize, peer: &Peer<'_>, now: Duration) -> Candidate {
    Candidate {
        engine: EngineId { node: NodeId([index as u8; 16]), index: 0, generation: 1 },
        local: false,
        // The gateway's own count knows at once what the pulse says a moment later.
        in_flight: peer.busy_until.iter().filter(|until| **until > now).count() as u32,
        running: peer.running,
        waiting: 0,
        slots: peer.spec.slots,
        backlog_tokens: 0,
        cached_tokens: 0,
        prefill_rate: peer.spec.prefill_rate,
        decode_rate: peer.spec.decode_rate,
        full_decode_rate: 0.0,
        ready_in: Duration::ZERO,
    }
}
