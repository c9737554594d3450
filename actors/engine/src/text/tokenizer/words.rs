//! How a text is cut into words before pairs are merged, as llama.cpp names the variants (`tokenizer.ggml.pre`).
//!
//! The models' own patterns end in `\s+(?!\S)|\s+`: white space in front of a word leaves its last character to
//! that word. Looking ahead needs an engine that backtracks, which takes quadratic time on hostile text and gives
//! up on long text. So the patterns here end in `\s+`, and [`Words::cut`] gives the last character back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use regex::Regex;

/// The variants, for an error that names them.
pub(super) const SUPPORTED: [&str; 13] = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "pixtral",
    "dbrx",
    "qwen2",
    "deepseek-r1-qwen",
    "qwen35",
    "tekken",
    "gpt-4o",
    "llama4",
];

/// A variant.
#[derive(Debug)]
pub(super) struct Words {
    /// Each number is a word, whatever stands around it.
    digits_apart: bool,
    pattern: Arc<Regex>,
    /// Line breaks with the white space in front of them are words of their own.
    lines: bool,
    /// The text is normalized to NFC before.
    pub compose: bool,
    /// A word that is a token is not merged from its parts.
    pub whole_first: bool,
    /// A BOS stands in front unless the file says otherwise.
    pub begins: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN35: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";

/// The pattern, compiled once in a process: it takes milliseconds, as Unicode has many letters. A copy of a `Regex`
/// would find out its states anew, so it is shared.
fn compiled(pattern: &'static str) -> Result<Arc<Regex>, regex::Error> {
    static KNOWN: Mutex<Option<HashMap<&str, Arc<Regex>>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_default();
    if let Some(regex) = known.get(pattern) {
        return Ok(Arc::clone(regex));
    }
    Ok(Arc::clone(known.entry(pattern).or_insert(Arc::new(Regex::new(pattern)?))))
}

impl Words {
    /// The variant of this name; `None` where it is not supported.
    pub fn named(pre: &str) -> Option<Result<Self, regex::Error>> {
        let plain = |pattern: &'static str| -> Result<Self, regex::Error> {
            let pattern = compiled(pattern)?;
            let (digits_apart, lines, compose, whole_first, begins) = (false, true, false, false, false);
            Ok(Self { digits_apart, pattern, lines, compose, whole_first, begins })
        };
        Some(match pre {
            "gpt-2" => plain(GPT2).map(|words| Self { lines: false, ..words }),
            "smollm" => plain(GPT2).map(|words| Self { lines: false, digits_apart: true, ..words }),
            "llama-bpe" | "llama3" | "llama-v3" | "pixtral" => {
                plain(LLAMA3).map(|words| Self { whole_first: true, begins: true, ..words })
            }
            // Phi-4.
            "dbrx" => plain(LLAMA3),
            "qwen2" | "deepseek-r1-qwen" => plain(QWEN2).map(|words| Self { compose: true, ..words }),
            "qwen35" => plain(QWEN35),
            "tekken" => plain(TEKKEN).map(|words| Self { whole_first: true, begins: true, ..words }),
            // Phi-4-mini has the vocabulary of GPT-4o, too.
            "gpt-4o" | "llama4" => plain(GPT4O),
            _ => return None,
        })
    }

    /// Calls `take` with each word of `text`, in order. Takes linear time.
    pub fn cut(&self, text: &str, take: &mut dyn FnMut(&str)) {
        if !self.digits_apart {
            return self.cut_at_pattern(text, take);
        }
        let mut rest = text;
        while let Some((at, digit)) = rest.char_indices().find(|(_, character)| character.is_numeric()) {
            let behind = at + digit.len_utf8();
            self.cut_at_pattern(&rest[..at], take);
            take(&rest[at..behind]);
            rest = &rest[behind..];
        }
        self.cut_at_pattern(rest, take);
    }

    fn cut_at_pattern(&self, text: &str, take: &mut dyn FnMut(&str)) {
        let mut at = 0;
        while let Some(found) = self.pattern.find_at(text, at) {
            if at < found.start() {
                take(&text[at..found.start()]);
            }
            let end = self.end_of(found, text);
            take(&text[found.start()..end]);
            at = end;
        }
        if at < text.len() {
            take(&text[at..]);
        }
    }

    /// Where a word ends: white space leaves its last character to the word behind it.
    fn end_of(&self, found: regex::Match<'_>, text: &str) -> usize {
        let (word, end) = (found.as_str(), found.end());
        match word.chars().next_back() {
            Some('\r' | '\n') if self.lines => end,
            Some(last) if last.is_whitespace() && end < text.len() && word.len() > last.len_utf8() => {
                end - last.len_utf8()
            }
            _ => end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pre: &str, text: &str) -> Vec<String> {
        let mut words = Vec::new();
        Words::named(pre).unwrap().unwrap().cut(text, &mut |word| words.push(word.to_string()));
        assert_eq!(words.concat(), text);
        words
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word_behind() {
        assert_eq!(cut("gpt-2", "a  b\n\nc  "), ["a", " ", " b", "\n", "\n", "c", "  "]);
        assert_eq!(cut("llama-bpe", "a  b \n\n  c\n d  "), ["a", " ", " b", " \n\n", " ", " c", "\n", " d", "  "]);
        assert_eq!(cut("qwen2", "x\u{3000}\u{3000}y"), ["x", "\u{3000}", "\u{3000}y"]);
    }

    #[test]
    fn each_variant_has_its_numbers_and_capitals() {
        assert_eq!(cut("gpt-2", "a 1234"), ["a", " 1234"]);
        assert_eq!(cut("smollm", "a  12x"), ["a", "  ", "1", "2", "x"]);
        assert_eq!(cut("llama3", "a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(cut("qwen2", "12 It'S"), ["1", "2", " It", "'S"]);
        assert_eq!(cut("tekken", "HelloWorld ABCd 12 it's"), ["Hello", "World", " ABCd", " ", "1", "2", " it", "'s"]);
        assert_eq!(cut("gpt-4o", "it's HTTPServer/\n"), ["it's", " HTTPServer", "/\n"]);
        assert_eq!(cut("qwen35", "e\u{301}a"), ["e\u{301}a"]);
        assert_eq!(cut("qwen2", "e\u{301}a"), ["e", "\u{301}a"]);
    }

    #[test]
    fn all_that_is_offered_works() {
        for pre in SUPPORTED {
            assert_eq!(cut(pre, "").len(), 0);
        }
        assert!(Words::named("none").is_none());
    }
}
