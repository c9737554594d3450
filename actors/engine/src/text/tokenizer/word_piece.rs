//! BERT's tokenizers: words in lower case without accents, cut into the longest pieces from the left.

use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece as Model;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;

use super::pieces::{Pieces, VISIBLE_SPACE, put_with_spaces};
use super::vocabulary::{Kind, Vocabulary};
use crate::EngineError;
use crate::text::PromptError;

/// What stands in front of a piece that does not begin a word, as the model knows it.
const CONTINUES: &str = "##";

/// A vocabulary of words and their parts.
#[derive(Debug)]
pub(super) struct WordPiece(tokenizers::Tokenizer);

impl WordPiece {
    /// From a vocabulary of type `bert`.
    pub fn new(vocabulary: &Vocabulary<'_>) -> Result<Self, EngineError> {
        let unknown = vocabulary.id("unknown")?;
        let text = vocabulary.text_of(unknown);
        let Some(unknown) = unknown.filter(|_| !text.is_empty()) else {
            return Err(vocabulary.broken("it has no token for unknown words (tokenizer.ggml.unknown_token_id)".into()));
        };
        // llama.cpp marks the beginnings of words, BERT everything else.
        let as_in_bert = |(piece, id): (String, u32)| match piece.strip_prefix(VISIBLE_SPACE) {
            Some(word) => (word.to_string(), id),
            None => (format!("{CONTINUES}{piece}"), id),
        };
        let mut pieces: Vocab = vocabulary.pieces().into_iter().map(as_in_bert).collect();
        pieces.insert(text.to_string(), unknown);
        let model = Model::builder()
            .vocab(pieces)
            .unk_token(text.to_string())
            .continuing_subword_prefix(CONTINUES.into())
            .build()
            .map_err(|why| vocabulary.broken(why.to_string()))?;
        let lower_case = vocabulary.flag("normalizer.lowercase")?.unwrap_or(true);
        let strip_accents = vocabulary.flag("normalizer.strip_accents")?.unwrap_or(lower_case);
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer
            .with_normalizer(Some(BertNormalizer::new(true, true, Some(strip_accents), lower_case)))
            .with_pre_tokenizer(Some(BertPreTokenizer));
        Ok(Self(tokenizer))
    }
}

impl Pieces for WordPiece {
    fn encode(&self, text: &str, _fresh: bool, ids: &mut Vec<u32>) -> Result<(), PromptError> {
        let encoding = self.0.encode_fast(text, false);
        let encoding = encoding.map_err(|why| PromptError(format!("the text cannot be tokenized: {why}")))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    fn bytes_of(&self, token: &str, kind: Kind, bytes: &mut Vec<u8>) {
        match kind {
            Kind::Normal | Kind::UserDefined | Kind::Byte => put_with_spaces(token, bytes),
            Kind::Control | Kind::Unknown | Kind::Unused => {}
        }
    }

    fn leading_space(&self) -> bool {
        true
    }
}
