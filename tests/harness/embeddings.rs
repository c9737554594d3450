//! Requests for embeddings, and the far server's answers to them.

use std::path::Path;

use serde_json::{Value, json};

use super::{Answer, Machine, client};

/// A tiny random BERT (64 numbers, 64 tokens at most), which is here in every checkout.
pub fn tiny_bert() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../actors/engine/tests/fixtures/tiny");
    folder.canonicalize().unwrap().join("bert_mean.gguf").display().to_string()
}

/// The name that it has when it is loaded.
pub const TINY_BERT: &str = "bert_mean";

impl Machine {
    /// Asks for embeddings.
    pub async fn embed(&self, body: &Value) -> Answer {
        Answer::of(client().post(self.url("/v1/embeddings")).json(body).send().await.unwrap()).await
    }

    /// `ingle models embed` of the tiny BERT: the rows that it prints, one for each text.
    pub async fn embedded_by_command(&self, texts: &[&str]) -> Vec<Value> {
        let file = tiny_bert();
        let arguments = [&["models", "embed", &file], texts, &["--json"]].concat();
        let printed: Value = serde_json::from_str(&self.ingle(&arguments).await.ok()).unwrap();
        printed["texts"].as_array().unwrap().clone()
    }
}

impl Answer {
    /// The embeddings in their order, where all went well.
    #[track_caller]
    pub fn embeddings(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.body["object"], "list");
        let rows = self.body["data"].as_array().unwrap();
        for (index, row) in rows.iter().enumerate() {
            assert_eq!((&row["object"], &row["index"]), (&json!("embedding"), &json!(index)));
        }
        assert_eq!(self.body["usage"]["prompt_tokens"], self.body["usage"]["total_tokens"]);
        rows.iter().map(|row| row["embedding"].clone()).collect()
    }
}

/// What the far server answers: for each input its length and its place, or what the first input says.
pub fn far_embeddings(body: &Value) -> (u16, String) {
    assert_eq!(body["encoding_format"], "float");
    let inputs = body["input"].as_array().unwrap();
    let row = |(index, input): (usize, &Value)| {
        let length = input.as_str().map_or_else(|| input.as_array().map_or(0, Vec::len), str::len);
        json!({"object": "embedding", "index": index, "embedding": [length, index, 0.5]})
    };
    let mut rows: Vec<Value> = inputs.iter().enumerate().map(row).collect();
    match inputs[0].as_str().unwrap_or_default() {
        "too few" => drop(rows.pop()),
        "backwards" => rows.reverse(),
        "no route" => return (404, r#"{"detail":"Not Found"}"#.into()),
        "nonsense" => return (200, "<html>".into()),
        _ => {}
    }
    (200, json!({"object": "list", "data": rows, "model": "far", "usage": {"prompt_tokens": 7}}).to_string())
}
