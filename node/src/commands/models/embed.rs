//! `ingle models embed`: texts as numbers.

use ingle_actors::models::{Encoder, ModelOptions};
use serde::Serialize;

use super::{find, work};
use crate::cli::EmbedTexts;
use crate::config::Settings;
use crate::output;

/// Numbers of an embedding that people are shown.
const SHOWN: usize = 6;
/// Characters of a text that people are shown.
const LONGEST: usize = 40;

/// What came out.
#[derive(Debug, Serialize)]
struct Embedded {
    model: String,
    dimensions: usize,
    backend: String,
    texts: Vec<Row>,
}

/// One text.
#[derive(Debug, Serialize)]
struct Row {
    text: String,
    /// Those in front and behind included.
    tokens: usize,
    /// Of this text and the first one.
    cosine_to_first: f32,
    embedding: Vec<f32>,
}

/// Embeds the texts that were typed.
pub async fn run(settings: &Settings, options: EmbedTexts) -> anyhow::Result<()> {
    let EmbedTexts { model, texts, json } = options;
    let found = find(settings, &model).await?;
    let device = settings.device;
    // As many texts as a command line holds take seconds at most: they are not cut short.
    let done = work(move |_| {
        let mut encoder = Encoder::open_on(&found.path, device.into(), &ModelOptions::default())?;
        let tokens = texts.iter().map(|text| encoder.tokenize(text)).collect::<Result<Vec<_>, _>>()?;
        let embeddings = encoder.embed_tokens(&tokens)?;
        let first = embeddings.first().cloned().unwrap_or_default();
        let rows = texts.into_iter().zip(tokens).zip(embeddings).map(|((text, tokens), embedding)| {
            // They have length 1, so this is their cosine.
            let cosine_to_first = first.iter().zip(&embedding).map(|(a, b)| a * b).sum();
            Row { text, tokens: tokens.len(), cosine_to_first, embedding }
        });
        let (dimensions, backend) = (encoder.dimensions(), encoder.backend());
        Ok(Embedded { model: found.name, dimensions, backend, texts: rows.collect() })
    });
    let done = done.await?;
    if json {
        return output::print(&format!("{}\n", serde_json::to_string(&done)?));
    }
    output::print(&render(&done))
}

fn render(done: &Embedded) -> String {
    let mut text = format!("{}: {} dimensions, {}\n", done.model, done.dimensions, done.backend);
    for (n, row) in done.texts.iter().enumerate() {
        let mut short: String = row.text.chars().take(LONGEST).collect();
        if row.text.chars().count() > LONGEST {
            short.push('…');
        }
        let numbers: Vec<String> = row.embedding.iter().take(SHOWN).map(|x| format!("{x:+.4}")).collect();
        text += &format!("{short:?} ({} tokens): {} …", row.tokens, numbers.join(" "));
        if n > 0 {
            text += &format!("  cosine to the first: {:.4}", row.cosine_to_first);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_the_first_numbers_and_how_close_the_texts_are() {
        let row = |text: &str, cosine_to_first: f32| Row {
            text: text.into(),
            tokens: 5,
            cosine_to_first,
            embedding: vec![0.5, -0.25, 0.0, 0.125, 0.5, -0.5, 0.75, 0.0],
        };
        let texts = vec![row("a cat", 1.0), row(&"ä".repeat(41), 0.62975)];
        let done = Embedded { model: "tiny".into(), dimensions: 8, backend: "cpu (avx2, 2 threads)".into(), texts };
        let text = render(&done);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "tiny: 8 dimensions, cpu (avx2, 2 threads)");
        assert_eq!(lines[1], "\"a cat\" (5 tokens): +0.5000 -0.2500 +0.0000 +0.1250 +0.5000 -0.5000 …");
        assert!(lines[2].starts_with("\"ää") && lines[2].contains("ä…\" (5"), "{text}");
        assert!(lines[2].ends_with("cosine to the first: 0.6298") || lines[2].ends_with("0.6297"), "{text}");
    }
}
