use std::collections::BTreeMap;
use std::time::Instant;

use ingle_protocol::wire::v2::{LogitBias, Message};

use super::*;
use crate::text::PromptError;

mod properties;

/// A vocabulary of so many tokens, of which the last ends the answer.
struct Numbers(u32);

impl Codec for Numbers {
    fn prompt(&self, _: &[Message], _: &[u8]) -> Result<Vec<u32>, PromptError> {
        Ok(vec![])
    }
    fn bytes(&self, _: u32) -> &[u8] {
        b""
    }
    fn is_end(&self, id: u32) -> bool {
        id + 1 == self.0
    }
    fn vocabulary(&self) -> u32 {
        self.0
    }
    fn longest(&self) -> usize {
        1
    }
}

fn choose(logits: &[f32], sampling: &Sampling, tokens: &[u32], prompt: usize) -> Result<Chosen, NoChoice> {
    let mut sampler = Sampler::new(&Numbers(logits.len() as u32));
    sampler.choose(Place { logits, sampling, tokens, prompt, mask: None })
}

fn sample(logits: &[f32], sampling: &Sampling, position: u32) -> Option<u32> {
    choose(logits, sampling, &vec![0; position as usize], 0).map(|chosen| chosen.id).ok()
}

fn sampling(temperature: f32, top_p: f32, seed: u64) -> Sampling {
    Sampling { temperature, top_p, seed, ..Sampling::default() }
}

/// Logits of these probabilities.
fn logs<const N: usize>(probabilities: [f32; N]) -> [f32; N] {
    probabilities.map(f32::ln)
}

/// What is drawn at 2,000 positions, and how often.
fn drawn(logits: &[f32], sampling: &Sampling) -> BTreeMap<u32, u32> {
    let mut counts = BTreeMap::new();
    (0..2_000).for_each(|position| *counts.entry(sample(logits, sampling, position).unwrap()).or_default() += 1);
    counts
}

fn ids(logits: &[f32], sampling: &Sampling) -> Vec<u32> {
    drawn(logits, sampling).into_keys().collect()
}

