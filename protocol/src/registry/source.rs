//! Where a model's file comes from, as people write it. Whatever is written here names a place, never a path that is
//! built from parts of it: files are known by their hash.

use std::fmt;
use std::str::FromStr;

/// The longest source, in bytes.
pub const SOURCE_LIMIT: usize = 2_048;

/// Where to get a model's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `hf:OWNER/NAME[@REVISION]/FILE`: a file of a repository of the model hub.
    Hub {
        /// `owner/name`.
        repository: String,
        /// A commit, branch or tag.
        revision: Option<String>,
        /// The file's path there.
        file: String,
    },
    /// `pypi:PACKAGE[==VERSION][/FILE]`: a file in a Python package.
    Pypi {
        /// The package.
        package: String,
        /// Its version.
        version: Option<String>,
        /// The file's path in the wheel.
        member: Option<String>,
    },
    /// `file:/PATH`: a file of the machine that has it.
    File(String),
    /// `https://…`.
    Https(String),
}

/// A text that names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0}: a source is hf:OWNER/NAME/FILE (with @REVISION behind NAME), pypi:PACKAGE==VERSION/FILE, file:/PATH or an https URL"
)]
pub struct SourceError(String);

fn wrong<T>(why: impl Into<String>) -> Result<T, SourceError> {
    Err(SourceError(why.into()))
}

/// A word of a repository's, package's or revision's name.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(['.', '-'])
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+'))
}

/// A path within a repository or an archive, which stays within it.
fn is_inner_path(text: &str) -> bool {
    text.split('/').all(|part| {
        !matches!(part, "" | "." | "..")
            && !part.contains(['\\', '?', '#', '%', ':'])
            && !part.contains(char::is_control)
    })
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        if text.len() > SOURCE_LIMIT {
            return wrong(format!("the source is longer than {SOURCE_LIMIT} bytes"));
        }
        if text.contains(char::is_control) {
            return wrong("the source has a control character in it");
        }
        if text.starts_with("https://") {
            return https(text);
        }
        match text.split_once(':') {
            Some(("hf", rest)) => hub(rest),
            Some(("pypi", rest)) => pypi(rest),
            Some(("file", rest)) => file(rest.strip_prefix("//").unwrap_or(rest)),
            Some(("http", _)) => wrong("a model is not taken over plain http, where anybody on the way can change it"),
            Some((scheme, _)) if is_word(scheme) => wrong(format!("there is no kind of source `{scheme}:`")),
            _ => wrong("the source says not what kind it is"),
        }
    }
}

fn hub(rest: &str) -> Result<Source, SourceError> {
    let mut parts = rest.splitn(3, '/');
    let (Some(owner), Some(name), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
        return wrong("the hub needs an owner, a repository and a file");
    };
    let (name, revision) = name.split_once('@').map_or((name, None), |(name, revision)| (name, Some(revision)));
    if !is_word(owner) || !is_word(name) || revision.is_some_and(|revision| !is_word(revision)) {
        return wrong("owner, repository and revision are letters, digits and `.`, `_`, `-`");
    }
    if !is_inner_path(file) {
        return wrong("the file is a path within the repository, without `..`");
    }
    let revision = revision.map(str::to_owned);
    Ok(Source::Hub { repository: format!("{owner}/{name}"), revision, file: file.into() })
}

fn pypi(rest: &str) -> Result<Source, SourceError> {
    let (requirement, member) = rest.split_once('/').map_or((rest, None), |(r, member)| (r, Some(member)));
    let (package, version) = requirement.split_once("==").map_or((requirement, None), |(p, v)| (p, Some(v)));
    if !is_word(package) || version.is_some_and(|version| !is_word(version)) {
        return wrong("a package and its version are letters, digits and `.`, `_`, `-`");
    }
    if member.is_some_and(|member| !is_inner_path(member)) {
        return wrong("the file is a path within the package, without `..`");
    }
    Ok(Source::Pypi { package: package.into(), version: version.map(str::to_owned), member: member.map(str::to_owned) })
}

fn file(path: &str) -> Result<Source, SourceError> {
    if !path.starts_with('/') {
        return wrong("a file is given by its whole path, as in file:/home/me/model.gguf");
    }
    if path.split('/').any(|part| part == "..") {
        return wrong("the file's path goes up with `..`");
    }
    Ok(Source::File(path.into()))
}

fn https(url: &str) -> Result<Source, SourceError> {
    let authority = url["https://".len()..].split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return wrong("the URL has a user or a password in it, where everybody who looks at the model would see it");
    }
    if authority.is_empty() || url.contains([' ', '\\', '#']) {
        return wrong("that is no URL of a file");
    }
    Ok(Source::Https(url.into()))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repository, revision, file } => match revision {
                Some(revision) => write!(f, "hf:{repository}@{revision}/{file}"),
                None => write!(f, "hf:{repository}/{file}"),
            },
            Self::Pypi { package, version, member } => {
                write!(f, "pypi:{package}")?;
                version.iter().try_for_each(|version| write!(f, "=={version}"))?;
                member.iter().try_for_each(|member| write!(f, "/{member}"))
            }
            Self::File(path) => write!(f, "file:{path}"),
            Self::Https(url) => f.write_str(url),
        }
    }
}
