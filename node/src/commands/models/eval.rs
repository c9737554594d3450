//! `ingle models eval`: models side by side, measured on a text.

use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::Context;
use ingle_actors::models::FoundModel;
use ingle_actors::models::inspect;
use ingle_actors::models::perplexity::Subject;
use ingle_actors::node::DeviceKind;
use serde::Serialize;

use super::progress::WorkProgress;
use super::{find, size, work};
use crate::cli::EvaluateModels;
use crate::config::Settings;
use crate::exit::UsageError;
use crate::output;

/// The longest text.
const LONGEST_TEXT: u64 = 64 << 20;

/// What was measured of one model.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    format: String,
    bytes: u64,
    perplexity: f64,
    /// By how much the perplexity is above the first model's, as a share of it.
    change: f64,
    tokens: usize,
    windows: usize,
    context: usize,
    prompt_tokens_per_second: f64,
    decode_tokens_per_second: f64,
}

/// Measures one model after the other.
pub async fn run(settings: &Settings, options: EvaluateModels) -> anyhow::Result<()> {
    let text = read_text(&options.perplexity)?;
    let mut models = Vec::new();
    for typed in &options.models {
        models.push(find(settings, typed).await?);
    }
    let (context, device) = (options.context, settings.device);
    let mut rows: Vec<Row> = Vec::new();
    for found in models {
        let text = text.clone();
        rows.push(work(move |cancelled| measure(&found, &text, context, device, cancelled)).await?);
        let first = rows[0].perplexity;
        if let Some(last) = rows.last_mut() {
            last.change = last.perplexity / first - 1.0;
        }
    }
    if options.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    output::print(&render(&rows))
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let cannot = || format!("The text {} cannot be read", path.display());
    let length = std::fs::metadata(path).with_context(cannot)?.len();
    if length > LONGEST_TEXT {
        return Err(UsageError(format!("{} is longer than {} MiB.", path.display(), LONGEST_TEXT >> 20)).into());
    }
    std::fs::read_to_string(path).with_context(cannot)
}

fn measure(
    found: &FoundModel,
    text: &str,
    context: usize,
    device: DeviceKind,
    cancelled: &std::sync::atomic::AtomicBool,
) -> anyhow::Result<Row> {
    let summary = inspect(&found.path)?;
    let mut subject = Subject::open(&found.path, device.into())?;
    let tokens = subject.tokenize(text)?;
    let mut progress = WorkProgress::new(&format!("Measuring {}", found.name));
    let measured = subject.evaluate(&tokens, context, &mut |done, all| {
        progress.show(done as u64, all as u64);
        !cancelled.load(Ordering::Relaxed)
    });
    progress.end();
    let measured = measured.with_context(|| format!("{} was not measured", found.name))?;
    Ok(Row {
        model: found.name.clone(),
        format: summary.quantization,
        bytes: summary.file_bytes,
        perplexity: measured.perplexity,
        change: 0.0,
        tokens: measured.tokens,
        windows: measured.windows,
        context,
        prompt_tokens_per_second: measured.prompt_rate,
        decode_tokens_per_second: measured.decode_rate,
    })
}

fn render(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.model.chars().count()).max().unwrap_or(0).max(5);
    let mut text = format!(
        "{:width$}  {:6}  {:>9}  {:>12}  {:>12}  {:>10}  {:>8}\n",
        "MODEL", "FORMAT", "SIZE", "PROMPT TOK/S", "ANSWER TOK/S", "PERPLEXITY", "CHANGE"
    );
    for (n, row) in rows.iter().enumerate() {
        let change = if n == 0 { "-".into() } else { format!("{:+.2} %", row.change * 100.0) };
        text += &format!(
            "{:width$}  {:6}  {:>9}  {:>12.1}  {:>12.1}  {:>10.3}  {change:>8}\n",
            row.model,
            row.format,
            size(row.bytes),
            row.prompt_tokens_per_second,
            row.decode_tokens_per_second,
            row.perplexity,
        );
    }
    if let Some(row) = rows.first() {
        text += &format!("{} tokens predicted in {} windows of {}.\n", row.tokens, row.windows, row.context);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_compared_to_the_first() {
        let row = |model: &str, perplexity: f64, change: f64| Row {
            model: model.into(),
            format: "Q8_0".into(),
            bytes: 144_900_000,
            perplexity,
            change,
            tokens: 678,
            windows: 3,
            context: 256,
            prompt_tokens_per_second: 100.0,
            decode_tokens_per_second: 20.0,
        };
        let text = render(&[row("a", 22.0, 0.0), row("a-longer-name", 22.11, 0.005)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("MODEL          FORMAT       SIZE"), "{text}");
        assert!(lines[1].ends_with("22.000         -"), "{text}");
        assert!(lines[2].ends_with("22.110   +0.50 %"), "{text}");
        assert_eq!(lines[3], "678 tokens predicted in 3 windows of 256.");
    }
}
