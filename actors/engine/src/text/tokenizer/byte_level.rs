//! GPT-2's byte-pair tokenizers (Llama 3, Qwen, SmolLM, Mistral Nemo, Phi-4): the text is cut into words, and the
//! bytes of each word are merged in the order in which the merges were learned.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::NFC;
use tokenizers::{Model, NormalizedString, Normalizer};

use super::pieces::Pieces;
use super::vocabulary::{Kind, Vocabulary, byte_of};
use super::words::{SUPPORTED, Words};
use crate::EngineError;
use crate::text::PromptError;

/// A vocabulary with merges.
#[derive(Debug)]
pub(super) struct ByteLevel {
    words: Words,
    model: BPE,
    /// GPT-2's printable stand-in of each byte.
    shown: Vec<char>,
    byte: HashMap<char, u8>,
}

impl ByteLevel {
    /// From a vocabulary of type `gpt2`.
    pub fn new(vocabulary: &Vocabulary<'_>) -> Result<Self, EngineError> {
        let merges = vocabulary.merges()?;
        let pre = vocabulary.text("tokenizer.ggml.pre")?.unwrap_or("none");
        let words = Words::named(pre).ok_or_else(|| {
            let what = format!("the tokenizer variant {pre:?} (tokenizer.ggml.pre)");
            vocabulary.unsupported(what, format!("{} are", SUPPORTED.join(", ")))
        })?;
        let words = words.map_err(|why| vocabulary.broken(why.to_string()))?;
        let merges = merges
            .iter()
            .map(|merge| {
                // A space parts the two; neither can have one, as GPT-2 writes it `Ġ`.
                let pair = merge.split_once(' ').map(|(left, right)| (left.to_string(), right.to_string()));
                pair.ok_or_else(|| vocabulary.broken(format!("the merge {merge:?} is not a pair")))
            })
            .collect::<Result<Merges, _>>()?;
        let model = BPE::builder()
            .vocab_and_merges(vocabulary.pieces().into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .ignore_merges(words.whole_first)
            .build()
            .map_err(|why| vocabulary.broken(why.to_string()))?;
        let shown = alphabet();
        let byte = shown.iter().copied().zip(0..=255).collect();
        Ok(Self { words, model, shown, byte })
    }

    /// The variant puts a BOS in front unless the file says otherwise.
    pub fn begins(&self) -> bool {
        self.words.begins
    }
}

impl Pieces for ByteLevel {
    fn encode(&self, text: &str, _fresh: bool, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let failed = |why: tokenizers::Error| PromptError(format!("the text cannot be tokenized: {why}"));
        let composed;
        let text = if self.words.compose && !text.is_ascii() {
            let mut normalized = NormalizedString::from(text);
            NFC.normalize(&mut normalized).map_err(failed)?;
            composed = normalized;
            composed.get()
        } else {
            text
        };
        let mut shown = String::new();
        let mut problem = None;
        self.words.cut(text, &mut |word| {
            shown.clear();
            shown.extend(word.bytes().map(|byte| self.shown[usize::from(byte)]));
            match self.model.tokenize(&shown) {
                Ok(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                Err(why) => problem = Some(why),
            }
        });
        problem.map_or(Ok(()), |why| Err(failed(why)))
    }

    fn bytes_of(&self, token: &str, kind: Kind, bytes: &mut Vec<u8>) {
        match kind {
            Kind::UserDefined => bytes.extend_from_slice(token.as_bytes()),
            Kind::Byte => bytes.extend(byte_of(token)),
            Kind::Normal => {
                for character in token.chars() {
                    match self.byte.get(&character) {
                        Some(byte) => bytes.push(*byte),
                        // Outside of the alphabet it stands for itself.
                        None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            Kind::Control | Kind::Unknown | Kind::Unused => {}
        }
    }
}

/// GPT-2's printable stand-ins: bytes that are printable in Latin 1 stand for themselves.
fn alphabet() -> Vec<char> {
    let mut hidden = '\u{100}'..;
    (0..=255u8)
        .map(|byte| match byte {
            33..=126 | 161..=172 | 174..=255 => char::from(byte),
            _ => hidden.next().unwrap_or_default(),
        })
        .collect()
}
