//! What holds whatever the logits and the sampling are.

use proptest::prelude::*;

use super::*;

prop_compose! {
    fn any_sampling()(
        (temperature, top_p, min_p) in (0.0f32..2.0, 0.0f32..1.2, -0.3f32..1.0),
        (top_k, seed, window) in (0u32..90, any::<u64>(), 0u32..60),
        (repetition, presence, frequency) in (0.5f32..2.0, -2.0f32..2.0, -2.0f32..2.0),
        biases in proptest::collection::vec((0u32..80, -100.0f32..100.0), 0..4),
        (ignore_eos, min_tokens, logprobs) in (any::<bool>(), 0u32..20, proptest::option::of(0u8..21)),
    ) -> Sampling {
        Sampling {
            temperature: if temperature < 0.2 { 0.0 } else { temperature },
            top_k,
            top_p: top_p.min(1.0),
            min_p: min_p.max(0.0),
            repetition_penalty: if repetition < 0.8 { 1.0 } else { repetition },
            repetition_window: if window > 40 { u32::MAX } else { window },
            presence_penalty: presence,
            frequency_penalty: frequency,
            logit_bias: biases.into_iter().map(|(token, bias)| LogitBias { token, bias }).collect(),
            seed,
            min_tokens,
            ignore_eos,
            logprobs,
            ..Sampling::default()
        }
    }
}

fn any_logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -12.0f32..12.0,
        1 => Just(f32::NAN),
        1 => Just(f32::NEG_INFINITY),
        1 => any::<f32>(),
        1 => Just(3.0),
    ]
}

/// A set of tokens, whatever was said.
#[derive(Debug)]
struct Only(Vec<u32>);

impl TokenMask for Only {
    fn allowed(&mut self, _: &[u32], mask: &mut BitMask) {
        self.0.iter().for_each(|id| mask.allow(*id));
    }
}

/// What the filters leave, by the book: sorted, in f64.
fn by_the_book(row: &[f32], sampling: &Sampling) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY).collect();
    ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    let greatest = f64::from(row[ids[0] as usize]);
    let weight = |id: &u32| ((f64::from(row[*id as usize]) - greatest) / f64::from(sampling.temperature)).exp();
    if sampling.top_k > 0 {
        ids.truncate(sampling.top_k as usize);
    }
    // A little more than by the book, because of roundings.
    let target = (f64::from(sampling.top_p) + 1e-5) * ids.iter().map(weight).sum::<f64>();
    let mut reached = 0.0;
    let enough = ids.iter().position(|id| {
        reached += weight(id);
        reached >= target
    });
    ids.truncate(enough.map_or(ids.len(), |at| at + 1));
    ids.retain(|id| weight(id) >= f64::from(sampling.min_p) * (1.0 - 1e-5));
    ids
}

proptest! {
    #[test]
    fn whatever_comes_is_allowed_and_nothing_panics(
        row in proptest::collection::vec(any_logit(), 1..300),
        sampling in any_sampling(),
        tokens in proptest::collection::vec(0u32..400, 0..60),
        only in proptest::option::of(proptest::collection::vec(0u32..300, 0..20)),
        prompt in 0usize..60,
    ) {
        let mut sampler = Sampler::new(&Numbers(row.len() as u32));
        let prompt = prompt.min(tokens.len());
        let mut mask = only.clone().map(Only);
        let mask = mask.as_mut().map(|mask| mask as &mut dyn TokenMask);
        let place = Place { logits: &row, sampling: &sampling, tokens: &tokens, prompt, mask };
        match sampler.choose(place) {
            Ok(Chosen { id, likelihood }) => {
                prop_assert!(!row[id as usize].is_nan() && row[id as usize] > f32::NEG_INFINITY);
                prop_assert!(only.is_none_or(|only| only.contains(&id)));
                let last = id as usize + 1 == row.len();
                prop_assert!(!(last && (sampling.ignore_eos || tokens.len() - prompt < sampling.min_tokens as usize)));
                prop_assert_eq!(likelihood.is_some(), sampling.logprobs.is_some());
                if let Some(likelihood) = likelihood {
                    prop_assert!(likelihood.chosen.is_finite() && likelihood.chosen <= 1e-6);
                    prop_assert!(likelihood.top.is_sorted_by(|a, b| a.1 >= b.1));
                    prop_assert!(likelihood.top.len() <= usize::from(sampling.logprobs.unwrap_or(0)));
                }
            }
            Err(NoChoice::NoNumbers) => prop_assert!(!row.iter().any(|logit| *logit > f32::NEG_INFINITY)),
            Err(NoChoice::AllForbidden) => prop_assert!(only.is_some() || row.last() > Some(&f32::NEG_INFINITY)),
        }
    }

    #[test]
    fn the_filters_leave_what_the_book_says(
        row in proptest::collection::vec(-8.0f32..8.0, 1..400),
        sampling in any_sampling(),
        position in 0u32..1000,
    ) {
        let sampling = Sampling {
            temperature: sampling.temperature.max(0.1), top_k: sampling.top_k, top_p: sampling.top_p,
            min_p: sampling.min_p, seed: sampling.seed, ..Sampling::default()
        };
        let id = sample(&row, &sampling, position).unwrap();
        prop_assert!(by_the_book(&row, &sampling).contains(&id));
    }

    /// Any split of an answer into what is resumed and the rest gives the same tokens.
    #[test]
    fn a_resumed_answer_goes_on_as_it_was(sampling in any_sampling(), length in 1usize..40, prompt in 1usize..20) {
        // A model whose logits are a function of all tokens so far.
        let model = |tokens: &[u32]| -> Vec<f32> {
            let state = tokens.iter().fold(7, |state, token| numbers::random(state, *token));
            (0..80).map(|id| (numbers::random(state, id) >> 44) as f32 / 100_000.0).collect()
        };
        // A sampler that has served others before, as an engine's has.
        let go_on = |mut tokens: Vec<u32>| {
            let mut sampler = Sampler::new(&Numbers(80));
            while tokens.len() < prompt + length {
                let logits = model(&tokens);
                let place = Place { logits: &logits, sampling: &sampling, tokens: &tokens, prompt, mask: None };
                let id = sampler.choose(place).unwrap().id;
                tokens.push(id);
            }
            tokens
        };
        let whole = go_on((0..prompt as u32).collect());
        for cut in 0..=length {
            prop_assert_eq!(&go_on(whole[..prompt + cut].to_vec()), &whole, "cut at {}", cut);
        }
    }
}
