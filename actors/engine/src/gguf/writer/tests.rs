use super::*;
use crate::gguf::Gguf;

fn plan() -> Plan {
    let mut plan = Plan::default();
    plan.set("general.architecture", &MetaValue::Text("llama".into()));
    plan.set("a.number", &MetaValue::U32(7));
    plan.set("a.float", &MetaValue::F32(0.5));
    plan.set("a.truth", &MetaValue::Bool(true));
    plan.set("some.texts", &MetaValue::Texts(vec!["é".into(), String::new()]));
    plan.set("some.numbers", &MetaValue::I32s(vec![-1, 2]));
    plan.set("some.floats", &MetaValue::F32s(vec![0.25]));
    plan.add(PlannedTensor { name: "first".into(), dimensions: vec![3], format: Format::F32 });
    plan.add(PlannedTensor { name: "second".into(), dimensions: vec![32, 2], format: Format::Q8_0 });
    plan
}

fn write(plan: &Plan, path: &Path, replace: bool) -> Result<(), WriteError> {
    plan.write(path, replace, |number, out| {
        out.write_all(&vec![number as u8 + 1; plan.tensors()[number].bytes() as usize]).unwrap();
        Ok::<_, WriteError>(())
    })
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let mut plan = plan();
    plan.set("a.number", &MetaValue::U32(8));
    write(&plan, &path, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), plan.file_bytes());
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.number("a.number").unwrap(), Some(8));
    assert_eq!(gguf.float("a.float").unwrap(), Some(0.5));
    assert_eq!(gguf.boolean("a.truth").unwrap(), Some(true));
    assert_eq!(gguf.texts("some.texts").unwrap().unwrap(), ["é", ""]);
    assert_eq!(gguf.integers("some.numbers").unwrap().unwrap().collect::<Vec<_>>(), [-1, 2]);
    assert_eq!(gguf.floats("some.floats").unwrap().unwrap().collect::<Vec<_>>(), [0.25]);
    let second = gguf.tensor("second").unwrap();
    assert_eq!(gguf.tensor_bytes(second).unwrap(), [2; 68]);
    let keys: Vec<_> = gguf.raw_metadata().map(|(key, _)| key.to_string()).collect();
    assert_eq!(keys[..2], ["general.architecture", "a.number"]);
    for (key, bytes) in gguf.raw_metadata() {
        assert_eq!(plan.metadata.iter().find(|(known, _)| known == key).unwrap().1, bytes, "{key}");
    }
}

#[test]
fn an_alignment_of_the_metadata_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let mut plan = plan();
    plan.set("general.alignment", &MetaValue::U32(256));
    plan.set_alignment(256);
    write(&plan, &path, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), plan.file_bytes());
    let gguf = Gguf::open(&path).unwrap();
    assert!(gguf.tensor("second").unwrap().offset.is_multiple_of(256));
}

#[test]
fn an_error_leaves_nothing_behind_and_nothing_is_replaced_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let failed = plan().write(&path, false, |_, _| Err(WriteError::Exists("no".into())));
    assert!(failed.is_err());
    assert_eq!(files(), 0);
    // A writer that gives too few bytes is found out.
    let short = plan().write(&path, false, |_, _| Ok::<_, WriteError>(())).unwrap_err().to_string();
    assert!(short.contains("0 bytes for tensor first of 12"), "{short}");
    assert_eq!(files(), 0);

    std::fs::write(&path, b"mine").unwrap();
    assert!(matches!(write(&plan(), &path, false), Err(WriteError::Exists(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    write(&plan(), &path, true).unwrap();
    assert!(Gguf::open(&path).is_ok());
    assert_eq!(files(), 1);
    let nowhere = write(&plan(), &folder.path().join("none/out.gguf"), false).unwrap_err().to_string();
    assert!(nowhere.contains("cannot be written"), "{nowhere}");
}
