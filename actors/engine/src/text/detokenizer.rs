//! Text out of generated tokens: whole characters only, and nothing that may yet turn out to be a stop text.

use super::Codec;

/// What one more token releases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Whole UTF-8 characters.
    pub text: Vec<u8>,
    /// A stop text came; it and all behind it is not part of the answer.
    pub stopped: bool,
}

/// The state between two tokens of one answer. It is a function of the tokens so far alone, so another engine
/// rebuilds it by pushing them again.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    stops: Vec<Vec<u8>>,
    /// Bytes of a character whose end has not come.
    partial: Vec<u8>,
    /// Characters that may be the beginning of a stop text.
    held: Vec<u8>,
    /// There was a token.
    begun: bool,
}

const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();

impl Detokenizer {
    /// `stops`: texts that end the answer. Empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).map(|stop| stop.clone().into_bytes()).collect();
        Self { stops, ..Self::default() }
    }

    /// For an answer that goes on behind a text, all of which was delivered.
    pub fn behind_text(stops: &[String]) -> Self {
        Self { begun: true, ..Self::new(stops) }
    }

    /// Takes the next token.
    pub fn push(&mut self, codec: &dyn Codec, id: u32) -> Piece {
        let bytes = codec.bytes(id);
        let is_first = !std::mem::replace(&mut self.begun, true);
        let bytes = if is_first && codec.leading_space() { bytes.strip_prefix(b" ").unwrap_or(bytes) } else { bytes };
        self.partial.extend_from_slice(bytes);
        self.take_characters();
        self.release()
    }

    /// What is left when no more tokens come. Half a character becomes U+FFFD.
    pub fn finish(&mut self) -> Piece {
        if !self.partial.is_empty() {
            self.partial.clear();
            self.held.extend_from_slice(REPLACEMENT);
        }
        let mut piece = self.release();
        if !piece.stopped {
            piece.text.append(&mut self.held);
        }
        piece
    }

    /// Moves whole characters from `partial` to `held`. Bytes that can never become one turn into U+FFFD.
    fn take_characters(&mut self) {
        loop {
            match std::str::from_utf8(&self.partial) {
                Ok(_) => {
                    self.held.append(&mut self.partial);
                    return;
                }
                Err(error) => {
                    let good = error.valid_up_to();
                    self.held.extend(self.partial.drain(..good));
                    let Some(bad) = error.error_len() else { return };
                    self.partial.drain(..bad);
                    self.held.extend_from_slice(REPLACEMENT);
                }
            }
        }
    }

    fn release(&mut self) -> Piece {
        let found = self.stops.iter().filter_map(|stop| find(&self.held, stop)).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, kept), stopped: false }
    }
}

fn find(text: &[u8], stop: &[u8]) -> Option<usize> {
    text.windows(stop.len()).position(|window| window == stop)
}

/// Bytes at the end of `text` with which `stop` begins. UTF-8 begins are recognised by themselves, so this never
/// cuts a character.
fn overlap(text: &[u8], stop: &[u8]) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&length| text.ends_with(&stop[..length]) && is_boundary(text, length)).unwrap_or(0)
}