#[test]
fn greedy_takes_the_first_of_the_greatest() {
    assert_eq!(sample(&[0.0, 2.0, 2.0, f32::NAN], &sampling(0.0, 1.0, 1), 0), Some(1));
    assert_eq!(sample(&[f32::NEG_INFINITY, 0.0], &sampling(2.0, 1.0, 1), 0), Some(1));
    assert_eq!(sample(&[0.0, f32::INFINITY, f32::INFINITY], &sampling(2.0, 1.0, 1), 0), Some(1));
    let mut long = vec![1.0; 1_000];
    long[777] = 1.5;
    assert_eq!(sample(&long, &sampling(0.0, 1.0, 1), 0), Some(777));
    for row in [&[f32::NAN, f32::NEG_INFINITY][..], &[]] {
        assert_eq!(choose(row, &sampling(0.0, 1.0, 1), &[], 0), Err(NoChoice::NoNumbers));
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    // Over several blocks, and also where filters leave a list.
    let mut logits = vec![f32::NEG_INFINITY; 200];
    [logits[3], logits[70], logits[199]] = logs([0.6, 0.3, 0.1]);
    let filtered = Sampling { min_p: 1e-6, ..sampling(1.0, 1.0, 42) };
    for (sampling, expected) in [
        (sampling(1.0, 1.0, 42), [0.6, 0.3, 0.1]),
        (filtered, [0.6, 0.3, 0.1]),
        // Probabilities to the power of 1/2.
        (sampling(2.0, 1.0, 42), [0.4727, 0.3343, 0.1930]),
    ] {
        let counts = drawn(&logits, &sampling);
        for (id, expected) in [3, 70, 199].into_iter().zip(expected) {
            let share = f64::from(counts[&id]) / 2_000.0;
            assert!((share - expected).abs() < 0.035, "{counts:?}");
        }
        assert_eq!(counts.len(), 3);
    }
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    let logits = logs([0.1, 0.6, 0.3]);
    for (top_p, kept) in [(0.5, &[1][..]), (0.85, &[1, 2]), (0.95, &[0, 1, 2]), (1e-6, &[1]), (0.0, &[1])] {
        assert_eq!(ids(&logits, &sampling(1.0, top_p, 7)), kept, "{top_p}");
    }
    // Temperature comes first: at 2, these are 0.193, 0.473, 0.334.
    assert_eq!(ids(&logits, &sampling(2.0, 0.85, 7)), [0, 1, 2]);
    // Equal ones: the lower ids.
    assert_eq!(ids(&[0.0; 500], &sampling(1.0, 0.01, 7)), [0, 1, 2, 3, 4]);
}

#[test]
fn top_k_keeps_so_many_and_top_p_sees_only_them() {
    let logits = logs([0.1, 0.4, 0.2, 0.3]);
    let make = |top_k, top_p| Sampling { top_k, ..sampling(1.0, top_p, 7) };
    assert_eq!(ids(&logits, &make(1, 1.0)), [1]);
    assert_eq!(ids(&logits, &make(3, 1.0)), [1, 2, 3]);
    assert_eq!(ids(&logits, &make(9, 1.0)), [0, 1, 2, 3]);
    // Of 0.4 and 0.3, the first is 0.57 of both.
    assert_eq!(ids(&logits, &make(2, 0.55)), [1]);
    assert_eq!(ids(&logits, &make(0, 0.55)), [1, 3]);
    assert_eq!(ids(&[0.0; 500], &make(3, 1.0)), [0, 1, 2]);
}

#[test]
fn min_p_is_relative_to_the_likeliest() {
    let logits = logs([0.5, 0.24, 0.26]);
    let make = |min_p| Sampling { min_p, ..sampling(1.0, 1.0, 7) };
    assert_eq!(ids(&logits, &make(0.5)), [0, 2]);
    assert_eq!(ids(&logits, &make(1.0)), [0]);
    assert_eq!(ids(&logits, &make(0.1)), [0, 1, 2]);
    let with_k = Sampling { top_k: 2, ..make(0.6) };
    assert_eq!(ids(&logits, &with_k), [0]);
}

#[test]
fn penalties_and_biases_change_the_choice() {
    let logits = [3.0, 2.5, 2.0, 0.0];
    let greedy = |change: &dyn Fn(&mut Sampling), tokens: &[u32], prompt| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        choose(&logits, &sampling, tokens, prompt).unwrap().id
    };
    assert_eq!(greedy(&|s| s.logit_bias = vec![LogitBias { token: 2, bias: 1.5 }], &[], 0), 2);
    assert_eq!(greedy(&|s| s.logit_bias = vec![LogitBias { token: 0, bias: -100.0 }], &[], 0), 1);
    assert_eq!(greedy(&|s| s.repetition_penalty = 1.6, &[0, 1], 2), 2);
    assert_eq!(greedy(&|s| s.presence_penalty = 1.0, &[0], 1), 0, "the prompt does not count");
    assert_eq!(greedy(&|s| s.presence_penalty = 1.0, &[0, 0], 1), 1);
    assert_eq!(greedy(&|s| s.frequency_penalty = 0.4, &[0, 0, 0, 1, 1], 0), 2);
}

#[test]
fn the_end_waits_where_it_has_to() {
    let logits = [0.0, 1.0, 2.0, 3.0];
    let id = |sampling: &Sampling, answer: usize| choose(&logits, sampling, &vec![0; answer], 0).map(|c| c.id);
    assert_eq!(id(&Sampling { ignore_eos: true, ..Sampling::default() }, 900), Ok(2));
    let late = Sampling { min_tokens: 2, stop_token_ids: vec![2], ..Sampling::default() };
    assert_eq!([id(&late, 0), id(&late, 1), id(&late, 2)], [Ok(1), Ok(1), Ok(3)]);
    let only_end = choose(&[f32::NEG_INFINITY, 0.0], &Sampling { ignore_eos: true, ..Sampling::default() }, &[], 0);
    assert_eq!(only_end, Err(NoChoice::AllForbidden));
}

