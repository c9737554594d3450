//! What fits into a machine's memory, and which models have to go for it. A pure function of what a model needs, what
//! is free and who is there.
//!
//! A loaded model is promised its weights and its keys and values whether it has touched them yet or not: what is
//! promised and not taken is not free. Only models that nobody uses go, the longest unused first, and none that is
//! pinned.

use std::time::Duration;

/// What a model needs, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Its weights.
    pub weights: u64,
    /// Keys and values, for one conversation of full length at least.
    pub kv: u64,
    /// Everything else.
    pub other: u64,
}

impl Need {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv).saturating_add(self.other)
    }
}

/// Why a model stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stays {
    /// Somebody wants it so.
    Pinned,
    /// It answers, or is on its way to it, or finishes its answers.
    Busy,
}

/// A model that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Its name.
    pub name: String,
    /// Bytes that were promised to it.
    pub promised: u64,
    /// Bytes of them that are taken, so that they are no longer free.
    pub taken: u64,
    /// Why it stays, or for how long nobody has used it.
    pub idle: Result<Duration, Stays>,
}

/// What a machine has for models, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Free now, as the system says; `None` where it does not.
    pub free: Option<u64>,
    /// All models together at most; `None` for as much as there is.
    pub most: Option<u64>,
}

impl Memory {
    /// What is left for one more model beside these.
    pub fn left(&self, residents: &[Resident]) -> u64 {
        let sum = |of: fn(&Resident) -> u64| residents.iter().map(of).fold(0, u64::saturating_add);
        let untaken = sum(|resident| resident.promised.saturating_sub(resident.taken));
        let free = self.free.map_or(u64::MAX, |free| free.saturating_sub(untaken));
        let below = self.most.map_or(u64::MAX, |most| most.saturating_sub(sum(|resident| resident.promised)));
        free.min(below)
    }
}

/// What to do about a model that shall be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// There is room.
    Fits {
        /// Bytes that are there for it.
        left: u64,
    },
    /// There is room when these have gone: indices of residents.
    Evict(Vec<usize>),
    /// It does not fit, whoever goes.
    Refuse(Refusal),
}

/// The numbers of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the model needs.
    pub need: Need,
    /// What is left now.
    pub left: u64,
    /// What would be if all that may go had gone.
    pub at_best: u64,
    /// What all models together may take.
    pub most: Option<u64>,
    /// Those that stay, with what they have.
    pub staying: Vec<(String, u64, Stays)>,
}

/// What [`Refusal::in_words`] says, and nothing else does.
const NO_ROOM: &str = "of memory (weights ";

/// A state's reason is that there was no room: another machine may have some.
pub fn is_no_room(why: &str) -> bool {
    why.contains(NO_ROOM)
}

impl Refusal {
    /// In words: what is needed, what there is, who has it, what to do.
    pub fn in_words(&self, name: &str) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let Need { weights, kv, other } = self.need;
        let mut text = format!(
            "`{name}` needs {} MiB {NO_ROOM}{} MiB, keys and values {} MiB, {} MiB for everything else), but \
             only {} MiB are left for it here",
            mib(self.need.total()),
            mib(weights),
            mib(kv),
            mib(other),
            self.at_best >> 20,
        );
        if let Some(most) = self.most {
            text += &format!(" of the {} MiB that models may take", most >> 20);
        }
        let staying: Vec<String> = self
            .staying
            .iter()
            .map(|(name, bytes, why)| {
                let why = match why {
                    Stays::Pinned => "pinned",
                    Stays::Busy => "in use",
                };
                format!("`{name}` has {} MiB and is {why}", mib(*bytes))
            })
            .collect();
        if !staying.is_empty() {
            text += &format!(" ({})", staying.join(", "));
        }
        text + ": unload a model, choose a smaller one, or lower its context_length"
    }
}

/// Bytes that there would be for one more model if all that may go had gone.
pub fn at_best(memory: Memory, residents: &[Resident]) -> u64 {
    match plan(Need { weights: u64::MAX, ..Need::default() }, memory, residents) {
        Plan::Refuse(refusal) => refusal.at_best,
        // Where nobody says what there is.
        Plan::Fits { .. } | Plan::Evict(_) => u64::MAX,
    }
}

