//! A first run of the engine before it answers anybody: it fills caches and measures the rates that routing begins
//! with: reading a prompt, one sequence alone, all slots together.

use std::time::Instant;

use crate::snapshot::Shared;
use crate::{Draw, EngineError, StepEngine, StepEntry};

/// Single tokens after the chunk; the fastest counts, as the others may have been disturbed.
const DECODES: u32 = 3;

pub(super) fn warm_up(engine: &mut dyn StepEngine, shared: &Shared) -> Result<(), EngineError> {
    let capabilities = engine.capabilities().clone();
    // First, so that what is measured is the work and not the compiler.
    compile(engine)?;
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

/// Has an engine compile what steps of its shapes need, each on its own and with the choice of a token.
fn compile(engine: &mut dyn StepEngine) -> Result<(), EngineError> {
    let capabilities = engine.capabilities().clone();
    let greedy = Draw { inverse_temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, random: 0 };
    for count in engine.shapes().to_vec() {
        let count = count.min(capabilities.context_length);
        engine.assign(0, &(0..capabilities.blocks).collect::<Vec<_>>(), 0)?;
        let entry = |position: u32| StepEntry { token: position % capabilities.vocabulary.max(1), slot: 0, position };
        let entries: Vec<StepEntry> = (0..count).map(entry).collect();
        // As many answers as there are entries, at most: what they ask for has shapes as well.
        let want: Vec<usize> = (0..count.min(capabilities.slots) as usize).collect();
        engine.step_and_draw(&entries, &want, &vec![Some(greedy); want.len()])?;
        engine.release(0);
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
