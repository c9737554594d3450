//! Constrained decoding: who decides which tokens may come next.

use super::scan::BLOCK;

/// One bit for each token of a vocabulary: whether it may come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitMask {
    words: Vec<u64>,
    tokens: usize,
}

/// Tokens of one word; as many as of one block of logits.
const WORD: usize = u64::BITS as usize;
const _: () = assert!(WORD == BLOCK);

impl BitMask {
    /// For a vocabulary of so many tokens, all forbidden.
    pub fn new(tokens: usize) -> Self {
        Self { words: vec![0; tokens.div_ceil(WORD)], tokens }
    }

    /// Tokens of the vocabulary.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Lets the token come. One that the vocabulary does not have is ignored.
    pub fn allow(&mut self, id: u32) {
        if (id as usize) < self.tokens {
            self.words[id as usize / WORD] |= 1 << (id as usize % WORD);
        }
    }

    /// Does not let the token come.
    pub fn forbid(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / WORD) {
            *word &= !(1 << (id as usize % WORD));
        }
    }

    /// Lets every token come.
    pub fn allow_all(&mut self) {
        self.words.fill(u64::MAX);
    }

    /// Lets no token come.
    pub fn forbid_all(&mut self) {
        self.words.fill(0);
    }

    /// Becomes like another mask, which may be for a smaller vocabulary: then the other tokens are forbidden.
    pub fn copy_from(&mut self, other: &Self) {
        self.forbid_all();
        for (word, from) in self.words.iter_mut().zip(&other.words) {
            *word = *from;
        }
    }

    /// Whether the token may come.
    pub fn is_allowed(&self, id: u32) -> bool {
        (id as usize) < self.tokens && self.words[id as usize / WORD] >> (id as usize % WORD) & 1 == 1
    }

    /// All forbidden, for so many tokens; memory is kept.
    pub(super) fn reset(&mut self, tokens: usize) {
        self.words.clear();
        self.words.resize(tokens.div_ceil(WORD), 0);
        self.tokens = tokens;
    }

    /// Makes forbidden tokens impossible.
    pub(super) fn apply(&self, row: &mut [f32]) {
        for (block, word) in row.chunks_mut(WORD).zip(&self.words) {
            match *word {
                u64::MAX => {}
                0 => block.fill(f32::NEG_INFINITY),
                word => {
                    for (logit, bit) in block.iter_mut().zip(0..) {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

/// Decides step by step which tokens may come next: a grammar, a schema, a list of choices. It belongs to one
/// answer.
///
/// The answer ends as any other: when the model ends it (so an end token must be allowed where the answer may be
/// over), at a stop, or when it is long enough. Where no token is left, it ends with an error that says so.
pub trait TokenMask: Send + std::fmt::Debug {
    /// Allows in `mask`, in which every token is forbidden, what may follow `generated`, the tokens of the answer.
    /// Called once for each token, after the one before it was added; a resumed answer has several at its first
    /// call. It runs between two steps of the whole batch, so it should take well under a millisecond.
    fn allowed(&mut self, generated: &[u32], mask: &mut BitMask);
}
