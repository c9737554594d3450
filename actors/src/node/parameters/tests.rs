use super::*;

fn given(pairs: &[(&str, &str)]) -> GivenParameters {
    GivenParameters(pairs.iter().map(|(name, value)| (name.parse().unwrap(), (*value).into())).collect())
}

#[test]
fn what_was_set_goes_before_the_file_and_that_before_the_default() {
    let config = given(&[("max_tokens", "300"), ("batch_size", "4"), ("kv_type", "int8")]);
    let layers = Layers { config, set: given(&[("max_tokens", "none"), ("context_length", "64")]) };
    let values = layers.resolve().unwrap();
    let expected =
        ModelParameters { context_length: 64, batch_size: 4, kv_type: KvKind::Int8, ..ModelParameters::default() };
    assert_eq!(values, expected);
    let shown = layers.shown(&values);
    let sources: Vec<Source> = shown.iter().map(|shown| shown.source).collect();
    use Source::{Config, Default, Set};
    assert_eq!(sources, [Set, Config, Set, Default, Default, Config, Default]);
    assert_eq!(shown[2].value, ParameterValue::Word("none".into()));
    let back = layers.set.with(&[(Parameter::MaxTokens, None)].into());
    assert_eq!(Layers { set: back, ..layers }.resolve().unwrap().max_tokens, Some(300));
}

#[test]
fn impossible_values_are_named() {
    for (name, value, part) in [
        ("batch_size", "0", "from 1 to 1024"),
        ("batch_size", "none", "from 1 to 1024"),
        ("threads", "many", "or `none`"),
        ("kv_type", "int4", "`f16` or `int8`"),
        ("context_length", "15", "from 16"),
    ] {
        let error = given(&[(name, value)]).over(ModelParameters::default()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{name} is {value}: ")) && error.contains(part), "{error}");
    }
    assert!("context".parse::<Parameter>().unwrap_err().to_string().contains("context_length, batch_size"));
}

#[test]
fn only_what_an_engine_was_made_with_takes_another_engine() {
    let old = ModelParameters::default();
    let room = old.room();
    let changed = |name: &str, value: &str| given(&[(name, value)]).over(old.clone()).unwrap();
    for (name, value, change) in [
        ("max_tokens", "3", Change::Live),
        ("max_tokens", "none", Change::Nothing),
        ("prefill_budget", "32", Change::Live),
        ("threads", "1", Change::Live),
        ("batch_size", "32", Change::Live),
        ("batch_size", "33", Change::Reload),
        ("context_length", "4096", Change::Reload),
        ("kv_type", "int8", Change::Reload),
        ("kv_memory_mib", "64", Change::Reload),
    ] {
        assert_eq!(old.change_to(&changed(name, value), room), change, "{name}={value}");
    }
}

#[test]
fn values_of_files_come_back_as_they_were() {
    let all = given(&[("context_length", "64"), ("kv_type", "int8"), ("max_tokens", "none")]);
    let json = serde_json::to_string(&all).unwrap();
    assert_eq!(json, r#"{"context_length":64,"max_tokens":"none","kv_type":"int8"}"#);
    assert_eq!(serde_json::from_str::<GivenParameters>(&json).unwrap(), all);
}
