use std::collections::HashMap;

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Layer {
    let map: HashMap<String, OsString> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
    Layer::from_environment(|name| map.get(name).cloned()).unwrap()
}

fn file_with(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("some.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let (_folder, path) =
        file_with("[http]\nlisten = \"127.0.0.1:1\"\ndrain_limit = \"3s\"\n[model]\nuse = \"none\"\n");
    let flags = |http: Option<&str>| Layer {
        http: http.map(str::to_owned),
        config: Some(path.clone()),
        state_dir: Some("/s".into()),
        ..Layer::default()
    };
    let http = |settings: &Settings| settings.http.to_string();

    let all =
        Settings::resolve(flags(Some("3")), environment(&[("INGLE_HTTP", "2"), ("INGLE_MODEL", "echo")])).unwrap();
    assert_eq!(http(&all), "127.0.0.1:3");
    assert_eq!(all.model, Some(ModelChoice::Echo), "environment over file");
    assert_eq!(all.drain_limit, Duration::from_secs(3), "file over default");
    assert_eq!(all.quic.to_string(), "[::]:11436", "default");

    let no_flag = Settings::resolve(flags(None), environment(&[("INGLE_HTTP", "2")])).unwrap();
    assert_eq!(http(&no_flag), "127.0.0.1:2");
    assert_eq!(no_flag.model, None);
    let empty_variable = Settings::resolve(flags(None), environment(&[("INGLE_HTTP", "")])).unwrap();
    assert_eq!(http(&empty_variable), "127.0.0.1:1");
}

#[test]
fn the_file_in_the_state_directory_is_found_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let flags = Layer { state_dir: Some(folder.path().to_owned()), ..Layer::default() };
    assert!(Settings::resolve(flags.clone(), Layer::default()).unwrap().mdns);
    let path = folder.path().join("ingle.toml");
    std::fs::write(&path, "[cluster]\nmdns = false\n").unwrap();
    assert!(!Settings::resolve(flags.clone(), Layer::default()).unwrap().mdns);
    std::fs::write(&path, "[node]\nstate_dir = \"/elsewhere\"\n").unwrap();
    assert!(Settings::resolve(flags, Layer::default()).unwrap_err().0.contains("remove `state_dir`"));
}

#[test]
fn paths_in_a_file_start_from_its_folder() {
    let (folder, path) = file_with("[model]\nuse = \"models/m.gguf\"\n[node]\nstate_dir = \"state\"\n");
    let flags = Layer { config: Some(path), ..Layer::default() };
    let settings = Settings::resolve(flags, Layer::default()).unwrap();
    assert_eq!(settings.model, Some(ModelChoice::File(folder.path().join("models/m.gguf"))));
    assert_eq!(settings.state_dir, folder.path().join("state"));
}

fn configs(folder: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs").join(folder);
    let mut found: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap()))
        .collect();
    found.sort();
    found
}

#[test]
fn every_shipped_config_parses_and_the_commented_one_says_all_defaults() {
    let shipped = configs("");
    assert!(shipped.len() >= 3, "{shipped:?}");
    for (path, text) in &shipped {
        let file = parse(path, text).unwrap();
        Settings::merge(Layer::default(), file, Path::new("/")).unwrap();
        if path.ends_with("ingle.toml") {
            let mut file = parse(path, text).unwrap();
            let parameters = std::mem::take(&mut file.model.parameters);
            assert_eq!(file, ConfigFile::default());
            assert_eq!(parameters.over(ModelParameters::default()).unwrap(), ModelParameters::default());
            let uncommented: String =
                text.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect::<Vec<_>>().join("\n");
            let all = parse(path, &uncommented).unwrap();
            assert!(all.node.name.is_some() && all.node.state_dir.is_some() && all.model.cache.is_some());
            let [endpoint] = all.endpoints.try_into().unwrap();
            let usual = EndpointPart::new(endpoint.url.clone());
            assert_eq!(
                (endpoint.first_token_timeout, endpoint.silence_timeout, endpoint.default),
                (usual.first_token_timeout, usual.silence_timeout, usual.default)
            );
        }
    }
}

/// The first line of each bad example says what its message must contain.
#[test]
fn every_bad_config_fails_with_a_message_that_names_the_trouble() {
    let bad = configs("invalid");
    assert!(bad.len() >= 6, "{bad:?}");
    for (path, text) in &bad {
        let expected = text.lines().next().and_then(|line| line.strip_prefix("# expect: ")).unwrap();
        let result = parse(path, text).and_then(|file| Settings::merge(Layer::default(), file, Path::new("/")));
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{}: {message}", path.display());
    }
}

#[test]
fn a_missing_named_file_is_named() {
    let flags = Layer { config: Some("/nowhere/x.toml".into()), ..Layer::default() };
    assert!(Settings::resolve(flags, Layer::default()).unwrap_err().0.contains("/nowhere/x.toml"));
}

#[test]
fn names_are_tidied_where_we_choose_and_refused_where_somebody_else_did() {
    for (host, name) in
        [("Max's MacBook.local", "max-s-macbook"), ("tower", "tower"), ("---", "node"), ("", "node"), ("Ünï", "n")]
    {
        assert_eq!(default_name(host), name, "{host}");
    }
    assert_eq!(default_name(&"x".repeat(100)).len(), LONGEST_NAME);
    assert_eq!(checked_name("mini-2".into()).unwrap(), "mini-2");
    assert!(checked_name("My Mac".into()).unwrap_err().0.contains("Perhaps `my-mac`?"));
}

#[test]
fn wrong_environment_variables_are_named() {
    for (name, value) in [("INGLE_MDNS", "maybe"), ("INGLE_LOG_FORMAT", "xml")] {
        let error = Layer::from_environment(|asked| (asked == name).then(|| value.into())).unwrap_err();
        assert!(error.0.contains(name) && error.0.contains(value), "{error}");
    }
}

#[test]
fn commands_to_copy_are_quoted_for_the_shell() {
    for (text, quoted) in [("/a/b-c", "/a/b-c"), ("/a b", "'/a b'"), ("it's", r"'it'\''s'"), ("$HOME", "'$HOME'")] {
        assert_eq!(shell_quoted(text), quoted);
    }
}
