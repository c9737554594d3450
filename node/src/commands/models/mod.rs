//! `ingle models`: loaded and unloaded, parameters, and model files in other formats with what that costs.

mod discover;
mod embed;
mod eval;
mod first_load;
mod load;
mod parameters;
mod progress;
mod quantize;
mod registry;
mod verify;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use ingle_actors::models::{FoundModel, find_model};
use ingle_actors::platform::EndSignals;
use tokio_util::sync::CancellationToken;

pub use verify::progress_line;

use super::progress::Progress;
use crate::cli::{Models, ModelsCommand};
use crate::config::Settings;

/// Runs one of the commands.
/// `verbose` is the option of every command.
pub async fn run(settings: &Settings, models: Models, verbose: bool) -> anyhow::Result<()> {
    match models.command {
        ModelsCommand::Add(options) => registry::add(settings, options).await,
        ModelsCommand::Rm(options) => registry::remove(settings, options).await,
        ModelsCommand::SetDefault(options) => registry::set_default(settings, options).await,
        ModelsCommand::Pin(options) => registry::pin(settings, options).await,
        ModelsCommand::Ls(options) => registry::list(settings, options).await,
        ModelsCommand::Status(options) => registry::status(settings, options, verbose).await,
        ModelsCommand::Show(options) => parameters::show(settings, options).await,
        ModelsCommand::Set(options) => parameters::set(settings, options).await,
        ModelsCommand::Load(options) => load::load(settings, options).await,
        ModelsCommand::Unload(options) => load::unload(settings, options).await,
        ModelsCommand::Test(options) => load::test(settings, options).await,
        ModelsCommand::Quantize(options) => quantize::run(settings, options).await,
        ModelsCommand::Eval(options) => eval::run(settings, options).await,
        ModelsCommand::Embed(options) => embed::run(settings, options).await,
        ModelsCommand::Verify(options) => verify::run(settings, options).await,
    }
}

/// The model that was typed, fetched where it is not here.
pub(super) async fn find(settings: &Settings, typed: &str) -> anyhow::Result<FoundModel> {
    let progress = Mutex::new(Progress::new());
    let show = |state| {
        if let Ok(mut progress) = progress.lock() {
            progress.show(&state, "");
        }
    };
    // Ctrl-C ends the process: what was fetched is kept and gone on with.
    Ok(find_model(&settings.model_cache, typed, &show, &CancellationToken::new()).await?)
}

/// Runs long work on a thread of its own. Ctrl-C and SIGTERM set the flag that it is given; it must then end soon,
/// leaving nothing behind.
pub(super) async fn work<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let mut signals = EndSignals::listen().context("Signals cannot be received")?;
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = cancelled.clone();
    let mut working = tokio::task::spawn_blocking(move || work(&flag));
    let done = tokio::select! {
        done = &mut working => done,
        () = signals.next() => {
            cancelled.store(true, Ordering::Relaxed);
            working.await
        }
    };
    done.context("The work ended without a result")?
}

/// Bytes as people read them.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