#[test]
fn logprobs_are_those_of_the_model() {
    let probabilities = [0.1, 0.5, 0.15, 0.25];
    let logits = logs(probabilities).map(|logit| logit + 7.0);
    let bent = Sampling {
        temperature: 0.3,
        top_k: 2,
        logit_bias: vec![LogitBias { token: 0, bias: 100.0 }],
        logprobs: Some(3),
        ..Sampling::default()
    };
    let chosen = choose(&logits, &bent, &[], 0).unwrap();
    let Likelihood { chosen: own, top } = chosen.likelihood.unwrap();
    assert_eq!((chosen.id, top.iter().map(|(id, _)| *id).collect::<Vec<_>>()), (0, vec![1, 3, 2]));
    for (id, logprob) in top.into_iter().chain([(0, own)]) {
        assert!((logprob - probabilities[id as usize].ln()).abs() < 2e-6, "{id}: {logprob}");
    }
    let none = Sampling { logprobs: Some(0), ..Sampling::default() };
    let likelihood = choose(&logits, &none, &[], 0).unwrap().likelihood.unwrap();
    assert!(likelihood.top.is_empty() && (likelihood.chosen - 0.5f32.ln()).abs() < 1e-6);
    // More than there are, and impossible ones.
    let all = Sampling { logprobs: Some(20), ..Sampling::default() };
    let likelihood = choose(&[f32::NEG_INFINITY, 0.0, f32::NAN, 0.0], &all, &[], 0).unwrap().likelihood.unwrap();
    assert_eq!(likelihood.top, [(1, -std::f32::consts::LN_2), (3, -std::f32::consts::LN_2)]);
    let bias = vec![LogitBias { token: 1, bias: 0.0 }];
    let infinite = Sampling { logit_bias: bias, logprobs: Some(2), ..Sampling::default() };
    let likelihood = choose(&[0.0, f32::INFINITY], &infinite, &[], 0).unwrap().likelihood.unwrap();
    assert_eq!((likelihood.chosen, likelihood.top), (0.0, vec![(1, 0.0), (0, -9_999.0)]));
}

/// Balanced brackets, no more than two deep, then the end: `(` is 0, `)` is 1, the end 4.
#[derive(Debug, Default)]
struct Brackets {
    calls: usize,
}

impl TokenMask for Brackets {
    fn allowed(&mut self, generated: &[u32], mask: &mut BitMask) {
        assert!((0..mask.tokens() as u32).all(|id| !mask.is_allowed(id)), "it begins with nothing");
        self.calls += 1;
        let depth = generated.iter().map(|id| if *id == 0 { 1 } else { -1 }).sum::<i32>();
        if depth < 2 {
            mask.allow(0);
        }
        mask.allow(if depth > 0 { 1 } else { 4 });
        mask.allow(4_000_000);
    }
}

#[test]
fn a_mask_constrains_the_answer() {
    let mut sampler = Sampler::new(&Numbers(5));
    // The model would like to say 2 and 3.
    let logits = [0.0, 0.1, 9.0, 9.0, -1.0];
    for seed in 0..50 {
        let sampling = Sampling { seed, temperature: 1.0, ..Sampling::default() };
        let (mut tokens, mut brackets) = (vec![2, 3], Brackets::default());
        while tokens.last() != Some(&4) && tokens.len() < 40 {
            let place =
                Place { logits: &logits, sampling: &sampling, tokens: &tokens, prompt: 2, mask: Some(&mut brackets) };
            let id = sampler.choose(place).unwrap().id;
            tokens.push(id);
        }
        let mut depth = 0;
        for id in &tokens[2..] {
            depth += match id {
                0 => 1,
                1 => -1,
                other => i32::from(*other != 4) * 100,
            };
            assert!((0..=2).contains(&depth), "{tokens:?}");
        }
        assert!(tokens.last() != Some(&4) || depth == 0, "{tokens:?}");
        assert_eq!(brackets.calls, tokens.len() - 2);
    }
    // Nothing is left: the mask allows the end alone, and the request forbids that.
    let sampling = Sampling { ignore_eos: true, ..Sampling::default() };
    let full = [0, 1, 0, 0];
    let mut closed = Brackets::default();
    let place =
        Place { logits: &[f32::NAN; 5], sampling: &sampling, tokens: &full, prompt: 0, mask: Some(&mut closed) };
    assert_eq!(sampler.choose(place), Err(NoChoice::NoNumbers));
    let logits = [f32::NEG_INFINITY, f32::NEG_INFINITY, 9.0, 9.0, -1.0];
    let place = Place { logits: &logits, sampling: &sampling, tokens: &full, prompt: 0, mask: Some(&mut closed) };
    assert_eq!(sampler.choose(place), Err(NoChoice::AllForbidden));
}

#[test]
fn masks_are_sets_of_tokens() {
    let mut mask = BitMask::new(130);
    mask.allow_all();
    mask.forbid(64);
    mask.forbid(1_000);
    assert!(mask.is_allowed(129) && !mask.is_allowed(64) && !mask.is_allowed(130));
    let mut row = vec![0.0; 130];
    mask.apply(&mut row);
    assert_eq!(row.iter().position(|logit| *logit < 0.0), Some(64));
    let mut smaller = BitMask::new(70);
    smaller.allow(69);
    mask.copy_from(&smaller);
    assert_eq!((0..200).filter(|id| mask.is_allowed(*id)).collect::<Vec<_>>(), [69]);
}

