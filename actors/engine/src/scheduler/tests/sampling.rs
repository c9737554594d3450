//! What a request may say about the choice of tokens, seen from outside.

use super::*;
use crate::{BitMask, TokenMask};

#[test]
fn stop_tokens_end_the_answer_and_are_not_in_it() {
    let engine = started(echo());
    let sampling = |r: &mut Request, stop: u8| {
        r.sampling.stop_token_ids = vec![b'z'.into(), stop.into()];
        r.sampling.logprobs = Some(2);
    };
    let whole = ask(&engine, changed("one, two", |r| sampling(r, b',')));
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("one", FinishReason::Stop));
    let ids: Vec<u32> = b"one,".iter().map(|byte| u32::from(*byte)).collect();
    assert_eq!((whole.ids(), whole.finished().usage.completion_tokens), (ids, 4));
    // A token that ended the answer has no text in it, so it says nothing about its likelihood either.
    let told: Vec<bool> = whole.tokens.iter().map(|token| token.logprobs.is_some()).collect();
    assert_eq!(told, [true, true, true, false]);
    for cut in 0..=4 {
        let rest = ask(
            &engine,
            changed("one, two", |r| {
                sampling(r, b',');
                r.resume = whole.ids()[..cut].to_vec();
            }),
        );
        assert_eq!((&rest.tokens[..], rest.finished()), (&whole.tokens[cut..], whole.finished()), "cut at {cut}");
    }
    // Not before it may.
    let late = changed("one, two, three", |r| {
        sampling(r, b',');
        r.sampling.min_tokens = 5;
    });
    // The comma at the fourth place is forbidden: what would come behind it comes, and so on.
    assert_eq!(ask(&engine, late).text(), "one  two");
}

#[test]
fn an_answer_without_an_end_of_its_own_is_as_long_as_it_may_be() {
    let engine = started(echo());
    let endless = |r: &mut Request| {
        r.sampling.ignore_eos = true;
        r.sampling.max_tokens = Some(10);
    };
    let whole = ask(&engine, changed("abcd", endless));
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("abcdabcdab", FinishReason::Length));
    let whole = ask(&engine, changed("abcd", |r| r.sampling.min_tokens = 6));
    assert_eq!((whole.text().as_str(), whole.finished().usage.completion_tokens), ("abcdab", 7));
    // There is nothing to say: that is an error, and the next request is answered.
    let nothing = ask(&engine, changed("", endless));
    assert_eq!((nothing.failed().kind, nothing.failed().migratable), (FailureKind::EngineError, false));
    assert!(nothing.failed().message.contains("no token may come next"), "{}", nothing.failed().message);
    assert_eq!(ask(&engine, request("z")).text(), "z");
}

#[test]
fn logprobs_come_with_every_token_of_the_text() {
    let engine = started(echo());
    let whole = ask(&engine, changed("é!", |r| r.sampling.logprobs = Some(3)));
    let [first, second, third, end] = &whole.tokens[..] else { panic!("{whole:?}") };
    assert_eq!((&first.text[..], &second.text[..], &third.text[..]), (&b""[..], "é".as_bytes(), &b"!"[..]));
    let logprobs = first.logprobs.as_ref().unwrap();
    assert_eq!(logprobs.chosen, Logprob { id: 0xc3, logprob: 0.0, bytes: vec![0xc3] });
    let top: Vec<(u32, f32)> = logprobs.top.iter().map(|logprob| (logprob.id, logprob.logprob)).collect();
    assert_eq!(top, [(0xc3, 0.0), (0xa9, -80.0)], "no more are possible");
    assert!(second.logprobs.is_some() && third.logprobs.is_some() && end.logprobs.is_none());
    assert!(ask(&engine, request("x")).tokens.iter().all(|token| token.logprobs.is_none()));
}

/// Digits, as many as it says, then the end.
#[derive(Debug)]
struct Digits(usize);

impl TokenMask for Digits {
    fn allowed(&mut self, generated: &[u32], mask: &mut BitMask) {
        match generated.len().cmp(&self.0) {
            std::cmp::Ordering::Less => (b'0'..=b'9').for_each(|digit| mask.allow(digit.into())),
            std::cmp::Ordering::Equal => mask.allow(260),
            std::cmp::Ordering::Greater => {}
        }
    }
}

#[test]
fn a_mask_constrains_an_answer_also_where_it_is_resumed() {
    let engine = started(echo());
    let masked = |request: Request, digits| {
        let (sender, receiver) = mpsc::channel(64);
        engine.submit_constrained(request, Some(Box::new(Digits(digits))), sender);
        Whole::collect(receiver)
    };
    let whole = masked(request("12"), 2);
    assert_eq!((whole.text().as_str(), whole.finished().reason), ("12", FinishReason::Stop));
    let rest = masked(changed("12", |r| r.resume = vec![b'1'.into()]), 2);
    assert_eq!((&rest.tokens[..], rest.finished()), (&whole.tokens[1..], whole.finished()));
    // The echo would say `x`, or else `y`: everything is forbidden.
    let stuck = masked(request("1xy"), 2);
    assert_eq!((stuck.text().as_str(), stuck.failed().kind), ("1", FailureKind::EngineError));
    assert!(stuck.failed().message.contains("forbids every token"), "{}", stuck.failed().message);
    assert_eq!(ask(&engine, request("1xy")).text(), "1xy", "others are not concerned");
}
