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

    /// Changes parameters of this node's own model or of a registered one; returns when they hold here, or are known
    /// to the cluster where another node runs it. An error says why everything is as it was.
    pub async fn set_parameters(&self, model: &str, request: ChangeRequest, said: Said) -> Result<Outcome, String> {
        if !self.is_accepting() {
            return Err("this node is shutting down".into());
        }
        let name = self.meant(model);
        let is_registered = self.registry.model(&name).is_some();
        // What the registry says must not be taken for news while the model has it and the registry does not.
        let busy = |_| "another change is under way: try again when it is done".to_owned();
        let _one_at_a_time = self.setting.try_lock().map_err(busy)?;
        if is_registered && self.model_named(&name).is_err() {
            return self.register_parameters(&name, &request.changes).await;
        }
        let changes = request.changes.clone();
        let outcome = self.model_named(&name)?.set_parameters(request, said).await?;
        if is_registered {
            let noted = self.register_parameters(&name, &changes).await;
            noted.map_err(|why| format!("it holds on this machine, but is not registered: {why}"))?;
        }
        Ok(outcome)
    }
}

pub(super) fn no_model(asked: &str) -> String {
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
