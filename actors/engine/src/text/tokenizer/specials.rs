//! Finding tokens that are never split, in linear time however many of them a vocabulary has (Gemma: 6,000).

use aho_corasick::{AhoCorasick, MatchKind};

/// Some tokens that are found in texts: the leftmost, and of those the longest.
#[derive(Debug)]
pub(super) struct Finder {
    /// `None` where there is nothing to be found.
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
    /// White space behind a token belongs to the token.
    swallows: Vec<bool>,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// One of the tokens.
    Token(u32),
    /// What stands between them; not empty.
    Text(&'t str),
}

impl Finder {
    /// For these tokens, none of them empty. `swallows` says which swallow the white space behind them.
    pub fn new(tokens: &[(u32, &str)], swallows: impl Fn(&str) -> bool) -> Result<Self, String> {
        let build = || {
            let builder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).to_owned();
            builder.build(tokens.iter().map(|(_, token)| token)).map_err(|why| why.to_string())
        };
        Ok(Self {
            automaton: if tokens.is_empty() { None } else { Some(build()?) },
            ids: tokens.iter().map(|(id, _)| *id).collect(),
            swallows: tokens.iter().map(|(_, token)| swallows(token)).collect(),
        })
    }

    /// Calls `take` with each part of `text`, in order, until it fails.
    pub fn split<'t, E>(&self, text: &'t str, mut take: impl FnMut(Part<'t>) -> Result<(), E>) -> Result<(), E> {
        let mut at = 0;
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            if at < found.start() {
                take(Part::Text(&text[at..found.start()]))?;
            }
            let which = found.pattern().as_usize();
            take(Part::Token(self.ids[which]))?;
            at = found.end();
            if self.swallows[which] {
                at += text[at..].bytes().take_while(|byte| byte.is_ascii_whitespace() || *byte == b'\x0b').count();
            }
        }
        if at < text.len() {
            take(Part::Text(&text[at..]))?;
        }
        Ok(())
    }

    /// One of the tokens stands in `text`.
    pub fn is_in(&self, text: &str) -> bool {
        self.automaton.as_ref().is_some_and(|automaton| automaton.is_match(text))
    }

    /// The text with `mark` behind each character of the tokens in it, so that none can be found any more, neither
    /// those nor others that overlap them. (A token of a single character cannot be broken; no model has one.)
    pub fn broken_up(&self, text: &str, mark: char) -> String {
        let mut broken = String::with_capacity(text.len());
        let mut at = 0;
        for found in self.automaton.iter().flat_map(|automaton| automaton.find_iter(text)) {
            broken.push_str(&text[at..found.start()]);
            broken.extend(text[found.range()].chars().flat_map(|character| [character, mark]));
            at = found.end();
        }
        broken.push_str(&text[at..]);
        broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'t>(finder: &Finder, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let take = |part| {
            parts.push(part);
            Ok::<_, ()>(())
        };
        finder.split(text, take).unwrap();
        parts
    }

    #[test]
    fn the_leftmost_and_of_those_the_longest() {
        let finder = Finder::new(&[(1, "<a>"), (2, "<a><b>"), (3, "b>")], |token| token == "<a>").unwrap();
        assert_eq!(split(&finder, "<a><b><a>"), [Part::Token(2), Part::Token(1)]);
        assert_eq!(split(&finder, "x<a> \n yb>"), [Part::Text("x"), Part::Token(1), Part::Text("y"), Part::Token(3)]);
        assert_eq!(split(&finder, "<a> "), [Part::Token(1)]);
        assert_eq!(split(&finder, ""), []);
    }

    #[test]
    fn nothing_is_found_in_what_was_broken_up() {
        let finder = Finder::new(&[(1, "<a>"), (2, "a><b"), (3, "b>")], |_| false).unwrap();
        let text = "é<a><b><<a>>b>";
        let broken = finder.broken_up(text, '!');
        assert!(finder.is_in(text) && !finder.is_in(&broken), "{broken}");
        assert_eq!(broken.replace('!', ""), text);
        let none = Finder::new(&[], |_| false).unwrap();
        assert_eq!((none.is_in("x"), none.broken_up("x", '!').as_str()), (false, "x"));
    }
}
