//! The model files of this machine, read anew, and a question to each model that runs here.

use std::time::Duration;

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Embed, EmbedInput, Message, ModelState, Priority, Request, Role, Sampling, TraceContext,
};
use ingle_protocol::{NodeId, RequestId};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::Node;
use crate::models::{ModelStore, VerifiedFile, VerifyError, default_model};
use crate::worker::manager::SeenModel;

/// How long the model may take for its one token.
const PROBE_DEADLINE: Duration = Duration::from_secs(60);

/// What came of a verification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// Each file.
    pub files: Vec<VerifiedFile>,
    /// What each model that runs here and was meant did when it was asked for one token.
    pub probes: Vec<Probe>,
}

/// A question to a running model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The model.
    pub model: String,
    /// Why it gave no token.
    pub failed: Option<String>,
}

impl Node {
    /// Reads the model files of `name` (all without one) anew; what is damaged is set aside and fetched again, from
    /// other machines where they have it. Each model that is loaded here and meant answers with one token.
    pub async fn verify_models(
        &self,
        name: Option<&str>,
        say: &(dyn Fn(&str, u64, u64) + Send + Sync),
    ) -> Result<Verification, String> {
        let store = ModelStore::open(&self.options.model_cache).map_err(|error| error.to_string())?;
        let store = store.with_limit(self.options.model_cache_limit).with_holders(self.holders.clone());
        let own = self.models.own().map(|model| model.name());
        let seen = self.models.states();
        let is_meant = |model: &SeenModel| match name {
            None => true,
            Some("default") => own.as_deref() == Some(model.name.as_str()),
            Some(name) => model.name == name || model.digest.as_deref() == Some(name),
        };
        let meant: Vec<&SeenModel> = seen.iter().filter(|model| is_meant(model)).collect();
        // Files are known by what they hold, and models by the names that they were given here.
        let digest = meant.iter().find_map(|model| model.digest.clone()).filter(|_| name.is_some());
        let (asked, known) = (digest.as_deref().or(name), self.models.sources());
        let files = match store.verify(asked, &known, say, &CancellationToken::new()).await {
            Ok(files) => files,
            // A model that runs from a file of its own has none in the store.
            Err(VerifyError::Unknown { .. }) if meant.iter().any(|model| model.name != default_model().name) => {
                Vec::new()
            }
            Err(error) => return Err(error.to_string()),
        };
        let mut probes = Vec::new();
        for model in &meant {
            // What nobody has loaded need not answer; this node's own model should.
            if model.state == ModelState::Ready.words() || own.as_deref() == Some(model.name.as_str()) {
                probes.extend(self.probe(&model.name).await);
            }
        }
        Ok(Verification { files, probes })
    }

    async fn probe(&self, name: &str) -> Option<Probe> {
        let facts = self.workers.facts(NodeId::default()).into_iter().filter(|facts| facts.name == name);
        // Of two versions the one that takes requests.
        let facts = facts.min_by_key(|facts| facts.state != ModelState::Ready)?;
        let failed = match (&facts.state, facts.digest) {
            (ModelState::Ready, Some(digest)) => {
                let hello = Embed { inputs: vec![EmbedInput::Text("Hello".into())], dimensions: None };
                let message = Message { role: Role::User, content: "Hello".into(), extra: vec![] };
                let request = Request {
                    request_id: RequestId(rand::random()),
                    attempt: 0,
                    trace: TraceContext::default(),
                    principal: "local".into(),
                    priority: Priority::Interactive,
                    remaining_ms: PROBE_DEADLINE.as_millis() as u64,
                    model: facts.name.clone(),
                    digest,
                    messages: vec![message],
                    sampling: Sampling { temperature: 0.0, max_tokens: Some(1), ..Sampling::default() },
                    embed: facts.embeds().then_some(hello),
                    resume: vec![],
                    resume_text: vec![],
                    extra: vec![],
                };
                let asking = async {
                    let mut answers = self.workers.submit(request).await;
                    while let Some(answer) = answers.recv().await {
                        match answer {
                            Answer::Token(_) | Answer::Embedding(_) => return None,
                            Answer::Refused(refused) => return Some(refused.message),
                            Answer::Failed(failed) => return Some(failed.message),
                            // An answer may be over with its first token.
                            Answer::Finished(_) => return None,
                            Answer::Accepted(_) | Answer::Progress(_) => {}
                        }
                    }
                    Some("the answer broke off".into())
                };
                let late = || Some(format!("no token within {} s", PROBE_DEADLINE.as_secs()));
                tokio::time::timeout(PROBE_DEADLINE, asking).await.unwrap_or_else(|_| late())
            }
            (state, _) => Some(format!("it does not run now: {}", state.words())),
        };
        Some(Probe { model: facts.name, failed })
    }
}
