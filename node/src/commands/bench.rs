//! `ingle bench`: the speed of this machine for a model.

use anyhow::Context;
use ingle_actors::models::bench::{BenchReport, bench};
use ingle_actors::models::{InstructionSet, ModelOptions, ModelStore, PackedCache};

use super::models::{find, size, work};
use crate::cli::Bench;
use crate::config::Settings;
use crate::exit::UsageError;
use crate::output;

/// Loads the model and measures it.
pub async fn run(settings: &Settings, options: Bench) -> anyhow::Result<()> {
    let found = find(settings, &options.model).await?;
    if found.path.is_dir() {
        return Err(UsageError(format!("{} is a folder: give a GGUF file.", found.path.display())).into());
    }
    let instructions = match &options.instructions {
        None => None,
        Some(name) => {
            let sets = InstructionSet::available();
            let names: Vec<_> = sets.iter().map(|set| set.name()).collect();
            let set = sets.iter().find(|set| set.name() == name).copied();
            Some(set.ok_or_else(|| UsageError(format!("This processor has {}, not `{name}`.", names.join(", "))))?)
        }
    };
    let digest = ModelStore::open(&settings.model_cache)?.local_file(&found.path).await?.digest;
    let packed_cache = PackedCache::beside(&settings.model_cache, digest.to_string());
    let model_options = ModelOptions {
        threads: options.threads.map(usize::from),
        packed_cache: Some(packed_cache),
        instructions,
        ..ModelOptions::default()
    };
    let (path, device, quiet) = (found.path, options.device.into(), options.json);
    let report = work(move |_| {
        let report = bench(&path, device, &model_options, |doing| {
            if !quiet {
                output::complain(&format!("{doing} …"));
            }
        });
        report.with_context(|| format!("{} cannot be measured", path.display()))
    });
    let report = report.await?;
    if options.json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&report)?));
    }
    output::print(&render(&report))
}

fn render(report: &BenchReport) -> String {
    let mut text = format!("{}\non {}\n\n", report.model, report.backend);
    let mut row = |name: &str, value: String, share: Option<f64>, limit: Option<f64>| {
        text += &format!("{name:<28}{value:>12}");
        if let (Some(share), Some(limit)) = (share, limit) {
            text += &format!("   {:.0} % of this machine's limit of {limit:.0}", share * 100.0);
        }
        text.push('\n');
    };
    let rate = |rate: f64| format!("{rate:.1} tok/s");
    row(
        "prompt, 512 tokens",
        rate(report.prompt_tokens_per_second),
        report.prompt_share_of_limit,
        report.prompt_limit_tokens_per_second,
    );
    for (batch, speed) in &report.decode_tokens_per_second {
        let share = report.decode_share_of_limit.filter(|_| *batch == 1);
        row(&format!("decode, {batch} at once"), rate(*speed), share, report.decode_limit_tokens_per_second);
    }
    row("first token after start", format!("{:.2} s", report.first_token_seconds), None, None);
    row("weights", size(report.weight_bytes), None, None);
    if let Some(memory) = report.memory_bytes {
        row("memory", size(memory), None, None);
    }
    if let Some(memory) = report.private_memory_bytes {
        row("of it not shared", size(memory), None, None);
    }
    if let Some(bandwidth) = report.memory_bandwidth_bytes_per_second {
        row("memory bandwidth", format!("{}/s", size(bandwidth as u64)), None, None);
    }
    if let Some(rate) = report.multiplications_per_second {
        row("8-bit multiplications", format!("{:.0} G/s", rate / 1e9), None, None);
    }
    text
}
