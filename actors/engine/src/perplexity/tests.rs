use super::*;
use crate::{Capabilities, Logits};

/// Says that the next token is the last one plus one, with this much of a lead, of a vocabulary of 8.
struct Counting {
    capabilities: Capabilities,
    lead: f32,
    position: u32,
    began_with: Vec<u32>,
}

fn counting(lead: f32) -> Counting {
    let capabilities = Capabilities {
        slots: 1,
        context_length: 16,
        vocabulary: 8,
        chunk: 3,
        blocks: 0,
        block_tokens: 0,
        backend: "test".into(),
        numerics: "test".into(),
    };
    Counting { capabilities, lead, position: 0, began_with: Vec::new() }
}

impl StepEngine for Counting {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn step(&mut self, entries: &[StepEntry], want_logits: &[usize]) -> Result<Logits, EngineError> {
        for entry in entries {
            assert_eq!(entry.position, self.position);
            if self.position == 0 {
                self.began_with.push(entry.token);
            }
            self.position += 1;
        }
        let mut values = vec![0.0; want_logits.len() * 8];
        for (row, n) in want_logits.iter().enumerate() {
            values[row * 8 + (entries[*n].token as usize + 1) % 8] = self.lead;
        }
        Ok(Logits::new(values, 8))
    }

    fn release(&mut self, _slot: u32) {
        self.position = 0;
    }
}

#[test]
fn a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() {
    let found = evaluate(&mut counting(0.0), None, &[1, 5, 2, 7, 3, 3, 0], 4, &mut |_, _| true).unwrap();
    assert!((found.perplexity - 8.0).abs() < 1e-9, "{found:?}");
    // Windows of 4 and 3 tokens: 3 + 2 are predicted.
    assert_eq!((found.tokens, found.windows), (5, 2));
}

#[test]
fn perplexity_is_exp_of_the_mean_loss() {
    let tokens = [0, 1, 2, 3, 4, 4];
    let found = evaluate(&mut counting(2.0), None, &tokens, 16, &mut |_, _| true).unwrap();
    let (right, wrong) = (2.0 - (2f64.exp() + 7.0).ln(), -(2f64.exp() + 7.0).ln());
    let expected = (-(4.0 * right + wrong) / 5.0).exp();
    assert!((found.perplexity - expected).abs() < 1e-9, "{found:?} {expected}");
}

#[test]
fn windows_begin_with_the_token_that_texts_begin_with() {
    let mut engine = counting(0.0);
    let found = evaluate(&mut engine, Some(6), &[1, 2, 3, 4], 3, &mut |_, _| true).unwrap();
    assert_eq!(engine.began_with[..2], [6, 6]);
    assert_eq!(found.tokens, 4);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let of = |tokens: &[u32], context| {
        evaluate(&mut counting(0.0), None, tokens, context, &mut |_, _| true).unwrap_err().to_string()
    };
    assert!(of(&[1], 8).contains("has 1 tokens"));
    assert!(of(&[1, 2], 1).contains("context of 1"));
    assert!(of(&[1, 2], 17).contains("the model has 16"));
    let cancelled = evaluate(&mut counting(0.0), None, &[1, 2], 8, &mut |_, _| false);
    assert!(matches!(cancelled, Err(EvaluationError::Cancelled)));
}
