//! Byte-pair tokenizers (GPT-2 style) from the metadata of a GGUF file.

use ingle_protocol::wire::v1::Message;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, PreTokenizerWrapper};

use super::{ChatTemplate, Codec, PromptError};
use crate::EngineError;
use crate::gguf::Gguf;

/// Whether special tokens that stand in a text are recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// They become their own id.
    Parse,
    /// They are split like any other text.
    AsText,
}

/// A tokenizer with the chat template that belongs to it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: ChatTemplate,
    /// Control tokens, the longest first.
    specials: Vec<(String, u32)>,
    /// The bytes of all tokens, one after the other, and where each begins.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    ends: Vec<u32>,
    longest: usize,
}

/// Token types as ggml numbers them.
mod kind {
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const UNUSED: i64 = 5;
}

/// Control tokens that end an answer by their name, beside the ones that the file declares.
const END_NAMES: [&str; 8] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"];

/// Characters that no text should contain, one of which marks special tokens that a user wrote.
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

impl Tokenizer {
    /// From a model file.
    pub fn open(path: &std::path::Path) -> Result<Self, EngineError> {
        Self::from_gguf(&Gguf::open(path)?)
    }

    /// From the `tokenizer.*` metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, EngineError> {
        let path = gguf.path();
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let broken = |why: String| EngineError::Tokenizer { path: path.into(), why };
        let need = |key: &str| broken(format!("{key} is missing"));

        let model = gguf.text("tokenizer.ggml.model").map_err(damaged)?.unwrap_or("none");
        if model != "gpt2" {
            let what = format!("a tokenizer of type {model:?}");
            return Err(EngineError::Unsupported {
                path: path.into(),
                what,
                hint: "only \"gpt2\" (byte-level BPE) is".into(),
            });
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens").map_err(damaged)?;
        let tokens = tokens.filter(|tokens| !tokens.is_empty()).ok_or_else(|| need("tokenizer.ggml.tokens"))?;
        let merges =
            gguf.texts("tokenizer.ggml.merges").map_err(damaged)?.ok_or_else(|| need("tokenizer.ggml.merges"))?;
        let kinds = gguf.integers("tokenizer.ggml.token_type").map_err(damaged)?.unwrap_or(&[]);
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(broken(format!("{} tokens, but {} token types", tokens.len(), kinds.len())));
        }
        let kind_of = |id: usize| kinds.get(id).copied().unwrap_or(1);
        let name = |key: &str| -> Result<Option<u32>, EngineError> {
            match gguf.number(key).map_err(damaged)? {
                Some(id) if id as usize >= tokens.len() => {
                    Err(broken(format!("{key} is {id}, of {} tokens", tokens.len())))
                }
                id => Ok(id),
            }
        };

        let pre = gguf.text("tokenizer.ggml.pre").map_err(damaged)?.unwrap_or("none");
        let inner = build(pre, tokens, merges, &kind_of).map_err(|why| match why {
            BuildError::UnknownPre => EngineError::Unsupported {
                path: path.into(),
                what: format!("the tokenizer variant {pre:?} (tokenizer.ggml.pre)"),
                hint: "smollm, gpt-2, llama-bpe and qwen2 are".into(),
            },
            BuildError::Broken(why) => broken(why),
        })?;

        let bos = name("tokenizer.ggml.bos_token_id")?;
        let eos = name("tokenizer.ggml.eos_token_id")?;
        let text_of = |id: Option<u32>| id.map_or("", |id| tokens[id as usize].as_str());
        let source = gguf.text("tokenizer.chat_template").map_err(damaged)?;
        let source = source.ok_or_else(|| EngineError::ChatTemplate {
            path: path.into(),
            why: "tokenizer.chat_template is missing: this is not a chat model".into(),
        })?;
        let template = ChatTemplate::new(source, text_of(bos), text_of(eos))
            .map_err(|why| EngineError::ChatTemplate { path: path.into(), why })?;

