//! Tokenizers from the metadata of a GGUF file, with the same results as llama.cpp or, where that differs from what
//! the model was trained with, as that.

use std::borrow::Cow;

use ingle_protocol::wire::v2::Message;

use super::{ChatTemplate, Codec, Conversation, PromptError, ToolSupport};
use crate::EngineError;
use crate::gguf::Gguf;

mod byte_level;
mod pieces;
mod sentence_piece;
mod specials;
mod vocabulary;
mod word_piece;
mod words;

use byte_level::ByteLevel;
use pieces::Pieces;
use sentence_piece::SentencePiece;
use specials::{Finder, Part};
use vocabulary::{Kind, Vocabulary};
use word_piece::WordPiece;

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
    pieces: Box<dyn Pieces>,
    /// `None` in base and embedding models.
    template: Option<ChatTemplate>,
    /// Tokens that are found in the template's text only.
    controls: Finder,
    /// Tokens that are found in all texts before these are cut.
    user_defined: Finder,
    /// The id and the text of the token in front of every sequence, where the model wants one.
    begin: Option<(u32, String)>,
    /// The token behind every sequence that is complete.
    close: Option<u32>,
    /// The bytes of all tokens, one after the other, and where each begins.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    ends: Vec<u32>,
    longest: usize,
}

/// Characters that no text should contain, one of which marks special tokens that a user wrote.
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// Phi-3's special tokens swallow the white space behind them, except these.
const SWALLOW_NOTHING: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// A type of tokenizer, read.
struct Read {
    pieces: Box<dyn Pieces>,
    begin: Option<u32>,
    close: Option<u32>,
}

impl Tokenizer {
    /// From a model file.
    pub fn open(path: &std::path::Path) -> Result<Self, EngineError> {
        Self::from_gguf(&Gguf::open(path)?)
    }

    /// From the `tokenizer.*` metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, EngineError> {
        let path = gguf.path();
        let damaged = |why| EngineError::Gguf { path: path.into(), why };
        let model = gguf.text("tokenizer.ggml.model").map_err(damaged)?.unwrap_or("none");
        if !["gpt2", "llama", "bert"].contains(&model) {
            return Err(EngineError::Unsupported {
                path: path.into(),
                what: format!("a tokenizer of type {model:?}"),
                hint: "\"gpt2\" (byte-level BPE), \"llama\" (SentencePiece BPE) and \"bert\" (WordPiece) are".into(),
            });
        }
        let vocabulary = Vocabulary::read(gguf, model)?;
        let Read { pieces, begin, close } = match model {
            "llama" => sentence_piece(&vocabulary)?,
            "bert" => word_piece(&vocabulary)?,
            _ => byte_level(&vocabulary)?,
        };

        let [bos, eos] = [vocabulary.id("bos")?, vocabulary.id("eos")?];
        let template = vocabulary
            .text("tokenizer.chat_template")?
            .map(|source| ChatTemplate::new(source, vocabulary.text_of(bos), vocabulary.text_of(eos)))
            .transpose()
            .map_err(|why| vocabulary.bad_template(why))?;

        let name = vocabulary.text("general.name")?.unwrap_or("").to_lowercase();
        let architecture = vocabulary.text("general.architecture")?.unwrap_or("");
        let is_phi3 = architecture == "phi3" || name.contains("phi-3") || name.contains("phi3");
        let swallows = |token: &str| is_phi3 && model == "llama" && !SWALLOW_NOTHING.contains(&token);
        let finder = |kinds: &[Kind]| {
            let built = Finder::new(&vocabulary.of(kinds), swallows);
            built.map_err(|why| vocabulary.broken(format!("its special tokens cannot be looked for: {why}")))
        };

