//! What is registered as a model's source, as a node loads it.

use ingle_protocol::ModelDigest;
use ingle_protocol::registry::Source;

use super::catalog::{CatalogModel, FirstModel, SourceSpec};
use crate::node::ModelChoice;

/// A branch of the model hub that moves.
const NEWEST: &str = "main";

/// What this machine loads for a registered model. A path is opened where it was registered (`is_ours`) and nowhere
/// else: nobody makes another machine read, and give away, a file of its own. Others take the content from whoever has
/// it, once its hash is known.
pub(crate) fn choice_of(
    name: &str,
    source: &Source,
    sha256: Option<ModelDigest>,
    is_ours: bool,
) -> Result<ModelChoice, String> {
    let known = |digest, sources| ModelChoice::Source(CatalogModel { name: name.into(), digest, size: None, sources });
    let spec = match (source, sha256) {
        (Source::File(path), None) if is_ours => return Ok(ModelChoice::File(path.into())),
        (Source::File(path), Some(digest)) if is_ours => {
            return Ok(ModelChoice::LocalFile { path: path.into(), digest });
        }
        (Source::File(_), Some(digest)) => return Ok(known(digest, vec![])),
        (Source::File(path), None) => {
            return Err(format!(
                "{path} is a file of the machine where it was registered, and its hash is not known yet"
            ));
        }
        (Source::Hub { repository, revision, file }, _) => SourceSpec::Hub {
            repository: repository.clone(),
            revision: revision.clone().unwrap_or_else(|| NEWEST.into()),
            file: file.clone(),
        },
        (Source::Pypi { package, version, member }, _) => SourceSpec::Pypi {
            package: package.clone(),
            version: version.clone().unwrap_or_default(),
            member: member.clone().unwrap_or_default(),
        },
        (Source::Https(url), _) => SourceSpec::Https { url: url.clone() },
    };
    Ok(match sha256 {
        Some(digest) => known(digest, vec![spec]),
        None => ModelChoice::First(FirstModel { name: name.into(), source: spec }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_without_a_hash_is_fetched_for_the_first_time_and_a_path_is_opened_where_it_was_registered() {
        let choice = |text: &str, sha256, is_ours| choice_of("m", &text.parse().unwrap(), sha256, is_ours);
        let digest = ModelDigest([7; 32]);
        let hub = SourceSpec::Hub { repository: "a/b".into(), revision: "main".into(), file: "c.gguf".into() };
        let first = ModelChoice::First(FirstModel { name: "m".into(), source: hub.clone() });
        assert_eq!(choice("hf:a/b/c.gguf", None, false).unwrap(), first);
        let known = |sources| ModelChoice::Source(CatalogModel { name: "m".into(), digest, size: None, sources });
        assert_eq!(choice("hf:a/b/c.gguf", Some(digest), false).unwrap(), known(vec![hub]));
        assert!(choice("file:/etc/passwd", None, false).unwrap_err().contains("where it was registered"));
        assert_eq!(choice("file:/m.gguf", Some(digest), false).unwrap(), known(vec![]));
        assert_eq!(choice("file:/m.gguf", None, true).unwrap(), ModelChoice::File("/m.gguf".into()));
        let ours = ModelChoice::LocalFile { path: "/m.gguf".into(), digest };
        assert_eq!(choice("file:/m.gguf", Some(digest), true).unwrap(), ours);
    }
}