#[test]
fn the_same_seed_and_position_draw_the_same() {
    let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32).collect();
    let draw = |seed| (0..50).map(|p| sample(&logits, &sampling(1.0, 0.9, seed), p)).collect::<Vec<_>>();
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
}

/// `cargo test --release -p ingle-engine --lib how_long -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, not a proof"]
fn how_long_a_choice_takes() {
    let usual = Sampling { temperature: 0.7, top_p: 0.9, top_k: 40, ..Sampling::default() };
    let bias = vec![LogitBias { token: 5, bias: 1.0 }];
    let cases = [
        ("greedy", Sampling::default()),
        ("temperature 0.7, top_p 0.9, top_k 40", usual.clone()),
        (
            "the same and every penalty",
            Sampling {
                repetition_penalty: 1.1,
                presence_penalty: 0.1,
                frequency_penalty: 0.1,
                logit_bias: bias,
                ..usual.clone()
            },
        ),
        ("the same with 20 logprobs", Sampling { logprobs: Some(20), ..usual.clone() }),
        ("temperature 0.7, top_p 0.9", Sampling { top_k: 0, ..usual.clone() }),
        ("temperature 2, top_p 0.99", Sampling { temperature: 2.0, top_p: 0.99, top_k: 0, ..usual.clone() }),
        ("temperature 0.7, min_p 0.05", Sampling { top_k: 0, top_p: 1.0, min_p: 0.05, ..usual.clone() }),
        ("temperature 1, no filter", Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, ..usual.clone() }),
        ("top_k 5000", Sampling { top_k: 5_000, ..usual }),
    ];
    for vocabulary in [49_152u32, 151_936, 262_144] {
        // Much like a model's: bell-shaped, a few far above the others.
        let uniform = |n| (numbers::random(1, n) >> 40) as f32 / (1 << 24) as f32;
        let bell = |id: u32| (0..6).map(|n| uniform(id * 6 + n)).sum::<f32>() * 4.0 - 12.0;
        let logits: Vec<f32> = (0..vocabulary).map(|id| bell(id) + if id % 9_973 == 7 { 10.0 } else { 0.0 }).collect();
        let tokens: Vec<u32> = (0..1_000).map(|n| n * 31 % vocabulary).collect();
        let mut sampler = Sampler::new(&Numbers(vocabulary));
        for (name, sampling) in &cases {
            let mut times: Vec<f64> = (0..200)
                .map(|n| {
                    let start = Instant::now();
                    let tokens = &tokens[..800 + n];
                    let place = Place { logits: &logits, sampling, tokens, prompt: 500, mask: None };
                    std::hint::black_box(sampler.choose(place).unwrap());
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            times.sort_by(f64::total_cmp);
            println!("{vocabulary:>7} tokens, {name:<40} {:.3} ms (p50), {:.3} ms (p95)", times[100], times[190]);
        }
    }
}

/// An engine may choose a token itself only where its scores alone decide.
#[test]
fn tokens_that_need_more_than_scores_are_not_drawn_by_the_engine() {
    let plain = Sampling { temperature: 0.5, top_k: 40, seed: 3, ..Sampling::default() };
    let draw = draw_of(&plain, 7, false).unwrap();
    assert_eq!((draw.inverse_temperature, draw.top_k, draw.random), (2.0, 40, numbers::random(3, 7)));
    assert_eq!(draw_of(&Sampling { top_k: 1, ..plain.clone() }, 7, false).unwrap().inverse_temperature, 0.0);
    assert_eq!(draw_of(&Sampling::default(), 7, false).unwrap().inverse_temperature, 0.0);
    assert!(draw_of(&plain, 7, true).is_none(), "a grammar");
    let others = [
        Sampling { logprobs: Some(0), ..plain.clone() },
        Sampling { repetition_penalty: 1.1, ..plain.clone() },
        Sampling { presence_penalty: 0.1, ..plain.clone() },
        Sampling { ignore_eos: true, ..plain.clone() },
        Sampling { min_tokens: 8, ..plain },
    ];
    assert!(others.iter().all(|sampling| draw_of(sampling, 7, false).is_none()));
}
