//! Embeddings of a far server: our request as the body of `POST /v1/embeddings`, and its answer as our frames.

use std::fmt;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Accepted, Embed, EmbedInput, Embedding, FailureKind, FinishReason, Finished, Load, MOST_DIMENSIONS, Refused,
    Request, Usage,
};
use serde::Deserialize;
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

use super::errors::{Trouble, of_transport};
use super::exchange::{Over, Watch, sent};
use super::meter;
use super::request::invalid_extra;
use crate::json::Members;

/// The longest answer that is read, in bytes: as many inputs as there may be, and several thousand numbers each.
const ANSWER_LIMIT: usize = 192 << 20;
/// Members that we write ourselves: in a request's `extra` they are left out.
const OURS: [&str; 4] = ["model", "input", "encoding_format", "dimensions"];

/// The body, asking for the model that the far side calls `model`.
pub fn body(request: &Request, embed: &Embed, model: &str) -> Result<Vec<u8>, Refused> {
    let extra = Members::parse(&request.extra).map_err(|error| invalid_extra(&error))?;
    let mut out = Vec::new();
    write(&mut serde_json::Serializer::new(&mut out), embed, model, &extra).map_err(|error| invalid_extra(&error))?;
    Ok(out)
}

fn write<S: Serializer>(serializer: S, embed: &Embed, model: &str, extra: &Members<'_>) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("model", model)?;
    map.serialize_entry("input", &Inputs(&embed.inputs))?;
    // Every server knows it, and not all know the other.
    map.serialize_entry("encoding_format", "float")?;
    if let Some(dimensions) = embed.dimensions {
        map.serialize_entry("dimensions", &dimensions)?;
    }
    for (name, value) in extra.0.iter().filter(|(name, _)| !OURS.contains(&name.as_ref())) {
        map.serialize_entry(name, value)?;
    }
    map.end()
}

/// Texts and lists of tokens, side by side: who mixes them is told so by the far side.
struct Inputs<'a>(&'a [EmbedInput]);

impl Serialize for Inputs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for input in self.0 {
            match input {
                EmbedInput::Text(text) => list.serialize_element(text)?,
                EmbedInput::Tokens(ids) => list.serialize_element(ids)?,
            }
        }
        list.end()
    }
}

#[derive(Deserialize)]
struct Body {
    data: Vec<Row>,
    #[serde(default)]
    usage: Option<UsageBody>,
}

#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    index: Option<usize>,
    embedding: Numbers,
}

/// A list of numbers, or base64 of them: some servers answer in the form that is shorter, whatever they are asked for.
struct Numbers(Vec<f32>);

