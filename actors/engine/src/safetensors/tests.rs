use proptest::prelude::*;

use super::*;

fn file(head: &str, data: &[u8]) -> Vec<u8> {
    [&(head.len() as u64).to_le_bytes()[..], head.as_bytes(), data].concat()
}

fn small() -> Vec<u8> {
    let head = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}}"#;
    file(head, &(0..14).collect::<Vec<u8>>())
}

#[test]
fn a_sound_file_is_read() {
    let file = Safetensors::from_bytes(small()).unwrap();
    let b = &file.tensors()["b"];
    assert_eq!((b.shape.as_slice(), b.format()), (&[3][..], Some(Format::Bf16)));
    assert_eq!(file.bytes(b), [8, 9, 10, 11, 12, 13]);
    assert_eq!(file.tensors().len(), 2);
}

#[test]
fn errors_say_what_is_wrong_with_what() {
    let of = |bytes: Vec<u8>| Safetensors::from_bytes(bytes).unwrap_err().to_string();
    let tensor = |text: &str| of(file(&format!(r#"{{"odd":{text}}}"#), &[0; 8]));
    assert!(of(vec![]).contains("truncated: the length of its head"));
    assert!(of(b"GGUF\x03\0\0\0".to_vec()).contains("is this a safetensors file?"));
    assert!(of(file("{}", b"")[..9].to_vec()).contains("truncated: the head"));
    assert!(of(file("[]", b"")).contains("the head"));
    assert!(tensor(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,12]}"#).contains("truncated: tensor odd"));
    assert!(tensor(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#).contains("tensor odd: it lies at 4..0"));
    assert!(tensor(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,8]}"#).contains("has 4 bytes"));
    assert!(
        tensor(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#).contains("is impossible")
    );
    assert!(tensor(r#"{"dtype":"F3","shape":[1],"data_offsets":[0,4]}"#).contains("\"F3\" is not known"));
    let max = u64::MAX;
    assert!(
        tensor(&format!(r#"{{"dtype":"U8","shape":[1],"data_offsets":[{},{max}]}}"#, max - 1)).contains("truncated")
    );
    let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert!(of(file(&format!(r#"{{"a":{entry},"b":{entry}}}"#), &[0; 4])).contains("shares bytes with tensor a"));
    assert!(of(file(&format!(r#"{{"a":{entry},"a":{entry}}}"#), &[0; 4])).contains("tensor a is there twice"));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = small();
    for length in 0..whole.len() {
        assert!(Safetensors::from_bytes(whole[..length].to_vec()).is_err(), "{length}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((0usize..1000, any::<u8>()), 1..6)) {
        let mut bytes = small();
        for (place, value) in changes {
            let place = place % bytes.len();
            bytes[place] = value;
        }
        if let Ok(file) = Safetensors::from_bytes(bytes) {
            for entry in file.tensors().values() {
                prop_assert!(file.bytes(entry).len() as u64 <= file.file_bytes());
            }
        }
    }

    #[test]
    fn wild_numbers_never_panic(shape in proptest::collection::vec(any::<u64>(), 0..4), from: u64, to: u64) {
        let head = format!(r#"{{"a":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{from},{to}]}}}}"#);
        let _ = Safetensors::from_bytes(file(&head, &[0; 16]));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), short: bool) {
        let mut all = bytes;
        if short && all.len() >= 8 {
            all[1..8].fill(0);
        }
        let _ = Safetensors::from_bytes(all);
    }
}
