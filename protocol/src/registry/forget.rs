//! Removals that nobody needs to remember any more.
//!
//! A removed model leaves an entry behind, so that a node which did not hear of the removal learns of it and does not
//! bring the model back. Whoever was in touch with the others since has it. So after [`REMEMBERED_MS`] it is forgotten:
//! a partition, or a machine that is switched off, may last as long without anything coming back. A machine that was
//! away for longer, or that was put back from a copy that is older, brings what it still has of removed models along.
//!
//! Nodes do not forget at the same moment, and one that has may register the name anew while another still remembers
//! what was removed under it. Then the two must not be mixed. So what *could* be forgotten by somebody whose clock is
//! [`SLACK_MS`] ahead is already taken for gone wherever entries come together.

use super::{Entry, Record, Registry, RegistryError};

/// How long a removal is remembered, in milliseconds: 90 days by the clocks of its writer and of whoever forgets.
pub const REMEMBERED_MS: u64 = 90 * DAY_MS;
/// How far the clocks of a household's machines may be apart. (Certificates need them far closer.)
pub const SLACK_MS: u64 = DAY_MS;
/// Times before this one (2020) are those of a clock that was not set: nothing is said by them.
const CLOCKS_BEGIN_MS: u64 = 1_577_836_800_000;

const DAY_MS: u64 = 86_400_000;

impl Record {
    /// It was removed, and its last change is so long ago.
    fn is_over(&self, age_ms: u64, now_ms: u64) -> bool {
        let changed = self.changed().map_or(0, |at| at.counter);
        // A counter is not below its writer's clock, so it may only make it younger than it is.
        self.is_removed() && changed >= CLOCKS_BEGIN_MS && changed.saturating_add(age_ms) <= now_ms
    }
}

impl Registry {
    /// Forgets removals that are older than [`REMEMBERED_MS`]. Says which.
    pub fn forget(&mut self, now_ms: u64) -> Vec<String> {
        let over = self.models.values().filter(|record| record.is_over(REMEMBERED_MS + SLACK_MS, now_ms));
        let over: Vec<String> = over.map(|record| record.name().to_owned()).collect();
        self.models.retain(|name, _| !over.contains(name));
        over
    }

    /// [`Registry::merge`] at `now_ms`: a removal that others may have forgotten is none any more, on either side.
    pub fn merge_at(&mut self, entry: &Entry, now_ms: u64) -> Result<bool, RegistryError> {
        let Entry::Model(theirs) = entry else { return self.merge(entry) };
        entry.check()?;
        if theirs.is_over(REMEMBERED_MS, now_ms) {
            return Ok(false);
        }
        let ours = self.models.get(theirs.name());
        if ours.is_some_and(|ours| ours.is_over(REMEMBERED_MS, now_ms)) {
            let before = self.models.remove(theirs.name());
            let merged = self.merge(entry);
            if merged.is_err() {
                self.models.extend(before.map(|record| (record.name().to_owned(), record)));
            }
            return merged;
        }
        self.merge(entry)
    }
}
