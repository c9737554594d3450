//! `ingle models verify`.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::bail;
use ingle_actors::models::{ModelStore, Verdict};
use ingle_actors::node::Verification;
use tokio_util::sync::CancellationToken;

use super::size;
use crate::cli::VerifyModels;
use crate::commands::{explain_error, unexpected};
use crate::config::Settings;
use crate::control::{Client, ControlError, Reply, Request};
use crate::output::{complain, print};

/// A node that says nothing for so long hangs: it says how far it is every second.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// Lines of progress come this far apart.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Reads files anew: by the node that runs here, which can ask other machines, else by this process.
pub async fn run(settings: &Settings, options: VerifyModels) -> anyhow::Result<()> {
    let request = Request::VerifyModels { name: options.name.clone() };
    let verification = match Client::ask(&settings.state_dir, &request).await {
        Ok(mut client) => loop {
            match client.next(SILENCE_LIMIT).await? {
                Reply::Progress(text) => complain(&text),
                Reply::Verified(verification) => break verification,
                _ => return Err(unexpected()),
            }
        },
        Err(ControlError::NoNode) => {
            let store = ModelStore::open(&settings.model_cache)?.with_limit(settings.model_cache_limit);
            let said = Mutex::new(None::<Instant>);
            let say = |name: &str, done: u64, all: u64| {
                let Ok(mut said) = said.lock() else { return };
                if said.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) {
                    *said = Some(Instant::now());
                    complain(&progress_line(name, done, all));
                }
            };
            let files = store.verify(options.name.as_deref(), &[], &say, &CancellationToken::new()).await?;
            Verification { files, probes: Vec::new() }
        }
        Err(error) => return Err(explain_error(settings, error)),
    };
    let text = if options.json { serde_json::to_string_pretty(&verification)? + "\n" } else { table(&verification) };
    print(&text)?;
    match problems(&verification) {
        0 => Ok(()),
        1 => bail!("One of them is not as it should be"),
        count => bail!("{count} of them are not as they should be"),
    }
}

/// How far one file is.
pub fn progress_line(name: &str, done: u64, all: u64) -> String {
    format!("{name}: {} of {} read", size(done), size(all))
}

/// What is still wrong now.
fn problems(verification: &Verification) -> usize {
    let wrong = |verdict: &Verdict| !matches!(verdict, Verdict::Good | Verdict::FetchedAgain { .. });
    let files = verification.files.iter().filter(|file| wrong(&file.verdict)).count();
    files + verification.probes.iter().filter(|probe| probe.failed.is_some()).count()
}

fn table(verification: &Verification) -> String {
    let mut text = String::new();
    for file in &verification.files {
        let verdict = match &file.verdict {
            Verdict::Good => "good".to_owned(),
            Verdict::FetchedAgain { moved_to, .. } => {
                format!("was damaged and is fetched again; what was here is {}", moved_to.display())
            }
            Verdict::Corrupt { moved_to, why, .. } => {
                format!("damaged, set aside as {}, and not fetched again: {why}", moved_to.display())
            }
            Verdict::Unreadable { why } => format!("cannot be read: {why}"),
        };
        text += &format!("{} ({}): {verdict}\n", file.name, size(file.size));
    }
    for probe in &verification.probes {
        match &probe.failed {
            None => text += &format!("{} answers here.\n", probe.model),
            Some(why) => text += &format!("{} does not answer here: {why}\n", probe.model),
        }
    }
    if verification.files.is_empty() && verification.probes.is_empty() {
        text += "There are no model files here.\n";
    }
    text
}
