//! Where a model belongs: which of the machines that are there takes it first, and which one takes a second copy.
//!
//! Nobody is in charge. Every node judges by what all nodes tell of themselves, so all come to the same order, and each
//! acts for itself alone: the first in the order at once, the others one after the other where nothing has happened. Two
//! who act at the same time because their views differ cost memory for a copy too many, and no request.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::NodeId;

/// How much longer each one in the order waits than the one before it.
pub const STAGGER: Duration = Duration::from_secs(3);
/// How long a model may be nowhere because a machine failed to load it for another reason than memory, until the next
/// one tries: that machine tries again itself, and most such reasons (a source that is away) hold for all.
pub const AFTER_FAILURE: Duration = Duration::from_secs(90);
/// How much longer all copies of a model must have been busy than not until there is another one.
pub const BUSY_FOR: Duration = Duration::from_secs(10);
/// Time between two looks that counts at most.
const MOST_UNSEEN: Duration = Duration::from_secs(2);
/// Two machines whose speeds differ by less than this factor are as good as each other.
const NEAR: f64 = 1.2;

/// How a machine has a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// Not.
    None,
    /// Known there; a request loads it.
    There,
    /// On its way.
    Coming,
    /// It answers.
    Ready,
    /// It answers, and everything that it can do at once is taken.
    Busy,
    /// There was no room for it.
    NoRoom,
    /// It failed for another reason.
    Failed,
}

/// A machine that could have a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub node: NodeId,
    /// Bytes a second that it reads from memory, measured when it started: what bounds the tokens a second of an
    /// answer. 0 where not known.
    pub bandwidth: u64,
    /// It computes on a graphics card.
    pub on_card: bool,
    /// Bytes of memory that models could have there, those that may go included; `None` where not known.
    pub room: Option<u64>,
    /// It has the file.
    pub has_file: bool,
    /// It takes models that nobody has pinned to it.
    pub takes: bool,
    /// Answers that it writes, and requests that wait there, of all models.
    pub work: u32,
    /// How it has this one.
    pub copy: Copy,
}

impl Candidate {
    fn has_room(&self, bytes: Option<u64>) -> bool {
        match (self.room, bytes) {
            (Some(room), Some(bytes)) => bytes <= room,
            _ => true,
        }
    }

    /// Speeds that are near each other have the same grade. (Grades and not a comparison within a factor, which would
    /// be no order.)
    fn grade(&self) -> i32 {
        match self.bandwidth {
            0 => 0,
            bandwidth => ((bandwidth as f64).ln() / NEAR.ln()).round() as i32,
        }
    }

    /// Better ones are smaller: a card before none, the faster before the slower, of near equals who has the file,
    /// then who does less.
    fn key(&self) -> (bool, std::cmp::Reverse<i32>, bool, u32, std::cmp::Reverse<u64>, NodeId) {
        let (grade, exact) = (std::cmp::Reverse(self.grade()), std::cmp::Reverse(self.bandwidth));
        (!self.on_card, grade, !self.has_file, self.work, exact, self.node)
    }
}

/// The machines that could take a model of so many bytes, the best first.
pub fn order(candidates: &[Candidate], bytes: Option<u64>) -> Vec<Candidate> {
    let could = |one: &&Candidate| one.takes && !matches!(one.copy, Copy::NoRoom | Copy::Failed) && one.has_room(bytes);
    let mut order: Vec<Candidate> = candidates.iter().filter(could).copied().collect();
    order.sort_by_key(Candidate::key);
    order
}

/// Why a machine is to load a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No machine has it.
    Nowhere,
    /// All who have it are busy, and this one does nothing.
    Busy,
}

#[derive(Debug, Clone, Copy, Default)]
struct Since {
    /// Since when nobody could answer, or load it for who asks.
    nowhere: Option<Duration>,
    /// Since when somebody fails to load it: trying again in between does not count.
    failed: Option<Duration>,
    /// Time in which all copies were busy less that in which they were not, never below zero.
    busy: Duration,
    /// When that was last counted.
    counted: Option<Duration>,
}

/// What a node remembers to judge by: since when models are nowhere, how long they were busy everywhere. The time is the
/// caller's.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    since: BTreeMap<String, Since>,
}