        let with_ids = || tokens.iter().zip(0u32..);
        let mut specials: Vec<(String, u32)> = with_ids()
            .filter(|(token, id)| matches!(kind_of(*id as usize), kind::CONTROL | kind::UNKNOWN) && !token.is_empty())
            .map(|(token, id)| (token.clone(), id))
            .collect();
        specials.sort_by_key(|(token, _)| std::cmp::Reverse(token.len()));
        let mut ends: Vec<u32> = [Some("eot"), Some("eom"), Some("eos")]
            .into_iter()
            .flatten()
            .map(|which| name(&format!("tokenizer.ggml.{which}_token_id")))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect();
        ends.extend(specials.iter().filter(|(token, _)| END_NAMES.contains(&token.as_str())).map(|(_, id)| *id));
        ends.sort_unstable();
        ends.dedup();

        let alphabet = byte_alphabet();
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for (token, id) in with_ids() {
            match kind_of(id as usize) {
                kind::CONTROL | kind::UNKNOWN | kind::UNUSED => {}
                kind::USER_DEFINED => bytes.extend_from_slice(token.as_bytes()),
                _ => bytes_of(token, &alphabet, &mut bytes),
            }
            starts.push(bytes.len());
        }
        let longest = starts.windows(2).map(|place| place[1] - place[0]).max().unwrap_or(1);
        Ok(Self { inner, template, specials, bytes, starts, ends, longest })
    }

    /// The token ids of a text; nothing is added in front or behind.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, PromptError> {
        let mut ids = Vec::new();
        match special {
            Special::AsText => self.encode_plain(text, &mut ids)?,
            Special::Parse => self.encode_around_specials(text, None, &mut ids)?,
        }
        Ok(ids)
    }

    /// The conversation as text, as the model's template has it.
    pub fn render(&self, messages: &[Message]) -> Result<String, PromptError> {
        self.template.render(messages)
    }

    /// All the text of some tokens. Half characters become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|why| PromptError(format!("the text cannot be tokenized: {why}")))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// `mark` is taken out of the text between special tokens.
    fn encode_around_specials(&self, text: &str, mark: Option<char>, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let plain = |text: &str, ids: &mut Vec<u32>| match mark {
            Some(mark) if text.contains(mark) => self.encode_plain(&text.replace(mark, ""), ids),
            _ => self.encode_plain(text, ids),
        };
        let mut rest = text;
        let mut found: Vec<_> = self.specials.iter().map(|(token, id)| (token.as_str(), *id, 0..0)).collect();
        // Where each special token comes next; looked up again only once that place is behind us.
        let next = |token: &str, from: usize| text[from..].find(token).map(|at| from + at..from + at + token.len());
        found.retain_mut(|(token, _, place)| next(token, 0).map(|found| *place = found).is_some());
        loop {
            // The earliest; among those the longest, which stands first.
            let first = found.iter().min_by_key(|(_, _, place)| place.start).map(|(_, id, place)| (*id, place.clone()));
            let Some((id, place)) = first else { break plain(rest, ids) };
            let from = text.len() - rest.len();
            plain(&text[from..place.start], ids)?;
            ids.push(id);
            rest = &text[place.end..];
            found.retain_mut(|(token, _, at)| {
                at.start >= place.end || next(token, place.end).map(|found| *at = found).is_some()
            });
        }
    }

    /// Breaks up special tokens that stand in what people wrote, so that nobody ends a turn or speaks for the
    /// system by writing `<|im_end|>`. Returns the character that was put into them.
    fn mark_specials(&self, messages: &mut [Message]) -> Result<Option<char>, PromptError> {
        let holds = |message: &Message| self.specials.iter().any(|(token, _)| message.content.contains(token));
        if !messages.iter().any(holds) {
            return Ok(None);
        }
        let unused = |mark: &char| !messages.iter().any(|message| message.content.contains(*mark));
        let Some(mark) = MARKS.clone().find(unused) else {
            return Err(PromptError("the messages contain special tokens and every Unicode noncharacter".into()));
        };
        for message in messages {
            for (token, _) in &self.specials {
                let mut characters = token.chars();
                if let Some(first) = characters.next() {
                    let broken = format!("{first}{mark}{}", characters.as_str());
                    message.content = message.content.replace(token, &broken);
                }
            }
        }
        Ok(Some(mark))
    }
}

