//! JSON as it is read from strangers: an object that names a member twice is refused, because two readers of it may
//! take different ones.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The most values in one body. Each becomes a node in memory that is many times as large as its text.
const MOST_VALUES: usize = 200_000;

/// Reads `bytes`. The error says where and what.
pub fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    if count_values(bytes) > MOST_VALUES {
        return Err(Error::custom(format!("it has more than {MOST_VALUES} values")));
    }
    serde_json::from_slice::<Unique>(bytes).map(|unique| unique.0)
}

/// At least as many as there are values: what separates or opens them, outside of texts.
fn count_values(bytes: &[u8]) -> usize {
    let (mut count, mut in_text, mut escaped) = (1, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b',' | b':' | b'[' | b'{' if !in_text => count += 1,
            _ => {}
        }
    }
    count
}

struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Unique(item)) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some((name, Unique(value))) = map.next_entry::<String, Unique>()? {
            if members.contains_key(&name) {
                let name: String = name.chars().take(80).collect();
                return Err(A::Error::custom(format!("the member `{name}` stands there twice")));
            }
            members.insert(name, value);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        for text in [r#"{"a":[1,-2,3.5,"x\u00e9",null,true,{"b":{}}]}"#, "18446744073709551615", "\"\""] {
            assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap(), "{text}");
        }
    }

    #[test]
    fn a_crowd_of_values_is_refused_before_it_takes_memory() {
        let crowd = format!("[{}0]", r#"{"":0},"#.repeat(MOST_VALUES / 2));
        assert!(parse(crowd.as_bytes()).unwrap_err().to_string().contains("values"));
        // Separators within a text are no values.
        let text = format!("\"{}\"", r#"\",:[{"#.repeat(MOST_VALUES));
        assert!(parse(text.as_bytes()).is_ok());
    }

    #[test]
    fn says_where_it_is_wrong() {
        for (text, expected) in [
            (r#"{"a":1,"a":2}"#, "`a` stands there twice at line 1"),
            ("{\"a\":1,\n\"b\"}", "line 2"),
            ("", "EOF"),
            (r#"{} {}"#, "trailing characters"),
            ("[1e999]", "out of range"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse("[".repeat(100_000).as_bytes()).unwrap_err().to_string().contains("recursion"));
        assert!(parse(b"\"\xff\xfe\"").is_err());
    }
}
