//! The store against a server of the hub's shape, with faults. What pip can do is in `pypi_tests.rs`.

use std::sync::Mutex;
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::super::catalog::SourceSpec;
use super::super::test_server::{Answer, Asked, TestServer};
use super::*;

const TAG: &str = "\"one\"";

fn content() -> Vec<u8> {
    (0..400_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn hub_model(revisions: &[&str]) -> CatalogModel {
    let spec = |revision: &&str| SourceSpec::Hub {
        repository: "owner/repo".into(),
        revision: (*revision).into(),
        file: "m.gguf".into(),
    };
    CatalogModel {
        name: "m".into(),
        digest: ModelDigest(Sha256::digest(content()).into()),
        size: Some(400_000),
        sources: revisions.iter().map(spec).collect(),
    }
}

fn store(dir: &Path, server: &TestServer) -> ModelStore {
    let millis = Duration::from_millis;
    let hub = server.url.clone();
    let settings = SourceSettings { hub, stall: millis(1000), pause: millis(10), ..SourceSettings::default() };
    ModelStore::open_with(dir, settings).unwrap()
}

async fn ensure(store: &ModelStore, model: &CatalogModel) -> Result<PathBuf, FetchError> {
    store.ensure(model, &|_| (), &CancellationToken::new()).await
}

/// The one failure that the model's sources ended in.
fn failure(result: Result<PathBuf, FetchError>) -> String {
    match result {
        Err(FetchError::NoSource { mut failures, .. }) if failures.len() == 1 => failures.remove(0),
        other => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path().extension().unwrap_or_default().to_string_lossy().into_owned())
        .filter(|name| !name.is_empty())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_file_is_fetched_once_checked_and_shown() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, _| Answer::file(asked, &content(), TAG)).await;
    let (store, model) = (store(&folder.path().join("new/folder"), &server), hub_model(&["v1"]));
    let states = Mutex::new(Vec::new());
    let path =
        store.ensure(&model, &|state| states.lock().unwrap().push(state), &CancellationToken::new()).await.unwrap();
    assert_eq!(path, store.path_of(&model.digest));
    assert_eq!(fs::read(&path).unwrap(), content());
    assert_eq!(names(store.dir()), ["gguf", "lock"]);
    let states = states.into_inner().unwrap();
    assert_eq!(states.first(), Some(&ModelState::Fetching { done: 0, total: 400_000 }));
    assert_eq!(
        states[states.len() - 2..],
        [ModelState::Fetching { done: 400_000, total: 400_000 }, ModelState::Verifying]
    );
    assert_eq!(server.asked()[0].path, "/owner/repo/resolve/v1/m.gguf");
    assert_eq!(server.asked().len(), 2);

    // Here it is: no source is asked and nothing is read.
    assert_eq!(ensure(&store, &model).await.unwrap(), path);
    assert_eq!(store.find_and_say(&model.digest, || panic!("read again")).await.unwrap(), Some(path));
    assert_eq!(server.asked().len(), 2);
}

#[tokio::test]
async fn a_cut_connection_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, number| {
        let whole = Answer::file(asked, &content(), TAG);
        // Request 0, 2 and 4 resolve; 1 and 3 are cut, one of them silently.
        match number {
            1 => Answer { cut: Some(150_000), ..whole },
            3 => Answer { stall: Some(100_000), ..whole },
            _ => whole,
        }
    })
    .await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["v1"]));
    let path = ensure(&store, &model).await.unwrap();
    assert_eq!(fs::read(path).unwrap(), content());
    let asked = server.asked();
    assert_eq!(asked.len(), 6);
    assert_eq!((asked[1].range, asked[1].if_range.as_deref()), (None, None));
    for (request, start) in [(3, 150_000), (5, 250_000)] {
        let request = &asked[request];
        assert_eq!((request.range, request.if_range.as_deref()), (Some((start, 399_999)), Some(TAG)));
    }
}