impl Codec for Tokenizer {
    fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
        let mut messages = messages.to_vec();
        let mark = self.mark_specials(&mut messages)?;
        let mut ids = Vec::new();
        self.encode_around_specials(&self.render(&messages)?, mark, &mut ids)?;
        Ok(ids)
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(from), Some(to)) => &self.bytes[*from..*to],
            _ => &[],
        }
    }

    fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    fn vocabulary(&self) -> u32 {
        (self.starts.len() - 1) as u32
    }

    fn longest(&self) -> usize {
        self.longest
    }
}

enum BuildError {
    UnknownPre,
    Broken(String),
}

/// How a text is cut before pairs are merged, as llama.cpp names the variants.
struct Variant {
    steps: Vec<PreTokenizerWrapper>,
    compose: bool,
    ignore_merges: bool,
}

fn variant(pre: &str) -> Result<Variant, BuildError> {
    let broken = |why: tokenizers::Error| BuildError::Broken(why.to_string());
    let split = |pattern: &str| {
        Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false).map_err(broken)
    };
    let gpt2 = || ByteLevel::new(false, true, true).into();
    let bytes_only = || ByteLevel::new(false, true, false).into();
    Ok(match pre {
        "gpt-2" => Variant { steps: vec![gpt2()], compose: false, ignore_merges: false },
        "smollm" => Variant { steps: vec![Digits::new(true).into(), gpt2()], compose: false, ignore_merges: false },
        "llama-bpe" | "llama3" | "llama-v3" => {
            let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            Variant { steps: vec![split(pattern)?.into(), bytes_only()], compose: false, ignore_merges: true }
        }
        "qwen2" => {
            let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
            Variant { steps: vec![split(pattern)?.into(), bytes_only()], compose: true, ignore_merges: false }
        }
        _ => return Err(BuildError::UnknownPre),
    })
}

fn build(
    pre: &str,
    tokens: &[String],
    merges: &[String],
    kind_of: &dyn Fn(usize) -> i64,
) -> Result<tokenizers::Tokenizer, BuildError> {
    let broken = |why: tokenizers::Error| BuildError::Broken(why.to_string());
    let variant = variant(pre)?;
    let vocabulary: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let merges = merges
        .iter()
        .map(|merge| {
            // A space parts the two; the first may itself begin with one in old files, never end with one.
            let pair = merge.split_once(' ').map(|(left, right)| (left.to_string(), right.to_string()));
            pair.ok_or_else(|| BuildError::Broken(format!("the merge {merge:?} is not a pair")))
        })
        .collect::<Result<Merges, _>>()?;
    let model = BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(variant.ignore_merges);
    let mut tokenizer = tokenizers::Tokenizer::new(model.build().map_err(broken)?);
    if variant.compose {
        tokenizer.with_normalizer(Some(NFC));
    }
    tokenizer.with_pre_tokenizer(Some(Sequence::new(variant.steps)));
    // Control tokens are not added: we find them ourselves, in the template's text only.
    let added: Vec<AddedToken> = tokens
        .iter()
        .enumerate()
        .filter(|(id, token)| kind_of(*id) == kind::USER_DEFINED && !token.is_empty())
        .map(|(_, token)| AddedToken::from(token.clone(), false).normalized(false))
        .collect();
    tokenizer.add_tokens(&added);
    Ok(tokenizer)
}

/// GPT-2's printable stand-ins for bytes: character to byte.
fn byte_alphabet() -> std::collections::HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let shown = (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte));
    let hidden = (0..=255u8).filter(|byte| !printable(byte));
    shown.chain(('\u{100}'..).zip(hidden)).collect()
}

/// The bytes that a token of the byte alphabet stands for; characters outside of it stand for themselves.
fn bytes_of(token: &str, alphabet: &std::collections::HashMap<char, u8>, bytes: &mut Vec<u8>) {
    for character in token.chars() {
        match alphabet.get(&character) {
            Some(byte) => bytes.push(*byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests;
