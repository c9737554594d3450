//! Near names, for errors that say what was probably meant.

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
    fn names_what_was_probably_meant_and_nothing_else() {
        let known = ["smollm2-135m-instruct", "qwen3-4b", "glm-4.7"];
        assert_eq!(near("smollm2", known), ["smollm2-135m-instruct"]);
        assert_eq!(near("qwen3-8b", known), ["qwen3-4b"]);
        assert_eq!(near("gpt-4o-mini-2024", ["zzz"]), Vec::<&str>::new());
        assert_eq!(near("", ["zzz"]), Vec::<&str>::new());
    }
}
