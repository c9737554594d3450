//! What was measured on a card, in a file beside the packed weights, one for each card, driver and version of the
//! kernels.
//!
//! Nothing in it is believed that this build could not have measured on this card: a file that is damaged, of another
//! card or out of bounds is as good as none, and is replaced by what is measured anew.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Class, Cuts, hash};
use crate::gpu::kernels::Cut;
use crate::gpu::{ARITHMETIC, CUBECL, Card};
use crate::model::packed_file::{Unfinished, make_private_folder};

/// The version of what is measured; to be raised when the kernels or the cuts that they can have change.
const KERNELS: u32 = 1;
/// Bytes and classes of a file at most. A model has some dozens of classes.
const MOST_BYTES: u64 = 1 << 20;
const MOST_CLASSES: usize = 2_048;
/// Between two looks whether another engine is done.
const PAUSE: Duration = Duration::from_millis(100);

/// What it was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Made {
    card: String,
    driver: String,
    cubecl: String,
    arithmetic: String,
    kernels: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    form: String,
    inputs: u32,
    outputs: u32,
    columns: u32,
    threads: u32,
    outputs_at_once: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    made: Made,
    cuts: Vec<Entry>,
}

/// A card's file.
pub(super) struct Store {
    folder: PathBuf,
    pub path: PathBuf,
    made: Made,
}

/// Whether this engine may measure.
pub(super) enum Lock {
    /// Until this is dropped.
    Held(File),
    /// Another does.
    Busy,
    /// There is no place for a lock, hence none for a file.
    Cannot(io::Error),
}

impl Store {
    pub fn new(folder: &Path, card: &Card) -> Self {
        let made = Made {
            card: card.name.clone(),
            driver: card.driver.clone(),
            cubecl: CUBECL.into(),
            arithmetic: ARITHMETIC.into(),
            kernels: KERNELS,
        };
        // Names of cards are not names of files.
        let name = format!("gpu-{:016x}.tuning.json", hash(format!("{made:?}").as_bytes()));
        Self { folder: folder.into(), path: folder.join(name), made }
    }

    /// All that is known of the card; `None` where there is no file, or none that can be used.
    pub fn read(&self, card: &Card) -> Option<Cuts> {
        let unusable = |why: String| tracing::warn!(file = %self.path.display(), why, "it is measured anew");
        match self.try_read(card) {
            Ok(cuts) => Some(cuts),
            Err(why) if why.kind() == io::ErrorKind::NotFound => None,
            Err(why) => {
                unusable(why.to_string());
                None
            }
        }
    }

    fn try_read(&self, card: &Card) -> io::Result<Cuts> {
        // A pipe would be waited for.
        if !fs::symlink_metadata(&self.path)?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        let mut bytes = Vec::new();
        File::open(&self.path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MOST_BYTES {
            return Err(io::Error::other("it is too large"));
        }
        let kept: Kept = serde_json::from_slice(&bytes)?;
        if kept.made != self.made {
            return Err(io::Error::other("it is of another card, driver or version"));
        }
        if kept.cuts.len() > MOST_CLASSES {
            return Err(io::Error::other("it has too many entries"));
        }
        let mut cuts = Cuts::new();
        for entry in kept.cuts {
            let (class, cut) = entry.check(card).ok_or_else(|| io::Error::other("an entry is out of bounds"))?;
            cuts.insert(class, cut);
        }
        Ok(cuts)
    }

    /// Waits for others that measure, for so long.
    pub fn lock(&self, wait: Duration) -> Lock {
        let lock = make_private_folder(&self.folder).and_then(|()| File::create(self.path.with_extension("lock")));
        let lock = match lock {
            Ok(lock) => lock,
            Err(why) => return Lock::Cannot(why),
        };
        let until = Instant::now() + wait;
        loop {
            match lock.try_lock() {
                Ok(()) => return Lock::Held(lock),
                Err(TryLockError::Error(why)) => return Lock::Cannot(why),
                Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(PAUSE),
                Err(TryLockError::WouldBlock) => return Lock::Busy,
            }
        }
    }

    /// Replaces the file. `own`: the classes that are kept in any case, where there are too many.
    pub fn write(&self, cuts: &Cuts, own: &[Class]) -> io::Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        make_private_folder(&self.folder)?;
        let all = cuts.len() <= MOST_CLASSES;
        let cuts = cuts.iter().filter(|(class, _)| all || own.contains(class));
        let kept = Kept { made: self.made.clone(), cuts: cuts.map(Entry::of).collect() };
        let bytes = serde_json::to_vec_pretty(&kept)?;
        // Two engines, be they of one process, have two names.
        let (process, number) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let part = Unfinished::new(self.path.with_extension(format!("{process}-{number}.part")));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&part.path)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&part.path, &self.path)?;
        #[cfg(unix)]
        File::open(&self.folder)?.sync_all()?;
        Ok(())
    }
}

impl Entry {
    fn of((class, cut): (&Class, &Cut)) -> Self {
        let Class { form, inputs, outputs, columns } = class.clone();
        Self { form, inputs, outputs, columns, threads: cut.threads, outputs_at_once: cut.outputs }
    }

    /// `None` where it is nothing that this build measures on this card.
    fn check(self, card: &Card) -> Option<(Class, Cut)> {
        let Self { form, inputs, outputs, columns, threads, outputs_at_once } = self;
        let named = form.len() <= 16 && form.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let sized = inputs > 0 && outputs.is_power_of_two();
        let cut = Cut { threads, outputs: outputs_at_once };
        // What a kernel could not run is not in the card's list; columns that are none of ours would be too many there.
        let runs = super::COLUMNS.contains(&(columns as usize)) && card.cuts(columns as usize).any(|can| can == cut);
        (named && sized && runs).then_some((Class { form, inputs, outputs, columns }, cut))
    }
}