impl Placement {
    /// Models that are no longer of interest.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.since.retain(|model, _| keep(model));
    }

    /// Whether `own` is to load the model now, of so many bytes where that is known. `more`: second copies are wanted.
    pub fn judge(
        &mut self,
        model: &str,
        candidates: &[Candidate],
        bytes: Option<u64>,
        own: NodeId,
        more: bool,
        now: Duration,
    ) -> Option<Reason> {
        let any = |copies: &[Copy]| candidates.iter().any(|one| copies.contains(&one.copy));
        let is_somewhere = any(&[Copy::There, Copy::Ready, Copy::Busy]);
        let is_coming = any(&[Copy::Coming]);
        let is_busy = any(&[Copy::Busy]) && !any(&[Copy::Ready, Copy::Coming]);
        let since = self.since.entry(model.to_owned()).or_default();
        if is_somewhere {
            (since.nowhere, since.failed) = (None, None);
        } else if !is_coming {
            since.nowhere.get_or_insert(now);
        }
        if any(&[Copy::Failed]) && !is_somewhere {
            since.failed.get_or_insert(now);
        }
        // Where nobody has looked for a while, nobody knows how it was.
        let passed = now.saturating_sub(since.counted.replace(now).unwrap_or(now)).min(MOST_UNSEEN);
        since.busy = match is_busy {
            true => (since.busy + passed).min(BUSY_FOR * 2),
            false => since.busy.saturating_sub(passed),
        };
        let (from, order, reason) = match *since {
            Since { nowhere: Some(from), failed, .. } if !is_coming => {
                let from = failed.map_or(from, |failed| failed + AFTER_FAILURE);
                (from, order(candidates, bytes), Reason::Nowhere)
            }
            Since { busy, .. } if more && is_busy && busy >= BUSY_FOR => {
                let mut order = order(candidates, bytes);
                order.retain(|one| one.work == 0 && matches!(one.copy, Copy::None | Copy::There));
                (now.saturating_sub(busy - BUSY_FOR), order, Reason::Busy)
            }
            _ => return None,
        };
        let place = order.iter().position(|one| one.node == own)?;
        let patience = STAGGER.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX));
        (now >= from.saturating_add(patience)).then_some(reason)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(number: u8) -> NodeId {
        NodeId([number; 16])
    }

    fn candidate(number: u8, gigabytes_per_second: u64) -> Candidate {
        Candidate {
            node: node(number),
            bandwidth: gigabytes_per_second * 1_000_000_000,
            on_card: false,
            room: Some(8_000),
            has_file: false,
            takes: true,
            work: 0,
            copy: Copy::None,
        }
    }

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn ids(order: &[Candidate]) -> Vec<u8> {
        order.iter().map(|one| one.node.0[0]).collect()
    }

    #[test]
    fn the_fastest_with_room_comes_first_and_near_equals_are_told_apart_by_the_file() {
        let [mini, tower, mut laptop] = [candidate(1, 20), candidate(2, 60), candidate(3, 61)];
        assert_eq!(ids(&order(&[mini, tower, laptop], None)), [3, 2, 1]);
        let with_file = Candidate { has_file: true, ..tower };
        assert_eq!(ids(&order(&[mini, with_file, laptop], None)), [2, 3, 1]);
        let card = Candidate { on_card: true, ..mini };
        assert_eq!(ids(&order(&[card, with_file, laptop], None)), [1, 2, 3]);
        laptop.room = Some(10);
        assert_eq!(ids(&order(&[mini, tower, laptop], Some(4_000))), [2, 1]);
        let away = Candidate { takes: false, ..tower };
        assert_eq!(ids(&order(&[mini, away], None)), [1]);
    }

    #[test]
    fn the_first_acts_at_once_the_next_when_nothing_has_happened() {
        let there = [candidate(1, 20), candidate(2, 60), candidate(3, 40)];
        let mut seen = [1, 2, 3].map(|number| (node(number), Placement::default()));
        let mut acting = |now: Duration| -> Vec<NodeId> {
            let acts = |(own, placement): &mut (NodeId, Placement)| {
                placement.judge("m", &there, None, *own, true, now).map(|_| *own)
            };
            seen.iter_mut().filter_map(acts).collect()
        };
        assert_eq!(acting(s(5)), [node(2)]);
        assert_eq!(acting(s(7)), [node(2)]);
        assert_eq!(acting(s(8)), [node(2), node(3)]);
        assert_eq!(acting(s(11)), [node(1), node(2), node(3)]);
    }

    #[test]
    fn what_is_there_or_comes_is_left_alone_and_a_failure_is_waited_for() {
        for copy in [Copy::There, Copy::Coming, Copy::Ready, Copy::Busy] {
            let mut placement = Placement::default();
            let there = [candidate(1, 20), Candidate { copy, work: 1, ..candidate(2, 60) }];
            assert_eq!(placement.judge("m", &there, None, node(1), true, s(0)), None, "{copy:?}");
        }
        let mut placement = Placement::default();
        let mut judge = |copy, now| {
            let there = [candidate(1, 20), Candidate { copy, ..candidate(2, 60) }];
            placement.judge("m", &there, None, node(1), true, now)
        };
        assert_eq!(judge(Copy::Failed, s(0)), None);
        // It tries again and again.
        assert_eq!(judge(Copy::Coming, s(30)), None);
        assert_eq!(judge(Copy::Failed, AFTER_FAILURE - s(1)), None);
        assert_eq!(judge(Copy::Coming, AFTER_FAILURE), None);
        assert_eq!(judge(Copy::Failed, AFTER_FAILURE), Some(Reason::Nowhere));
        assert_eq!(judge(Copy::Ready, AFTER_FAILURE), None);
        assert_eq!(judge(Copy::Failed, AFTER_FAILURE + s(1)), None, "it was well in between");
        assert_eq!(judge(Copy::Ready, AFTER_FAILURE + s(2)), None);
        assert_eq!(judge(Copy::NoRoom, s(900)), Some(Reason::Nowhere), "who has no room is not waited for");
    }

    #[test]
    fn a_model_that_is_asked_for_more_than_it_can_answer_gets_a_copy_where_nothing_is_done() {
        let mut placement = Placement::default();
        let busy = Candidate { copy: Copy::Busy, work: 9, ..candidate(2, 60) };
        let worker = Candidate { work: 1, ..candidate(3, 50) };
        let breathes = Candidate { copy: Copy::Ready, ..busy };
        let there = [candidate(1, 20), busy, worker];
        let rests = [there[0], breathes, worker];
        let mut judge = |there: &[Candidate], more, now| placement.judge("m", there, None, node(1), more, now);
        for second in 0..10 {
            assert_eq!(judge(&there, true, s(second)), None);
        }
        assert_eq!(judge(&there, false, s(10)), None, "switched off");
        assert_eq!(judge(&there, true, s(10)), Some(Reason::Busy));
        assert_eq!(judge(&[Candidate { work: 1, ..there[0] }, busy], true, s(10)), None, "it does something");
        let coming = Candidate { copy: Copy::Coming, ..worker };
        assert_eq!(judge(&[there[0], busy, coming], true, s(10)), None, "another one is coming");
        assert_eq!(judge(&rests, true, s(12)), None);
        assert_eq!(judge(&there, true, s(13)), None, "it was not busy enough of the time");
        assert_eq!(judge(&there, true, s(14)), Some(Reason::Busy));
        // Nobody has looked for long.
        assert_eq!(judge(&rests, true, s(16)), None);
        assert_eq!(judge(&there, true, s(900)), Some(Reason::Busy), "two seconds of it count");
        assert_eq!(judge(&rests, true, s(902)), None);
        assert_eq!(judge(&rests, true, s(904)), None);
        assert_eq!(judge(&there, true, s(2_000)), None);
    }

    fn any_candidate() -> impl Strategy<Value = Candidate> {
        let copy = prop_oneof![
            Just(Copy::None),
            Just(Copy::There),
            Just(Copy::Coming),
            Just(Copy::Ready),
            Just(Copy::Busy),
            Just(Copy::NoRoom),
            Just(Copy::Failed)
        ];
        let numbers = (any::<u8>(), 0..100_000_000_000u64, proptest::option::of(0..10_000u64), 0..3u32);
        (numbers, any::<[bool; 3]>(), copy).prop_map(|((number, bandwidth, room, work), [card, file, takes], copy)| {
            let on_card = card && bandwidth > 0;
            Candidate { node: node(number), bandwidth, on_card, room, has_file: file, takes, work, copy }
        })
    }

    proptest! {
        #[test]
        fn everybody_comes_to_the_same_order(
            mut candidates in proptest::collection::vec(any_candidate(), 0..8),
            bytes in proptest::option::of(0..10_000u64),
            turn in 0..8usize,
        ) {
            candidates.sort_by_key(|one| one.node);
            candidates.dedup_by_key(|one| one.node);
            let here = order(&candidates, bytes);
            let turn = turn.min(candidates.len());
            candidates.rotate_left(turn);
            candidates.reverse();
            prop_assert_eq!(&order(&candidates, bytes), &here);
            for one in &here {
                prop_assert!(one.takes && one.room.zip(bytes).is_none_or(|(room, bytes)| bytes <= room));
            }
        }

        #[test]
        fn a_model_that_is_nowhere_comes_somewhere_where_anybody_could_take_it(
            mut candidates in proptest::collection::vec(any_candidate(), 1..8),
        ) {
            candidates.sort_by_key(|one| one.node);
            candidates.dedup_by_key(|one| one.node);
            let is_nowhere =
                candidates.iter().all(|one| matches!(one.copy, Copy::None | Copy::NoRoom | Copy::Failed));
            let could = !order(&candidates, None).is_empty();
            let mut acts = 0;
            for one in &candidates {
                let mut placement = Placement::default();
                placement.judge("m", &candidates, None, one.node, false, s(0));
                acts += usize::from(placement.judge("m", &candidates, None, one.node, false, s(10_000)).is_some());
            }
            prop_assert_eq!(acts > 0, is_nowhere && could);
        }
    }
}
