//! Parameters in the registry: which there can be, and that this node's models follow them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::registry::{Record, Value};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ModelRegistry;
use crate::node::{GivenParameters, ModelParameters, Parameter, ParameterChanges, ParameterError, ParameterValue};
use crate::worker::{ChangeRequest, ModelManager};

/// How soon a change is tried again that could not be made (the model loads, or another change is under way).
const AGAIN: Duration = Duration::from_secs(3);

impl From<&ParameterValue> for Value {
    fn from(value: &ParameterValue) -> Self {
        match value {
            ParameterValue::Number(number) => Self::Number(*number),
            ParameterValue::Word(word) => Self::Word(word.clone()),
        }
    }
}

impl From<&Value> for ParameterValue {
    fn from(value: &Value) -> Self {
        match value {
            Value::Number(number) => Self::Number(*number),
            Value::Word(word) => Self::Word(word.clone()),
        }
    }
}

/// Parameters as the registry keeps them.
pub(crate) fn to_values(changes: &ParameterChanges) -> BTreeMap<String, Option<Value>> {
    let changes = changes.iter();
    changes.map(|(name, value)| (name.as_str().to_owned(), value.as_ref().map(Value::from))).collect()
}

/// Fails where a model could not have these. An endpoint decides by itself on all but how much it is sent at once.
pub(crate) fn checked_parameters(given: &GivenParameters, is_endpoint: bool) -> Result<(), String> {
    given.over(ModelParameters::default()).map_err(|error: ParameterError| error.to_string())?;
    match given.0.keys().find(|name| is_endpoint && **name != Parameter::BatchSize) {
        Some(name) => Err(format!("{name} is the far server's own business: an endpoint has batch_size only")),
        None => Ok(()),
    }
}

/// What the model has to be told to have what the registry says. What the registry never spoke of stays as it is.
fn differences(record: &Record, set: &GivenParameters) -> ParameterChanges {
    let said = record.all_parameters();
    let known = said.iter().filter_map(|(name, value)| Some((name.parse::<Parameter>().ok()?, value)));
    let wanted = known.map(|(name, value)| (name, value.map(ParameterValue::from)));
    wanted.filter(|(name, value)| set.0.get(name) != value.as_ref()).collect()
}

/// Lets this node's models have what was said of them on any node, until `cancel`. `setting` is held by whoever sets
/// parameters here, which stand in the registry a moment later than in the model.
pub(crate) async fn follow(
    registry: Arc<ModelRegistry>,
    models: Arc<ModelManager>,
    setting: Arc<tokio::sync::Mutex<()>>,
    cancel: CancellationToken,
) -> Result<(), String> {
    let (mut changes, mut newcomers) = (registry.changes(), models.changes());
    loop {
        changes.mark_unchanged();
        newcomers.mark_unchanged();
        let mut done = true;
        for model in models.workers() {
            let _one_at_a_time = setting.lock().await;
            let record = registry.model(&model.name());
            let wanted = record.map(|record| differences(&record, &model.set_by_command())).unwrap_or_default();
            if wanted.is_empty() {
                continue;
            }
            let name = model.name();
            let request = ChangeRequest { changes: wanted, restart: false };
            let (said, _) = mpsc::channel(1);
            match cancel.run_until_cancelled(model.set_parameters(request, said)).await {
                None => return Ok(()),
                Some(Ok(outcome)) => tracing::info!(model = name, ?outcome, "parameters set as the registry says"),
                Some(Err(why)) => {
                    tracing::info!(model = name, why, "parameters that the registry says are not set yet");
                    done = false;
                }
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            changed = changes.changed() => changed.map_err(|error| error.to_string())?,
            changed = newcomers.changed() => changed.map_err(|error| error.to_string())?,
            () = tokio::time::sleep(AGAIN), if !done => {}
        }
    }
}