#[derive(Deserialize)]
struct UsageBody {
    #[serde(default)]
    prompt_tokens: u32,
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Numbers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Numbers, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element::<f32>()? {
                    if values.len() >= MOST_DIMENSIONS {
                        return Err(A::Error::custom(format!("an embedding has more than {MOST_DIMENSIONS} numbers")));
                    }
                    values.push(value);
                }
                Ok(Numbers(values))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Numbers, E> {
                let bytes = BASE64.decode(text).map_err(|_| E::custom("an embedding is no base64"))?;
                let (numbers, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() {
                    return Err(E::custom("an embedding is cut in the middle of a number"));
                }
                Ok(Numbers(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// The embeddings in their order, and tokens as the far side counted them; or what is wrong.
fn read(body: &[u8], due: usize) -> Result<(Vec<Vec<f32>>, Option<u32>), String> {
    let body: Body = serde_json::from_slice(body).map_err(|error| format!("it cannot be read ({error})"))?;
    if body.data.len() != due {
        return Err(format!("it has {} embeddings for {due} inputs", body.data.len()));
    }
    let mut rows: Vec<Option<Vec<f32>>> = vec![None; due];
    for (place, row) in body.data.into_iter().enumerate() {
        let index = row.index.unwrap_or(place);
        let Numbers(values) = row.embedding;
        if !(1..=MOST_DIMENSIONS).contains(&values.len()) || values.iter().any(|x| !x.is_finite()) {
            return Err(format!(
                "its embedding {index} is not made of finite numbers, at most {MOST_DIMENSIONS} of them"
            ));
        }
        match rows.get_mut(index) {
            Some(free @ None) => *free = Some(values),
            _ => return Err(format!("it has the embedding {index} twice, or too many")),
        }
    }
    let rows: Vec<Vec<f32>> = rows.into_iter().flatten().collect();
    let first = rows.first().map_or(0, Vec::len);
    if rows.iter().any(|row| row.len() != first) {
        return Err("its embeddings have different lengths".into());
    }
    Ok((rows, body.usage.map(|usage| usage.prompt_tokens)))
}

/// Asks the far side and passes its answer on, but for the last frame.
pub async fn ask(
    watch: &mut Watch,
    request: reqwest::RequestBuilder,
    due: usize,
    accepted: Accepted,
    place: &mut meter::Exchange,
) -> Result<Finished, Over> {
    let mut response = sent(watch, request).await?;
    watch.send(Answer::Accepted(accepted)).await?;
    let wrong = |endpoint: &str, why: &str| {
        Over::from(Trouble::Failed(
            FailureKind::Protocol,
            format!("the answer of the endpoint {endpoint} is wrong: {why}"),
        ))
    };
    let mut body = Vec::new();
    while let Some(piece) =
        watch.until(response.chunk()).await?.map_err(|error| of_transport(&error, &watch.endpoint))?
    {
        watch.heard = Instant::now();
        if body.len() + piece.len() > ANSWER_LIMIT {
            return Err(wrong(&watch.endpoint, &format!("it is longer than {} MiB", ANSWER_LIMIT >> 20)));
        }
        body.extend_from_slice(&piece);
    }
    // Megabytes of numbers would hold up everything else that runs on this thread.
    let reading = tokio::task::spawn_blocking(move || read(&body, due));
    let read = watch.until(reading).await?.map_err(|error| wrong(&watch.endpoint, &error.to_string()))?;
    let (rows, tokens) = read.map_err(|why| wrong(&watch.endpoint, &why))?;
    place.observe(true, Instant::now());
    for (index, values) in (0u32..).zip(rows) {
        watch.send(Answer::Embedding(Embedding { index, values })).await?;
    }
    let prompt_tokens = tokens.unwrap_or(accepted.prompt_tokens);
    let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens: 0 };
    Ok(Finished { reason: FinishReason::Stop, usage, load: Load::default(), extra: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_in_either_form_and_in_any_order() {
        let body = r#"{"object":"list","data":[{"index":1,"embedding":[0.25,-1e-3]},
            {"index":0,"embedding":"AACAPwAAAL8=","object":"embedding"}],"usage":{"prompt_tokens":9,"total_tokens":9}}"#;
        assert_eq!(read(body.as_bytes(), 2).unwrap(), (vec![vec![1.0, -0.5], vec![0.25, -1e-3]], Some(9)));
        let plain = r#"{"data":[{"embedding":[1]}]}"#;
        assert_eq!(read(plain.as_bytes(), 1).unwrap(), (vec![vec![1.0]], None));
    }

    #[test]
    fn what_is_no_answer_is_said() {
        for (body, due, expected) in [
            ("<html>", 1, "cannot be read"),
            (r#"{"data":[]}"#, 1, "0 embeddings for 1"),
            (r#"{"data":[{"embedding":[1]},{"embedding":[1]}]}"#, 1, "2 embeddings for 1"),
            (r#"{"data":[{"index":1,"embedding":[1]},{"index":1,"embedding":[1]}]}"#, 2, "twice"),
            (r#"{"data":[{"index":7,"embedding":[1]}]}"#, 1, "too many"),
            (r#"{"data":[{"embedding":[1]},{"embedding":[1,2]}]}"#, 2, "different lengths"),
            (r#"{"data":[{"embedding":[]}]}"#, 1, "finite numbers"),
            (r#"{"data":[{"embedding":[1e99]}]}"#, 1, "finite numbers"),
            (r#"{"data":[{"embedding":5}]}"#, 1, "a list of numbers"),
            (r#"{"data":[{"embedding":["x"]}]}"#, 1, "cannot be read"),
            (r#"{"data":[{"embedding":"AACAPw!"}]}"#, 1, "no base64"),
            (r#"{"data":[{"embedding":"AACAPwAA"}]}"#, 1, "cut in the middle"),
        ] {
            let error = read(body.as_bytes(), due).unwrap_err();
            assert!(error.contains(expected), "{body}: {error}");
        }
    }

    #[test]
    fn the_request_has_what_was_asked_and_what_else_was_written() {
        let embed = Embed {
            inputs: vec![EmbedInput::Text("hé\"".into()), EmbedInput::Tokens(vec![1, 2])],
            dimensions: Some(256),
        };
        let extra = br#"{"input_type":"query","model":"other","truncate":1.0}"#;
        let extra = Members::parse(extra).unwrap();
        let mut out = Vec::new();
        write(&mut serde_json::Serializer::new(&mut out), &embed, "there", &extra).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"model":"there","input":["hé\"",[1,2]],"encoding_format":"float","dimensions":256,"input_type":"query","truncate":1.0}"#
        );
    }
}
