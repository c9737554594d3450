//! What the types of tokenizers have in common.

use std::fmt::Debug;

use super::vocabulary::Kind;
use crate::text::PromptError;

/// One type of tokenizer: plain text in, ids out. Special tokens have been taken out of the text before.
pub(super) trait Pieces: Debug + Send + Sync {
    /// Appends the ids of `text`. `fresh`: it stands at the beginning or behind a special token.
    fn encode(&self, text: &str, fresh: bool, ids: &mut Vec<u32>) -> Result<(), PromptError>;

    /// Appends the bytes that a token stands for, for those kinds that stand for any.
    fn bytes_of(&self, token: &str, kind: Kind, bytes: &mut Vec<u8>);

    /// The first piece of a text has a space in front that is not part of the text.
    fn leading_space(&self) -> bool {
        false
    }
}

/// The space as SentencePiece and llama.cpp's WordPiece write it inside tokens.
pub(super) const VISIBLE_SPACE: char = '\u{2581}';

/// Appends a token's text with its visible spaces as spaces.
pub(super) fn put_with_spaces(token: &str, bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(token.replace(VISIBLE_SPACE, " ").as_bytes());
}
