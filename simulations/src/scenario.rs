//! What a scenario file says.

use serde::Deserialize;

/// One scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in a sentence.
    pub shows: String,
    /// Every seed is one run.
    pub seeds: Vec<u64>,
    /// Simulated milliseconds.
    pub duration_ms: u64,
    /// The machines that answer.
    pub workers: Vec<Worker>,
    /// Requests a second, with exponentially distributed gaps.
    pub requests_per_second: f64,
    /// Tokens of prompt and answer of each request.
    pub prompt_tokens: u32,
    /// See `prompt_tokens`.
    pub output_tokens: u32,
    /// What must hold at the end of each run.
    pub expect: Expect,
}

/// One machine.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// Tokens of prompt a second.
    pub prefill_rate: f32,
    /// Tokens a second of each sequence.
    pub decode_rate: f32,
    /// Sequences at a time.
    pub slots: u32,
    /// It falls silent at this moment, without closing its connection.
    #[serde(default)]
    pub silent_from_ms: Option<u64>,
    /// And is heard again from this moment on.
    #[serde(default)]
    pub silent_until_ms: Option<u64>,
}

/// What must hold.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// The share of requests that each worker gets lies in these bounds.
    pub share: Vec<[f64; 2]>,
    /// The most requests that were sent to a worker while it was silent.
    pub most_sent_into_silence: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world;

    #[test]
    fn every_scenario_holds_for_every_seed() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");
        let mut ran = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            // Folders have scenarios of other worlds.
            if path.is_dir() {
                continue;
            }
            let scenario: Scenario = toml::from_str(&std::fs::read_to_string(&path).unwrap())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            for seed in &scenario.seeds {
                let outcome = world::run(&scenario, *seed);
                outcome.check(&scenario).unwrap_or_else(|why| {
                    panic!("{} with seed {seed}: {why}\n{} — {outcome:?}", path.display(), scenario.shows)
                });
                // The same seed gives the same run, or a failing seed would be worth nothing.
                assert_eq!(outcome, world::run(&scenario, *seed), "{} seed {seed}", path.display());
                ran += 1;
            }
        }
        assert!(ran > 0, "no scenario was found");
    }
}
