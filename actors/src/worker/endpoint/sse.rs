//! Server-sent events out of a byte stream, however it is cut, as the HTML standard reads them. No I/O.

/// The longest line and the longest event, in bytes.
pub const LONGEST: usize = 1 << 20;

/// A line or an event that is longer than [`LONGEST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event longer than {} KiB", LONGEST >> 10)]
pub struct TooLong;

/// Reads events. It holds the unread bytes of the stream, [`LONGEST`] and one piece at most.
#[derive(Debug, Default)]
pub struct EventReader {
    buffer: Vec<u8>,
    /// Where the unread bytes begin.
    start: usize,
    /// Behind the last byte that was looked at for a line's end.
    scanned: usize,
    /// The last line ended with CR: an LF that follows belongs to it.
    after_cr: bool,
    begun: bool,
    /// Lines so far, those of comments as well.
    lines: u64,
    /// The data of the event so far: its first line in the buffer, or all lines in `joined`.
    first: Option<(usize, usize)>,
    joined: Vec<u8>,
    has_joined: bool,
}

/// The data of an event, where it stands.
#[derive(Debug, Clone, Copy)]
enum Data {
    Buffer(usize, usize),
    Joined,
}

impl EventReader {
    /// Takes a piece of the stream. All events must have been read before: what they stood in is given up here.
    pub fn push(&mut self, piece: &[u8]) {
        // Data whose event is not complete yet must not move away with the bytes in front of it.
        let keep = self.first.map_or(self.start, |(from, _)| from);
        if keep > 0 {
            self.buffer.drain(..keep);
            self.start -= keep;
            self.scanned -= keep;
            self.first = self.first.map(|(from, to)| (from - keep, to - keep));
        }
        self.buffer.extend_from_slice(piece);
    }

    /// Whole lines that were read so far.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// The data of the next complete event; `None` where there is none yet. Events without data are left out, and so
    /// are comments and names.
    pub fn event(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let found = self.find()?;
        Ok(found.map(|data| self.bytes(data)))
    }

    /// The data of an event that the end of the stream completes: some servers leave out the last empty line.
    pub fn end(&mut self) -> Result<Option<&[u8]>, TooLong> {
        // The end of a cut line (or the second half of CR LF), and an empty one.
        self.buffer.extend_from_slice(b"\n\n");
        self.event()
    }

    fn bytes(&self, data: Data) -> &[u8] {
        match data {
            Data::Buffer(from, to) => &self.buffer[from..to],
            Data::Joined => &self.joined,
        }
    }

    fn find(&mut self) -> Result<Option<Data>, TooLong> {
        loop {
            let unseen = &self.buffer[self.scanned..];
            let Some(length) = unseen.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.scanned = self.buffer.len();
                let long = self.scanned - self.start > LONGEST;
                return if long { Err(TooLong) } else { Ok(None) };
            };
            let (from, to) = (self.start, self.scanned + length);
            let cr = self.buffer[to] == b'\r';
            self.start = to + 1;
            self.scanned = self.start;
            self.lines += 1;
            if std::mem::replace(&mut self.after_cr, cr) && !cr && from == to {
                // The second half of CR LF.
                continue;
            }
            if to - from > LONGEST {
                return Err(TooLong);
            }
            let from =
                if !std::mem::replace(&mut self.begun, true) && self.buffer[from..to].starts_with(b"\xef\xbb\xbf") {
                    from + 3
                } else {
                    from
                };
            if from == to {
                if let Some(data) = self.take_data() {
                    return Ok(Some(data));
                }
            } else if let Some(value) = data_value(&self.buffer[from..to]) {
                self.add_data(to - value, to)?;
            }
        }
    }

    fn add_data(&mut self, from: usize, to: usize) -> Result<(), TooLong> {
        match self.first.take() {
            None if !self.has_joined => {
                self.first = Some((from, to));
                return Ok(());
            }
            None => {}
            Some((first, end)) => {
                self.joined.clear();
                self.joined.extend_from_slice(&self.buffer[first..end]);
                self.has_joined = true;
            }
        }
        self.joined.push(b'\n');
        self.joined.extend_from_slice(&self.buffer[from..to]);
        if self.joined.len() > LONGEST { Err(TooLong) } else { Ok(()) }
    }

    fn take_data(&mut self) -> Option<Data> {
        if std::mem::take(&mut self.has_joined) {
            return Some(Data::Joined);
        }
        self.first.take().map(|(from, to)| Data::Buffer(from, to))
    }
}