        let call_marks = match template.as_ref().map(ChatTemplate::tools) {
            Some(ToolSupport::Known(format)) => [Some(format.mark()), format.close()],
            _ => [None; 2],
        };
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for (_, token, kind) in vocabulary.iter() {
            // Control tokens are no text, but without these nobody could tell a call from an answer.
            let is_mark = kind == Kind::Control && call_marks.contains(&Some(token));
            pieces.bytes_of(token, if is_mark { Kind::UserDefined } else { kind }, &mut bytes);
            starts.push(bytes.len());
        }
        let longest = starts.windows(2).map(|place| place[1] - place[0]).max().unwrap_or(1);
        Ok(Self {
            template,
            controls: finder(&[Kind::Control, Kind::Unknown])?,
            user_defined: finder(&[Kind::UserDefined])?,
            begin: begin.map(|id| (id, vocabulary.text_of(Some(id)).to_string())),
            close,
            ends: vocabulary.ends()?,
            pieces,
            bytes,
            starts,
            longest,
        })
    }

    /// The token ids of a text; nothing is added in front or behind.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>, PromptError> {
        let mut ids = Vec::new();
        match special {
            Special::AsText => self.encode_plain(text, true, &mut ids)?,
            Special::Parse => self.encode_around_controls(text, None, &mut ids)?,
        }
        Ok(ids)
    }

    /// The conversation as text, as the model's template has it. `extra` are the request's further members.
    pub fn render(&self, messages: &[Message], extra: &[u8]) -> Result<String, PromptError> {
        self.template()?.render(&Conversation::new(messages, extra)?)
    }

    /// All the text of some tokens. Half characters become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes(*id)).copied().collect();
        let is_ours = self.leading_space() && bytes.first() == Some(&b' ');
        String::from_utf8_lossy(&bytes[usize::from(is_ours)..]).into_owned()
    }

    fn template(&self) -> Result<&ChatTemplate, PromptError> {
        self.template.as_ref().ok_or_else(|| {
            PromptError("this is not a chat model: its file has no chat template (tokenizer.chat_template)".into())
        })
    }

    /// Text in which control tokens are nothing special.
    fn encode_plain(&self, text: &str, fresh: bool, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let mut fresh = fresh;
        self.user_defined.split(text, |part| {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.pieces.encode(text, fresh, ids)?,
            }
            fresh = matches!(part, Part::Token(_));
            Ok(())
        })
    }

    /// `mark` is taken out of the text between control tokens.
    fn encode_around_controls(&self, text: &str, mark: Option<char>, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        self.controls.split(text, |part| {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    // What stands between control tokens always begins behind one, or the text.
                    let text = mark.map_or(Cow::Borrowed(text), |mark| Cow::Owned(text.replace(mark, "")));
                    self.encode_plain(&text, true, ids)?;
                }
            }
            Ok(())
        })
    }

    /// Breaks up control tokens that stand in what people wrote, so that nobody ends a turn or speaks for the
    /// system by writing `<|im_end|>`. Returns the character that was put into them.
    fn mark_controls(&self, conversation: &mut Conversation) -> Result<Option<char>, PromptError> {
        if !conversation.any_text(&|text| self.controls.is_in(text)) {
            return Ok(None);
        }
        let unused = |mark: &char| !conversation.any_text(&|text| text.contains(*mark));
        let Some(mark) = MARKS.clone().find(unused) else {
            return Err(PromptError("the messages contain special tokens and every Unicode noncharacter".into()));
        };
        conversation.change_texts(&|text| self.controls.broken_up(text, mark));
        Ok(Some(mark))
    }
}

/// The token, if the file or else the type of tokenizer wants it there.
fn wanted(
    vocabulary: &Vocabulary<'_>,
    flag: &str,
    otherwise: bool,
    id: Option<u32>,
) -> Result<Option<u32>, EngineError> {
    let on = vocabulary.flag(flag)?.unwrap_or(otherwise);
    Ok(id.filter(|_| on))
}

fn sentence_piece(vocabulary: &Vocabulary<'_>) -> Result<Read, EngineError> {
    Ok(Read {
        pieces: Box::new(SentencePiece::new(vocabulary)?),
        begin: wanted(vocabulary, "add_bos_token", true, vocabulary.id("bos")?)?,
        close: wanted(vocabulary, "add_eos_token", false, vocabulary.id("eos")?)?,
    })
}

fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Read, EngineError> {
    let pieces = ByteLevel::new(vocabulary)?;
    Ok(Read {
        begin: wanted(vocabulary, "add_bos_token", pieces.begins(), vocabulary.id("bos")?)?,
        close: wanted(vocabulary, "add_eos_token", false, vocabulary.id("eos")?)?,
        pieces: Box::new(pieces),
    })
}

/// `[CLS]` in front and `[SEP]` behind, always.
fn word_piece(vocabulary: &Vocabulary<'_>) -> Result<Read, EngineError> {
    let begin = match vocabulary.id("bos")? {
        None => vocabulary.id("cls")?,
        bos => bos,
    };
    let pieces = Box::new(WordPiece::new(vocabulary)?);
    // The key is written like this in all files.
    Ok(Read { pieces, begin, close: vocabulary.id("seperator")? })
}

impl Codec for Tokenizer {
    fn tools(&self) -> ToolSupport {
        self.template.as_ref().map_or(ToolSupport::None, ChatTemplate::tools)
    }

    fn prompt(&self, messages: &[Message], extra: &[u8]) -> Result<Vec<u32>, PromptError> {
        let template = self.template()?;
        let mut conversation = Conversation::new(messages, extra)?;
        let mark = self.mark_controls(&mut conversation)?;
        let rendered = template.render(&conversation)?;
        let mut text = rendered.as_str();
        let mut ids = Vec::new();
        if let Some((id, begin)) = &self.begin {
            // Some templates write it and some leave it to the tokenizer: one it is.
            while let Some(rest) = text.strip_prefix(begin.as_str()).filter(|_| !begin.is_empty()) {
                text = rest;
            }
            ids.push(*id);
        }
        self.encode_around_controls(text, mark, &mut ids)?;
        Ok(ids)
    }

    fn passage(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let mut ids: Vec<u32> = self.begin.iter().map(|(id, _)| *id).collect();
        self.encode_plain(text, true, &mut ids)?;
        ids.extend(self.close);
        Ok(ids)
    }

    fn continuation(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let mut ids = Vec::new();
        self.encode_plain(text, true, &mut ids)?;
        Ok(ids)
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.starts.get(id), self.starts.get(id + 1)) {
            (Some(from), Some(to)) => &self.bytes[*from..*to],
            _ => &[],
        }
    }

    fn leading_space(&self) -> bool {
        self.pieces.leading_space()
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

#[cfg(test)]
mod reference_tests;
#[cfg(test)]
mod tests;
