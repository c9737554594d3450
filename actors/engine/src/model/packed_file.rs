//! Packed weights in a file that all engine processes of a host map: made once for each (model file, layout), read
//! only ever after, so that a second engine of a model needs no memory for its weights.
//!
//! The file: a head of [`HEAD`] bytes (magic, a hash of what is where and of the model's digest, the file's length),
//! then the matrices. It is written as a temporary file, synced and renamed, so that a name always stands for a
//! whole file.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use memmap2::{Mmap, MmapMut};
use rayon::prelude::*;

use super::weights::{Order, Part};
use crate::EngineError;
use crate::gguf::{Gguf, GgufError};
use crate::kernels::{ALIGNMENT, LANES, LAYOUT, Packed, Shape, pack_tile};
use crate::spec::PackedCache;

const MAGIC: &[u8; 8] = b"ingle-pk";
const HEAD: usize = 64;

/// A matrix that is to be packed.
#[derive(Debug)]
pub(crate) struct Piece {
    pub part: Part,
    pub shape: Shape,
}

/// What tells one piece from another.
type Key = (String, usize, Order);

fn key(part: &Part) -> Key {
    (part.name.clone(), part.first, part.order)
}

/// All packed matrices of a model.
pub(crate) struct PackedFile {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    places: HashMap<Key, (Shape, usize)>,
}

struct Whole<T>(T);

/// A mapped file. As long as this lives nobody takes the file away: all its users share a lock on it.
struct Mapped {
    map: Mmap,
    _in_use: File,
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl AsRef<[u8]> for Whole<MmapMut> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl PackedFile {
    /// From the cache if it is there, else packed into the cache; into memory where there is no cache or it has no
    /// room.
    pub fn open(gguf: &Gguf, pieces: Vec<Piece>, cache: Option<&PackedCache>) -> Result<Self, EngineError> {
        let damaged = |why| EngineError::Gguf { path: gguf.path().into(), why };
        let mut places = HashMap::new();
        let mut end = HEAD;
        for piece in &pieces {
            let offset = end.next_multiple_of(ALIGNMENT);
            end = piece.shape.bytes().and_then(|bytes| bytes.checked_add(offset)).ok_or_else(|| {
                let what = format!("tensor {}.weight", piece.part.name);
                damaged(GgufError::Invalid { what, why: "it is too large".into() })
            })?;
            places.insert(key(&piece.part), (piece.shape, offset));
        }
        let plan = Plan { gguf, pieces: &pieces, places: &places, bytes: end };
        if let Some(cache) = cache {
            match plan.cached(cache) {
                Ok(mapped) => return Ok(Self { bytes: Arc::new(mapped), places }),
                Err(why) => tracing::warn!(
                    folder = %cache.folder.display(), %why,
                    "packed weights cannot be kept: this engine holds a copy of its own"
                ),
            }
        }
        let cannot = |why| EngineError::Open { path: gguf.path().into(), why };
        let mut map = MmapMut::map_anon(end).map_err(cannot)?;
        plan.fill(&mut map).map_err(damaged)?;
        gguf.forget_pages();
        Ok(Self { bytes: Arc::new(Whole(map)), places })
    }

    /// The packed form of a part.
    pub fn get(&self, part: &Part) -> Result<Packed, GgufError> {
        let place = self.places.get(&key(part));
        place.and_then(|(shape, offset)| Packed::new(*shape, Arc::clone(&self.bytes), *offset)).ok_or_else(|| {
            let why = "it was not packed".into();
            GgufError::Invalid { what: format!("tensor {}.weight", part.name), why }
        })
    }
}

struct Plan<'a> {
    gguf: &'a Gguf,
    pieces: &'a [Piece],
    places: &'a HashMap<Key, (Shape, usize)>,
    bytes: usize,
}

impl Plan<'_> {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GgufError> {
        let mut rest = &mut bytes[HEAD..];
        let mut at = HEAD;
        for piece in self.pieces {
            let (shape, offset) = self.places[&key(&piece.part)];
            let (_, behind) = rest.split_at_mut(offset - at);
            let size = shape.tiles() * shape.tile_bytes();
            let (mine, behind) = behind.split_at_mut(size);
            self.fill_piece(piece, mine)?;
            (rest, at) = (behind, offset + size);
        }
        Ok(())
    }

    fn fill_piece(&self, piece: &Piece, bytes: &mut [u8]) -> Result<(), GgufError> {
        let Piece { part, shape } = piece;
        let info = self.gguf.tensor(&format!("{}.weight", part.name))?;
        let stored = self.gguf.tensor_bytes(info)?;
        let row_bytes = shape.inputs / shape.format.block_weights() * shape.format.block_bytes();
        bytes.par_chunks_exact_mut(shape.tile_bytes()).enumerate().for_each(|(number, tile)| {
            let from = number * LANES;
            let row = |n: usize| &stored[(part.first + part.order.row(n)) * row_bytes..][..row_bytes];
            let rows: Vec<&[u8]> = (from..shape.outputs.min(from + LANES)).map(row).collect();
            pack_tile(*shape, &rows, tile);
        });
        Ok(())
    }

    /// Says what is where, and of which model.
    fn head(&self, cache: &PackedCache) -> [u8; HEAD] {
        let mut text = format!("{LAYOUT} {}", cache.digest);
        for piece in self.pieces {
            text.push_str(&format!(" {:?} {:?}", piece.part, piece.shape));
        }
        // FNV-1a: it guards against mistakes, not against attackers, who could change the weights as well.
        let hash = text
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(MAGIC);
        head[8..16].copy_from_slice(&hash.to_le_bytes());
        head[16..24].copy_from_slice(&(self.bytes as u64).to_le_bytes());
        head
    }

    fn cached(&self, cache: &PackedCache) -> io::Result<Mapped> {
        make_private_folder(&cache.folder)?;
        let path = cache.folder.join(format!("{}.{LAYOUT}.packed", cache.digest));
        let head = self.head(cache);
        if let Some(map) = open_packed(&path, &head, self.bytes)? {
            return Ok(map);
        }
        // One engine packs, others that start at the same time wait for it.
        let lock = File::create(cache.folder.join(format!("{}.lock", cache.digest)))?;
        lock.lock()?;
        if let Some(map) = open_packed(&path, &head, self.bytes)? {
            return Ok(map);
        }
        make_room(&cache.folder, self.bytes as u64, cache.limit)?;
        let part = Unfinished::new(cache.folder.join(format!("{}.{}.part", cache.digest, std::process::id())));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&part.path)?;
        // Really claimed, so that a full disk is an error here and not a signal in the middle of packing.
        reserve(&file, self.bytes as u64)?;
        #[allow(unsafe_code)]
        // SAFETY: nobody else knows this file's name.
        let mut map = unsafe { MmapMut::map_mut(&file)? };
        self.fill(&mut map).map_err(io::Error::other)?;
        self.gguf.forget_pages();
        map[..HEAD].copy_from_slice(&head);
        map.flush()?;
        drop(map);
        file.sync_all()?;
        fs::rename(&part.path, &path)?;
        File::open(&cache.folder)?.sync_all()?;
        open_packed(&path, &head, self.bytes)?
            .ok_or_else(|| io::Error::other("the packed file is not what was written"))
    }
}