#[tokio::test]
async fn what_a_cancelled_fetch_left_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, number| {
        let whole = Answer::file(asked, &content(), TAG);
        if number == 1 { Answer { stall: Some(200_000), ..whole } } else { whole }
    })
    .await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["v1"]));
    let cancel = CancellationToken::new();
    let progress = |state| {
        if matches!(state, ModelState::Fetching { done: 10_000.., .. }) {
            cancel.cancel();
        }
    };
    let error = store.ensure(&model, &progress, &cancel).await.unwrap_err();
    assert!(matches!(error, FetchError::Cancelled { .. }), "{error}");
    ensure(&store, &model).await.unwrap();
    assert!(server.asked()[3].range.unwrap().0 > 0, "{:?}", server.asked());
}

#[tokio::test]
async fn another_content_under_the_same_address_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    // The tag changes after the cut, so the server answers the range with the whole file.
    let server = TestServer::start(|asked, number| {
        let whole = Answer::file(asked, &content(), if number < 3 { TAG } else { "\"two\"" });
        if number == 1 { Answer { cut: Some(150_000), ..whole } } else { whole }
    })
    .await;
    ensure(&store(folder.path(), &server), &hub_model(&["v1"])).await.unwrap();
    assert_eq!(server.asked()[3].range.unwrap().0, 150_000);

    // A weak tag promises nothing: the second attempt asks for everything.
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, number| {
        let whole = Answer::file(asked, &content(), "W/\"one\"");
        if number == 1 { Answer { cut: Some(150_000), ..whole } } else { whole }
    })
    .await;
    ensure(&store(folder.path(), &server), &hub_model(&["v1"])).await.unwrap();
    assert_eq!(server.asked()[3].range, None);
}

#[tokio::test]
async fn a_damaged_partial_file_is_moved_aside_and_fetched_anew() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, _| Answer::file(asked, &content(), TAG)).await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["v1"]));
    let part = Part::new(store.dir(), &model.digest);
    fs::write(&part.path, vec![0; 5000]).unwrap();
    let source = model.sources[0].to_string();
    part.set_note(Some(&super::super::part::Note { source, tag: TAG.into(), size: 400_000 })).unwrap();
    ensure(&store, &model).await.unwrap();
    assert_eq!(server.asked()[1].range.unwrap().0, 5000);
    assert_eq!(server.asked()[3].range, None);
    assert_eq!(names(store.dir()), ["corrupt", "gguf", "lock"]);
}

#[tokio::test]
async fn altered_bytes_are_refused_named_and_the_next_source_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, _| {
        let mut content = content();
        if asked.path.contains("bad") {
            content[399_999] ^= 1;
        }
        Answer::file(asked, &content, TAG)
    })
    .await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["bad"]));
    let line = failure(ensure(&store, &model).await);
    let moved = store.corrupt_path(&model.digest);
    assert!(line.contains(&model.digest.to_string()) && line.contains(moved.to_str().unwrap()), "{line}");
    assert_eq!(names(store.dir()), ["corrupt", "lock"]);
    ensure(&store, &hub_model(&["bad", "good"])).await.unwrap();
}

#[tokio::test]
async fn a_file_that_was_changed_where_it_is_kept_is_fetched_again() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, _| Answer::file(asked, &content(), TAG)).await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["v1"]));
    let path = ensure(&store, &model).await.unwrap();
    for damaged in [&content()[..399_999], &[0; 400_000]] {
        fs::write(&path, damaged).unwrap();
        let error = store.find(&model.digest).await.unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("altered"), "{error}");
        ensure(&store, &model).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), content());
        assert_eq!(fs::read(store.corrupt_path(&model.digest)).unwrap(), damaged);
    }
    let line = {
        fs::write(&path, b"short").unwrap();
        let gone = hub_model(&[]);
        failure(ensure(&store, &gone).await)
    };
    assert!(line.starts_with("the file that was here: ") && line.contains("moved to"), "{line}");
}

