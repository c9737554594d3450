//! `ingle models quantize`: a model file in another format.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, anyhow};
use ingle_actors::models::FoundModel;
use ingle_actors::models::quantize::{self, Conversion, Fallback, FormatShare, Target};
use ingle_actors::platform::available_disk_space;
use serde::Serialize;

use super::progress::WorkProgress;
use super::{find, size, work};
use crate::cli::QuantizeModel;
use crate::config::Settings;
use crate::exit::UsageError;
use crate::output;

/// What was done.
#[derive(Debug, Serialize)]
struct Report {
    input: PathBuf,
    output: PathBuf,
    to: String,
    weights: u64,
    input_bytes: u64,
    output_bytes: u64,
    seconds: f64,
    requantized: bool,
    formats: Vec<Share>,
    fallbacks: Vec<OtherFormat>,
}

#[derive(Debug, Serialize)]
struct Share {
    format: String,
    tensors: usize,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct OtherFormat {
    tensor: String,
    row: u64,
    wanted: String,
    got: String,
}

/// Converts the model and says what became of it.
pub async fn run(settings: &Settings, options: QuantizeModel) -> anyhow::Result<()> {
    let found = find(settings, &options.model).await?;
    let path = options.output.clone().unwrap_or_else(|| default_output(&found, options.to));
    if path.symlink_metadata().is_ok() && !options.force {
        let path = path.display();
        return Err(UsageError(format!(
            "{path} is there already. Choose another name with --output, or replace it with --force."
        ))
        .into());
    }
    let QuantizeModel { to, requantize, force, json, .. } = options;
    let report = work(move |cancelled| {
        let conversion = Conversion::plan(quantize::open(&found.path)?, to, requantize)?;
        check_space(&path, conversion.file_bytes())?;
        if conversion.is_requantization() {
            output::complain(
                "notice: the weights were rounded before and are rounded again, so the result is somewhat worse than \
                 the same format made from the original. `ingle models eval` measures by how much.",
            );
        }
        let mut progress = WorkProgress::new(&format!("{} to {to}", found.name));
        let started = Instant::now();
        let written = conversion.write(&path, force, cancelled, &mut |done, all| progress.show(done, all));
        progress.end();
        written?;
        Ok(report(&conversion, &found.path, &path, to, started.elapsed().as_secs_f64()))
    });
    let report = report.await?;
    if json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&report)?));
    }
    output::print(&render(&report))
}

/// Beside the input, or here for a model of the store: its name without a format that it may end in, and the new one.
fn default_output(found: &FoundModel, to: Target) -> PathBuf {
    let stem = match found.name.rsplit_once('.') {
        Some((stem, format)) if format.parse::<Target>().is_ok() || is_other_format(format) => stem,
        _ => found.name.as_str(),
    };
    let name = format!("{stem}.{to}.gguf");
    match found.path.parent() {
        // Of a folder too: beside it, not inside.
        Some(folder) if !found.is_stored && found.path.file_name().is_some() => folder.join(name),
        _ => name.into(),
    }
}

/// Formats that files are named after and that are no targets: `Q4_K_M`, `IQ4_XS` and the like.
fn is_other_format(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    (name.starts_with('Q') || name.starts_with("IQ")) && name.contains('_')
}

fn check_space(path: &Path, needed: u64) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let available = available_disk_space(folder)
        .with_context(|| format!("The folder {} cannot be used; choose another with --output", folder.display()))?;
    if available < needed {
        return Err(anyhow!(
            "The file needs {} of disk space in {}, and {} are free. Free some, or choose another place with --output.",
            size(needed),
            folder.display(),
            size(available)
        ));
    }
    Ok(())
}