/// Removes a file that was not finished.
pub(crate) struct Unfinished {
    pub path: PathBuf,
}

impl Unfinished {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Renamed by now, if all went well.
        let _ = fs::remove_file(&self.path);
    }
}

/// `None` where there is no such file, or another one under its name.
fn open_packed(path: &Path, head: &[u8; HEAD], bytes: usize) -> io::Result<Option<Mapped>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(why),
    };
    // Whoever takes files away holds the lock for a moment only. Where there are no locks, none are taken away.
    let _ = file.lock_shared();
    if file.metadata()?.len() != bytes as u64 || is_gone(&file)? {
        return Ok(None);
    }
    #[allow(unsafe_code)]
    // SAFETY: packed files are written once and renamed, never changed in place, in a folder of this user's.
    let map = unsafe { Mmap::map(&file)? };
    if map[..HEAD] != head[..] {
        return Ok(None);
    }
    // The time of the last use; who may not set it loses nothing but its place in the queue.
    let _ = file.set_modified(SystemTime::now());
    Ok(Some(Mapped { map, _in_use: file }))
}

/// It has been taken away since it was opened.
fn is_gone(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        Ok(file.metadata()?.nlink() == 0)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        Ok(false)
    }
}

/// A folder that only this user writes: what is mapped from it is believed.
pub(crate) fn make_private_folder(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let mode = fs::metadata(folder)?.mode();
        if mode & 0o022 != 0 {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode & 0o755))?;
        }
    }
    Ok(())
}

/// Claims the space of a file. Zeros are written where the system has no call for it.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    use std::io::Write;
    let chunk = vec![0u8; 1 << 20];
    let mut left = bytes;
    let mut writer = file;
    while left > 0 {
        let size = left.min(chunk.len() as u64);
        writer.write_all(&chunk[..size as usize])?;
        left -= size;
    }
    Ok(())
}

/// Removes the files that were not used for longest and that no engine uses, until `wanted` more bytes fit under
/// `limit`. Where that is not enough it is an error.
fn make_room(folder: &Path, wanted: u64, limit: u64) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let data = entry.metadata()?;
        if entry.path().extension().is_some_and(|extension| extension == "packed") {
            files.push((data.modified().unwrap_or(SystemTime::UNIX_EPOCH), data.len(), entry.path()));
        }
    }
    files.sort();
    let mut total: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, bytes, path) in files {
        // What can never fit takes nothing away.
        if total.saturating_add(wanted) <= limit || wanted > limit {
            break;
        }
        // Another engine may be at it as well.
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() {
            fs::remove_file(path)?;
            total -= bytes;
        }
    }
    if total.saturating_add(wanted) <= limit {
        return Ok(());
    }
    let why = format!("they have {wanted} bytes, and all may have {limit}, of which {total} are in use");
    Err(io::Error::new(io::ErrorKind::QuotaExceeded, why))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_longest_unused_goes_and_what_an_engine_uses_stays() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, days: u64| {
            let path = folder.path().join(name);
            fs::write(&path, [0; 100]).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(days * 86_400)).unwrap();
            path
        };
        let (oldest, used, old, other) =
            (put("a.packed", 9), put("b.packed", 8), put("c.packed", 7), put("d.json", 10));
        let in_use = File::open(&used).unwrap();
        in_use.lock_shared().unwrap();
        make_room(folder.path(), 100, 300).unwrap();
        assert!(!oldest.exists() && used.exists() && old.exists() && other.exists());
        make_room(folder.path(), 200, 300).unwrap();
        assert!(used.exists() && !old.exists(), "in use");
        assert_eq!(make_room(folder.path(), 300, 300).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        drop(in_use);
        make_room(folder.path(), 301, 300).unwrap_err();
        assert!(used.exists(), "what can never fit takes nothing away");
        make_room(folder.path(), 300, 300).unwrap();
        assert!(!used.exists() && other.exists());
    }
}
