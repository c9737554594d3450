use proptest::prelude::*;

use super::tiny::{Meta, Tiny, TinyTensor, llama};
use super::*;

fn small() -> Tiny {
    let mut tiny = Tiny::default();
    tiny.meta("general.architecture", Meta::Text("llama".into()))
        .meta("a.number", Meta::U32(7))
        .meta("a.large", Meta::U64(u64::MAX))
        .meta("a.float", Meta::F32(0.5))
        .meta("a.truth", Meta::Bool(true))
        .meta("some.texts", Meta::Texts(vec!["é".into(), String::new()]))
        .meta("some.numbers", Meta::I32s(vec![-1, 2]))
        .tensor_f32("first", &[3], &[1.0, 2.0, 3.0])
        .tensor_f32("second", &[2, 2], &[4.0, 5.0, 6.0, 7.0]);
    tiny
}

#[test]
fn a_sound_file_is_read() {
    let gguf = Gguf::from_bytes(small().bytes()).unwrap();
    assert_eq!(gguf.text("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.number("a.number").unwrap(), Some(7));
    assert_eq!(gguf.find("a.large"), Some(&Value::Unsigned(u64::MAX)));
    assert_eq!(gguf.float("a.float").unwrap(), Some(0.5));
    assert_eq!(gguf.boolean("a.truth").unwrap(), Some(true));
    assert_eq!(gguf.texts("some.texts").unwrap().unwrap(), ["é", ""]);
    assert_eq!(gguf.integers("some.numbers").unwrap().unwrap().collect::<Vec<_>>(), [-1, 2]);
    assert_eq!(gguf.number("nothing").unwrap(), None);
    let second = gguf.tensor("second").unwrap();
    assert_eq!(second.dimensions, [2, 2]);
    assert_eq!(gguf.tensor_bytes(second).unwrap()[..4], 4.0f32.to_le_bytes());
}

fn error(change: impl FnOnce(&mut Tiny)) -> String {
    let mut tiny = small();
    change(&mut tiny);
    Gguf::from_bytes(tiny.bytes()).unwrap_err().to_string()
}

#[test]
fn errors_say_what_is_wrong_with_what() {
    let gguf = Gguf::from_bytes(small().bytes()).unwrap();
    assert_eq!(
        gguf.text("a.number").unwrap_err().to_string(),
        "the file is damaged: a.number: expected a text, the file has a whole number out of the expected range or type"
    );
    assert!(gguf.tensor("third").unwrap_err().to_string().contains("tensor third is missing"));
    let misshapen = |dimensions: Vec<u64>, format| {
        move |tiny: &mut Tiny| tiny.tensors.push(TinyTensor { name: "odd".into(), dimensions, format, bytes: vec![] })
    };
    assert!(
        error(misshapen(vec![u64::MAX, 2], 0))
            .contains("tensor odd: its dimensions [18446744073709551615, 2] are impossible")
    );
    assert!(error(misshapen(vec![0], 0)).contains("are impossible"));
    assert!(error(misshapen(vec![1; 5], 0)).contains("5 dimensions"));
    assert!(error(misshapen(vec![33], 3)).contains("rows of 33 weights are not whole blocks of 32"));
    assert!(
        error(|tiny| {
            tiny.meta("general.alignment", Meta::U32(33));
        })
        .contains("general.alignment")
    );
    let second = small().tensors[1].clone();
    assert!(error(|tiny| tiny.tensors.push(second)).contains("tensor second: it is there twice"));
    let unknown = Gguf::from_bytes({
        let mut tiny = small();
        misshapen(vec![256], 10)(&mut tiny);
        tiny.bytes()
    })
    .unwrap();
    let message = unknown.tensor_bytes(unknown.tensor("odd").unwrap()).unwrap_err().to_string();
    assert!(
        message.starts_with("tensor odd is Q2_K, which is not supported; supported are F32, F16, BF16, Q4_0"),
        "{message}"
    );
}

#[test]
fn other_files_are_told_apart() {
    let of = |bytes: &[u8]| Gguf::from_bytes(bytes.to_vec()).unwrap_err().to_string();
    assert!(of(b"").contains("not a GGUF file"));
    assert!(of(b"PK\x03\x04").contains("not a GGUF file"));
    assert!(of(b"GGUF\x01\0\0\0").contains("version 1 is not supported"));
    assert!(of(b"GGUF\0\0\0\x03").contains("big-endian"));
}

#[test]
fn a_file_cut_anywhere_is_refused_as_truncated() {
    let whole = llama(super::tiny::Sizes { layers: 1, ..Default::default() }).bytes();
    let step = (whole.len() / 500).max(1);
    for length in (4..whole.len()).step_by(step).chain(whole.len() - 40..whole.len()) {
        match Gguf::from_bytes(whole[..length].to_vec()) {
            Err(GgufError::Truncated { length: got, .. }) => assert_eq!(got, length as u64),
            // A count that is larger than what is left is caught before anything is read.
            Err(GgufError::TooMany { .. }) => {}
            other => panic!("cut to {length} of {}: {other:?}", whole.len()),
        }
    }
    let message = Gguf::from_bytes(whole[..whole.len() - 1].to_vec()).unwrap_err().to_string();
    assert!(message.contains("the file is truncated: tensor blk.0.ffn_down.weight needs bytes"), "{message}");
    assert!(message.contains("download it again"), "{message}");
}

#[test]
fn the_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    std::fs::write(&path, &small().bytes()[..60]).unwrap();
    let message = Gguf::open(&path).unwrap_err().to_string();
    assert!(message.contains("cut.gguf: the file is truncated"), "{message}");
    assert!(Gguf::open(folder.path()).unwrap_err().to_string().contains("cannot read"));
    assert!(Gguf::open(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
    std::fs::write(&path, b"").unwrap();
    assert!(Gguf::open(&path).is_err());
}

/// Everything that a loader would do with a file that parses.
fn use_all(gguf: &Gguf) {
    for info in gguf.tensors() {
        if let Ok(bytes) = gguf.tensor_bytes(info) {
            assert!(bytes.len() as u64 <= gguf.file_bytes());
        }
    }
    let _ = crate::model::Hyperparameters::from_gguf(gguf);
    let _ = crate::text::Tokenizer::from_gguf(gguf);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), magic in any::<bool>()) {
        if magic {
            let mut head = b"GGUF\x03\0\0\0".to_vec();
            head.append(&mut bytes);
            bytes = head;
        }
        if let Ok(gguf) = Gguf::from_bytes(bytes) {
            use_all(&gguf);
        }
    }

    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 1..8), model in any::<bool>()) {
        let mut bytes = if model {
            let mut tiny = llama(super::tiny::Sizes { layers: 1, ..Default::default() });
            // In a format that nobody can size, so that the file parses without their bytes and the loaders go on.
            tiny.tensors.iter_mut().for_each(|tensor| {
                tensor.bytes.clear();
                tensor.format = 99;
            });
            tiny.bytes()
        } else {
            small().bytes()
        };
        for (place, value) in changes {
            let place = (place * bytes.len() as f64) as usize;
            bytes[place] = value;
        }
        if let Ok(gguf) = Gguf::from_bytes(bytes) {
            use_all(&gguf);
        }
    }

    #[test]
    fn wild_numbers_never_panic(place in 0usize..200, number in prop_oneof![Just(u64::MAX), Just(i64::MAX as u64), Just(1 << 40), Just(1 << 32), any::<u64>()]) {
        let mut bytes = small().bytes();
        let place = place.min(bytes.len() - 8);
        bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
        if let Ok(gguf) = Gguf::from_bytes(bytes) {
            use_all(&gguf);
        }
    }
}
