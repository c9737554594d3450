//! Names: which texts can be one, and near ones for errors that say what was probably meant.

/// The longest name of a model, in bytes.
const LONGEST_MODEL: usize = 128;
/// The longest name of a node in bytes (what a DNS label holds).
const LONGEST_NODE: usize = 63;

/// A text that cannot name a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no name for a model: {why}")]
pub struct NameError {
    /// The text, cut to 100 characters.
    pub name: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// May a model be registered under this name? It stands in requests, tables and logs, so it has no spaces and nothing
/// that steers a terminal; and although it never becomes a path, nothing in it goes up in one.
pub fn check_model(name: &str) -> Result<(), NameError> {
    let wrong = |why| Err(NameError { name: name.chars().filter(|c| !c.is_control()).take(100).collect(), why });
    if name == "default" {
        return wrong("`default` always means the default model");
    }
    if !(1..=LONGEST_MODEL).contains(&name.len()) {
        return wrong("it must have 1 to 128 bytes");
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return wrong("it must begin with a letter or a digit");
    }
    if !name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/' | '@' | '+')) {
        return wrong("it may have letters, digits and `.`, `_`, `-`, `:`, `/`, `@`, `+`");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return wrong("a part between slashes is empty or dots");
    }
    Ok(())
}

/// Can a node be called that? Names of nodes go into certificates, mDNS and tables.
pub fn is_node(name: &str) -> bool {
    (1..=LONGEST_NODE).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The names closest to `wanted`, best first, at most three, none that is unlike it.
pub fn near<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = wanted.to_lowercase();
    let mut scored: Vec<(f64, &str)> = known
        .into_iter()
        .map(|name| {
            let lower = name.to_lowercase();
            // A name that contains the wanted one (or the other way round) is what people mean by short forms.
            let contained = !wanted.is_empty() && (lower.contains(&wanted) || wanted.contains(&lower));
            (if contained { 1.0 } else { strsim::jaro_winkler(&wanted, &lower) }, name)
        })
        .filter(|(score, _)| *score >= 0.7)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_plain_names() {
        for good in ["glm-4.7", "llama3.2:3b", "Qwen/Qwen3-4B", "0.5b", "a"] {
            assert_eq!(check_model(good), Ok(()), "{good}");
        }
        let long = "x".repeat(129);
        for bad in ["", "default", "..", "a/../b", "/etc/passwd", "a//b", "a b", "-x", "é", "a\u{1b}[2J", "a\n", &long]
        {
            let error = check_model(bad).unwrap_err().to_string();
            assert!(!error.contains(char::is_control), "{error:?}");
        }
        assert!(is_node("tower") && is_node("a.b_c-1") && !is_node("") && !is_node("a b") && !is_node(&long));
    }

    #[test]
    fn names_what_was_probably_meant_and_nothing_else() {
        let known = ["smollm2-135m-instruct", "qwen3-4b", "glm-4.7"];
        assert_eq!(near("smollm2", known), ["smollm2-135m-instruct"]);
        assert_eq!(near("qwen3-8b", known), ["qwen3-4b"]);
        assert_eq!(near("gpt-4o-mini-2024", ["zzz"]), Vec::<&str>::new());
        assert_eq!(near("", ["zzz"]), Vec::<&str>::new());
    }
}