/// Decides whether a model fits, and who goes for it.
pub fn plan(need: Need, memory: Memory, residents: &[Resident]) -> Plan {
    let (needed, left) = (need.total(), memory.left(residents));
    if needed <= left {
        return Plan::Fits { left };
    }
    let mut idle: Vec<(Duration, usize)> =
        residents.iter().enumerate().filter_map(|(index, resident)| Some((resident.idle.ok()?, index))).collect();
    idle.sort_by_key(|(unused, index)| (std::cmp::Reverse(*unused), *index));
    let without = |gone: &[usize]| {
        let mut free = memory;
        let staying = residents.iter().enumerate().filter(|(index, _)| !gone.contains(index));
        let staying: Vec<Resident> = staying.map(|(_, resident)| resident.clone()).collect();
        let back = gone.iter().map(|index| residents[*index].taken).fold(0, u64::saturating_add);
        free.free = free.free.map(|free| free.saturating_add(back));
        free.left(&staying)
    };
    let mut gone = Vec::new();
    for (_, index) in &idle {
        gone.push(*index);
        if needed <= without(&gone) {
            // A small one that went first may not be needed beside a large one that went later.
            for index in gone.clone().into_iter().rev() {
                let fewer: Vec<usize> = gone.iter().copied().filter(|other| *other != index).collect();
                if needed <= without(&fewer) {
                    gone = fewer;
                }
            }
            return Plan::Evict(gone);
        }
    }
    let staying = |resident: &Resident| Some((resident.name.clone(), resident.promised, resident.idle.err()?));
    Plan::Refuse(Refusal {
        need,
        left,
        at_best: without(&gone),
        most: memory.most,
        staying: residents.iter().filter_map(staying).collect(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn resident(name: &str, mib: u64, idle: Result<u64, Stays>) -> Resident {
        Resident { name: name.into(), promised: mib * MIB, taken: 0, idle: idle.map(Duration::from_secs) }
    }

    fn need(mib: u64) -> Need {
        Need { weights: mib * MIB, kv: 0, other: 0 }
    }

    fn limit(mib: u64) -> Memory {
        Memory { free: None, most: Some(mib * MIB) }
    }

    #[test]
    fn the_longest_unused_go_first_and_no_more_than_it_takes() {
        let there = [resident("a", 100, Ok(5)), resident("b", 100, Ok(50)), resident("c", 100, Ok(20))];
        assert_eq!(plan(need(100), limit(400), &there), Plan::Fits { left: 100 * MIB });
        assert_eq!(plan(need(100), limit(300), &there), Plan::Evict(vec![1]));
        assert_eq!(plan(need(200), limit(300), &there), Plan::Evict(vec![1, 2]));
        // The small one is older, but its going alone is of no use and beside the large one not needed.
        let there = [resident("small", 10, Ok(90)), resident("large", 200, Ok(10))];
        assert_eq!(plan(need(200), limit(210), &there), Plan::Evict(vec![1]));
    }

    #[test]
    fn pinned_and_busy_ones_stay_and_the_refusal_has_the_numbers() {
        let there = [
            resident("mine", 100, Err(Stays::Pinned)),
            resident("talking", 100, Err(Stays::Busy)),
            resident("old", 50, Ok(60)),
        ];
        let Plan::Refuse(refusal) = plan(Need { weights: 150 * MIB, kv: 10 * MIB, other: 5 * MIB }, limit(300), &there)
        else {
            panic!("it cannot fit");
        };
        assert_eq!((refusal.left, refusal.at_best), (50 * MIB, 100 * MIB));
        assert_eq!(at_best(limit(300), &there), 100 * MIB);
        assert_eq!(at_best(Memory { free: None, most: None }, &there), u64::MAX);
        let words = refusal.in_words("big");
        assert!(is_no_room(&words) && !is_no_room("the file is damaged"));
        for part in ["`big` needs 165 MiB", "weights 150 MiB", "keys and values 10 MiB", "only 100 MiB", "300 MiB"] {
            assert!(words.contains(part), "{part:?} in {words:?}");
        }
        assert!(
            words.contains("`mine` has 100 MiB and is pinned") && words.contains("`talking` has 100 MiB and is in use")
        );
    }

    #[test]
    fn what_is_promised_and_not_taken_is_not_free() {
        let memory = Memory { free: Some(300 * MIB), most: None };
        let mut there = [resident("a", 200, Ok(1))];
        assert_eq!(memory.left(&there), 100 * MIB);
        there[0].taken = 150 * MIB;
        assert_eq!(memory.left(&there), 250 * MIB);
        assert_eq!(plan(need(260), memory, &there), Plan::Evict(vec![0]));
        assert!(
            matches!(plan(need(460), memory, &there), Plan::Refuse(Refusal { at_best, .. }) if at_best == 450 * MIB)
        );
    }

    fn any_resident() -> impl Strategy<Value = Resident> {
        let idle = prop_oneof![
            (0..100u64).prop_map(|s| Ok(Duration::from_secs(s))),
            Just(Err(Stays::Pinned)),
            Just(Err(Stays::Busy)),
        ];
        (0..500u64, 0..500u64, idle).prop_map(|(promised, taken, idle)| Resident {
            name: String::new(),
            promised,
            taken: taken.min(promised),
            idle,
        })
    }

    proptest! {
        #[test]
        fn a_plan_makes_room_with_none_to_spare_and_touches_nobody_who_stays(
            residents in proptest::collection::vec(any_resident(), 0..6),
            weights in 0..1_000u64, free in proptest::option::of(0..2_000u64), most in proptest::option::of(0..2_000u64),
        ) {
            let (need, memory) = (Need { weights, kv: 0, other: 0 }, Memory { free, most });
            let after = |gone: &[usize]| {
                let keep = residents.iter().enumerate().filter(|(index, _)| !gone.contains(index));
                let keep: Vec<Resident> = keep.map(|(_, resident)| resident.clone()).collect();
                let back: u64 = gone.iter().map(|index| residents[*index].taken).sum();
                Memory { free: free.map(|free| free + back), most }.left(&keep)
            };
            match plan(need, memory, &residents) {
                Plan::Fits { left } => prop_assert!(weights <= left && left == memory.left(&residents)),
                Plan::Evict(gone) => {
                    prop_assert!(weights <= after(&gone));
                    prop_assert!(gone.iter().all(|index| residents[*index].idle.is_ok()));
                    for spared in &gone {
                        let fewer: Vec<usize> = gone.iter().copied().filter(|index| index != spared).collect();
                        prop_assert!(weights > after(&fewer), "it need not have gone");
                    }
                }
                Plan::Refuse(refusal) => {
                    let all: Vec<usize> = (0..residents.len()).filter(|index| residents[*index].idle.is_ok()).collect();
                    prop_assert!(weights > after(&all));
                    prop_assert_eq!(refusal.at_best, after(&all));
                }
            }
        }
    }
}
