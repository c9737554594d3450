//! The chunks of a file: their hashes, made once for each file and kept, and single chunks read and written.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::{CHUNK_BYTES, ChunkList};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::hash::{blocking, finish};
use crate::platform::{Fingerprint, read_optional, write_atomically};

/// A list as it is kept: it holds for the file as it was then.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    file: Fingerprint,
    size: u64,
    hashes: Vec<ModelDigest>,
}

/// The list of the file at `path`, whose content must be `digest`: the kept one, or made by reading all of it. `done`
/// counts the bytes meanwhile.
pub(super) async fn list_of(
    kept_in: PathBuf,
    path: PathBuf,
    digest: ModelDigest,
    done: Arc<AtomicU64>,
) -> io::Result<ChunkList> {
    blocking(move |left| {
        let kept_at = kept_in.join(format!("{digest}.json"));
        let file = File::open(&path)?;
        let now = Fingerprint::of(&file.metadata()?);
        let kept = read_optional(&kept_at)?.and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        if let Some(kept) = kept.filter(|kept| kept.file == now) {
            let hashes = kept.hashes.into_iter().map(|hash| hash.0).collect();
            return Ok(ChunkList { size: kept.size, hashes });
        }
        let (list, got) = hash_chunks(&file, &done, left)?;
        if got != digest {
            return Err(io::Error::other(format!("the file here is damaged: its SHA-256 is {got}")));
        }
        if Fingerprint::of(&file.metadata()?) != now {
            return Err(io::Error::other("the file was changed while it was read"));
        }
        let hashes = list.hashes.iter().map(|hash| ModelDigest(*hash)).collect();
        let kept = Kept { file: now, size: list.size, hashes };
        let written = fs::create_dir_all(&kept_in)
            .and_then(|()| Ok(serde_json::to_vec(&kept)?))
            .and_then(|bytes| write_atomically(&kept_at, &bytes, 0o600));
        if let Err(error) = written {
            tracing::debug!(%error, "the chunks of this file will be hashed again");
        }
        Ok(list)
    })
    .await
}

fn hash_chunks(mut file: &File, done: &AtomicU64, left: &CancellationToken) -> io::Result<(ChunkList, ModelDigest)> {
    let (mut whole, mut list) = (Sha256::new(), ChunkList { size: 0, hashes: Vec::new() });
    let mut chunk = Vec::with_capacity(CHUNK_BYTES as usize);
    while !left.is_cancelled() {
        chunk.clear();
        Read::take(&mut file, CHUNK_BYTES).read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            return Ok((list, finish(whole)));
        }
        whole.update(&chunk);
        list.hashes.push(Sha256::digest(&chunk).into());
        list.size += chunk.len() as u64;
        done.store(list.size, Ordering::Relaxed);
    }
    Err(ErrorKind::Interrupted.into())
}

/// The bytes of one chunk of the file at `path`. Blocks.
pub(super) fn read_chunk(path: &Path, index: u32) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let list = ChunkList { size: file.metadata()?.len(), hashes: Vec::new() };
    let (begin, length) = list.place(index).ok_or(ErrorKind::UnexpectedEof)?;
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, begin)?;
    Ok(bytes)
}

/// Which chunks of `list` are in the file already. Blocks.
pub(super) fn chunks_there(file: &File, list: &ChunkList, left: &CancellationToken) -> io::Result<Vec<bool>> {
    let here = file.metadata()?.len();
    let mut buffer = Vec::new();
    let mut there = Vec::with_capacity(list.hashes.len());
    for (index, hash) in (0..).zip(&list.hashes) {
        if left.is_cancelled() {
            return Err(ErrorKind::Interrupted.into());
        }
        let place = list.place(index).filter(|(begin, length)| begin + length <= here);
        there.push(match place {
            Some((begin, length)) => {
                buffer.resize(length as usize, 0);
                file.read_exact_at(&mut buffer, begin)?;
                Sha256::digest(&buffer)[..] == hash[..]
            }
            None => false,
        });
    }
    Ok(there)
}

/// Writes the chunk where it belongs, if it is the one; says whether. Blocks.
pub(super) fn write_checked(file: &File, begin: u64, bytes: &[u8], hash: &[u8; 32]) -> io::Result<bool> {
    let is_right = Sha256::digest(bytes)[..] == hash[..];
    if is_right {
        file.write_all_at(bytes, begin)?;
    }
    Ok(is_right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_list_is_made_once_and_only_of_the_file_that_it_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let (path, kept) = (folder.path().join("file"), folder.path().join("chunks"));
        let content: Vec<u8> = (0..CHUNK_BYTES + 1000).map(|i| (i % 253) as u8).collect();
        fs::write(&path, &content).unwrap();
        let digest = ModelDigest(Sha256::digest(&content).into());
        let list = async |digest| list_of(kept.clone(), path.clone(), digest, Arc::default()).await;
        let made = list(digest).await.unwrap();
        assert!(made.is_whole() && made.size == CHUNK_BYTES + 1000);
        assert_eq!(made.hashes[1][..], Sha256::digest(&content[CHUNK_BYTES as usize..])[..]);
        let kept_at = kept.join(format!("{digest}.json"));
        let modified = fs::metadata(&kept_at).unwrap().modified().unwrap();
        assert_eq!(list(digest).await.unwrap(), made);
        assert_eq!(fs::metadata(&kept_at).unwrap().modified().unwrap(), modified, "not made again");
        let error = list(ModelDigest([1; 32])).await.unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
        assert_eq!(read_chunk(&path, 1).unwrap(), &content[CHUNK_BYTES as usize..]);
        assert!(read_chunk(&path, 2).is_err());

        // What is there of a file is found again, wrong bytes and gaps are not.
        let part = File::options().read(true).write(true).create_new(true).open(folder.path().join("part")).unwrap();
        let left = CancellationToken::new();
        assert_eq!(chunks_there(&part, &made, &left).unwrap(), [false, false]);
        assert!(write_checked(&part, CHUNK_BYTES, &content[CHUNK_BYTES as usize..], &made.hashes[1]).unwrap());
        assert!(!write_checked(&part, 0, &content[1..], &made.hashes[0]).unwrap());
        assert_eq!(chunks_there(&part, &made, &left).unwrap(), [false, true]);
    }
}
