//! Identifiers as newtypes. In text (JSON, logs, command lines) they are lower-case hex; on the wire raw bytes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the hex form of an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} hex digits, got {got:?}")]
pub struct InvalidId {
    /// How many hex digits the identifier has.
    pub expected: usize,
    /// The offending text, cut to 80 characters.
    pub got: String,
}

/// Lower-case hex. (Several times for each request: a formatter for each byte is what one sees in a profile.)
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 0xf)]);
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(digit(byte >> 4));
        text.push(digit(*byte));
    }
    text
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str(&to_hex(bytes))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], InvalidId> {
    let invalid = || InvalidId { expected: N * 2, got: text.chars().take(80).collect() };
    let digits = text.as_bytes();
    // Upper case is refused: content addresses become file names, and one content must have one name.
    if digits.len() != N * 2 || !digits.iter().all(|d| d.is_ascii_digit() || (b'a'..=b'f').contains(d)) {
        return Err(invalid());
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |d: u8| if d.is_ascii_digit() { d - b'0' } else { d - b'a' + 10 };
        *byte = nibble(pair[0]) << 4 | nibble(pair[1]);
    }
    Ok(bytes)
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

hex_id! {
    /// A node, for as long as its certificate lives. Chosen by the node that signed the certificate.
    NodeId, 16
}
hex_id! {
    /// A cluster: the first half of the SHA-256 of its authority's certificate.
    ClusterId, 16
}
hex_id! {
    /// One request of one client, through all its attempts and machines.
    RequestId, 16
}
hex_id! {
    /// SHA-256 of a model file: the name under which its content is known everywhere.
    ModelDigest, 32
}

/// One engine process. A restarted engine has a new generation, so that late news of the old one is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EngineId {
    /// The node whose child the process is.
    pub node: NodeId,
    /// Which of the node's engines.
    pub index: u16,
    /// Counts this engine's starts within one run of the node.
    pub generation: u32,
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.node.0;
        write!(f, "{a:02x}{b:02x}{c:02x}{d:02x}/{}.{}", self.index, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_refuses_what_is_not_exactly_an_id() {
        let id = NodeId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<NodeId>(&json).unwrap(), id);
        let digits = "ab".repeat(32);
        assert!(digits.parse::<ModelDigest>().is_ok());
        for bad in ["", "../../etc/passwd", &digits.to_uppercase(), &digits[1..], &format!("{digits}0"), "é"] {
            assert!(bad.parse::<ModelDigest>().is_err(), "{bad}");
        }
    }
}
