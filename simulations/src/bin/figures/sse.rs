//! Server-sent events of a chat completion, as far as a load generator must understand them.

/// What every token of the scripted server says.
pub const WORD: &str = " tok";
/// How an event with such a token looks in any server's JSON.
const MARK: &[u8] = b" tok\"";

/// Events cut out of the pieces of a body.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    /// `data: [DONE]` came.
    pub done: bool,
    /// An event with an `error` came.
    pub error: bool,
}

impl Events {
    /// How many tokens this piece of the body completes.
    pub fn push(&mut self, piece: &[u8]) -> u32 {
        let mut tokens = 0;
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                tokens += u32::from(contains(&self.line, MARK));
                self.done |= self.line.starts_with(b"data: [DONE]");
                self.error |= self.line.starts_with(b"data: {\"error\"") || self.line.starts_with(b"event: error");
                self.line.clear();
            }
        }
        tokens
    }
}

fn contains(line: &[u8], what: &[u8]) -> bool {
    line.windows(what.len()).any(|window| window == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_wherever_pieces_are_cut() {
        let text =
            b"data: {\"delta\":{\"content\":\" tok\"}}\n\ndata: {\"delta\":{}}\n\ndata: {\"content\":\" tok\"}\n\n\
            data: [DONE]\n\n";
        for size in 1..text.len() {
            let mut events = Events::default();
            let tokens: u32 = text.chunks(size).map(|piece| events.push(piece)).sum();
            assert_eq!((tokens, events.done, events.error), (2, true, false), "pieces of {size}");
        }
        let mut events = Events::default();
        events.push(b"event: error\ndata: {\"error\":{}}\n\n");
        assert!(events.error && !events.done);
    }
}