fn report(conversion: &Conversion, input: &Path, path: &Path, to: Target, seconds: f64) -> Report {
    let share = |FormatShare { format, tensors, bytes }| Share { format, tensors, bytes };
    let other = |f: &Fallback| OtherFormat {
        tensor: f.tensor.clone(),
        row: f.row,
        wanted: f.wanted.clone(),
        got: f.got.clone(),
    };
    Report {
        input: input.into(),
        output: path.into(),
        to: to.to_string(),
        weights: conversion.weights(),
        input_bytes: conversion.input_bytes(),
        output_bytes: conversion.file_bytes(),
        seconds,
        requantized: conversion.is_requantization(),
        formats: conversion.shares().into_iter().map(share).collect(),
        fallbacks: conversion.fallbacks().iter().map(other).collect(),
    }
}

fn render(report: &Report) -> String {
    let mut text = format!(
        "{}: {} → {} in {:.1} s\n",
        report.output.display(),
        size(report.input_bytes),
        size(report.output_bytes),
        report.seconds
    );
    for Share { format, tensors, bytes } in &report.formats {
        text += &format!("  {format:<5} {tensors:>4} tensors  {}\n", size(*bytes));
    }
    for (first, count) in grouped(&report.fallbacks) {
        let OtherFormat { tensor, row, wanted, got } = first;
        let (who, whose) = match count {
            1 => (format!("{tensor} is"), "its"),
            _ => (format!("{count} tensors, such as {tensor}, are"), "their"),
        };
        text += &format!("  {who} {got}, not {wanted}: {whose} rows of {row} weights are no whole blocks\n");
    }
    text
}

/// Tensors with the same fate: the first of them and how many.
fn grouped(fallbacks: &[OtherFormat]) -> Vec<(&OtherFormat, usize)> {
    let mut groups: Vec<(&OtherFormat, usize)> = Vec::new();
    for other in fallbacks {
        let alike = |of: &OtherFormat| of.row == other.row && of.wanted == other.wanted && of.got == other.got;
        match groups.iter_mut().find(|(first, _)| alike(first)) {
            Some((_, count)) => *count += 1,
            None => groups.push((other, 1)),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_named_after_their_format() {
        let of = |name: &str, path: &str, is_stored: bool| {
            let found = FoundModel { name: name.into(), path: path.into(), is_stored };
            default_output(&found, "int8".parse().unwrap()).display().to_string()
        };
        assert_eq!(of("A-1.5B.Q4_1", "/m/A-1.5B.Q4_1.gguf", false), "/m/A-1.5B.Q8_0.gguf");
        assert_eq!(of("A-1.5B.Q4_K_M", "/m/A-1.5B.Q4_K_M.gguf", false), "/m/A-1.5B.Q8_0.gguf");
        assert_eq!(of("A-1.5B", "/m/A-1.5B", false), "/m/A-1.5B.Q8_0.gguf");
        assert_eq!(of("a", "a.gguf", false), "a.Q8_0.gguf");
        assert_eq!(of("a", "..", false), "a.Q8_0.gguf");
        assert_eq!(of("smollm2-135m-instruct", "/cache/b179.gguf", true), "smollm2-135m-instruct.Q8_0.gguf");
    }

    #[test]
    fn the_report_names_what_is_not_as_asked() {
        let other = |n: usize| OtherFormat {
            tensor: format!("blk.{n}.attn_q.weight"),
            row: 576,
            wanted: "Q4_K".into(),
            got: "Q4_1".into(),
        };
        let report = Report {
            input: "in".into(),
            output: "out.gguf".into(),
            to: "Q4_K".into(),
            weights: 1,
            input_bytes: 2_000_000_000,
            output_bytes: 500_000_000,
            seconds: 1.0,
            requantized: false,
            formats: vec![Share { format: "Q4_1".into(), tensors: 10, bytes: 500_000_000 }],
            fallbacks: (0..10).map(other).collect(),
        };
        let text = render(&report);
        assert!(text.starts_with("out.gguf: 2.00 GB → 500.0 MB in 1.0 s\n  Q4_1    10 tensors  500.0 MB\n"), "{text}");
        let line = "  10 tensors, such as blk.0.attn_q.weight, are Q4_1, not Q4_K: their rows of 576 weights";
        assert!(text.contains(line), "{text}");
    }
}
