//! What changes single logits: biases, penalties, and tokens that must not come.

use ingle_protocol::wire::v2::Sampling;

/// Whether [`adjust`] would change anything.
pub fn any(sampling: &Sampling) -> bool {
    !sampling.logit_bias.is_empty() || repeats(sampling) || counts(sampling)
}

fn repeats(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0 && sampling.repetition_window > 0
}

fn counts(sampling: &Sampling) -> bool {
    sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0
}

/// Biases, then the repetition penalty (over the last tokens of prompt and answer), then presence and frequency
/// (over the answer). A function of the tokens alone: nothing is carried from step to step, so an answer that is
/// resumed elsewhere goes on as it would have here. `seen` is a buffer, all zeros before and after.
pub fn adjust(row: &mut [f32], sampling: &Sampling, tokens: &[u32], prompt: usize, seen: &mut Vec<u32>) {
    for entry in &sampling.logit_bias {
        if let Some(logit) = row.get_mut(entry.token as usize) {
            *logit += entry.bias;
        }
    }
    seen.resize(row.len(), 0);
    if repeats(sampling) {
        let window = &tokens[tokens.len().saturating_sub(sampling.repetition_window as usize)..];
        let penalty = sampling.repetition_penalty;
        each(window, seen, |id, _| {
            let logit = &mut row[id];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        });
    }
    if counts(sampling) {
        each(&tokens[prompt..], seen, |id, count| {
            row[id] -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        });
    }
}

/// Calls `change` once for each different token, with how often it is there.
fn each(tokens: &[u32], seen: &mut [u32], mut change: impl FnMut(usize, u32)) {
    for token in tokens {
        if let Some(count) = seen.get_mut(*token as usize) {
            *count += 1;
        }
    }
    for token in tokens {
        if let Some(count) = seen.get_mut(*token as usize)
            && *count > 0
        {
            change(*token as usize, std::mem::take(count));
        }
    }
}

/// Makes the tokens impossible.
pub fn forbid(row: &mut [f32], tokens: &[u32]) {
    for token in tokens {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use ingle_protocol::wire::v2::LogitBias;

    use super::*;

    fn adjusted(sampling: &Sampling, tokens: &[u32], prompt: usize) -> Vec<f32> {
        let (mut row, mut seen) = (vec![2.0, -2.0, 0.0, 1.0], Vec::new());
        assert!(any(sampling));
        adjust(&mut row, sampling, tokens, prompt, &mut seen);
        assert!(seen.iter().all(|count| *count == 0));
        row
    }

    #[test]
    fn repetition_divides_what_is_positive_and_multiplies_the_rest_once() {
        let mut sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(adjusted(&sampling, &[0, 1, 0, 2, 0], 2), [1.0, -4.0, 0.0, 1.0]);
        sampling.repetition_window = 3;
        assert_eq!(adjusted(&sampling, &[1, 3, 0, 0, 0], 4), [1.0, -2.0, 0.0, 1.0], "only the last three");
        sampling.repetition_window = 0;
        assert!(!any(&sampling));
    }

    #[test]
    fn presence_and_frequency_count_over_the_answer_alone() {
        let sampling = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
        assert_eq!(adjusted(&sampling, &[3, 3, 0, 0, 1], 2), [1.0, -2.75, 0.0, 1.0]);
        let sampling = Sampling { frequency_penalty: -1.0, ..Sampling::default() };
        assert_eq!(adjusted(&sampling, &[3, 0, 0, 0], 1), [5.0, -2.0, 0.0, 1.0], "negative ones reward");
    }

    #[test]
    fn biases_come_before_penalties() {
        let logit_bias = vec![LogitBias { token: 2, bias: 4.0 }, LogitBias { token: 99, bias: 1.0 }];
        let sampling = Sampling { logit_bias, repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(adjusted(&sampling, &[2, 4_000_000], 0), [2.0, -2.0, 2.0, 1.0]);
    }
}
