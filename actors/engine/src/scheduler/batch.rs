//! What is computed in one step: one token of every answer that runs, and as much of waiting prompts as the answers
//! can stand.

use super::sequence::Sequence;
use crate::StepEntry;

/// A prompt's part of a step, however slow the machine.
const LEAST_CHUNK: usize = 8;
/// Time for prompts in a step, as a multiple of the time that the answers alone take: with it a step stays well
/// below three times that.
const SHARE: f32 = 1.5;

/// One step.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub entries: Vec<StepEntry>,
    /// Entries whose logits are wanted.
    pub want: Vec<usize>,
    /// The sequences that they belong to.
    pub wanting: Vec<usize>,
    /// Tokens of prompts.
    pub prefilled: usize,
}

/// Tokens of prompts for one step. `prefill_rate` in tokens a second and `decode_rate` in steps a second, 0 where
/// they are not known.
pub(super) fn prefill_budget(chunk: usize, decodes: bool, prefill_rate: f32, decode_rate: f32) -> usize {
    if !decodes || prefill_rate <= 0.0 || decode_rate <= 0.0 {
        return chunk;
    }
    ((SHARE * prefill_rate / decode_rate) as usize).clamp(LEAST_CHUNK.min(chunk), chunk)
}

impl Batch {
    /// Prompts take turns, so that a short one does not wait for a long one: those first whose last chunk is longest
    /// ago.
    pub fn of(running: &[Sequence], mut budget: usize) -> Self {
        let mut batch = Self::default();
        let computable = || running.iter().enumerate().filter(|(_, sequence)| sequence.is_computable());
        for (index, sequence) in computable().filter(|(_, sequence)| sequence.left() == 1) {
            batch.add(index, sequence, 1);
        }
        let mut prompts: Vec<(usize, &Sequence)> = computable().filter(|(_, sequence)| sequence.left() > 1).collect();
        prompts.sort_by_key(|(_, sequence)| sequence.last_chunk);
        for (index, sequence) in prompts {
            let tokens = sequence.left().min(budget);
            if tokens == 0 {
                break;
            }
            batch.add(index, sequence, tokens);
            batch.prefilled += tokens;
            budget -= tokens;
        }
        batch
    }

    fn add(&mut self, index: usize, sequence: &Sequence, count: usize) {
        let tokens = sequence.next_tokens(count);
        for (token, position) in tokens.iter().zip(sequence.computed as u32..) {
            self.entries.push(StepEntry { token: *token, slot: sequence.slot, position });
        }
        if tokens.len() == sequence.left() {
            self.want.push(self.entries.len() - 1);
            self.wanting.push(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_get_what_answers_can_stand() {
        assert_eq!(prefill_budget(256, false, 900.0, 100.0), 256);
        assert_eq!(prefill_budget(256, true, 0.0, 0.0), 256);
        // A step of 10 ms, so 15 ms of prompts.
        assert_eq!(prefill_budget(256, true, 1000.0, 100.0), 15);
        assert_eq!(prefill_budget(256, true, 10.0, 100.0), 8);
        assert_eq!(prefill_budget(4, true, 10.0, 100.0), 4);
        assert_eq!(prefill_budget(256, true, 1e9, 1.0), 256);
    }
}
