//! One member out of a wheel (a zip file). Nothing else of it is unpacked, and nothing under a name of its own.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::mpsc;
use zip::ZipArchive;
use zip::read::ZipFile;
use zip::result::ZipError;

use super::source::SourceError;

const CHUNK: usize = 256 << 10;
const CHUNKS_WAITING: usize = 4;

/// Size of `member`, unpacked; more than `most` is refused. Blocks.
pub(super) fn member_size(wheel: &Path, member: &str, most: u64) -> Result<u64, SourceError> {
    let mut archive = open(wheel)?;
    let size = find(&mut archive, member)?.size();
    if size > most {
        return Err(SourceError::Refused(format!("{member} unpacks to {size} bytes, more than the {most} expected")));
    }
    Ok(size)
}

/// The only model file of a wheel. Blocks.
pub(super) fn only_model(wheel: &Path) -> Result<String, SourceError> {
    let archive = open(wheel)?;
    let mut models = archive.file_names().filter(|name| name.ends_with(".gguf"));
    match (models.next(), models.next()) {
        (Some(only), None) => Ok(only.to_owned()),
        (None, _) => Err(SourceError::Refused("the package has no .gguf file in it".into())),
        (Some(first), Some(second)) => Err(SourceError::Refused(format!(
            "the package has several .gguf files in it ({first}, {second} …): write which one behind the package"
        ))),
    }
}

/// The bytes of `member`, `size` of them: fewer or more is an error at the end. `held` lives as long as they come.
pub(super) fn member_bytes(
    wheel: PathBuf,
    member: String,
    size: u64,
    held: Arc<impl Send + Sync + 'static>,
) -> BoxStream<'static, Result<Bytes, SourceError>> {
    let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
    tokio::task::spawn_blocking(move || {
        let _held = held;
        if let Err(error) = send_member(&wheel, &member, size, &sender) {
            // Nobody listens any more: then nobody wants to know.
            let _ = sender.blocking_send(Err(error));
        }
    });
    stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) }).boxed()
}

fn send_member(
    wheel: &Path,
    member: &str,
    size: u64,
    sender: &mpsc::Sender<Result<Bytes, SourceError>>,
) -> Result<(), SourceError> {
    let mut archive = open(wheel)?;
    let mut file = find(&mut archive, member)?;
    let mut done = 0;
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = file.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
        done += read.map_err(|error| damaged(wheel, &error))? as u64;
        if done > size {
            return Err(damaged(wheel, &format!("{member} has more than the {size} bytes that it claims")));
        }
        if chunk.is_empty() {
            break;
        }
        if sender.blocking_send(Ok(chunk.into())).is_err() {
            return Ok(());
        }
    }
    if done < size {
        return Err(damaged(wheel, &format!("{member} ends after {done} of {size} bytes")));
    }
    Ok(())
}

fn open(wheel: &Path) -> Result<ZipArchive<io::BufReader<File>>, SourceError> {
    let file = File::open(wheel).map_err(SourceError::io("opening the wheel"))?;
    ZipArchive::new(io::BufReader::with_capacity(CHUNK, file)).map_err(|error| damaged(wheel, &error))
}

fn find<'a, R: io::Read + io::Seek>(
    archive: &'a mut ZipArchive<R>,
    member: &str,
) -> Result<ZipFile<'a, R>, SourceError> {
    let file = archive.by_name(member).map_err(|error| match error {
        ZipError::FileNotFound => SourceError::Refused(format!("the wheel has no member {member}")),
        error => SourceError::Refused(format!("{member} in the wheel cannot be read: {error}")),
    })?;
    if !file.is_file() || file.is_symlink() {
        return Err(SourceError::Refused(format!("{member} in the wheel is not a plain file")));
    }
    Ok(file)
}

fn damaged(wheel: &Path, why: &dyn std::fmt::Display) -> SourceError {
    let name = wheel.file_name().unwrap_or_default().to_string_lossy();
    SourceError::Refused(format!("the wheel {name} is damaged: {why}"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    /// A wheel with these members.
    pub(in super::super) fn make_wheel(path: &Path, members: &[(&str, &[u8])]) {
        let mut wheel = ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in members {
            wheel.start_file(*name, SimpleFileOptions::default()).unwrap();
            wheel.write_all(bytes).unwrap();
        }
        wheel.finish().unwrap();
    }

    async fn read(wheel: &Path, member: &str, size: u64) -> Result<Vec<u8>, SourceError> {
        let mut bytes = member_bytes(wheel.into(), member.into(), size, Arc::new(()));
        let mut all = Vec::new();
        while let Some(chunk) = bytes.next().await {
            all.extend_from_slice(&chunk?);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn exactly_the_named_member_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("a.whl");
        let content: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
        let hostile = ["../../outside", "/etc/outside", "a/../../m.gguf", "m.gguf/", "M.GGUF"];
        let mut members: Vec<(&str, &[u8])> = hostile.iter().map(|name| (*name, &b"evil"[..])).collect();
        members.insert(2, ("m.gguf", &content));
        make_wheel(&wheel, &members);

        assert_eq!(member_size(&wheel, "m.gguf", 1_000_000).unwrap(), 1_000_000);
        assert_eq!(read(&wheel, "m.gguf", 1_000_000).await.unwrap(), content);
        let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(names, ["a.whl"], "nothing was unpacked to the disk");

        let error = member_size(&wheel, "m.gguf", 999_999).unwrap_err().to_string();
        assert_eq!(error, "m.gguf unpacks to 1000000 bytes, more than the 999999 expected");
        let error = member_size(&wheel, "n.gguf", 10).unwrap_err().to_string();
        assert_eq!(error, "the wheel has no member n.gguf");
        let error = read(&wheel, "m.gguf", 500_000).await.unwrap_err().to_string();
        assert!(error.contains("more than the 500000 bytes"), "{error}");
    }

    #[tokio::test]
    async fn links_folders_and_damaged_wheels_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("a.whl");
        let mut writer = ZipWriter::new(File::create(&wheel).unwrap());
        writer.add_symlink("m.gguf", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        writer.add_directory("d.gguf/", SimpleFileOptions::default()).unwrap();
        writer.finish().unwrap();
        for member in ["m.gguf", "d.gguf/"] {
            let error = member_size(&wheel, member, 100).unwrap_err().to_string();
            assert!(error.contains("is not a plain file"), "{error}");
        }

        make_wheel(&wheel, &[("m.gguf", &[7; 5000])]);
        let mut bytes = std::fs::read(&wheel).unwrap();
        let size = bytes.len();
        bytes[40] ^= 0xff;
        std::fs::write(&wheel, &bytes).unwrap();
        let error = read(&wheel, "m.gguf", 5000).await.unwrap_err().to_string();
        assert!(error.starts_with("the wheel a.whl is damaged"), "{error}");
        std::fs::write(&wheel, &bytes[..size / 2]).unwrap();
        let error = member_size(&wheel, "m.gguf", 5000).unwrap_err().to_string();
        assert!(error.starts_with("the wheel a.whl is damaged"), "{error}");
    }
}
