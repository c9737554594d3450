//! The tokens of a GGUF file and what they are for, checked.

use std::collections::HashMap;

use crate::EngineError;
use crate::gguf::{Gguf, GgufError};

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A piece of text.
    Normal,
    /// Stands for what cannot be expressed.
    Unknown,
    /// Steers the model: begins and ends turns. No text becomes one by itself.
    Control,
    /// A piece of text that is found before everything else and never split.
    UserDefined,
    /// Has never been seen in training.
    Unused,
    /// A single byte, written `<0x0A>`.
    Byte,
}

/// Tokens that end an answer by their name, beside the ones that the file declares. They are control tokens even
/// where the file says otherwise, which some conversions get wrong.
const ENDS: [&str; 10] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    // What a code model says where one file ends and another begins.
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// The same, but only where the file says that they are control tokens: elsewhere they are HTML.
const ENDS_IF_CONTROL: [&str; 2] = ["</s>", "<eos>"];

/// The `tokenizer.ggml.*` metadata of a file.
#[derive(Debug)]
pub(super) struct Vocabulary<'a> {
    gguf: &'a Gguf,
    model: &'a str,
    /// The texts of the tokens, as the file has them.
    pub tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

impl<'a> Vocabulary<'a> {
    /// Reads the tokens and their types. `model` is the type of the tokenizer.
    pub fn read(gguf: &'a Gguf, model: &'a str) -> Result<Self, EngineError> {
        let mut vocabulary = Self { gguf, model, tokens: vec![], kinds: vec![] };
        let key = "tokenizer.ggml.tokens";
        let tokens = vocabulary.sound(gguf.texts(key))?.filter(|tokens| !tokens.is_empty());
        vocabulary.tokens = tokens.ok_or_else(|| vocabulary.missing(key))?;
        let tokens = &vocabulary.tokens;
        if u32::try_from(tokens.len()).is_err() {
            return Err(vocabulary.broken(format!("{} tokens are more than can be numbered", tokens.len())));
        }
        let types = vocabulary.sound(gguf.integers("tokenizer.ggml.token_type"))?.filter(|types| types.len() != 0);
        if let Some(types) = &types
            && types.len() != tokens.len()
        {
            return Err(vocabulary.broken(format!("{} tokens, but {} token types", tokens.len(), types.len())));
        }
        let mut types = types.into_iter().flatten();
        let kind = |token: &&str| match types.next() {
            _ if ENDS.contains(token) => Kind::Control,
            Some(2) => Kind::Unknown,
            Some(3) => Kind::Control,
            Some(4) => Kind::UserDefined,
            Some(5) => Kind::Unused,
            Some(6) => Kind::Byte,
            _ => Kind::Normal,
        };
        vocabulary.kinds = tokens.iter().map(kind).collect();
        Ok(vocabulary)
    }

    /// All tokens with their ids and kinds.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        (0u32..).zip(&self.tokens).zip(&self.kinds).map(|((id, token), kind)| (id, *token, *kind))
    }

    /// Those of some kinds that have a text.
    pub fn of(&self, kinds: &[Kind]) -> Vec<(u32, &'a str)> {
        let wanted = |(id, token, kind): (u32, &'a str, Kind)| kinds.contains(&kind).then_some((id, token));
        self.iter().filter_map(wanted).filter(|(_, token)| !token.is_empty()).collect()
    }

    /// Token texts that plain text may become. Control tokens are none of them, whatever is written.
    pub fn pieces(&self) -> HashMap<String, u32> {
        let plain = [Kind::Normal, Kind::UserDefined, Kind::Unused];
        self.of(&plain).into_iter().map(|(id, token)| (token.to_string(), id)).collect()
    }

    /// The token that the file declares as its `bos`, `eos`, `unknown` and so on; where it does not say, the one
    /// that tokenizers of this type always have.
    pub fn id(&self, role: &str) -> Result<Option<u32>, EngineError> {
        let usual = match (self.model, role) {
            ("llama", "unknown") => Some(0),
            ("llama", "bos") => Some(1),
            ("llama", "eos") => Some(2),
            ("bert", "unknown") => Some(100),
            ("bert", "cls") => Some(101),
            ("bert", "seperator") => Some(102),
            _ => None,
        };
        let key = format!("tokenizer.ggml.{role}_token_id");
        match self.sound(self.gguf.number(&key))? {
            Some(id) if id as usize >= self.tokens.len() => {
                Err(self.broken(format!("{key} is {id}, of {} tokens", self.tokens.len())))
            }
            None => Ok(usual.filter(|id| (*id as usize) < self.tokens.len())),
            id => Ok(id),
        }
    }

    /// The text of a token; empty for none.
    pub fn text_of(&self, id: Option<u32>) -> &'a str {
        id.and_then(|id| self.tokens.get(id as usize)).map_or("", |token| *token)
    }

    /// A truth value under `tokenizer.ggml.*`.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, EngineError> {
        self.sound(self.gguf.boolean(&format!("tokenizer.ggml.{name}")))
    }

    /// A text anywhere in the metadata.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, EngineError> {
        self.sound(self.gguf.text(key))
    }

    /// A list that must be there.
    pub fn merges(&self) -> Result<Vec<&'a str>, EngineError> {
        let key = "tokenizer.ggml.merges";
        self.sound(self.gguf.texts(key))?.ok_or_else(|| self.missing(key))
    }

    /// One score for each token.
    pub fn scores(&self) -> Result<impl Iterator<Item = f32>, EngineError> {
        let key = "tokenizer.ggml.scores";
        let scores = self.sound(self.gguf.floats(key))?.ok_or_else(|| self.missing(key))?;
        if scores.len() != self.tokens.len() {
            return Err(self.broken(format!("{} tokens, but {} scores", self.tokens.len(), scores.len())));
        }
        Ok(scores)
    }

    /// The tokens that end an answer, in order.
    pub fn ends(&self) -> Result<Vec<u32>, EngineError> {
        let declared = ["eos", "eot", "eom"].into_iter().map(|role| self.id(role)).collect::<Result<Vec<_>, _>>()?;
        let named = self.iter().filter(|(_, token, kind)| {
            *kind == Kind::Control && (ENDS.contains(token) || ENDS_IF_CONTROL.contains(token))
        });
        let mut ends: Vec<u32> = declared.into_iter().flatten().chain(named.map(|(id, ..)| id)).collect();
        ends.sort_unstable();
        ends.dedup();
        Ok(ends)
    }

    fn sound<T>(&self, found: Result<T, GgufError>) -> Result<T, EngineError> {
        found.map_err(|why| EngineError::Gguf { path: self.gguf.path().into(), why })
    }

    fn missing(&self, key: &str) -> EngineError {
        self.broken(format!("{key} is missing"))
    }

    /// The metadata contradicts itself.
    pub fn broken(&self, why: String) -> EngineError {
        EngineError::Tokenizer { path: self.gguf.path().into(), why }
    }

    /// The metadata is sound, but not for us.
    pub fn unsupported(&self, what: String, hint: String) -> EngineError {
        EngineError::Unsupported { path: self.gguf.path().into(), what, hint }
    }

    /// The chat template does not work.
    pub fn bad_template(&self, why: String) -> EngineError {
        EngineError::ChatTemplate { path: self.gguf.path().into(), why }
    }
}

/// The byte that a token of the form `<0x0A>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}
