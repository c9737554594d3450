//! What people type about the household's models.

use serde_json::{Value, json};

use super::{DEADLINE, FarServer, Machine, until_or};

/// A question to a model of this name that says what shall happen (see `far`).
pub fn to(model: &str, what: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": what}]})
}

impl Machine {
    /// `ingle models …` that must go well, with `--json`: what it printed.
    pub async fn models(&self, arguments: &[&str]) -> Value {
        let ran = self.ingle(&[&["models"], arguments, &["--json"]].concat()).await;
        serde_json::from_str(&ran.ok()).unwrap()
    }

    /// `ingle models add` of a far server.
    pub async fn add_endpoint(&self, name: &str, server: &FarServer, more: &[&str]) -> Value {
        self.models(&[&["add", "--name", name, "--endpoint", &server.url()], more].concat()).await
    }

    /// The model as `ingle models ls` has it; null where it has none.
    pub async fn model_named(&self, name: &str) -> Value {
        let all = self.models(&["ls"]).await;
        all.as_array().unwrap().iter().find(|model| model["name"] == name).cloned().unwrap_or_default()
    }

    /// Names of all registered models, in order.
    pub async fn registered(&self) -> Vec<String> {
        let all = self.models(&["ls"]).await;
        let registered = all.as_array().unwrap().iter().filter(|model| model["registered"] == true);
        let mut names: Vec<String> = registered.map(|model| model["name"].as_str().unwrap().to_owned()).collect();
        names.sort_unstable();
        names
    }

    /// Waits until it knows exactly these registered models.
    pub async fn until_registered(&self, names: &[&str]) {
        let mut last = Vec::new();
        let found = until_or(DEADLINE, &mut async || {
            last = self.registered().await;
            (last == names).then_some(())
        })
        .await;
        assert!(found.is_some(), "{} knows {last:?} and not {names:?}", self.name);
    }

    /// Waits until the model is as expected in `ingle models ls`.
    pub async fn until_model(&self, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let found = until_or(DEADLINE, &mut async || {
            last = self.model_named(name).await;
            is_so(&last).then(|| last.clone())
        })
        .await;
        found.unwrap_or_else(|| panic!("{}: waited {DEADLINE:?} in vain: {what}\n{last:#}", self.name))
    }
}
