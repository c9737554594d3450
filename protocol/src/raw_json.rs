//! JSON cut into its members as they were written: their order and the digits of their numbers stay. For JSON that a
//! parser has found to be sound; anything else gives nonsense, but neither a panic nor a loop.

/// Where the value that `text` begins with ends, fed piece by piece: an object, an array or a string.
#[derive(Debug, Clone, Default)]
pub struct Extent {
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Extent {
    /// Looks at what is new in `text`, which must begin as it did before. `Some` with the bytes of the value when its
    /// end is there.
    pub fn end(&mut self, text: &str) -> Option<usize> {
        let bytes = text.as_bytes();
        while let Some(byte) = bytes.get(self.at) {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if !self.in_string && self.depth == 0 && matches!(byte, b'"' | b'}' | b']') {
                return Some(self.at);
            }
        }
        None
    }
}

/// The bytes of the value at the beginning of `text`.
fn extent(text: &str) -> usize {
    match text.as_bytes().first() {
        Some(b'{' | b'[' | b'"') => Extent::default().end(text).unwrap_or(text.len()),
        _ => text.find([',', '}', ']']).unwrap_or(text.len()),
    }
}

/// The members of an object: each name as it was written, with its quotes, and its value.
pub fn members(object: &str) -> Vec<(&str, &str)> {
    let mut members = Vec::new();
    let mut rest = inside(object);
    while rest.starts_with('"') {
        let (name, behind) = rest.split_at(extent(rest));
        let Some(value) = behind.trim_start().strip_prefix(':') else { break };
        let value = value.trim_start();
        let (value, behind) = value.split_at(extent(value));
        members.push((name, value.trim_end()));
        rest = behind.trim_start().trim_start_matches(',').trim_start();
    }
    members
}

/// The items of an array.
pub fn items(array: &str) -> Vec<&str> {
    let mut items = Vec::new();
    let mut rest = inside(array);
    while !rest.is_empty() {
        let length = extent(rest);
        if length == 0 {
            break;
        }
        let (item, behind) = rest.split_at(length);
        items.push(item.trim_end());
        rest = behind.trim_start().trim_start_matches(',').trim_start();
    }
    items
}

/// Without the brackets.
fn inside(value: &str) -> &str {
    let value = value.trim();
    value.get(1..value.len().saturating_sub(1)).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn members_stay_as_they_were_written() {
        let object = " { \"z\" : 1.50 ,\"a\\\"}\":[ {\"b\": \"],}\" } , null],\"é\":\"\\\\\", \"n\":-2e+3 , \"o\":{}} ";
        let expected = [
            ("\"z\"", "1.50"),
            ("\"a\\\"}\"", "[ {\"b\": \"],}\" } , null]"),
            ("\"é\"", "\"\\\\\""),
            ("\"n\"", "-2e+3"),
            ("\"o\"", "{}"),
        ];
        assert_eq!(members(object), expected);
        assert_eq!(items(expected[1].1), ["{\"b\": \"],}\" }", "null"]);
        assert_eq!(items("[1 ,true]"), ["1", "true"]);
        assert!(members("{}").is_empty() && items("[ ]").is_empty());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_or_hang(text in "[\\[\\]{}\",:\\\\ aé0]{0,40}") {
            let (members, items) = (members(&text), items(&text));
            prop_assert!(members.len() + items.len() <= 2 * text.len());
        }

        #[test]
        fn the_end_is_the_same_in_pieces(text in "[\\[{][\\[\\]{}\",:\\\\ aé0]{0,40}", cut in 0usize..40) {
            let whole = Extent::default().end(&text);
            let cut = (0..=cut.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap();
            let mut extent = Extent::default();
            let first = extent.end(&text[..cut]);
            prop_assert_eq!(first.or_else(|| extent.end(&text)), whole);
        }
    }
}