/// `text` may be cut `length` bytes before its end.
fn is_boundary(text: &[u8], length: usize) -> bool {
    text.get(text.len() - length).is_none_or(|byte| byte & 0xc0 != 0x80)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::PromptError;
    use ingle_protocol::wire::v2::Message;
    use proptest::prelude::*;

    /// Every byte is a token.
    struct ByBytes(Vec<[u8; 1]>, bool);

    impl ByBytes {
        fn new() -> Self {
            Self((0..=255).map(|byte| [byte]).collect(), false)
        }
    }

    impl Codec for ByBytes {
        fn prompt(&self, _: &[Message], _: &[u8]) -> Result<Vec<u32>, PromptError> {
            Ok(vec![])
        }
        fn bytes(&self, id: u32) -> &[u8] {
            &self.0[id as usize]
        }
        fn leading_space(&self) -> bool {
            self.1
        }
        fn is_end(&self, _: u32) -> bool {
            false
        }
        fn vocabulary(&self) -> u32 {
            256
        }
        fn longest(&self) -> usize {
            1
        }
    }

    fn run(bytes: &[u8], stops: &[&str]) -> (Vec<String>, bool) {
        let codec = ByBytes::new();
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut detokenizer = Detokenizer::new(&stops);
        let mut pieces = Vec::new();
        for byte in bytes {
            let piece = detokenizer.push(&codec, u32::from(*byte));
            pieces.push(String::from_utf8(piece.text).unwrap());
            if piece.stopped {
                return (pieces, true);
            }
        }
        let piece = detokenizer.finish();
        pieces.push(String::from_utf8(piece.text).unwrap());
        (pieces, piece.stopped)
    }

    #[test]
    fn characters_come_whole() {
        let (pieces, _) = run("aé😀".as_bytes(), &[]);
        assert_eq!(pieces, ["a", "", "é", "", "", "", "😀", ""]);
        let (pieces, _) = run(b"a\xff\xe2\x82", &[]);
        assert_eq!(pieces.concat(), "a\u{fffd}\u{fffd}");
    }

    #[test]
    fn the_tokenizers_own_space_is_not_in_the_answer() {
        let codec = ByBytes(ByBytes::new().0, true);
        let said = |bytes: &[u8]| {
            let mut detokenizer = Detokenizer::new(&[]);
            bytes.iter().flat_map(|byte| detokenizer.push(&codec, u32::from(*byte)).text).collect::<Vec<u8>>()
        };
        assert_eq!(said(b"  a b"), b" a b");
        assert_eq!(said(b"a b"), b"a b");
    }

    #[test]
    fn what_may_become_a_stop_text_is_held_back() {
        assert_eq!(
            run(b"one END two", &["END"]),
            (vec!["o", "n", "e", " ", "", "", ""].into_iter().map(String::from).collect(), true)
        );
        let (pieces, stopped) = run(b"one ENOUGH", &["END"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("one ENOUGH", false));
        let (pieces, stopped) = run(b"one EN", &["END"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("one EN", false));
        let (pieces, _) = run("xé".as_bytes(), &["é!"]);
        assert_eq!(pieces.concat(), "xé");
    }

    #[test]
    fn the_earliest_stop_text_wins() {
        let (pieces, stopped) = run(b"abcd", &["cd", "bc"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("a", true));
    }

    proptest! {
        #[test]
        fn pieces_are_whole_and_their_sum_is_the_text(text in "[abé😀]{0,40}", stop in "[abé😀]{1,4}") {
            let (pieces, stopped) = run(text.as_bytes(), &[&stop]);
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(pieces.concat(), expected);
            prop_assert_eq!(stopped, text.contains(&stop));
        }

        #[test]
        fn any_bytes_come_out_as_a_lossy_decoder_has_them(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let (pieces, _) = run(&bytes, &[]);
            prop_assert_eq!(pieces.concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn replaying_gives_the_same_state(text in "[abé😀]{1,20}", cut in 0usize..20, stop in "[abé😀]{1,4}") {
            let codec = ByBytes::new();
            let bytes = text.as_bytes();
            let cut = cut.min(bytes.len());
            let stops = [stop];
            let push = |detokenizer: &mut Detokenizer, bytes: &[u8]| {
                bytes.iter().map(|byte| detokenizer.push(&codec, u32::from(*byte))).collect::<Vec<_>>()
            };
            let mut first = Detokenizer::new(&stops);
            let whole = push(&mut first, bytes);
            let mut second = Detokenizer::new(&stops);
            push(&mut second, &bytes[..cut]);
            prop_assert_eq!(&whole[cut..], &push(&mut second, &bytes[cut..])[..]);
        }
    }
}
