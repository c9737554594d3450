//! Endpoints out of flags and file, with their keys out of the environment.

use std::collections::HashSet;
use std::ffi::OsString;
use std::time::Duration;

use ingle_actors::worker::EndpointOptions;
use ingle_actors::worker::endpoint::Secret;

use super::file::EndpointPart;
use crate::exit::UsageError;

/// The longest name of a model, in bytes.
const LONGEST_NAME: usize = 256;
const MOST_ENDPOINTS: usize = 64;
const MOST_SLOTS: u32 = 4_096;

/// Flags: URL, model and key variable.
pub type Flags = (Option<String>, Option<String>, Option<String>);

/// Which endpoints there are, checked but for their keys, which only a node that starts needs. A URL among the flags
/// stands instead of the file's endpoints.
pub fn choose(flags: Flags, file: Vec<EndpointPart>) -> Result<Vec<EndpointPart>, UsageError> {
    let parts = match flags {
        (Some(url), model, api_key_env) => vec![EndpointPart { model, api_key_env, ..EndpointPart::new(url) }],
        (None, None, None) => file,
        (None, _, _) => {
            return Err(UsageError("--endpoint-model and --endpoint-key-env say something of --endpoint only.".into()));
        }
    };
    if parts.len() > MOST_ENDPOINTS {
        return Err(UsageError(format!("{} endpoints: at most {MOST_ENDPOINTS} are possible.", parts.len())));
    }
    options(&parts, |_| Some("a key".into()))?;
    let mut seen = HashSet::new();
    match parts.iter().find(|part| part.name.is_some() && !seen.insert((&part.name, &part.url))) {
        Some(twice) => Err(UsageError(format!(
            "The endpoint `{}` stands there twice with one address.",
            twice.name.as_deref().unwrap_or_default()
        ))),
        None => Ok(parts),
    }
}

/// The endpoints with their keys. `get` reads the environment.
pub fn options(
    parts: &[EndpointPart],
    get: impl Fn(&str) -> Option<OsString>,
) -> Result<Vec<EndpointOptions>, UsageError> {
    let numbered = parts.iter().cloned().zip(1..);
    numbered.map(|(part, n)| one(part, &get).map_err(|why| UsageError(format!("Endpoint {n}: {why}.")))).collect()
}

fn one(part: EndpointPart, get: impl Fn(&str) -> Option<OsString>) -> Result<EndpointOptions, String> {
    let EndpointPart { url, model, name, api_key_env, slots, sha256, default, first_token_timeout, silence_timeout } =
        part;
    let sha256 = sha256.map(|text| text.parse().map_err(|_| "sha256 must be 64 digits of lower-case hex".to_owned()));
    let sha256 = sha256.transpose()?;
    for (what, text) in [("model", &model), ("name", &name)] {
        match text {
            Some(text) if text.trim().is_empty() => return Err(format!("the {what} is empty")),
            Some(text) if text.len() > LONGEST_NAME => {
                return Err(format!("the {what} is longer than {LONGEST_NAME} bytes"));
            }
            _ => {}
        }
    }
    if name.as_deref() == Some(ingle_actors::gateway::DEFAULT_MODEL) {
        return Err("`default` always means the default model: choose another name".into());
    }
    if slots.is_some_and(|slots| !(1..=MOST_SLOTS).contains(&slots)) {
        return Err(format!("slots must be from 1 to {MOST_SLOTS}"));
    }
    for (what, time) in [("first_token_timeout", first_token_timeout), ("silence_timeout", silence_timeout)] {
        if !(Duration::from_secs(1)..=super::LONGEST_TIME).contains(&time) {
            return Err(format!("{what} must be from a second to seven days"));
        }
    }
    let key = match api_key_env {
        None => None,
        Some(variable) => match get(&variable).map(OsString::into_string) {
            Some(Ok(key)) if !key.trim().is_empty() => Some(Secret::new(&key)),
            Some(Ok(_)) => return Err(format!("the environment variable {variable} is empty")),
            Some(Err(_)) => return Err(format!("the environment variable {variable} is not UTF-8")),
            None => return Err(format!("there is no environment variable {variable} with its key")),
        },
    };
    let url = url.parse().map_err(|error| format!("its address cannot be used: {error}"))?;
    let (is_default, embeds) = (default, false);
    Ok(EndpointOptions {
        url,
        model,
        name,
        key,
        slots,
        is_default,
        embeds,
        first_token_timeout,
        silence_timeout,
        sha256,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(toml: &str) -> Vec<EndpointPart> {
        toml::from_str::<super::super::ConfigFile>(toml).unwrap().endpoints
    }

    fn environment(name: &str) -> Option<OsString> {
        (name == "FAR_KEY").then(|| "sk-1\n".into())
    }

    #[test]
    fn endpoints_come_from_the_file_or_the_flags() {
        let file = "[[endpoints]]\nurl = \"http://a:1/v1\"\nname = \"big\"\napi_key_env = \"FAR_KEY\"\nslots = 4\n\
                    default = true\nsilence_timeout = \"9s\"\n[[endpoints]]\nurl = \"http://b:1\"\nmodel = \"m\"\n";
        let chosen = |flags| choose(flags, parts(file)).unwrap();
        let both = options(&chosen((None, None, None)), environment).unwrap();
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].url.to_string(), "http://a:1");
        assert_eq!((both[0].name.as_deref(), both[0].slots, both[0].is_default), (Some("big"), Some(4), true));
        assert_eq!(both[0].key, Some(Secret::new("sk-1")));
        assert_eq!(both[0].silence_timeout, Duration::from_secs(9));
        assert_eq!(both[1].first_token_timeout, EndpointOptions::FIRST_TOKEN_TIMEOUT);
        assert!(!format!("{both:?}").contains("sk-1"));
        let flags = (Some("http://c:1".into()), Some("x".into()), None);
        let [one] = options(&chosen(flags), environment).unwrap().try_into().unwrap();
        assert_eq!((one.url.to_string().as_str(), one.model.as_deref()), ("http://c:1", Some("x")));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let wrong = |toml: &str| choose((None, None, None), parts(toml)).unwrap_err().0;
        for (line, expected) in [
            ("url = \"box:80\"", "http or https"),
            ("url = \"http://me:pw@box\"", "password"),
            ("url = \"http://a\"\nslots = 0", "slots"),
            ("url = \"http://a\"\nsha256 = \"AB\"", "lower-case hex"),
            ("url = \"http://a\"\nname = \"\"", "empty"),
            ("url = \"http://a\"\nname = \"default\"", "another name"),
            ("url = \"http://a\"\nsilence_timeout = \"0s\"", "a second"),
            ("url = \"http://a\"\nname = \"x\"\n[[endpoints]]\nurl = \"http://a\"\nname = \"x\"", "twice"),
        ] {
            let error = wrong(&format!("[[endpoints]]\n{line}\n"));
            assert!(error.contains(expected) && !error.contains(":pw@"), "{line}: {error}");
        }
        let flags = (None, Some("x".into()), None);
        assert!(choose(flags, vec![]).unwrap_err().0.contains("--endpoint only"));
        // A missing key is the trouble of whoever starts the node, not of `ingle status`.
        let keyless = choose((Some("http://a".into()), None, Some("NO_KEY".into())), vec![]).unwrap();
        assert!(options(&keyless, environment).unwrap_err().0.contains("NO_KEY"));
    }
}