#[tokio::test]
async fn each_fault_of_a_server_is_a_line_that_names_it() {
    fn whole(asked: &Asked) -> Answer {
        Answer::file(asked, &content(), TAG)
    }
    type Fault = fn(&Asked, usize) -> Answer;
    let faults: [(&str, Fault, &str); 15] = [
        ("missing", |_, _| Answer::new(404), "has no such file (404): http://127.0.0.1"),
        ("forbidden", |_, _| Answer::new(403), "answered 403"),
        ("overloaded", |_, _| Answer::new(503), "cannot be reached: http"),
        ("another size", |asked, _| Answer::file(asked, &[1; 1000], TAG), "has a file of 1000 bytes where 400000"),
        (
            "another size without ranges",
            |_, _| Answer { body: vec![1; 1000], ..Answer::new(200) },
            "has a file of 1000 bytes where 400000",
        ),
        (
            "a length that is not the promised one",
            |asked, n| if n == 0 { whole(asked) } else { Answer { claims: Some(400_001), ..whole(asked) } },
            "has a file of 400001 bytes",
        ),
        (
            "a wrong range",
            |_, n| Answer {
                headers: vec![("Content-Range", if n == 0 { "bytes 0-0/400000" } else { "bytes 7-8/400000" }.into())],
                ..Answer::new(206)
            },
            "answered with bytes 7-8 of 400000 where 0-399999",
        ),
        ("no range", |_, _| Answer::new(206), "with a Content-Range of \"\""),
        (
            "a redirect to plain text",
            |_, _| Answer { headers: vec![("Location", "http://hub.example/m".into())], ..Answer::new(302) },
            "redirected to http://hub.example, which is not https",
        ),
        (
            "a redirect into the household",
            |_, _| Answer { headers: vec![("Location", "https://192.168.1.1/m".into())], ..Answer::new(302) },
            "redirected: 192.168.1.1 is an address of a private",
        ),
        (
            "a redirect to a name that leads there",
            |_, _| Answer { headers: vec![("Location", "https://localhost:9/m".into())], ..Answer::new(302) },
            "an address of this machine itself: refused, because nobody here named it",
        ),
        (
            "a byte now and then",
            |asked, n| {
                if n == 0 { whole(asked) } else { Answer { drip: Some(Duration::from_millis(50)), ..whole(asked) } }
            },
            "is too slow: ",
        ),
        (
            "a redirect to a file",
            |_, _| Answer { headers: vec![("Location", "file:///etc/passwd".into())], ..Answer::new(302) },
            "answered 302",
        ),
        (
            "redirects without end",
            |_, _| Answer { headers: vec![("Location", "/again".into())], ..Answer::new(302) },
            "redirected more than 5 times",
        ),
        (
            "silence",
            |asked, n| if n % 2 == 0 { whole(asked) } else { Answer { stall: Some(0), ..whole(asked) } },
            "nothing came for 1 s",
        ),
    ];
    for (what, fault, words) in faults {
        let folder = tempfile::tempdir().unwrap();
        let server = TestServer::start(fault).await;
        let begin = Instant::now();
        let line = failure(ensure(&store(folder.path(), &server), &hub_model(&["v1"])).await);
        assert!(line.starts_with("model hub, owner/repo: ") && line.contains(words), "{what}: {line}");
        assert!(!line.contains('\n'), "{what}: {line}");
        assert!(begin.elapsed() < Duration::from_secs(15), "{what}: {:?}", begin.elapsed());
        assert!(!names(folder.path()).contains(&"gguf".to_owned()), "{what}");
    }
}

#[tokio::test]
async fn a_file_at_an_address_of_its_own_is_fetched_and_no_secret_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let server =
        TestServer::start(|asked, n| if n == 0 { Answer::new(403) } else { Answer::file(asked, &content(), TAG) })
            .await;
    let url = format!("{}/m.gguf?key=secret", server.url.replace("http://", "http://user:pw@"));
    let model = CatalogModel { sources: vec![SourceSpec::Https { url }], ..hub_model(&[]) };
    let store = store(folder.path(), &server);
    let line = failure(ensure(&store, &model).await);
    assert!(line.contains("answered 403") && !line.contains("secret") && !line.contains("pw"), "{line}");
    ensure(&store, &model).await.unwrap();
    // A name of the public Internet that leads to an address here is not what somebody typed.
    let url = "https://10.0.0.1.example.invalid/m".into();
    let model =
        CatalogModel { sources: vec![SourceSpec::Https { url }], digest: ModelDigest([1; 32]), ..hub_model(&[]) };
    assert!(failure(ensure(&store, &model).await).contains("cannot be reached"));
}

