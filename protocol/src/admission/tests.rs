use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    in_flight: 2,
    in_flight_tokens: 1_000,
    queued_tokens: 10_000,
    queued: 100,
    tokens_per_second: 100.0,
    quota_per_minute: None,
};
const NOW: Duration = Duration::ZERO;

fn ask(id: u64, principal: &str, priority: Priority, tokens: u64) -> Ask {
    Ask { id, principal: principal.into(), priority, tokens, deadline: Duration::from_secs(600) }
}

fn put(queue: &mut AdmissionQueue, id: u64, principal: &str) -> Decision {
    queue.ask(ask(id, principal, Priority::Normal, 100), &LIMITS, NOW).0
}

#[test]
fn a_script_delays_a_person_by_one_request() {
    let mut queue = AdmissionQueue::default();
    for id in 0..80 {
        let decision = put(&mut queue, id, "script");
        assert_eq!(decision == Decision::Go, id < 2, "{decision:?}");
    }
    assert!(matches!(put(&mut queue, 1_000, "person"), Decision::Wait { .. }));
    queue.end(0);
    assert_eq!(queue.admit(&LIMITS), [1_000]);
    queue.end(1);
    assert_eq!(queue.admit(&LIMITS), [2]);
    // From then on they take turns.
    assert!(matches!(put(&mut queue, 1_001, "person"), Decision::Wait { .. }));
    queue.end(2);
    queue.end(1_000);
    let mut next = queue.admit(&LIMITS);
    next.sort_unstable();
    assert_eq!(next, [3, 1_001]);
}

#[test]
fn a_full_queue_sends_away_who_has_most_of_it() {
    let mut queue = AdmissionQueue::default();
    for id in 0..102 {
        put(&mut queue, id, "script");
    }
    assert!(matches!(put(&mut queue, 102, "script"), Decision::Reject(Rejection::Capacity { .. })));
    let (decision, sent_away) = queue.ask(ask(200, "person", Priority::Normal, 100), &LIMITS, NOW);
    assert!(matches!(decision, Decision::Wait { .. }));
    assert!(matches!(sent_away[..], [(101, Rejection::Quota { .. })]), "{sent_away:?}");
    assert!(matches!(put(&mut queue, 103, "script"), Decision::Reject(Rejection::Quota { .. })));
    assert_eq!(queue.waiting(), 100);
}

#[test]
fn what_a_person_waits_for_goes_first_and_the_rest_is_not_starved() {
    let mut queue = AdmissionQueue::default();
    put(&mut queue, 0, "a");
    put(&mut queue, 1, "a");
    for (id, priority) in [(2, Priority::Background), (3, Priority::Normal), (4, Priority::Interactive)] {
        queue.ask(ask(id, "a", priority, 100), &LIMITS, NOW);
    }
    let mut order = Vec::new();
    for id in [0, 1, 4] {
        queue.end(id);
        order.extend(queue.admit(&LIMITS));
    }
    assert_eq!(order, [4, 3, 2]);
}

#[test]
fn who_cannot_be_served_in_time_is_told_at_once() {
    let mut queue = AdmissionQueue::default();
    for id in 0..50 {
        put(&mut queue, id, "a");
    }
    let hasty = Ask { deadline: Duration::from_secs(5), ..ask(99, "b", Priority::Normal, 100) };
    let (decision, _) = queue.ask(hasty, &LIMITS, NOW);
    let Decision::Reject(Rejection::Capacity { retry_after }) = decision else { panic!("{decision:?}") };
    assert_eq!(retry_after, Duration::from_secs(49), "4,800 tokens wait and it has 100, of 100 a second");
}

#[test]
fn a_quota_fills_up_again() {
    let limits = Limits { quota_per_minute: Some(600), ..LIMITS };
    let mut queue = AdmissionQueue::default();
    let mut spend = |id, now| queue.ask(ask(id, "a", Priority::Normal, 400), &limits, now).0;
    assert_eq!(spend(0, NOW), Decision::Go);
    let Decision::Reject(Rejection::Quota { retry_after }) = spend(1, NOW) else { panic!() };
    assert_eq!(retry_after, Duration::from_secs(20));
    assert_eq!(spend(2, Duration::from_secs(20)), Decision::Go);
    // Larger than the whole quota: once the quota is untouched.
    assert_eq!(
        queue
            .ask(ask(3, "b", Priority::Normal, 900), &Limits { in_flight: 9, in_flight_tokens: 9_000, ..limits }, NOW)
            .0,
        Decision::Go
    );
}