/// How many bytes at the line's end are data. `error` is what llama.cpp once called the field of its errors.
fn data_value(line: &[u8]) -> Option<usize> {
    let rest = line.strip_prefix(b"data").or_else(|| line.strip_prefix(b"error"))?;
    match rest {
        [] => Some(0),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value.len()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All events of a stream that comes in these pieces.
    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut reader = EventReader::default();
        let mut events = Vec::new();
        let text = |data: &[u8]| String::from_utf8_lossy(data).into_owned();
        for piece in pieces {
            reader.push(piece);
            while let Some(data) = reader.event().unwrap() {
                events.push(text(data));
            }
        }
        while let Some(data) = reader.end().unwrap() {
            events.push(text(data));
        }
        events
    }

    #[test]
    fn events_as_servers_write_them() {
        for (stream, expected) in [
            ("data: {\"a\":1}\n\ndata: [DONE]\n\n", vec!["{\"a\":1}", "[DONE]"]),
            ("data:x\r\n\r\ndata:  y\r\rdata\n\n", vec!["x", " y", ""]),
            (": keep-alive\n\nevent: error\nid: 7\nretry: 5\ndata: x\n\n", vec!["x"]),
            ("data: one\ndata: two\ndata:\n: note\n\ndata: three\n\n", vec!["one\ntwo\n", "three"]),
            ("\u{feff}data: x\n\n", vec!["x"]),
            ("error: {\"code\":500}\n\n", vec!["{\"code\":500}"]),
            ("database: x\ndat: y\n\n\n\n", vec![]),
            ("data: [DONE]", vec!["[DONE]"]),
            ("data: cut\n", vec!["cut"]),
        ] {
            assert_eq!(read([stream.as_bytes()]), expected, "{stream:?}");
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut reader = EventReader::default();
        let piece = vec![b'x'; 64 << 10];
        let refused = (0..40).any(|_| {
            reader.push(&piece);
            reader.event().is_err()
        });
        assert!(refused && reader.buffer.len() <= LONGEST + 2 * piece.len());

        let mut reader = EventReader::default();
        let line = [b"data: ", &piece[..], b"\n"].concat();
        let refused = (0..40).any(|_| {
            reader.push(&line);
            reader.event().is_err()
        });
        assert!(refused && reader.joined.len() <= LONGEST + piece.len() + 1, "many lines of one event");
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "data: ?[a-z é{}\"]{0,12}",
            1 => ":[a-z ]{0,4}",
            1 => "(event|id|x): [a-z]{0,3}",
            3 => Just(String::new()),
        ]
    }

    proptest! {
        /// Where the stream is cut and which line ends it has changes nothing.
        #[test]
        fn cuts_and_line_ends_change_nothing(
            lines in proptest::collection::vec((line(), 0usize..3), 0..24),
            cuts in proptest::collection::vec(0usize..400, 0..12),
        ) {
            let ends = ["\n", "\r\n", "\r"];
            let plain: String = lines.iter().map(|(line, _)| format!("{line}\n")).collect();
            // A lone CR in front of an empty line that ends with LF would read as CR LF.
            let mixed: String = lines
                .iter()
                .enumerate()
                .map(|(index, (line, end))| {
                    let before_empty = lines.get(index + 1).is_some_and(|(next, _)| next.is_empty());
                    let end = if *end == 2 && before_empty { 1 } else { *end };
                    format!("{line}{}", ends[end])
                })
                .collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(mixed.len())).collect();
            cuts.push(mixed.len());
            cuts.sort_unstable();
            let mut from = 0;
            let pieces = cuts.iter().map(|to| {
                let piece = &mixed.as_bytes()[from..*to];
                from = *to;
                piece
            });
            prop_assert_eq!(read(pieces), read([plain.as_bytes()]));
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 0..8)) {
            read(pieces.iter().map(Vec::as_slice));
        }
    }
}
