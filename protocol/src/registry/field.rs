//! Values that several nodes may write at a time: who wrote what when, and who knew of what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// When something was written, and where. The counter is greater than every one that the writer knew (Lamport), and
/// not below its clock in milliseconds: so it also orders what nodes wrote that knew nothing of each other, and a node
/// whose state was put back from a copy does not count through the same numbers again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The counter.
    pub counter: u64,
    /// The writer.
    pub node: NodeId,
}

/// The latest write of each node that is known here. Who knows one of them knew all before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seen(BTreeMap<NodeId, u64>);

impl Seen {
    /// The write is known.
    pub fn covers(&self, at: Stamp) -> bool {
        self.0.get(&at.node).is_some_and(|latest| at.counter <= *latest)
    }

    /// Knows of the write from now on.
    pub fn note(&mut self, at: Stamp) {
        let latest = self.0.entry(at.node).or_default();
        *latest = at.counter.max(*latest);
    }

    /// Knows what the other knows, too.
    pub fn merge(&mut self, other: &Self) {
        for (node, counter) in &other.0 {
            self.note(Stamp { counter: *counter, node: *node });
        }
    }

    /// The highest counter; 0 where nothing is known.
    pub fn highest(&self) -> u64 {
        self.0.values().copied().max().unwrap_or(0)
    }

    /// How many nodes wrote.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A value as somebody wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Written<T> {
    /// The value.
    pub value: T,
    /// When and by whom.
    pub at: Stamp,
}

/// One value. The last writer's holds. What another node wrote that did not know of that stands behind it until
/// somebody who sees both writes the field again: it does not hold, but it is not lost in silence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Field<T> {
    /// The latest first. Of those behind it none knew of another one here.
    versions: Vec<Written<T>>,
}

impl<T> Default for Field<T> {
    fn default() -> Self {
        Self { versions: Vec::new() }
    }
}

impl<T: Ord + Clone> Field<T> {
    /// What holds, with its writer.
    pub fn latest(&self) -> Option<&Written<T>> {
        self.versions.first()
    }

    /// What holds.
    pub fn value(&self) -> Option<&T> {
        self.latest().map(|written| &written.value)
    }

    /// Other values that were written at the same time and do not hold.
    pub fn overruled(&self) -> impl Iterator<Item = &Written<T>> {
        self.versions.iter().skip(1).filter(|written| Some(&written.value) != self.value())
    }

    /// All that stands here, the latest first.
    pub fn versions(&self) -> &[Written<T>] {
        &self.versions
    }

    /// Nothing stands here.
    pub fn is_empty(&self) -> bool {
        self.versions.is_empty()
    }

    /// Writes the value, knowing everything that stands here.
    pub(super) fn write(&mut self, value: T, at: Stamp) {
        self.versions = vec![Written { value, at }];
    }

    /// Takes everything away that stands here.
    pub(super) fn clear(&mut self) {
        self.versions.clear();
    }

    /// What both sides have, and what one has that the other has not seen. A write that the other side has seen and no
    /// longer has was replaced there. That makes it commutative, associative and idempotent: to each write a side has
    /// not seen it, has it, or had it, and the later of these goes on.
    pub(super) fn merge(&mut self, seen: &Seen, other: &Self, other_seen: &Seen) {
        let has = |versions: &[Written<T>], at: Stamp| versions.iter().any(|written| written.at == at);
        let mut kept: BTreeMap<Stamp, &T> = BTreeMap::new();
        let ours = self.versions.iter().filter(|w| has(&other.versions, w.at) || !other_seen.covers(w.at));
        let theirs = other.versions.iter().filter(|w| has(&self.versions, w.at) || !seen.covers(w.at));
        for written in ours.chain(theirs) {
            // One stamp has one value, unless a state directory was copied: then any rule will do, if it is one.
            let value = kept.entry(written.at).or_insert(&written.value);
            *value = (*value).max(&written.value);
        }
        let versions = kept.into_iter().rev().map(|(at, value)| Written { value: value.clone(), at }).collect();
        self.versions = versions;
    }

    /// [`Self::merge`] for a value that is never taken away. Each side may know of what the other has and not have it:
    /// where a node's state was put back from a copy and it wrote something before it heard of the others, its writes
    /// seem to cover what it has lost. Then the last write is it.
    pub(super) fn merge_kept(&mut self, seen: &Seen, other: &Self, other_seen: &Seen) {
        let latest = self.latest().into_iter().chain(other.latest());
        let last = latest.max_by_key(|written| (written.at, written.value.clone())).cloned();
        self.merge(seen, other, other_seen);
        if self.versions.is_empty() {
            self.versions.extend(last);
        }
    }

    /// The versions are in order and all of them are seen: what every honest side keeps to.
    pub(super) fn is_sound(&self, seen: &Seen) -> bool {
        self.versions.is_sorted_by(|a, b| a.at > b.at) && self.versions.iter().all(|written| seen.covers(written.at))
    }
}