#[test]
fn one_that_is_larger_than_all_room_goes_alone() {
    let mut queue = AdmissionQueue::default();
    let large = |id| ask(id, "a", Priority::Normal, 50_000);
    assert_eq!(queue.ask(large(0), &LIMITS, NOW).0, Decision::Go);
    assert!(matches!(queue.ask(large(1), &LIMITS, NOW).0, Decision::Wait { .. }));
    assert_eq!(queue.admit(&LIMITS), Vec::<u64>::new());
    queue.end(0);
    assert_eq!(queue.admit(&LIMITS), [1]);
    // And not where there is no worker at all.
    queue.end(1);
    assert!(matches!(queue.ask(large(2), &Limits { in_flight: 0, ..LIMITS }, NOW).0, Decision::Wait { .. }));
}

#[derive(Debug, Clone)]
enum Event {
    Ask(u8, u8, u64),
    End(usize),
    Admit,
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..4u8, 0..3u8, 0..3_000u64).prop_map(|(who, priority, tokens)| Event::Ask(who, priority, tokens)),
        2 => any::<usize>().prop_map(Event::End),
        1 => Just(Event::Admit),
    ]
}

proptest! {
    /// Everybody is admitted, waits or is told; sums agree with their parts; and when all that runs ends, all that
    /// waits gets its turn.
    #[test]
    fn nobody_is_lost(events in proptest::collection::vec(any_event(), 0..300)) {
        let mut queue = AdmissionQueue::default();
        let (mut waiting, mut running) = (Vec::new(), Vec::new());
        for (id, event) in (0u64..).zip(events) {
            match event {
                Event::Ask(who, priority, tokens) => {
                    let priority = [Priority::Background, Priority::Normal, Priority::Interactive][priority as usize];
                    let (decision, away) = queue.ask(ask(id, &who.to_string(), priority, tokens), &LIMITS, NOW);
                    for (id, _) in away {
                        prop_assert!(waiting.contains(&id), "only who waits is sent away");
                        waiting.retain(|waits| *waits != id);
                    }
                    match decision {
                        Decision::Go => running.push(id),
                        Decision::Wait { .. } => waiting.push(id),
                        Decision::Reject(_) => {}
                    }
                }
                Event::End(which) => {
                    let all: Vec<u64> = running.iter().chain(&waiting).copied().collect();
                    if let Some(id) = all.get(which % all.len().max(1)) {
                        queue.end(*id);
                        running.retain(|runs| runs != id);
                        waiting.retain(|waits| waits != id);
                    }
                }
                Event::Admit => {
                    for id in queue.admit(&LIMITS) {
                        prop_assert!(waiting.contains(&id));
                        waiting.retain(|waits| *waits != id);
                        running.push(id);
                    }
                }
            }
            prop_assert_eq!(queue.waiting() as usize, waiting.len());
            prop_assert_eq!(queue.in_flight() as usize, running.len());
            prop_assert!(running.len() <= LIMITS.in_flight as usize);
            prop_assert!(queue.waiting() <= LIMITS.queued);
            let sum: u64 = queue.accounts.values().map(|account| account.waiting_tokens).sum();
            prop_assert_eq!(sum, queue.waiting_tokens);
        }
        while !running.is_empty() || !waiting.is_empty() {
            running.drain(..).for_each(|id| queue.end(id));
            let admitted = queue.admit(&LIMITS);
            prop_assert!(!admitted.is_empty() || waiting.is_empty(), "{} are stuck", waiting.len());
            waiting.retain(|id| !admitted.contains(id));
            running = admitted;
        }
        prop_assert_eq!((queue.waiting_tokens, queue.running_tokens), (0, 0));
    }
}