#[tokio::test]
async fn a_redirect_within_the_machine_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, _| {
        if asked.path.starts_with("/cdn") {
            return Answer::file(asked, &content(), TAG);
        }
        Answer { headers: vec![("Location", "/cdn/m".into())], ..Answer::new(302) }
    })
    .await;
    ensure(&store(folder.path(), &server), &hub_model(&["v1"])).await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_said_within_seconds_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let settings = |hub: &str| SourceSettings { hub: hub.into(), ..SourceSettings::default() };
    let begin = Instant::now();
    for (hub, words) in [
        ("http://127.0.0.1:1", "cannot be reached: 127.0.0.1: cannot connect"),
        ("https://no-such-host.invalid", "cannot be reached: no-such-host.invalid"),
        ("http://no-such-host.invalid", "must begin with https://"),
        ("nonsense", "is no URL"),
    ] {
        let store = ModelStore::open_with(folder.path(), settings(hub)).unwrap();
        let error = ensure(&store, &hub_model(&["v1"])).await.unwrap_err().to_string();
        assert!(error.starts_with("The model m could not be fetched:\n  - model hub, owner/repo: "), "{error}");
        assert!(error.contains(words) && error.ends_with("with --model /path/file.gguf."), "{error}");
    }
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn of_two_nodes_of_a_machine_one_fetches() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|asked, number| {
        let whole = Answer::file(asked, &content(), TAG);
        if number == 1 { Answer { stall: Some(100_000), ..whole } } else { whole }
    })
    .await;
    let (one, other, model) = (store(folder.path(), &server), store(folder.path(), &server), hub_model(&["v1"]));
    let waited = Mutex::new(Vec::new());
    let second = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        other.ensure(&model, &|state| waited.lock().unwrap().push(state), &CancellationToken::new()).await
    };
    let (first, second) = tokio::join!(ensure(&one, &model), second);
    assert_eq!(first.unwrap(), second.unwrap());
    assert_eq!(server.asked().len(), 4, "the stalled fetch and its end, once");
    let waited = waited.into_inner().unwrap();
    assert!(waited.iter().any(|s| matches!(s, ModelState::Fetching { done: 100_000, .. })), "{waited:?}");
}

#[tokio::test]
async fn waiting_for_another_node_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|_, _| Answer::new(404)).await;
    let (store, model) = (store(folder.path(), &server), hub_model(&["v1"]));
    let _held = FileLock::try_acquire(&store.dir().join(format!("{}.lock", model.digest))).unwrap();
    let cancel = CancellationToken::new();
    let error = store.ensure(&model, &|_| cancel.cancel(), &cancel).await.unwrap_err();
    assert!(matches!(error, FetchError::Cancelled { .. }), "{error}");
}

#[tokio::test]
async fn too_little_disk_is_said_before_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let server = TestServer::start(|_, _| Answer::new(404)).await;
    let store = store(folder.path(), &server);
    let model = CatalogModel { size: Some(u64::MAX), ..hub_model(&["v1"]) };
    let error = ensure(&store, &model).await.unwrap_err();
    let FetchError::NoSpace { needed, available, .. } = &error else { panic!("{error}") };
    assert!(*needed == u64::MAX && *available > 0);
    assert!(error.to_string().contains(&format!("{available} are available")), "{error}");
    assert!(server.asked().is_empty());
}

/// A file system of 1 MB, where this user may make one.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path());
        mount.output().ok()?.status.success().then_some(Self(folder))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test]
async fn a_disk_that_becomes_full_on_the_way_is_said_and_cleaned() {
    // Where no file system can be mounted, `part.rs` still proves the writer against a full device.
    let Some(disk) = SmallDisk::mount() else { return };
    let filler = disk.0.path().join("filler");
    // There is room when it is checked, and somebody else takes it before the bytes come.
    let server = TestServer::start(move |asked, number| {
        if number == 1 {
            let _ = fs::write(&filler, vec![1; 900_000]);
        }
        Answer::file(asked, &content(), TAG)
    })
    .await;
    let store = store(&disk.0.path().join("models"), &server);
    let error = ensure(&store, &hub_model(&["v1"])).await.unwrap_err();
    assert!(matches!(error, FetchError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("became full while the model m was fetched"), "{error}");
    assert_eq!(names(store.dir()), ["lock"]);
}

#[test]
fn a_folder_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    for dir in [file.clone(), file.join("below")] {
        let error = ModelStore::open(&dir).unwrap_err().to_string();
        assert!(error.contains(dir.to_str().unwrap()) && error.contains("Choose another one"), "{error}");
    }
}
