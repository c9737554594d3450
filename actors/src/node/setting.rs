//! Parameters of this node's model, shown and set, with a node that runs or without.

use std::path::Path;
use std::sync::Arc;

use super::state_dir::open_state_dir;
use super::{
    GivenParameters, Layers, ModelChoice, Node, Outcome, ParameterChanges, ParameterFile, ShownParameters, StartError,
};
use crate::gateway::DEFAULT_MODEL;
use crate::worker::{ChangeRequest, ModelWorker, Said, model_name_of};

/// What the file and the commands say of a model.
fn layers(state_dir: &Path, choice: &ModelChoice, config: &GivenParameters) -> Result<Layers, StartError> {
    let set = ParameterFile::of(state_dir).load(&model_name_of(choice));
    let set = set.map_err(|error| StartError::Other(error.to_string()))?;
    Ok(Layers { config: config.clone(), set })
}

impl Node {
    fn model_named(&self, asked: &str) -> Result<Arc<ModelWorker>, String> {
        if asked != DEFAULT_MODEL
            && let Some(model) = self.models.get(asked)
        {
            return Ok(model);
        }
        let model = self.models.own().ok_or_else(|| no_model(asked))?;
        check_name(asked, &model.name())?;
        Ok(model)
    }

    /// The parameters of one of this node's models; `default` means the configuration's.
    pub fn parameters(&self, model: &str) -> Result<ShownParameters, String> {
        Ok(self.model_named(model)?.parameters())
    }

    /// Changes parameters of one of this node's models; returns when they hold. An error says why everything is as it
    /// was.
    pub async fn set_parameters(&self, model: &str, request: ChangeRequest, said: Said) -> Result<Outcome, String> {
        if !self.is_accepting() {
            return Err("this node is shutting down".into());
        }
        self.model_named(model)?.set_parameters(request, said).await
    }
}

fn no_model(asked: &str) -> String {
    format!("this node runs no model, so there is no `{asked}` to set: type it on the machine that runs it")
}

fn check_name(asked: &str, own: &str) -> Result<(), String> {
    if asked == own || asked == DEFAULT_MODEL {
        return Ok(());
    }
    Err(format!("this node runs `{own}`, not `{asked}`: type it on the machine that runs that model"))
}

/// The parameters of the model that the node of a state directory would run.
pub fn show_offline(
    state_dir: &Path,
    choice: Option<&ModelChoice>,
    config: &GivenParameters,
    asked: &str,
) -> Result<ShownParameters, StartError> {
    let choice = choice.ok_or_else(|| StartError::Other(no_model(asked)))?;
    let model = model_name_of(choice);
    check_name(asked, &model).map_err(StartError::Other)?;
    let layers = layers(state_dir, choice, config)?;
    let values = layers.resolve().map_err(|error| StartError::Other(error.to_string()))?;
    Ok(ShownParameters { model, parameters: layers.shown(&values) })
}

/// Sets parameters of that model, for the node's next start.
pub fn set_offline(
    state_dir: &Path,
    choice: Option<&ModelChoice>,
    config: &GivenParameters,
    asked: &str,
    changes: &ParameterChanges,
) -> Result<(), StartError> {
    let choice = choice.ok_or_else(|| StartError::Other(no_model(asked)))?;
    let model = model_name_of(choice);
    check_name(asked, &model).map_err(StartError::Other)?;
    let _lock = open_state_dir(state_dir)?;
    let mut layers = layers(state_dir, choice, config)?;
    layers.set = layers.set.with(changes);
    layers.resolve().map_err(|error| StartError::Other(error.to_string()))?;
    ParameterFile::of(state_dir).store(&model, &layers.set).map_err(|error| StartError::Other(error.to_string()))
}
