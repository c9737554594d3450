//! SentencePiece's byte-pair tokenizers (Llama 2, Mistral, Phi-3, Gemma): neighbours are merged as long as their
//! sum is a token, the one with the best score first. The vocabulary has no list of merges, so the `tokenizers`
//! crate cannot express it. Same results as llama.cpp's `llm_tokenizer_spm`.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use super::pieces::{Pieces, VISIBLE_SPACE, put_with_spaces};
use super::vocabulary::{Kind, Vocabulary, byte_of};
use crate::EngineError;
use crate::text::PromptError;

/// No symbol.
const NONE: u32 = u32::MAX;

/// A vocabulary with scores.
#[derive(Debug)]
pub(super) struct SentencePiece {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    /// The token of each byte, for what is in no piece.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Bytes of the longest piece: nothing longer is ever looked up, which bounds the work for each character.
    longest: usize,
    space_in_front: bool,
}

/// A part of the text that is one piece so far, in a list of its neighbours.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: u32,
    /// 0 where it has become a part of its left neighbour.
    length: u32,
    previous: u32,
    next: u32,
}

/// Two neighbours whose sum is a token. The greatest is merged first.
#[derive(Debug)]
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of both; another sum says that one of them has changed since.
    length: u32,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        // The leftmost of equals. Any order will do for NaN, as long as it is one.
        self.score.total_cmp(&other.score).then_with(|| Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SentencePiece {
    /// From a vocabulary of type `llama`.
    pub fn new(vocabulary: &Vocabulary<'_>) -> Result<Self, EngineError> {
        // −0 is 0.
        let scores = vocabulary.scores()?.map(|score| score + 0.0).collect();
        let ids = vocabulary.pieces();
        let mut bytes = vec![None; 256];
        for (id, token) in vocabulary.of(&[Kind::Byte]) {
            if let Some(byte) = byte_of(token) {
                bytes[usize::from(byte)] = Some(id);
            }
        }
        let longest = ids.keys().map(String::len).max().unwrap_or(0);
        let unknown = vocabulary.id("unknown")?;
        let space_in_front = vocabulary.flag("add_space_prefix")?.unwrap_or(true);
        Ok(Self { ids, scores, bytes, unknown, longest, space_in_front })
    }

    /// Puts the sum of two neighbours into the queue if it is a token.
    fn consider(&self, text: &str, symbols: &[Symbol], left: u32, right: u32, queue: &mut BinaryHeap<Pair>) {
        let (Some(first), Some(second)) = (symbols.get(left as usize), symbols.get(right as usize)) else { return };
        let length = first.length + second.length;
        let start = first.start as usize;
        if length as usize > self.longest {
            return;
        }
        if let Some(id) = text.get(start..start + length as usize).and_then(|sum| self.ids.get(sum)) {
            queue.push(Pair { score: self.scores[*id as usize], left, right, length });
        }
    }

    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = (0u32..)
            .zip(text.char_indices())
            .map(|(n, (start, character))| Symbol {
                start: start as u32,
                length: character.len_utf8() as u32,
                previous: n.checked_sub(1).unwrap_or(NONE),
                next: n + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() as u32 {
            self.consider(text, &symbols, right - 1, right, &mut queue);
        }
        while let Some(Pair { left, right, length, .. }) = queue.pop() {
            let (first, second) = (symbols[left as usize], symbols[right as usize]);
            if first.length == 0 || second.length == 0 || first.length + second.length != length {
                continue;
            }
            symbols[left as usize] = Symbol { length, next: second.next, ..first };
            symbols[right as usize].length = 0;
            if let Some(next) = symbols.get_mut(second.next as usize) {
                next.previous = left;
            }
            self.consider(text, &symbols, first.previous, left, &mut queue);
            self.consider(text, &symbols, left, second.next, &mut queue);
        }
        symbols
    }
}

impl Pieces for SentencePiece {
    fn encode(&self, text: &str, fresh: bool, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let mut spaced = String::with_capacity(text.len() + text.len() / 2);
        if self.space_in_front && fresh {
            spaced.push(VISIBLE_SPACE);
        }
        spaced.extend(text.chars().map(|character| if character == ' ' { VISIBLE_SPACE } else { character }));
        if spaced.len() >= NONE as usize {
            return Err(PromptError(format!("the text has {} bytes, which is too long to be tokenized", text.len())));
        }
        for symbol in self.merge(&spaced).into_iter().filter(|symbol| symbol.length > 0) {
            let from = symbol.start as usize;
            let piece = &spaced[from..from + symbol.length as usize];
            match self.ids.get(piece) {
                Some(id) => ids.push(*id),
                None => {
                    // A vocabulary without this byte has a token for what it does not know, or says nothing.
                    let byte_or_unknown = |byte: u8| self.bytes[usize::from(byte)].or(self.unknown);
                    ids.extend(piece.bytes().filter_map(byte_or_unknown));
                }
            }
        }
        Ok(())
    }

    fn bytes_of(&self, token: &str, kind: Kind, bytes: &mut Vec<u8>) {
        match kind {
            Kind::Byte => bytes.extend(byte_of(token)),
            Kind::UserDefined => bytes.extend_from_slice(token.as_bytes()),
            Kind::Normal => put_with_spaces(token, bytes),
            Kind::Control | Kind::Unknown | Kind::Unused => {}
        }
    }

    fn leading_space(&self) -> bool {
        self.space_in_front
    }
}
