//! A first run of the engine before it answers anybody: it fills caches and measures the rates that routing begins
//! with: reading a prompt, one sequence alone, all slots together.

use std::time::Instant;

use crate::snapshot::Shared;
use crate::{EngineError, StepEngine, StepEntry};

/// Single tokens after the chunk; the fastest counts, as the others may have been disturbed.
const DECODES: u32 = 3;

pub(super) fn warm_up(engine: &mut dyn StepEngine, shared: &Shared) -> Result<(), EngineError> {
    let capabilities = engine.capabilities().clone();
    let chunk = capabilities.chunk.min(capabilities.context_length.saturating_sub(DECODES)).max(1);
    let vocabulary = capabilities.vocabulary.max(1);
    let entry = |position: u32| StepEntry { token: position % vocabulary, slot: 0, position };
    let prompt: Vec<StepEntry> = (0..chunk).map(entry).collect();
    // Nobody else has any yet.
    engine.assign(0, &(0..capabilities.blocks).collect::<Vec<_>>(), 0)?;
    let started = Instant::now();
    let logits = engine.step(&prompt, &[prompt.len() - 1])?;
    if logits.row(0).iter().all(|logit| logit.is_nan()) {
        return Err(EngineError::Step("the model computes no numbers; its file is damaged".into()));
    }
    shared.observe_prefill(chunk as f32 / started.elapsed().as_secs_f32());
    let slots = capabilities.slots.max(1);
    let mut best = f32::INFINITY;
    for position in chunk..(chunk + DECODES).min(capabilities.context_length) {
        let started = Instant::now();
        engine.step(&[entry(position)], &[0])?;
        best = best.min(started.elapsed().as_secs_f32());
    }
    engine.release(0);
    shared.observe_decode(best, 1, slots);
    if slots > 1 && (capabilities.blocks == 0 || capabilities.blocks >= slots) {
        shared.observe_decode(full_step(engine, slots)?, slots, slots);
    }
    Ok(())
}

/// Seconds of the faster of two steps with a token of every slot.
fn full_step(engine: &mut dyn StepEngine, slots: u32) -> Result<f32, EngineError> {
    for slot in 0..slots {
        engine.assign_share(slot)?;
    }
    let want: Vec<usize> = (0..slots as usize).collect();
    let mut best = f32::INFINITY;
    for position in 0..2.min(engine.capabilities().context_length) {
        let token = position % engine.capabilities().vocabulary.max(1);
        let entries: Vec<StepEntry> = (0..slots).map(|slot| StepEntry { token, slot, position }).collect();
        let started = Instant::now();
        engine.step(&entries, &want)?;
        best = best.min(started.elapsed().as_secs_f32());
    }
    (0..slots).for_each(|slot| engine.release(slot));
    Ok(best)
}
